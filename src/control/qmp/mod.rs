//! The monitor: the QEMU Machine Protocol, as in QEMU's docs/interop/qmp-spec, so that its clients
//! work unchanged.
//!
//! `splitter` finds the messages in the bytes of a client, [`session`] answers them or has a
//! [command](commands) run, `executor` is the thread that runs commands. The
//! [publisher](super::publisher) moves the bytes, and sends events to the same clients.
//!
//! Invariants: after any input a session is in a state from which the client can continue, or the
//! connection ends; each message has one reply, in order; the memory that a client can use is
//! bounded.

mod block;
mod change;
pub mod commands;
mod error;
pub(super) mod executor;
pub mod session;
mod splitter;
mod version;
