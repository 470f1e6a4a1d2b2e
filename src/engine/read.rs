//! A guest read: ask without a lock, and where replies differ confirm under the lock (R1 to R9).

use std::time::Duration;

use super::confirmation::{Confirmation, Next, Terms};
use super::context::{Context, Core, FollowUp, Progress, Suspicion};
use super::first_pass::FirstPass;
use super::interface::{Effects, Policy, ReadPattern, Tag};
use super::lateness::{Kind, Out};
use super::replies::Replies;
use super::stage::Stage;
use crate::common::operation::{OperationType, Reply};
use crate::common::report::{Fact, Requester};
use crate::common::{ReplicaSet, SectorRange};
use crate::quorum::vote::decisive_votes;

#[derive(Debug)]
pub(super) struct Read {
    /// `None` once the guest has its answer.
    tag: Option<Tag>,
    range: SectorRange,
    stage: Stage,
}

impl Read {
    pub(super) fn begin(
        tag: Tag,
        range: SectorRange,
        context: &mut Context<'_, impl Effects>,
    ) -> Self {
        let core = &mut *context.core;
        let threshold = core.threshold();
        let voters = core.voters(range);
        let (asked, needed) = match core.policy.read_pattern {
            ReadPattern::Fifo => (voters.iter().take(1).collect(), 1),
            ReadPattern::Quorum => (voters, threshold),
            ReadPattern::Threshold => {
                let enough = decisive_votes(threshold, voters.len());
                (core.preferred(voters, enough), threshold)
            }
        };
        if asked.len() < needed || core.shared.must_vote(range, core.policy.read_pattern) {
            // Too few replicas are fresh throughout, but sector by sector there may be enough; or
            // the vote decides what the disk holds (W7), or whether there is a winner again.
            return Self::confirm_at_once(tag, range, ReplicaSet::EMPTY, context);
        }
        Self {
            tag: Some(tag),
            range,
            stage: Stage::FirstPass(FirstPass::begin(range, voters, asked, context)),
        }
    }

    /// A read whose replies differ while a slow replica is out, so that under the lock the others
    /// decide; or one whose vote is outdated, or undone while its answer waited for the records.
    pub(super) fn suspect(suspicion: Suspicion, context: &mut Context<'_, impl Effects>) -> Self {
        let Suspicion { tag, range, failed } = suspicion;
        Self::confirm_at_once(tag, range, failed, context)
    }

    #[cold]
    #[inline(never)]
    fn confirm_at_once(
        tag: Tag,
        range: SectorRange,
        failed_before: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Self {
        let terms = Terms {
            failed_before,
            ..terms(true, context.core.all_if(true), context.core)
        };
        let replies = Replies::new(range, context.core);
        Self {
            tag: Some(tag),
            range,
            stage: Stage::Confirming(Box::new(Confirmation::begin(replies, terms, context))),
        }
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

    /// The guest has waited longer than replicas usually take (R7, R9).
    pub(super) fn reply_late(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::FirstPass(pass) = &mut self.stage else {
            return Progress::Waiting;
        };
        if context.core.policy.read_pattern == ReadPattern::Fifo {
            return Progress::Waiting;
        }
        pass.drop_out_of_service(context.core);
        let unasked = pass.unasked();
        if !unasked.is_empty() {
            pass.ask_more(unasked, context);
        } else if pass.differs() && self.tag.is_some() {
            // The slow replica might decide, but the guest need not wait for it: under the lock the
            // others can.
            context.effects.count(Fact::Confirmation);
            self.repeat(context);
            return self.retire(context.core);
        }
        Progress::Waiting
    }

    /// Answers if there is a quorum. When all replies are in: confirms if they differ, asks further
    /// replicas, or fails.
    fn compare(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::FirstPass(pass) = &mut self.stage else {
            unreachable!("only the first pass compares");
        };
        let core = &*context.core;
        pass.drop_out_of_service(core);
        let doubtful = pass.is_doubtful(core);
        // R7: with this many equal replies the others cannot change the winner.
        let enough = match core.policy.read_pattern {
            ReadPattern::Fifo => 1,
            ReadPattern::Quorum | ReadPattern::Threshold => {
                decisive_votes(core.threshold(), pass.voters())
            }
        };
        if !doubtful
            && let Some(winner) = pass.version_with(enough)
            && let Some(tag) = self.tag.take()
        {
            let request = (OperationType::Read, self.range);
            context.succeed(tag, request, winner);
        }
        if pass.tally().is_complete() {
            self.compared(doubtful, context)
        } else {
            Progress::Waiting
        }
    }

    /// Every replica that was asked has replied, or was evicted.
    fn compared(&mut self, doubtful: bool, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::FirstPass(pass) = &mut self.stage else {
            unreachable!("only the first pass compares");
        };
        let tally = *pass.tally();
        let (differs, failed) = (pass.differs(), tally.failed());
        if self.tag.is_none() && !differs && failed.is_empty() {
            // As nearly always: answered, and the rest is equal.
            return self.retire(context.core);
        }
        let is_fifo = context.core.policy.read_pattern == ReadPattern::Fifo;
        let unasked = pass.unasked();
        if self.tag.is_some() && !doubtful && !unasked.is_empty() {
            let next = if is_fifo { 1 } else { unasked.len() };
            pass.ask_more(unasked.iter().take(next).collect(), context);
            return Progress::Waiting;
        }
        let followed = if failed.is_empty() {
            ReplicaSet::EMPTY
        } else {
            let now = context.now();
            context.core.read_errors.take(failed, now)
        };
        let locates = context.core.all_if(true).without(failed).or(followed);
        if differs {
            context.effects.count(Fact::Confirmation);
            return self.confirm(locates, context);
        }
        // The lock shows which replicas may vote on which sector, and which blocks are unreadable.
        let others = context.shared().in_service().without(tally.asked());
        let may_succeed = doubtful || !others.is_empty() || !failed.is_empty();
        let repairs = context.core.policy.rewrite_corrupted && !followed.is_empty();
        if (self.tag.is_some() && may_succeed) || repairs {
            return self.confirm(locates, context);
        }
        self.fail(context);
        if !followed.is_empty() {
            context.scrub_around(self.range);
        }
        self.retire(context.core)
    }

    /// Repeats the read under the lock. `locates`: see [`Terms`].
    fn confirm(
        &mut self,
        locates: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        let Stage::FirstPass(pass) = &mut self.stage else {
            unreachable!("confirmed once");
        };
        let replies = pass.replies_mut().restart();
        let terms = terms(self.tag.is_some(), locates, context.core);
        self.stage = Stage::Confirming(Box::new(Confirmation::begin(replies, terms, context)));
        Progress::Waiting
    }

    /// Does what the confirmation says.
    fn go_on(&mut self, next: Next, context: &mut Context<'_, impl Effects>) -> Progress {
        match next {
            Next::Wait => Progress::Waiting,
            Next::Answer(winner) => {
                self.succeed(&winner, context);
                Progress::Waiting
            }
            Next::Fail => {
                self.fail(context);
                Progress::Waiting
            }
            Next::Decided(decision) => {
                if !decision.waits {
                    match decision.winner() {
                        Some(winner) => self.succeed(winner, context),
                        None => self.fail(context),
                    }
                }
                let Stage::Confirming(confirmation) = &mut self.stage else {
                    unreachable!("decided by a confirmation");
                };
                let next = confirmation.repair(&decision, context);
                self.go_on(next, context)
            }
            Next::Done(_) => {
                let Stage::Confirming(confirmation) = &mut self.stage else {
                    unreachable!("done by a confirmation");
                };
                // The guest has its answer, unless the decision waited for the repairs.
                match confirmation.take_settled() {
                    Some(winner) => self.succeed(&winner, context),
                    None if confirmation.is_outdated() => self.repeat(context),
                    None => self.fail(context),
                }
                self.retire(context.core)
            }
        }
    }

    /// Has another read of the range answer the guest, under the lock, if it has no answer yet.
    fn repeat(&mut self, context: &mut Context<'_, impl Effects>) {
        let range = self.range;
        let failed = match &self.stage {
            Stage::Confirming(confirmation) => confirmation.failed(),
            Stage::FirstPass(_) => ReplicaSet::EMPTY,
        };
        let suspicion = self.tag.take();
        let suspicion = suspicion.map(|tag| Suspicion { tag, range, failed });
        let follow_up = suspicion.map(FollowUp::Confirm);
        context.core.follow_ups.extend(follow_up);
    }

    /// Answers the guest with `data`, if it has no answer yet.
    fn succeed(&mut self, data: &[u8], context: &mut Context<'_, impl Effects>) {
        if let Some(tag) = self.tag.take() {
            context.succeed(tag, (OperationType::Read, self.range), data);
        }
    }

    /// Answers the guest with an error, if it has no answer yet: there is no quorum. If fewer votes
    /// win by now than when they were counted (W10), they are counted again.
    #[cold]
    #[inline(never)]
    fn fail(&mut self, context: &mut Context<'_, impl Effects>) {
        if let Stage::Confirming(confirmation) = &self.stage
            && confirmation
                .threshold()
                .is_some_and(|t| t > context.core.threshold())
        {
            return self.repeat(context);
        }
        if let Some(tag) = self.tag.take() {
            let failed = context.report_failure(Requester::Guest, OperationType::Read, self.range);
            context.effects.complete(tag, Err(failed));
        }
    }

    fn retire(&mut self, core: &mut Core) -> Progress {
        assert!(self.tag.is_none(), "a read is answered before it retires");
        self.stage.recycle(core);
        Progress::Retired
    }

    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    pub(super) fn stage(&self) -> &Stage {
        &self.stage
    }

    /// What the read waits for.
    pub(super) fn out(&self, policy: &Policy, threshold: usize) -> Out {
        let needed = match policy.read_pattern {
            _ if self.tag.is_none() => 0,
            ReadPattern::Fifo => 1,
            ReadPattern::Quorum | ReadPattern::Threshold => threshold,
        };
        let mut out = self.stage.out(Kind::Read, needed);
        if policy.read_pattern == ReadPattern::Fifo {
            // The next is asked only when this one is evicted.
            out.done = out.done.or(self.stage.unasked());
        }
        out
    }

    /// Since when the guest has waited for a reply to the first pass.
    pub(super) fn guest_waits_since(&self) -> Option<Duration> {
        match &self.stage {
            Stage::FirstPass(pass) if self.tag.is_some() => pass.waits_since(),
            Stage::FirstPass(_) | Stage::Confirming(_) => None,
        }
    }
}

/// `answers`: the guest has no answer yet. `locates`: where the disk repairs.
fn terms(answers: bool, locates: ReplicaSet, core: &Core) -> Terms {
    let repairs = core.policy.rewrite_corrupted;
    Terms {
        rule: core.read_rule(),
        throughout: ReplicaSet::EMPTY,
        repairs_losers: repairs,
        is_asked: false,
        locates: core.all_if(repairs).and(locates),
        spreads: true,
        answers_early: answers,
        is_resync: false,
        prefers: None,
        searches_long: false,
        failed_before: ReplicaSet::EMPTY,
    }
}
