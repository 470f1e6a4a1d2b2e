//! The monitor: the QEMU Machine Protocol, as QEMU's docs/interop/qmp-spec describes it, so that
//! its clients work unchanged.
//!
//! [`splitter`](self) finds the messages in what a client sends, [`session`] answers them or has a
//! [command](commands) run, `executor` is the thread on which commands run. Bytes are moved by the
//! [publisher](super::publisher), which tells the same clients of events.
//!
//! Invariants: nothing a client sends leaves its session in another state than a client can go on
//! from, or ends the connection; each message has one reply, in order; what a client can make us
//! keep is bounded.

mod admin;
mod block;
pub mod commands;
pub(super) mod executor;
pub mod session;
mod splitter;
