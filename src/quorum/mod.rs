//! The vote: pure functions and plain values. No file, clock, thread or guest.
//!
//! [`vote`](mod@vote) finds the winner of each sector, [`tally`] whether a write or a flush
//! succeeded, and [`health`] which sectors of each replica are stale.

#![forbid(unsafe_code)]

pub mod health;
pub mod tally;
pub mod vote;
