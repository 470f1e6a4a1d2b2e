//! What writes and flushes leave behind: where each replica is stale, and what is not durable.

use super::{Beginning, FailureEpoch, Health, Prepared, Writing};
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};

/// A write that has been handed to replicas and has not ended.
#[derive(Clone, Copy, Debug)]
pub struct WriteBegun {
    place: usize,
}

/// How a write ended.
#[derive(Clone, Copy, Debug)]
pub struct WriteEnd {
    /// The replicas it went to.
    pub asked: ReplicaSet,
    /// Those of them that succeeded.
    pub succeeded: ReplicaSet,
    /// As returned by [`Health::write_begins`].
    pub begun: WriteBegun,
    /// There is a quorum: the guest gets success.
    pub success: bool,
}

/// Names one flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct FlushEpoch(pub(super) u64);

impl Health {
    /// A write of `range` goes to the replicas. [`Self::write_ended`] must follow.
    pub fn write_begins(&mut self, range: SectorRange) -> WriteBegun {
        WriteBegun {
            place: self.writing.insert(Writing {
                range,
                failure_epoch: self.failure_epoch,
                may_succeed: self.in_service,
            }),
        }
    }

    /// `replica` has failed a write that has not ended.
    pub fn write_failed(&mut self, begun: WriteBegun, replica: ReplicaIndex) {
        self.writing[begun.place].may_succeed.remove(replica);
    }

    /// Whether a write that these have done has a quorum (W3).
    pub fn has_quorum(&self, begun: WriteBegun, succeeded: ReplicaSet) -> bool {
        self.counting(&self.writing[begun.place], succeeded).len() >= self.threshold
    }

    /// Those of `replicas` on which a write counts when they have done it. One that was evicted
    /// meanwhile, or failed a flush, may lose it. Then its copy is doubtful, and may vote; but not
    /// if it had no vote before: on such a replica the write does not count, nor on one that was
    /// removed.
    fn counting(&self, writing: &Writing, replicas: ReplicaSet) -> ReplicaSet {
        let counts = |replica: &ReplicaIndex| {
            let state = &self.replicas[replica.as_usize()];
            state.last_failure <= writing.failure_epoch || !state.has_no_vote(writing.range)
        };
        replicas.iter().filter(counts).collect()
    }

    /// For each write that has not ended, the replicas that may make it succeed.
    pub(super) fn may_succeed(&self) -> impl Iterator<Item = ReplicaSet> {
        let writing = self.writing.iter();
        writing.map(|(_, writing)| self.counting(writing, writing.may_succeed))
    }

    /// A write has ended.
    ///
    /// A write that failed leaves old or new bytes on the replicas that failed it: none of them
    /// becomes stale, and the range is undecided (W7). A replica that was not asked, was evicted or
    /// failed a flush while the write ran is stale in any case.
    ///
    /// `true` if a replica is stale now that was stale nowhere before.
    pub fn write_ended(&mut self, write: &WriteEnd) -> bool {
        let Writing {
            range,
            failure_epoch: began,
            ..
        } = self.writing.remove(write.begun.place);
        assert!(began <= self.failure_epoch, "a write ends after it began");
        let (mut became_stale, mut doubtful) = (false, false);
        for replica in self.members.iter() {
            let state = &mut self.replicas[replica.as_usize()];
            let done = write.succeeded.contains(replica);
            let missed = !write.asked.contains(replica) || (write.success && !done);
            if missed || state.last_failure > began {
                // The records say already of a coarse one that it is stale where anything changes.
                if self.in_service.without(self.coarse).contains(replica) {
                    self.memory += 1;
                    state.misses += 1;
                }
                became_stale |= state.stale.is_empty();
                state.stale.insert(range);
                if missed {
                    state.missed.insert(range);
                }
                if done {
                    doubtful = true;
                    // The write counted here, and may not be lost: the replica is not blank.
                    state.blank.remove(range);
                    self.failure_epoch.0 += 1;
                    state.last_doubt = self.failure_epoch;
                }
            } else if done {
                state.mark_fresh(range);
            }
        }
        if write.success {
            self.write_counts(range, doubtful);
            if !self.undecided.is_empty() {
                self.undecided.remove(range);
                self.unrecovered.remove(range);
            }
            if !self.unresolved.is_empty() {
                self.unresolved.remove(range);
            }
            if !self.given_up.is_empty() {
                self.given_up.remove(range);
            }
        } else {
            self.undecided.insert(range);
            // A reply that is on its way counts only under the lock, which decides.
            self.failure_epoch.0 += 1;
            for replica in write.asked.and(self.members).iter() {
                self.replicas[replica.as_usize()].last_doubt = self.failure_epoch;
            }
        }
        self.written.insert(range);
        became_stale
    }

    /// Sectors of one replica were written with the winner of a vote, under the lock of their
    /// range. `was_corrupt`: by its bytes; otherwise it was stale or unreadable, or had a legal
    /// version (W7).
    pub fn repaired(
        &mut self,
        replica: ReplicaIndex,
        range: SectorRange,
        began: FailureEpoch,
        was_corrupt: bool,
    ) {
        if !self.members.contains(replica) {
            return;
        }
        let state = &mut self.replicas[replica.as_usize()];
        if was_corrupt {
            state.weak.insert(range);
        }
        if state.last_failure > began {
            self.memory += 1;
            state.stale.insert(range);
            if was_corrupt {
                state.behind.insert(range);
            }
            state.blank.remove(range);
            self.failure_epoch.0 += 1;
            state.last_doubt = self.failure_epoch;
        } else {
            state.mark_fresh(range);
            match was_corrupt {
                true => state.refreshed.insert(range),
                false => state.restored.insert(range),
            }
        }
        state.rewritten.insert(range);
        for part in self.unproven_parts(&[range]) {
            self.replicas[replica.as_usize()].copied.insert(part);
            self.any_copied = true;
        }
    }

    /// An orphaned repair may still change sectors of one replica, which was evicted. It holds the
    /// winner there or what it held before; `was_corrupt`: by its bytes.
    pub fn repair_orphaned(
        &mut self,
        replica: ReplicaIndex,
        range: SectorRange,
        was_corrupt: bool,
    ) {
        if self.members.contains(replica) {
            self.memory += 1;
            let state = &mut self.replicas[replica.as_usize()];
            match was_corrupt {
                true => state.mark_missed(range),
                false => state.stale.insert(range),
            }
        }
    }

    /// A write as in [`Self::repaired`] has failed where any copy is legal (S5). Some of the winner
    /// may be in the page cache, until a flush that fails loses it: if one has failed since it
    /// `began`, what a read finds there does not count until it is written again.
    pub fn repair_failed(
        &mut self,
        replica: ReplicaIndex,
        range: SectorRange,
        began: FailureEpoch,
    ) {
        if !self.members.contains(replica) {
            return;
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.rewritten.insert(range);
        state.restored.insert(range);
        if state.last_failure > began {
            self.memory += 1;
            state.stale.insert(range);
            self.failure_epoch.0 += 1;
            state.last_doubt = self.failure_epoch;
        }
    }

    /// A flush is about to go to all replicas in service; it covers every write that has ended.
    pub fn flush_begins(&mut self) -> FlushEpoch {
        self.flush_begins_as_on(&mut [])
    }

    /// The same, with what was prepared of it, if anything.
    pub fn flush_begins_as_on(&mut self, beginning: &mut [Beginning]) -> FlushEpoch {
        for replica in self.members.iter() {
            self.pass_on(replica, beginning);
        }
        self.given_up_before_flush.clone_from(&self.given_up);
        self.epoch.0 += 1;
        self.flushing = Some(self.in_service);
        self.undone.writes_before_flush = self.undone.writes;
        for replica in self.members.iter() {
            let state = &mut self.replicas[replica.as_usize()];
            let uncovered = std::mem::replace(&mut state.uncovered, state.stale.clone());
            if !uncovered.is_empty() {
                self.garbage.push(uncovered);
            }
        }
        let written = std::mem::take(&mut self.written);
        if !written.is_empty() {
            for replica in self.members.iter() {
                let state = &mut self.replicas[replica.as_usize()];
                // All that was written is stale already where the flush does not go.
                if self.in_service.contains(replica) {
                    state.unconfirmed.push_back((self.epoch, written.clone()));
                }
            }
        }
        for replica in self.members.iter() {
            let state = &mut self.replicas[replica.as_usize()];
            let rewritten = std::mem::take(&mut state.rewritten);
            // What was not durable on an evicted replica is stale already.
            if !rewritten.is_empty() && self.in_service.contains(replica) {
                state.unconfirmed.push_back((self.epoch, rewritten));
            }
        }
        self.epoch
    }

    /// The flush `epoch` has come back from `replica`.
    pub fn flush_ended(&mut self, epoch: FlushEpoch, replica: ReplicaIndex, success: bool) {
        assert!(epoch <= self.epoch, "a flush ends after it began");
        if !success {
            if let Some(may_succeed) = &mut self.flushing {
                may_succeed.remove(replica);
            }
            return self.not_durable(replica, None);
        }
        let state = &mut self.replicas[replica.as_usize()];
        let sets = [
            &mut state.refreshed_before_flush,
            &mut state.restored_before_flush,
            &mut state.weak_before_flush,
        ];
        let sets = sets.map(std::mem::take).into_iter();
        self.garbage.extend(sets.filter(|set| !set.is_empty()));
        let unconfirmed = &mut state.unconfirmed;
        let confirmed = unconfirmed.partition_point(|(covered, _)| *covered <= epoch);
        let written = unconfirmed.drain(..confirmed).map(|(_, written)| written);
        self.garbage.extend(written);
    }

    /// All replies to the flush `epoch` are in. `is_enough`: by [`Durability::is_enough`];
    /// `settlement`: what was prepared of it, if anything. Whether every acknowledged sector is
    /// durable on at least t members (W5).
    ///
    /// [`Durability::is_enough`]: super::Durability::is_enough
    pub fn flush_decided(
        &mut self,
        epoch: FlushEpoch,
        succeeded: ReplicaSet,
        is_enough: bool,
        settlement: &mut [Prepared],
    ) -> bool {
        // A replica that was removed meanwhile does not count.
        let flushed = succeeded.and(self.members).len() >= self.threshold;
        self.flushing = None;
        let success = flushed && is_enough;
        if success {
            self.flushed = epoch;
            if self.in_service.without(succeeded).is_empty() {
                self.flushed_everywhere = epoch;
            }
            let settlement = match self.given_up_before_flush.is_empty() {
                true => settlement,
                false => {
                    self.leave_given_up();
                    &mut []
                }
            };
            self.doubt_is_over(settlement);
            if self.any_copied {
                for state in &mut self.replicas {
                    let copied = std::mem::take(&mut state.copied_before_flush);
                    self.garbage.push(copied);
                }
                let mut left = self.replicas.iter();
                self.any_copied = left.any(|state| !state.copied.is_empty());
            }
        }
        success
    }

    /// A write of `range` is answered as durable, although the flush has failed elsewhere.
    pub fn is_durable_alone(&mut self, range: SectorRange) {
        self.memory += u64::from(self.needs_settlement());
        for member in self.members.iter() {
            self.replicas[member.as_usize()].fall_behind_in(range);
        }
    }

    /// The last flush that has begun.
    pub fn last_flush(&self) -> FlushEpoch {
        self.epoch
    }

    /// The last flush that has succeeded on all members in service.
    pub fn flushed_everywhere(&self) -> FlushEpoch {
        self.flushed_everywhere
    }

    /// Where members in service may differ: a write is under way, or what it has left is not
    /// decided, or one of them does not hold everything durably.
    pub fn unsettled(&self) -> impl Iterator<Item = SectorRange> {
        let writing = self.writing.iter().map(|(_, writing)| writing.range);
        let in_service = self.in_service.iter();
        let lacking =
            in_service.flat_map(|member| self.replicas[member.as_usize()].not_durable_here());
        let lacking = lacking.flat_map(RangeSet::iter);
        writing.chain(self.undecided.iter()).chain(lacking)
    }

    /// Whether a flush has succeeded that began after `since`. It covers all that was written
    /// before.
    pub fn flushed_since(&self, since: FlushEpoch) -> bool {
        self.flushed > since
    }

    /// The last flush has come back from all replicas, with success from `succeeded`. Whether
    /// `range`, which was written before it began, is durable on at least t members, however it
    /// stands with the rest of the disk.
    pub fn is_durable(&self, range: SectorRange, succeeded: ReplicaSet) -> bool {
        self.durability().is_durable(range, succeeded)
    }
}
