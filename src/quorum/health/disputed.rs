//! Where replicas may differ although no replica is at fault, and how that ends (contract W7).
//!
//! A write that fails leaves old or new data on each replica, and both are legal: its range is
//! *undecided* until a vote, or a write that succeeds, decides it. A vote that decides it makes
//! every member stale that is not known to hold the winner, so that no other version can win later.
//!
//! A flush that fails may have lost what a replica wrote since its last good flush, or nothing:
//! that is stale, and *doubtful*. Doubtful copies have no vote while t members are fresh. Where
//! fewer are, the disk *lacks* fresh copies, and doubtful ones vote too; what they may hold is not
//! older than what t members have made durable. The winner is written again to all of them before
//! it is read. Where no member is proven, such a vote may undo writes: a flush of the guest must
//! have failed, or fail, after them. A fresh member proves nothing before it has flushed: it may
//! have lost the same write, and report that with its next flush.

use super::{Health, Writing};
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange, runs};

/// The parts of a range in which a difference is no fault.
#[derive(Clone, Debug, Default)]
pub struct Disputed {
    /// A write has failed there, and no vote has decided yet which version the disk holds.
    pub undecided: Vec<SectorRange>,
    /// Those parts of `undecided` in which any copy is legal (S5).
    pub unrecovered: Vec<SectorRange>,
    /// Too few members are fresh there for a vote.
    pub lacking: Vec<SectorRange>,
    /// Those parts of `lacking` in which some member is fresh.
    pub witnessed: Vec<SectorRange>,
    /// Those parts of `witnessed` in which some member is proven.
    pub proven: Vec<SectorRange>,
}

impl Disputed {
    /// Whether any difference is a fault.
    pub fn is_empty(&self) -> bool {
        self.undecided.is_empty() && self.lacking.is_empty()
    }
}

/// What votes of doubtful copies may have undone, and what the guest knows of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Undone {
    /// Guest writes that have had a quorum.
    pub(super) writes: u64,
    /// The same when the last flush began.
    pub(super) writes_before_flush: u64,
    /// All that is doubtful was written before this moment, as a count of writes.
    covered_by: u64,
    /// A flush that the guest asked for at this moment has failed.
    answered: u64,
    /// What votes may have undone that has not been written since.
    pub(super) ranges: RangeSet,
    /// How often something was.
    times: u64,
    /// Such a vote has taken place, and no flush that covers the writes has failed.
    owes_failure: bool,
    /// All that is undone was written before this moment.
    owed_until: u64,
    /// Flushes of the guest that have failed.
    failures: u64,
    /// Those of which the guest knows.
    failures_told: u64,
    /// A guest that knew of so many failures when it asked for a flush knows what may be undone.
    known_from: u64,
    /// No flush of the guest has succeeded since one last failed that covers all that is undone.
    none_succeeded: bool,
}

/// What the guest knew when it asked for a flush.
#[derive(Clone, Copy, Debug, Default)]
pub struct FlushAsked {
    /// So many writes had a quorum. The flush covers them.
    writes: u64,
    /// It knew of so many flushes that have failed.
    failures: u64,
}

impl Undone {
    /// Something is undone. `before`: how many sectors were already.
    pub(super) fn is_more(&mut self, before: u64) {
        self.times += 1;
        // The guest knows of it, and has seen no flush succeed since.
        if self.none_succeeded && self.ranges.sectors() == before {
            return;
        }
        self.owed_until = self.covered_by;
        self.owes_failure |= self.answered < self.owed_until;
        self.known_from = self.failures;
    }
}

impl Health {
    /// Whether anything is undecided.
    pub fn anything_undecided(&self) -> bool {
        !self.undecided.is_empty()
    }

    /// Whether a sector of `range` is undecided.
    pub fn is_undecided(&self, range: SectorRange) -> bool {
        self.undecided.overlaps(range)
    }

    /// Where no version had enough votes in the last vote, and no write has succeeded since (R3).
    pub fn unresolved(&self) -> &RangeSet {
        &self.unresolved
    }

    /// A vote on `range` had no winner in these parts of it.
    pub fn voted(&mut self, range: SectorRange, without_winner: &[SectorRange]) {
        self.unresolved.remove(range);
        for part in without_winner {
            self.unresolved.insert(*part);
        }
    }

    /// The parts of `range` that are undecided.
    pub fn undecided_parts(&self, range: SectorRange) -> Vec<SectorRange> {
        self.undecided.within(range)
    }

    /// The parts of `range` in which a difference is no fault, where a vote needs the copies of
    /// `needed` members.
    pub fn disputed(&self, range: SectorRange, needed: usize) -> Disputed {
        let (lacking, witnessed) = self.few_fresh(range, needed, &[]);
        let mut disputed = Disputed {
            undecided: self.undecided.within(range),
            unrecovered: self.unrecovered.within(range),
            lacking,
            witnessed,
            proven: Vec::new(),
        };
        if !disputed.witnessed.is_empty() {
            let proven = self.members.iter().fold(Vec::new(), |all, member| {
                runs::union(&all, &self.proven_parts(member, range))
            });
            disputed.proven = runs::common(&disputed.witnessed, &proven);
        }
        disputed
    }

    /// The parts of `range` in which fewer than `needed` members are fresh, and those of them in
    /// which some member is. Those in `others` count as stale in these parts.
    fn few_fresh(
        &self,
        range: SectorRange,
        needed: usize,
        others: &[(ReplicaIndex, Vec<SectorRange>)],
    ) -> (Vec<SectorRange>, Vec<SectorRange>) {
        let stale = self.members.iter().map(|member| {
            let state = &self.replicas[member.as_usize()];
            let more = others.iter().filter(|(other, _)| *other == member);
            let stale = more.fold(state.stale.within(range), |stale, (_, parts)| {
                runs::union(&stale, &runs::common(&[range], parts))
            });
            (member, stale)
        });
        let mut ends: Vec<(u64, ReplicaIndex, bool)> = stale
            .flat_map(|(member, parts)| {
                let ends = |part: SectorRange| [(part.start, true), (part.end(), false)];
                let ends = parts.into_iter().flat_map(ends);
                ends.map(move |(sector, begins)| (sector, member, begins))
            })
            .collect();
        ends.sort_unstable_by_key(|(sector, ..)| *sector);
        let (mut few, mut some) = (Vec::new(), Vec::new());
        let (mut fresh, mut from) = (self.members, range.start);
        let end = (range.end(), ReplicaIndex(0), false);
        for (sector, member, begins) in ends.into_iter().chain([end]) {
            if sector > from && fresh.len() < needed {
                let run = SectorRange::new(from, sector - from);
                if !fresh.is_empty() {
                    some.push(run);
                }
                few.push(run);
            }
            from = sector;
            match begins {
                true => fresh.remove(member),
                false => fresh.insert(member),
            }
        }
        (few, some)
    }

    /// The parts of these runs in `range` that too few members would hold for a vote if they were
    /// decided, and `others` not hold the winner.
    pub fn held_by_few(
        &self,
        (range, decided): (SectorRange, &[SectorRange]),
        others: &[(ReplicaIndex, Vec<SectorRange>)],
        needed: usize,
    ) -> Vec<SectorRange> {
        runs::common(decided, &self.few_fresh(range, needed, others).0)
    }

    /// The parts of `range` that were repaired on each member and are not durable there: it holds
    /// something else after a crash of the host.
    pub fn volatile_parts(&self, range: SectorRange) -> Vec<(ReplicaIndex, Vec<SectorRange>)> {
        let volatile = |member: ReplicaIndex| {
            let state = &self.replicas[member.as_usize()];
            let (now, before) = (&state.restored, &state.restored_before_flush);
            (
                member,
                runs::union(&now.within(range), &before.within(range)),
            )
        };
        self.members.iter().map(volatile).collect()
    }

    /// The parts of `range` in which `replica` is *proven*: fresh, and a flush has succeeded on it
    /// since it was written. Elsewhere it may have lost what it wrote, and the error is to come; or
    /// those from which it was copied have.
    pub fn proven_parts(&self, replica: ReplicaIndex, range: SectorRange) -> Vec<SectorRange> {
        let state = &self.replicas[replica.as_usize()];
        let unconfirmed = state.unconfirmed.iter().map(|(_, written)| written);
        let copied = [&state.copied, &state.copied_before_flush];
        let sets = [&state.stale, &state.rewritten, &self.written].into_iter();
        let sets = sets.chain(copied);
        sets.chain(unconfirmed).fold(vec![range], |parts, set| {
            runs::without(&parts, &set.within(range))
        })
    }

    /// The parts of these runs in which no member is proven.
    pub fn unproven_parts(&self, parts: &[SectorRange]) -> Vec<SectorRange> {
        let proven = |run: &SectorRange| {
            self.members.iter().fold(Vec::new(), |all, member| {
                runs::union(&all, &self.proven_parts(member, *run))
            })
        };
        let unproven = parts.iter().map(|run| runs::without(&[*run], &proven(run)));
        unproven.flatten().collect()
    }

    /// What all members hold there is a copy of members that were not proven.
    pub fn mark_copied(&mut self, parts: &[SectorRange]) {
        self.any_copied |= !parts.is_empty();
        for member in self.members.iter() {
            let state = &mut self.replicas[member.as_usize()];
            parts.iter().for_each(|part| state.copied.insert(*part));
        }
    }

    /// Whether nothing was written in `range` since the last flush that has succeeded on `replica`.
    /// Elsewhere writeback may have failed, and the error is to come.
    pub fn is_confirmed(&self, replica: ReplicaIndex, range: SectorRange) -> bool {
        let state = &self.replicas[replica.as_usize()];
        let unconfirmed = state.unconfirmed.iter().map(|(_, written)| written);
        let mut sets = [&state.rewritten, &self.written]
            .into_iter()
            .chain(unconfirmed);
        let is_writing = |writing: &Writing| writing.range.overlaps(range);
        !sets.any(|set| set.overlaps(range)) && !self.writing.iter().any(|(_, w)| is_writing(w))
    }

    /// The parts of `range` in which `replica` is doubtful, in order.
    pub fn doubtful_parts(&self, replica: ReplicaIndex, range: SectorRange) -> Vec<SectorRange> {
        self.replicas[replica.as_usize()].doubtful(range)
    }

    /// The members that are doubtful somewhere in `range`.
    pub fn doubtful_in(&self, range: SectorRange) -> ReplicaSet {
        let is_doubtful = |member: &ReplicaIndex| !self.doubtful_parts(*member, range).is_empty();
        self.members.iter().filter(is_doubtful).collect()
    }

    /// A vote has decided `decided`. The replicas in `others` are not known to hold the winner in
    /// these parts of it. `true` if a replica is stale now that was stale nowhere before.
    pub fn decide(
        &mut self,
        decided: &[SectorRange],
        others: &[(ReplicaIndex, Vec<SectorRange>)],
    ) -> bool {
        let recovered = self.take_recovered(decided);
        for range in &recovered {
            for member in self.members.iter() {
                // A crash of the host would bring back what had no vote.
                if self.replicas[member.as_usize()].weaken(*range) {
                    self.memory += 1;
                }
            }
        }
        for range in decided {
            self.undecided.remove(*range);
        }
        let mut became_stale = false;
        let members = self.members;
        for (replica, ranges) in others.iter().filter(|(r, _)| members.contains(*r)) {
            if ranges.is_empty() {
                continue;
            }
            self.failure_epoch.0 += 1;
            self.memory += 1;
            let state = &mut self.replicas[replica.as_usize()];
            became_stale |= state.stale.is_empty();
            // A read in flight may have seen what it holds, even if the winner is there by the time
            // the reply comes.
            state.last_doubt = self.failure_epoch;
            for range in ranges {
                for part in runs::without(&[*range], &state.stale.within(*range)) {
                    state.mark_missed(part);
                }
                // It is on stable storage, where the winner is elsewhere.
                for part in runs::common(&[*range], &recovered) {
                    state.behind.insert(part);
                }
            }
        }
        became_stale
    }

    /// Doubtful copies have voted in these ranges, where no member is proven: writes may be undone.
    pub fn may_be_undone(&mut self, ranges: &[SectorRange]) {
        let before = self.undone.ranges.sectors();
        for range in ranges {
            self.undone.ranges.insert(*range);
        }
        if !ranges.is_empty() {
            self.undone.is_more(before);
        }
    }

    /// The winner of a vote on `range` was written to the doubtful copies. Whether `needed` members
    /// (by default t) are fresh now in all of it, so that a read may return it. Where the vote was
    /// decided by doubtful copies (`voted`) and t are fresh, those still doubtful have no vote.
    pub fn settled(
        &mut self,
        range: SectorRange,
        voted: &[SectorRange],
        needed: Option<usize>,
    ) -> bool {
        let lacking = self.disputed(range, self.threshold).lacking;
        let settled = runs::without(voted, &lacking);
        for member in self.members.iter() {
            let state = &mut self.replicas[member.as_usize()];
            for part in runs::common(&state.doubtful(range), &settled) {
                self.memory += 1;
                state.missed.insert(part);
            }
        }
        let needed = needed.unwrap_or(self.threshold);
        self.disputed(range, needed).lacking.is_empty()
    }

    /// What was written before may be lost now on one replica.
    pub(super) fn doubt_arose(&mut self) {
        let Undone {
            writes,
            writes_before_flush,
            covered_by,
            ..
        } = &mut self.undone;
        // A flush in flight does not cover what was answered after it began.
        let last = match self.written.is_empty() {
            true => writes_before_flush,
            false => writes,
        };
        *covered_by = (*last).max(*covered_by);
    }

    /// A write has a quorum. `is_doubtful`: a flush that failed while it ran may have undone it.
    pub(super) fn write_counts(&mut self, range: SectorRange, is_doubtful: bool) {
        self.undone.writes += 1;
        if self.any_copied {
            for state in &mut self.replicas {
                state.copied.remove(range);
                state.copied_before_flush.remove(range);
            }
        }
        if !self.undone.ranges.is_empty() {
            self.undone.ranges.remove(range);
        }
        if is_doubtful {
            self.undone.covered_by = self.undone.writes;
        }
    }

    /// The guest has its answer now to a write that had a quorum when `counted` writes had one
    /// ([`Self::counted_writes`]). A flush that was asked for meanwhile does not cover it.
    pub fn answered_late(&mut self, counted: u64) {
        self.undone.writes += 1;
        if self.undone.writes_before_flush >= counted {
            // The running flush covers the write, and those who have asked for it do not know.
            self.undone.writes_before_flush = self.undone.writes;
        }
        if self.undone.covered_by >= counted {
            self.undone.covered_by = self.undone.writes;
            if !self.undone.ranges.is_empty() {
                self.undone.none_succeeded = false;
                self.undone.is_more(0);
            }
        }
    }

    /// How many writes have had a quorum.
    pub fn counted_writes(&self) -> u64 {
        self.undone.writes
    }

    /// What a flush covers that the guest asks for now.
    pub fn flush_asked(&self) -> FlushAsked {
        FlushAsked {
            writes: self.undone.writes,
            failures: self.undone.failures_told,
        }
    }

    /// Whether a vote may have undone the last write of some of `range`.
    pub fn is_undone(&self, range: SectorRange) -> bool {
        self.undone.ranges.overlaps(range)
    }

    /// How often votes may have undone something.
    pub fn times_undone(&self) -> u64 {
        self.undone.times
    }

    /// Whether the next flush of the guest fails, because writes may be undone.
    pub fn owes_failure(&self) -> bool {
        self.undone.owes_failure
    }

    /// Whether a flush may succeed as far as it depends on what may be undone. The guest must have
    /// known that when it asked for the flush: those that it asked for before fail as well, since
    /// each may be for another of its programs.
    pub fn guest_knows(&self, asked: FlushAsked) -> bool {
        !self.undone.owes_failure && asked.failures >= self.undone.known_from
    }

    /// The same for a flush of the guest that succeeds if this is so.
    pub fn guest_knew(&mut self, asked: FlushAsked) -> bool {
        let knows = self.guest_knows(asked);
        self.undone.none_succeeded &= !knows;
        knows
    }

    /// The answer to a flush of the guest. `is_durable`: all that it covers is durable on t
    /// members. It fails all the same if writes may be undone and the guest did not know. After a
    /// failure [`Self::failure_told`] follows.
    pub fn answer_flush(&mut self, is_durable: bool, asked: FlushAsked) -> bool {
        if is_durable && self.guest_knew(asked) {
            return true;
        }
        let undone = &mut self.undone;
        undone.failures += 1;
        undone.answered = asked.writes.max(undone.answered);
        if asked.writes >= undone.owed_until {
            if undone.owes_failure {
                undone.owes_failure = false;
                undone.known_from = undone.failures;
            }
            undone.none_succeeded = true;
        }
        false
    }

    /// The guest knows now of a flush that has failed.
    pub fn failure_told(&mut self) {
        self.undone.failures_told += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{A, B, C, flush, range, set, write};
    use super::*;

    #[test]
    fn a_write_that_succeeds_decides_its_range() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        write(&mut health, range(0, 16), &[A, B]);
        assert_eq!(health.disputed(range(0, 32), 2).undecided, [range(0, 16)]);
        write(&mut health, range(0, 8), &[C]);
        assert_eq!(health.disputed(range(0, 32), 2).undecided, [range(8, 8)]);
        assert_eq!(health.stale_in(range(0, 16)), set(&[C]));
    }

    #[test]
    fn a_vote_decides_where_it_has_a_winner_and_nowhere_else() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        write(&mut health, range(0, 16), &[A, B]);
        health.decide(&[range(0, 8)], &[(A, vec![range(0, 1)])]);
        assert_eq!(health.disputed(range(0, 32), 2).undecided, [range(8, 8)]);
        assert_eq!(health.stale_parts(A, range(0, 32)), [range(0, 1)]);
        assert_eq!(health.doubtful_parts(A, range(0, 32)), [], "it has lost");
    }

    /// No member holds the write itself any more, and no error of another one will say so.
    #[test]
    fn a_failure_may_undo_what_all_members_hold_as_a_copy() {
        let written = range(0, 8);
        for is_copied in [false, true] {
            let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
            write(&mut health, written, &[]);
            if is_copied {
                let unproven = health.unproven_parts(&[written]);
                assert_eq!(unproven, [written]);
                health.mark_copied(&unproven);
            }
            flush(&mut health, &[A]);
            assert_eq!(health.is_undone(written), is_copied);
        }
    }

    /// What is below the lost repair on stable storage is corrupt.
    #[test]
    fn a_repair_of_corruption_that_is_not_flushed_is_not_doubtful() {
        let repaired = range(0, 8);
        for was_corrupt in [false, true] {
            for is_flushed in [false, true] {
                let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
                health.repaired(C, repaired, health.failure_epoch(), was_corrupt);
                if is_flushed {
                    assert!(flush(&mut health, &[]));
                    health.repaired(C, repaired, health.failure_epoch(), false);
                }
                flush(&mut health, &[C]);
                assert_eq!(health.stale_parts(C, repaired), [repaired]);
                let is_doubtful = is_flushed || !was_corrupt;
                assert_eq!(!health.doubtful_in(repaired).is_empty(), is_doubtful);
            }
        }
    }

    /// What is below is no older than elsewhere, whenever a flush has succeeded.
    #[test]
    fn a_lost_repair_of_what_was_not_corrupt_is_doubtful() {
        let repaired = range(0, 8);
        for was_corrupt in [false, true] {
            let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
            write(&mut health, repaired, &[]);
            let epoch = health.flush_begins();
            health.repaired(C, repaired, health.failure_epoch(), was_corrupt);
            for replica in [A, B, C] {
                health.flush_ended(epoch, replica, true);
            }
            assert!(health.flush_decided(epoch, ReplicaSet::first(3), true, &mut []));
            flush(&mut health, &[C]);
            assert_eq!(health.stale_parts(C, repaired), [repaired]);
            assert_eq!(health.doubtful_in(repaired).is_empty(), was_corrupt);
        }
    }

    #[test]
    fn a_repair_in_flight_at_an_eviction_leaves_a_copy_doubtful_that_was_not_corrupt() {
        let repaired = range(0, 8);
        for was_corrupt in [false, true] {
            let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
            write(&mut health, repaired, &[]);
            assert!(health.evict(C));
            health.repair_orphaned(C, repaired, was_corrupt);
            assert_eq!(health.stale_parts(C, repaired), [repaired]);
            assert_eq!(health.doubtful_in(repaired).is_empty(), was_corrupt);
        }
    }

    /// Its copy may be what the vote decided against.
    #[test]
    fn a_copy_that_is_doubtful_after_the_vote_is_not_asked_again() {
        let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
        let written = range(0, 8);
        write(&mut health, written, &[]);
        assert!(!flush(&mut health, &[A, B, C]));
        assert_eq!(health.doubtful_in(written), ReplicaSet::first(3));
        health.repaired(A, written, health.failure_epoch(), false);
        assert!(
            !health.settled(written, &[written], None),
            "one is not enough"
        );
        assert_eq!(health.doubtful_in(written), set(&[B, C]));
        health.repaired(B, written, health.failure_epoch(), false);
        assert!(health.settled(written, &[written], None));
        assert_eq!(health.doubtful_in(written), ReplicaSet::EMPTY);
        assert_eq!(health.stale_in(written), set(&[C]));
    }

    #[test]
    fn a_vote_says_nothing_of_copies_that_it_did_not_need() {
        let mut health = Health::new(ReplicaSet::first(3), 1, 2, 1 << 22);
        let (beside, voted) = (range(0, 8), range(8, 8));
        write(&mut health, range(0, 16), &[]);
        assert!(!flush(&mut health, &[A, B, C]));
        health.repaired(B, beside, health.failure_epoch(), false);
        let both = range(0, 16);
        let lacking = health.disputed(both, 1).lacking;
        assert_eq!(lacking, [voted]);
        health.repaired(B, voted, health.failure_epoch(), false);
        assert!(health.settled(both, &lacking, None));
        assert_eq!(health.doubtful_parts(A, both), [beside], "B may lose it");
    }
}
