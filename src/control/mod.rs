//! The operator's side: events out.

pub mod events;
