//! The operator's side: commands in, events and state out.
//!
//! - [`queue`] takes events from any thread and folds floods (`fold`); [`events`] formats them.
//! - [`publisher`] sends them to the readers of the event socket, the clients of the monitor and
//!   the log. The commands of those clients ([`qmp`]) call the [`Operator`].
//! - [`state`] is the disk as operators see it and [`job_state`] a job, with the errors that they
//!   have not cleared ([`errors`]) and what needs their attention ([`condition`]). [`map_state`] is
//!   the map of findings (`map`). [`metrics`] formats the state for Prometheus, and [`http`] serves
//!   it.
//! - [`socket`] creates the UNIX sockets that the daemon listens on.
//!
//! The engine does not know this room, and never waits for it.

#![forbid(unsafe_code)]

mod acceptor;
mod client;
pub mod condition;
pub mod errors;
pub mod events;
mod flapping;
mod fold;
pub mod http;
pub mod job_history;
pub mod job_state;
mod json;
pub mod loss_state;
mod map;
pub mod map_state;
pub mod metrics;
pub mod publisher;
pub mod qmp;
pub mod queue;
mod reader;
mod scrub_watch;
pub mod socket;
pub mod state;
pub(crate) mod wake;

use std::path::PathBuf;

use self::job_history::EndedJob;
use self::job_state::JobState;
use self::loss_state::LossState;
use self::map_state::MapState;
use self::state::DiskState;

/// A change of a disk that is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Give an image a name, for [`Self::AddReplica`].
    AddNode {
        /// The name.
        node_name: String,
        /// The image.
        path: PathBuf,
    },
    /// Remove a name that [`Self::AddNode`] gave to an image.
    RemoveNode(String),
    /// Make a named image a replica.
    AddReplica {
        /// The name.
        node_name: String,
        /// Overwrite data that it holds.
        force: bool,
    },
    /// Give a replica another name.
    RenameReplica {
        /// Its name.
        node_name: String,
        /// The new one.
        new_name: String,
    },
    /// Remove a replica, and close its image.
    RemoveReplica(String),
    /// Make the disk larger.
    Resize {
        /// Its new size in bytes.
        size_bytes: u64,
    },
    /// Start a scrub.
    Scrub {
        /// Repair what is found corrupt or unreadable.
        repair: bool,
        /// Speed limit in bytes a second; 0: as fast as the guest's load allows.
        speed_bytes: u64,
    },
    /// Start a resync of a stale replica.
    Resync {
        /// The replica.
        node_name: String,
        /// Speed limit in bytes a second; 0: as fast as the guest's load allows.
        speed_bytes: u64,
    },
    /// Start a job in which a replica decides where no vote has a winner.
    Prefer {
        /// The replica.
        node_name: String,
        /// What the other replicas hold there may be lost.
        force: bool,
        /// Speed limit in bytes a second; 0: as fast as the guest's load allows.
        speed_bytes: u64,
    },
    /// The vote threshold is to be this one; `None`: more than half of the replicas, however many
    /// there are.
    Threshold(Option<usize>),
    /// Clear the errors of a replica; without a name, those of the guest and of all replicas, and
    /// expect as many replicas as there are.
    ClearErrors(Option<String>),
    /// Submit the requests again that are held.
    Continue,
    /// Change a job.
    Job {
        /// Its id.
        id: String,
        /// What to do.
        order: JobOrder,
    },
}

/// A change of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobOrder {
    /// Start no chunk until it is resumed.
    Pause,
    /// Continue.
    Resume,
    /// End.
    Cancel,
    /// Set the speed limit in bytes a second; 0: as fast as the guest's load allows.
    Speed(u64),
}

/// The disk as the monitor and the metrics see it. The daemon implements it.
pub trait Operator: Send + Sync {
    /// The state of the disk. Does not wait for a replica.
    fn state(&self) -> DiskState;

    /// The map of findings, in at most `buckets` buckets. Does not wait for a replica.
    fn map(&self, buckets: usize) -> MapState;

    /// The jobs, oldest first.
    fn jobs(&self) -> Vec<JobState>;

    /// The last jobs that have ended, in the order of their ends.
    fn ended_jobs(&self) -> Vec<EndedJob>;

    // Threads that serve no events call the following.

    /// Changes the disk. Waits for the file system of an image if that is to be opened, closed or
    /// grown. Returns the id of the job that was started for it, if there is one.
    ///
    /// # Errors
    /// If the change fails; nothing has changed. The text is one line.
    fn change(&self, change: Change) -> Result<Option<String>, String>;

    /// What would be lost with a replica; with `force` it is removed, whatever is lost. Waits like
    /// [`Self::change`].
    ///
    /// # Errors
    /// If too few replicas would be left, or there is no such replica; nothing has changed. The
    /// text is one line.
    fn fail(&self, node_name: &str, force: bool) -> Result<LossState, String>;

    /// Ends the daemon as SIGTERM does. Does not wait for the end.
    fn quit(&self);
}
