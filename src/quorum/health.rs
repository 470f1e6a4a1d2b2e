//! Which replicas are in service, what each is known not to hold, and what is not durable yet (contract W3,
//! W5, W6).
//!
//! A sector is *stale* on a replica that missed or failed a write of it, or that failed to flush what it
//! wrote there: after a failed fsync the kernel may have dropped the dirty pages, so a later success proves
//! nothing. A stale replica does not vote on the sector until the sector is written to it again.
//!
//! A replica that does not answer *leaves the set*. Whatever it was asked may still happen at any time, so
//! everything it has not made durable is stale, and it joins again only when every worker has all of its
//! operations back.
//!
//! Invariants: a sector that the guest was told is written is fresh on at least t replicas, unless a flush
//! has failed since; at least t replicas are in service, and no replica leaves a sector behind that only t
//! replicas in service have fresh.

use std::collections::VecDeque;
use std::sync::Arc;

use super::ranges::RangeSet;
use super::{ReplicaIndex, ReplicaSet, SectorRange};

/// Orders the start of an operation against failed flushes and replicas that left the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Failures(pub u64);

/// Names one flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlushEpoch(u64);

/// The state of all replicas of a disk.
#[derive(Debug)]
pub struct Health {
    threshold: usize,
    /// A bit for each worker thread.
    workers: u64,
    in_service: ReplicaSet,
    replicas: Vec<ReplicaHealth>,
    /// What completed writes changed since the last flush began.
    written: RangeSet,
    capacity_sectors: u64,
    /// Of what the last flush covers, what each replica is known not to have made durable: what was stale when
    /// it began, and what has become so since. Newer writes may heal that, but not for this flush.
    uncovered: Vec<RangeSet>,
    epoch: FlushEpoch,
    failures: Failures,
}

#[derive(Debug)]
struct ReplicaHealth {
    stale: RangeSet,
    /// What was written before a flush that this replica has not confirmed yet, by that flush.
    unconfirmed: VecDeque<(FlushEpoch, Arc<RangeSet>)>,
    last_failure: Failures,
    /// The workers that have every operation of this replica back since it left the set.
    returned_to: u64,
}

impl ReplicaHealth {
    fn new(capacity_sectors: u64) -> Self {
        Self {
            stale: RangeSet::below(capacity_sectors),
            unconfirmed: VecDeque::new(),
            last_failure: Failures::default(),
            returned_to: 0,
        }
    }
}

impl Health {
    /// `replicas` replicas of `capacity_sectors`, all of them in service and fresh everywhere, used by
    /// `workers` threads.
    pub fn new(replicas: usize, threshold: usize, workers: u16, capacity_sectors: u64) -> Self {
        assert!((1..=64).contains(&workers));
        Self {
            threshold,
            workers: u64::MAX >> (64 - workers),
            in_service: ReplicaSet::first(replicas),
            replicas: (0..replicas)
                .map(|_| ReplicaHealth::new(capacity_sectors))
                .collect(),
            written: RangeSet::below(capacity_sectors),
            capacity_sectors,
            uncovered: (0..replicas).map(|_| RangeSet::below(capacity_sectors)).collect(),
            epoch: FlushEpoch(0),
            failures: Failures(0),
        }
    }

    /// The replicas that are asked.
    pub fn in_service(&self) -> ReplicaSet {
        self.in_service
    }

    /// Takes a replica that does not answer out of the set. `false` if it is out already, or if that would
    /// leave fewer than t, in all or in some sector: then there is nobody to do without it.
    pub fn leave(&mut self, replica: ReplicaIndex) -> bool {
        if !self.in_service.contains(replica) || self.is_needed(replica) {
            return false;
        }
        self.in_service.remove(replica);
        self.replicas[replica.as_usize()].returned_to = 0;
        self.not_durable(replica);
        true
    }

    /// A worker has every operation of a replica that left the set back. `true` if that was the last one and
    /// the replica is in service again; what it missed is stale.
    pub fn returned(&mut self, replica: ReplicaIndex, worker: u16) -> bool {
        if self.in_service.contains(replica) {
            return false;
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.returned_to |= 1 << worker;
        let all = state.returned_to == self.workers;
        if all {
            self.in_service.insert(replica);
        }
        all
    }

    /// Whether any replica is stale anywhere.
    pub fn anything_stale(&self) -> bool {
        self.replicas.iter().any(|r| !r.stale.is_empty())
    }

    /// In how many sectors `replica` is stale.
    pub fn stale_sectors(&self, replica: ReplicaIndex) -> u64 {
        let ranges = self.replicas[replica.as_usize()].stale.iter();
        ranges.map(|range| range.count).sum()
    }

    /// The replicas that are stale somewhere in `range`.
    pub fn stale_in(&self, range: SectorRange) -> ReplicaSet {
        self.indexes()
            .filter(|r| self.replicas[r.as_usize()].stale.overlaps(range))
            .collect()
    }

    /// The parts of `range` in which `replica` is stale, in order.
    pub fn stale_parts(&self, replica: ReplicaIndex, range: SectorRange) -> Vec<SectorRange> {
        self.replicas[replica.as_usize()].stale.within(range)
    }

    /// The first stale range of a replica in service at or after `from`, in the order of replicas.
    pub fn next_stale(&self, from: (ReplicaIndex, u64)) -> Option<(ReplicaIndex, SectorRange)> {
        let (first, sector) = from;
        self.in_service
            .iter()
            .filter(|replica| *replica >= first)
            .find_map(|replica| {
                let sector = if replica == first { sector } else { 0 };
                let rest = SectorRange::new(sector, u64::MAX - sector);
                let range = self.replicas[replica.as_usize()].stale.first_within(rest)?;
                Some((replica, range))
            })
    }

    /// The replicas that have failed a flush or left the set since `began`.
    pub fn failed_since(&self, began: Failures) -> ReplicaSet {
        self.indexes()
            .filter(|r| self.replicas[r.as_usize()].last_failure > began)
            .collect()
    }

    /// To be kept from the moment an operation that changes sectors is handed to the replicas until it has
    /// ended.
    pub fn change_begins(&self) -> Failures {
        self.failures
    }

    /// A write has ended: it was done by `succeeded`, of those who were `asked`. `success`: the guest will be
    /// told so. `durable`: it went to stable storage by itself.
    ///
    /// A write that failed leaves old or new bytes on those that failed it, and the vote decides which:
    /// nobody is known to be behind. Who was not asked, or has left the set or failed a flush while the write
    /// ran, is behind in any case.
    pub fn write_ended(&mut self, range: SectorRange, write: &WriteEnd) {
        for replica in self.indexes() {
            let state = &mut self.replicas[replica.as_usize()];
            let doubtful = state.last_failure > write.began || !write.asked.contains(replica);
            let done = write.succeeded.contains(replica);
            if doubtful || (write.success && !done) {
                state.stale.insert(range);
            } else if done {
                state.stale.remove(range);
            }
        }
        if !write.durable {
            self.written.insert(range);
        }
    }

    /// Sectors of one replica were written with the winner of a vote, under the lock of their range.
    pub fn mended(&mut self, replica: ReplicaIndex, range: SectorRange, began: Failures) {
        let state = &mut self.replicas[replica.as_usize()];
        if state.last_failure > began {
            state.stale.insert(range);
        } else {
            state.stale.remove(range);
        }
        self.written.insert(range);
    }

    /// Sectors of one replica may be changed by an operation that nobody waits for any more.
    pub fn doubted(&mut self, replica: ReplicaIndex, range: SectorRange) {
        self.replicas[replica.as_usize()].stale.insert(range);
    }

    /// A flush is about to go to all replicas in service; it covers every write that has ended.
    pub fn flush_begins(&mut self) -> FlushEpoch {
        self.epoch.0 += 1;
        for (uncovered, replica) in self.uncovered.iter_mut().zip(&self.replicas) {
            uncovered.clone_from(&replica.stale);
        }
        let nothing = RangeSet::below(self.capacity_sectors);
        let written = std::mem::replace(&mut self.written, nothing);
        if !written.is_empty() {
            let written = Arc::new(written);
            for replica in self.indexes() {
                let state = &mut self.replicas[replica.as_usize()];
                if self.in_service.contains(replica) {
                    state.unconfirmed.push_back((self.epoch, Arc::clone(&written)));
                } else {
                    state.stale.insert_all(&written);
                }
            }
        }
        self.epoch
    }

    /// The flush `epoch` has come back from `replica`.
    pub fn flush_ended(&mut self, epoch: FlushEpoch, replica: ReplicaIndex, success: bool) {
        if !success {
            return self.not_durable(replica);
        }
        let unconfirmed = &mut self.replicas[replica.as_usize()].unconfirmed;
        while unconfirmed.front().is_some_and(|(covered, _)| *covered <= epoch) {
            unconfirmed.pop_front();
        }
    }

    /// `replica` has failed to make a write durable by itself. The kernel tells of a page that it could not write
    /// back once, to a flush or to such a write: this may have been about what was written before. `true` if
    /// there was anything.
    pub fn failed_to_persist(&mut self, replica: ReplicaIndex) -> bool {
        let unconfirmed = &self.replicas[replica.as_usize()].unconfirmed;
        let anything = !self.written.is_empty() || !unconfirmed.is_empty();
        if anything {
            self.not_durable(replica);
        }
        anything
    }

    /// What `replica` wrote since its last good flush may be lost, and so may be what it is writing now.
    fn not_durable(&mut self, replica: ReplicaIndex) {
        self.failures.0 += 1;
        let state = &mut self.replicas[replica.as_usize()];
        state.last_failure = self.failures;
        state.stale.insert_all(&self.written);
        for (_, written) in state.unconfirmed.drain(..) {
            state.stale.insert_all(&written);
            self.uncovered[replica.as_usize()].insert_all(&written);
        }
    }

    /// Whether every sector is fresh on at least t replicas, and was when the last flush began. Asked after all
    /// replies to it are in, when that is what is durable. One flush runs at a time.
    pub fn fresh_on_threshold(&self) -> bool {
        let all = ReplicaSet::first(self.replicas.len());
        let now = self.replicas.iter().map(|replica| &replica.stale);
        let sets = now.chain(&self.uncovered);
        every_sector(sets, self.replicas.len(), self.capacity_sectors, |stale| {
            all.without(stale).len() >= self.threshold
        })
    }

    /// Whether without `replica` fewer than t would be left that are in service, or that are in service and
    /// fresh in some sector where now there are enough.
    fn is_needed(&self, replica: ReplicaIndex) -> bool {
        let mut others = self.in_service;
        others.remove(replica);
        let enough_without = |stale: ReplicaSet| others.without(stale).len() >= self.threshold;
        let enough_with = |stale: ReplicaSet| self.in_service.without(stale).len() >= self.threshold;
        others.len() < self.threshold
            || !every_sector(
                self.replicas.iter().map(|replica| &replica.stale),
                self.replicas.len(),
                self.capacity_sectors,
                |stale| enough_without(stale) || !enough_with(stale),
            )
    }

    fn indexes(&self) -> impl Iterator<Item = ReplicaIndex> + use<> {
        ReplicaSet::first(self.replicas.len()).iter()
    }
}

/// Whether `holds` for the set of replicas that are stale in a sector, for every sector of a disk. The sets are
/// those of the replicas in order, and then perhaps in order once more.
fn every_sector<'a>(
    sets: impl Iterator<Item = &'a RangeSet>,
    replicas: usize,
    capacity_sectors: u64,
    holds: impl Fn(ReplicaSet) -> bool,
) -> bool {
    // Sweep over the ends of all stale ranges; between two of them the sets do not change.
    let mut ends: Vec<(u64, usize, bool)> = sets
        .enumerate()
        .flat_map(|(set, ranges)| {
            ranges
                .iter()
                .flat_map(move |range| [(range.start, set, true), (range.end(), set, false)])
        })
        .collect();
    ends.sort_unstable();
    let mut inside = [ReplicaSet::EMPTY; 2];
    let mut from = 0;
    for (sector, set, begins) in ends {
        if sector > from && !holds(inside[0].or(inside[1])) {
            return false;
        }
        from = sector;
        let replica = ReplicaIndex(u8::try_from(set % replicas).expect("at most 32 replicas"));
        let side = &mut inside[set / replicas];
        if begins {
            side.insert(replica)
        } else {
            side.remove(replica)
        }
    }
    from >= capacity_sectors || holds(inside[0].or(inside[1]))
}

/// How a write ended.
#[derive(Clone, Copy, Debug)]
pub struct WriteEnd {
    /// The replicas it was handed to.
    pub asked: ReplicaSet,
    /// Those of them that did it.
    pub succeeded: ReplicaSet,
    /// [`Health::change_begins`] of that moment.
    pub began: Failures,
    /// The guest is told that it is written.
    pub success: bool,
    /// It went to stable storage by itself.
    pub durable: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ReplicaIndex = ReplicaIndex(0);
    const B: ReplicaIndex = ReplicaIndex(1);
    const C: ReplicaIndex = ReplicaIndex(2);

    fn set(replicas: &[ReplicaIndex]) -> ReplicaSet {
        replicas.iter().copied().collect()
    }

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(start, count)
    }

    fn end(began: Failures, succeeded: ReplicaSet) -> WriteEnd {
        WriteEnd {
            asked: ReplicaSet::first(3),
            succeeded,
            began,
            success: succeeded.len() >= 2,
            durable: false,
        }
    }

    fn write(health: &mut Health, range: SectorRange, failed: &[ReplicaIndex]) {
        let began = health.change_begins();
        health.write_ended(range, &end(began, ReplicaSet::first(3).without(set(failed))));
    }

    fn flush(health: &mut Health, failed: &[ReplicaIndex]) -> bool {
        let epoch = health.flush_begins();
        for replica in ReplicaSet::first(3).iter() {
            health.flush_ended(epoch, replica, !failed.contains(&replica));
        }
        health.fresh_on_threshold()
    }

    #[test]
    fn a_failed_write_is_stale_until_written_again() {
        let mut health = Health::new(3, 2, 2, 1 << 22);
        write(&mut health, range(8, 8), &[C]);
        assert_eq!(health.stale_in(range(0, 9)), set(&[C]));
        assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
        write(&mut health, range(8, 4), &[]);
        assert_eq!(health.stale_parts(C, range(0, 100)), [range(12, 4)]);
    }

    /// The case that counting successes gets wrong: a write held by {A,B}, a flush done by {B,C}.
    #[test]
    fn a_flush_needs_the_replicas_that_hold_the_writes() {
        let mut health = Health::new(3, 2, 2, 1 << 22);
        write(&mut health, range(0, 8), &[C]);
        assert!(!flush(&mut health, &[A]));
        // What is known to be lost is not forgotten by a flush that finds nothing more to do.
        assert!(!flush(&mut health, &[]));
        write(&mut health, range(0, 8), &[]);
        assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
        assert!(flush(&mut health, &[]));
    }

    #[test]
    fn a_failed_flush_makes_stale_what_was_written_since_the_last_good_one() {
        let mut health = Health::new(3, 2, 2, 1 << 22);
        write(&mut health, range(0, 8), &[]);
        assert!(flush(&mut health, &[]));
        write(&mut health, range(1 << 20, 8), &[]);
        assert!(flush(&mut health, &[B]));
        assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
        assert_eq!(health.stale_in(range(1 << 20, 8)), set(&[B]));
    }

    #[test]
    fn a_write_that_ran_while_a_flush_failed_does_not_count_on_that_replica() {
        let mut health = Health::new(3, 2, 2, 1 << 22);
        let began = health.change_begins();
        let epoch = health.flush_begins();
        health.flush_ended(epoch, A, false);
        health.write_ended(range(0, 8), &end(began, ReplicaSet::first(3)));
        assert_eq!(health.stale_in(range(0, 8)), set(&[A]));
    }

    #[test]
    fn a_later_flush_confirms_the_earlier_ones() {
        let mut health = Health::new(1, 1, 1, 1 << 22);
        write_one(&mut health, range(0, 8));
        let first = health.flush_begins();
        write_one(&mut health, range(1 << 20, 8));
        let second = health.flush_begins();
        health.flush_ended(second, A, true);
        health.flush_ended(first, A, false);
        assert!(
            !health.anything_stale(),
            "all of it was confirmed by the second flush"
        );
    }

    fn write_one(health: &mut Health, range: SectorRange) {
        let began = health.change_begins();
        let done = WriteEnd {
            asked: set(&[A]),
            succeeded: set(&[A]),
            began,
            success: true,
            durable: false,
        };
        health.write_ended(range, &done);
    }

    #[test]
    fn a_replica_that_left_joins_when_every_worker_has_its_operations_back() {
        let mut health = Health::new(3, 2, 2, 1 << 22);
        write(&mut health, range(0, 8), &[]);
        assert!(flush(&mut health, &[]));
        write(&mut health, range(1 << 20, 8), &[]);
        assert!(health.leave(C));
        assert!(!health.leave(B), "two are needed");
        assert_eq!(health.in_service(), set(&[A, B]));
        assert_eq!(
            health.stale_in(range(0, 8)),
            ReplicaSet::EMPTY,
            "that was flushed"
        );
        assert_eq!(health.stale_in(range(1 << 20, 8)), set(&[C]));
        let began = health.change_begins();
        let without = WriteEnd {
            asked: set(&[A, B]),
            ..end(began, set(&[A, B]))
        };
        health.write_ended(range(1 << 21, 8), &without);
        assert!(!health.returned(C, 1));
        assert!(health.returned(C, 0));
        assert_eq!(health.in_service(), ReplicaSet::first(3));
        assert_eq!(health.next_stale((A, 0)).map(|(replica, _)| replica), Some(C));
        health.mended(C, range(0, 1 << 22), health.change_begins());
        assert!(!health.anything_stale());
    }

    #[test]
    fn what_is_mended_while_a_flush_runs_is_not_covered_by_it() {
        let mut health = Health::new(3, 2, 1, 1 << 22);
        write(&mut health, range(0, 8), &[C]);
        let epoch = health.flush_begins();
        health.mended(C, range(0, 8), health.change_begins());
        health.flush_ended(epoch, A, false);
        health.flush_ended(epoch, B, true);
        health.flush_ended(epoch, C, true);
        assert!(!health.fresh_on_threshold(), "only B has it safely");
    }

    #[test]
    fn who_is_needed_in_one_sector_stays() {
        let mut health = Health::new(3, 2, 1, 1 << 22);
        write(&mut health, range(8, 8), &[C]);
        assert!(!health.leave(A) && !health.leave(B), "only they hold it");
        assert!(health.leave(C));
        let mut last = Health::new(3, 2, 1, 16);
        write(&mut last, range(8, 8), &[C]);
        assert!(!last.leave(A), "also at the end of the disk");
    }

    #[test]
    fn a_write_during_which_a_replica_left_and_came_back_does_not_count_there() {
        let mut health = Health::new(3, 2, 1, 1 << 22);
        let began = health.change_begins();
        assert!(health.leave(C) && health.returned(C, 0));
        health.write_ended(range(0, 8), &end(began, ReplicaSet::first(3)));
        assert_eq!(health.stale_in(range(0, 8)), set(&[C]));
    }

    #[test]
    fn what_is_flushed_without_a_replica_is_stale_there() {
        let mut health = Health::new(3, 2, 1, 1 << 22);
        assert!(health.leave(C));
        let began = health.change_begins();
        health.write_ended(
            range(0, 8),
            &WriteEnd {
                asked: set(&[A, B]),
                ..end(began, set(&[A, B]))
            },
        );
        health.flush_begins();
        assert!(health.returned(C, 0));
        assert_eq!(health.stale_in(range(0, 8)), set(&[C]));
    }
}
