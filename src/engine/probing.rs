//! Replicas that failed a read under the lock, read again in smaller parts (R4): to find a winner
//! where the others have none, and to find what is to be repaired or counted.
//!
//! One replica is read at a time, a few parts at once. While a guest waits, only sectors without a
//! winner matter, and the first that cannot get one ends the search: the request fails. Nothing
//! else is urgent: then the largest parts come first, and a replica that fails nearly all of them
//! is given up.

use super::survey::{Order, Survey};
use crate::common::operation::Reply;
use crate::common::runs::Cursor;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::quorum::health::FailureEpoch;
use crate::quorum::vote::{Ballot, Rule, Verdict, vote};

#[derive(Debug)]
pub(super) struct Probing {
    range: SectorRange,
    surveys: Vec<Survey>,
    /// The parts that are being read, all of one replica.
    pending: Vec<(ReplicaIndex, SectorRange)>,
    /// What the replicas have voted that succeeded, and those whose parts could be read.
    pub(super) verdict: Verdict,
    /// Orders the vote against failed flushes and evictions.
    voted_at: FailureEpoch,
    /// The replicas of which all unreadable blocks are to be found.
    locate: ReplicaSet,
    /// A guest waits for the winner.
    guest_waits: bool,
}

/// The parts to read next, all of one replica.
pub(super) type Parts = (ReplicaIndex, Vec<SectorRange>);

/// How the votes stand on the sectors without a winner.
#[derive(Debug)]
struct Undecided {
    /// The runs that may still get a winner, in order.
    hopeful: Vec<SectorRange>,
    /// Some sector cannot get one any more.
    is_hopeless: bool,
}

impl Probing {
    /// `surveys`: of the replicas that failed, as listed.
    pub(super) fn new(
        range: SectorRange,
        surveys: Vec<Survey>,
        (verdict, voted_at): (Verdict, FailureEpoch),
        locate: ReplicaSet,
        guest_waits: bool,
    ) -> Self {
        Self {
            range,
            surveys,
            pending: Vec::new(),
            verdict,
            voted_at,
            locate,
            guest_waits,
        }
    }

    /// Counts the votes again. What has a winner keeps it, so that an answer stays true; but after
    /// a failure of a replica that may have voted with old data all votes are counted anew.
    pub(super) fn count(
        &mut self,
        ballots: &[Ballot<'_>],
        (rule, any_copy): (Rule, &[SectorRange]),
        now: FailureEpoch,
    ) {
        if now == self.voted_at {
            self.verdict.vote_again(self.range, ballots, rule, any_copy);
        } else {
            self.verdict = vote(self.range, ballots, rule, any_copy);
            self.voted_at = now;
        }
    }

    /// The next parts to read; `None`: the search is over. The flag: the guest that waits can be
    /// answered now. `votes`: how many votes a winner needs, and where one is enough. `voters`: for
    /// each replica that succeeded the runs on which it has no vote.
    pub(super) fn next(
        &mut self,
        votes: (usize, &[SectorRange]),
        voters: &[Vec<SectorRange>],
    ) -> (Option<Parts>, bool) {
        assert!(self.pending.is_empty(), "one step at a time");
        let undecided = self.undecided(votes, voters);
        let waited = self.guest_waits;
        if waited && !undecided.is_hopeless {
            let parts = self.parts(&undecided.hopeful, ReplicaSet::EMPTY, Order::Lowest);
            if parts.is_some() {
                return (parts, false);
            }
        }
        self.guest_waits = false;
        let parts = self.parts(&undecided.hopeful, self.locate, Order::Largest);
        (parts, waited)
    }

    /// The next parts that overlap `wanted`; of the replicas in `everywhere`, any.
    fn parts(
        &mut self,
        wanted: &[SectorRange],
        everywhere: ReplicaSet,
        order: Order,
    ) -> Option<Parts> {
        // First those that have failed least.
        let mut surveys: Vec<&mut Survey> = self.surveys.iter_mut().collect();
        surveys.sort_by_key(|survey| survey.failed());
        let everything = [self.range];
        surveys.into_iter().find_map(|survey| {
            let replica = survey.replica;
            let wanted = if everywhere.contains(replica) {
                &everything
            } else {
                wanted
            };
            let parts = survey.next_parts(wanted, order);
            self.pending
                .extend(parts.iter().map(|part| (replica, *part)));
            (!parts.is_empty()).then_some((replica, parts))
        })
    }

    /// Takes the reply to a read of a part. `None` if the search does not wait for it, otherwise
    /// the part.
    pub(super) fn reply(&mut self, reply: &Reply) -> Option<SectorRange> {
        let part = (reply.replica, reply.action.describe().1);
        let index = self.pending.iter().position(|pending| *pending == part)?;
        self.pending.swap_remove(index);
        let survey = self
            .surveys
            .iter_mut()
            .find(|survey| survey.replica == reply.replica)?;
        survey.ended(part.1, reply.result);
        if let Err(errno) = reply.result
            && !self.guest_waits
        {
            survey.give_up_if_hopeless(errno);
        }
        Some(part.1)
    }

    /// Goes on without replicas that are out of service. What they have given counts.
    pub(super) fn forget(&mut self, gone: ReplicaSet) {
        self.pending.retain(|(replica, _)| !gone.contains(*replica));
        for survey in &mut self.surveys {
            if gone.contains(survey.replica) {
                survey.close();
            }
        }
    }

    pub(super) fn pending(&self) -> &[(ReplicaIndex, SectorRange)] {
        &self.pending
    }

    pub(super) fn surveys(&self) -> &[Survey] {
        &self.surveys
    }

    pub(super) fn into_parts(self) -> (Verdict, Vec<Survey>) {
        (self.verdict, self.surveys)
    }

    /// How the sectors without a winner stand, if each version that is still to come were the same.
    fn undecided(
        &self,
        (votes, any_copy): (usize, &[SectorRange]),
        voters: &[Vec<SectorRange>],
    ) -> Undecided {
        let mut any_copy = Cursor::new(any_copy);
        let index = |sector: u64| usize::try_from(sector - self.range.start).expect("a fragment");
        let count = index(self.range.end());
        let mut possible = vec![voters.len() + self.surveys.len(); count];
        let not_read = |survey: &Survey| survey.unavailable(self.range);
        let excluded = voters
            .iter()
            .cloned()
            .chain(self.surveys.iter().map(not_read));
        for run in excluded.flatten() {
            let (start, end) = (
                run.start.max(self.range.start),
                run.end().min(self.range.end()),
            );
            possible[index(start)..index(end)]
                .iter_mut()
                .for_each(|votes| *votes -= 1);
        }
        let mut undecided = Undecided {
            hopeful: Vec::new(),
            is_hopeless: false,
        };
        for sector in self
            .verdict
            .undecided
            .iter()
            .flat_map(|run| run.start..run.end())
        {
            let votes = if any_copy.has(sector) { 1 } else { votes };
            if possible[index(sector)] < votes {
                undecided.is_hopeless = true;
                continue;
            }
            match undecided.hopeful.last_mut() {
                Some(last) if last.end() == sector => last.count += 1,
                _ => undecided.hopeful.push(SectorRange::new(sector, 1)),
            }
        }
        undecided
    }
}
