//! Members of which the records say coarsely where they are stale (S2).
//!
//! A member in service that misses write after write would have the records written for each of
//! them. So it becomes *coarse*: the records say that it is stale wherever they have marked
//! something as being changed, and what it misses then is in them already.
//!
//! After an unclean end it does not vote in what is marked, although it may hold that. One vote is
//! enough there (S5), so there must be one: fewer members than the vote threshold are coarse or out
//! of service together. Then each version on as many members as the threshold is also on one that
//! votes.

use super::Health;
use crate::common::ReplicaSet;
use crate::common::ranges::RangeSet;
use crate::limits::MISSES_EXACT_MAX;

impl Health {
    /// Decides which members are coarse from now on, before the records say it. `sweeps`: also
    /// which ones are so no more, since they are complete. `is_settled`: the records say on all
    /// members in service which ones were coarse until now, so that there may be others.
    pub fn decide_coarse(&mut self, sweeps: bool, is_settled: bool) {
        let before = self.coarse;
        let out = self.members.without(self.in_service);
        let room = (self.threshold - 1).saturating_sub(out.len());
        if before.len() > room || !before.without(self.in_service).is_empty() {
            self.coarse = ReplicaSet::EMPTY;
        }
        if sweeps {
            for member in self.in_service.iter() {
                let state = &mut self.replicas[member.as_usize()];
                // Each by itself: the mutex of the workers is held.
                let (behind, weak) = (&state.behind, &state.weak);
                let sets = [&state.stale, behind, weak, &state.weak_before_flush];
                if sets.into_iter().all(RangeSet::is_empty) {
                    self.coarse.remove(member);
                    state.misses = 0;
                }
            }
        }
        if self.coarse != before || !is_settled {
            return;
        }
        for member in self.in_service.without(before).iter() {
            let misses = self.replicas[member.as_usize()].misses;
            if misses > MISSES_EXACT_MAX && self.coarse.len() < room {
                self.coarse.insert(member);
                self.memory += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{A, B, C, range, set, write};
    use super::*;

    /// C misses this many writes, one beside the other.
    fn miss(health: &mut Health, replica: crate::common::ReplicaIndex, count: u64) {
        for block in 0..count {
            write(health, range(block * 8, 8), &[replica]);
        }
    }

    fn coarse(health: &mut Health, sweeps: bool) -> ReplicaSet {
        health.decide_coarse(sweeps, true);
        health.self_check();
        health.remembered().coarse
    }

    #[test]
    fn what_misses_write_after_write_is_coarse_until_it_is_complete() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        miss(&mut health, C, MISSES_EXACT_MAX);
        assert_eq!(coarse(&mut health, false), ReplicaSet::EMPTY);
        miss(&mut health, C, 1);
        let before = health.memory();
        health.decide_coarse(false, false);
        assert_eq!(health.memory(), before, "the records are not settled");
        assert_eq!(coarse(&mut health, false), set(&[C]));
        assert_eq!(health.memory(), before + 1, "answers wait for that");
        miss(&mut health, C, 100);
        assert_eq!(health.memory(), before + 1, "and for nothing else");
        assert_eq!(health.stale_sectors(C), 800, "what it has missed is known");
        assert_eq!(coarse(&mut health, true), set(&[C]), "not complete");
        write(&mut health, range(0, 800), &[]);
        assert_eq!(coarse(&mut health, false), set(&[C]));
        assert_eq!(coarse(&mut health, true), ReplicaSet::EMPTY);
        let before = health.memory();
        miss(&mut health, C, 1);
        assert_eq!(health.memory(), before + 1);
    }

    #[test]
    fn fewer_than_the_threshold_are_coarse_or_out_of_service() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        miss(&mut health, C, MISSES_EXACT_MAX + 1);
        miss(&mut health, B, MISSES_EXACT_MAX + 1);
        assert_eq!(coarse(&mut health, false).len(), 1);
        write(&mut health, range(0, 800), &[]);
        let epoch = health.flush_begins();
        for replica in [A, B, C] {
            health.flush_ended(epoch, replica, true);
        }
        assert!(health.flush_decided(epoch, ReplicaSet::first(3), true, &mut []));
        assert!(health.evict(A));
        assert_eq!(coarse(&mut health, false), ReplicaSet::EMPTY);
    }
}
