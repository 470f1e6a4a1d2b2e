//! What another process still holds: descriptors whose flags it may change at any time, and memory
//! whose file it may truncate.
//!
//! Invariant: no thread waits for a descriptor because of what its other holders do to it.

#[forbid(unsafe_code)]
pub mod close;
#[forbid(unsafe_code)]
pub mod descriptor;
pub mod mapping;
#[forbid(unsafe_code)]
pub mod reserve;
pub mod signal;
