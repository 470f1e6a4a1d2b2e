//! Where a replica may decide because the operator prefers it (contract W12).

use super::{Disputed, Health};
use crate::common::ranges::RangeSet;
use crate::common::runs;
use crate::common::{ReplicaIndex, SectorRange};

/// What a replica could decide.
#[derive(Clone, Debug, Default)]
pub struct Preferable {
    /// The sectors that had no winner when they were last read.
    pub undecided: RangeSet,
    /// In how many of them the replica has a copy that may decide.
    pub sectors: u64,
}

impl Health {
    /// What `replica` could decide now of what is `undecided`.
    pub fn preferable(&self, replica: ReplicaIndex, undecided: RangeSet) -> Preferable {
        let parts = |run: SectorRange| {
            let disputed = self.disputed(run, self.threshold);
            self.preferable_parts(replica, run, &disputed)
        };
        let sectors = |run| parts(run).iter().map(|part| part.count).sum::<u64>();
        Preferable {
            sectors: undecided.iter().map(sectors).sum(),
            undecided,
        }
    }

    /// The parts of `range` in which the copy of `replica` may decide alone: it is fresh, or
    /// doubtful where no replica is fresh (W7). What is `disputed` is that in `range`.
    pub fn preferable_parts(
        &self,
        replica: ReplicaIndex,
        range: SectorRange,
        disputed: &Disputed,
    ) -> Vec<SectorRange> {
        if !self.in_service.contains(replica) {
            return Vec::new();
        }
        let fresh = runs::without(&[range], &self.stale_parts(replica, range));
        let votes = runs::common(&self.doubtful_parts(replica, range), &disputed.lacking);
        runs::union(&fresh, &runs::without(&votes, &disputed.witnessed))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{A, B, C, flush, range, set, write};
    use super::*;

    fn preferable(health: &Health, replica: ReplicaIndex) -> Preferable {
        health.preferable(replica, health.unresolved().clone())
    }

    fn parts(health: &Health, replica: ReplicaIndex) -> Vec<SectorRange> {
        let all = range(0, 100);
        health.preferable_parts(replica, all, &health.disputed(all, 2))
    }

    #[test]
    fn a_replica_that_has_missed_a_write_does_not_decide_there() {
        let mut health = Health::new(set(&[A, B, C]), 2, 1, 100);
        health.voted(range(0, 40), &[range(0, 20)]);
        write(&mut health, range(10, 10), &[A, B]);
        assert_eq!(
            preferable(&health, A).sectors,
            20,
            "a failed write leaves both"
        );
        write(&mut health, range(30, 10), &[C]);
        health.voted(range(30, 10), &[range(30, 10)]);
        let of_c = preferable(&health, C);
        assert_eq!((of_c.undecided.sectors(), of_c.sectors), (30, 20));
        assert_eq!(preferable(&health, A).sectors, 30);
        assert_eq!(parts(&health, C), [range(0, 30), range(40, 60)]);
        assert!(health.evict(C));
        assert_eq!(parts(&health, C), []);
    }

    #[test]
    fn a_doubtful_copy_decides_only_where_no_other_is_fresh() {
        let mut health = Health::new(set(&[A, B, C]), 2, 1, 100);
        write(&mut health, range(0, 10), &[]);
        assert!(!flush(&mut health, &[A, B]));
        assert_eq!(parts(&health, C), [range(0, 100)]);
        assert_eq!(parts(&health, A), [range(10, 90)], "C is fresh");
        write(&mut health, range(0, 10), &[]);
        assert!(!flush(&mut health, &[A, B, C]));
        assert_eq!(parts(&health, A), [range(0, 100)]);
    }
}
