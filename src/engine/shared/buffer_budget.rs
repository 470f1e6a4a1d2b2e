//! The memory that the workers of a disk share for the buffers of requests.
//!
//! A worker holds a part of it, from which it serves its requests without a look at this one. It
//! takes more in large steps, and gives back what it does not need once another worker waits.
//!
//! Invariants: what is free and what the workers hold is the bound together. Each worker holds
//! enough for one request at any time, and the worker that runs the jobs for one chunk too. A
//! worker that waits is named before it looks once more for free memory, and a worker that gives
//! memory back looks after that for workers that wait: no wake-up is lost.

#[cfg(feature = "loom")]
use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(feature = "loom"))]
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::{Shared, WorkerIndex};
use crate::common::buffer;
use crate::limits::FRAGMENT_BYTES_MAX;

/// The worker that runs the jobs.
const OF_JOBS: WorkerIndex = WorkerIndex(0);

/// Bytes of buffers that one request may hold with so many replicas: one for each, and one to put
/// the winner together in.
pub(in crate::engine) fn request_bytes(replicas: usize) -> u64 {
    buffer::footprint_bytes(FRAGMENT_BYTES_MAX) * (replicas as u64 + 1)
}

/// The least bytes of buffers with which `workers` can serve `replicas`: a request for each worker,
/// and a chunk of a job.
pub fn buffer_bytes_min(workers: u16, replicas: usize) -> u64 {
    request_bytes(replicas) * (u64::from(workers) + 1)
}

/// A set of workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkerSet(u64);

impl WorkerSet {
    fn only(worker: WorkerIndex) -> Self {
        Self(1 << worker.0)
    }

    fn without(self, worker: WorkerIndex) -> Self {
        Self(self.0 & !Self::only(worker).0)
    }

    /// The workers of both sets.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether no worker is in the set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether `worker` is in the set.
    pub fn contains(self, worker: WorkerIndex) -> bool {
        self.0 & Self::only(worker).0 != 0
    }
}

impl Shared {
    /// Makes `bytes_max` the bound on buffers, or [`buffer_bytes_min`] if that is more. To be
    /// called before there are engines. A replica that is added later may raise it too.
    pub fn limit_buffers(&mut self, bytes_max: u64) {
        let workers = self.buffers.workers;
        self.buffers = BufferBudget::new(bytes_max, workers, self.members().len());
    }

    pub(in crate::engine) fn buffers(&self) -> &BufferBudget {
        &self.buffers
    }
}

/// See the module.
#[derive(Debug)]
pub(in crate::engine) struct BufferBudget {
    bytes_max: u64,
    workers: u16,
    /// What each worker holds in any case, for one request.
    request_bytes: u64,
    free: AtomicU64,
    /// A bit for each worker that waits for memory.
    waiting: AtomicU64,
}

impl BufferBudget {
    /// A budget of `bytes_max`, or of [`buffer_bytes_min`] if that is more.
    pub(super) fn new(bytes_max: u64, workers: u16, replicas: usize) -> Self {
        let least = buffer_bytes_min(workers, replicas);
        let bytes_max = bytes_max.max(least);
        Self {
            bytes_max,
            workers: workers.max(1),
            request_bytes: request_bytes(replicas),
            free: AtomicU64::new(bytes_max - least),
            waiting: AtomicU64::new(0),
        }
    }

    /// What `worker` holds from the start, and never gives back.
    pub(in crate::engine) fn reserve_bytes(&self, worker: WorkerIndex) -> u64 {
        self.request_bytes + self.of_other_purpose(worker)
    }

    /// What of it the guest leaves to jobs on `worker`, and jobs to the guest.
    pub(in crate::engine) fn of_other_purpose(&self, worker: WorkerIndex) -> u64 {
        if worker == OF_JOBS {
            self.request_bytes
        } else {
            0
        }
    }

    /// What each worker may hold while others wait.
    pub(in crate::engine) fn fair_bytes(&self) -> u64 {
        self.bytes_max / u64::from(self.workers)
    }

    /// Takes at least `least` bytes, and up to `most` if so many are free. Returns 0 if fewer than
    /// `least` are.
    pub(in crate::engine) fn take(&self, least: u64, most: u64) -> u64 {
        let taken = |free: u64| if free < least { 0 } else { free.min(most) };
        let rest = |free: u64| Some(free - taken(free)).filter(|rest| *rest < free);
        let before = self
            .free
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, rest);
        before.map_or(0, taken)
    }

    /// `worker` waits for memory. It looks for free memory once more after this, and returns to it
    /// when another worker wakes it.
    pub(in crate::engine) fn wait(&self, worker: WorkerIndex) {
        let bit = WorkerSet::only(worker).0;
        self.waiting.fetch_or(bit, Ordering::SeqCst);
        // Its next look at what is free is after this, as `give_back` is the other way round.
        fence(Ordering::SeqCst);
    }

    /// `worker` does not wait for memory any more.
    pub(in crate::engine) fn stop_waiting(&self, worker: WorkerIndex) {
        let bit = WorkerSet::only(worker).0;
        self.waiting.fetch_and(!bit, Ordering::SeqCst);
    }

    /// Whether workers other than `worker` wait for memory.
    pub(in crate::engine) fn others_wait(&self, worker: WorkerIndex) -> bool {
        // A worker that begins to wait wakes the others, so each sees it.
        let waiting = WorkerSet(self.waiting.load(Ordering::Relaxed));
        !waiting.without(worker).is_empty()
    }

    /// All workers but `worker`.
    pub(in crate::engine) fn others(&self, worker: WorkerIndex) -> WorkerSet {
        WorkerSet(u64::MAX >> (64 - u32::from(self.workers))).without(worker)
    }

    /// Gives `bytes` back that `worker` held. Returns the workers that it has to wake.
    #[must_use]
    pub(in crate::engine) fn give_back(&self, worker: WorkerIndex, bytes: u64) -> WorkerSet {
        self.free.fetch_add(bytes, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        WorkerSet(self.waiting.load(Ordering::SeqCst)).without(worker)
    }

    /// The bytes that no worker holds.
    #[cfg(all(test, not(feature = "loom")))]
    pub(in crate::engine) fn free_bytes(&self) -> u64 {
        self.free.load(Ordering::SeqCst)
    }

    /// The bound in bytes.
    #[cfg(all(test, not(feature = "loom")))]
    pub(in crate::engine) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }
}
