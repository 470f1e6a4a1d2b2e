//! The vote: pure functions and plain values, no file, clock, thread or guest in sight.
//!
//! [`vote`] decides what a sector holds, [`tally`] whether a write or a flush succeeded, and
//! [`health`] which sectors of each replica are stale.

#![forbid(unsafe_code)]

pub mod health;
pub mod tally;
pub mod vote;
