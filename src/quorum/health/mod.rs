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

mod binding;
mod coarse;
mod disputed;
mod doubt;
mod durability;
mod loss;
mod members;
mod missing;
mod needed;
mod preferable;
mod prepared;
mod recovery;
mod replica;
mod snapshot;
mod threshold;

use slab::Slab;

use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};

pub use self::binding::Binding;
pub use self::disputed::{Disputed, FlushAsked};
pub use self::durability::{FlushEpoch, WriteBegun, WriteEnd};
pub use self::loss::Loss;
pub use self::members::NotRemoved;
pub use self::preferable::Preferable;
pub use self::prepared::{Beginning, Prepared};
pub use self::recovery::{Copies, Remembered};
pub use self::snapshot::Durability;
pub use self::threshold::{NotThreshold, Wanted, majority};

use self::disputed::Undone;
use self::replica::ReplicaHealth;

/// Orders the start of an operation against failed flushes and evictions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct FailureEpoch(pub u64);

/// A write that has not ended.
#[derive(Clone, Copy, Debug)]
struct Writing {
    range: SectorRange,
    /// When it began.
    failure_epoch: FailureEpoch,
    /// The replicas that may make it succeed: they were asked and have not failed it since.
    may_succeed: ReplicaSet,
}

/// The state of all replicas of a disk.
#[derive(Debug)]
pub struct Health {
    threshold: usize,
    /// What the threshold is to be; it is less until enough replicas are complete.
    wanted: Wanted,
    /// A bit for each worker thread.
    workers: u64,
    members: ReplicaSet,
    in_service: ReplicaSet,
    /// Members whose image is not open.
    missing: ReplicaSet,
    /// Removed, but some worker still has a request that refers to it, or an operation.
    releasing: ReplicaSet,
    /// By index. Some places may be free.
    replicas: Vec<ReplicaHealth>,
    /// Changed by writes that have completed since the last flush began.
    written: RangeSet,
    /// Changed by writes that have not ended.
    writing: Slab<Writing>,
    /// Some member has copies of what was not proven.
    any_copied: bool,
    /// Changed by writes that have failed, and not decided since (W7).
    undecided: RangeSet,
    /// Of what is undecided: changed shortly before an unclean end of the disk, and not voted on
    /// since. Every fresh copy is legal (S5).
    unrecovered: RangeSet,
    /// No version had enough votes in the last vote, and no write has succeeded since.
    unresolved: RangeSet,
    /// The operator has given up what these sectors held, and no write has succeeded since (W11).
    given_up: RangeSet,
    /// The same when the last flush began, and what was given up since: not for that flush.
    given_up_before_flush: RangeSet,
    /// All that was ever given up, or left on too few replicas that had flushed it.
    once_given_up: RangeSet,
    /// The replicas that may make the running flush succeed; `None` if none runs.
    flushing: Option<ReplicaSet>,
    undone: Undone,
    capacity_sectors: u64,
    epoch: FlushEpoch,
    /// The last flush that succeeded.
    flushed: FlushEpoch,
    /// The last one that succeeded on all members in service.
    flushed_everywhere: FlushEpoch,
    failure_epoch: FailureEpoch,
    /// How often a replica was added or has rejoined.
    arrivals: u64,
    /// See [`Self::memory`].
    memory: u64,
    /// See [`Self::decide_coarse`].
    coarse: ReplicaSet,
    /// See [`Self::bind`].
    bindings: Vec<Binding>,
    /// Sets that are not needed any more.
    garbage: Vec<RangeSet>,
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
            wanted: Wanted::Given(threshold),
            workers: u64::MAX >> (64 - workers),
            members,
            in_service: members,
            missing: ReplicaSet::EMPTY,
            releasing: ReplicaSet::EMPTY,
            replicas: (0..places).map(|_| ReplicaHealth::default()).collect(),
            written: RangeSet::default(),
            writing: Slab::new(),
            any_copied: false,
            undecided: RangeSet::default(),
            unrecovered: RangeSet::default(),
            unresolved: RangeSet::default(),
            given_up: RangeSet::default(),
            given_up_before_flush: RangeSet::default(),
            once_given_up: RangeSet::default(),
            flushing: None,
            undone: Undone::default(),
            capacity_sectors,
            epoch: FlushEpoch::default(),
            flushed: FlushEpoch::default(),
            flushed_everywhere: FlushEpoch::default(),
            failure_epoch: FailureEpoch(0),
            arrivals: 0,
            memory: 1,
            coarse: ReplicaSet::EMPTY,
            bindings: Vec::new(),
            garbage: Vec::new(),
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

    /// How often a replica was added or has rejoined: what was impossible without it may be
    /// possible now.
    pub fn arrivals(&self) -> u64 {
        self.arrivals
    }

    /// Sectors of the disk.
    pub fn capacity_sectors(&self) -> u64 {
        self.capacity_sectors
    }

    /// The disk grows to `capacity_sectors`. All members, whatever their state, hold zeroes in the
    /// new sectors, so that none is stale there, except for those that are missing.
    pub fn grow(&mut self, capacity_sectors: u64) {
        assert!(
            capacity_sectors >= self.capacity_sectors,
            "a disk never shrinks"
        );
        let new = SectorRange::new(
            self.capacity_sectors,
            capacity_sectors - self.capacity_sectors,
        );
        if new.count > 0 {
            self.memory += 1;
            for replica in self.missing.iter() {
                let state = &mut self.replicas[replica.as_usize()];
                state.mark_missed(new);
                state.behind.insert(new);
            }
        }
        self.capacity_sectors = capacity_sectors;
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

    /// Whether something of `replica` was stale or corrupt and is fresh now, but becomes durable
    /// there only with its next flush.
    pub fn awaits_flush(&self, replica: ReplicaIndex) -> bool {
        let state = &self.replicas[replica.as_usize()];
        !state.refreshed.is_empty() || !state.refreshed_before_flush.is_empty()
    }

    /// The first part of `range` in which `replica` is stale and has not been written to since it
    /// was added.
    pub fn first_blank(&self, replica: ReplicaIndex, range: SectorRange) -> Option<SectorRange> {
        self.replicas[replica.as_usize()].blank.first_within(range)
    }

    /// Where `replica` is stale.
    pub fn stale_ranges(&self, replica: ReplicaIndex) -> RangeSet {
        let state = self.replicas.get(replica.as_usize());
        state.map_or_else(RangeSet::default, |state| state.stale.clone())
    }

    /// In how many sectors `replica` is stale.
    pub fn stale_sectors(&self, replica: ReplicaIndex) -> u64 {
        let state = self.replicas.get(replica.as_usize());
        state.map_or(0, |state| state.stale.sectors())
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

    /// The members that have failed a flush or were evicted since `began`.
    pub fn members_failed_since(&self, began: FailureEpoch) -> ReplicaSet {
        let failed = |member: &ReplicaIndex| {
            let state = &self.replicas[member.as_usize()];
            state.last_failure > began
        };
        self.members.iter().filter(failed).collect()
    }

    /// The present epoch. An operation that changes sectors keeps it from the moment it goes to the
    /// replicas until it ends.
    pub fn failure_epoch(&self) -> FailureEpoch {
        self.failure_epoch
    }

    /// Asserts the invariants that hold between any two changes.
    pub fn self_check(&self) {
        self.check_sets();
        self.check_out_of_service();
        for range in self.unrecovered.iter() {
            assert_eq!(self.undecided.within(range), [range], "decided");
        }
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
                    *epoch >= confirmed && *epoch <= self.epoch,
                    "flushes in order"
                );
                assert!(
                    !written.is_empty(),
                    "a flush that covers nothing is not kept"
                );
                confirmed = *epoch;
            }
            for range in state.missed.iter() {
                assert_eq!(state.stale.within(range), [range], "missed and not stale");
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
        let missing = self.missing;
        assert!(missing.without(*members).is_empty(), "only members miss");
        assert!(missing.and(*in_service).is_empty(), "missing and asked");
        assert!(in_service.len() >= self.threshold, "too few in service");
        assert!(
            members.places() <= self.replicas.len(),
            "a member without a state"
        );
    }

    /// The members, and the removed replicas whose place is not free.
    fn known(&self) -> ReplicaSet {
        self.members.or(self.releasing)
    }
}

#[cfg(test)]
mod tests;
