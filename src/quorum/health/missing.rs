//! Members whose image is not open (contract W13): it could not be opened at the start, or was lost
//! since.
//!
//! A *missing* member counts in N and is out of service: it is never asked, and what is written
//! without it is stale there. It rejoins as an evicted replica does, but not before its image is
//! open.

use super::Health;
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};

impl Health {
    /// The members whose image is not open.
    pub fn missing(&self) -> ReplicaSet {
        self.missing
    }

    /// At the start, before any request: the image of the member `replica` is not open, and is
    /// stale in `stale`, and where it is not certain what the others hold.
    ///
    /// # Panics
    /// If fewer than t members are left in service.
    pub fn leave_out(&mut self, replica: ReplicaIndex, stale: &RangeSet) {
        assert!(self.in_service.contains(replica), "it is in service");
        self.in_service.remove(replica);
        self.missing.insert(replica);
        let state = &mut self.replicas[replica.as_usize()];
        for set in [&mut state.stale, &mut state.missed, &mut state.behind] {
            set.insert_all(stale);
            set.insert_all(&self.written);
        }
        self.check_sets();
    }

    /// The image of a member that is evicted cannot be used any more: it is missing from now on.
    /// `false` if it is not evicted.
    pub fn lose(&mut self, replica: ReplicaIndex) -> bool {
        let evicted = self.members.without(self.missing).without(self.in_service);
        if !evicted.contains(replica) {
            return false;
        }
        self.missing.insert(replica);
        self.check_sets();
        true
    }

    /// Whether no worker has an operation in flight on a replica that is out of service.
    pub fn is_drained(&self, replica: ReplicaIndex) -> bool {
        self.replicas[replica.as_usize()].drained_by == self.workers
    }

    /// Another program has modified the image of the member `replica`: it is stale everywhere, if
    /// it is missing.
    pub fn distrust(&mut self, replica: ReplicaIndex) {
        let state = &mut self.replicas[replica.as_usize()];
        let is_known = state.behind.sectors() == self.capacity_sectors;
        if !self.missing.contains(replica) || is_known {
            return;
        }
        for set in [&mut state.stale, &mut state.missed, &mut state.behind] {
            set.insert(SectorRange::new(0, self.capacity_sectors));
        }
        self.memory += 1;
    }

    /// The image of a missing member is open, on every worker: it may rejoin. It turns out to be
    /// stale in `stale` too. `false` if it is not missing: it may have been removed meanwhile.
    pub fn found(&mut self, replica: ReplicaIndex, stale: &RangeSet) -> bool {
        let is_missing = self.missing.contains(replica);
        if is_missing {
            self.missing.remove(replica);
            let state = &mut self.replicas[replica.as_usize()];
            state.drained_by = 0;
            for set in [&mut state.stale, &mut state.missed, &mut state.behind] {
                set.insert_all(stale);
            }
        }
        is_missing
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{A, B, C, range, set};
    use super::super::{NotRemoved, WriteEnd};
    use super::*;

    const SECTORS: u64 = 1 << 20;

    /// C is missing, and stale in the first MiB.
    fn health(workers: u16) -> Health {
        let mut health = Health::new(ReplicaSet::first(3), 2, workers, SECTORS);
        let mut stale = RangeSet::default();
        stale.insert(range(0, 2048));
        health.leave_out(C, &stale);
        health
    }

    fn write(health: &mut Health, start: u64) {
        let begun = health.write_begins(range(start, 8));
        let both = set(&[A, B]);
        health.write_ended(&WriteEnd {
            asked: both,
            succeeded: both,
            begun,
            success: true,
        });
    }

    #[test]
    fn a_missing_member_is_one_but_is_not_asked() {
        let mut health = health(1);
        assert_eq!(health.members(), ReplicaSet::first(3));
        assert_eq!(health.in_service(), set(&[A, B]));
        assert_eq!(health.out_of_service(), set(&[C]));
        write(&mut health, 4096);
        let stale = health.stale_ranges(C);
        assert_eq!(
            stale.iter().collect::<Vec<_>>(),
            [range(0, 2048), range(4096, 8)]
        );
        assert!(!health.evict(C) && !health.evict(A), "two are needed");
        health.self_check();
    }

    #[test]
    fn it_rejoins_only_when_its_image_is_open() {
        let mut health = health(2);
        for worker in [0, 1] {
            assert!(!health.rejoin(C, worker), "there is no image");
        }
        let mut also = RangeSet::default();
        also.insert(range(4096, 8));
        assert!(health.found(C, &also) && !health.found(C, &also));
        assert_eq!(health.in_service(), set(&[A, B]));
        assert!(!health.rejoin(C, 0), "the other worker has not seen it");
        assert!(health.rejoin(C, 1));
        assert_eq!(health.in_service(), ReplicaSet::first(3));
        assert_eq!(health.stale_sectors(C), 2048 + 8);
        health.self_check();
    }

    #[test]
    fn one_whose_image_is_lost_does_not_rejoin_before_it_is_found() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, SECTORS);
        let begun = health.write_begins(range(4096, 8));
        health.write_ended(&WriteEnd {
            asked: ReplicaSet::first(3),
            succeeded: ReplicaSet::first(3),
            begun,
            success: true,
        });
        assert!(!health.lose(C), "it is in service");
        assert!(health.evict(C) && health.lose(C) && !health.lose(C));
        assert_eq!(health.in_service(), set(&[A, B]));
        assert_eq!(health.missing(), set(&[C]));
        assert_eq!(health.stale_sectors(C), 8, "it was not flushed");
        assert!(!health.rejoin(C, 0) && !health.is_drained(C));
        assert!(!health.rejoin(C, 1) && health.is_drained(C));
        write(&mut health, 64);
        assert!(health.found(C, &RangeSet::default()));
        assert!(!health.rejoin(C, 0) && health.rejoin(C, 1));
        assert_eq!(health.stale_sectors(C), 16);
        health.self_check();
    }

    #[test]
    fn what_is_not_flushed_at_the_start_is_stale_on_it() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, SECTORS);
        health.written.insert(range(64, 8));
        health.leave_out(C, &RangeSet::default());
        assert_eq!(health.stale_in(range(0, SECTORS)), set(&[C]));
        assert_eq!(health.stale_sectors(C), 8);
        health.self_check();
    }

    #[test]
    fn what_another_program_has_modified_is_stale_everywhere() {
        let mut health = health(1);
        let before = health.memory();
        health.distrust(C);
        health.distrust(C);
        assert_eq!(health.memory(), before + 1, "it is remembered once");
        assert_eq!(health.stale_sectors(C), SECTORS);
        let remembered = health.remembered();
        assert_eq!(remembered.copies[C.as_usize()].stale.sectors(), SECTORS);
        assert!(health.found(C, &RangeSet::default()) && health.rejoin(C, 0));
        assert_eq!(health.stale_sectors(C), SECTORS);
        health.distrust(A);
        assert_eq!(health.stale_sectors(A), 0, "it is not missing");
        health.self_check();
    }

    #[test]
    fn it_can_be_removed() {
        let mut health = health(2);
        assert_eq!(health.check_removal(C), Ok(()));
        assert_eq!(health.check_removal(A), Err(NotRemoved::TooFewInService));
        health.remove(C);
        assert_eq!(health.missing(), ReplicaSet::EMPTY);
        assert!(
            !health.found(C, &RangeSet::default()),
            "it is no member any more"
        );
        assert!(!health.release(C, 0, true));
        assert!(health.release(C, 1, true));
        assert_eq!(health.out_of_service(), ReplicaSet::EMPTY);
        health.self_check();
    }

    #[test]
    fn its_copies_are_not_left_when_another_one_is_removed() {
        let mut health = Health::new(ReplicaSet::first(4), 2, 1, SECTORS);
        let missing = ReplicaIndex(3);
        health.leave_out(missing, &RangeSet::default());
        health.replicas[B.as_usize()].mark_missed(range(0, 8));
        assert_eq!(health.check_removal(A), Err(NotRemoved::LastCopies));
        let lost = health.loss_of(A).expect("enough are left").lost;
        assert_eq!(lost.iter().collect::<Vec<_>>(), [range(0, 8)]);
        assert_eq!(health.check_removal(B), Ok(()), "A and C have all");
    }

    #[test]
    fn where_the_disk_grows_it_is_stale() {
        let mut health = health(1);
        health.grow(SECTORS + 2048);
        assert_eq!(health.stale_in(range(SECTORS, 2048)), set(&[C]));
    }
}
