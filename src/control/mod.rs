//! The operator's side: commands in, events and state out.
//!
//! [`queue`] takes the engine's reports from any thread and folds floods (`fold`), [`events`] gives
//! them their JSON form, [`state`] is what can be seen of the disk, [`map_state`] where on it what
//! was found (`map`), [`publisher`] hands them to the readers of the event socket and to the
//! clients of the monitor ([`qmp`]), whose commands call the [`Operator`]. [`metrics`] are the
//! state in the words of Prometheus, which [`http`] serves. [`socket`] makes the Unix sockets that
//! the daemon listens on.
//!
//! Nothing here is known to the voter, and nothing here can make it wait.

#![forbid(unsafe_code)]

mod acceptor;
mod client;
pub mod events;
mod fold;
pub mod http;
mod json;
mod map;
pub mod map_state;
pub mod metrics;
pub mod publisher;
pub mod qmp;
pub mod queue;
mod reader;
pub mod socket;
pub mod state;
pub(crate) mod wake;

use std::path::PathBuf;

use self::map_state::MapState;
use self::state::{DiskState, JobState};

/// What can be done to a disk that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Remember an image under a name, for [`Self::AddReplica`].
    AddNode {
        /// The name.
        node_name: String,
        /// The image.
        path: PathBuf,
    },
    /// Forget such an image.
    RemoveNode(String),
    /// Add an image that was remembered to the replicas.
    AddReplica(String),
    /// Remove a replica, and close its image.
    RemoveReplica(String),
    /// Make the disk larger.
    Resize {
        /// Its bytes from then on.
        size_bytes: u64,
    },
    /// Begin to read everything on every replica.
    Scrub {
        /// Write the winners over what lost.
        repair: bool,
        /// Bytes a second at most; 0: as fast as leaves the guest its share.
        speed_bytes: u64,
    },
    /// Begin to bring a replica up to date.
    Resync {
        /// The replica.
        node_name: String,
        /// Bytes a second at most; 0: as fast as leaves the guest its share.
        speed_bytes: u64,
    },
    /// Tell a job something.
    Job {
        /// What it is called.
        id: String,
        /// What to do.
        order: JobOrder,
    },
}

/// What a job can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobOrder {
    /// Begin nothing until it is resumed.
    Pause,
    /// Go on.
    Resume,
    /// End.
    Cancel,
    /// Do so many bytes a second at most; 0: as fast as leaves the guest its share.
    Speed(u64),
}

/// What an operator can see and ask for; the daemon does it.
pub trait Operator: Send + Sync {
    /// What there is to be seen of the disk. Waits for no replica.
    fn state(&self) -> DiskState;

    /// Where on the disk which replica was bad, in so many buckets at most. Waits for no replica.
    fn map(&self, buckets: usize) -> MapState;

    /// The jobs, oldest first.
    fn jobs(&self) -> Vec<JobState>;

    // Commands call these from one thread, one at a time, and may wait there.

    /// Changes the disk. Returns what the job is called that was begun for it, if there is one.
    ///
    /// # Errors
    /// One line; then nothing has changed.
    fn change(&self, change: Change) -> Result<Option<String>, String>;

    /// Has the daemon end as on SIGTERM; does not wait for that.
    fn quit(&self);
}
