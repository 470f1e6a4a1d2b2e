//! What a job has found and written so far. A resync comes to a sector more than once, if it could
//! not do there what it had to: each sector counts once, as it was found last.
//!
//! Invariant: no sector is in `not_written` that the job has written since.

use std::collections::BTreeMap;

use super::chunk::ChunkEnd;
use super::findings::{Findings, FindingsByReplica, Places};
use crate::common::ranges::RangeSet;
use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use crate::quorum::health::Health;

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct Record {
    replicas: BTreeMap<ReplicaIndex, OfReplica>,
    /// Sectors without a winner.
    undecided: RangeSet,
    /// Members that could not be read everywhere.
    unread: ReplicaSet,
}

#[derive(Debug, Default)]
struct OfReplica {
    corrupt: RangeSet,
    unreadable: RangeSet,
    written_sectors: u64,
    not_written: RangeSet,
    /// The part of `not_written` that was tried in this pass.
    not_written_in_pass: RangeSet,
    errors: [Option<Errno>; 3],
}

impl Record {
    /// Adds the result of a chunk of `range`; `None`: a flush, or a question.
    pub(super) fn add(&mut self, range: Option<SectorRange>, end: &ChunkEnd) {
        if let Some(range) = range.filter(|_| !self.undecided.is_empty()) {
            self.undecided.remove(range);
        }
        insert(&mut self.undecided, &end.undecided);
        self.unread = self.unread.or(end.unread);
        for (replica, found) in &end.found {
            let own = self.replicas.entry(*replica).or_default();
            insert(&mut own.corrupt, &found.corrupt);
            insert(&mut own.unreadable, &found.unreadable);
            for written in &found.written {
                own.written_sectors += written.count;
                own.not_written.remove(*written);
                own.not_written_in_pass.remove(*written);
            }
            insert(&mut own.not_written, &found.not_written);
            insert(&mut own.not_written_in_pass, &found.not_written);
            for (error, later) in own.errors.iter_mut().zip(found.errors) {
                *error = later.or(*error);
            }
        }
    }

    /// A pass over all that was stale on `replica` has ended: what was not tried is fresh.
    pub(super) fn pass_ended(&mut self, replica: ReplicaIndex) {
        if let Some(own) = self.replicas.get_mut(&replica) {
            own.not_written = std::mem::take(&mut own.not_written_in_pass);
        }
    }

    /// What was found on replicas and written to them. `target`: that of a resync.
    pub(super) fn findings(
        &self,
        target: Option<ReplicaIndex>,
        health: &Health,
    ) -> FindingsByReplica {
        let findings = |(replica, own): (&ReplicaIndex, &OfReplica)| {
            let is_fresh = || health.next_stale(*replica, 0).is_none();
            let not_written = match own.not_written.sectors() {
                1.. if target == Some(*replica) && is_fresh() => 0,
                sectors => sectors,
            };
            let findings = Findings {
                corrupt: Places::of(&own.corrupt),
                unreadable: Places::of(&own.unreadable),
                written: own.written_sectors,
                not_written,
                errors: own.errors,
            };
            (*replica, findings)
        };
        self.replicas.iter().map(findings).collect()
    }

    /// Sectors without a winner.
    pub(super) fn undecided(&self) -> Places {
        Places::of(&self.undecided)
    }

    /// How many.
    pub(super) fn undecided_sectors(&self) -> u64 {
        self.undecided.sectors()
    }

    /// Where any replica is corrupt or unreadable.
    pub(super) fn faults(&self) -> RangeSet {
        let mut faults = RangeSet::default();
        for own in self.replicas.values() {
            faults.insert_all(&own.corrupt);
            faults.insert_all(&own.unreadable);
        }
        faults
    }

    /// Replicas that could not be read everywhere.
    pub(super) fn unread(&self) -> ReplicaSet {
        self.unread
    }

    /// Sectors that could not be written, counted for each replica.
    pub(super) fn not_written_sectors(&self) -> u64 {
        let replicas = self.replicas.values();
        replicas.map(|own| own.not_written.sectors()).sum()
    }
}

fn insert(set: &mut RangeSet, runs: &[SectorRange]) {
    for run in runs {
        set.insert(*run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jobs::Found;

    const REPLICA: ReplicaIndex = ReplicaIndex(1);

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(start, count)
    }

    fn end(of: impl FnOnce(&mut Found)) -> ChunkEnd {
        let mut end = ChunkEnd::default();
        of(end.on(REPLICA));
        end
    }

    fn health() -> Health {
        let mut health = Health::new(ReplicaSet::first(1), 1, 1, 1000);
        health.add(REPLICA);
        health
    }

    #[test]
    fn a_sector_that_cannot_be_written_counts_once_however_often_it_is_tried() {
        let mut record = Record::default();
        let health = health();
        let fails = |runs: &[SectorRange]| end(|found| found.not_written.extend(runs));
        let not_written = |record: &Record| {
            let found = record.findings(Some(REPLICA), &health);
            (found[&REPLICA].not_written, record.not_written_sectors())
        };
        for _ in 0..2 {
            record.add(Some(range(0, 8)), &fails(&[range(0, 8)]));
            record.add(Some(range(100, 8)), &fails(&[range(100, 8)]));
            assert_eq!(not_written(&record), (16, 16));
            record.pass_ended(REPLICA);
        }
        // The next pass writes one, and the guest has written another.
        let writes = end(|found| found.written.push(range(0, 4)));
        record.add(Some(range(0, 4)), &writes);
        assert_eq!(not_written(&record), (12, 12));
        record.add(Some(range(4, 4)), &fails(&[range(4, 4)]));
        record.pass_ended(REPLICA);
        assert_eq!(not_written(&record), (4, 4));
        assert_eq!(record.findings(None, &health)[&REPLICA].written, 4);
    }

    #[test]
    fn where_the_replica_is_fresh_nothing_is_left_to_write() {
        let mut record = Record::default();
        let fails = end(|found| found.not_written.push(range(0, 8)));
        record.add(Some(range(0, 8)), &fails);
        let fresh = Health::new(ReplicaSet::first(2), 1, 1, 1000);
        let not_written = |target| record.findings(target, &fresh)[&REPLICA].not_written;
        assert_eq!((not_written(Some(REPLICA)), not_written(None)), (0, 8));
    }

    #[test]
    fn a_sector_that_is_found_again_counts_once() {
        let mut record = Record::default();
        for _ in 0..2 {
            let mut end = end(|found| {
                found.corrupt.push(range(0, 2));
                found.unreadable.push(range(8, 8));
            });
            end.undecided.push(range(4, 3));
            record.add(Some(range(0, 16)), &end);
        }
        let found = &record.findings(None, &health())[&REPLICA];
        let counted = (found.corrupt.sectors, found.unreadable.sectors);
        assert_eq!((counted, record.undecided_sectors()), ((2, 8), 3));
        record.add(Some(range(0, 16)), &ChunkEnd::default());
        assert_eq!(record.undecided(), Places::default(), "it has a winner now");
    }
}
