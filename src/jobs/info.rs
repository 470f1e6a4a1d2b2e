//! What can be seen of jobs, and the reasons why one fails or is not begun.

use std::fmt;
use std::str::FromStr;

use crate::common::ReplicaIndex;
use crate::limits::JOBS_MAX;

/// Names a job, for as long as the daemon runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u32);

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "job{}", self.0)
    }
}

impl FromStr for JobId {
    type Err = UnknownJob;

    fn from_str(text: &str) -> Result<Self, UnknownJob> {
        let number = text
            .strip_prefix("job")
            .and_then(|number| number.parse().ok());
        let id = number.map(Self).filter(|id| id.to_string() == text);
        id.ok_or(UnknownJob)
    }
}

/// No job has this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no such job")]
pub struct UnknownJob;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobKind {
    /// Brings this replica up to date.
    Resync(ReplicaIndex),
    /// Reads everything on every replica, and votes.
    Scrub {
        /// Write the winner over what lost.
        repair: bool,
    },
    /// Scrubs what is near to damage that was found.
    NeighbourhoodScrub,
}

impl JobKind {
    /// The replica that a resync copies to.
    pub fn replica(self) -> Option<ReplicaIndex> {
        match self {
            Self::Resync(replica) => Some(replica),
            Self::Scrub { .. } | Self::NeighbourhoodScrub => None,
        }
    }

    /// The kind in events and commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resync(_) => "quorum-resync",
            Self::Scrub { .. } => "quorum-scrub",
            Self::NeighbourhoodScrub => "quorum-neighbourhood-scrub",
        }
    }
}

/// The state of a job: those of QEMU's `JobStatus` that occur here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobStatus {
    /// It has been made.
    Created,
    /// It is at work, or waits for a replica.
    Running,
    /// It begins nothing until it is resumed.
    Paused,
    /// It was cancelled, and the last of it is not back.
    Aborting,
    /// It has ended.
    Concluded,
    /// It is forgotten.
    Null,
}

impl JobStatus {
    /// The name that QEMU has for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// All that there is to know of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// Its name.
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// Its state.
    pub status: JobStatus,
    /// How much of it is done.
    pub current_bytes: u64,
    /// How much there is to do. That of a resync may grow while it runs.
    pub total_bytes: u64,
    /// Bytes a second, at most; 0: as fast as leaves the guest its share.
    pub speed_bytes: u64,
    /// Sectors that it found to be bad, counted once for each replica.
    pub corrupt_sectors_found: u64,
    /// Sectors that it has written.
    pub sectors_written: u64,
    /// What keeps it from having done what it was to do.
    pub error: Option<JobFailure>,
}

/// What a job could not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobFailure {
    /// The replica could not be brought up to date.
    #[error("{sectors} sectors could not be copied")]
    NotCopied {
        /// How many sectors are still stale.
        sectors: u64,
    },
    /// The replica was removed meanwhile.
    #[error("the replica was removed")]
    Removed,
    /// No version of some sectors has a quorum.
    #[error("{sectors} sectors have no quorum")]
    NoQuorum {
        /// How many sectors.
        sectors: u64,
    },
    /// Some replicas could not be read everywhere.
    #[error("{replicas} replicas could not be read everywhere")]
    NotRead {
        /// How many replicas.
        replicas: usize,
    },
    /// What was written could not be made durable.
    #[error("what was written could not be flushed")]
    NotFlushed,
    /// What was bad could not be written everywhere.
    #[error("{sectors} bad sectors could not be written")]
    NotRepaired {
        /// How many sectors.
        sectors: u64,
    },
}

/// Something to tell of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobEvent {
    /// The job, as it was then.
    pub job: JobInfo,
    /// What has happened.
    pub what: JobChange,
}

/// What has happened to a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobChange {
    /// Its status is another one (JOB_STATUS_CHANGE).
    Status,
    /// It has come to its end, with or without an error (BLOCK_JOB_COMPLETED).
    Completed,
    /// It was cancelled (BLOCK_JOB_CANCELLED).
    Cancelled,
}

/// Why a job is not begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotBegun {
    /// The replica has one already.
    #[error("it is being brought up to date already, by {0}")]
    InResync(JobId),
    /// The replica is not the disk's.
    #[error("it is no replica of this disk")]
    NoMember,
    /// There are too many.
    #[error("there are {JOBS_MAX} jobs already")]
    TooMany,
}
