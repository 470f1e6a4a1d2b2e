//! What a job has done for it, chunk by chunk, and how a chunk ends.

use std::time::Duration;

use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};

/// Names a chunk of work on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkId(pub u64);

/// Something for the engine to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its name, for [`super::Jobs::ended`].
    pub id: ChunkId,
    /// What to do.
    pub work: Work,
}

/// What a chunk of work is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Write the winner to this replica.
    Resync {
        /// The replica.
        replica: ReplicaIndex,
        /// The sectors.
        range: SectorRange,
    },
    /// Ask every replica, and vote.
    Scrub {
        /// The sectors.
        range: SectorRange,
        /// Write the winner to those that lost or failed.
        repair: bool,
        /// Damage that is found is to be told to [`super::Jobs::damaged`].
        spreads: bool,
    },
    /// Make durable what was written.
    Flush,
}

/// How a chunk of work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ChunkEnd {
    /// Sectors that lost the vote, counted once for each replica.
    pub found: u64,
    /// Sectors written.
    pub written: u64,
    /// Sectors that could not be written.
    pub not_written: u64,
    /// Sectors without a winner.
    pub undecided: u64,
    /// Members that gave nothing for it.
    pub unread: ReplicaSet,
    /// A flush, or all of it, failed.
    pub failed: bool,
}

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// This, now.
    Chunk(Chunk),
    /// Nothing before this moment.
    At(Duration),
    /// Nothing until something changes.
    Nothing,
}
