//! A read under the lock of its range: replicas that differ now are corrupt (R2, R3, R5, R6).
//!
//! While the lock is held no write can change the range, so the replies are compared sector by
//! sector; the losers are reported, and repaired before the lock is released. A replica that could
//! not read the range is read again in smaller parts (R4, [`probing`](super::probing)), and
//! repaired where it is unreadable. The same path resyncs a stale replica, which is repaired
//! throughout.
//!
//! A confirmation knows neither guest nor job. Each input returns what its owner must do [`Next`]:
//! answer, call [`Confirmation::repair`], or finish with what was found.
//!
//! ```text
//! waiting for the lock ─► asking ───────────► decided ─► repairing ───────────► done
//!                            └──► probing ──────┘             └──► flushing ─────┘
//! ```

mod preferring;
mod repairing;
mod settling;

use std::rc::Rc;
use std::time::Duration;

use self::preferring::Preference;
use self::repairing::not_written;
use self::settling::Postponed;
use super::context::{Context, Core};
use super::decision::{Decision, assemble, ballots};
use super::interface::Effects;
use super::lateness::{Kind, Out};
use super::probing::Probing;
use super::range_locks::LockKey;
use super::repair::{RepairKind, RepairWrite, decided};
use super::replies::Replies;
use super::survey::{Survey, Unreadable};
use crate::common::buffer::Buffer;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::report::{Cause, Fact, Report};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::ChunkEnd;
use crate::limits::FAILED_PARTS_MAX;
use crate::quorum::health::{Disputed, FailureEpoch};
use crate::quorum::tally::Tally;
use crate::quorum::vote::{Rule, Verdict, decisive_votes, vote};

#[derive(Debug)]
pub(super) struct Confirmation {
    lock: LockKey,
    terms: Terms,
    replies: Replies,
    /// When the operations of this step were submitted.
    asked_at: Duration,
    step: Step,
    /// Of replicas that failed.
    surveys: Vec<Survey>,
    /// When the votes were counted.
    voted_at: FailureEpoch,
    /// The winner, as long as the guest must not have it: too few replicas hold it (W7).
    withheld: Option<Rc<Buffer>>,
    /// What the vote decides when the winner is written and flushed.
    postponed: Postponed,
    /// Where doubtful copies were needed for it.
    voted: Vec<SectorRange>,
    /// A replica has failed while it was withheld.
    outdated: bool,
    /// What the preferred replica holds, and is being written.
    preferences: Vec<Preference>,
    /// What was found and done.
    end: ChunkEnd,
}

/// What a confirmation is for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) rule: Rule,
    /// Replicas to be repaired wherever they are stale and there is a winner. They are asked only
    /// where their copies may be needed.
    pub(super) throughout: ReplicaSet,
    /// Repair replicas where they lose the vote or are unreadable.
    pub(super) repairs_losers: bool,
    /// The operator has asked for these repairs: no limit holds (O5).
    pub(super) is_asked: bool,
    /// If they cannot read the range, find all blocks of these that are unreadable; of the others
    /// only where there is no winner without them.
    pub(super) locates: ReplicaSet,
    /// Scrub the neighbourhood of corrupt and unreadable sectors.
    pub(super) spreads: bool,
    /// Return the winner as soon as the replies that are out cannot change it (R7).
    pub(super) answers_early: bool,
    /// A resync: what it writes was stale.
    pub(super) is_resync: bool,
    /// Where there is no winner, what this replica holds is to be written to the others (W12).
    pub(super) prefers: Option<ReplicaIndex>,
    /// Search long for what can be read of replicas that fail: no other read comes back to it.
    pub(super) searches_long: bool,
    /// These have failed while what an earlier vote for this had decided was written. If one of
    /// them fails again, no further vote is taken.
    pub(super) failed_before: ReplicaSet,
}

#[derive(Debug)]
enum Step {
    WaitingForLock,
    Asking,
    /// Replicas that failed are read in smaller parts.
    Probing(Box<Probing>),
    Decided,
    /// The writes of the winner that are out.
    Repairing {
        began: FailureEpoch,
        pending: Vec<RepairWrite>,
    },
    /// What was written must be durable before it is decided (S5).
    Flushing,
}

/// What the owner of a confirmation does after an input.
#[derive(Debug)]
pub(super) enum Next {
    /// Wait for the next input.
    Wait,
    /// Answer with these bytes; the rest only matters to the operator.
    Answer(Buffer),
    /// Answer that some sector has no winner; the rest only matters to the operator.
    Fail,
    /// Answer according to the decision, then call [`Confirmation::repair`] with it.
    Decided(Decision),
    /// Finish: the lock is released.
    Done(ChunkEnd),
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
            surveys: Vec::new(),
            voted_at: FailureEpoch::default(),
            withheld: None,
            postponed: Postponed::default(),
            voted: Vec::new(),
            outdated: false,
            preferences: Vec::new(),
            end: ChunkEnd::default(),
        }
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        assert!(self.waits_for_lock(), "a lock is granted once");
        if matches!(self.step, Step::Flushing) {
            return self.finish(context);
        }
        if self.waits_for_marks(context) {
            return Next::Wait;
        }
        self.take_threshold(context.core);
        self.step = Step::Asking;
        self.asked_at = context.now();
        let in_service = context.shared().in_service();
        let mut asked = in_service.without(self.terms.throughout);
        if self.terms.is_resync {
            // Its copy may be needed to win the vote: it is doubtful (W7), or stale only in part.
            let range = self.replies.range();
            let needed = context.shared().health(|health| {
                let is_fresh = |replica| health.stale_parts(replica, range) != [range];
                let throughout = self.terms.throughout.iter();
                let partly: ReplicaSet = throughout.filter(|replica| is_fresh(*replica)).collect();
                health.doubtful_in(range).or(partly)
            });
            asked = asked.or(in_service.and(needed));
        }
        self.replies.ask(asked, context);
        self.count(context)
    }

    pub(super) fn reply(&mut self, reply: Reply, context: &mut Context<'_, impl Effects>) -> Next {
        match &self.step {
            Step::Asking if self.replies.tally().waiting().contains(reply.replica) => {
                self.replies.record(reply, self.asked_at, context);
                self.count(context)
            }
            Step::Probing(_) => self.part_read(reply, context),
            Step::Repairing { .. } => self.repaired(&reply, context),
            // The reply to a first pass that ended without it.
            Step::WaitingForLock | Step::Asking | Step::Decided | Step::Flushing => Next::Wait,
        }
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Next {
        match &mut self.step {
            Step::WaitingForLock | Step::Decided | Step::Flushing => Next::Wait,
            Step::Asking => {
                self.replies.forget(evicted);
                self.count(context)
            }
            Step::Probing(probing) => {
                probing.forget(evicted);
                self.probe(context)
            }
            Step::Repairing { pending, .. } => {
                // Their writes may still happen, perhaps after newer ones.
                for write in pending.extract_if(.., |write| evicted.contains(write.replica)) {
                    let shared = context.shared();
                    let was_corrupt = write.kind == RepairKind::Corrupt;
                    if write.kind != RepairKind::Preferred {
                        shared.change_health(|health| {
                            health.repair_orphaned(write.replica, write.range, was_corrupt);
                        });
                    }
                    not_written(&mut self.end, &write);
                }
                self.forget_preferred(evicted);
                self.finish_if_repaired(context)
            }
        }
    }

    /// Decides if all replies are in, or if those that are out cannot change the winner.
    fn count(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        if self.replies.tally().is_complete() {
            return self.replied(context);
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
        let enough = decisive_votes(threshold, succeeded + waiting);
        if !self.terms.answers_early || succeeded < enough {
            return None;
        }
        let disputed = self.disputed(core);
        if !disputed.is_empty() {
            // Each reply decides where another version must be replaced.
            return None;
        }
        let verdict = self.vote(Rule::Threshold(enough), &disputed, core);
        let decided = verdict.undecided.is_empty();
        decided
            .then(|| assemble(&self.replies, &verdict, core))
            .flatten()
    }

    /// The vote of the replicas that could read all of the range.
    fn vote(&self, rule: Rule, disputed: &Disputed, core: &Core) -> Verdict {
        let ballots = ballots(&self.replies, &[], disputed, core);
        vote(self.replies.range(), &ballots, rule, &disputed.unrecovered)
    }

    /// Where a difference is no fault (W7).
    fn disputed(&self, core: &Core) -> Disputed {
        let range = self.replies.range();
        let needed = self.needed();
        core.shared.health(|health| health.disputed(range, needed))
    }

    /// The votes are counted with the threshold of this moment (W10).
    fn take_threshold(&mut self, core: &Core) {
        if let Rule::Threshold(threshold) = &mut self.terms.rule {
            *threshold = core.threshold();
        }
    }

    /// The threshold by which the votes were counted, or are to be.
    pub(super) fn threshold(&self) -> Option<usize> {
        match self.terms.rule {
            Rule::Threshold(threshold) => Some(threshold),
            Rule::FirstListed => None,
        }
    }

    /// How many votes win.
    fn needed(&self) -> usize {
        match self.terms.rule {
            Rule::Threshold(threshold) => threshold,
            Rule::FirstListed => 1,
        }
    }

    /// How many replicas must hold the winner at the end. `None`: as many as the threshold is then.
    fn needed_now(&self) -> Option<usize> {
        match self.terms.rule {
            Rule::Threshold(_) => None,
            Rule::FirstListed => Some(1),
        }
    }

    /// All replies are in, and no write can have run meanwhile.
    fn replied(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        self.take_threshold(context.core);
        // Before the vote, so that a failure during it counts as later.
        let epoch = context.shared().failure_epoch();
        self.voted_at = epoch;
        let disputed = self.disputed(context.core);
        let verdict = self.vote(self.terms.rule, &disputed, context.core);
        let failed = self.replies.tally().failed();
        if failed.is_empty() {
            return self.decide(verdict, &disputed, context);
        }
        let (now, range) = (context.now(), self.replies.range());
        let allowed = failed.iter().map(|replica| match self.terms.searches_long {
            true => context.core.read_errors.failed_parts_of_job(replica, now),
            false => FAILED_PARTS_MAX,
        });
        let allowed: Vec<u64> = allowed.collect();
        let core = &*context.core;
        let surveys = core.shared.health(|health| {
            let survey = |(replica, allowed)| {
                let stale = health.stale_parts(replica, range);
                let block_sectors = core.policy.block_sectors;
                Survey::new(replica, range, block_sectors, &stale, allowed)
            };
            failed.iter().zip(allowed).map(survey).collect()
        });
        let (locates, guest_waits) = (self.terms.locates, self.terms.answers_early);
        let probing = Probing::new(range, surveys, (verdict, epoch), locates, guest_waits);
        self.step = Step::Probing(Box::new(probing));
        self.probe(context)
    }

    /// Reads the next parts of a replica that failed, or decides.
    fn probe(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        let votes = self.needed();
        let Step::Probing(probing) = &mut self.step else {
            unreachable!("probed while probing");
        };
        if !probing.pending().is_empty() {
            return Next::Wait;
        }
        let core = &*context.core;
        probing.forget(core.shared.out_of_service());
        let range = self.replies.range();
        let disputed = core.shared.health(|health| health.disputed(range, votes));
        let ballots = ballots(&self.replies, probing.surveys(), &disputed, core);
        let epoch = core.shared.failure_epoch();
        let any_copy = &disputed.unrecovered[..];
        probing.count(&ballots, (self.terms.rule, any_copy), epoch);
        let succeeded = self.replies.tally().succeeded();
        let voters = ballots
            .into_iter()
            .filter(|ballot| succeeded.contains(ballot.replica));
        let excluded: Vec<_> = voters.map(|ballot| ballot.stale).collect();
        let (parts, answers) = probing.next((votes, any_copy), &excluded);
        let Some((replica, parts)) = parts else {
            return self.probed(context);
        };
        let is_won = probing.verdict.undecided.is_empty();
        // Where a failed write or flush is decided, the guest waits until that is final.
        let answers = answers && (!is_won || disputed.is_empty());
        let winner = (answers && is_won).then(|| assemble(&self.replies, &probing.verdict, core));
        self.asked_at = context.now();
        self.replies.ask_for_parts(replica, &parts, context);
        self.terms.answers_early &= !answers;
        match winner.flatten() {
            Some(winner) => Next::Answer(winner),
            None if answers => Next::Fail,
            None => Next::Wait,
        }
    }

    /// The end of a read of a part.
    fn part_read(&mut self, reply: Reply, context: &mut Context<'_, impl Effects>) -> Next {
        let Step::Probing(probing) = &mut self.step else {
            unreachable!("a part is read while probing");
        };
        let Some(part) = probing.reply(&reply) else {
            return Next::Wait;
        };
        self.observe(Kind::Read, reply.replica, context);
        if let (Ok(()), Action::Read { into, .. }) = (reply.result, reply.action) {
            self.replies.record_part(reply.replica, part, &into);
        }
        self.probe(context)
    }

    /// A replica has done what it was asked last: the others may take as long (W6).
    fn observe(&self, kind: Kind, replica: ReplicaIndex, context: &mut Context<'_, impl Effects>) {
        let now = context.now();
        let taken = now.saturating_sub(self.asked_at);
        let lateness = &mut context.core.lateness;
        lateness.observe(kind, replica, taken, now);
    }

    /// The search is over.
    fn probed(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        let Step::Probing(probing) = std::mem::replace(&mut self.step, Step::Decided) else {
            unreachable!("probed while probing");
        };
        let (mut verdict, surveys) = probing.into_parts();
        self.voted_at = context.shared().failure_epoch();
        let disputed = self.disputed(context.core);
        if let Some(winner) = assemble(&self.replies, &verdict, context.core) {
            // Also those that have voted: one may have become stale since.
            for ballot in ballots(&self.replies, &surveys, &disputed, context.core) {
                verdict.compare(self.replies.range(), &ballot, self.terms.rule, &winner);
            }
        }
        for survey in &surveys {
            for Unreadable { range, errno } in survey.unreadable() {
                self.end.on(survey.replica).unreadable.push(range);
                if let Some(errno) = errno {
                    context.report_error(survey.replica, OperationType::Read, range, errno);
                }
            }
            if self.terms.searches_long && !survey.was_in_vain() {
                context.core.read_errors.was_worth_it(survey.replica);
            }
            if survey.has_given_up() && !self.terms.repairs_losers {
                let now = context.now();
                context.core.read_errors.rest(survey.replica, now);
            }
        }
        self.surveys = surveys;
        self.decide(verdict, &disputed, context)
    }

    /// The votes are counted.
    fn decide(
        &mut self,
        mut verdict: Verdict,
        disputed: &Disputed,
        context: &mut Context<'_, impl Effects>,
    ) -> Next {
        assert!(self.replies.tally().is_complete(), "decided too early");
        self.step = Step::Decided;
        let unanimous = verdict.dissents.is_empty() && verdict.undecided.is_empty();
        if unanimous && self.terms.throughout.is_empty() && self.surveys.is_empty() {
            context.effects.count(Fact::ConfirmationWithoutFault);
        }
        self.report_losers(&verdict, context);
        let settled = self.settle(disputed, &verdict, context);
        self.note_undecided(&verdict, context);
        self.spread(&verdict, context);
        self.preferences = self.prefer(&mut verdict, disputed, context);
        self.note_unread(&verdict.undecided, context);
        self.end.undecided.clone_from(&verdict.undecided);
        let winner = assemble(&self.replies, &verdict, context.core).map(Rc::new);
        let lacks = !self.postponed.is_empty() || !disputed.lacking.is_empty();
        let waits = verdict.undecided.is_empty() && lacks;
        self.withheld = winner.clone().filter(|_| waits);
        self.voted.clone_from(&disputed.lacking);
        let differs = self.first_difference(disputed, &verdict, context.core);
        Next::Decided(Decision {
            verdict,
            winner,
            settled,
            waits,
            differs,
        })
    }

    fn note_unread(&mut self, undecided: &[SectorRange], context: &Context<'_, impl Effects>) {
        let succeeded = self.replies.tally().succeeded();
        let unread = context.core.unread(self.replies.range(), succeeded);
        let unread = unread.without(self.terms.throughout);
        let (read, not_read) = self.dealt_with(undecided, context.core);
        self.end.unread = unread.without(read).or(not_read);
    }

    /// Of the replicas that failed: those that are read in smaller parts by now, or about to be
    /// repaired where that is impossible; and the others.
    fn dealt_with(&self, undecided: &[SectorRange], core: &Core) -> (ReplicaSet, ReplicaSet) {
        let block_sectors = core.policy.block_sectors;
        let is_read = |survey: &&Survey| {
            let runs = survey.unreadable().into_iter().map(|run| run.range);
            let runs: Vec<_> = runs.collect();
            let is_repaired =
                || self.terms.repairs_losers && decided(&runs, undecided, block_sectors) == runs;
            survey.is_complete() && (runs.is_empty() || is_repaired())
        };
        let (read, not_read): (Vec<&Survey>, _) = self.surveys.iter().partition(is_read);
        let replicas = |surveys: Vec<&Survey>| surveys.iter().map(|s| s.replica).collect();
        (replicas(read), replicas(not_read))
    }

    fn report_losers(&mut self, verdict: &Verdict, context: &mut Context<'_, impl Effects>) {
        for dissent in &verdict.dissents {
            context.effects.report(Report::Bad {
                replica: dissent.replica,
                operation: OperationType::Read,
                range: self.replies.range(),
                cause: Cause::Corrupt(dissent.evidence()),
            });
            let found = self.end.on(dissent.replica);
            found.corrupt.clone_from(&dissent.bad_sectors);
        }
    }

    /// Has the neighbourhood of corrupt and unreadable sectors scrubbed.
    fn spread(&self, verdict: &Verdict, context: &mut Context<'_, impl Effects>) {
        let dissents = verdict.dissents.iter();
        let corrupt = dissents.flat_map(|dissent| dissent.bad_sectors.iter().copied());
        // What is unreadable nearly everywhere has no neighbourhood.
        let surveys = self.surveys.iter().filter(|survey| !survey.has_given_up());
        let unreadable = surveys.flat_map(Survey::unreadable).map(|run| run.range);
        let (first, last) = corrupt
            .chain(unreadable)
            .fold((u64::MAX, 0), |(first, last), run| {
                (first.min(run.start), last.max(run.end()))
            });
        if first < last && self.terms.spreads {
            context.scrub_around(SectorRange::new(first, last - first));
        }
    }

    pub(super) fn tally(&self) -> &Tally {
        self.replies.tally()
    }

    /// For that of its range, or until a flush has ended.
    pub(super) fn waits_for_lock(&self) -> bool {
        matches!(self.step, Step::WaitingForLock | Step::Flushing)
    }

    /// What the replicas are doing for this confirmation.
    pub(super) fn operation(&self) -> OperationType {
        match &self.step {
            Step::Repairing { .. } | Step::Flushing => OperationType::Write,
            Step::WaitingForLock | Step::Asking | Step::Probing(_) | Step::Decided => {
                OperationType::Read
            }
        }
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        if self.asked_at > limit {
            return ReplicaSet::EMPTY;
        }
        match &self.step {
            Step::Repairing { pending, .. } => pending.iter().map(|write| write.replica).collect(),
            Step::Probing(probing) => probing
                .pending()
                .iter()
                .map(|(replica, _)| *replica)
                .collect(),
            Step::WaitingForLock | Step::Asking | Step::Decided => self.replies.tally().waiting(),
            Step::Flushing => ReplicaSet::EMPTY,
        }
    }

    /// What the confirmation waits for.
    pub(super) fn out(&self, kind: Kind) -> Out {
        let tally = self.replies.tally();
        let repairs = matches!(self.step, Step::Repairing { .. });
        let (kind, needed) = match self.terms.rule {
            // Without a repair the sectors are as bad as before.
            _ if repairs && kind == Kind::Read => (Kind::Write, 0),
            _ if repairs => (kind, 0),
            // Nothing waits for an answer from the parts.
            _ if matches!(self.step, Step::Probing(_)) && !self.terms.answers_early => (kind, 0),
            Rule::Threshold(threshold) => (kind, threshold),
            Rule::FirstListed => (kind, 1),
        };
        Out {
            kind,
            asked_at: self.asked_at,
            later: (ReplicaSet::EMPTY, Duration::ZERO),
            waiting: self.waiting_since(Duration::MAX),
            done: tally.succeeded(),
            needed,
            waits_for_all: false,
        }
    }

    /// How many operations the confirmation waits for. There may be several on a replica.
    pub(super) fn operations_waited_for(&self) -> usize {
        match &self.step {
            Step::Repairing { pending, .. } => pending.len(),
            Step::Probing(probing) => probing.pending().len(),
            Step::WaitingForLock | Step::Asking | Step::Decided => {
                self.replies.tally().waiting().len()
            }
            Step::Flushing => 0,
        }
    }

    /// The replicas that the confirmation has asked, or will write to.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        let asked = self.replies.tally().asked().or(self.terms.throughout);
        let asked = asked.or(self.has_preferred());
        asked.or(self.waiting_since(Duration::MAX))
    }
}
