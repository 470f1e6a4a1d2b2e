//! A series of writes to the records of the replicas, and the answers that wait for its end (S2).
//!
//! One runs at a time, of all engines: it has a lock of its own. What it is for is decided when it
//! holds the lock, so one that waits covers all that comes until then.

use std::time::Duration;

use super::context::{Context, Core, FollowUp, Progress, Suspicion};
use super::flush::NO_RANGE;
use super::interface::{Effects, Failed, Mark, Tag};
use super::lateness::{Kind, Out};
use super::memory::{Goal, Step};
use super::range_locks::LockKey;
use crate::common::operation::{Action, OperationType, Reply, RequestId};
use crate::common::report::{Report, Requester};
use crate::common::{ReplicaSet, SectorRange};
use crate::limits::SWEEP_TIMEOUTS;
use crate::quorum::tally::Tally;

/// The range of the lock that those of all engines share: no disk has this sector.
const REMEMBER_LOCK: SectorRange = SectorRange {
    start: u64::MAX / 2 + 1,
    count: 1,
};

#[derive(Debug)]
pub(super) struct Remember {
    lock: LockKey,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    WaitingForLock,
    Writing {
        goal: Goal,
        tally: Tally,
        /// The replicas that were evicted since they were asked. One that has rejoined is in
        /// service again, and is written to anew.
        left: ReplicaSet,
        /// Others in service then: their records have what is written, or it is their turn next.
        others: ReplicaSet,
        asked_at: Duration,
    },
}

/// What an engine has waiting for the records.
#[derive(Debug, Default)]
pub(super) struct Withheld {
    answers: Vec<Answer>,
    /// What writes and holds the lock of its range, until it is marked.
    unmarked: Vec<RequestId>,
    /// Those of them whose range cannot be marked.
    refused: Vec<RequestId>,
    /// A [`Remember`] is going to begin that covers all this.
    is_covered: bool,
    /// The next one takes marks away.
    sweeps: bool,
    /// The last one has failed: none is begun before, unless something waits for it.
    rests_until: Duration,
    /// No marks are taken away before.
    swept_until: Duration,
}

/// An answer that depends on what the records do not say yet.
#[derive(Debug)]
struct Answer {
    tag: Tag,
    /// What the guest has asked for.
    request: (OperationType, SectorRange),
    content: Content,
    /// What the records have to say before, as `Health::memory` counts it.
    memory: u64,
    /// How many writes had a quorum then.
    counted: u64,
    /// A replica had no space left for it.
    no_space: bool,
    /// How often votes had undone something when it was ready.
    times_undone: u64,
}

#[derive(Debug)]
enum Content {
    /// What was read; nothing of other requests.
    Data(Vec<u8>),
    /// A durable write.
    Flushed(Mark),
}

impl Withheld {
    /// Answers that the guest waits for.
    pub(super) fn answers(&self) -> usize {
        self.answers.len()
    }

    /// Whether the answer with this tag waits.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn has_answer(&self, tag: Tag) -> bool {
        self.answers.iter().any(|answer| answer.tag == tag)
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.answers.is_empty() && self.unmarked.is_empty() && self.refused.is_empty()
    }

    /// Whether a [`Remember`] is going to begin.
    pub(super) fn is_covered(&self) -> bool {
        self.is_covered
    }

    /// Whether the write may not be made. It is asked for once.
    pub(super) fn take_refused(&mut self, writer: RequestId) -> bool {
        let place = self.refused.iter().position(|refused| *refused == writer);
        place.is_some_and(|place| {
            self.refused.swap_remove(place);
            true
        })
    }
}

impl Core {
    /// Has the records written as soon as it is the turn of this engine.
    pub(super) fn have_remembered(&mut self) {
        if !self.withheld.is_covered {
            self.withheld.is_covered = true;
            self.follow_ups.push_back(FollowUp::Remember);
        }
    }

    /// The same, and marks taken away that are needed no more.
    pub(super) fn have_swept(&mut self, now: Duration) {
        self.withheld.sweeps = true;
        self.withheld.swept_until = now + self.policy.replica_timeout * SWEEP_TIMEOUTS;
        self.have_remembered();
    }

    /// When the records are to be written although no answer waits for it. `None`: not before
    /// something changes.
    #[inline]
    pub(super) fn records_due(&self) -> Option<Duration> {
        let withheld = &self.withheld;
        if !self.runs_jobs() || withheld.is_covered {
            None
        } else if !self.shared.is_remembered() {
            Some(withheld.rests_until)
        } else {
            let swept_at = withheld.swept_until.max(withheld.rests_until);
            self.shared.is_sweepable().then_some(swept_at)
        }
    }

    /// The request has its lock, and is to write when its range is marked (S4).
    #[cold]
    pub(super) fn wait_for_marks(&mut self, writer: RequestId) {
        self.withheld.unmarked.push(writer);
        self.have_remembered();
    }
}

impl<E: Effects> Context<'_, E> {
    /// Answers the guest with success, when the records say all that this depends on (S2).
    #[inline]
    pub(super) fn succeed(&mut self, tag: Tag, request: (OperationType, SectorRange), data: &[u8]) {
        if self.core.shared.is_remembered() {
            self.effects.complete(tag, Ok(data));
        } else {
            self.withhold(tag, request, Content::Data(data.to_vec()));
        }
    }

    /// The same, for a write that is durable.
    pub(super) fn flushed(&mut self, tag: Tag, range: SectorRange, mark: Mark) {
        if self.core.shared.is_remembered() {
            self.effects.flushed(tag, mark);
        } else {
            let request = (OperationType::Write, range);
            self.withhold(tag, request, Content::Flushed(mark));
        }
    }

    #[cold]
    fn withhold(&mut self, tag: Tag, request: (OperationType, SectorRange), content: Content) {
        let (memory, _) = self.core.shared.memory();
        let shared = &self.core.shared;
        let (counted, times_undone) =
            shared.health(|health| (health.counted_writes(), health.times_undone()));
        let no_space = self.core.had_no_space(self.id);
        self.core.withheld.answers.push(Answer {
            tag,
            request,
            content,
            memory,
            counted,
            no_space,
            times_undone,
        });
        self.core.have_remembered();
    }

    /// The records say more than before.
    fn release_answers(&mut self) {
        let (_, durable) = self.core.shared.memory();
        let answers = &mut self.core.withheld.answers;
        for answer in answers.extract_if(.., |answer| answer.memory <= durable) {
            if answer.request.0 == OperationType::Write {
                let counted = answer.counted;
                let shared = &self.core.shared;
                shared.change_health(|health| health.answered_late(counted));
            }
            let (operation, range) = answer.request;
            let is_undone = operation == OperationType::Read
                && self.core.shared.health(|health| {
                    health.times_undone() != answer.times_undone && health.is_undone(range)
                });
            match answer.content {
                Content::Data(_) if is_undone => {
                    // A replica has lost what it brought, and another version has won since.
                    let tag = answer.tag;
                    let again = FollowUp::Confirm(Suspicion {
                        tag,
                        range,
                        failed: ReplicaSet::EMPTY,
                    });
                    self.core.follow_ups.push_back(again);
                }
                Content::Data(data) => self.effects.complete(answer.tag, Ok(&data)),
                Content::Flushed(mark) => self.effects.flushed(answer.tag, mark),
            }
        }
    }

    /// The records cannot say what these answers depend on.
    #[cold]
    fn fail_answers(&mut self, memory: u64) {
        let answers = &mut self.core.withheld.answers;
        let lost: Vec<_> = answers
            .extract_if(.., |answer| answer.memory <= memory)
            .collect();
        for answer in lost {
            let (operation, range) = answer.request;
            let for_record = self.core.had_no_space(self.id);
            let no_space = answer.no_space || for_record;
            let failed = self.report_failed(Requester::Guest, operation, range, no_space);
            let is_flushed = matches!(answer.content, Content::Flushed(_));
            let by_flush = is_flushed || operation == OperationType::Flush;
            let failed = Failed { by_flush, ..failed };
            self.effects.complete(answer.tag, Err(failed));
        }
    }
}

impl Remember {
    pub(super) fn begin(context: &mut Context<'_, impl Effects>) -> Self {
        Self {
            lock: context.lock(REMEMBER_LOCK),
            stage: Stage::WaitingForLock,
        }
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        assert!(self.waits_for_lock(), "a lock is granted once");
        let withheld = &mut context.core.withheld;
        withheld.is_covered = false;
        let sweeps = std::mem::take(&mut withheld.sweeps);
        let goal = context.shared().begin_remembering(sweeps);
        self.go_on(goal, context)
    }

    pub(super) fn reply(
        &mut self,
        reply: &Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        let Stage::Writing {
            tally, asked_at, ..
        } = &mut self.stage
        else {
            unreachable!("a reply comes to an operation in flight");
        };
        let replica = reply.replica;
        if !tally.waiting().contains(replica) {
            return Progress::Waiting;
        }
        tally.record(replica, reply.result.is_ok());
        let now = context.now();
        let taken = now.saturating_sub(*asked_at);
        let lateness = &mut context.core.lateness;
        lateness.observe(Kind::Flush, replica, taken, now);
        if let Err(errno) = reply.result {
            context.report_error(replica, OperationType::Write, NO_RANGE, errno);
        }
        self.finish_if_complete(context)
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        match &mut self.stage {
            Stage::Writing { tally, left, .. } => {
                tally.forget(evicted);
                *left = left.or(evicted);
            }
            Stage::WaitingForLock => return Progress::Waiting,
        }
        self.finish_if_complete(context)
    }

    fn finish_if_complete(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::Writing {
            goal, tally, left, ..
        } = &self.stage
        else {
            unreachable!("finished while writing");
        };
        if !tally.is_complete() {
            return Progress::Waiting;
        }
        let (goal, tally, left) = (goal.clone(), *tally, *left);
        let shared = context.shared();
        shared.record_step_ended(tally.succeeded(), tally.failed());
        if tally.asked().without(tally.succeeded()).is_empty() {
            return self.go_on(goal, context);
        }
        // One whose record is not written is out of service, or the disk cannot go on.
        let failed = tally.failed().without(left);
        for replica in failed.and(context.shared().in_service()).iter() {
            if !context.shared().evict(replica) {
                return self.fail(&goal, context);
            }
            context.effects.report(Report::Evicted(replica));
            context.effects.health_changed();
        }
        let goal = context.shared().begin_remembering(false);
        self.go_on(goal, context)
    }

    /// Makes the next writes for the goal, if there are any.
    fn go_on(&mut self, goal: Goal, context: &mut Context<'_, impl Effects>) -> Progress {
        let round = match context.shared().next_record_step(&goal) {
            Step::Write(round) => round,
            Step::Reached => {
                context.release_answers();
                let core = &mut *context.core;
                core.granted.extend(core.withheld.unmarked.drain(..));
                return self.retire(context);
            }
            Step::Blocked => return self.fail(&goal, context),
        };
        let asked: ReplicaSet = round.writes.iter().map(|(replica, _)| *replica).collect();
        let in_service = context.shared().in_service();
        if !asked.without(in_service).is_empty() {
            // One was evicted since: the records are to say that.
            context.shared().record_step_left_out();
            let goal = context.shared().begin_remembering(false);
            return self.go_on(goal, context);
        }
        self.stage = Stage::Writing {
            goal,
            tally: Tally::new(asked),
            left: ReplicaSet::EMPTY,
            others: in_service.without(asked),
            asked_at: context.now(),
        };
        for (replica, write) in round.writes {
            let action = Action::Record {
                offset_bytes: write.offset_bytes,
                bytes: write.bytes,
            };
            context.submit(replica, action);
        }
        Progress::Waiting
    }

    /// What depends on it fails. The next one tries again.
    #[cold]
    fn fail(&self, goal: &Goal, context: &mut Context<'_, impl Effects>) -> Progress {
        context.fail_answers(goal.memory());
        let now = context.now();
        let core = &mut *context.core;
        core.withheld.rests_until = now + core.policy.replica_timeout;
        let unmarked = std::mem::take(&mut core.withheld.unmarked);
        core.granted.extend(&unmarked);
        core.withheld.refused.extend(unmarked);
        self.retire(context)
    }

    fn retire(&self, context: &mut Context<'_, impl Effects>) -> Progress {
        context.unlock(self.lock);
        Progress::Retired
    }

    /// The replicas whose records are being written.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        self.tally().map_or(ReplicaSet::EMPTY, Tally::asked)
    }

    /// The replicas that are evicted at the end of the series, unless they were before.
    pub(super) fn failed(&self) -> ReplicaSet {
        self.tally().map_or(ReplicaSet::EMPTY, Tally::failed)
    }

    pub(super) fn tally(&self) -> Option<&Tally> {
        match &self.stage {
            Stage::Writing { tally, .. } => Some(tally),
            Stage::WaitingForLock => None,
        }
    }

    pub(super) fn waits_for_lock(&self) -> bool {
        matches!(self.stage, Stage::WaitingForLock)
    }

    /// What it waits for, once it has its lock.
    pub(super) fn out(&self, threshold: usize) -> Option<Out> {
        let Stage::Writing {
            tally,
            others,
            asked_at,
            ..
        } = &self.stage
        else {
            return None;
        };
        Some(Out {
            kind: Kind::Flush,
            asked_at: *asked_at,
            later: (ReplicaSet::EMPTY, Duration::ZERO),
            waiting: tally.waiting(),
            done: tally.succeeded().or(*others),
            needed: threshold,
            waits_for_all: true,
        })
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match &self.stage {
            Stage::Writing {
                tally, asked_at, ..
            } if *asked_at <= limit => tally.waiting(),
            Stage::Writing { .. } | Stage::WaitingForLock => ReplicaSet::EMPTY,
        }
    }
}
