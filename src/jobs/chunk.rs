//! Chunks: the units in which a job has its work done, and their results.

use std::collections::BTreeMap;
use std::time::Duration;

use super::findings::index;
use crate::common::operation::OperationType;
use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};

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
        /// Where there is no winner, write what this replica holds to the others.
        prefers: Option<ReplicaIndex>,
    },
    /// Find out which parts of the range are a hole on every replica concerned.
    Skip {
        /// What becomes of it.
        purpose: SkipPurpose,
        /// The sectors.
        range: SectorRange,
    },
    /// Flush what the job has written.
    Flush,
}

/// What a job does where all replicas have a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipPurpose {
    /// The replica that a resync copies to is fresh there.
    Resync(ReplicaIndex),
    /// A scrub need not read it.
    Scrub,
    /// It is recovered.
    Recover,
}

/// The result of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ChunkEnd {
    /// What was found on replicas and written to them; of those with which there was something to
    /// do.
    pub found: BTreeMap<ReplicaIndex, Found>,
    /// Of a question for holes: what need not be read, in order.
    pub skipped: Vec<SectorRange>,
    /// Of a question for holes: up to where all else has data.
    pub known_until: u64,
    /// Sectors without a winner.
    pub undecided: Vec<SectorRange>,
    /// Replicas that could not be read everywhere.
    pub unread: ReplicaSet,
    /// A flush failed, or the whole chunk.
    pub failed: bool,
}

/// What was found on a replica and written to it: runs of sectors, each in order.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Found {
    /// It lost a vote.
    pub corrupt: Vec<SectorRange>,
    /// It could not read them.
    pub unreadable: Vec<SectorRange>,
    /// They were written to it; in no order.
    pub written: Vec<SectorRange>,
    /// They could not be written to it; in no order.
    pub not_written: Vec<SectorRange>,
    /// Its last error of a read, a write and a flush.
    pub errors: [Option<Errno>; 3],
}

impl ChunkEnd {
    /// What was found on a replica and written to it.
    pub fn on(&mut self, replica: ReplicaIndex) -> &mut Found {
        self.found.entry(replica).or_default()
    }

    /// Sectors that need not be read.
    pub fn skipped_sectors(&self) -> u64 {
        self.skipped.iter().map(|range| range.count).sum()
    }

    /// Sectors written, counted for each replica.
    pub fn written(&self) -> u64 {
        let written = self.found.values().flat_map(|found| &found.written);
        written.map(|range| range.count).sum()
    }
}

impl Found {
    /// Records an error that the replica returned.
    pub fn failed(&mut self, operation: OperationType, errno: Errno) {
        self.errors[index(operation)] = Some(errno);
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
