//! What the worker threads of one disk share: range locks and the health of the replicas.
//!
//! The jobs have a mutex of their own, which no guest request takes. Locks and health share
//! another, which writes, flushes and confirmations hold for a few map operations. A read whose
//! replies agree takes it only while some replica is stale somewhere. What such a read must know is
//! in atomics beside the mutex, which change only under it: a read that loads them a moment too
//! early ran concurrently with the change.

mod buffer_budget;
mod operator;
mod records;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

// The model checker has its own versions of these.
#[cfg(feature = "loom")]
use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32},
};
#[cfg(not(feature = "loom"))]
use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU32},
};

pub(super) use self::buffer_budget::{BufferBudget, request_bytes};
pub use self::buffer_budget::{WorkerSet, buffer_bytes_min};
use super::changes::Changes;
use super::interface::ReadPattern;
#[cfg(any(test, feature = "sim"))]
use super::interleaving;
use super::lateness::Loads;
use super::marks::Marks;
use super::memory::Memory;
use super::range_locks::{LockKey, RangeLocks};
use super::record_counts::RecordCounts;
use super::repair_gate::{Compared, Permission, RepairGate};
use crate::common::operation::RequestId;
use crate::common::ranges::RangeSet;
use crate::common::{NOT_POISONED, ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::pace::GuestRequests;
use crate::jobs::{JobEvent, Jobs, Sizes};
use crate::limits::BUFFER_BYTES_MAX;
use crate::quorum::health::{FailureEpoch, Health, WriteBegun};

/// A decision on a copy is made this often if the original has changed too much meanwhile.
const ATTEMPTS_MAX: usize = 4;

/// Names a worker thread, and with it an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerIndex(pub u16);

/// The request that a lock is granted to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Waiter {
    pub(super) worker: WorkerIndex,
    pub(super) request: RequestId,
}

/// The state that all engines of a disk share.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    anything_stale: AtomicBool,
    /// Some sector is undecided or unresolved.
    anything_undecided: AtomicBool,
    threshold: AtomicU32,
    members: AtomicU32,
    in_service: AtomicU32,
    out_of_service: AtomicU32,
    missing: AtomicU32,
    failure_epoch: AtomicU64,
    /// Locked before `state`.
    jobs: Mutex<Jobs>,
    has_jobs: AtomicBool,
    /// Requests of the guest, by worker.
    requests: Vec<OwnLine>,
    loads: Loads,
    /// The evicted replicas that are not to rejoin yet.
    kept_out: AtomicU32,
    /// They are to rejoin at once.
    wants_all: AtomicBool,
    /// The vote threshold is lower than wanted.
    raises_threshold: AtomicBool,
    /// The workers whose guest waits for a replica longer than it should.
    waiting: AtomicU32,
    buffers: BufferBudget,
    memory: Memory,
    record_counts: RecordCounts,
}

/// A counter that one thread writes, on a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(64))]
struct OwnLine(AtomicU64);

#[derive(Debug)]
struct State {
    locks: RangeLocks<Waiter>,
    health: Health,
    changes: Changes,
    repairs: RepairGate,
    /// With records.
    marks: Option<Marks>,
}

impl Shared {
    /// The shared state of a disk of `replicas` replicas with vote threshold `threshold` and
    /// `capacity_sectors`, served by `workers` threads.
    pub fn new(replicas: usize, threshold: usize, workers: u16, capacity_sectors: u64) -> Self {
        Self::with_members(
            ReplicaSet::first(replicas),
            threshold,
            workers,
            capacity_sectors,
        )
    }

    /// The same with `members` as replicas.
    pub fn with_members(
        members: ReplicaSet,
        threshold: usize,
        workers: u16,
        capacity_sectors: u64,
    ) -> Self {
        Self {
            state: Mutex::new(State {
                locks: RangeLocks::default(),
                health: Health::new(members, threshold, workers, capacity_sectors),
                changes: Changes::default(),
                repairs: RepairGate::new(),
                marks: None,
            }),
            anything_stale: AtomicBool::new(false),
            anything_undecided: AtomicBool::new(false),
            threshold: AtomicU32::new(u32::try_from(threshold).expect("few")),
            members: AtomicU32::new(members.bits()),
            in_service: AtomicU32::new(members.bits()),
            out_of_service: AtomicU32::new(0),
            missing: AtomicU32::new(0),
            failure_epoch: AtomicU64::new(0),
            jobs: Mutex::new(Jobs::new(capacity_sectors)),
            has_jobs: AtomicBool::new(false),
            requests: (0..workers).map(|_| OwnLine::default()).collect(),
            loads: Loads::default(),
            kept_out: AtomicU32::new(0),
            wants_all: AtomicBool::new(false),
            raises_threshold: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            buffers: BufferBudget::new(BUFFER_BYTES_MAX, workers, members.len()),
            memory: Memory::default(),
            record_counts: RecordCounts::default(),
        }
    }

    /// The evicted replicas that are not to rejoin yet.
    pub(super) fn kept_out(&self) -> ReplicaSet {
        ReplicaSet::from_bits(self.kept_out.load(Ordering::Relaxed))
    }

    pub(super) fn set_kept_out(&self, replicas: ReplicaSet) {
        self.kept_out.store(replicas.bits(), Ordering::Relaxed);
    }

    /// A replica is late and needed: those that are kept out are to rejoin.
    pub(super) fn want_all(&self) {
        self.wants_all.store(true, Ordering::Relaxed);
    }

    /// Whether that was so since the last call.
    pub(super) fn take_wants_all(&self) -> bool {
        self.wants_all.swap(false, Ordering::Relaxed)
    }

    /// Whether the guest of any worker waits for a replica longer than it should.
    pub(super) fn guest_waits(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// The same of one worker has changed.
    pub(super) fn set_guest_waits(&self, waits: bool) {
        if waits {
            self.waiting.fetch_add(1, Ordering::Relaxed);
        } else {
            let before = self.waiting.fetch_sub(1, Ordering::Relaxed);
            assert!(before > 0, "what ends has begun");
        }
    }

    /// What is in flight on each replica.
    pub(super) fn loads(&self) -> &Loads {
        &self.loads
    }

    /// The vote threshold at this moment: what votes are counted with.
    #[inline]
    pub fn threshold(&self) -> usize {
        self.threshold.load(Ordering::Acquire) as usize
    }

    /// The replicas of the disk.
    pub fn members(&self) -> ReplicaSet {
        self.accessed();
        ReplicaSet::from_bits(self.members.load(Ordering::Acquire))
    }

    /// The replicas that operations go to.
    pub fn in_service(&self) -> ReplicaSet {
        self.accessed();
        ReplicaSet::from_bits(self.in_service.load(Ordering::Acquire))
    }

    /// The evicted members, and removed replicas whose place is not free.
    pub(super) fn out_of_service(&self) -> ReplicaSet {
        self.accessed();
        ReplicaSet::from_bits(self.out_of_service.load(Ordering::Acquire))
    }

    /// The members whose image is not open.
    pub fn missing(&self) -> ReplicaSet {
        self.accessed();
        ReplicaSet::from_bits(self.missing.load(Ordering::Acquire))
    }

    /// The replicas that are out of service, without the missing ones: each ends what it was asked,
    /// some day.
    pub(super) fn evicted(&self) -> ReplicaSet {
        self.out_of_service().without(self.missing())
    }

    /// Whether the vote threshold is lower than wanted.
    pub(super) fn raises_threshold(&self) -> bool {
        self.raises_threshold.load(Ordering::Acquire)
    }

    /// Raises the vote threshold if it is lower than wanted and can be higher now.
    pub fn raise_threshold(&self) {
        if self.raises_threshold() {
            self.change_health(Health::raise_threshold);
        }
    }

    /// Reads or changes the jobs, and reports what that has changed. A tick of the first engine
    /// must follow.
    pub fn jobs<R>(
        &self,
        mut tell: impl FnMut(JobEvent),
        with: impl FnOnce(&mut Jobs, &Health) -> R,
    ) -> R {
        self.accessed();
        let mut jobs = self.jobs.lock().expect(NOT_POISONED);
        let result = with(&mut jobs, &self.state().health);
        // Still locked, so that events come in the order of the changes.
        for event in jobs.take_events() {
            self.state().repairs.job_changed(&event);
            tell(event);
        }
        self.has_jobs.store(!jobs.is_empty(), Ordering::Release);
        result
    }

    /// See [`Jobs::configure`].
    pub(super) fn configure_jobs(&self, block_sectors: u64, sizes: Sizes, retry_after: Duration) {
        let nothing_to_tell = |_| {};
        self.jobs(nothing_to_tell, |jobs, _| {
            jobs.configure(block_sectors, sizes, retry_after);
        });
    }

    pub(super) fn limit_repairs(&self, sectors: u64) {
        self.state().repairs.configure(sectors);
    }

    /// Asks for the permission to repair so many sectors unasked (O5).
    pub(super) fn may_repair(&self, sectors: u64) -> Permission {
        self.state().repairs.begin(sectors)
    }

    /// How the comparison has ended, once.
    pub(super) fn take_compared(&self) -> Option<Compared> {
        self.state().repairs.take_news()
    }

    /// Whether there is any job.
    pub(super) fn has_jobs(&self) -> bool {
        self.has_jobs.load(Ordering::Acquire)
    }

    /// Publishes the number of requests that the guest has made of `worker`, which alone calls
    /// this.
    pub(super) fn count_requests(&self, worker: WorkerIndex, requests: u64) {
        self.requests[usize::from(worker.0)]
            .0
            .store(requests, Ordering::Relaxed);
    }

    /// Requests of the guest so far.
    pub(super) fn guest_requests(&self) -> GuestRequests {
        let requests = self.requests.iter();
        GuestRequests(
            requests
                .map(|requests| requests.0.load(Ordering::Relaxed))
                .sum(),
        )
    }

    /// Whether a replica is stale anywhere.
    pub(super) fn anything_stale(&self) -> bool {
        self.accessed();
        self.anything_stale.load(Ordering::Acquire)
    }

    /// The replicas that are stale somewhere in `range`.
    #[inline]
    pub(super) fn stale_in(&self, range: SectorRange) -> ReplicaSet {
        if self.anything_stale() {
            self.look_for_stale(range)
        } else {
            ReplicaSet::EMPTY
        }
    }

    #[cold]
    #[inline(never)]
    fn look_for_stale(&self, range: SectorRange) -> ReplicaSet {
        self.state().health.stale_in(range)
    }

    /// Whether the next read of `range` goes to the lock at once: a write has failed there, and no
    /// vote has decided since what it holds (W7); or the last vote had no winner somewhere, which
    /// does not matter to a read of one replica.
    #[inline]
    pub(super) fn must_vote(&self, range: SectorRange, read_pattern: ReadPattern) -> bool {
        self.anything_undecided() && self.look_for_votes(range, read_pattern)
    }

    #[cold]
    #[inline(never)]
    fn look_for_votes(&self, range: SectorRange, read_pattern: ReadPattern) -> bool {
        let votes = read_pattern != ReadPattern::Fifo;
        self.health(|health| {
            health.is_undecided(range) || (votes && health.unresolved().overlaps(range))
        })
    }

    /// Whether anything is undecided or unresolved.
    #[inline]
    pub fn anything_undecided(&self) -> bool {
        self.anything_undecided.load(Ordering::Acquire)
    }

    /// The sectors that had no winner in the last vote on them, and have not been written since.
    pub fn unresolved(&self) -> RangeSet {
        match self.anything_undecided() {
            true => self.health(|health| health.unresolved().clone()),
            false => RangeSet::default(),
        }
    }

    /// In how many sectors `replica` is stale.
    pub fn stale_sectors(&self, replica: ReplicaIndex) -> u64 {
        match self.anything_stale() {
            true => self.state().health.stale_sectors(replica),
            false => 0,
        }
    }

    /// Where `replica` is stale.
    pub fn stale_ranges(&self, replica: ReplicaIndex) -> RangeSet {
        match self.anything_stale() {
            true => self.state().health.stale_ranges(replica),
            false => RangeSet::default(),
        }
    }

    /// The present epoch, which a read keeps from its start for [`Self::failed_since`].
    pub(super) fn failure_epoch(&self) -> FailureEpoch {
        self.accessed();
        FailureEpoch(self.failure_epoch.load(Ordering::Acquire))
    }

    /// The replicas that have failed a flush or were evicted since `began`.
    #[inline]
    pub(super) fn failed_since(&self, began: FailureEpoch) -> ReplicaSet {
        if self.failure_epoch() == began {
            ReplicaSet::EMPTY
        } else {
            self.look_for_failed(began)
        }
    }

    #[cold]
    #[inline(never)]
    fn look_for_failed(&self, began: FailureEpoch) -> ReplicaSet {
        self.state().health.failed_since(began)
    }

    /// Asks for the lock on `range`; the flag says whether it was granted at once.
    pub(super) fn lock(&self, range: SectorRange, waiter: Waiter) -> (LockKey, bool) {
        let mut state = self.state();
        state.changes.of_locks();
        state.locks.acquire(range, waiter)
    }

    /// Releases a lock; adds the requests whose lock this grants to `granted`.
    pub(super) fn unlock(&self, key: LockKey, granted: &mut Vec<Waiter>) {
        let mut state = self.state();
        state.changes.of_locks();
        state.locks.release(key, granted);
    }

    /// Reads the health of the replicas.
    pub(super) fn health<R>(&self, read: impl FnOnce(&Health) -> R) -> R {
        read(&self.state().health)
    }

    /// A write of `range` goes to the replicas that are returned, and whether what probably follows
    /// it is to be marked meanwhile. Nothing of that is published. `None`: it has to wait until the
    /// range is marked (S4).
    pub(super) fn write_begins(
        &self,
        range: SectorRange,
    ) -> Option<(ReplicaSet, WriteBegun, bool)> {
        let mut state = self.marked(range)?;
        state.changes.of_health();
        let marks_ahead = state.marks.as_mut().is_some_and(Marks::take_ahead);
        let (asked, begun) = (state.health.in_service(), state.health.write_begins(range));
        Some((asked, begun, marks_ahead))
    }

    /// Whether `range` is marked, so that it may be changed (S4). If not, it will be.
    pub(super) fn may_change(&self, range: SectorRange) -> bool {
        self.marked(range).is_some()
    }

    /// Changes the health of the replicas because a change of `range` begins. `None`: it has to
    /// wait until the range is marked (S4).
    pub(super) fn change_begins<R>(
        &self,
        range: SectorRange,
        change: impl FnOnce(&mut Health) -> R,
    ) -> Option<R> {
        Some(self.change(self.marked(range)?, change))
    }

    /// `None`: `range` is not marked, and will be.
    fn marked(&self, range: SectorRange) -> Option<MutexGuard<'_, State>> {
        let mut state = self.state();
        let marks = state.marks.as_mut();
        marks
            .is_none_or(|marks| marks.begin(range))
            .then_some(state)
    }

    /// A write of `range` has ended: changes the health of the replicas.
    pub(super) fn write_ends<R>(
        &self,
        range: SectorRange,
        change: impl FnOnce(&mut Health) -> R,
    ) -> R {
        let mut state = self.state();
        if let Some(marks) = &mut state.marks {
            marks.touch(range);
        }
        self.change(state, change)
    }

    /// Changes the health of the replicas, and publishes what the atomics hold of it.
    pub(super) fn change_health<R>(&self, change: impl FnOnce(&mut Health) -> R) -> R {
        self.change(self.state(), change)
    }

    fn change<R>(
        &self,
        mut state: MutexGuard<'_, State>,
        change: impl FnOnce(&mut Health) -> R,
    ) -> R {
        state.changes.of_health();
        let state_now = &mut *state;
        let health = &mut state_now.health;
        let earlier = state_now.marks.as_ref();
        let earlier = earlier.map(|_| (health.last_flush(), health.flushed_everywhere()));
        let result = change(health);
        if let Some((marks, earlier)) = state_now.marks.as_mut().zip(earlier) {
            marks.follow(earlier, health);
            self.memory.publish(health, marks);
        }
        self.publish(health);
        let garbage = state.health.take_garbage();
        drop(state);
        drop(garbage);
        result
    }

    /// Evicts `replica` unless it is needed, which takes a look at every sector. Returns whether it
    /// did.
    pub(super) fn evict(&self, replica: ReplicaIndex) -> bool {
        // More than once if other workers change much meanwhile; but then at the next tick.
        for _ in 0..ATTEMPTS_MAX {
            let snapshot = self.health(Health::snapshot);
            if !snapshot.can_evict(replica) {
                return false;
            }
            let mut loss = snapshot.loss(replica);
            let evicted = self.change_health(|health| health.evict_as_on(&snapshot, &mut loss));
            if let Some(evicted) = evicted {
                return evicted;
            }
        }
        false
    }

    /// The flush has come back from `replica` with an error: what is stale then is put together on
    /// a copy.
    #[cold]
    #[inline(never)]
    pub(super) fn flush_failed(&self, replica: ReplicaIndex) {
        // Again if other workers change much meanwhile, but not for ever.
        for attempts_left in (0..ATTEMPTS_MAX).rev() {
            let mut loss = self.health(Health::snapshot).loss(replica);
            let must = attempts_left == 0;
            if self.change_health(|health| health.flush_failed(&mut loss, must)) {
                return;
            }
        }
    }

    fn publish(&self, health: &Health) {
        self.anything_stale
            .store(health.anything_stale(), Ordering::Release);
        self.anything_undecided
            .store(is_any_undecided(health), Ordering::Release);
        self.failure_epoch
            .store(health.failure_epoch().0, Ordering::Release);
        let threshold = u32::try_from(health.threshold()).expect("few");
        self.threshold.store(threshold, Ordering::Release);
        let raises = health.threshold() < health.wanted_threshold();
        self.raises_threshold.store(raises, Ordering::Release);
        self.members
            .store(health.members().bits(), Ordering::Release);
        self.in_service
            .store(health.in_service().bits(), Ordering::Release);
        self.missing
            .store(health.missing().bits(), Ordering::Release);
        // Last: a worker that sees that a replica is out of service does not ask it any more.
        self.out_of_service
            .store(health.out_of_service().bits(), Ordering::Release);
    }

    /// Asserts the invariants of locks and health, and that the atomics hold what was last
    /// published.
    pub(super) fn self_check(&self) {
        let mut state = self.state();
        if state.changes.locks_to_check() {
            state.locks.self_check();
        }
        if state.changes.health_to_check() {
            state.health.self_check();
        }
        let health = &state.health;
        assert_eq!(self.threshold(), health.threshold());
        assert_eq!(self.members(), health.members());
        assert_eq!(self.in_service(), health.in_service());
        assert_eq!(self.out_of_service(), health.out_of_service());
        assert_eq!(self.missing(), health.missing());
        assert_eq!(self.failure_epoch(), health.failure_epoch());
        assert_eq!(self.anything_stale(), health.anything_stale());
        let undecided = self.anything_undecided.load(Ordering::Acquire);
        assert_eq!(undecided, is_any_undecided(health));
    }

    /// How often the health of the replicas has been changed.
    #[cfg(any(test, feature = "sim"))]
    pub fn health_changes(&self) -> u64 {
        self.state().changes.health()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.accessed();
        self.state.lock().expect(NOT_POISONED)
    }

    /// An access follows: in the simulator another worker may come first.
    #[inline]
    fn accessed(&self) {
        #[cfg(any(test, feature = "sim"))]
        interleaving::access(|| self.state.try_lock().is_ok() && self.jobs.try_lock().is_ok());
    }
}

fn is_any_undecided(health: &Health) -> bool {
    health.anything_undecided() || !health.unresolved().is_empty()
}

#[cfg(all(test, feature = "loom"))]
mod model;
