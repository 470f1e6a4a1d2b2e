//! A guest read: ask, compare, and where replies differ repeat the read while no write can run (R1
//! to R9).
//!
//! The first asking, which this file is about, takes no lock. Writes in flight may then make
//! replicas differ for a moment, so a difference is only a suspicion: the read is repeated under
//! the range lock, see [`confirm`](super::confirm).

use std::time::Duration;

use super::confirm::Confirmation;
use super::mutant::{Mutant, is_broken};
use super::{Core, Counters, Effects, Failed, Progress, ReadPattern, Tag, report_error};
use crate::common::buffer::Buffer;
use crate::common::operation::OperationType;
use crate::common::operation::{Action, Operation, Reply, RequestId};
use crate::common::report::Report;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::ChunkId;
use crate::quorum::health::FailureEpoch;
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) struct Read {
    /// `None` once the guest has its answer, or if it never asked.
    pub(super) tag: Option<Tag>,
    pub(super) range: SectorRange,
    pub(super) tally: Tally,
    /// What each replica gave, by its index.
    pub(super) replies: Vec<Option<Buffer>>,
    pub(super) asked_at: Duration,
    pub(super) purpose: Purpose,
    pub(super) stage: Stage,
}

#[derive(Debug)]
pub(super) enum Stage {
    New,
    Asking(Asking),
    Confirming(Confirmation),
}

/// Why a read begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The guest asks.
    Guest,
    /// The guest asks, and what the replicas said differs while one of them is slow.
    Suspicion,
    /// This replica is stale in the range.
    Resync {
        replica: ReplicaIndex,
        chunk: ChunkId,
    },
    /// To see whether the replicas are equal.
    Scrub {
        chunk: ChunkId,
        repair: bool,
        spreads: bool,
    },
}

/// The first asking.
#[derive(Debug)]
pub(super) struct Asking {
    agreement: Agreement,
    /// Those who may vote and were not asked yet.
    unasked: ReplicaSet,
    /// Those who were not asked at first but later, and when.
    more: ReplicaSet,
    asked_more_at: Duration,
    /// How many may vote: n of R7.
    voters: usize,
    /// Who has replied has become stale since it was asked: only the lock can tell what its reply
    /// is worth.
    doubtful: bool,
    /// Orders the asking against failed flushes.
    began: FailureEpoch,
}

/// Which of the replies so far are equal: the first of each version, and how many there are of it.
#[derive(Debug, Default)]
struct Agreement {
    first: Option<(ReplicaIndex, usize)>,
    /// Empty as long as all agree; an empty list allocates nothing.
    others: Vec<(ReplicaIndex, usize)>,
}

impl Read {
    pub(super) fn new(tag: Tag, range: SectorRange) -> Self {
        Self::with(Some(tag), range, Purpose::Guest)
    }

    /// A read that is part of a job.
    pub(super) fn of_job(range: SectorRange, purpose: Purpose) -> Self {
        Self::with(None, range, purpose)
    }

    fn with(tag: Option<Tag>, range: SectorRange, purpose: Purpose) -> Self {
        Self {
            tag,
            range,
            tally: Tally::default(),
            replies: Vec::new(),
            asked_at: Duration::ZERO,
            purpose,
            stage: Stage::New,
        }
    }

    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        let waiting = self.tally.waiting();
        let (first, more, more_at) = match &self.stage {
            Stage::Asking(asking) => (
                waiting.without(asking.more),
                waiting.and(asking.more),
                asking.asked_more_at,
            ),
            Stage::Confirming(confirmation) if confirmation.is_repairing() => {
                (confirmation.repairing(), ReplicaSet::EMPTY, self.asked_at)
            }
            Stage::New | Stage::Confirming(_) => (waiting, ReplicaSet::EMPTY, self.asked_at),
        };
        let since = |asked_at: Duration, waiting| {
            if asked_at <= limit {
                waiting
            } else {
                ReplicaSet::EMPTY
            }
        };
        since(self.asked_at, first).or(since(more_at, more))
    }

    /// The replicas that this read knows of.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        let others = match &self.stage {
            Stage::New => ReplicaSet::EMPTY,
            Stage::Asking(asking) => asking.unasked,
            Stage::Confirming(confirmation) => confirmation.refers_to(),
        };
        self.tally.asked().or(others)
    }

    /// The replicas that may yet be asked.
    pub(super) fn unasked(&self) -> ReplicaSet {
        match &self.stage {
            Stage::Asking(asking) => asking.unasked,
            Stage::New | Stage::Confirming(_) => ReplicaSet::EMPTY,
        }
    }

    /// What the replicas are doing for this read.
    pub(super) fn operation(&self) -> OperationType {
        match &self.stage {
            Stage::Confirming(confirmation) if confirmation.is_repairing() => OperationType::Write,
            _ => OperationType::Read,
        }
    }

    pub(super) fn begin(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        self.replies = core.spare_replies.pop().unwrap_or_default();
        match self.purpose {
            Purpose::Guest => {}
            Purpose::Suspicion => return self.confirm(id, ReplicaSet::EMPTY, core),
            Purpose::Scrub { .. } => return self.begin_scrub(id, core, effects),
            Purpose::Resync { replica, .. } => {
                let repair = std::iter::once(replica).collect();
                return self.confirm(id, repair, core);
            }
        }
        let voters = core.voters(self.range);
        let enough = core.policy.threshold.max(voters.len() / 2 + 1);
        let asked = match core.policy.read_pattern {
            ReadPattern::Fifo => voters.iter().take(1).collect(),
            ReadPattern::Quorum => voters,
            ReadPattern::Threshold => core.preferred(voters, enough),
        };
        let needed = match core.policy.read_pattern {
            ReadPattern::Fifo => 1,
            ReadPattern::Quorum | ReadPattern::Threshold => core.policy.threshold,
        };
        if asked.len() < needed {
            // Too few are fresh throughout, but sector by sector there may be enough.
            return self.confirm(id, ReplicaSet::EMPTY, core);
        }
        self.begin_asking(id, voters, asked, core, effects);
        Progress::Waiting
    }

    /// Begins the first asking.
    pub(super) fn begin_asking(
        &mut self,
        id: RequestId,
        voters: ReplicaSet,
        asked: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) {
        self.stage = Stage::Asking(Asking {
            agreement: Agreement::default(),
            unasked: voters.without(asked),
            more: ReplicaSet::EMPTY,
            asked_more_at: core.clock.now(),
            voters: voters.len(),
            doubtful: false,
            began: core.shared.failure_epoch(),
        });
        self.asked_at = core.clock.now();
        self.ask(id, asked, core, effects);
    }

    pub(super) fn reply(
        &mut self,
        id: RequestId,
        reply: Reply,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        if let Stage::Confirming(confirmation) = &self.stage
            && confirmation.is_repairing()
        {
            return self.repaired(&reply, core, effects);
        }
        if !self.tally.waiting().contains(reply.replica) {
            return Progress::Waiting;
        }
        let asked_at = match &self.stage {
            Stage::Asking(asking) if asking.more.contains(reply.replica) => asking.asked_more_at,
            _ => self.asked_at,
        };
        core.clock.observe(reply.replica, asked_at);
        self.tally.record(reply.replica, reply.result.is_ok());
        match reply.result {
            Err(errno) => report_error(
                effects,
                reply.replica,
                OperationType::Read,
                self.range,
                errno,
            ),
            Ok(()) => {
                if let Action::Read { into, .. } = reply.action {
                    self.replies[reply.replica.as_usize()] = Some(into);
                }
            }
        }
        match &mut self.stage {
            Stage::Asking(asking) => {
                match reply.result {
                    Ok(()) => asking.agreement.count(reply.replica, &self.replies),
                    Err(_) => asking.voters -= 1,
                }
                self.compare(id, core, effects)
            }
            Stage::New | Stage::Confirming(_) => self.confirm_reply(id, core, effects),
        }
    }

    /// Goes on without the replicas that have left the set.
    pub(super) fn abandon(
        &mut self,
        id: RequestId,
        gone: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let forgotten = self.tally.waiting().and(gone);
        self.tally.forget(gone);
        match &mut self.stage {
            Stage::New => Progress::Waiting,
            Stage::Asking(asking) => {
                asking.voters -= forgotten.or(asking.unasked.and(gone)).len();
                asking.unasked = asking.unasked.without(gone);
                self.compare(id, core, effects)
            }
            Stage::Confirming(_) => self.confirm_without(id, gone, core, effects),
        }
    }

    /// The guest has waited longer than replicas usually take.
    pub(super) fn reply_late(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let Stage::Asking(asking) = &mut self.stage else {
            return Progress::Waiting;
        };
        if core.policy.read_pattern == ReadPattern::Fifo {
            return Progress::Waiting;
        }
        let out = asking.unasked.without(core.shared.in_service());
        asking.unasked = asking.unasked.without(out);
        asking.voters -= out.len();
        if !asking.unasked.is_empty() {
            let rest = asking.unasked;
            self.ask_more(id, rest, core, effects);
        } else if !asking.agreement.others.is_empty() {
            // The slow one might decide, but nobody need wait for it: under the lock the others
            // can.
            Counters::add(&core.shared.counters.suspicions, 1);
            let again = Self::with(self.tag.take(), self.range, Purpose::Suspicion);
            core.begun.push_back(again);
            return self.retire(core);
        }
        Progress::Waiting
    }

    pub(super) fn ask(
        &mut self,
        id: RequestId,
        asked: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) {
        self.tally.ask(asked);
        if self.replies.len() < asked.places() {
            self.replies.resize_with(asked.places(), || None);
        }
        let len = usize::try_from(self.range.bytes()).expect("a fragment fits memory");
        for replica in asked.iter() {
            let operation = Operation {
                request: id,
                replica,
                action: Action::Read {
                    range: self.range,
                    into: core.pool.take(len),
                },
            };
            core.submit(operation, effects);
        }
    }

    fn ask_more(
        &mut self,
        id: RequestId,
        more: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) {
        if let Stage::Asking(asking) = &mut self.stage {
            asking.unasked = asking.unasked.without(more);
            asking.more = asking.more.or(more);
            asking.asked_more_at = core.clock.now();
        }
        self.ask(id, more, core, effects);
    }

    /// Is there a quorum, a suspicion, someone else to ask, or nothing more to come?
    fn compare(&mut self, id: RequestId, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let Stage::Asking(asking) = &mut self.stage else {
            unreachable!("compared in the first asking only");
        };
        // Another worker may have found out who does not answer.
        let out = asking.unasked.without(core.shared.in_service());
        asking.unasked = asking.unasked.without(out);
        asking.voters -= out.len();
        // R7: with this many equal replies the others cannot change the outcome.
        let enough = match core.policy.read_pattern {
            ReadPattern::Fifo => 1,
            ReadPattern::Quorum | ReadPattern::Threshold => {
                core.policy.threshold.max(asking.voters / 2 + 1)
            }
        };
        let stale = core.shared.stale_in(self.range);
        let stale = stale.or(core.shared.failed_since(asking.began));
        asking.doubtful |= !stale.and(self.tally.succeeded()).is_empty();
        let doubtful = asking.doubtful;
        let enough = if is_broken(Mutant::EarlyDecision) {
            (enough - 1).max(1)
        } else {
            enough
        };
        if let (Some(tag), Some(winner), false) =
            (self.tag, asking.agreement.with_votes(enough), doubtful)
        {
            self.tag = None;
            effects.complete(tag, Ok(buffer(&self.replies, winner)));
        }
        if !self.tally.is_complete() {
            return Progress::Waiting;
        }
        if matches!(self.purpose, Purpose::Scrub { .. }) {
            let agree = asking.agreement.others.is_empty() && !doubtful;
            return self.scrubbed(id, agree, core, effects);
        }
        if self.tag.is_some() && !doubtful && !asking.unasked.is_empty() {
            let more = match core.policy.read_pattern {
                ReadPattern::Fifo => asking.unasked.iter().take(1).collect(),
                ReadPattern::Quorum | ReadPattern::Threshold => asking.unasked,
            };
            self.ask_more(id, more, core, effects);
            return Progress::Waiting;
        }
        if !asking.agreement.others.is_empty() {
            Counters::add(&core.shared.counters.suspicions, 1);
            if is_broken(Mutant::RewriteUnconfirmed) {
                return self.confirm_unlocked(id, core, effects);
            }
            return self.confirm(id, ReplicaSet::EMPTY, core);
        }
        // Under the lock it is known who may vote where, and sector by sector others may help.
        let others = core.shared.in_service().without(self.tally.asked());
        if self.tag.is_some() && (doubtful || !others.is_empty()) {
            return self.confirm(id, ReplicaSet::EMPTY, core);
        }
        self.fail(effects);
        let repair = self.tally.failed();
        let is_fifo = core.policy.read_pattern == ReadPattern::Fifo;
        if is_fifo
            && core.policy.rewrite_corrupted
            && !repair.is_empty()
            && !self.tally.succeeded().is_empty()
        {
            return self.confirm(id, repair, core);
        }
        self.retire(core)
    }

    /// Tells the guest that there is no quorum, if it has no answer yet.
    pub(super) fn fail(&mut self, effects: &mut impl Effects) {
        if let Some(tag) = self.tag.take() {
            effects.report(Report::Failure {
                operation: OperationType::Read,
                range: self.range,
            });
            effects.complete(tag, Err(Failed));
        }
    }

    pub(super) fn retire(&mut self, core: &mut Core) -> Progress {
        debug_assert!(self.tag.is_none(), "retired without an answer");
        self.replies.clear();
        core.spare_replies.push(std::mem::take(&mut self.replies));
        Progress::Retired
    }
}

impl Agreement {
    /// Counts the reply of `replica` for its version.
    fn count(&mut self, replica: ReplicaIndex, replies: &[Option<Buffer>]) {
        let bytes = buffer(replies, replica);
        for (holder, votes) in self.first.iter_mut().chain(&mut self.others) {
            if buffer(replies, *holder) == bytes {
                *votes += 1;
                return;
            }
        }
        if self.first.is_none() {
            self.first = Some((replica, 1));
        } else {
            self.others.push((replica, 1));
        }
    }

    /// A replica that holds a version with at least `votes` votes.
    fn with_votes(&self, votes: usize) -> Option<ReplicaIndex> {
        let mut versions = self.first.iter().chain(&self.others);
        versions
            .find(|(_, count)| *count >= votes)
            .map(|(holder, _)| *holder)
    }
}

/// The bytes that `replica` gave.
pub(super) fn buffer(replies: &[Option<Buffer>], replica: ReplicaIndex) -> &[u8] {
    replies[replica.as_usize()]
        .as_deref()
        .expect("a replica that succeeded has given its buffer")
}
