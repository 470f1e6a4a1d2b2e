//! Chunks: the units in which a job has its work done, and their results.

use std::time::Duration;

use super::findings::{FindingsByReplica, Places};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};

/// Identifies a chunk in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkId(pub u64);

/// A chunk for the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// For [`super::Jobs::ended`].
    pub id: ChunkId,
    /// What to do.
    pub work: Work,
}

/// The work of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Write the winner to this replica.
    Resync {
        /// The replica.
        replica: ReplicaIndex,
        /// The sectors.
        range: SectorRange,
    },
    /// Read all replicas and vote.
    Scrub {
        /// The sectors.
        range: SectorRange,
        /// Write the winner to the replicas that lost or returned an error.
        repair: bool,
        /// Report corruption to [`super::Jobs::corruption_found`].
        spreads: bool,
    },
    /// Find out how much of the range is a hole on every replica concerned, from its start on.
    Skip {
        /// The replica that a resync copies to. It is fresh then in what is skipped.
        replica: Option<ReplicaIndex>,
        /// The sectors.
        range: SectorRange,
    },
    /// Flush what the job has written.
    Flush,
}

/// The result of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ChunkEnd {
    /// What was found on replicas and written to them.
    pub findings: FindingsByReplica,
    /// Sectors that need not be read.
    pub skipped: u64,
    /// Sectors without a winner.
    pub undecided: Places,
    /// Replicas that could not be read.
    pub unread: ReplicaSet,
    /// A flush failed, or the whole chunk.
    pub failed: bool,
}

impl ChunkEnd {
    /// Sectors written, counted for each replica.
    pub fn written(&self) -> u64 {
        self.findings.values().map(|found| found.written).sum()
    }
}

/// What the engine does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// This chunk, now.
    Chunk(Chunk),
    /// Ask again at this time.
    At(Duration),
    /// Ask again when something changes.
    Nothing,
}
