//! A read under the lock of its range: replicas that differ now are corrupt (R2, R3, R5, R6).
//!
//! While the lock is held no write can change the range, so the replies are compared sector by
//! sector; the losers are reported, and repaired before the lock is released. The same path
//! resyncs a stale replica, which is repaired throughout.
//!
//! A confirmation knows neither guest nor job. Each input returns what its owner must do [`Next`]:
//! answer, call [`Confirmation::repair`], or finish with the [`Outcome`].
//!
//! ```text
//! waiting for the lock ─► asking ─► decided ─► repairing ─► done
//! ```

use std::rc::Rc;
use std::time::Duration;

use super::context::{Context, Core};
use super::interface::Effects;
use super::range_locks::LockKey;
use super::repair::{RepairKind, RepairWrite, Repairs, bytes_of, decided};
use super::replies::Replies;
use crate::common::buffer::Buffer;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::report::{Cause, Fact, Report};
use crate::common::runs;
use crate::common::{ReplicaSet, SectorRange};
use crate::jobs::ChunkEnd;
use crate::quorum::health::{Disputed, FailureEpoch};
use crate::quorum::tally::Tally;
use crate::quorum::vote::{Ballot, Rule, Verdict, vote};

#[derive(Debug)]
pub(super) struct Confirmation {
    lock: LockKey,
    terms: Terms,
    replies: Replies,
    /// When the operations of this step were submitted.
    asked_at: Duration,
    step: Step,
    outcome: Outcome,
}

/// What a confirmation is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) rule: Rule,
    /// Replicas to be repaired wherever there is a winner. They are not asked.
    pub(super) throughout: ReplicaSet,
    /// Repair replicas where they lose the vote.
    pub(super) repairs_losers: bool,
    /// Scrub the neighbourhood of corrupt sectors.
    pub(super) spreads: bool,
    /// Return the winner as soon as the replies that are out cannot change it (R7).
    pub(super) answers_early: bool,
    /// Sectors that are repaired throughout were stale, not corrupt.
    pub(super) is_resync: bool,
}

#[derive(Debug)]
enum Step {
    WaitingForLock,
    Asking,
    Decided,
    /// The writes of the winner that are out.
    Repairing {
        began: FailureEpoch,
        pending: Vec<RepairWrite>,
    },
}

/// What the owner of a confirmation does after an input.
#[derive(Debug)]
pub(super) enum Next {
    /// Wait for the next input.
    Wait,
    /// Answer with these bytes; the rest only matters to the operator.
    Answer(Buffer),
    /// Answer according to the decision, then call [`Confirmation::repair`] with it.
    Decided(Decision),
    /// Finish: the lock is released.
    Done(Outcome),
}

/// The votes are counted.
#[derive(Debug)]
pub(super) struct Decision {
    verdict: Verdict,
    /// The winning bytes, unspecified in undecided sectors. `None` if every sector is undecided.
    winner: Option<Rc<Buffer>>,
}

impl Decision {
    /// The bytes of the range, if every sector has a winner.
    pub(super) fn winner(&self) -> Option<&[u8]> {
        let winner = self.winner.as_ref().filter(|_| self.is_complete());
        winner.map(|buffer| &buffer[..])
    }

    /// Whether every sector has a winner.
    pub(super) fn is_complete(&self) -> bool {
        self.verdict.undecided.is_empty()
    }
}

/// What a confirmation found and did, in sectors counted once for each replica.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    /// Sectors that lost the vote.
    pub(super) found: u64,
    /// Sectors repaired.
    pub(super) written: u64,
    /// Sectors whose repair failed.
    pub(super) not_written: u64,
    /// Sectors without a winner.
    pub(super) undecided: u64,
    /// Members that should have been read and were not.
    pub(super) unread: ReplicaSet,
}

impl From<Outcome> for ChunkEnd {
    fn from(outcome: Outcome) -> Self {
        Self {
            found: outcome.found,
            written: outcome.written,
            not_written: outcome.not_written,
            undecided: outcome.undecided,
            unread: outcome.unread,
            failed: false,
        }
    }
}

impl Confirmation {
    /// Asks for the lock on the range of `replies`, which are empty.
    pub(super) fn begin(
        replies: Replies,
        terms: Terms,
        context: &mut Context<'_, impl Effects>,
    ) -> Self {
        context.core.confirmations += 1;
        Self {
            lock: context.lock(replies.range()),
            terms,
            replies,
            asked_at: context.now(),
            step: Step::WaitingForLock,
            outcome: Outcome::default(),
        }
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        assert!(self.waits_for_lock(), "a lock is granted once");
        self.step = Step::Asking;
        self.asked_at = context.now();
        let in_service = context.shared().in_service();
        let asked = in_service.without(self.terms.throughout);
        self.replies.ask(asked, context);
        self.count(context)
    }

    pub(super) fn reply(&mut self, reply: Reply, context: &mut Context<'_, impl Effects>) -> Next {
        match &self.step {
            Step::Asking if self.replies.tally().waiting().contains(reply.replica) => {
                self.replies.record(reply, self.asked_at, context);
                self.count(context)
            }
            Step::Repairing { .. } => self.repaired(&reply, context),
            // The reply to a first pass that ended without it.
            Step::WaitingForLock | Step::Asking | Step::Decided => Next::Wait,
        }
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Next {
        match &mut self.step {
            Step::WaitingForLock | Step::Decided => Next::Wait,
            Step::Asking => {
                self.replies.forget(evicted);
                self.count(context)
            }
            Step::Repairing { pending, .. } => {
                // Their writes may still happen, perhaps after newer ones.
                for write in pending.extract_if(.., |write| evicted.contains(write.replica)) {
                    let shared = context.shared();
                    shared.change_health(|health| health.mark_stale(write.replica, write.range));
                    self.outcome.not_written += write.range.count;
                }
                self.finish_if_repaired(context)
            }
        }
    }

    /// Decides if all replies are in, or if those that are out cannot change the winner.
    fn count(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        if self.replies.tally().is_complete() {
            return self.decide(context);
        }
        match self.early_winner(context.core) {
            Some(winner) => {
                self.terms.answers_early = false;
                Next::Answer(winner)
            }
            None => Next::Wait,
        }
    }

    /// R7: a guest does not wait for a slow replica whose vote cannot matter.
    fn early_winner(&self, core: &Core) -> Option<Buffer> {
        let Rule::Threshold(threshold) = self.terms.rule else {
            return None;
        };
        let tally = self.replies.tally();
        let (succeeded, waiting) = (tally.succeeded().len(), tally.waiting().len());
        let enough = threshold.max((succeeded + waiting) / 2 + 1);
        if !self.terms.answers_early || succeeded < enough {
            return None;
        }
        let range = self.replies.range();
        let disputed = core.shared.health(|health| health.disputed(range));
        if !disputed.is_empty() {
            // Each reply decides where another version must be replaced.
            return None;
        }
        let verdict = self.vote(Rule::Threshold(enough), &disputed, core);
        let decided = verdict.undecided.is_empty();
        decided.then(|| self.assemble(&verdict, core)).flatten()
    }

    /// All replies are in, and no write can have run meanwhile.
    fn decide(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        assert!(self.replies.tally().is_complete(), "decided too early");
        self.step = Step::Decided;
        let range = self.replies.range();
        let disputed = context.shared().health(|health| health.disputed(range));
        let verdict = self.vote(self.terms.rule, &disputed, context.core);
        let unanimous = verdict.dissents.is_empty() && verdict.undecided.is_empty();
        if unanimous && self.terms.throughout.is_empty() {
            context.effects.count(Fact::ConfirmationWithoutFault);
        }
        self.report_losers(&verdict, context);
        self.settle(&disputed, &verdict, context);
        let succeeded = self.replies.tally().succeeded();
        let unread = context.core.unread(self.replies.range(), succeeded);
        self.outcome.unread = unread.without(self.terms.throughout);
        self.outcome.undecided = sectors(&verdict.undecided);
        self.spread(&verdict, context);
        let winner = self.assemble(&verdict, context.core).map(Rc::new);
        Next::Decided(Decision { verdict, winner })
    }

    fn report_losers(&mut self, verdict: &Verdict, context: &mut Context<'_, impl Effects>) {
        for dissent in &verdict.dissents {
            context.effects.report(Report::Bad {
                replica: dissent.replica,
                operation: OperationType::Read,
                range: self.replies.range(),
                cause: Cause::Corrupt(dissent.evidence()),
            });
            self.outcome.found += sectors(&dissent.bad_sectors);
        }
    }

    /// W7: the vote decides what a failed write has left. What does not hold the winner is stale
    /// from now on, before the guest has its answer.
    fn settle(
        &self,
        disputed: &Disputed,
        verdict: &Verdict,
        context: &mut Context<'_, impl Effects>,
    ) {
        let block_sectors = context.core.policy.block_sectors;
        let now = decided(&disputed.undecided, &verdict.undecided, block_sectors);
        if now.is_empty() {
            return;
        }
        let shared = context.shared();
        let succeeded = self.replies.tally().succeeded();
        let others: Vec<_> = shared
            .members()
            .iter()
            .map(|member| {
                let loses = || {
                    let mut excused = verdict.excused.iter();
                    let runs = excused.find(|(replica, _)| *replica == member);
                    runs.map_or(Vec::new(), |(_, runs)| runs::common(&now, runs))
                };
                let runs = match succeeded.contains(member) {
                    true => loses(),
                    false => now.clone(),
                };
                (member, runs)
            })
            .collect();
        if shared.change_health(|health| health.decide(&now, &others)) {
            context.effects.health_changed();
        }
    }

    /// Has the neighbourhood of corrupt sectors scrubbed.
    fn spread(&self, verdict: &Verdict, context: &mut Context<'_, impl Effects>) {
        let dissents = verdict.dissents.iter();
        let corrupt = dissents.flat_map(|dissent| &dissent.bad_sectors);
        let (first, last) = corrupt.fold((u64::MAX, 0), |(first, last), run| {
            (first.min(run.start), last.max(run.end()))
        });
        if first >= last || !self.terms.spreads {
            return;
        }
        let corrupt = SectorRange::new(first, last - first);
        let report = |event| context.effects.job_changed(event);
        let shared = &context.core.shared;
        if shared.jobs(report, |jobs, _| jobs.corruption_found(corrupt)) {
            context.effects.health_changed();
        }
    }

    fn vote(&self, rule: Rule, disputed: &Disputed, core: &Core) -> Verdict {
        let voters = self.replies.tally().succeeded();
        let range = self.replies.range();
        let stale = core.shared.health(|health| {
            let stale_parts = |replica| health.stale_parts(replica, range);
            voters.iter().map(stale_parts).collect::<Vec<_>>()
        });
        let ballots: Vec<Ballot<'_>> = voters
            .iter()
            .zip(stale)
            .map(|(replica, stale)| Ballot {
                replica,
                bytes: self.replies.data(replica),
                stale,
                supporting: Vec::new(),
                excused: disputed.undecided.clone(),
            })
            .collect();
        vote(range, &ballots, rule)
    }

    /// Copies the winning versions into one buffer. `None` if every sector is undecided. The bytes
    /// of undecided sectors are unspecified and must not be used.
    fn assemble(&self, verdict: &Verdict, core: &Core) -> Option<Buffer> {
        verdict.winners.first()?;
        let range = self.replies.range();
        let len = usize::try_from(range.bytes()).expect("a fragment fits memory");
        let mut winner = core.pool.take(len);
        for run in &verdict.winners {
            let bytes = bytes_of(run.range, range);
            winner[bytes.clone()].copy_from_slice(&self.replies.data(run.held_by)[bytes]);
        }
        Some(winner)
    }

    /// Writes the winner where it did not win (R6), and over the replicas that are repaired
    /// throughout.
    pub(super) fn repair(
        &mut self,
        decision: &Decision,
        context: &mut Context<'_, impl Effects>,
    ) -> Next {
        assert!(matches!(self.step, Step::Decided), "repaired once");
        // Only now: the guest has its answer, and the failure is reported.
        if let Some(undecided) = decision.verdict.undecided.first()
            && context.core.policy.blkverify
        {
            context.effects.contents_differ(*undecided);
        }
        let shared = context.shared();
        let (in_service, began) =
            shared.health(|health| (health.in_service(), health.failure_epoch()));
        let mut pending = Vec::new();
        if let Some(winner) = &decision.winner {
            let repairs = Repairs {
                range: self.replies.range(),
                verdict: &decision.verdict,
                winner,
                losers: self.terms.repairs_losers,
                settled: &decision.verdict.excused,
                throughout: self.terms.throughout,
                block_sectors: context.core.policy.block_sectors,
            };
            let writes = repairs.writes().into_iter();
            for write in writes.filter(|write| in_service.contains(write.replica)) {
                pending.push(write);
                context.submit(write.replica, self.action(&write, winner));
            }
        }
        self.asked_at = context.now();
        self.step = Step::Repairing { began, pending };
        self.finish_if_repaired(context)
    }

    fn action(&self, write: &RepairWrite, winner: &Rc<Buffer>) -> Action {
        if write.zero {
            Action::Zero {
                range: write.range,
                unmap: true,
            }
        } else {
            Action::Write {
                range: write.range,
                data: Rc::clone(winner),
                offset_bytes: bytes_of(write.range, self.replies.range()).start,
            }
        }
    }

    /// The end of a repairing write.
    fn repaired(&mut self, reply: &Reply, context: &mut Context<'_, impl Effects>) -> Next {
        let Step::Repairing { began, pending } = &mut self.step else {
            unreachable!("a repairing write ends while repairing");
        };
        let (_, range) = reply.action.describe();
        let is_read = matches!(reply.action, Action::Read { .. });
        let is_this = |write: &RepairWrite| {
            (write.replica, write.range) == (reply.replica, range) && !is_read
        };
        let Some(index) = pending.iter().position(is_this) else {
            return Next::Wait;
        };
        let kind = pending.remove(index).kind;
        let began = *began;
        let shared = context.shared();
        if reply.result.is_ok() {
            shared.change_health(|health| health.repaired(reply.replica, range, began));
        }
        match reply.result {
            Ok(()) => {
                self.outcome.written += range.count;
                if self.terms.is_resync || kind == RepairKind::Settled {
                    let fact = Fact::SectorsResynced(reply.replica, range.count);
                    context.effects.count(fact);
                } else {
                    context.effects.repaired(reply.replica, range);
                }
            }
            Err(errno) => {
                self.outcome.not_written += range.count;
                let fact = Fact::SectorsNotRepaired(reply.replica, range.count);
                context.effects.count(fact);
                context.report_error(reply.replica, OperationType::Write, range, errno);
            }
        }
        self.finish_if_repaired(context)
    }

    fn finish_if_repaired(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        if matches!(&self.step, Step::Repairing { pending, .. } if !pending.is_empty()) {
            return Next::Wait;
        }
        assert!(
            !self.waits_for_lock() && self.replies.tally().is_complete(),
            "finished under the lock, with all replies"
        );
        context.unlock(self.lock);
        context.core.confirmations -= 1;
        self.replies.recycle(context.core);
        Next::Done(self.outcome)
    }

    pub(super) fn tally(&self) -> &Tally {
        self.replies.tally()
    }

    pub(super) fn waits_for_lock(&self) -> bool {
        matches!(self.step, Step::WaitingForLock)
    }

    /// What the replicas are doing for this confirmation.
    pub(super) fn operation(&self) -> OperationType {
        match &self.step {
            Step::Repairing { .. } => OperationType::Write,
            Step::WaitingForLock | Step::Asking | Step::Decided => OperationType::Read,
        }
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        if self.asked_at > limit {
            return ReplicaSet::EMPTY;
        }
        match &self.step {
            Step::Repairing { pending, .. } => pending.iter().map(|write| write.replica).collect(),
            Step::WaitingForLock | Step::Asking | Step::Decided => self.replies.tally().waiting(),
        }
    }

    /// How many operations the confirmation waits for. There may be several on a replica.
    pub(super) fn operations_waited_for(&self) -> usize {
        match &self.step {
            Step::Repairing { pending, .. } => pending.len(),
            Step::WaitingForLock | Step::Asking | Step::Decided => {
                self.replies.tally().waiting().len()
            }
        }
    }

    /// The replicas that the confirmation has asked, or will write to.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        let asked = self.replies.tally().asked().or(self.terms.throughout);
        asked.or(self.waiting_since(Duration::MAX))
    }
}

fn sectors(runs: &[SectorRange]) -> u64 {
    runs.iter().map(|run| run.count).sum()
}
