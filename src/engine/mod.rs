//! The life of a request: a state machine that takes in guest requests, replies of replicas and the
//! time, and asks for operations on replicas, answers and reports.
//!
//! Sans-IO: no file descriptor, no clock, no thread in here. The driver of an [`Engine`] carries
//! out what it asks for through [`Effects`] and feeds the replies back. One engine serves one
//! worker thread; what the engines of a disk share is [`Shared`].
//!
//! ```text
//! read   first pass ─────► answered ─► retired       t' replies agree: the rest is only compared
//!           │ replies differ
//!           ▼
//!        waiting for the range lock ─► confirming ─► answered, reported ─► repairing ─► retired
//!
//! write  waiting for the range lock ─► writing ─► answered, retired  (discard, write-zeroes too)
//!                                         │ the guest has no write cache
//!                                         ▼
//!        flush queue ─► waiting for its turn ─► flushing ─► answered, retired  (flushes too)
//! ```
//!
//! With records a write waits for the marks of its range before it goes to the replicas, and a
//! success is withheld until the records say all that is known. One request (`remember.rs`) writes
//! them for all that waits.
//!
//! The engine evicts a replica that does not answer in time; the requests that wait for it stop
//! waiting. Its operations are *orphaned*: their slot stays until the last of them ends (see
//! `time.rs`). Requests drop a replica that is removed from the disk in the same way.
//!
//! The arrows inside the room point one way:
//!
//! ```text
//! Engine ─► request ─► read, scrub ─► stage ─► first_pass ────► replies ─► context ─► shared
//!                    ► resync ──────────────► confirmation ──►
//!                    ► write, flush, skip ────────────────────────────►         ─► flush_queue
//!                    ► remember ──────────────────────────────────────►         ─► memory
//! ```
//!
//! Invariants: a request is answered exactly once, or its answer is withheld, before it is retired;
//! a slot is free when the last of its operations has ended; operations that change overlapping
//! sectors run one after another (W2); the engine reports a replica as corrupt only after a read
//! that held the lock (R5).

// The model checker's cells need unsafe code; the engine does not.
#![cfg_attr(not(feature = "loom"), forbid(unsafe_code))]

mod background;
mod buffer_share;
mod changes;
mod chunks;
mod confirmation;
mod context;
mod decision;
mod first_pass;
mod flapping;
mod flush;
mod flush_queue;
mod in_flight;
mod interface;
#[cfg(any(test, feature = "sim"))]
pub mod interleaving;
mod latencies;
mod lateness;
mod marks;
mod memory;
mod probing;
mod range_locks;
mod read;
mod read_errors;
mod record_counts;
mod remember;
mod repair;
mod repair_gate;
mod replies;
mod request;
mod resync;
mod scrub;
mod shared;
mod skip;
mod slots;
mod stage;
mod survey;
mod time;
mod write;

use std::sync::Arc;

pub use self::interface::{
    Effects, Failed, FragmentId, GuestRequest, Mark, Policy, ReadPattern, Tag,
};
pub use self::record_counts::RecordFigures;
pub use self::repair_gate::UnaskedRepairs;
pub use self::shared::{Shared, WorkerIndex, WorkerSet, buffer_bytes_min};

use self::buffer_share::{BufferShare, Purpose};
use self::context::{Context, Core, Progress};
#[cfg(any(test, feature = "sim"))]
use self::flush_queue::{Origin, Waiting};
use self::request::{Request, Start, Wanted};
use self::slots::{Slot, Slots};
use crate::common::buffer::BufferPool;
use crate::common::clock::TurnClock;
#[cfg(any(test, feature = "sim"))]
use crate::common::operation::{Action, Operation};
use crate::common::operation::{OperationType, Reply, RequestId};
use crate::common::report::{Report, Requester};
use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use crate::limits::{CONFIRMATIONS_MAX, REQUESTS_MAX};

/// The state machine of one worker.
#[derive(Debug)]
pub struct Engine {
    slots: Slots,
    core: Core,
    /// Requests that are not retired.
    active: usize,
    /// The buffers that these may hold.
    buffers: BufferShare,
}

impl Engine {
    /// The engine of `worker`, whose turns set `clock`.
    pub fn new(
        worker: WorkerIndex,
        policy: Policy,
        shared: Arc<Shared>,
        pool: BufferPool,
        clock: TurnClock,
    ) -> Self {
        let (block_sectors, timeout) = (policy.block_sectors, policy.replica_timeout);
        shared.configure_jobs(block_sectors, policy.job_sizes, timeout);
        shared.limit_repairs(policy.repair_limit_sectors);
        let buffers = BufferShare::new(worker, shared.buffers(), pool.clone());
        Self {
            slots: Slots::default(),
            core: Core::new(worker, policy, shared, pool, clock),
            active: 0,
            buffers,
        }
    }

    /// Whether another request may be submitted. At the bound the device takes nothing from the
    /// guest until some requests are retired.
    pub fn has_room(&mut self) -> bool {
        self.active + self.core.unanswered() < REQUESTS_MAX
            && self.core.confirmations < CONFIRMATIONS_MAX
            && self.has_buffers(Purpose::Guest)
    }

    fn has_buffers(&mut self, purpose: Purpose) -> bool {
        let shared = &self.core.shared;
        let replicas = shared.in_service().len();
        self.buffers.has_room(purpose, replicas, shared.buffers())
    }

    /// Shares the memory for buffers with the other workers. Returns those that are to look at it
    /// again, by this call. To be called in each turn.
    #[must_use]
    pub fn share_buffers(&mut self) -> WorkerSet {
        let shared = &self.core.shared;
        let replicas = shared.in_service().len();
        self.buffers.share(replicas, shared.buffers())
    }

    /// The guest's write or zeroing that `request`, which has operations in flight, does.
    #[cfg(any(test, feature = "sim"))]
    pub fn guest_write(&self, request: RequestId) -> Option<Tag> {
        let mut slots = self.slots.iter();
        slots.find_map(|(id, slot)| match &slot.request {
            Request::Write(write) if id == request => Some(write.tag()),
            _ => None,
        })
    }

    /// Whether a durable write of the guest has ended and waits for a flush.
    #[cfg(any(test, feature = "sim"))]
    pub fn waits_for_flush(&self, tag: Tag) -> bool {
        let is_this =
            |waiting: &Waiting| matches!(waiting.origin, Origin::Write(of, ..) if of == tag);
        let mut slots = self.slots.iter();
        self.core.flushes.waiting().iter().any(is_this)
            || slots.any(|(_, slot)| slot.request.origins().iter().any(is_this))
    }

    /// Whether the success of a request of the guest waits for the records (S2).
    #[cfg(any(test, feature = "sim"))]
    pub fn withholds(&self, tag: Tag) -> bool {
        self.core.withheld.has_answer(tag)
    }

    /// Whether `operation`, which was just submitted, reads a part of a range whose read failed.
    #[cfg(any(test, feature = "sim"))]
    pub fn reads_part(&self, operation: &Operation) -> bool {
        let Action::Read { range, .. } = &operation.action else {
            return false;
        };
        let mut slots = self.slots.iter();
        slots.any(|(id, slot)| {
            id == operation.request && slot.request.describe().1.count != range.count
        })
    }

    /// Whether `request`, which has operations in flight, belongs to a job.
    #[cfg(any(test, feature = "sim"))]
    pub fn is_of_a_job(&self, request: RequestId) -> bool {
        let mut slots = self.slots.iter();
        let of_a_job = |slot: &Slot| match &slot.request {
            Request::Scrub(_) | Request::Resync(_) | Request::Skip(_) => true,
            Request::Flush(flush) => flush.is_of_a_job(),
            _ => false,
        };
        slots.any(|(id, slot)| id == request && of_a_job(slot))
    }

    /// Whether `operation`, which was just submitted, repairs a replica unasked (O5).
    #[cfg(any(test, feature = "sim"))]
    pub fn repairs_unasked(&self, operation: &Operation) -> bool {
        let mut slots = self.slots.iter();
        let slot = slots.find(|(id, _)| *id == operation.request);
        let confirmation = slot.and_then(|(_, slot)| slot.request.confirmation());
        confirmation.is_some_and(|confirmation| confirmation.repairs_unasked(operation))
    }

    /// The replica that `request`, which has operations in flight, resyncs.
    #[cfg(any(test, feature = "sim"))]
    pub fn resyncs(&self, request: RequestId) -> Option<ReplicaIndex> {
        let mut slots = self.slots.iter();
        let (_, slot) = slots.find(|(id, _)| *id == request)?;
        match &slot.request {
            Request::Resync(resync) => Some(resync.replica()),
            _ => None,
        }
    }

    /// Whether every request is retired. Evicted replicas may still have operations.
    pub fn is_idle(&self) -> bool {
        self.active == 0
    }

    /// The number of requests that are not retired: also of jobs, and of what follows requests of
    /// the guest that are answered.
    #[cfg(any(test, feature = "sim"))]
    pub fn active(&self) -> usize {
        self.active
    }

    /// The replicas with operations in flight.
    pub fn replicas_in_flight(&self) -> ReplicaSet {
        self.core.in_flight.replicas()
    }

    /// Whether a replica in service has a flush or a zeroing in flight, of any worker.
    pub fn waits_for_long(&self) -> bool {
        let shared = &self.core.shared;
        let mut replicas = shared.in_service().iter();
        replicas.any(|replica| shared.loads().has_long(replica))
    }

    /// Takes a guest request in. `tag` comes back with its answer, perhaps before this returns.
    pub fn submit(&mut self, tag: Tag, request: GuestRequest, effects: &mut impl Effects) {
        self.core.count_request();
        match request {
            GuestRequest::Read(range) if !self.prepare_buffers(range) => {
                return self.refuse(tag, (OperationType::Read, range), effects);
            }
            GuestRequest::WriteWithoutMemory(range) => {
                return self.refuse(tag, (OperationType::Write, range), effects);
            }
            _ => {}
        }
        self.take(Wanted::by_guest(tag, request), effects);
        self.run_ready(effects);
    }

    /// Has buffers ready for a read of `range`. Returns whether there is memory for them.
    #[inline]
    fn prepare_buffers(&self, range: SectorRange) -> bool {
        let len = usize::try_from(range.bytes()).expect("a fragment fits memory");
        let count = self.core.shared.in_service().len() + 1;
        self.core.pool.prepare(len, count)
    }

    /// Fails a request for which the system has no memory.
    #[cold]
    fn refuse(
        &mut self,
        tag: Tag,
        (operation, range): (OperationType, SectorRange),
        effects: &mut impl Effects,
    ) {
        effects.report(Report::Failure {
            operation,
            range,
            requester: Requester::Guest,
            error: Some(Errno(libc::ENOMEM)),
            no_space: false,
        });
        let failed = Failed {
            no_space: false,
            by_flush: false,
        };
        effects.complete(tag, Err(failed));
    }

    /// Takes in that `replica` has done a part of a long operation, so it is not late (W6).
    pub fn progressed(&mut self, replica: ReplicaIndex) {
        self.core.shared.loads().yielded(replica);
    }

    /// Takes the end of an operation in.
    pub fn reply(&mut self, reply: Reply, effects: &mut impl Effects) {
        self.core.ended(&reply);
        self.advance(reply.request, effects, |request, context| {
            request.reply(reply, context)
        });
        self.run_ready(effects);
    }

    /// Another worker released the range lock that `request` waited for.
    pub fn granted(&mut self, request: RequestId, effects: &mut impl Effects) {
        self.core.granted.push_back(request);
        self.run_ready(effects);
    }

    /// Asserts the invariants that take a look at every request. For tests: the others are
    /// asserted as they come up.
    pub fn self_check(&self) {
        self.core.in_flight.self_check();
        let (mut active, mut buffer_bytes, mut confirmations) = (0, 0, 0);
        let flushes = &self.core.flushes;
        let (mut unanswered, mut next_flushes) = (flushes.waiting().len(), 0);
        let mut remembers = 0;
        for (id, slot) in self.slots.iter() {
            let Slot { request, charge } = slot;
            if let Some(tally) = request.tally() {
                tally.self_check();
            }
            let in_flight = self.core.in_flight.of_request(id);
            let waiting = request.operations_waited_for();
            assert!(
                waiting <= in_flight,
                "waits for an operation that is not in flight"
            );
            if request.is_orphaned() {
                assert!(in_flight > 0, "an orphaned slot has operations");
            } else {
                active += 1;
                buffer_bytes += charge.bytes;
                assert!(
                    in_flight > 0 || request.waits_for_lock(),
                    "a request waits for something"
                );
                confirmations += usize::from(request.is_confirming());
                unanswered += request.origins().len();
                remembers += usize::from(matches!(request, Request::Remember(_)));
                let is_flush = matches!(request, Request::Flush(_));
                next_flushes += usize::from(is_flush && request.waits_for_lock());
            }
        }
        assert_eq!(active, self.active, "requests that are not retired");
        assert_eq!(buffer_bytes, self.buffers.used_bytes(), "bytes of buffers");
        assert_eq!(confirmations, self.core.confirmations, "confirmations");
        assert_eq!(unanswered, flushes.unanswered(), "what flushes are for");
        let is_any_waiting = !flushes.waiting().is_empty();
        assert_eq!(next_flushes, usize::from(is_any_waiting), "a next flush");
        let withheld = &self.core.withheld;
        assert!(
            withheld.is_empty() || remembers > 0 || withheld.is_covered(),
            "the records are written for what waits"
        );
        self.core.shared.self_check();
    }

    #[inline]
    fn take(&mut self, wanted: Wanted, effects: &mut impl Effects) {
        match wanted {
            Wanted::Request(start) => self.begin(start, effects),
            Wanted::Flush(origin) => self.core.join_flush(origin),
        }
    }

    fn begin(&mut self, start: Start, effects: &mut impl Effects) {
        let charge = start.charge(self.core.shared.in_service());
        let id = self.slots.take();
        self.core.in_flight.open(id);
        let mut context = Context {
            id,
            core: &mut self.core,
            effects,
        };
        let request = start.begin(&mut context);
        self.slots.fill(id, charge, request);
        self.active += 1;
        self.buffers.charge(charge);
    }

    /// Gives a request an input, and retires it if that was the last it waited for.
    fn advance<E: Effects>(
        &mut self,
        id: RequestId,
        effects: &mut E,
        input: impl FnOnce(&mut Request, &mut Context<'_, E>) -> Progress,
    ) {
        let slot = self.slots.get_mut(id);
        let mut context = Context {
            id,
            core: &mut self.core,
            effects,
        };
        if input(&mut slot.request, &mut context) == Progress::Waiting {
            return;
        }
        if !slot.request.is_orphaned() {
            slot.request = Request::Orphaned;
            self.active -= 1;
            self.buffers.discharge(slot.charge);
        }
        if self.core.in_flight.of_request(id) == 0 {
            self.core.forget_errors(id);
            self.slots.empty(id);
        }
    }

    /// Runs the requests whose lock is granted, and begins what is due, until nothing is left.
    /// After most inputs nothing is there to begin with, and only this check is made.
    #[inline]
    fn run_ready(&mut self, effects: &mut impl Effects) {
        let core = &self.core;
        if !core.granted.is_empty() || !core.follow_ups.is_empty() || core.background.is_due() {
            self.run_until_idle(effects);
        }
    }

    #[cold]
    #[inline(never)]
    fn run_until_idle(&mut self, effects: &mut impl Effects) {
        loop {
            if let Some(id) = self.core.granted.pop_front() {
                self.advance(id, effects, Request::lock_granted);
            } else if let Some(follow_up) = self.core.follow_ups.pop_front() {
                self.begin(follow_up.into(), effects);
            } else if self.core.background.is_due()
                && self.has_buffers(Purpose::Job)
                && let Some(chunk) = self.next_chunk(effects)
            {
                self.take(Wanted::by_job(chunk), effects);
            } else {
                return;
            }
        }
    }
}
