//! The memory for buffers that one worker holds of what all workers share, and what of it its
//! requests may use.
//!
//! As long as the share lasts, a request only adds to a counter of its worker. Jobs and the guest
//! leave each other room for a request, so neither starves the other.

use super::shared::{BufferBudget, WorkerIndex, WorkerSet, request_bytes};
use crate::common::buffer::BufferPool;

/// A share grows by as much at a time, in bytes, if it is there.
const STEP_BYTES: u64 = 8 << 20;

/// What a request is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The guest, or what follows its requests.
    Guest,
    /// A chunk of a job.
    Job,
}

/// Bytes of buffers that a request may hold, and what it is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Charge {
    pub(super) bytes: u64,
    pub(super) purpose: Purpose,
}

/// See the module.
#[derive(Debug)]
pub(super) struct BufferShare {
    worker: WorkerIndex,
    pool: BufferPool,
    held_bytes: u64,
    /// What its requests may use, by [`Purpose`].
    used_bytes: [u64; 2],
    /// Is named in the budget as one that waits.
    waits: bool,
    /// Other workers are to be woken, to give back what they do not need.
    asks: bool,
}

impl BufferShare {
    pub(super) fn new(worker: WorkerIndex, budget: &BufferBudget, pool: BufferPool) -> Self {
        let held_bytes = budget.reserve_bytes(worker);
        pool.limit(held_bytes);
        Self {
            worker,
            pool,
            held_bytes,
            used_bytes: [0; 2],
            waits: false,
            asks: false,
        }
    }

    /// A request begins.
    #[inline]
    pub(super) fn charge(&mut self, charge: Charge) {
        self.used_bytes[charge.purpose as usize] += charge.bytes;
    }

    /// It has been retired.
    #[inline]
    pub(super) fn discharge(&mut self, charge: Charge) {
        self.used_bytes[charge.purpose as usize] -= charge.bytes;
    }

    /// The bytes that requests may use.
    pub(super) fn used_bytes(&self) -> u64 {
        self.used_bytes.iter().sum()
    }

    /// Whether another request fits, whatever its length, with so many `replicas`. If not, the
    /// worker is woken when there may be room: by a request of its own that is retired, or by
    /// another worker.
    #[inline]
    pub(super) fn has_room(
        &mut self,
        purpose: Purpose,
        replicas: usize,
        budget: &BufferBudget,
    ) -> bool {
        let needed = self.needed_bytes(purpose, request_bytes(replicas), budget);
        let is_crowded = budget.others_wait(self.worker);
        if needed <= self.held_bytes && !is_crowded && !self.waits {
            return true;
        }
        self.has_room_at_bound(purpose, needed, is_crowded, budget)
    }

    /// What the share must hold for another request beside those that it has.
    #[inline]
    fn needed_bytes(&self, purpose: Purpose, request_bytes: u64, budget: &BufferBudget) -> u64 {
        // The other purpose has room for a request left.
        let alone = self.used_bytes[purpose as usize] + budget.of_other_purpose(self.worker);
        self.used_bytes().max(alone) + request_bytes
    }

    #[cold]
    #[inline(never)]
    fn has_room_at_bound(
        &mut self,
        purpose: Purpose,
        needed: u64,
        is_crowded: bool,
        budget: &BufferBudget,
    ) -> bool {
        let allowed = if is_crowded {
            self.fair_bytes(budget)
        } else {
            u64::MAX
        };
        let has_room = needed <= allowed && self.grow(needed, allowed, budget);
        // Above its fair share it waits for its own requests.
        if self.waits && (has_room || needed > allowed) {
            self.waits = false;
            self.asks = false;
            budget.stop_waiting(self.worker);
        }
        // The reserve is for this one. It does not suffice if replicas were added.
        has_room || self.used_bytes[purpose as usize] == 0
    }

    /// What the worker may hold while others wait.
    fn fair_bytes(&self, budget: &BufferBudget) -> u64 {
        budget.fair_bytes().max(budget.reserve_bytes(self.worker))
    }

    /// Makes the share hold `needed` bytes, and at most `allowed` ones.
    fn grow(&mut self, needed: u64, allowed: u64, budget: &BufferBudget) -> bool {
        if self.take(needed, allowed, budget) {
            return true;
        }
        if !self.waits {
            self.waits = true;
            self.asks = true;
            budget.wait(self.worker);
            return self.take(needed, allowed, budget);
        }
        false
    }

    fn take(&mut self, needed: u64, allowed: u64, budget: &BufferBudget) -> bool {
        let Some(least) = needed
            .checked_sub(self.held_bytes)
            .filter(|least| *least > 0)
        else {
            return true;
        };
        let most = least.max(STEP_BYTES).min(allowed - self.held_bytes);
        let taken = budget.take(least, most);
        self.held_bytes += taken;
        self.pool.limit(self.held_bytes);
        taken > 0
    }

    /// Gives back what the worker does not need, if another one waits. Returns the workers that are
    /// to be woken.
    #[inline]
    pub(super) fn share(&mut self, replicas: usize, budget: &BufferBudget) -> WorkerSet {
        if self.asks || budget.others_wait(self.worker) {
            self.share_with_others(replicas, budget)
        } else {
            WorkerSet::default()
        }
    }

    #[cold]
    #[inline(never)]
    fn share_with_others(&mut self, replicas: usize, budget: &BufferBudget) -> WorkerSet {
        let mut woken = WorkerSet::default();
        if std::mem::take(&mut self.asks) {
            woken = budget.others(self.worker);
        }
        if !budget.others_wait(self.worker) {
            return woken;
        }
        let used = self.used_bytes();
        // One that uses nothing would take as much again before it sleeps: replicas may have been
        // added since its reserve was made.
        let next = if used == 0 {
            request_bytes(replicas) + budget.of_other_purpose(self.worker)
        } else {
            2 * request_bytes(replicas)
        };
        let useful = (used + next).min(self.fair_bytes(budget));
        let kept = useful.max(used).max(budget.reserve_bytes(self.worker));
        let surplus = self.held_bytes.saturating_sub(kept);
        if surplus > 0 {
            self.held_bytes = kept;
            self.pool.limit(kept);
            woken = woken.or(budget.give_back(self.worker, surplus));
        }
        woken
    }

    /// What the worker holds, in bytes.
    #[cfg(all(test, not(feature = "loom")))]
    pub(super) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::super::shared::{Shared, buffer_bytes_min};
    use super::*;
    use crate::common::buffer::{Buffer, footprint_bytes};
    use crate::limits::FRAGMENT_BYTES_MAX;

    const REPLICAS: usize = 3;
    const MIB: usize = 1 << 20;

    /// Workers that take buffers as engines do.
    struct Workers {
        shared: Shared,
        shares: Vec<BufferShare>,
        /// In flight, by worker.
        reads: Vec<Vec<(Charge, Vec<Buffer>)>>,
        bytes_max: u64,
    }

    impl Workers {
        fn new(count: u16, bytes_max: u64) -> Self {
            let mut shared = Shared::new(REPLICAS, 2, count, 1 << 20);
            shared.limit_buffers(bytes_max);
            let worker = |index| {
                let pool = BufferPool::default();
                BufferShare::new(WorkerIndex(index), shared.buffers(), pool)
            };
            Self {
                shares: (0..count).map(worker).collect(),
                reads: (0..count).map(|_| Vec::new()).collect(),
                bytes_max: shared.buffers().bytes_max(),
                shared,
            }
        }

        fn has_room(&mut self, worker: usize, purpose: Purpose) -> bool {
            self.shares[worker].has_room(purpose, REPLICAS, self.shared.buffers())
        }

        /// Begins a read of `len` bytes, if there is room.
        fn begin(&mut self, worker: usize, purpose: Purpose, len: usize) -> bool {
            let has_room = self.has_room(worker, purpose);
            if has_room {
                let buffers = (0..=REPLICAS).map(|_| self.shares[worker].pool.take(len));
                let charge = Charge {
                    bytes: footprint_bytes(len as u64) * (REPLICAS as u64 + 1),
                    purpose,
                };
                self.reads[worker].push((charge, buffers.collect()));
                self.shares[worker].charge(charge);
            }
            self.check();
            has_room
        }

        /// Begins as many as there is room for.
        fn fill(&mut self, worker: usize, len: usize) -> usize {
            let mut count = 0;
            while self.begin(worker, Purpose::Guest, len) {
                count += 1;
            }
            count
        }

        fn end(&mut self, worker: usize) {
            let (charge, _) = self.reads[worker].pop().unwrap();
            self.shares[worker].discharge(charge);
            self.check();
        }

        /// A turn of the worker. Returns those that it wakes.
        fn share(&mut self, worker: usize) -> WorkerSet {
            let woken = self.shares[worker].share(REPLICAS, self.shared.buffers());
            self.check();
            woken
        }

        /// All that is allocated, for requests and free, stays within the bound.
        fn check(&self) {
            let held: u64 = self.shares.iter().map(BufferShare::held_bytes).sum();
            assert_eq!(held + self.shared.buffers().free_bytes(), self.bytes_max);
            for share in &self.shares {
                assert!(share.pool.allocated_bytes() <= share.held_bytes());
            }
        }
    }

    #[test]
    fn all_workers_together_stay_within_the_bound() {
        for len in [4096, 65536, MIB] {
            let mut workers = Workers::new(3, 64 << 20);
            let mut count = 0;
            for worker in [1, 0, 2] {
                count += workers.fill(worker, len);
            }
            let each = footprint_bytes(len as u64) * 4;
            let longest = request_bytes(REPLICAS);
            let used = count as u64 * each;
            assert!(used <= 64 << 20, "{count} of {len} bytes");
            assert!(used + 5 * longest > 64 << 20, "{count} of {len} bytes");
        }
    }

    #[test]
    fn a_worker_takes_what_others_leave_and_gives_it_back_when_one_waits() {
        let mut workers = Workers::new(2, 64 << 20);
        let all = workers.fill(1, MIB);
        assert!(all > 12, "{all}");
        assert_eq!(workers.fill(0, MIB), 1, "only its reserve is left");
        let other = WorkerSet::default().or(workers.share(0));
        assert!(other.contains(WorkerIndex(1)) && !other.contains(WorkerIndex(0)));
        assert!(workers.share(0).is_empty(), "it asks once");
        // What is free goes to the one that waits, until each has its part.
        for _ in 0..all / 2 {
            workers.end(1);
            workers.share(1);
            while workers.begin(0, Purpose::Guest, MIB) {}
        }
        assert!(workers.reads[0].len() >= 5, "{}", workers.reads[0].len());
        let more = workers.begin(1, Purpose::Guest, MIB);
        assert!(
            !more || workers.reads[1].len() <= 8,
            "no more than its part"
        );
    }

    #[test]
    fn an_idle_worker_keeps_no_free_buffers_from_others() {
        let mut workers = Workers::new(2, 64 << 20);
        for _ in 0..workers.fill(1, MIB) {
            workers.end(1);
        }
        assert!(workers.has_room(1, Purpose::Guest), "it waits no more");
        let kept = workers.shares[1].pool.allocated_bytes();
        assert!(kept > 32 << 20, "{kept}");
        workers.fill(0, MIB);
        assert!(workers.share(0).contains(WorkerIndex(1)));
        assert!(workers.share(1).contains(WorkerIndex(0)), "it is woken");
        assert!(workers.fill(0, MIB) > 8);
        assert!(workers.shares[1].pool.allocated_bytes() <= request_bytes(REPLICAS));
        assert!(workers.begin(1, Purpose::Guest, MIB), "its reserve stays");
    }

    #[test]
    fn jobs_and_the_guest_leave_each_other_room_for_a_request() {
        for (first, second) in [
            (Purpose::Guest, Purpose::Job),
            (Purpose::Job, Purpose::Guest),
        ] {
            let mut workers = Workers::new(2, 40 << 20);
            workers.fill(1, MIB);
            let mut count = 0;
            while workers.begin(0, first, MIB) {
                count += 1;
            }
            assert!(count > 0);
            assert!(workers.begin(0, second, MIB), "after {count} of {first:?}");
        }
    }

    #[test]
    fn with_the_least_memory_each_worker_serves_a_request_at_a_time() {
        let mut workers = Workers::new(4, buffer_bytes_min(4, REPLICAS));
        for _ in 0..3 {
            for worker in 0..4 {
                assert!(workers.begin(worker, Purpose::Guest, MIB));
                assert!(!workers.begin(worker, Purpose::Guest, MIB));
            }
            assert!(workers.begin(0, Purpose::Job, MIB));
            workers.end(0);
            for worker in 0..4 {
                workers.end(worker);
                workers.share(worker);
            }
        }
    }

    #[test]
    fn a_replica_that_was_added_stops_no_worker() {
        let mut workers = Workers::new(2, buffer_bytes_min(2, REPLICAS));
        let budget = workers.shared.buffers();
        for share in &mut workers.shares {
            assert!(share.has_room(Purpose::Guest, REPLICAS + 1, budget));
            let charge = Charge {
                bytes: request_bytes(REPLICAS + 1),
                purpose: Purpose::Guest,
            };
            share.charge(charge);
            assert!(!share.has_room(Purpose::Guest, REPLICAS + 1, budget));
            share.discharge(charge);
            assert!(share.has_room(Purpose::Guest, REPLICAS + 1, budget));
        }
        assert!(FRAGMENT_BYTES_MAX < request_bytes(1));
    }

    /// A replica was added, so that a request needs more than the reserve of a worker.
    #[test]
    fn idle_workers_do_not_take_back_what_they_gave() {
        let mut workers = Workers::new(8, 512 << 20);
        let more = REPLICAS + 1;
        let budget = workers.shared.buffers();
        let turn = |share: &mut BufferShare| {
            share.has_room(Purpose::Guest, more, budget);
            let woken = share.share(more, budget);
            share.has_room(Purpose::Guest, more, budget);
            woken
        };
        for share in &mut workers.shares {
            turn(share);
        }
        let charge = Charge {
            bytes: request_bytes(more),
            purpose: Purpose::Guest,
        };
        for _ in 0..200 {
            while workers.shares[1].has_room(Purpose::Guest, more, budget) {
                workers.shares[1].charge(charge);
            }
            let woken = workers.shares[1].share(more, budget);
            for (index, share) in (0..).zip(&mut workers.shares) {
                if index != 1 && woken.contains(WorkerIndex(index)) {
                    turn(share);
                }
            }
            workers.shares[1].discharge(charge);
        }
        let shares = workers.shares.iter().enumerate();
        let idle = shares.filter(|(index, _)| *index != 1);
        let idle: u64 = idle.map(|(_, share)| share.held_bytes()).sum();
        // Each what it needs for a request, and one of them for a chunk too.
        let needed = 9 * request_bytes(more);
        assert!(idle <= needed, "{idle} of {needed}");
    }
}
