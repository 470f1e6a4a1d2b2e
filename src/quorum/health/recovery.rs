//! After an unclean end of the disk: where replicas may differ, and no fault is behind that (S5).
//!
//! A sector that was being changed then, or that no flush had covered, is old or new on each
//! replica by itself. It is *unrecovered*: undecided like what a failed write has left (W7), but
//! every fresh copy is legal, so that the version that most replicas hold wins, even if that is
//! one. What does not hold the winner is stale from then on, so that no later vote has another one.
//!
//! After any end, the records say where each member is stale: before anything depends on it (S2).

use super::{Health, Wanted};
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaSet, SectorRange};

/// What the records of a disk say of its members, so that it survives the end of the daemon (S2).
#[derive(Clone, Debug, Default)]
pub struct Remembered {
    /// The members.
    pub members: ReplicaSet,
    /// Those of them that are in service.
    pub in_service: ReplicaSet,
    /// The vote threshold.
    pub threshold: usize,
    /// It follows the number of members.
    pub threshold_follows: bool,
    /// Sectors of the disk.
    pub capacity_sectors: u64,
    /// [`Health::memory`] when this was so.
    pub memory: u64,
    /// Those in service that are to be stale wherever something changes.
    pub coarse: ReplicaSet,
    /// By place.
    pub copies: Vec<Copies>,
}

/// What is wrong with the copies of one member.
#[derive(Clone, Debug, Default)]
pub struct Copies {
    /// Where it has missed something, or may hold something older than what t members have made
    /// durable: what it has written since and not flushed may be lost.
    pub stale: RangeSet,
    /// Where a failed flush may have lost the newest version, or not (W7). No older version than
    /// what t members have made durable.
    pub doubtful: RangeSet,
}

impl Health {
    /// Grows whenever what is to be remembered does: a member in service has become stale or
    /// doubtful somewhere, or there are other members or thresholds. What changes on a member out
    /// of service is not counted, nor what a coarse one misses: they are stale wherever the disk
    /// changes.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// The records are to be written, although nothing here has changed.
    pub fn is_to_be_written(&mut self) {
        self.memory += 1;
    }

    /// What must be remembered now.
    pub fn remembered(&self) -> Remembered {
        let copies = self.replicas.iter().map(|state| {
            let stale = state.illegal_after_a_crash();
            let mut doubtful = state.stale.clone();
            doubtful.remove_all(&stale);
            Copies { stale, doubtful }
        });
        Remembered {
            members: self.members,
            in_service: self.in_service,
            threshold: self.threshold,
            threshold_follows: self.threshold_follows(),
            capacity_sectors: self.capacity_sectors,
            memory: self.memory,
            coarse: self.coarse,
            copies: copies.collect(),
        }
    }

    /// At the start, before any request: the members are `remembered` to be stale there, and the
    /// last daemon has ended while `changed` was being changed, or had not been flushed. A
    /// threshold that follows the members rises only when enough of them are complete.
    pub fn restore(&mut self, remembered: &Remembered, changed: &RangeSet) {
        // The guest may have an answer to what the last daemon wrote there.
        self.undone.writes += u64::from(!changed.is_empty());
        if remembered.threshold_follows {
            self.wanted = Wanted::Majority;
        }
        for replica in self.members.and(remembered.members).iter() {
            let Some(Copies { stale, doubtful }) = remembered.copies.get(replica.as_usize()) else {
                continue;
            };
            let state = &mut self.replicas[replica.as_usize()];
            for set in [&mut state.stale, &mut state.missed, &mut state.behind] {
                set.clone_from(stale);
            }
            state.stale.insert_all(doubtful);
        }
        // It may be in the page cache of the host: a flush that fails loses it.
        self.written.insert_all(changed);
        self.undecided.insert_all(changed);
        self.unrecovered.insert_all(changed);
    }

    /// A vote has decided `decided`: returns the parts that were unrecovered.
    pub(super) fn take_recovered(&mut self, decided: &[SectorRange]) -> Vec<SectorRange> {
        if self.unrecovered.is_empty() {
            return Vec::new();
        }
        let parts = decided.iter().map(|range| self.unrecovered.within(*range));
        let recovered: Vec<SectorRange> = parts.flatten().collect();
        for range in &recovered {
            self.unrecovered.remove(*range);
        }
        recovered
    }

    /// What is unrecovered.
    pub fn unrecovered(&self) -> &RangeSet {
        &self.unrecovered
    }

    /// The first unrecovered range at or after `sector`.
    pub fn next_unrecovered(&self, sector: u64) -> Option<SectorRange> {
        let rest = SectorRange::new(sector, u64::MAX - sector);
        self.unrecovered.first_within(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{A, B, C, flush, range, set, write};
    use super::*;
    use crate::common::ReplicaIndex;

    fn remembered(health: &Health, replica: ReplicaIndex) -> Vec<SectorRange> {
        let copies = &health.remembered().copies[replica.as_usize()];
        copies.stale.iter().collect()
    }

    /// A flush that succeeds everywhere.
    fn flush_all(health: &mut Health) {
        let epoch = health.flush_begins();
        let all = ReplicaSet::first(3);
        for replica in all.iter() {
            health.flush_ended(epoch, replica, true);
        }
        assert!(health.flush_decided(epoch, all, true, &mut []));
    }

    #[test]
    fn what_was_refreshed_and_not_flushed_is_remembered_as_stale() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        let written = range(0, 8);
        write(&mut health, written, &[C]);
        assert_eq!(remembered(&health, C), [written], "missed");
        flush_all(&mut health);
        write(&mut health, written, &[]);
        assert_eq!(health.stale_in(written), ReplicaSet::EMPTY);
        assert_eq!(remembered(&health, C), [written], "below is the oldest");
        assert_eq!(remembered(&health, A), []);
        flush_all(&mut health);
        assert_eq!(remembered(&health, C), []);
    }

    #[test]
    fn what_is_doubtful_is_remembered_as_such() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        let (written, missed) = (range(0, 8), range(8, 8));
        write(&mut health, written, &[]);
        write(&mut health, missed, &[C]);
        flush(&mut health, &[A, B, C]);
        let remembered = health.remembered();
        let mut restored = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        restored.restore(&remembered, &RangeSet::default());
        restored.self_check();
        for health in [&health, &restored] {
            assert_eq!(health.stale_in(written), ReplicaSet::first(3));
            assert_eq!(health.doubtful_parts(A, range(0, 16)), [range(0, 16)]);
            assert_eq!(health.doubtful_parts(C, range(0, 16)), [written]);
        }
    }

    #[test]
    fn a_flush_that_fails_after_the_start_loses_what_was_changed_before() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        let mut changed = RangeSet::default();
        changed.insert(range(0, 8));
        let mut stale = RangeSet::default();
        stale.insert(range(4, 8));
        let remembered = Remembered {
            members: ReplicaSet::first(3),
            in_service: ReplicaSet::first(3),
            copies: vec![
                Copies::default(),
                Copies {
                    stale,
                    ..Copies::default()
                },
            ],
            ..Remembered::default()
        };
        health.restore(&remembered, &changed);
        health.self_check();
        assert_eq!(health.stale_in(range(0, 16)), set(&[B]));
        assert_eq!(health.disputed(range(0, 16), 2).unrecovered, [range(0, 8)]);
        flush(&mut health, &[A]);
        assert_eq!(health.stale_parts(A, range(0, 16)), [range(0, 8)]);
    }

    /// It was written for a vote that was taken again, since a replica failed meanwhile.
    #[test]
    fn a_copy_of_an_earlier_vote_is_remembered_until_a_flush() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        let mut changed = RangeSet::default();
        changed.insert(range(0, 16));
        health.restore(&Remembered::default(), &changed);
        flush_all(&mut health);
        health.repaired(C, range(0, 8), health.failure_epoch(), false);
        health.repair_failed(B, range(8, 8), health.failure_epoch());
        health.decide(&[range(0, 16)], &[]);
        assert_eq!(health.stale_in(range(0, 16)), ReplicaSet::EMPTY);
        assert_eq!(remembered(&health, A), []);
        assert_eq!(remembered(&health, B), [range(8, 8)]);
        assert_eq!(remembered(&health, C), [range(0, 8)]);
        flush_all(&mut health);
        assert_eq!(remembered(&health, C), []);
    }

    /// A killed daemon had answered writes that no flush had covered.
    #[test]
    fn what_all_lose_after_the_start_fails_a_flush_of_the_guest() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        let mut changed = RangeSet::default();
        changed.insert(range(0, 8));
        health.restore(&Remembered::default(), &changed);
        // The flush of a recovery: the guest does not hear of it.
        assert!(!flush(&mut health, &[A, B, C]));
        let disputed = health.disputed(range(0, 16), 2);
        assert_eq!(disputed.lacking, [range(0, 8)]);
        assert!(!health.owes_failure());
        health.may_be_undone(&disputed.lacking);
        assert!(health.owes_failure());
    }
}
