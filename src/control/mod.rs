//! The operator's side: events out.
//!
//! [`queue`] takes the engine's reports from any thread and folds floods (`fold`), [`events`] gives them
//! their JSON form, [`publisher`] hands them to the readers of the event socket (`reader`). [`socket`] makes
//! the Unix sockets that the daemon listens on.
//!
//! Nothing here is known to the voter, and nothing here can make it wait.

pub mod events;
mod fold;
pub mod publisher;
pub mod queue;
mod reader;
pub mod socket;
