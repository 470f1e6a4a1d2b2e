//! The state of jobs as operators see it, and why a job fails or does not start.

use std::fmt;
use std::str::FromStr;

use super::findings::{FindingsByReplica, Places};
use crate::common::message::counted;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::JOBS_MAX;

/// Identifies a job, for as long as the daemon runs.
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

/// No job has this id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no job has this id; query-jobs lists the jobs")]
pub struct UnknownJob;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobKind {
    /// Copies to a stale replica.
    Resync(ReplicaIndex),
    /// Reads all replicas and votes.
    Scrub {
        /// Repair what is found corrupt or unreadable.
        repair: bool,
    },
    /// Scrubs the surroundings of corruption that a read found.
    NeighbourhoodScrub,
    /// Where no vote has a winner, writes what this replica holds to the others.
    Prefer(ReplicaIndex),
    /// Makes the replicas equal where an unclean end of the disk may have left differences (S5).
    Recovery,
}

impl JobKind {
    /// The name of a scrub of the whole disk.
    pub const SCRUB: &'static str = "quorum-scrub";
    /// The names of all kinds.
    pub const TYPES: [&'static str; 5] = [
        "quorum-resync",
        Self::SCRUB,
        "quorum-neighbourhood-scrub",
        "quorum-prefer",
        "quorum-recovery",
    ];

    /// The replica that a resync copies to, or that the operator prefers.
    pub fn replica(self) -> Option<ReplicaIndex> {
        match self {
            Self::Resync(replica) | Self::Prefer(replica) => Some(replica),
            Self::Scrub { .. } | Self::NeighbourhoodScrub | Self::Recovery => None,
        }
    }

    /// The kind in events and commands.
    pub fn name(self) -> &'static str {
        match self {
            Self::Resync(_) => Self::TYPES[0],
            Self::Scrub { .. } => Self::SCRUB,
            Self::NeighbourhoodScrub => Self::TYPES[2],
            Self::Prefer(_) => Self::TYPES[3],
            Self::Recovery => Self::TYPES[4],
        }
    }
}

/// The status of a job: the values of QEMU's `JobStatus` that occur here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JobStatus {
    /// It was created.
    Created,
    /// It runs, or waits for an evicted replica.
    Running,
    /// It starts no chunk until it is resumed.
    Paused,
    /// It was cancelled or failed, and is ending.
    Aborting,
    /// It has ended.
    Concluded,
    /// It is deleted.
    Null,
}

impl JobStatus {
    /// QEMU's name.
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

/// A job at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobInfo {
    /// Its id.
    pub id: JobId,
    /// What it does.
    pub kind: JobKind,
    /// Its status.
    pub status: JobStatus,
    /// Bytes that are done.
    pub current_bytes: u64,
    /// Bytes in all. May grow while a resync runs.
    pub total_bytes: u64,
    /// Speed limit in bytes a second; 0: as fast as the guest's load allows.
    pub speed_bytes: u64,
    /// Sectors that it found corrupt, counted for each replica.
    pub corrupt_sectors_found: u64,
    /// Sectors that it could not read, counted for each replica.
    pub unreadable_sectors_found: u64,
    /// Sectors that it has written.
    pub sectors_written: u64,
    /// What it has found on replicas and written to them.
    pub findings: FindingsByReplica,
    /// Sectors without a winner.
    pub undecided: Places,
    /// Members that it could not read everywhere.
    pub unread: ReplicaSet,
    /// Why it has failed, or will.
    pub error: Option<JobFailure>,
}

/// Why a job failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobFailure {
    /// The replica is still stale.
    #[error("{} could not be copied", counted(*.sectors, "sector"))]
    NotCopied {
        /// Stale sectors.
        sectors: u64,
    },
    /// The replica was removed while its resync ran.
    #[error("the replica was removed")]
    Removed,
    /// Some sectors are undecided.
    #[error("no quorum for {}", counted(*.sectors, "sector"))]
    NoQuorum {
        /// Their number.
        sectors: u64,
    },
    /// Some replicas could not be read everywhere.
    #[error("{} could not be read everywhere", counted(.replicas.len() as u64, "replica"))]
    NotRead {
        /// Which.
        replicas: ReplicaSet,
    },
    /// The data it wrote is not durable.
    #[error("the data it wrote could not be flushed")]
    NotFlushed,
    /// Some sectors could not be repaired everywhere.
    #[error("{} could not be written", counted(*.sectors, "sector"))]
    NotRepaired {
        /// Their number.
        sectors: u64,
    },
}

/// A change of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobEvent {
    /// The job after the change.
    pub job: JobInfo,
    /// What has changed.
    pub what: JobChange,
}

/// What has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobChange {
    /// Its status (JOB_STATUS_CHANGE).
    Status,
    /// It ended, with or without an error (BLOCK_JOB_COMPLETED).
    Completed,
    /// It was cancelled (BLOCK_JOB_CANCELLED).
    Cancelled,
}

/// Why a job does not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotStarted {
    /// The replica has one already.
    #[error("{0} resyncs this replica already")]
    InResync(JobId),
    /// The disk has no such replica.
    #[error("it is not a replica of this disk")]
    NotAReplica,
    /// An evicted replica cannot decide.
    #[error("it is evicted, and so does not take part in votes")]
    NotInService,
    /// No vote has ended without a winner.
    #[error("every sector had a winner when it was last read; a scrub reads all of them")]
    NothingUndecided,
    /// It has no copy that may decide.
    #[error("it is itself not up to date in any of the sectors without a winner")]
    NotUpToDate,
    /// There are too many.
    #[error("{JOBS_MAX} jobs run already; cancel one or wait for its end")]
    TooMany,
}
