//! A flush: goes to all replicas at once, and succeeds only if every write before it is durable on
//! enough replicas (W5).
//!
//! It answers all that has joined the queue of its engine before it begins. What another engine's
//! flush has covered meanwhile needs no other one.

use std::time::Duration;

use super::context::{Context, Progress};
use super::flush_queue::{Origin, Waiting};
use super::interface::{Effects, Failed, Tag};
use super::lateness::{Kind, Out};
use super::range_locks::LockKey;
use super::shared::Shared;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::report::Requester;
use crate::common::{ReplicaSet, SectorRange};
use crate::jobs::ChunkEnd;
use crate::quorum::health::{FlushEpoch, Health};
use crate::quorum::tally::Tally;

/// A flush has no range of its own.
pub(super) const NO_RANGE: SectorRange = SectorRange { start: 0, count: 0 };

/// A sector beyond every disk: its lock orders the flushes.
const FLUSH_LOCK: SectorRange = SectorRange {
    start: u64::MAX / 2,
    count: 1,
};

#[derive(Debug)]
pub(super) struct Flush {
    lock: LockKey,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    WaitingForLock,
    Flushing {
        /// What it is for.
        origins: Vec<Waiting>,
        tally: Tally,
        epoch: FlushEpoch,
        asked_at: Duration,
    },
}

impl Flush {
    pub(super) fn begin(context: &mut Context<'_, impl Effects>) -> Self {
        Self {
            // One flush at a time: the kernel reports a lost page once, to the first fsync of the
            // file, so that a concurrent one would seem to succeed.
            lock: context.lock(FLUSH_LOCK),
            stage: Stage::WaitingForLock,
        }
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        assert!(self.waits_for_lock(), "a lock is granted once");
        let mut origins = context.core.flushes.take();
        // What an earlier flush has left is joined without the mutex.
        let copy = context
            .shared()
            .health(|health| health.needs_beginning().then(|| health.snapshot()));
        let mut beginning = copy.map_or_else(Vec::new, |copy| copy.beginning());
        let begun = context.shared().change_health(|health| {
            for waiting in &mut origins {
                waiting.is_durable = health.flushed_since(waiting.since)
                    && match waiting.origin {
                        Origin::Request(_) => health.guest_knew(waiting.asked),
                        Origin::Write(_, range, _) => {
                            !health.is_undone(range) && !health.was_given_up(range)
                        }
                        Origin::Job(_) | Origin::Winner { .. } => true,
                    };
            }
            let all = origins.iter().all(|waiting| waiting.is_durable);
            (!all).then(|| {
                let epoch = health.flush_begins_as_on(&mut beginning);
                (health.in_service(), epoch)
            })
        });
        for waiting in origins.extract_if(.., |waiting| waiting.is_durable) {
            answer(&waiting, context);
        }
        let Some((asked, epoch)) = begun else {
            return self.retire(origins, context);
        };
        self.stage = Stage::Flushing {
            origins,
            tally: Tally::new(asked),
            epoch,
            asked_at: context.now(),
        };
        for replica in asked.iter() {
            context.submit(replica, Action::Flush);
        }
        Progress::Waiting
    }

    pub(super) fn reply(
        &mut self,
        reply: &Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        let Stage::Flushing {
            tally,
            epoch,
            asked_at,
            ..
        } = &mut self.stage
        else {
            unreachable!("a reply comes to an operation in flight");
        };
        let (replica, success) = (reply.replica, reply.result.is_ok());
        if !tally.waiting().contains(replica) {
            return Progress::Waiting;
        }
        tally.record(replica, success);
        let now = context.now();
        let taken = now.saturating_sub(*asked_at);
        context
            .core
            .lateness
            .observe(Kind::Flush, replica, taken, now);
        let shared = context.shared();
        if success {
            shared.change_health(|health| health.flush_ended(*epoch, replica, true));
        } else {
            shared.flush_failed(replica);
        }
        if let Err(errno) = reply.result {
            context.report_error(replica, OperationType::Flush, NO_RANGE, errno);
            context.effects.health_changed();
        }
        self.finish_if_complete(context)
    }

    /// Goes on without evicted replicas. What they have not confirmed is stale already.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        match &mut self.stage {
            Stage::Flushing { tally, .. } => tally.forget(evicted),
            Stage::WaitingForLock => return Progress::Waiting,
        }
        self.finish_if_complete(context)
    }

    fn finish_if_complete(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::Flushing {
            origins,
            tally,
            epoch,
            ..
        } = &mut self.stage
        else {
            unreachable!("finished while flushing");
        };
        if !tally.is_complete() {
            return Progress::Waiting;
        }
        let succeeded = tally.succeeded();
        while !decide(origins, *epoch, succeeded, context.shared()) {}
        let mut origins = std::mem::take(origins);
        for waiting in origins.drain(..) {
            answer(&waiting, context);
        }
        self.retire(origins, context)
    }

    /// Every origin is answered.
    fn retire(&self, emptied: Vec<Waiting>, context: &mut Context<'_, impl Effects>) -> Progress {
        context.core.flushes.recycle(emptied);
        context.unlock(self.lock);
        Progress::Retired
    }

    /// What the flush is for, once it has begun.
    pub(super) fn origins(&self) -> &[Waiting] {
        match &self.stage {
            Stage::Flushing { origins, .. } => origins,
            Stage::WaitingForLock => &[],
        }
    }

    /// Whether no guest waits for it.
    pub(super) fn is_of_a_job(&self) -> bool {
        let of_guest = |waiting: &Waiting| match waiting.origin {
            Origin::Request(_) | Origin::Write(..) => true,
            Origin::Winner { of_guest, .. } => of_guest,
            Origin::Job(_) => false,
        };
        !self.origins().iter().any(of_guest)
    }

    /// The replicas that the flush has been handed to.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        match &self.stage {
            Stage::Flushing { tally, .. } => tally.asked(),
            Stage::WaitingForLock => ReplicaSet::EMPTY,
        }
    }

    pub(super) fn tally(&self) -> Option<&Tally> {
        match &self.stage {
            Stage::Flushing { tally, .. } => Some(tally),
            Stage::WaitingForLock => None,
        }
    }

    pub(super) fn waits_for_lock(&self) -> bool {
        matches!(self.stage, Stage::WaitingForLock)
    }

    /// What the flush waits for, once it has its lock.
    pub(super) fn out(&self, threshold: usize) -> Option<Out> {
        let Stage::Flushing {
            tally, asked_at, ..
        } = &self.stage
        else {
            return None;
        };
        let kind = if self.is_of_a_job() {
            Kind::Job
        } else {
            Kind::Flush
        };
        Some(Out {
            kind,
            asked_at: *asked_at,
            later: (ReplicaSet::EMPTY, Duration::ZERO),
            waiting: tally.waiting(),
            done: tally.succeeded(),
            needed: threshold,
            waits_for_all: true,
        })
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match &self.stage {
            Stage::Flushing {
                tally, asked_at, ..
            } if *asked_at <= limit => tally.waiting(),
            Stage::Flushing { .. } | Stage::WaitingForLock => ReplicaSet::EMPTY,
        }
    }
}

/// Decides what all replies to the flush have made durable. `false`: the vote threshold has changed
/// meanwhile, and nothing is decided.
fn decide(
    origins: &mut [Waiting],
    epoch: FlushEpoch,
    succeeded: ReplicaSet,
    shared: &Shared,
) -> bool {
    // A look at every sector, without the mutex, and at what then has to be joined.
    let (durability, copy) = shared.health(|health| {
        let copy = health.needs_settlement().then(|| health.snapshot());
        (health.durability(), copy)
    });
    let is_enough = durability.is_enough();
    let copy = copy.filter(|_| is_enough);
    let mut settlement = copy.map_or_else(Vec::new, |copy| copy.settlement());
    for waiting in origins.iter_mut().filter(|_| !is_enough) {
        let range = waiting.origin.range();
        waiting.is_durable = range.is_some_and(|range| durability.is_durable(range, succeeded));
    }
    shared.change_health(|health| {
        if health.threshold() != durability.threshold() {
            return false;
        }
        let all = health.flush_decided(epoch, succeeded, is_enough, &mut settlement);
        let same_members = health.members() == durability.members();
        for waiting in origins {
            let range = waiting.origin.range();
            let is_durable = match same_members {
                true => waiting.is_durable,
                false => range.is_some_and(|range| health.is_durable(range, succeeded)),
            };
            let durable = all || is_durable;
            waiting.is_durable = match waiting.origin {
                // The guest does not see this one, so its own next flush has to fail.
                Origin::Request(Tag::OwnFlush) => durable && health.guest_knows(waiting.asked),
                Origin::Request(_) => health.answer_flush(durable, waiting.asked),
                Origin::Write(_, range, _) => {
                    if durable && !all {
                        health.is_durable_alone(range);
                    }
                    durable && !health.is_undone(range) && !health.is_given_up(range)
                }
                Origin::Job(_) | Origin::Winner { .. } => durable,
            };
        }
        true
    })
}

/// Answers what the flush was for.
fn answer(waiting: &Waiting, context: &mut Context<'_, impl Effects>) {
    let success = waiting.is_durable;
    context.core.flushes.answered();
    let (tag, operation, range) = match waiting.origin {
        Origin::Request(tag) => (tag, OperationType::Flush, NO_RANGE),
        Origin::Write(tag, range, mark) if success => return context.flushed(tag, range, mark),
        Origin::Write(tag, range, _) => (tag, OperationType::Write, range),
        Origin::Job(chunk) => {
            let end = ChunkEnd {
                failed: !success,
                ..ChunkEnd::default()
            };
            return context.chunk_ended(chunk, end);
        }
        // If a replica has failed the flush, it takes its vote again.
        Origin::Winner { request, .. } => return context.core.granted.push_back(request),
    };
    if success {
        context.succeed(tag, (operation, range), &[]);
    } else {
        let failed = context.report_failure(Requester::Guest, operation, range);
        let by_flush = true;
        let failed = Failed { by_flush, ..failed };
        context.effects.complete(tag, Err(failed));
        if matches!(waiting.origin, Origin::Request(Tag::Guest { .. })) {
            context.shared().change_health(Health::failure_told);
        }
    }
}
