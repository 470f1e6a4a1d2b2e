//! What the worker threads of one disk share: range locks and the health of the replicas.
//!
//! One mutex, held for a few map operations by writes, flushes and suspicious reads. A read whose replies
//! agree takes it only while some replica is stale somewhere. What such a read must know is kept beside the
//! mutex in atomics, which are changed only under it: a read that looks a moment too early is one that ran
//! concurrently with the change.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::range_locks::{LockKey, RangeLocks};
use crate::quorum::health::Health;
use crate::quorum::{ReplicaSet, SectorRange};
use crate::replica::operation::RequestId;

/// Names a worker thread, and with it an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerIndex(pub u16);

/// Whom to tell that a lock is granted.
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
    in_service: AtomicU32,
    /// Totals for the operator.
    pub counters: Counters,
}

/// Totals since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Sectors of dissenters rewritten with the winner.
    pub sectors_rewritten: AtomicU64,
    /// Sectors whose rewrite failed.
    pub sectors_not_rewritten: AtomicU64,
    /// Reads repeated under a lock because the replies differed.
    pub suspicions: AtomicU64,
    /// Suspicions that the repeated read did not bear out: writes were in flight.
    pub suspicions_dropped: AtomicU64,
    /// Sectors of stale replicas brought up to date.
    pub sectors_resynced: AtomicU64,
    /// How often a replica left the set because it did not answer.
    pub departures: AtomicU64,
    /// How often one came back.
    pub returns: AtomicU64,
}

impl Counters {
    /// Adds to a total.
    pub(super) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct State {
    locks: RangeLocks<Waiter>,
    health: Health,
}

impl Shared {
    /// The shared state of a disk of `replicas` replicas with vote threshold `threshold` and
    /// `capacity_sectors`, served by `workers` threads.
    pub fn new(replicas: usize, threshold: usize, workers: u16, capacity_sectors: u64) -> Self {
        Self {
            state: Mutex::new(State {
                locks: RangeLocks::default(),
                health: Health::new(replicas, threshold, workers, capacity_sectors),
            }),
            anything_stale: AtomicBool::new(false),
            in_service: AtomicU32::new(ReplicaSet::first(replicas).bits()),
            counters: Counters::default(),
        }
    }

    /// The replicas that are asked.
    pub fn in_service(&self) -> ReplicaSet {
        ReplicaSet::from_bits(self.in_service.load(Ordering::Acquire))
    }

    /// Whether a replica is stale anywhere.
    pub(super) fn anything_stale(&self) -> bool {
        self.anything_stale.load(Ordering::Acquire)
    }

    /// The replicas that are stale somewhere in `range`.
    pub(super) fn stale_in(&self, range: SectorRange) -> ReplicaSet {
        if self.anything_stale() {
            self.state().health.stale_in(range)
        } else {
            ReplicaSet::EMPTY
        }
    }

    /// Asks for the lock on `range`; the flag says whether it was granted at once.
    pub(super) fn lock(&self, range: SectorRange, waiter: Waiter) -> (LockKey, bool) {
        self.state().locks.acquire(range, waiter)
    }

    /// Gives a lock back; adds whoever holds one now to `granted`.
    pub(super) fn unlock(&self, key: LockKey, granted: &mut Vec<Waiter>) {
        self.state().locks.release(key, granted);
    }

    /// Looks at or changes the health of the replicas.
    pub(super) fn health<R>(&self, with: impl FnOnce(&mut Health) -> R) -> R {
        let mut state = self.state();
        let result = with(&mut state.health);
        self.anything_stale
            .store(state.health.anything_stale(), Ordering::Release);
        self.in_service
            .store(state.health.in_service().bits(), Ordering::Release);
        result
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic in another worker ends the process anyway; do not hide it behind a second one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
