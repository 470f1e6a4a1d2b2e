//! What a job has found on each replica, and what it has done about it.
//!
//! Invariant: bounded, however much is found; the counts are exact.

use std::collections::BTreeMap;

use crate::common::operation::OperationType;
use crate::common::runs;
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
    /// Adds these runs, which are in order.
    pub fn add(&mut self, runs: &[SectorRange]) {
        self.sectors += runs.iter().map(|run| run.count).sum::<u64>();
        self.list(runs);
    }

    fn list(&mut self, runs: &[SectorRange]) {
        if !runs.is_empty() {
            self.runs = runs::union(&self.runs, runs);
            self.is_cut |= self.runs.len() > JOB_PLACES_MAX;
            self.runs.truncate(JOB_PLACES_MAX);
        }
    }

    /// Adds others.
    pub fn add_all(&mut self, more: &Self) {
        self.sectors += more.sectors;
        self.is_cut |= more.is_cut;
        self.list(&more.runs);
    }
}

impl Findings {
    /// Adds what was found later.
    pub fn add(&mut self, later: &Self) {
        self.corrupt.add_all(&later.corrupt);
        self.unreadable.add_all(&later.unreadable);
        self.written += later.written;
        self.not_written += later.not_written;
        for (error, later) in self.errors.iter_mut().zip(later.errors) {
            *error = later.or(*error);
        }
    }

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

fn index(operation: OperationType) -> usize {
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
        let mut places = Places::default();
        for run in 0..JOB_PLACES_MAX as u64 + 4 {
            places.add(&[SectorRange::new(run * 10, 2)]);
        }
        assert_eq!(places.sectors, (JOB_PLACES_MAX as u64 + 4) * 2);
        assert_eq!(places.runs.len(), JOB_PLACES_MAX);
        assert!(places.is_cut);
        let mut joined = Places::default();
        joined.add(&[SectorRange::new(8, 8)]);
        joined.add(&[SectorRange::new(16, 8)]);
        assert_eq!(joined.runs, [SectorRange::new(8, 16)]);
        assert!(!joined.is_cut);
    }
}
