//! A guest read: ask, compare, and where replies differ repeat the read while no write can run (R1 to R8).
//!
//! The first asking takes no lock. Writes in flight may then make replicas differ for a moment, so a
//! difference is only a suspicion: the read is repeated under the range lock, and what differs *then* is
//! reported, and rewritten before the lock is given back.

use std::rc::Rc;

use super::range_locks::LockKey;
use super::{Core, Counters, Effects, Failed, Progress, ReadPattern, Tag, report_error};
use crate::quorum::report::{Cause, OperationType, Report};
use crate::quorum::tally::Tally;
use crate::quorum::vote::{Ballot, Rule, Verdict, vote};
use crate::quorum::{ReplicaIndex, ReplicaSet, SECTOR_BYTES, SectorRange};
use crate::replica::buffer::Buffer;
use crate::replica::operation::{Action, Operation, Reply, RequestId};

#[derive(Debug)]
pub(super) struct Read {
    /// `None` once the guest has its answer.
    tag: Option<Tag>,
    range: SectorRange,
    tally: Tally,
    /// What each replica gave, by its index.
    replies: Vec<Option<Buffer>>,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// Not begun, or asking without a lock.
    Asking(Agreement),
    /// The replies differed, or a replica must be mended, or none may vote on all of the range.
    WaitingForLock { lock: LockKey, mend: ReplicaSet },
    /// Asking again under the lock. `mend`: replicas that failed a `fifo` read, to be rewritten whatever
    /// they hold.
    Confirming { lock: LockKey, mend: ReplicaSet },
    /// Writing the winner to those that lost, under the same lock.
    Rewriting { lock: LockKey, outstanding: usize },
}

/// Which of the replies so far are equal: the first of each version, and how many there are of it.
#[derive(Debug, Default)]
struct Agreement {
    first: Option<(ReplicaIndex, usize)>,
    /// Empty as long as all agree; an empty list allocates nothing.
    others: Vec<(ReplicaIndex, usize)>,
}

impl Read {
    pub(super) fn new(tag: Tag, range: SectorRange, core: &mut Core) -> Self {
        let mut replies = core.spare_replies.pop().unwrap_or_default();
        replies.resize_with(core.policy.replicas, || None);
        Self {
            tag: Some(tag),
            range,
            tally: Tally::default(),
            replies,
            stage: Stage::Asking(Agreement::default()),
        }
    }

    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    pub(super) fn begin(&mut self, id: RequestId, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let fresh = core.all_replicas().without(core.shared.stale_in(self.range));
        let asked = match core.policy.read_pattern {
            ReadPattern::Quorum if fresh.len() >= core.policy.threshold => fresh,
            ReadPattern::Fifo if !fresh.is_empty() => fresh.iter().take(1).collect(),
            // Nobody is fresh throughout, but sector by sector there may be enough.
            _ => return self.lock(id, ReplicaSet::EMPTY, core, effects),
        };
        self.ask(id, asked, core, effects);
        Progress::Waiting
    }

    pub(super) fn reply(
        &mut self,
        id: RequestId,
        reply: Reply,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        if let Stage::Rewriting { .. } = self.stage {
            return self.rewritten(reply, core, effects);
        }
        self.tally.record(reply.replica, reply.result.is_ok());
        match reply.result {
            Err(errno) => report_error(effects, reply.replica, OperationType::Read, self.range, errno),
            Ok(()) => {
                if let Action::Read { into, .. } = reply.action {
                    self.replies[reply.replica.as_usize()] = Some(into);
                }
            }
        }
        match (&self.stage, core.policy.read_pattern) {
            (Stage::Asking(_), ReadPattern::Quorum) => self.compare(id, reply.replica, core, effects),
            (Stage::Asking(_), ReadPattern::Fifo) => self.first_answer(id, core, effects),
            _ if !self.tally.is_complete() => Progress::Waiting,
            _ => self.confirmed(id, core, effects),
        }
    }

    pub(super) fn lock_granted(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let Stage::WaitingForLock { lock, mend } = self.stage else {
            unreachable!("a lock is granted once");
        };
        self.stage = Stage::Confirming { lock, mend };
        let mut asked = core.all_replicas().without(mend);
        if !mend.is_empty() {
            // The one that answered before; what it holds now is what the others should hold.
            asked = self.tally.succeeded();
        }
        self.ask(id, asked, core, effects);
        Progress::Waiting
    }

    fn ask(&mut self, id: RequestId, asked: ReplicaSet, core: &mut Core, effects: &mut impl Effects) {
        self.tally = Tally::new(asked);
        let len = usize::try_from(self.range.bytes()).expect("a piece fits memory");
        // The buffers of an earlier asking are free again before new ones are taken.
        self.replies.fill_with(|| None);
        for replica in asked.iter() {
            effects.submit(Operation {
                request: id,
                replica,
                action: Action::Read {
                    range: self.range,
                    into: core.pool.take(len),
                },
            });
        }
    }

    fn lock(
        &mut self,
        id: RequestId,
        mend: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let (lock, granted) = core.lock(self.range, id);
        self.stage = Stage::WaitingForLock { lock, mend };
        if granted {
            self.lock_granted(id, core, effects)
        } else {
            Progress::Waiting
        }
    }

    /// Another reply, or error, of the first asking: is there a quorum, a suspicion, or nothing more to come?
    fn compare(
        &mut self,
        id: RequestId,
        replica: ReplicaIndex,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let Stage::Asking(agreement) = &mut self.stage else {
            unreachable!("compared in the first asking only");
        };
        if self.replies[replica.as_usize()].is_some() {
            agreement.count(replica, &self.replies);
        }
        // R7: with this many equal replies the others cannot change the outcome.
        let voters = self.tally.succeeded().len() + self.tally.waiting().len();
        let enough = core.policy.threshold.max(voters / 2 + 1);
        if let (Some(tag), Some(winner)) = (self.tag, agreement.with_votes(enough)) {
            self.tag = None;
            effects.complete(tag, Ok(buffer(&self.replies, winner)));
        }
        if !self.tally.is_complete() {
            return Progress::Waiting;
        }
        if !agreement.others.is_empty() {
            Counters::add(&core.shared.counters.suspicions, 1);
            return self.lock(id, ReplicaSet::EMPTY, core, effects);
        }
        if self.tag.is_some() {
            self.fail(effects);
        }
        self.retire(core)
    }

    /// The reply of the replica that `read-pattern=fifo` asked (R8).
    fn first_answer(&mut self, id: RequestId, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let failed = self.tally.failed();
        if let Some(source) = self.tally.succeeded().iter().next() {
            if let Some(tag) = self.tag.take() {
                effects.complete(tag, Ok(buffer(&self.replies, source)));
            }
            if core.policy.rewrite_corrupted && !failed.is_empty() {
                return self.lock(id, failed, core, effects);
            }
            return self.retire(core);
        }
        let stale = core.shared.stale_in(self.range);
        let untried = core.all_replicas().without(failed).without(stale);
        let Some(next) = untried.iter().next() else {
            self.fail(effects);
            return self.retire(core);
        };
        self.ask_next(id, next, core, effects);
        Progress::Waiting
    }

    /// `fifo`: asks one more replica and keeps in mind which have failed.
    fn ask_next(&mut self, id: RequestId, next: ReplicaIndex, core: &mut Core, effects: &mut impl Effects) {
        let failed = self.tally.failed();
        self.ask(id, std::iter::once(next).collect(), core, effects);
        self.tally = Tally::with_failed(self.tally.waiting(), failed);
    }

    /// All replies of the repeated read are in, and no write can have run meanwhile.
    fn confirmed(&mut self, id: RequestId, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let Stage::Confirming { lock, mend } = self.stage else {
            unreachable!("confirmed under the lock");
        };
        let verdict = self.vote(core);
        if verdict.dissents.is_empty() && verdict.undecided.is_empty() {
            Counters::add(&core.shared.counters.suspicions_dropped, 1);
        }
        for dissent in &verdict.dissents {
            effects.report(Report::Bad {
                replica: dissent.replica,
                operation: OperationType::Read,
                range: self.range,
                cause: Cause::WrongVersion(dissent.evidence()),
            });
        }
        let winner = self.assemble(&verdict);
        match (self.tag.take(), &winner) {
            (Some(tag), Some(winner)) if verdict.undecided.is_empty() => {
                effects.complete(tag, Ok(winner));
            }
            (tag @ Some(_), _) => {
                self.tag = tag;
                self.fail(effects);
            }
            (None, _) => {}
        }
        if core.policy.blkverify && !verdict.undecided.is_empty() {
            effects.contents_differ(verdict.undecided[0]);
        }
        let mut outstanding = 0;
        if let Some(winner) = winner.filter(|_| core.policy.rewrite_corrupted) {
            outstanding = self.rewrite(id, &verdict, mend, Rc::new(winner), core, effects);
        }
        if outstanding > 0 {
            self.stage = Stage::Rewriting { lock, outstanding };
            return Progress::Waiting;
        }
        core.unlock(lock, effects);
        self.retire(core)
    }

    fn vote(&self, core: &Core) -> Verdict {
        let rule = match core.policy.read_pattern {
            ReadPattern::Quorum => Rule::Threshold(core.policy.threshold),
            ReadPattern::Fifo => Rule::FirstListed,
        };
        let ballots: Vec<Ballot<'_>> = self
            .tally
            .succeeded()
            .iter()
            .map(|replica| Ballot {
                replica,
                bytes: buffer(&self.replies, replica),
                stale: core
                    .shared
                    .health(|health| health.stale_parts(replica, self.range)),
            })
            .collect();
        vote(self.range, &ballots, rule)
    }

    /// Puts the winning versions together in the buffer of the replica that holds the first of them. `None`
    /// if no sector has a winner. Sectors without one keep some replica's bytes: nobody may look at them.
    fn assemble(&mut self, verdict: &Verdict) -> Option<Buffer> {
        let base = verdict.winners.first()?.held_by;
        let mut winner = self.replies[base.as_usize()].take()?;
        for run in verdict.winners.iter().filter(|run| run.held_by != base) {
            let bytes = bytes_of(run.range, self.range);
            winner[bytes.clone()].copy_from_slice(&buffer(&self.replies, run.held_by)[bytes]);
        }
        Some(winner)
    }

    /// Writes the winner where it did not win (R6), and to the replicas that failed a `fifo` read (R8).
    /// Returns the number of operations.
    fn rewrite(
        &self,
        id: RequestId,
        verdict: &Verdict,
        mend: ReplicaSet,
        winner: Rc<Buffer>,
        core: &Core,
        effects: &mut impl Effects,
    ) -> usize {
        let lost = verdict.dissents.iter().flat_map(|dissent| {
            widen(&dissent.bad_sectors, core.policy.block_sectors)
                .into_iter()
                .map(|run| (dissent.replica, run))
        });
        let failed = mend.iter().map(|replica| (replica, self.range));
        let mut operations = 0;
        for (replica, run) in lost.chain(failed) {
            // A block with a sector that nobody knows cannot be written.
            if verdict.undecided.iter().any(|undecided| undecided.overlaps(run)) {
                continue;
            }
            operations += 1;
            effects.submit(Operation {
                request: id,
                replica,
                action: Action::Write {
                    range: run,
                    data: Rc::clone(&winner),
                    offset_bytes: bytes_of(run, self.range).start,
                    durable: false,
                },
            });
        }
        operations
    }

    fn rewritten(&mut self, reply: Reply, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let Stage::Rewriting { lock, outstanding } = &mut self.stage else {
            unreachable!("a rewrite ends while rewriting");
        };
        *outstanding -= 1;
        let (lock, last) = (*lock, *outstanding == 0);
        if let Action::Write { range, .. } = &reply.action {
            let counters = &core.shared.counters;
            match reply.result {
                Ok(()) => {
                    Counters::add(&counters.sectors_rewritten, range.count);
                    core.shared.health(|health| health.rewritten(*range));
                }
                Err(errno) => {
                    Counters::add(&counters.sectors_not_rewritten, range.count);
                    report_error(effects, reply.replica, OperationType::Write, *range, errno);
                }
            }
        }
        if !last {
            return Progress::Waiting;
        }
        core.unlock(lock, effects);
        self.retire(core)
    }

    fn fail(&mut self, effects: &mut impl Effects) {
        if let Some(tag) = self.tag.take() {
            effects.report(Report::Failure {
                operation: OperationType::Read,
                range: self.range,
            });
            effects.complete(tag, Err(Failed));
        }
    }

    fn retire(&mut self, core: &mut Core) -> Progress {
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
        let versions = self.first.iter_mut().chain(&mut self.others);
        for (holder, votes) in versions {
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

fn buffer(replies: &[Option<Buffer>], replica: ReplicaIndex) -> &[u8] {
    replies[replica.as_usize()]
        .as_deref()
        .expect("a replica that succeeded has given its buffer")
}

/// The bytes of `part` in a buffer that holds `whole`.
fn bytes_of(part: SectorRange, whole: SectorRange) -> std::ops::Range<usize> {
    let byte =
        |sector: u64| usize::try_from((sector - whole.start) * SECTOR_BYTES).expect("a piece fits memory");
    byte(part.start)..byte(part.end())
}

/// The runs, widened to whole blocks and joined where they meet.
fn widen(runs: &[SectorRange], block_sectors: u64) -> Vec<SectorRange> {
    let mut widened: Vec<SectorRange> = Vec::with_capacity(runs.len());
    for run in runs {
        let start = run.start - run.start % block_sectors;
        let end = run.end().next_multiple_of(block_sectors);
        match widened.last_mut() {
            Some(last) if start <= last.end() => last.count = end - last.start,
            _ => widened.push(SectorRange::new(start, end - start)),
        }
    }
    widened
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_widened_to_blocks_and_joined() {
        let runs = [(1, 1), (3, 2), (9, 1), (30, 4)].map(|(s, c)| SectorRange::new(s, c));
        assert_eq!(widen(&runs, 1), runs);
        let blocks = [(0, 16), (24, 16)].map(|(s, c)| SectorRange::new(s, c));
        assert_eq!(widen(&runs, 8), blocks);
    }
}
