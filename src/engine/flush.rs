//! A flush: goes to all replicas at once, and succeeds only if every write before it is durable on
//! enough replicas (W5).

use std::time::Duration;

use super::context::{Context, Progress};
use super::interface::{Effects, Failed, Tag};
use super::range_locks::LockKey;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::report::Requester;
use crate::common::{ReplicaSet, SectorRange};
use crate::jobs::{ChunkEnd, ChunkId};
use crate::quorum::health::FlushEpoch;
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
    origin: Origin,
    lock: LockKey,
    stage: Stage,
}

/// What made the flush.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    Request(Tag),
    Job(ChunkId),
}

#[derive(Debug)]
enum Stage {
    WaitingForLock,
    Flushing {
        tally: Tally,
        epoch: FlushEpoch,
        asked_at: Duration,
    },
}

impl Flush {
    pub(super) fn begin(origin: Origin, context: &mut Context<'_, impl Effects>) -> Self {
        Self {
            origin,
            // One flush at a time: the kernel reports a lost page once, to the first fsync of the
            // file, so that a concurrent one would seem to succeed.
            lock: context.lock(FLUSH_LOCK),
            stage: Stage::WaitingForLock,
        }
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        assert!(self.waits_for_lock(), "a lock is granted once");
        let (asked, epoch) = context
            .shared()
            .change_health(|health| (health.in_service(), health.flush_begins()));
        self.stage = Stage::Flushing {
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
        let Stage::Flushing { tally, epoch, .. } = &mut self.stage else {
            unreachable!("a reply comes to an operation in flight");
        };
        let (replica, success) = (reply.replica, reply.result.is_ok());
        if !tally.waiting().contains(replica) {
            return Progress::Waiting;
        }
        tally.record(replica, success);
        let shared = context.shared();
        shared.change_health(|health| health.flush_ended(*epoch, replica, success));
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
        let Stage::Flushing { tally, .. } = &self.stage else {
            unreachable!("finished while flushing");
        };
        if !tally.is_complete() {
            return Progress::Waiting;
        }
        let succeeded = tally.succeeded();
        let threshold = context.core.policy.threshold;
        let (flushed, durable) = context.shared().health(|health| {
            // A replica that was removed meanwhile does not count.
            let flushed = succeeded.and(health.members()).len() >= threshold;
            (flushed, health.fresh_on_threshold())
        });
        let success = flushed && durable;
        self.answer(success, context);
        context.unlock(self.lock);
        Progress::Retired
    }

    fn answer(&self, success: bool, context: &mut Context<'_, impl Effects>) {
        match self.origin {
            Origin::Request(tag) if success => context.effects.complete(tag, Ok(&[])),
            Origin::Request(tag) => {
                context.report_failure(Requester::Guest, OperationType::Flush, NO_RANGE);
                context.effects.complete(tag, Err(Failed));
            }
            Origin::Job(chunk) => context.chunk_ended(
                chunk,
                ChunkEnd {
                    failed: !success,
                    ..ChunkEnd::default()
                },
            ),
        }
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
