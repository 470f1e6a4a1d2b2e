//! A guest write: the same bytes to every replica, in the same order everywhere (W1 to W4).
//!
//! A discard and a write-zeroes are writes of zeroes that need no buffer.

use std::rc::Rc;
use std::time::Duration;

use super::mutant::{Mutant, is_broken};
use super::range_locks::LockKey;
use super::{Core, Effects, Failed, Progress, Tag, report_error};
use crate::common::buffer::Buffer;
use crate::common::operation::OperationType;
use crate::common::operation::{Action, Operation, Reply, RequestId};
use crate::common::report::Report;
use crate::common::{ReplicaSet, SectorRange};
use crate::quorum::health::{WriteBegun, WriteEnd};
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) struct Write {
    tag: Tag,
    range: SectorRange,
    content: Content,
    durable: bool,
    stage: Stage,
}

/// What the range holds afterwards.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// The private copy of the guest's data.
    Data(Rc<Buffer>),
    /// Zeroes; `unmap`: the space may be given back.
    Zeroes { unmap: bool },
}

#[derive(Debug)]
enum Stage {
    New,
    WaitingForLock { lock: LockKey },
    Writing(Writing),
}

#[derive(Clone, Copy, Debug)]
struct Writing {
    lock: LockKey,
    tally: Tally,
    begun: WriteBegun,
    asked_at: Duration,
}

impl Write {
    pub(super) fn new(tag: Tag, range: SectorRange, content: Content, durable: bool) -> Self {
        Self {
            tag,
            range,
            content,
            durable,
            stage: Stage::New,
        }
    }

    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    /// Bytes of buffers that the request holds.
    pub(super) fn buffer_bytes(&self) -> u64 {
        match &self.content {
            Content::Data(data) => data.len() as u64,
            Content::Zeroes { .. } => 0,
        }
    }

    fn action(&self) -> Action {
        let (range, durable) = (self.range, self.durable);
        match &self.content {
            Content::Data(data) => Action::Write {
                range,
                data: Rc::clone(data),
                offset_bytes: 0,
                durable,
            },
            Content::Zeroes { unmap } => Action::Zero {
                range,
                unmap: *unmap,
                durable,
            },
        }
    }

    /// The replicas that this write knows of.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        match &self.stage {
            Stage::Writing(writing) => writing.tally.asked(),
            Stage::New | Stage::WaitingForLock { .. } => ReplicaSet::EMPTY,
        }
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match &self.stage {
            Stage::Writing(writing) if writing.asked_at <= limit => writing.tally.waiting(),
            _ => ReplicaSet::EMPTY,
        }
    }

    pub(super) fn begin(&mut self, id: RequestId, core: &mut Core) -> Progress {
        self.stage = Stage::WaitingForLock {
            lock: core.lock(self.range, id),
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
        let range = self.range;
        let (asked, begun) = core
            .shared
            .health(|health| (health.in_service(), health.write_begins(range)));
        self.stage = Stage::Writing(Writing {
            lock,
            tally: Tally::new(asked),
            begun,
            asked_at: core.clock.now(),
        });
        for replica in asked.iter() {
            let operation = Operation {
                request: id,
                replica,
                action: self.action(),
            };
            core.submit(operation, effects);
        }
        Progress::Waiting
    }

    pub(super) fn reply(
        &mut self,
        reply: Reply,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let Stage::Writing(writing) = &mut self.stage else {
            unreachable!("a reply comes to an operation in flight");
        };
        if !writing.tally.waiting().contains(reply.replica) {
            return Progress::Waiting;
        }
        if let Err(errno) = reply.result {
            report_error(
                effects,
                reply.replica,
                OperationType::Write,
                self.range,
                errno,
            );
            if self.durable {
                // It may be what the kernel had to tell of pages written before.
                let replica = reply.replica;
                if core
                    .shared
                    .health(|health| health.failed_to_persist(replica))
                {
                    effects.health_changed();
                }
            }
        }
        writing.tally.record(reply.replica, reply.result.is_ok());
        self.finish_if_complete(core, effects)
    }

    /// Goes on without the replicas that have left the set.
    pub(super) fn abandon(
        &mut self,
        gone: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        match &mut self.stage {
            Stage::Writing(writing) => writing.tally.forget(gone),
            Stage::New | Stage::WaitingForLock { .. } => return Progress::Waiting,
        }
        self.finish_if_complete(core, effects)
    }

    fn finish_if_complete(&mut self, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let Stage::Writing(writing) = self.stage else {
            unreachable!("finished while writing");
        };
        if !writing.tally.is_complete() {
            return Progress::Waiting;
        }
        let succeeded = writing.tally.succeeded();
        // What is stale is known before the guest hears of success (W3).
        let everyone = core.shared.members();
        let asked = succeeded.or(writing.tally.failed());
        let trusted = is_broken(Mutant::FailedWriteNotStale)
            || is_broken(Mutant::ReturnNotStale) && writing.tally.failed().is_empty();
        let (success, became_stale) = core.shared.health(|health| {
            // Who was removed meanwhile does not count.
            let success = succeeded.and(health.members()).len() >= core.policy.threshold;
            let end = WriteEnd {
                // Who was forgotten is as good as not asked: its write may still happen, or not.
                asked: if is_broken(Mutant::ReturnNotStale) {
                    everyone
                } else {
                    asked
                },
                succeeded: if trusted { everyone } else { succeeded },
                begun: writing.begun,
                success,
                durable: self.durable,
            };
            (success, health.write_ended(&end))
        });
        if became_stale {
            effects.health_changed();
        }
        if success {
            effects.complete(self.tag, Ok(&[]));
        } else {
            effects.report(Report::Failure {
                operation: OperationType::Write,
                range: self.range,
            });
            effects.complete(self.tag, Err(Failed));
        }
        core.unlock(writing.lock, effects);
        Progress::Retired
    }
}
