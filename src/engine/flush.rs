//! A flush: to all replicas at once, and honest about what is durable where (W5).

use super::{Core, Effects, Failed, Progress, Tag, report_error};
use crate::quorum::SectorRange;
use crate::quorum::health::FlushEpoch;
use crate::quorum::report::{OperationType, Report};
use crate::quorum::tally::Tally;
use crate::replica::operation::{Action, Operation, Reply, RequestId};

/// A flush has no range of its own.
const NO_RANGE: SectorRange = SectorRange { start: 0, count: 0 };

#[derive(Debug)]
pub(super) struct Flush {
    tag: Tag,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    New,
    Flushing { tally: Tally, epoch: FlushEpoch },
}

impl Flush {
    pub(super) fn new(tag: Tag) -> Self {
        Self {
            tag,
            stage: Stage::New,
        }
    }

    pub(super) fn begin(&mut self, id: RequestId, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let asked = core.all_replicas();
        self.stage = Stage::Flushing {
            tally: Tally::new(asked),
            epoch: core.shared.health(|health| health.flush_begins()),
        };
        for replica in asked.iter() {
            effects.submit(Operation {
                request: id,
                replica,
                action: Action::Flush,
            });
        }
        Progress::Waiting
    }

    pub(super) fn reply(&mut self, reply: Reply, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let Stage::Flushing { tally, epoch } = &mut self.stage else {
            unreachable!("a reply comes to an operation in flight");
        };
        if let Err(errno) = reply.result {
            report_error(effects, reply.replica, OperationType::Flush, NO_RANGE, errno);
        }
        let success = reply.result.is_ok();
        tally.record(reply.replica, success);
        let durable = core.shared.health(|health| {
            health.flush_ended(*epoch, reply.replica, success);
            tally.is_complete() && health.fresh_on_threshold()
        });
        if !tally.is_complete() {
            return Progress::Waiting;
        }
        if durable && tally.succeeded().len() >= core.policy.threshold {
            effects.complete(self.tag, Ok(&[]));
        } else {
            effects.report(Report::Failure {
                operation: OperationType::Flush,
                range: NO_RANGE,
            });
            effects.complete(self.tag, Err(Failed));
        }
        Progress::Retired
    }
}
