//! What a job has found on each replica, and what it has done about it.
//!
//! Invariant: bounded, however much is found; the counts are exact.

use std::collections::BTreeMap;

use crate::common::operation::OperationType;
use crate::common::ranges::RangeSet;
use crate::common::{Errno, ReplicaIndex, SectorRange};
use crate::limits::JOB_PLACES_MAX;

/// By replica; of those with which there was something to do.
pub type FindingsByReplica = BTreeMap<ReplicaIndex, Findings>;

/// Of one replica.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Sectors that lost a vote.
    pub corrupt: Places,
    /// Sectors that it could not read.
    pub unreadable: Places,
    /// Sectors that were written to it.
    pub written: u64,
    /// Sectors that could not be written to it.
    pub not_written: u64,
    /// Its last error of a read, a write and a flush.
    pub errors: [Option<Errno>; 3],
}

/// Sectors: all of them counted, the first runs listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// How many.
    pub sectors: u64,
    /// Where, at most [`JOB_PLACES_MAX`] runs, in order.
    pub runs: Vec<SectorRange>,
    /// There are more runs.
    pub is_cut: bool,
}

impl Places {
    /// Those of `set`.
    pub fn of(set: &RangeSet) -> Self {
        let mut runs: Vec<_> = set.iter().take(JOB_PLACES_MAX + 1).collect();
        let is_cut = runs.len() > JOB_PLACES_MAX;
        runs.truncate(JOB_PLACES_MAX);
        Self {
            sectors: set.sectors(),
            runs,
            is_cut,
        }
    }
}

impl Findings {
    /// Records an error that the replica returned.
    pub fn failed(&mut self, operation: OperationType, errno: Errno) {
        self.errors[index(operation)] = Some(errno);
    }

    /// The last error of such an operation.
    pub fn error(&self, operation: OperationType) -> Option<Errno> {
        self.errors[index(operation)]
    }

    /// Nothing is wrong with this replica.
    pub fn is_good(&self) -> bool {
        let bad = self.corrupt.sectors + self.unreadable.sectors + self.not_written;
        bad == 0 && self.errors == [None; 3]
    }
}

pub(super) fn index(operation: OperationType) -> usize {
    match operation {
        OperationType::Read => 0,
        OperationType::Write => 1,
        OperationType::Flush => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_sectors_are_counted_and_the_first_runs_listed() {
        let mut set = RangeSet::default();
        for run in 0..JOB_PLACES_MAX as u64 {
            set.insert(SectorRange::new(run * 10, 2));
        }
        assert!(!Places::of(&set).is_cut);
        set.insert(SectorRange::new(1000, 5));
        let places = Places::of(&set);
        assert_eq!(places.sectors, JOB_PLACES_MAX as u64 * 2 + 5);
        assert_eq!(places.runs.len(), JOB_PLACES_MAX);
        assert!(places.is_cut);
    }
}
