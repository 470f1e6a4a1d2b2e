//! A guest write: the same bytes to every replica, in the same order everywhere (W1 to W3).

use std::rc::Rc;

use super::range_locks::LockKey;
use super::{Core, Effects, Failed, Progress, Tag, report_error};
use crate::quorum::health::FlushFailures;
use crate::quorum::report::{OperationType, Report};
use crate::quorum::tally::Tally;
use crate::quorum::{ReplicaSet, SectorRange};
use crate::replica::buffer::Buffer;
use crate::replica::operation::{Action, Operation, Reply, RequestId};

#[derive(Debug)]
pub(super) struct Write {
    tag: Tag,
    range: SectorRange,
    data: Rc<Buffer>,
    durable: bool,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    New,
    WaitingForLock {
        lock: LockKey,
    },
    Writing {
        lock: LockKey,
        tally: Tally,
        began: FlushFailures,
    },
}

impl Write {
    pub(super) fn new(tag: Tag, range: SectorRange, data: Rc<Buffer>, durable: bool) -> Self {
        Self {
            tag,
            range,
            data,
            durable,
            stage: Stage::New,
        }
    }

    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    pub(super) fn begin(&mut self, id: RequestId, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let (lock, granted) = core.lock(self.range, id);
        self.stage = Stage::WaitingForLock { lock };
        if granted {
            self.lock_granted(id, core, effects)
        } else {
            Progress::Waiting
        }
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
        let asked = core.all_replicas();
        self.stage = Stage::Writing {
            lock,
            tally: Tally::new(asked),
            began: core.shared.health(|health| health.write_begins()),
        };
        for replica in asked.iter() {
            effects.submit(Operation {
                request: id,
                replica,
                action: Action::Write {
                    range: self.range,
                    data: Rc::clone(&self.data),
                    offset_bytes: 0,
                    durable: self.durable,
                },
            });
        }
        Progress::Waiting
    }

    pub(super) fn reply(&mut self, reply: Reply, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let Stage::Writing { lock, tally, began } = &mut self.stage else {
            unreachable!("a reply comes to an operation in flight");
        };
        if let Err(errno) = reply.result {
            report_error(effects, reply.replica, OperationType::Write, self.range, errno);
        }
        tally.record(reply.replica, reply.result.is_ok());
        if !tally.is_complete() {
            return Progress::Waiting;
        }
        let (lock, tally, began) = (*lock, *tally, *began);
        let success = tally.succeeded().len() >= core.policy.threshold;
        core.shared.health(|health| {
            // A write that failed leaves old or new bytes, and the vote decides which: nobody is known to be
            // behind. A write that succeeded leaves those behind that failed it.
            let failed = if success {
                tally.failed()
            } else {
                ReplicaSet::EMPTY
            };
            health.write_ended(self.range, tally.succeeded(), failed, began, self.durable);
        });
        if success {
            effects.complete(self.tag, Ok(&[]));
        } else {
            effects.report(Report::Failure {
                operation: OperationType::Write,
                range: self.range,
            });
            effects.complete(self.tag, Err(Failed));
        }
        core.unlock(lock, effects);
        Progress::Retired
    }
}
