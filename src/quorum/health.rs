//! What each replica is known not to hold, and what is not durable yet (contract W3, W5).
//!
//! A sector is *stale* on a replica that failed to write it, or that failed to flush what it wrote there:
//! after a failed fsync the kernel may have dropped the dirty pages, so a later success proves nothing. A
//! stale replica does not vote on the sector until the sector is written to it again.
//!
//! Invariant: a sector that the guest was told is written is fresh on at least t replicas, unless a flush
//! has failed since.

use std::collections::VecDeque;
use std::sync::Arc;

use super::ranges::RangeSet;
use super::{ReplicaIndex, ReplicaSet, SectorRange};

/// What is written between two flushes is kept in multiples of 1 MiB: it is needed to the sector only after
/// a flush has failed, and costs every write.
const WRITTEN_GRANULE_SECTORS: u64 = 2048;

/// Orders the start of writes against failed flushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct FlushFailures(u64);

/// Names one flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlushEpoch(u64);

/// The state of all replicas of a disk.
#[derive(Debug)]
pub struct Health {
    threshold: usize,
    replicas: Vec<ReplicaHealth>,
    /// What completed writes changed since the last flush began.
    written: RangeSet,
    epoch: FlushEpoch,
    failures: FlushFailures,
}

#[derive(Debug, Default)]
struct ReplicaHealth {
    stale: RangeSet,
    /// What was written before a flush that this replica has not confirmed yet, by that flush.
    unconfirmed: VecDeque<(FlushEpoch, Arc<RangeSet>)>,
    last_failure: FlushFailures,
}

impl Health {
    /// `replicas` replicas, all of them fresh everywhere.
    pub fn new(replicas: usize, threshold: usize) -> Self {
        Self {
            threshold,
            replicas: (0..replicas).map(|_| ReplicaHealth::default()).collect(),
            written: RangeSet::with_granule(WRITTEN_GRANULE_SECTORS),
            epoch: FlushEpoch(0),
            failures: FlushFailures(0),
        }
    }

    /// Whether any replica is stale anywhere.
    pub fn anything_stale(&self) -> bool {
        self.replicas.iter().any(|r| !r.stale.is_empty())
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

    /// To be kept from the moment a write is handed to the replicas until [`Self::write_ended`].
    pub fn write_begins(&self) -> FlushFailures {
        self.failures
    }

    /// A write of `range` has succeeded on `succeeded` and failed on `failed`, and the guest will be told
    /// that it succeeded. `durable`: it went to stable storage by itself.
    ///
    /// A replica whose flush failed while the write ran may have dropped it and counts as failed.
    pub fn write_ended(
        &mut self,
        range: SectorRange,
        succeeded: ReplicaSet,
        failed: ReplicaSet,
        began: FlushFailures,
        durable: bool,
    ) {
        for replica in succeeded.iter() {
            let state = &mut self.replicas[replica.as_usize()];
            if state.last_failure > began {
                state.stale.insert(range);
            } else if !state.stale.is_empty() {
                state.stale.remove(range);
            }
        }
        for replica in failed.iter() {
            self.replicas[replica.as_usize()].stale.insert(range);
        }
        if !durable {
            self.written.insert(range);
        }
    }

    /// Sectors were rewritten with the winner of a vote.
    pub fn rewritten(&mut self, range: SectorRange) {
        self.written.insert(range);
    }

    /// A flush is about to go to all replicas; it covers every write that has ended.
    pub fn flush_begins(&mut self) -> FlushEpoch {
        self.epoch.0 += 1;
        let written = std::mem::replace(&mut self.written, RangeSet::with_granule(WRITTEN_GRANULE_SECTORS));
        if !written.is_empty() {
            let written = Arc::new(written);
            for state in &mut self.replicas {
                state.unconfirmed.push_back((self.epoch, Arc::clone(&written)));
            }
        }
        self.epoch
    }

    /// The flush `epoch` has come back from `replica`.
    pub fn flush_ended(&mut self, epoch: FlushEpoch, replica: ReplicaIndex, success: bool) {
        let state = &mut self.replicas[replica.as_usize()];
        if !success {
            self.failures.0 += 1;
            state.last_failure = self.failures;
            // Also what has been written since the flush began, and what a later flush has not confirmed.
            state.stale.insert_all(&self.written);
        }
        while let Some((covered, written)) = state.unconfirmed.front() {
            if !success {
                state.stale.insert_all(written);
            } else if *covered > epoch {
                break;
            }
            state.unconfirmed.pop_front();
        }
    }

    /// Whether every sector is fresh on at least t replicas. Asked after all replies to a flush are in, when
    /// whatever is fresh and was written before it is durable.
    pub fn fresh_on_threshold(&self) -> bool {
        let stale: usize = self.replicas.iter().filter(|r| !r.stale.is_empty()).count();
        if self.replicas.len() - stale >= self.threshold {
            return true;
        }
        // Sweep over the ends of all stale ranges: at each point, how many replicas are stale?
        let mut ends: Vec<(u64, i32)> = self
            .replicas
            .iter()
            .flat_map(|r| r.stale.iter())
            .flat_map(|range| [(range.start, 1), (range.end(), -1)])
            .collect();
        ends.sort_unstable();
        let allowed = self.replicas.len() - self.threshold;
        let mut stale_here = 0;
        ends.into_iter().all(|(_, change)| {
            stale_here += change;
            usize::try_from(stale_here).is_ok_and(|count| count <= allowed)
        })
    }

    fn indexes(&self) -> impl Iterator<Item = ReplicaIndex> + use<> {
        ReplicaSet::first(self.replicas.len()).iter()
    }
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

    fn write(health: &mut Health, range: SectorRange, failed: &[ReplicaIndex]) {
        let began = health.write_begins();
        let failed = set(failed);
        health.write_ended(range, ReplicaSet::first(3).without(failed), failed, began, false);
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
        let mut health = Health::new(3, 2);
        write(&mut health, range(8, 8), &[C]);
        assert_eq!(health.stale_in(range(0, 9)), set(&[C]));
        assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
        write(&mut health, range(8, 4), &[]);
        assert_eq!(health.stale_parts(C, range(0, 100)), [range(12, 4)]);
    }

    /// The case that counting successes gets wrong: a write held by {A,B}, a flush done by {B,C}.
    #[test]
    fn a_flush_needs_the_replicas_that_hold_the_writes() {
        let mut health = Health::new(3, 2);
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
        let mut health = Health::new(3, 2);
        write(&mut health, range(0, 8), &[]);
        assert!(flush(&mut health, &[]));
        write(&mut health, range(1 << 20, 8), &[]);
        assert!(flush(&mut health, &[B]));
        assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
        assert_eq!(health.stale_in(range(1 << 20, 8)), set(&[B]));
    }

    #[test]
    fn a_write_that_ran_while_a_flush_failed_does_not_count_on_that_replica() {
        let mut health = Health::new(3, 2);
        let began = health.write_begins();
        let epoch = health.flush_begins();
        health.flush_ended(epoch, A, false);
        health.write_ended(range(0, 8), ReplicaSet::first(3), ReplicaSet::EMPTY, began, false);
        assert_eq!(health.stale_in(range(0, 8)), set(&[A]));
    }

    #[test]
    fn a_later_flush_confirms_the_earlier_ones() {
        let mut health = Health::new(1, 1);
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
        let began = health.write_begins();
        health.write_ended(range, ReplicaSet::first(1), ReplicaSet::EMPTY, began, false);
    }
}
