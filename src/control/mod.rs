//! The operator's side: commands in, events and state out.
//!
//! [`queue`] takes the engine's reports from any thread and folds floods (`fold`), [`events`] gives them
//! their JSON form, [`state`] is what can be seen of the disk, [`publisher`] hands them to the readers of the event socket and to the clients of the monitor
//! ([`qmp`]), whose commands call the [`Operator`]. [`metrics`] are the state in the words of Prometheus, which [`http`]
//! serves. [`socket`] makes the Unix sockets that the daemon listens on.
//!
//! Nothing here is known to the voter, and nothing here can make it wait.

mod client;
mod door;
pub mod events;
mod fold;
pub mod http;
mod json;
pub mod metrics;
pub mod publisher;
pub mod qmp;
pub mod queue;
mod reader;
pub mod socket;
pub mod state;

use self::state::DiskState;

/// What an operator can see and ask for; the daemon does it.
pub trait Operator: Send + Sync {
    /// What there is to be seen of the disk. Waits for no replica.
    fn state(&self) -> DiskState;

    // Commands call these from one thread, one at a time, and may wait there.

    /// Has the daemon end as on SIGTERM; does not wait for that.
    fn quit(&self);
}
