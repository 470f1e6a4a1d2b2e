//! What every request needs of its engine ([`Core`]), and with it the request that an input is for
//! ([`Context`]).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::background::Background;
use super::flapping::Flapping;
use super::flush_queue::{FlushQueue, Origin};
use super::in_flight::InFlight;
use super::interface::{Effects, Failed, Policy, ReadPattern, Tag};
use super::latencies::Latencies;
use super::lateness::Lateness;
use super::range_locks::LockKey;
use super::read_errors::ReadErrors;
use super::remember::Withheld;
use super::shared::{Shared, Waiter, WorkerIndex};
use crate::common::buffer::{Buffer, BufferPool};
use crate::common::clock::TurnClock;
use crate::common::operation::{Action, Operation, OperationType, Reply, RequestId};
use crate::common::report::{Cause, Report, Requester};
use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::{ChunkEnd, ChunkId};
use crate::limits::REPLICAS_MAX;
use crate::quorum::vote::Rule;

/// What all requests of an engine share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) worker: WorkerIndex,
    pub(super) policy: Policy,
    pub(super) shared: Arc<Shared>,
    pub(super) pool: BufferPool,
    pub(super) clock: TurnClock,
    pub(super) latencies: Latencies,
    pub(super) lateness: Lateness,
    /// Of the first worker.
    pub(super) flapping: Flapping,
    pub(super) background: Background,
    pub(super) in_flight: InFlight,
    pub(super) read_errors: ReadErrors,
    /// Requests of this engine whose lock has been granted.
    pub(super) granted: VecDeque<RequestId>,
    /// What is to be begun next.
    pub(super) follow_ups: VecDeque<FollowUp>,
    pub(super) flushes: FlushQueue,
    pub(super) withheld: Withheld,
    /// Reads that hold or wait for the lock of their range.
    pub(super) confirmations: usize,
    /// Emptied lists of replies, for reuse.
    pub(super) spare_buffers: Vec<Vec<Option<Buffer>>>,
    /// The errors of each request that has had one.
    request_errors: Vec<RequestErrors>,
    /// Scratch for [`Context::unlock`].
    waiters: Vec<Waiter>,
}

/// What replicas have returned for a request.
#[derive(Clone, Debug)]
struct RequestErrors {
    request: RequestId,
    first: Errno,
    /// One of the errors is that there is no space left.
    no_space: bool,
    /// The first one of each replica and type of operation.
    of_replicas: Vec<(ReplicaIndex, OperationType, Errno)>,
}

/// A request that another one has made necessary.
#[derive(Clone, Copy, Debug)]
pub(super) enum FollowUp {
    /// A read that goes on as a request of its own, under the lock.
    Confirm(Suspicion),
    /// A flush for all that has joined the queue.
    Flush,
    /// What is known is written to the records.
    Remember,
}

/// A guest read whose replies differ while a slow replica is still out, or whose vote is taken
/// again.
#[derive(Clone, Copy, Debug)]
pub(super) struct Suspicion {
    pub(super) tag: Tag,
    pub(super) range: SectorRange,
    /// See [`Terms::failed_before`](super::confirmation::Terms::failed_before).
    pub(super) failed: ReplicaSet,
}

impl Core {
    pub(super) fn new(
        worker: WorkerIndex,
        policy: Policy,
        shared: Arc<Shared>,
        pool: BufferPool,
        clock: TurnClock,
    ) -> Self {
        let lateness = Lateness::new(policy.replica_timeout);
        let flapping = Flapping::new(policy.replica_timeout, shared.missing());
        Self {
            worker,
            policy,
            shared,
            pool,
            clock,
            latencies: Latencies::new(),
            lateness,
            flapping,
            background: Background::default(),
            in_flight: InFlight::default(),
            read_errors: ReadErrors::default(),
            granted: VecDeque::new(),
            follow_ups: VecDeque::new(),
            flushes: FlushQueue::default(),
            withheld: Withheld::default(),
            confirmations: 0,
            spare_buffers: Vec::new(),
            request_errors: Vec::new(),
            waiters: Vec::new(),
        }
    }

    /// A request is retired: its errors are history.
    #[inline]
    pub(super) fn forget_errors(&mut self, request: RequestId) {
        if !self.request_errors.is_empty() {
            self.forget_errors_of(request);
        }
    }

    #[cold]
    fn forget_errors_of(&mut self, request: RequestId) {
        self.request_errors
            .retain(|errors| errors.request != request);
    }

    fn errors_of(&self, request: RequestId) -> Option<&RequestErrors> {
        let mut errors = self.request_errors.iter();
        errors.find(|errors| errors.request == request)
    }

    /// Whether a replica had no space left for what the request has asked of it.
    pub(super) fn had_no_space(&self, request: RequestId) -> bool {
        let errors = self.errors_of(request);
        errors.is_some_and(|errors| errors.no_space)
    }

    /// What the guest waits for, although its requests are retired.
    pub(super) fn unanswered(&self) -> usize {
        self.flushes.unanswered() + self.withheld.answers()
    }

    /// Has the next flush of this engine answer `origin`, which covers all that was written before.
    pub(super) fn join_flush(&mut self, origin: Origin) {
        let (since, asked) = self
            .shared
            .health(|health| (health.last_flush(), health.flush_asked()));
        if self.flushes.join(origin, since, asked) {
            self.follow_ups.push_back(FollowUp::Flush);
        }
    }

    /// The replicas that may vote on all of `range`. Lagging replicas are left out if enough others
    /// remain.
    pub(super) fn voters(&self, range: SectorRange) -> ReplicaSet {
        let in_service = self.shared.in_service();
        let fresh = in_service.without(self.shared.stale_in(range));
        let lags = |replica: &ReplicaIndex| self.in_flight.lags(*replica);
        let lagging: ReplicaSet = fresh.iter().filter(lags).collect();
        if lagging.is_empty() || fresh.without(lagging).len() < self.threshold() {
            fresh
        } else {
            fresh.without(lagging)
        }
    }

    /// Strikes out an operation that has ended.
    pub(super) fn ended(&mut self, reply: &Reply) {
        self.in_flight.ended(reply);
        if reply.action.is_long() {
            self.shared.loads().long_ended(reply.replica);
        }
    }

    /// The vote threshold at this moment (W10).
    #[inline]
    pub(super) fn threshold(&self) -> usize {
        self.shared.threshold()
    }

    /// The `count` of `voters` to ask first (R9).
    pub(super) fn preferred(&mut self, voters: ReplicaSet, count: usize) -> ReplicaSet {
        self.latencies.preferred(voters, count, &self.in_flight)
    }

    /// The rule by which a read of the guest is decided under the lock. A resync uses it too.
    pub(super) fn read_rule(&self) -> Rule {
        match self.policy.read_pattern {
            ReadPattern::Fifo => Rule::FirstListed,
            ReadPattern::Quorum | ReadPattern::Threshold => Rule::Threshold(self.threshold()),
        }
    }

    /// All replicas, or none.
    pub(super) fn all_if(&self, all: bool) -> ReplicaSet {
        if all {
            ReplicaSet::first(REPLICAS_MAX)
        } else {
            ReplicaSet::EMPTY
        }
    }

    /// The members that should have been read in `range` and were not among `succeeded`.
    pub(super) fn unread(&self, range: SectorRange, succeeded: ReplicaSet) -> ReplicaSet {
        let stale = self.shared.stale_in(range);
        self.shared.members().without(succeeded).without(stale)
    }
}

/// Whether a request goes on after an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Waiting,
    Retired,
}

/// A request's way to its engine: which request it is, what the engine knows, and where the effects
/// of this input go.
pub(super) struct Context<'a, E> {
    pub(super) id: RequestId,
    pub(super) core: &'a mut Core,
    pub(super) effects: &'a mut E,
}

impl<E: Effects> Context<'_, E> {
    pub(super) fn now(&self) -> Duration {
        self.core.clock.now()
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.core.shared
    }

    /// Submits an operation of this request.
    pub(super) fn submit(&mut self, replica: ReplicaIndex, action: Action) {
        let operation = Operation {
            request: self.id,
            replica,
            action,
        };
        self.core.in_flight.submitted(&operation);
        if operation.action.is_long() {
            self.core.shared.loads().long_begins(replica);
        }
        self.effects.submit(operation);
    }

    /// Asks for the lock on `range`. The request continues in its `lock_granted`, which runs
    /// only after the current input is finished.
    pub(super) fn lock(&mut self, range: SectorRange) -> LockKey {
        let waiter = Waiter {
            worker: self.core.worker,
            request: self.id,
        };
        let (lock, granted) = self.core.shared.lock(range, waiter);
        if granted {
            self.core.granted.push_back(self.id);
        }
        lock
    }

    /// Releases a lock and wakes the requests to which this grants theirs.
    pub(super) fn unlock(&mut self, key: LockKey) {
        let core = &mut *self.core;
        core.shared.unlock(key, &mut core.waiters);
        for waiter in core.waiters.drain(..) {
            if waiter.worker == core.worker {
                core.granted.push_back(waiter.request);
            } else {
                self.effects.wake(waiter.worker, waiter.request);
            }
        }
    }

    /// Reports the failure of an operation on one replica (R4).
    #[cold]
    pub(super) fn report_error(
        &mut self,
        replica: ReplicaIndex,
        operation: OperationType,
        range: SectorRange,
        errno: Errno,
    ) {
        let id = self.id;
        let no_space = errno.is_no_space();
        let mut errors = self.core.request_errors.iter_mut();
        match errors.find(|errors| errors.request == id) {
            Some(errors) => {
                errors.no_space |= no_space;
                let mut known = errors.of_replicas.iter();
                if known.all(|known| (known.0, known.1) != (replica, operation)) {
                    errors.of_replicas.push((replica, operation, errno));
                }
            }
            None => self.core.request_errors.push(RequestErrors {
                request: id,
                first: errno,
                no_space,
                of_replicas: vec![(replica, operation, errno)],
            }),
        }
        self.effects.report(Report::Bad {
            replica,
            operation,
            range,
            cause: Cause::Error(errno),
        });
    }

    /// Reports that a request of `requester` fails (R3).
    #[cold]
    pub(super) fn report_failure(
        &mut self,
        requester: Requester,
        operation: OperationType,
        range: SectorRange,
    ) -> Failed {
        let no_space = self.core.had_no_space(self.id);
        self.report_failed(requester, operation, range, no_space)
    }

    /// The same. `no_space`: a replica had no space left for it.
    #[cold]
    pub(super) fn report_failed(
        &mut self,
        requester: Requester,
        operation: OperationType,
        range: SectorRange,
        no_space: bool,
    ) -> Failed {
        let errors = self.core.errors_of(self.id);
        self.effects.report(Report::Failure {
            operation,
            range,
            requester,
            error: errors.map(|errors| errors.first),
            no_space,
        });
        Failed {
            no_space,
            by_flush: false,
        }
    }

    /// Has the surroundings of corrupt or unreadable sectors scrubbed.
    pub(super) fn scrub_around(&mut self, corrupt: SectorRange) {
        let report = |event| self.effects.job_changed(event);
        let shared = &self.core.shared;
        if shared.jobs(report, |jobs, _| jobs.corruption_found(corrupt)) {
            self.effects.health_changed();
        }
    }

    /// Hands the end of a chunk to its job.
    pub(super) fn chunk_ended(&mut self, chunk: ChunkId, mut end: ChunkEnd) {
        let errors = self.core.errors_of(self.id);
        for (replica, operation, errno) in errors.iter().flat_map(|errors| &errors.of_replicas) {
            end.on(*replica).failed(*operation, *errno);
        }
        self.core.background.ended(chunk, end);
    }
}
