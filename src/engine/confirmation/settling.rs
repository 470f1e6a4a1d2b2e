//! What a vote makes of ranges in which a write or a flush has failed (W7).
//!
//! After an unclean end one vote is enough, but fewer than t replicas may hold its winner (S5).
//! Such a decision is postponed until the winner is written to the others, and durable there. Until
//! then any copy is legal; if it was made before, too few copies would be fresh meanwhile, and all
//! flushes fail, also after a kill.

use super::super::context::{Context, Core};
use super::super::interface::Effects;
use super::super::repair::decided;
use super::super::survey::Survey;
use super::Confirmation;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange, runs};
use crate::quorum::health::Disputed;
use crate::quorum::vote::{Rule, Verdict};

/// Sectors of replicas.
type Parts = Vec<(ReplicaIndex, Vec<SectorRange>)>;

/// What is decided when its winner has been written and flushed.
#[derive(Debug, Default)]
pub(super) struct Postponed {
    pub(super) decided: Vec<SectorRange>,
    /// Where replicas are not known to hold the winner.
    pub(super) others: Parts,
    /// The members that have voted, or could have.
    members: ReplicaSet,
}

impl Postponed {
    pub(super) fn is_empty(&self) -> bool {
        self.decided.is_empty()
    }

    pub(super) fn overlaps(&self, range: SectorRange) -> bool {
        self.decided.iter().any(|run| run.overlaps(range))
    }

    /// The winner has been written there.
    pub(super) fn written(&mut self, replica: ReplicaIndex, range: SectorRange) {
        for (_, parts) in self.others.iter_mut().filter(|(r, _)| *r == replica) {
            *parts = runs::without(parts, &[range]);
        }
    }
}

impl Confirmation {
    /// W7: the vote decides what a failed write has left. What does not hold the winner is stale
    /// from now on, before the guest has its answer. Returns where the winner is to be written
    /// although no replica is at fault. What is postponed, since too few replicas hold it until
    /// then, is in [`Self::postponed`].
    pub(super) fn settle(
        &mut self,
        disputed: &Disputed,
        verdict: &Verdict,
        context: &mut Context<'_, impl Effects>,
    ) -> Parts {
        if disputed.is_empty() {
            return Vec::new();
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
        let (settled, postponed, became_stale) = shared.change_health(|health| {
            let settled = read.map(|replica| {
                let doubtful = match succeeded.contains(replica) {
                    true => health.doubtful_parts(replica, range),
                    false => Vec::new(),
                };
                let voted = runs::common(&doubtful, &disputed.lacking);
                (replica, runs::union(&voted, loses(replica)))
            });
            let mut settled: Parts = settled.collect();
            health.may_be_undone(&undone);
            let few = match recovered.is_empty() {
                true => Vec::new(),
                false => {
                    let mut lacking = health.volatile_parts(range);
                    lacking.extend(others.iter().cloned());
                    health.held_by_few((range, &recovered), &lacking, health.threshold())
                }
            };
            let few = runs::widened(&few, block_sectors);
            let later = Postponed {
                decided: runs::common(&now, &few),
                others: parts_in(&others, &few),
                members: health.members(),
            };
            let at_once = runs::without(&now, &few);
            let became_stale = health.decide(&at_once, &parts_in(&others, &at_once));
            let written = match later.is_empty() {
                true => ReplicaSet::EMPTY,
                false => health.in_service(),
            };
            for replica in written.iter() {
                let stale = runs::common(&health.stale_parts(replica, range), &later.decided);
                let lost = later.others.iter().filter(|(other, _)| *other == replica);
                let lacks = lost.fold(stale, |all, (_, parts)| runs::union(&all, parts));
                match settled.iter_mut().find(|(settled, _)| *settled == replica) {
                    Some((_, parts)) => *parts = runs::union(parts, &lacks),
                    None => settled.push((replica, lacks)),
                }
            }
            (settled, later, became_stale)
        });
        self.postponed = postponed;
        if became_stale {
            context.effects.health_changed();
        }
        settled
    }

    /// What was postponed is decided, as far as enough replicas hold the winner now. Returns
    /// whether that is all of it. If one that held it was removed, the vote is outdated.
    pub(super) fn decide_postponed(&mut self, context: &mut Context<'_, impl Effects>) -> bool {
        let postponed = std::mem::take(&mut self.postponed);
        if postponed.is_empty() {
            return true;
        }
        let Postponed {
            decided,
            others,
            members,
        } = postponed;
        let range = self.replies.range();
        let block_sectors = context.core.policy.block_sectors;
        let (few, became_stale) = context.shared().change_health(|health| {
            let needed = self.needed_now().unwrap_or(health.threshold());
            let few = health.held_by_few((range, &decided), &others, needed);
            let few = runs::widened(&few, block_sectors);
            let decided = runs::without(&decided, &few);
            (few, health.decide(&decided, &parts_in(&others, &decided)))
        });
        if became_stale {
            context.effects.health_changed();
        }
        self.outdated = !few.is_empty() && members != context.shared().members();
        few.is_empty()
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

/// Those of the parts that are in these runs.
fn parts_in(parts: &Parts, within: &[SectorRange]) -> Parts {
    let parts = parts.iter();
    parts
        .map(|(replica, runs)| (*replica, runs::common(runs, within)))
        .collect()
}
