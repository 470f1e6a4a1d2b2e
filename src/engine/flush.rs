//! A flush: to all replicas at once, and honest about what is durable where (W5).

use std::time::Duration;

use super::mutant::{Mutant, is_broken};
use super::range_locks::LockKey;
use super::{Core, Effects, Failed, Progress, Tag, report_error};
use crate::common::operation::OperationType;
use crate::common::operation::{Action, Operation, Reply, RequestId};
use crate::common::report::Report;
use crate::common::{ReplicaSet, SectorRange};
use crate::jobs::{ChunkEnd, ChunkId};
use crate::quorum::health::FlushEpoch;
use crate::quorum::tally::Tally;

/// A flush has no range of its own.
pub(super) const NO_RANGE: SectorRange = SectorRange { start: 0, count: 0 };

/// A sector beyond every disk: its lock is that of flushing.
const FLUSH_LOCK: SectorRange = SectorRange {
    start: u64::MAX / 2,
    count: 1,
};

#[derive(Debug)]
pub(super) struct Flush {
    asker: Asker,
    stage: Stage,
}

/// Who is to be told.
#[derive(Clone, Copy, Debug)]
enum Asker {
    Guest(Tag),
    Job(ChunkId),
}

#[derive(Debug)]
enum Stage {
    New,
    WaitingForLock {
        lock: LockKey,
    },
    Flushing {
        lock: LockKey,
        tally: Tally,
        epoch: FlushEpoch,
        asked_at: Duration,
    },
}

impl Flush {
    pub(super) fn new(tag: Tag) -> Self {
        Self {
            asker: Asker::Guest(tag),
            stage: Stage::New,
        }
    }

    /// A flush that is part of a job.
    pub(super) fn of_job(chunk: ChunkId) -> Self {
        Self {
            asker: Asker::Job(chunk),
            stage: Stage::New,
        }
    }

    /// The replicas that this flush knows of.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        match &self.stage {
            Stage::Flushing { tally, .. } => tally.asked(),
            Stage::New | Stage::WaitingForLock { .. } => ReplicaSet::EMPTY,
        }
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match &self.stage {
            Stage::Flushing {
                tally, asked_at, ..
            } if *asked_at <= limit => tally.waiting(),
            _ => ReplicaSet::EMPTY,
        }
    }

    pub(super) fn begin(&mut self, id: RequestId, core: &mut Core) -> Progress {
        // One flush at a time: the kernel tells of a page that it lost once, to whichever fsync of
        // the file is first, and the other one would seem to have gone well.
        self.stage = Stage::WaitingForLock {
            lock: core.lock(FLUSH_LOCK, id),
        };
        Progress::Waiting
    }

    pub(super) fn lock_granted(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let Stage::WaitingForLock { lock } = self.stage else {
            unreachable!("a lock is granted once");
        };
        let (asked, epoch) = core
            .shared
            .health(|health| (health.in_service(), health.flush_begins()));
        self.stage = Stage::Flushing {
            lock,
            tally: Tally::new(asked),
            epoch,
            asked_at: core.clock.now(),
        };
        for replica in asked.iter() {
            let operation = Operation {
                request: id,
                replica,
                action: Action::Flush,
            };
            core.submit(operation, effects);
        }
        Progress::Waiting
    }

    pub(super) fn reply(
        &mut self,
        reply: &Reply,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let Stage::Flushing { tally, epoch, .. } = &mut self.stage else {
            unreachable!("a reply comes to an operation in flight");
        };
        if !tally.waiting().contains(reply.replica) {
            return Progress::Waiting;
        }
        if let Err(errno) = reply.result {
            report_error(
                effects,
                reply.replica,
                OperationType::Flush,
                NO_RANGE,
                errno,
            );
            effects.health_changed();
        }
        let success = reply.result.is_ok();
        tally.record(reply.replica, success);
        let epoch = *epoch;
        core.shared.health(|health| {
            health.flush_ended(
                epoch,
                reply.replica,
                success || is_broken(Mutant::FailedFlushNotStale),
            )
        });
        self.finish_if_complete(core, effects)
    }

    /// Goes on without the replicas that have left the set. What they have not confirmed is stale
    /// already.
    pub(super) fn abandon(
        &mut self,
        gone: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        match &mut self.stage {
            Stage::Flushing { tally, .. } => tally.forget(gone),
            Stage::New | Stage::WaitingForLock { .. } => return Progress::Waiting,
        }
        self.finish_if_complete(core, effects)
    }

    fn finish_if_complete(&mut self, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let Stage::Flushing { lock, tally, .. } = &self.stage else {
            unreachable!("finished while flushing");
        };
        if !tally.is_complete() {
            return Progress::Waiting;
        }
        let lock = *lock;
        let succeeded = tally.succeeded();
        let (flushed, durable) = core.shared.health(|health| {
            // Who was removed meanwhile does not count.
            let flushed = succeeded.and(health.members()).len() >= core.policy.threshold;
            (flushed, health.fresh_on_threshold())
        });
        let success = flushed && (durable || is_broken(Mutant::FlushCountsSuccesses));
        match self.asker {
            Asker::Guest(tag) if success => effects.complete(tag, Ok(&[])),
            Asker::Guest(tag) => {
                effects.report(Report::Failure {
                    operation: OperationType::Flush,
                    range: NO_RANGE,
                });
                effects.complete(tag, Err(Failed));
            }
            Asker::Job(chunk) => {
                let failed = !success;
                core.chunk_ended(
                    chunk,
                    ChunkEnd {
                        failed,
                        ..ChunkEnd::default()
                    },
                );
            }
        }
        core.unlock(lock, effects);
        Progress::Retired
    }
}
