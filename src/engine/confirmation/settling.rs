//! What a vote makes of ranges in which a write or a flush has failed (W7).

use super::super::context::{Context, Core};
use super::super::interface::Effects;
use super::super::repair::decided;
use super::super::survey::Survey;
use super::Confirmation;
use crate::common::runs;
use crate::common::{ReplicaIndex, SectorRange};
use crate::quorum::health::Disputed;
use crate::quorum::vote::{Rule, Verdict};

impl Confirmation {
    /// W7: the vote decides what a failed write has left. What does not hold the winner is stale
    /// from now on, before the guest has its answer. Returns where the winner is to be written
    /// although no replica is at fault, and whether too few replicas hold it until then although
    /// one vote was enough (S5).
    pub(super) fn settle(
        &self,
        disputed: &Disputed,
        verdict: &Verdict,
        context: &mut Context<'_, impl Effects>,
    ) -> (Vec<(ReplicaIndex, Vec<SectorRange>)>, bool) {
        if disputed.is_empty() {
            return (Vec::new(), false);
        }
        let block_sectors = context.core.policy.block_sectors;
        let left = &verdict.undecided;
        let now = decided(&disputed.undecided, left, block_sectors);
        let range = self.replies.range();
        let shared = context.shared();
        let succeeded = self.replies.tally().succeeded();
        let loses = |replica: ReplicaIndex| {
            let mut excused = verdict.excused.iter();
            let runs = excused.find(|(loser, _)| *loser == replica);
            runs.map_or(&[][..], |(_, runs)| &runs[..])
        };
        let recovered = runs::common(&now, &disputed.unrecovered);
        // S5: copies without a vote may be what has lost.
        let without_vote = |member: ReplicaIndex| {
            if recovered.is_empty() {
                return Vec::new();
            }
            let (stale, doubtful) = shared.health(|health| {
                let stale = health.stale_parts(member, range);
                (stale, health.doubtful_parts(member, range))
            });
            let votes = runs::common(&doubtful, &disputed.lacking);
            runs::common(&recovered, &runs::without(&stale, &votes))
        };
        let others: Vec<_> = shared
            .members()
            .iter()
            .map(|member| {
                let loses = || runs::common(&now, loses(member));
                let mut surveys = self.surveys.iter();
                let survey = surveys.find(|survey| survey.replica == member);
                let not_read = survey.map(|survey| survey.not_read(range));
                let runs = match not_read {
                    _ if succeeded.contains(member) => loses(),
                    Some(not_read) => runs::union(&loses(), &runs::common(&now, &not_read)),
                    None => now.clone(),
                };
                let runs = runs::union(&runs, &without_vote(member));
                (member, runs)
            })
            .collect();
        let unproven = runs::without(&disputed.lacking, &disputed.proven);
        let undone = runs::without(&unproven, left);
        let read = shared.members().iter().filter(|member| {
            let is_surveyed = |survey: &Survey| survey.replica == *member;
            succeeded.contains(*member) || self.surveys.iter().any(is_surveyed)
        });
        let needed = self.needed();
        let (settled, by_few, became_stale) = shared.change_health(|health| {
            let settled = read.map(|replica| {
                let doubtful = match succeeded.contains(replica) {
                    true => health.doubtful_parts(replica, range),
                    false => Vec::new(),
                };
                let voted = runs::common(&doubtful, &disputed.lacking);
                (replica, runs::union(&voted, loses(replica)))
            });
            let mut settled: Vec<_> = settled.collect();
            health.may_be_undone(&undone);
            let became_stale = health.decide(&now, &others);
            let mut by_few = false;
            if !recovered.is_empty() {
                // One vote was enough. Where too few hold the winner, it is written to all others.
                let lacking = health.disputed(range, needed).lacking;
                let few = runs::common(&recovered, &lacking);
                by_few = !few.is_empty();
                for replica in health.in_service().iter() {
                    let stale = runs::common(&health.stale_parts(replica, range), &few);
                    match settled.iter_mut().find(|(settled, _)| *settled == replica) {
                        Some((_, parts)) => *parts = runs::union(parts, &stale),
                        None => settled.push((replica, stale)),
                    }
                }
            }
            (settled, by_few, became_stale)
        });
        if became_stale {
            context.effects.health_changed();
        }
        (settled, by_few)
    }

    /// Records which sectors have no winner now (R3).
    pub(super) fn note_undecided(
        &self,
        verdict: &Verdict,
        context: &mut Context<'_, impl Effects>,
    ) {
        let shared = context.shared();
        let is_vote = matches!(self.terms.rule, Rule::Threshold(_));
        if verdict.undecided.is_empty() && !(is_vote && shared.anything_undecided()) {
            return;
        }
        let range = self.replies.range();
        shared.change_health(|health| {
            if is_vote {
                health.voted(range, &verdict.undecided);
            } else {
                // What one replica can read need not have a winner.
                verdict
                    .undecided
                    .iter()
                    .for_each(|run| health.voted(*run, &[*run]));
            }
        });
    }

    /// The first undecided sectors on which the replicas differ although all of them are up to
    /// date and have been read.
    pub(super) fn first_difference(
        &self,
        disputed: &Disputed,
        verdict: &Verdict,
        core: &Core,
    ) -> Option<SectorRange> {
        let range = self.replies.range();
        let members = core.shared.members();
        let all_read = members.without(self.replies.tally().succeeded()).is_empty();
        if verdict.undecided.is_empty() || !all_read {
            return None;
        }
        let stale = core.shared.health(|health| {
            let stale = members
                .iter()
                .map(|member| health.stale_parts(member, range));
            stale.fold(disputed.undecided.clone(), |all, parts| {
                runs::union(&all, &parts)
            })
        });
        runs::without(&verdict.undecided, &stale).first().copied()
    }
}
