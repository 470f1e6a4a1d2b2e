//! Which replicas are in service, what each is known not to hold, and what is not durable yet
//! (contract W3, W5, W6).
//!
//! A sector is *stale* on a replica that missed or failed a write of it, or that failed to flush
//! what it wrote there: after a failed fsync the kernel may have dropped the dirty pages, so a
//! later success proves nothing. A stale replica does not vote on the sector until the sector is
//! written to it again.
//!
//! A replica that does not answer is *evicted*. Its operations may still happen at any time, so
//! everything it has not made durable is stale, and it rejoins only when every worker has seen the
//! end of all of them.
//!
//! Replicas are *members* until they are removed. One that was added is stale everywhere: it takes
//! part in every write and votes where it has been written to. One that was removed is stale
//! everywhere too, until no request refers to it; another replica takes its place only when every
//! worker has seen the end of all of its operations.
//!
//! Invariants: a sector whose write was reported as done is fresh on at least t members, unless a
//! flush has failed since; at least t replicas are in service, and no replica is evicted that holds
//! one of the last t fresh copies of a sector in service; there are at least t members, and none is
//! removed that holds one of the last t fresh copies of a sector, or of the last t durable ones.

use std::collections::VecDeque;
use std::sync::Arc;

use slab::Slab;

use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::limits::REPLICAS_MAX;

/// Orders the start of an operation against failed flushes and evictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct FailureEpoch(pub u64);

/// A write that has been handed to replicas and has not ended.
#[derive(Clone, Copy, Debug)]
pub struct WriteBegun {
    failure_epoch: FailureEpoch,
    place: usize,
}

/// Names one flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlushEpoch(u64);

/// The state of all replicas of a disk.
#[derive(Debug)]
pub struct Health {
    threshold: usize,
    /// A bit for each worker thread.
    workers: u64,
    members: ReplicaSet,
    in_service: ReplicaSet,
    /// Removed, but some worker still has a request that refers to it, or an operation.
    releasing: ReplicaSet,
    /// By index. Some places may be free.
    replicas: Vec<ReplicaHealth>,
    /// Changed by writes that have completed since the last flush began.
    written: RangeSet,
    /// Changed by writes that have not ended.
    writing: Slab<SectorRange>,
    capacity_sectors: u64,
    epoch: FlushEpoch,
    failure_epoch: FailureEpoch,
}

#[derive(Debug)]
struct ReplicaHealth {
    stale: RangeSet,
    /// Of what the last flush covers, what this replica is known not to have made durable: what
    /// was stale when it began, and what has become so since. Newer writes may refresh that, but
    /// not for this flush.
    uncovered: RangeSet,
    /// Has not been written to since this replica was added.
    blank: RangeSet,
    /// Was stale, or repaired, and has been written since the last flush began. Other members may
    /// have made durable long ago what this one had not.
    refreshed: RangeSet,
    /// The same of a flush that this replica has not confirmed yet.
    refreshed_before_flush: RangeSet,
    /// What was written before a flush that this replica has not confirmed yet, by that flush.
    unconfirmed: VecDeque<(FlushEpoch, Arc<RangeSet>)>,
    last_failure: FailureEpoch,
    /// When a failure last turned out to have undone a write that had succeeded here: a read in
    /// flight may have seen the old data, even if it has been written again by the time the reply
    /// comes.
    last_doubt: FailureEpoch,
    /// The workers that have had no operation in flight here since the eviction or removal.
    drained_by: u64,
    /// The workers that have had no request that refers to this replica since its removal.
    forgotten_by: u64,
}

impl ReplicaHealth {
    fn new(capacity_sectors: u64) -> Self {
        Self {
            stale: RangeSet::below(capacity_sectors),
            uncovered: RangeSet::below(capacity_sectors),
            blank: RangeSet::below(capacity_sectors),
            refreshed: RangeSet::below(capacity_sectors),
            refreshed_before_flush: RangeSet::below(capacity_sectors),
            unconfirmed: VecDeque::new(),
            last_failure: FailureEpoch::default(),
            last_doubt: FailureEpoch::default(),
            drained_by: 0,
            forgotten_by: 0,
        }
    }

    fn grow(&mut self, capacity_sectors: u64) {
        let sets = [
            &mut self.stale,
            &mut self.uncovered,
            &mut self.blank,
            &mut self.refreshed,
            &mut self.refreshed_before_flush,
        ];
        for set in sets {
            set.grow(capacity_sectors);
        }
    }

    /// `range` was written. `volatile`: not to stable storage.
    fn mark_fresh(&mut self, range: SectorRange, volatile: bool) {
        if self.stale.is_empty() {
            return;
        }
        if volatile {
            for part in self.stale.within(range) {
                self.refreshed.insert(part);
            }
        }
        self.stale.remove(range);
        self.blank.remove(range);
    }

    /// Sectors that are not on stable storage here, although they may be elsewhere.
    fn not_durable_here(&self) -> impl Iterator<Item = &RangeSet> {
        [&self.stale, &self.refreshed, &self.refreshed_before_flush].into_iter()
    }
}

/// Why a replica cannot be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRemoved {
    /// It is not a replica of the disk.
    #[error("it is no replica of this disk")]
    NoMember,
    /// Fewer than t replicas would remain.
    #[error("fewer replicas than the vote threshold would be left")]
    TooFew,
    /// Other replicas are evicted, so that fewer than t would remain in service.
    #[error("fewer replicas than the vote threshold would be left in service")]
    TooFewInService,
    /// Too few other replicas hold some sector up to date.
    #[error("there are sectors that too few other replicas hold up to date")]
    LastCopies,
    /// Too few other replicas have some sector on stable storage: a crash would lose it.
    #[error("there are sectors that too few other replicas have on stable storage")]
    LastDurableCopies,
}

impl Health {
    /// A disk of `capacity_sectors` with these members, all of them in service and fresh
    /// everywhere, used by `workers` threads.
    pub fn new(members: ReplicaSet, threshold: usize, workers: u16, capacity_sectors: u64) -> Self {
        assert!((1..=64).contains(&workers));
        assert!((1..=members.len()).contains(&threshold));
        let places = members.places();
        Self {
            threshold,
            workers: u64::MAX >> (64 - workers),
            members,
            in_service: members,
            releasing: ReplicaSet::EMPTY,
            replicas: (0..places)
                .map(|_| ReplicaHealth::new(capacity_sectors))
                .collect(),
            written: RangeSet::below(capacity_sectors),
            writing: Slab::new(),
            capacity_sectors,
            epoch: FlushEpoch(0),
            failure_epoch: FailureEpoch(0),
        }
    }

    /// The replicas of the disk.
    pub fn members(&self) -> ReplicaSet {
        self.members
    }

    /// The members that operations go to.
    pub fn in_service(&self) -> ReplicaSet {
        self.in_service
    }

    /// The evicted members, and the removed replicas that still have operations or requests.
    pub fn out_of_service(&self) -> ReplicaSet {
        self.members.or(self.releasing).without(self.in_service)
    }

    /// Sectors of the disk.
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    /// The disk grows to `capacity_sectors`. All members, whatever their state, hold zeroes in the
    /// new sectors, so that none is stale there.
    pub fn grow(&mut self, capacity_sectors: u64) {
        assert!(
            capacity_sectors >= self.capacity_sectors,
            "a disk never shrinks"
        );
        self.capacity_sectors = capacity_sectors;
        self.written.grow(capacity_sectors);
        for state in &mut self.replicas {
            state.grow(capacity_sectors);
        }
    }

    /// Makes `replica` a member, in service and stale everywhere. Its place must be free.
    pub fn add(&mut self, replica: ReplicaIndex) {
        assert!(
            !self.members.or(self.releasing).contains(replica),
            "its place is taken"
        );
        let capacity_sectors = self.capacity_sectors;
        while self.replicas.len() <= replica.as_usize() {
            self.replicas.push(ReplicaHealth::new(capacity_sectors));
        }
        let mut state = ReplicaHealth::new(capacity_sectors);
        state.stale.insert(SectorRange::new(0, capacity_sectors));
        // A flush in flight does not cover it.
        state.uncovered.clone_from(&state.stale);
        state.blank.clone_from(&state.stale);
        self.replicas[replica.as_usize()] = state;
        self.members.insert(replica);
        self.in_service.insert(replica);
        self.check_sets();
    }

    /// Removes `replica`, a member that is not needed, from the disk. Its place is free when every
    /// worker has released it.
    pub fn remove(&mut self, replica: ReplicaIndex) {
        assert!(self.members.contains(replica), "not a member");
        self.members.remove(replica);
        self.in_service.remove(replica);
        self.releasing.insert(replica);
        self.failure_epoch.0 += 1;
        let mut state = ReplicaHealth::new(self.capacity_sectors);
        // Its earlier replies do not count any more.
        state
            .stale
            .insert(SectorRange::new(0, self.capacity_sectors));
        state.last_failure = self.failure_epoch;
        self.replicas[replica.as_usize()] = state;
        self.check_sets();
    }

    /// Checks that `replica` can be removed.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check_removal(&self, replica: ReplicaIndex) -> Result<(), NotRemoved> {
        if !self.members.contains(replica) {
            return Err(NotRemoved::NoMember);
        }
        let mut others = self.members;
        others.remove(replica);
        if others.len() < self.threshold {
            return Err(NotRemoved::TooFew);
        }
        if self.in_service.contains(replica) && others.and(self.in_service).len() < self.threshold {
            return Err(NotRemoved::TooFewInService);
        }
        // The replica may hold the newest data where it is stale: a failed flush may have lost
        // nothing. Where too few other replicas are fresh it must stay, unless it is blank there.
        let lost = |without: ReplicaSet| {
            !without.contains(replica) && others.without(without).len() < self.threshold
        };
        let blank = || std::iter::once((replica, &self.replicas[replica.as_usize()].blank));
        let stale = others
            .iter()
            .map(|other| (other, &self.replicas[other.as_usize()].stale));
        if !every_sector(blank().chain(stale), self.capacity_sectors, |without| {
            !lost(without)
        }) {
            return Err(NotRemoved::LastCopies);
        }
        let not_durable = others.iter().flat_map(|other| {
            let sets = self.replicas[other.as_usize()].not_durable_here();
            sets.map(move |set| (other, set))
        });
        let sets = blank().chain(not_durable);
        if !every_sector(sets, self.capacity_sectors, |without| !lost(without)) {
            return Err(NotRemoved::LastDurableCopies);
        }
        Ok(())
    }

    /// A worker has no request that refers to the removed `replica`; `drained`: and no operation on
    /// it. `true` if with this its place is free.
    pub fn release(&mut self, replica: ReplicaIndex, worker: u16, drained: bool) -> bool {
        if !self.releasing.contains(replica) {
            return false;
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.forgotten_by |= 1 << worker;
        if drained {
            state.drained_by |= 1 << worker;
        }
        let forgotten = state.forgotten_by == self.workers;
        if forgotten {
            // No request can count it as a voter any more.
            state.stale = RangeSet::below(self.capacity_sectors);
        }
        let free = forgotten && state.drained_by == self.workers;
        if free {
            self.releasing.remove(replica);
            self.check_sets();
        }
        free
    }

    /// Evicts a replica that does not answer. `false` if it is evicted already, or if fewer than t
    /// replicas would remain, in all or in some sector: then the disk has to wait for it.
    pub fn evict(&mut self, replica: ReplicaIndex) -> bool {
        if !self.in_service.contains(replica) || self.is_needed(replica) {
            return false;
        }
        self.in_service.remove(replica);
        self.replicas[replica.as_usize()].drained_by = 0;
        self.not_durable(replica);
        self.check_sets();
        true
    }

    /// A worker has no operation in flight on an evicted replica. `true` if it was the last such
    /// worker and the replica is in service again; what it missed is stale.
    pub fn rejoin(&mut self, replica: ReplicaIndex, worker: u16) -> bool {
        if self.in_service.contains(replica) || !self.members.contains(replica) {
            return false;
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.drained_by |= 1 << worker;
        let all = state.drained_by == self.workers;
        if all {
            self.in_service.insert(replica);
            self.check_sets();
        }
        all
    }

    /// Whether any replica is stale anywhere.
    pub fn anything_stale(&self) -> bool {
        self.replicas.iter().any(|r| !r.stale.is_empty())
    }

    /// The replicas that are stale anywhere, removed ones included that requests still refer to.
    pub fn stale(&self) -> ReplicaSet {
        self.known()
            .iter()
            .filter(|r| !self.replicas[r.as_usize()].stale.is_empty())
            .collect()
    }

    /// The replicas that are stale somewhere in `range`.
    pub fn stale_in(&self, range: SectorRange) -> ReplicaSet {
        self.known()
            .iter()
            .filter(|r| self.replicas[r.as_usize()].stale.overlaps(range))
            .collect()
    }

    /// The parts of `range` in which `replica` is stale, in order.
    pub fn stale_parts(&self, replica: ReplicaIndex, range: SectorRange) -> Vec<SectorRange> {
        self.replicas[replica.as_usize()].stale.within(range)
    }

    /// The first range at or after `sector` in which `replica` is stale.
    pub fn next_stale(&self, replica: ReplicaIndex, sector: u64) -> Option<SectorRange> {
        let rest = SectorRange::new(sector, u64::MAX - sector);
        self.replicas[replica.as_usize()].stale.first_within(rest)
    }

    /// In how many sectors `replica` is stale.
    pub fn stale_sectors(&self, replica: ReplicaIndex) -> u64 {
        let state = self.replicas.get(replica.as_usize());
        let stale = state.into_iter().flat_map(|state| state.stale.iter());
        stale.map(|range| range.count).sum()
    }

    /// The replicas that have failed a flush or were evicted since `began`, or a failure of which
    /// turned out since then to have undone a write.
    pub fn failed_since(&self, began: FailureEpoch) -> ReplicaSet {
        self.known()
            .iter()
            .filter(|r| {
                let state = &self.replicas[r.as_usize()];
                state.last_failure > began || state.last_doubt > began
            })
            .collect()
    }

    /// The present epoch. An operation that changes sectors keeps it from the moment it goes to the
    /// replicas until it ends.
    pub fn failure_epoch(&self) -> FailureEpoch {
        self.failure_epoch
    }

    /// A write of `range` goes to the replicas. [`Self::write_ended`] must follow.
    pub fn write_begins(&mut self, range: SectorRange) -> WriteBegun {
        WriteBegun {
            failure_epoch: self.failure_epoch,
            place: self.writing.insert(range),
        }
    }

    /// A write has ended.
    ///
    /// A write that failed leaves old or new bytes on the replicas that failed it, and the vote
    /// decides which (W7): none of them becomes stale. A replica that was not asked, was evicted or
    /// failed a flush while the write ran is stale in any case.
    ///
    /// `true` if a replica is stale now that was stale nowhere before.
    pub fn write_ended(&mut self, write: &WriteEnd) -> bool {
        let WriteBegun {
            failure_epoch: began,
            place,
        } = write.begun;
        assert!(began <= self.failure_epoch, "a write ends after it began");
        let range = self.writing.remove(place);
        let mut became_stale = false;
        for replica in self.members.iter() {
            let state = &mut self.replicas[replica.as_usize()];
            let doubtful = state.last_failure > began || !write.asked.contains(replica);
            let done = write.succeeded.contains(replica);
            if doubtful || (write.success && !done) {
                became_stale |= state.stale.is_empty();
                state.stale.insert(range);
                if done {
                    // The write counted here, and may not be lost: the replica is not blank.
                    state.blank.remove(range);
                    self.failure_epoch.0 += 1;
                    state.last_doubt = self.failure_epoch;
                }
            } else if done {
                state.mark_fresh(range, !write.durable);
            }
        }
        if !write.durable {
            self.written.insert(range);
        }
        became_stale
    }

    /// Sectors of one replica were written with the winner of a vote, under the lock of their
    /// range.
    pub fn repaired(&mut self, replica: ReplicaIndex, range: SectorRange, began: FailureEpoch) {
        if !self.members.contains(replica) {
            return;
        }
        let state = &mut self.replicas[replica.as_usize()];
        if state.last_failure > began {
            state.stale.insert(range);
            state.blank.remove(range);
            self.failure_epoch.0 += 1;
            state.last_doubt = self.failure_epoch;
        } else {
            state.mark_fresh(range, true);
            // It was perhaps not stale, but corrupt.
            state.refreshed.insert(range);
        }
        self.written.insert(range);
    }

    /// An orphaned operation may still change sectors of one replica.
    pub fn mark_stale(&mut self, replica: ReplicaIndex, range: SectorRange) {
        if self.members.contains(replica) {
            self.replicas[replica.as_usize()].stale.insert(range);
        }
    }

    /// A flush is about to go to all replicas in service; it covers every write that has ended.
    pub fn flush_begins(&mut self) -> FlushEpoch {
        self.epoch.0 += 1;
        let nothing = RangeSet::below(self.capacity_sectors);
        for replica in self.members.iter() {
            let state = &mut self.replicas[replica.as_usize()];
            state.uncovered.clone_from(&state.stale);
            let refreshed = std::mem::replace(&mut state.refreshed, nothing.clone());
            state.refreshed_before_flush.insert_all(&refreshed);
        }
        let written = std::mem::replace(&mut self.written, nothing);
        if !written.is_empty() {
            let written = Arc::new(written);
            for replica in self.members.iter() {
                let state = &mut self.replicas[replica.as_usize()];
                if self.in_service.contains(replica) {
                    state
                        .unconfirmed
                        .push_back((self.epoch, Arc::clone(&written)));
                } else {
                    state.stale.insert_all(&written);
                }
            }
        }
        self.epoch
    }

    /// The flush `epoch` has come back from `replica`.
    pub fn flush_ended(&mut self, epoch: FlushEpoch, replica: ReplicaIndex, success: bool) {
        assert!(epoch <= self.epoch, "a flush ends after it began");
        if !success {
            return self.not_durable(replica);
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.refreshed_before_flush = RangeSet::below(self.capacity_sectors);
        let unconfirmed = &mut state.unconfirmed;
        while unconfirmed
            .front()
            .is_some_and(|(covered, _)| *covered <= epoch)
        {
            unconfirmed.pop_front();
        }
    }

    /// `replica` has failed a durable write. The kernel reports a page that it could not write back
    /// once, to a flush or to such a write: this may have been about earlier writes. `true` if
    /// there are any that are not durable.
    pub fn failed_to_persist(&mut self, replica: ReplicaIndex) -> bool {
        let unconfirmed = &self.replicas[replica.as_usize()].unconfirmed;
        let anything = !self.written.is_empty() || !unconfirmed.is_empty();
        if anything {
            self.not_durable(replica);
        }
        anything
    }

    /// What `replica` wrote since its last successful flush may be lost, and so may be what it is
    /// writing now: a guest may have read that from it already and must not read the old data.
    fn not_durable(&mut self, replica: ReplicaIndex) {
        self.failure_epoch.0 += 1;
        let state = &mut self.replicas[replica.as_usize()];
        state.last_failure = self.failure_epoch;
        state.stale.insert_all(&self.written);
        for (_, range) in &self.writing {
            state.stale.insert(*range);
        }
        for (_, written) in state.unconfirmed.drain(..) {
            state.stale.insert_all(&written);
            state.uncovered.insert_all(&written);
        }
    }

    /// Whether every sector is fresh on at least t members, and was when the last flush began. Once
    /// all replies to that flush are in, the fresh sectors are the durable ones. One flush runs at
    /// a time.
    pub fn fresh_on_threshold(&self) -> bool {
        let sets = self.members.iter().flat_map(|member| {
            let state = &self.replicas[member.as_usize()];
            [(member, &state.stale), (member, &state.uncovered)]
        });
        every_sector(sets, self.capacity_sectors, |stale| {
            self.members.without(stale).len() >= self.threshold
        })
    }

    /// Asserts the invariants that hold between any two changes.
    pub fn self_check(&self) {
        self.check_sets();
        for replica in ReplicaSet::first(self.replicas.len()).iter() {
            let state = &self.replicas[replica.as_usize()];
            assert!(
                state.last_failure.max(state.last_doubt) <= self.failure_epoch,
                "a failure is not later than the present epoch"
            );
            assert_eq!((state.drained_by | state.forgotten_by) & !self.workers, 0);
            let mut confirmed = FlushEpoch(0);
            for (epoch, written) in &state.unconfirmed {
                assert!(
                    *epoch > confirmed && *epoch <= self.epoch,
                    "flushes in order"
                );
                assert!(
                    !written.is_empty(),
                    "a flush that covers nothing is not kept"
                );
                confirmed = *epoch;
            }
            if !self.known().contains(replica) {
                assert!(state.stale.is_empty(), "a free place is not stale");
            }
        }
    }

    /// Asserts what holds between the sets of replicas.
    fn check_sets(&self) {
        let Self {
            members,
            in_service,
            releasing,
            ..
        } = self;
        assert!(
            in_service.without(*members).is_empty(),
            "only members serve"
        );
        assert!(members.and(*releasing).is_empty(), "removed and a member");
        assert!(in_service.len() >= self.threshold, "too few in service");
        assert!(
            members.places() <= self.replicas.len(),
            "a member without a state"
        );
    }

    /// Whether without `replica` fewer than t would be left that are in service, or that are in
    /// service and fresh in some sector where now there are enough.
    fn is_needed(&self, replica: ReplicaIndex) -> bool {
        let mut others = self.in_service;
        others.remove(replica);
        let enough_without = |stale: ReplicaSet| others.without(stale).len() >= self.threshold;
        let enough_with =
            |stale: ReplicaSet| self.in_service.without(stale).len() >= self.threshold;
        let stale = self
            .members
            .iter()
            .map(|member| (member, &self.replicas[member.as_usize()].stale));
        others.len() < self.threshold
            || !every_sector(stale, self.capacity_sectors, |stale| {
                enough_without(stale) || !enough_with(stale)
            })
    }

    /// The members, and the removed replicas whose place is not free.
    fn known(&self) -> ReplicaSet {
        self.members.or(self.releasing)
    }
}

/// Whether `holds` for the replicas that have a sector in one of their sets, for every sector of a
/// disk.
fn every_sector<'a>(
    sets: impl Iterator<Item = (ReplicaIndex, &'a RangeSet)>,
    capacity_sectors: u64,
    holds: impl Fn(ReplicaSet) -> bool,
) -> bool {
    // Sweep over the ends of all ranges; between two of them the sets do not change.
    let mut ends: Vec<(u64, ReplicaIndex, bool)> = sets
        .flat_map(|(replica, ranges)| {
            ranges.iter().flat_map(move |range| {
                [(range.start, replica, true), (range.end(), replica, false)]
            })
        })
        .collect();
    ends.sort_unstable();
    // How many of its sets each replica is in.
    let mut inside = [0_u8; REPLICAS_MAX];
    let mut with = ReplicaSet::EMPTY;
    let mut from = 0;
    for (sector, replica, begins) in ends {
        if sector > from && !holds(with) {
            return false;
        }
        from = sector;
        let count = &mut inside[replica.as_usize()];
        if begins {
            *count += 1;
            with.insert(replica);
        } else {
            *count -= 1;
            if *count == 0 {
                with.remove(replica);
            }
        }
    }
    from >= capacity_sectors || holds(with)
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
    /// It went to stable storage by itself.
    pub durable: bool,
}

#[cfg(test)]
mod tests;
