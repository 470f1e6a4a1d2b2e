//! The second asking of a read, under the lock of its range: what differs now is wrong (R2, R3, R5,
//! R6).
//!
//! While the lock is held no write can change the range, so the replies are compared sector by
//! sector, the losers are reported, and repaired before the lock is given back. The same path
//! brings a stale replica up to date: it is repaired whatever it holds.

use std::rc::Rc;

use super::mutant::{Mutant, is_broken};
use super::range_locks::LockKey;
use super::read::{Purpose, Read, Stage, buffer};
use super::shared::Waiter;
use super::{Core, Counters, Effects, Progress, ReadPattern, report_error};
use crate::common::buffer::{Buffer, BufferPool};
use crate::common::operation::OperationType;
use crate::common::operation::{Action, Operation, Reply, RequestId};
use crate::common::report::{Cause, Report};
use crate::common::{ReplicaIndex, ReplicaSet, SECTOR_BYTES, SectorRange};
use crate::jobs::ChunkEnd;
use crate::quorum::health::FailureEpoch;
use crate::quorum::tally::Tally;
use crate::quorum::vote::{Ballot, Rule, Verdict, vote};

/// A read that holds, or waits for, the lock of its range.
#[derive(Debug)]
pub(super) struct Confirmation {
    lock: LockKey,
    /// Replicas to be repaired throughout: stale ones, and those that failed a `fifo` read.
    repair: ReplicaSet,
    step: Step,
    /// What there is to tell a job.
    end: ChunkEnd,
}

#[derive(Debug)]
enum Step {
    WaitingForLock,
    Asking,
    /// The writes of the winner that are out.
    Repairing {
        began: FailureEpoch,
        pending: Vec<(ReplicaIndex, SectorRange)>,
    },
}

impl Confirmation {
    pub(super) fn is_repairing(&self) -> bool {
        matches!(self.step, Step::Repairing { .. })
    }

    /// The replicas that this confirmation knows of.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        self.repair.or(self.repairing())
    }

    /// The replicas that are being repaired.
    pub(super) fn repairing(&self) -> ReplicaSet {
        match &self.step {
            Step::Repairing { pending, .. } => {
                pending.iter().map(|(replica, _)| *replica).collect()
            }
            Step::WaitingForLock | Step::Asking => ReplicaSet::EMPTY,
        }
    }
}

impl Read {
    /// Goes for the lock.
    pub(super) fn confirm(
        &mut self,
        id: RequestId,
        repair: ReplicaSet,
        core: &mut Core,
    ) -> Progress {
        core.confirmations += 1;
        // The buffers of the first asking are free again before new ones are taken.
        self.replies.fill_with(|| None);
        self.tally = Tally::default();
        self.stage = Stage::Confirming(Confirmation {
            lock: core.lock(self.range, id),
            repair,
            step: Step::WaitingForLock,
            end: ChunkEnd::default(),
        });
        Progress::Waiting
    }

    /// Takes the first asking for the confirmation: what [`Mutant::RewriteUnconfirmed`] does. Its
    /// lock is one that nobody else asks for.
    pub(super) fn confirm_unlocked(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        core.confirmations += 1;
        let unused = SectorRange::new(u64::MAX - 1 - u64::from(id.0), 1);
        let worker = core.worker;
        let (lock, _) = core.shared.lock(
            unused,
            Waiter {
                worker,
                request: id,
            },
        );
        self.stage = Stage::Confirming(Confirmation {
            lock,
            repair: ReplicaSet::EMPTY,
            step: Step::Asking,
            end: ChunkEnd::default(),
        });
        self.confirmed(id, core, effects)
    }

    pub(super) fn lock_granted(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let confirmation = self.confirmation();
        confirmation.step = Step::Asking;
        let repair = confirmation.repair;
        let asked = core.shared.in_service().without(repair);
        self.asked_at = core.clock.now();
        self.ask(id, asked, core, effects);
        self.confirm_reply(id, core, effects)
    }

    /// A reply has come in, or is not waited for any more.
    pub(super) fn confirm_reply(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        if self.tally.is_complete() {
            return self.confirmed(id, core, effects);
        }
        self.answer_early(core, effects);
        Progress::Waiting
    }

    pub(super) fn confirm_without(
        &mut self,
        id: RequestId,
        gone: ReplicaSet,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        match &mut self.confirmation().step {
            Step::WaitingForLock => Progress::Waiting,
            Step::Asking => self.confirm_reply(id, core, effects),
            Step::Repairing { pending, .. } => {
                let mut not_written = 0;
                // Its write may still happen, perhaps after newer ones.
                for (replica, range) in
                    pending.extract_if(.., |(replica, _)| gone.contains(*replica))
                {
                    core.shared
                        .health(|health| health.mark_stale(replica, range));
                    not_written += range.count;
                }
                self.confirmation().end.not_written += not_written;
                self.finish_if_repaired(core, effects)
            }
        }
    }

    /// R7 for this asking: a guest waits for no slow replica whose vote cannot matter.
    fn answer_early(&mut self, core: &mut Core, effects: &mut impl Effects) {
        let (succeeded, waiting) = (self.tally.succeeded().len(), self.tally.waiting().len());
        let enough = core.policy.threshold.max((succeeded + waiting) / 2 + 1);
        if self.tag.is_none() || core.policy.read_pattern == ReadPattern::Fifo || succeeded < enough
        {
            return;
        }
        let verdict = self.vote(Rule::Threshold(enough), core);
        if verdict.undecided.is_empty()
            && let (Some(tag), Some(winner)) =
                (self.tag.take(), self.assemble(&verdict, &core.pool))
        {
            effects.complete(tag, Ok(&winner));
        }
    }

    /// All replies are in, and no write can have run meanwhile.
    fn confirmed(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let rule = match core.policy.read_pattern {
            ReadPattern::Fifo if !self.is_scrub() => Rule::FirstListed,
            _ => Rule::Threshold(core.policy.threshold),
        };
        let verdict = self.vote(rule, core);
        let repair = self.confirmation().repair;
        if repair.is_empty() && verdict.dissents.is_empty() && verdict.undecided.is_empty() {
            Counters::add(&core.shared.counters.suspicions_dropped, 1);
        }
        for dissent in &verdict.dissents {
            effects.report(Report::Bad {
                replica: dissent.replica,
                operation: OperationType::Read,
                range: self.range,
                cause: Cause::Corrupt(dissent.evidence()),
            });
        }
        self.note_damage(&verdict, core, effects);
        let winner = self.assemble(&verdict, &core.pool);
        if let Some(winner) = winner.as_ref().filter(|_| verdict.undecided.is_empty())
            && let Some(tag) = self.tag.take()
        {
            effects.complete(tag, Ok(winner));
        }
        self.fail(effects);
        if let Some(undecided) = verdict.undecided.first().filter(|_| core.policy.blkverify) {
            effects.contents_differ(*undecided);
        }
        if let Some(winner) = winner {
            self.repair(id, &verdict, Rc::new(winner), core, effects);
        }
        self.finish_if_repaired(core, effects)
    }

    /// Counts what is bad, and has its neighbourhood scrubbed.
    fn note_damage(&mut self, verdict: &Verdict, core: &mut Core, effects: &mut impl Effects) {
        let unread = self.unread(core);
        let sectors = |runs: &[SectorRange]| runs.iter().map(|run| run.count).sum::<u64>();
        let confirmation = self.confirmation();
        let end = &mut confirmation.end;
        end.unread = unread.without(confirmation.repair);
        end.undecided = sectors(&verdict.undecided);
        for dissent in &verdict.dissents {
            let found = sectors(&dissent.bad_sectors);
            end.found += found;
            Counters::add(
                &core.shared.counters.of(dissent.replica).sectors_corrupt,
                found,
            );
        }
        let bad = verdict
            .dissents
            .iter()
            .flat_map(|dissent| &dissent.bad_sectors);
        let (first, last) = bad.fold((u64::MAX, 0), |(first, last), run| {
            (first.min(run.start), last.max(run.end()))
        });
        let spreads = !matches!(self.purpose, Purpose::Scrub { spreads: false, .. });
        if first < last && spreads {
            let bad = SectorRange::new(first, last - first);
            let tell = |event| effects.job_changed(event);
            if core.shared.jobs(tell, |jobs, _| jobs.damaged(bad)) {
                effects.health_changed();
            }
        }
        if self.tag.is_none() && self.is_scrub() && !verdict.undecided.is_empty() {
            effects.report(Report::Failure {
                operation: OperationType::Read,
                range: self.range,
            });
        }
    }

    fn vote(&self, rule: Rule, core: &Core) -> Verdict {
        let voters = self.tally.succeeded();
        let stale = core.shared.health(|health| {
            let stale_parts = |replica| health.stale_parts(replica, self.range);
            voters.iter().map(stale_parts).collect::<Vec<_>>()
        });
        let ballots: Vec<Ballot<'_>> = voters
            .iter()
            .zip(stale)
            .map(|(replica, stale)| Ballot {
                replica,
                bytes: buffer(&self.replies, replica),
                stale,
            })
            .collect();
        let verdict = vote(self.range, &ballots, rule);
        if is_broken(Mutant::VotePerRequest)
            && let Rule::Threshold(threshold) = rule
        {
            let votes = |ballot: &Ballot<'_>| {
                ballots
                    .iter()
                    .filter(|other| other.bytes == ballot.bytes)
                    .count()
            };
            if !ballots.iter().any(|ballot| votes(ballot) >= threshold) {
                return Verdict {
                    undecided: vec![self.range],
                    ..Verdict::default()
                };
            }
        }
        verdict
    }

    /// Puts the winning versions together. `None` if no sector has a winner. Sectors without one
    /// hold whatever the buffer held: nobody may look at them.
    fn assemble(&self, verdict: &Verdict, pool: &BufferPool) -> Option<Buffer> {
        verdict.winners.first()?;
        let mut winner =
            pool.take(usize::try_from(self.range.bytes()).expect("a fragment fits memory"));
        for run in &verdict.winners {
            let bytes = bytes_of(run.range, self.range);
            winner[bytes.clone()].copy_from_slice(&buffer(&self.replies, run.held_by)[bytes]);
        }
        Some(winner)
    }

    /// Writes the winner where it did not win (R6), and all over the replicas that are to be
    /// repaired.
    fn repair(
        &mut self,
        id: RequestId,
        verdict: &Verdict,
        winner: Rc<Buffer>,
        core: &mut Core,
        effects: &mut impl Effects,
    ) {
        let block = core.policy.block_sectors;
        let mut pending = Vec::new();
        let repairs = matches!(self.purpose, Purpose::Scrub { repair: true, .. });
        if core.policy.rewrite_corrupted || (repairs && !is_broken(Mutant::RepairForgotten)) {
            for dissent in &verdict.dissents {
                let runs = decided(
                    &widen(&dissent.bad_sectors, block),
                    &verdict.undecided,
                    block,
                );
                pending.extend(runs.into_iter().map(|run| (dissent.replica, run)));
            }
        }
        let (in_service, began) = core
            .shared
            .health(|health| (health.in_service(), health.failure_epoch()));
        let rewritten = pending.len();
        for replica in self.confirmation().repair.iter() {
            let runs = decided(&[self.range], &verdict.undecided, block);
            let runs = runs
                .into_iter()
                .flat_map(|run| sparse(run, &winner, self.range, block));
            pending.extend(runs.map(|run| (replica, run)));
        }
        let mut number = 0;
        self.asked_at = core.clock.now();
        pending.retain(|&(replica, run)| {
            number += 1;
            let bytes = bytes_of(run, self.range);
            let action = if number > rewritten && is_zero(&winner[bytes.clone()]) {
                // What is sparse stays sparse.
                Action::Zero {
                    range: run,
                    unmap: true,
                    durable: false,
                }
            } else {
                Action::Write {
                    range: run,
                    data: Rc::clone(&winner),
                    offset_bytes: bytes.start,
                    durable: false,
                }
            };
            let asked = in_service.contains(replica);
            if asked {
                let operation = Operation {
                    request: id,
                    replica,
                    action,
                };
                core.submit(operation, effects);
            }
            asked
        });
        self.confirmation().step = Step::Repairing { began, pending };
    }

    /// The end of a repairing write.
    pub(super) fn repaired(
        &mut self,
        reply: &Reply,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let is_resync = matches!(self.purpose, Purpose::Resync { .. });
        let Step::Repairing { began, pending } = &mut self.confirmation().step else {
            unreachable!("a repairing write ends while repairing");
        };
        let (Action::Write { range, .. } | Action::Zero { range, .. }) = &reply.action else {
            return Progress::Waiting;
        };
        let before = pending.len();
        pending.retain(|write| *write != (reply.replica, *range));
        if pending.len() == before {
            return Progress::Waiting;
        }
        let began = *began;
        let counters = core.shared.counters.of(reply.replica);
        let trusted = is_broken(Mutant::FailedCopyTrusted);
        if trusted && reply.result.is_err() {
            core.shared
                .health(|health| health.repaired(reply.replica, *range, began));
        }
        match reply.result {
            Ok(()) => {
                let counter = if is_resync {
                    &counters.sectors_resynced
                } else {
                    &counters.sectors_repaired
                };
                Counters::add(counter, range.count);
                core.shared
                    .health(|health| health.repaired(reply.replica, *range, began));
                if !is_resync {
                    effects.repaired(reply.replica, *range);
                }
                self.confirmation().end.written += range.count;
            }
            Err(errno) => {
                self.confirmation().end.not_written += range.count;
                Counters::add(&counters.sectors_not_repaired, range.count);
                report_error(effects, reply.replica, OperationType::Write, *range, errno);
            }
        }
        self.finish_if_repaired(core, effects)
    }

    fn finish_if_repaired(&mut self, core: &mut Core, effects: &mut impl Effects) -> Progress {
        let confirmation = self.confirmation();
        if matches!(&confirmation.step, Step::Repairing { pending, .. } if !pending.is_empty()) {
            return Progress::Waiting;
        }
        let (lock, end) = (confirmation.lock, confirmation.end);
        core.unlock(lock, effects);
        core.confirmations -= 1;
        match self.purpose {
            Purpose::Guest | Purpose::Suspicion => {}
            Purpose::Resync { chunk, .. } | Purpose::Scrub { chunk, .. } => {
                core.chunk_ended(chunk, end)
            }
        }
        self.retire(core)
    }

    fn is_scrub(&self) -> bool {
        matches!(self.purpose, Purpose::Scrub { .. })
    }

    fn confirmation(&mut self) -> &mut Confirmation {
        match &mut self.stage {
            Stage::Confirming(confirmation) => confirmation,
            Stage::New | Stage::Asking(_) => unreachable!("confirmed under the lock"),
        }
    }
}

/// The bytes of `part` in a buffer that holds `whole`.
fn bytes_of(part: SectorRange, whole: SectorRange) -> std::ops::Range<usize> {
    let byte = |sector: u64| {
        usize::try_from((sector - whole.start) * SECTOR_BYTES).expect("a fragment fits memory")
    };
    byte(part.start)..byte(part.end())
}

/// The shortest run of zeroes in a longer run that is made a hole.
const HOLE_SECTORS_MIN: u64 = (32 << 10) / SECTOR_BYTES;

/// A page of a file, which is where its holes can begin and end.
const PAGE_SECTORS: u64 = 4096 / SECTOR_BYTES;

/// Cuts `run`, whose bytes are part of those of `whole`, into runs that are zero and runs that are
/// not. Short runs of zeroes are left with their neighbours.
fn sparse(
    run: SectorRange,
    bytes: &[u8],
    whole: SectorRange,
    block_sectors: u64,
) -> Vec<SectorRange> {
    let granule = PAGE_SECTORS.next_multiple_of(block_sectors);
    let mut runs: Vec<(SectorRange, bool)> = Vec::new();
    let mut start = run.start;
    while start < run.end() {
        let end = (start - start % granule + granule).min(run.end());
        let part = SectorRange::new(start, end - start);
        let zero = is_zero(&bytes[bytes_of(part, whole)]);
        match runs.last_mut() {
            Some((last, last_zero)) if *last_zero == zero => last.count += part.count,
            _ => runs.push((part, zero)),
        }
        start = end;
    }
    let mut cut: Vec<(SectorRange, bool)> = Vec::with_capacity(runs.len());
    for (part, zero) in runs {
        let zero = zero && (part.count >= HOLE_SECTORS_MIN || part.count == run.count);
        match cut.last_mut() {
            Some((last, false)) if !zero => last.count += part.count,
            _ => cut.push((part, zero)),
        }
    }
    cut.into_iter().map(|(part, _)| part).collect()
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
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

/// What is left of `runs`, which are whole blocks, without the blocks that have an undecided
/// sector.
fn decided(
    runs: &[SectorRange],
    undecided: &[SectorRange],
    block_sectors: u64,
) -> Vec<SectorRange> {
    let undecided = widen(undecided, block_sectors);
    let mut left = Vec::with_capacity(runs.len());
    for run in runs {
        let mut start = run.start;
        for hole in undecided.iter().filter(|hole| hole.overlaps(*run)) {
            if hole.start > start {
                left.push(SectorRange::new(start, hole.start - start));
            }
            start = hole.end();
        }
        if start < run.end() {
            left.push(SectorRange::new(start, run.end() - start));
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs<const N: usize>(runs: [(u64, u64); N]) -> Vec<SectorRange> {
        runs.map(|(start, count)| SectorRange::new(start, count))
            .to_vec()
    }

    #[test]
    fn runs_are_widened_to_blocks_and_joined() {
        let scattered = runs([(1, 1), (3, 2), (9, 1), (30, 4)]);
        assert_eq!(widen(&scattered, 1), scattered);
        assert_eq!(widen(&scattered, 8), runs([(0, 16), (24, 16)]));
    }

    #[test]
    fn long_runs_of_zeroes_become_holes() {
        let whole = SectorRange::new(16, 400);
        let mut bytes = vec![0; 400 * 512];
        let all = |bytes: &[u8]| sparse(whole, bytes, whole, 1);
        assert_eq!(all(&bytes), [whole], "all of it is zero");
        bytes[100 * 512] = 1;
        // The page of sector 116 is 112 to 119.
        assert_eq!(all(&bytes), runs([(16, 96), (112, 8), (120, 296)]));
        bytes[130 * 512] = 1;
        assert_eq!(all(&bytes), runs([(16, 96), (112, 40), (152, 264)]));
        let part = SectorRange::new(120, 8);
        assert_eq!(sparse(part, &bytes, whole, 1), [part]);
    }

    #[test]
    fn blocks_with_an_undecided_sector_are_left_out() {
        let blocks = runs([(0, 16), (24, 16)]);
        assert_eq!(decided(&blocks, &[], 8), blocks);
        assert_eq!(
            decided(&blocks, &runs([(9, 1), (25, 1), (31, 2)]), 8),
            runs([(0, 8)])
        );
        assert_eq!(
            decided(&runs([(0, 8)]), &runs([(3, 2)]), 1),
            runs([(0, 3), (5, 3)])
        );
    }
}
