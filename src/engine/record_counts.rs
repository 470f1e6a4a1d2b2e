//! How often the records were written, and how often that has failed: for the operator.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::REPLICAS_MAX;

/// What an operator sees of the records of a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RecordFigures {
    /// Sectors in which something may have been changed and not been flushed, as the records say.
    pub marked_sectors: u64,
    /// Rounds of writes since the start: each goes to the records of all replicas in service.
    pub rounds: u64,
}

/// Counted since the start. Engines count one after the other: they hold the lock of the records.
#[derive(Debug, Default)]
pub(super) struct RecordCounts {
    rounds: AtomicU64,
    /// By place.
    errors: [AtomicU64; REPLICAS_MAX],
}

impl RecordCounts {
    /// A round has ended, with an error on these replicas.
    pub(super) fn round_ended(&self, failed: ReplicaSet) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        for replica in failed.iter() {
            self.errors[replica.as_usize()].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Another replica has this place.
    pub(super) fn forget(&self, replica: ReplicaIndex) {
        self.errors[replica.as_usize()].store(0, Ordering::Relaxed);
    }

    pub(super) fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Writes to the record of a replica that have failed.
    pub(super) fn errors(&self, replica: ReplicaIndex) -> u64 {
        self.errors[replica.as_usize()].load(Ordering::Relaxed)
    }
}
