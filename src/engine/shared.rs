//! What the worker threads of one disk share: range locks and the health of the replicas.
//!
//! The jobs have a mutex of their own, which no guest request takes. Locks and health share
//! another, which writes, flushes and confirmations hold for a few map operations. A read whose
//! replies agree takes it only while some replica is stale somewhere. What such a read must know is
//! in atomics beside the mutex, which change only under it: a read that loads them a moment too
//! early ran concurrently with the change.

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

use super::changes::Changes;
use super::interface::ReadPattern;
#[cfg(any(test, feature = "sim"))]
use super::interleaving;
use super::lateness::Loads;
use super::range_locks::{LockKey, RangeLocks};
use super::repair_gate::{Compared, Permission, RepairGate, UnaskedRepairs};
use crate::common::operation::RequestId;
use crate::common::ranges::RangeSet;
use crate::common::{NOT_POISONED, ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::pace::GuestRequests;
use crate::jobs::{JobEvent, Jobs, NotStarted, Sizes};
use crate::quorum::health::{
    FailureEpoch, Health, Loss, NotRemoved, NotThreshold, Preferable, Remembered, Wanted,
    WriteBegun,
};

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

    /// At the start, before there is an engine: the image of the member `replica` is not open, and
    /// it is stale in `stale` ([W13](Health::leave_out)).
    ///
    /// # Panics
    /// If fewer than t members are left in service.
    pub fn leave_out(&self, replica: ReplicaIndex, stale: &RangeSet) {
        self.change_health(|health| health.leave_out(replica, stale));
    }

    /// The image of a missing member is open, and every worker has its file: it rejoins as an
    /// evicted replica does. It turns out to be stale in `stale` too. A tick of every engine must
    /// follow. `false` if it is not missing.
    pub fn found(&self, replica: ReplicaIndex, stale: &RangeSet) -> bool {
        self.change_health(|health| health.found(replica, stale))
    }

    /// The replicas that are out of service, without the missing ones: each ends what it was asked,
    /// some day.
    pub(super) fn evicted(&self) -> ReplicaSet {
        self.out_of_service().without(self.missing())
    }

    /// Makes `replica`, whose place is free, a member: writes go to it from now on, and it votes on
    /// what they have written. A tick of every engine must follow.
    pub fn add(&self, replica: ReplicaIndex) {
        self.change_health(|health| {
            health.add(replica);
        });
    }

    /// Removes `replica` from the disk. A tick of every engine must follow; its place is free when
    /// one of them reports so ([`Effects::released`](super::Effects::released)).
    ///
    /// # Errors
    /// If it is needed; then nothing has changed.
    pub fn remove(
        &self,
        replica: ReplicaIndex,
        tell: impl FnMut(JobEvent),
    ) -> Result<(), NotRemoved> {
        loop {
            let snapshot = self.health(Health::snapshot);
            snapshot.check_removal(replica)?;
            if self.change_health(|health| health.remove_as_on(&snapshot, replica))? {
                break;
            }
        }
        self.jobs(tell, |jobs, health| jobs.removed(replica, health));
        Ok(())
    }

    /// What would be lost with `replica` (W11).
    ///
    /// # Errors
    /// If it cannot be removed whatever is lost.
    pub fn loss_of(&self, replica: ReplicaIndex) -> Result<Loss, NotRemoved> {
        self.health(Health::snapshot).loss_of(replica)
    }

    /// Removes `replica` from the disk like [`Self::remove`], whatever is lost with it. Returns
    /// what is.
    ///
    /// # Errors
    /// If too few replicas would be left; then nothing has changed.
    pub fn fail(
        &self,
        replica: ReplicaIndex,
        tell: impl FnMut(JobEvent),
    ) -> Result<Loss, NotRemoved> {
        let loss = loop {
            let snapshot = self.health(Health::snapshot);
            let loss = snapshot.loss_of(replica)?;
            let failed = |health: &mut Health| health.fail_as_on(&snapshot, loss, replica);
            if let Some(loss) = self.change_health(failed)? {
                break loss;
            }
        };
        self.jobs(tell, |jobs, health| jobs.removed(replica, health));
        Ok(loss)
    }

    /// What `replica` could decide if the operator preferred it (W12).
    ///
    /// # Errors
    /// If that is nothing.
    pub fn preferable(&self, replica: ReplicaIndex) -> Result<Preferable, NotStarted> {
        let (snapshot, undecided) = self.health(|h| (h.snapshot(), h.unresolved().clone()));
        if !snapshot.in_service().contains(replica) {
            return Err(NotStarted::NotInService);
        }
        if undecided.is_empty() {
            return Err(NotStarted::NothingUndecided);
        }
        let preferable = snapshot.preferable(replica, undecided);
        match preferable.sectors {
            0 => Err(NotStarted::NotUpToDate),
            _ => Ok(preferable),
        }
    }

    /// The vote threshold is to be `wanted` from now on (W10). A tick of the first engine must
    /// follow.
    ///
    /// # Errors
    /// If the disk has not so many replicas.
    pub fn want_threshold(&self, wanted: Wanted) -> Result<(), NotThreshold> {
        self.change_health(|health| {
            health.want_threshold(wanted)?;
            health.raise_threshold();
            Ok(())
        })
    }

    /// The vote threshold, the one that is wanted, and whether it follows the number of replicas.
    pub fn thresholds(&self) -> (usize, usize, bool) {
        self.health(|health| {
            let (now, wanted) = (health.threshold(), health.wanted_threshold());
            (now, wanted, health.threshold_follows())
        })
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

    /// The disk grows to `capacity_sectors`, and every replica holds zeroes in the new sectors. To
    /// be called before any request may reach them.
    pub fn grow(&self, capacity_sectors: u64) {
        let mut jobs = self.jobs.lock().expect(NOT_POISONED);
        jobs.grow(capacity_sectors);
        self.change_health(|health| health.grow(capacity_sectors));
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

    /// Which repairs are done unasked, if any are (O5, O6).
    pub fn unasked_repairs(&self) -> UnaskedRepairs {
        self.state().repairs.state()
    }

    /// Begins to compare the replicas, before which nothing is repaired unasked (O6).
    pub fn compare_first(&self, tell: impl FnMut(JobEvent)) {
        self.state().repairs.compare_first();
        // There is no other job.
        let _ = self.jobs(tell, |jobs, health| jobs.scrub(false, 0, health));
    }

    /// What the records must say of the replicas now (S2).
    pub fn remembered(&self) -> Remembered {
        self.health(Health::snapshot).remembered()
    }

    /// At the start: the records say this of the replicas, and that the last daemon has ended while
    /// `changed` was being changed. Begins to recover that (S5).
    pub fn restore(&self, remembered: &Remembered, changed: &RangeSet, tell: impl FnMut(JobEvent)) {
        self.change_health(|health| health.restore(remembered, changed));
        if !changed.is_empty() {
            // There are not too many.
            let _ = self.jobs(tell, |jobs, health| jobs.recover(health));
        }
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
    pub(super) fn anything_undecided(&self) -> bool {
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

    /// A write of `range` goes to the replicas that are returned. Nothing of that is published.
    pub(super) fn write_begins(&self, range: SectorRange) -> (ReplicaSet, WriteBegun) {
        let mut state = self.state();
        state.changes.of_health();
        (state.health.in_service(), state.health.write_begins(range))
    }

    /// Changes the health of the replicas, and publishes what the atomics hold of it.
    pub(super) fn change_health<R>(&self, change: impl FnOnce(&mut Health) -> R) -> R {
        let mut state = self.state();
        state.changes.of_health();
        let result = change(&mut state.health);
        self.publish(&state.health);
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

/// Every interleaving of small histories, by `cargo test --features loom --lib engine::shared`.
#[cfg(all(test, feature = "loom"))]
mod model {
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    use loom::sync::mpsc::{Receiver, channel};
    use loom::thread;

    use super::*;
    use crate::quorum::health::WriteEnd;

    const LAST: ReplicaIndex = ReplicaIndex(2);

    fn shared(workers: u16) -> Arc<Shared> {
        Arc::new(Shared::new(3, 2, workers, 1 << 20))
    }

    fn waiter(worker: u16) -> Waiter {
        Waiter {
            worker: WorkerIndex(worker),
            request: RequestId(u32::from(worker)),
        }
    }

    /// Three ranges, of which the middle one overlaps both others: each waiter is granted its lock
    /// once, and no waiter with an overlapping range holds one meanwhile.
    #[test]
    fn locks_exclude_each_other_and_are_granted_in_turn() {
        const RANGES: [(u64, u64); 3] = [(0, 8), (4, 8), (8, 8)];
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let shared = shared(3);
            // The locks protect these: two accesses at a time fail the model.
            let halves = Arc::new([UnsafeCell::new(0), UnsafeCell::new(0)]);
            let (mailboxes, mail): (Vec<_>, Vec<_>) = (0..3).map(|_| channel()).unzip();
            let worker = |index: usize, mail: Receiver<()>| {
                let (shared, halves, mailboxes) =
                    (shared.clone(), halves.clone(), mailboxes.clone());
                move || {
                    let (start, count) = RANGES[index];
                    let number = u16::try_from(index).unwrap();
                    let (key, granted) =
                        shared.lock(SectorRange::new(start, count), waiter(number));
                    if !granted {
                        mail.recv().unwrap();
                    }
                    for (half, used) in halves.iter().zip([index <= 1, index >= 1]) {
                        if used {
                            // SAFETY: the model fails if another access can happen meanwhile.
                            half.with_mut(|count| unsafe { *count += 1 });
                        }
                    }
                    let mut next = Vec::new();
                    shared.unlock(key, &mut next);
                    for waiter in next {
                        mailboxes[usize::from(waiter.worker.0)].send(()).unwrap();
                    }
                }
            };
            let mut mail = mail.into_iter().enumerate();
            let (_, first) = mail.next().unwrap();
            let others: Vec<_> = mail
                .map(|(index, mail)| thread::spawn(worker(index, mail)))
                .collect();
            worker(0, first)();
            for other in others {
                other.join().unwrap();
            }
        });
    }

    /// A read that begins after a write was acknowledged sees which replica missed it.
    #[test]
    fn a_read_after_an_acknowledged_write_sees_the_stale_replica() {
        loom::model(|| {
            let shared = shared(2);
            let acknowledged = Arc::new(AtomicBool::new(false));
            let range = SectorRange::new(0, 8);
            let writer = {
                let (shared, acknowledged) = (shared.clone(), acknowledged.clone());
                thread::spawn(move || {
                    let (asked, begun) =
                        shared.change_health(|h| (h.in_service(), h.write_begins(range)));
                    let mut succeeded = asked;
                    succeeded.remove(LAST);
                    let success = true;
                    let end = WriteEnd {
                        asked,
                        succeeded,
                        begun,
                        success,
                    };
                    shared.change_health(|health| health.write_ended(&end));
                    // The completion travels through guest memory, with release and acquire.
                    acknowledged.store(true, Ordering::Release);
                })
            };
            if acknowledged.load(Ordering::Acquire) {
                assert!(shared.stale_in(range).contains(LAST));
            }
            writer.join().unwrap();
        });
    }

    /// An evicted replica rejoins only when no worker has an operation in flight on it.
    #[test]
    fn an_evicted_replica_rejoins_after_its_last_operation() {
        loom::model(|| {
            let shared = shared(2);
            // Operations of the other worker on the replica.
            let outstanding = Arc::new(AtomicUsize::new(0));
            let other = {
                let (shared, outstanding) = (shared.clone(), outstanding.clone());
                thread::spawn(move || {
                    // As in a read: see which replicas are in service, ask one, and get the reply
                    // some time later.
                    let asks = shared.in_service().contains(LAST);
                    if asks {
                        outstanding.store(1, Ordering::SeqCst);
                        thread::yield_now();
                        outstanding.store(0, Ordering::SeqCst);
                    }
                    // The tick, with nothing outstanding.
                    shared.change_health(|health| health.rejoin(LAST, 1))
                })
            };
            assert!(shared.change_health(|health| health.evict(LAST)));
            let mut rejoined = shared.change_health(|health| health.rejoin(LAST, 0));
            if rejoined {
                assert_eq!(
                    outstanding.load(Ordering::SeqCst),
                    0,
                    "rejoined with an operation outstanding"
                );
            }
            rejoined |= other.join().unwrap();
            // The other worker may have ticked before the eviction; then its next tick decides.
            rejoined |= shared.change_health(|health| health.rejoin(LAST, 1));
            assert!(rejoined && shared.in_service().contains(LAST));
        });
    }
}
