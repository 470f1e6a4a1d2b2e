//! A chunk of a scrub: a read of every replica, whatever the read pattern, with no guest waiting.
//!
//! As in a guest's read, a difference is only a suspicion until the read was repeated under the
//! lock of its range. If all replicas agree, the scrub takes no lock.

use super::confirmation::{Confirmation, Next, Terms};
use super::context::{Context, Core, Progress};
use super::first_pass::FirstPass;
use super::interface::{Effects, ReadPattern};
use super::replies::Replies;
use super::stage::Stage;
use crate::common::operation::{OperationType, Reply};
use crate::common::report::{Fact, Requester};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::{ChunkEnd, ChunkId};
use crate::quorum::vote::Rule;

#[derive(Debug)]
pub(super) struct Scrub {
    order: ScrubOrder,
    stage: Stage,
}

/// What the job asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct ScrubOrder {
    pub(super) chunk: ChunkId,
    pub(super) range: SectorRange,
    /// Repair replicas that lose the vote or are unreadable.
    pub(super) repair: bool,
    /// Scrub the neighbourhood of corrupt sectors.
    pub(super) spreads: bool,
    /// Where there is no winner, write what this replica holds to the others.
    pub(super) prefers: Option<ReplicaIndex>,
}

impl Scrub {
    pub(super) fn begin(order: ScrubOrder, context: &mut Context<'_, impl Effects>) -> Self {
        let core = &mut *context.core;
        let range = order.range;
        let in_service = core.shared.in_service();
        let stale = in_service.and(core.shared.stale_in(range));
        let is_partly = |replica| core.shared.health(|h| h.stale_parts(replica, range)) != [range];
        let partly_stale = stale.iter().any(is_partly);
        let asked = in_service.without(stale);
        // Only the lock shows which replicas may vote on which sector.
        let confirms = partly_stale || core.shared.must_vote(range, ReadPattern::Quorum);
        let stage = if confirms || asked.is_empty() {
            order.confirming(Replies::new(range, core), context)
        } else {
            Stage::FirstPass(FirstPass::begin(range, asked, asked, context))
        };
        Self { order, stage }
    }

    pub(super) fn reply(
        &mut self,
        reply: Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        match &mut self.stage {
            Stage::FirstPass(pass) => {
                if pass.reply(reply, context) {
                    self.compare(context)
                } else {
                    Progress::Waiting
                }
            }
            Stage::Confirming(confirmation) => {
                let next = confirmation.reply(reply, context);
                self.go_on(next, context)
            }
        }
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::Confirming(confirmation) = &mut self.stage else {
            unreachable!("the first pass takes no lock");
        };
        let next = confirmation.lock_granted(context);
        self.go_on(next, context)
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        match &mut self.stage {
            Stage::FirstPass(pass) => {
                pass.evicted(evicted);
                self.compare(context)
            }
            Stage::Confirming(confirmation) => {
                let next = confirmation.evicted(evicted, context);
                self.go_on(next, context)
            }
        }
    }

    /// Confirms unless all replicas agree, and are enough.
    fn compare(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::FirstPass(pass) = &mut self.stage else {
            unreachable!("only the first pass compares");
        };
        let doubtful = pass.is_doubtful(context.core);
        if !pass.tally().is_complete() {
            return Progress::Waiting;
        }
        let (succeeded, failed) = (pass.tally().succeeded(), pass.tally().failed());
        if pass.differs() || doubtful {
            context.effects.count(Fact::Confirmation);
            return self.confirm(context);
        }
        // What is unreadable is found, and repaired, under the lock.
        if succeeded.len() < context.core.threshold() || !failed.is_empty() {
            return self.confirm(context);
        }
        let end = ChunkEnd {
            unread: context.core.unread(self.order.range, succeeded),
            ..ChunkEnd::default()
        };
        self.finish(end, context)
    }

    fn confirm(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::FirstPass(pass) = &mut self.stage else {
            unreachable!("confirmed once");
        };
        let replies = pass.replies_mut().restart();
        self.stage = self.order.confirming(replies, context);
        Progress::Waiting
    }

    /// Does what the confirmation says.
    fn go_on(&mut self, next: Next, context: &mut Context<'_, impl Effects>) -> Progress {
        match next {
            Next::Wait => Progress::Waiting,
            Next::Answer(_) | Next::Fail => unreachable!("nothing waits for an early answer"),
            Next::Decided(decision) => {
                if let Some(undecided) = decision.undecided() {
                    context.report_failure(Requester::Job, OperationType::Read, undecided);
                }
                let Stage::Confirming(confirmation) = &mut self.stage else {
                    unreachable!("decided by a confirmation");
                };
                let next = confirmation.repair(&decision, context);
                self.go_on(next, context)
            }
            Next::Done(end) => {
                let Stage::Confirming(confirmation) = &self.stage else {
                    unreachable!("done by a confirmation");
                };
                if confirmation.is_outdated() {
                    // What it is for is not decided yet.
                    let terms = Terms {
                        failed_before: confirmation.failed(),
                        ..self.order.terms(context.core)
                    };
                    let replies = Replies::new(self.order.range, context.core);
                    let confirmation = Confirmation::begin(replies, terms, context);
                    self.stage = Stage::Confirming(Box::new(confirmation));
                    return Progress::Waiting;
                }
                self.finish(end, context)
            }
        }
    }

    fn finish(&mut self, end: ChunkEnd, context: &mut Context<'_, impl Effects>) -> Progress {
        context.chunk_ended(self.order.chunk, end);
        self.stage.recycle(context.core);
        Progress::Retired
    }

    pub(super) fn range(&self) -> SectorRange {
        self.order.range
    }

    pub(super) fn stage(&self) -> &Stage {
        &self.stage
    }
}

impl ScrubOrder {
    fn confirming(&self, replies: Replies, context: &mut Context<'_, impl Effects>) -> Stage {
        let terms = self.terms(context.core);
        Stage::Confirming(Box::new(Confirmation::begin(replies, terms, context)))
    }

    fn terms(&self, core: &Core) -> Terms {
        Terms {
            rule: Rule::Threshold(core.threshold()),
            throughout: ReplicaSet::EMPTY,
            repairs_losers: core.policy.rewrite_corrupted || self.repair,
            is_asked: self.repair,
            locates: core.all_if(true),
            spreads: self.spreads,
            answers_early: false,
            is_resync: false,
            prefers: self.prefers,
            searches_long: true,
            failed_before: ReplicaSet::EMPTY,
        }
    }
}
