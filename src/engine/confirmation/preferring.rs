//! The operator prefers a replica: where the vote has no winner, its copy is written to the others,
//! like a write of the guest (W12).
//!
//! Whole blocks are written, and none that keeps a sector without a winner.

use std::rc::Rc;

use super::super::context::Context;
use super::super::interface::Effects;
use super::super::repair::{RepairKind, RepairWrite, bytes_of, decided};
use super::Confirmation;
use crate::common::buffer::Buffer;
use crate::common::operation::OperationType;
use crate::common::report::{Fact, Requester};
use crate::common::runs;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::quorum::health::{Disputed, WriteBegun, WriteEnd};
use crate::quorum::tally::Tally;
use crate::quorum::vote::{Verdict, WinningRun};

/// A write of what the preferred replica holds.
#[derive(Debug)]
pub(super) struct Preference {
    /// The blocks that are written.
    range: SectorRange,
    /// The sectors of them that had no winner.
    sectors: Vec<SectorRange>,
    begun: WriteBegun,
    /// The replicas that hold it already.
    holders: ReplicaSet,
    /// Those to which it is written.
    tally: Tally,
}

impl Confirmation {
    /// Makes what the preferred replica holds the winner where there is none and its copy may
    /// decide ([`preferable_parts`](crate::quorum::health::Health::preferable_parts)).
    pub(super) fn prefer(
        &self,
        verdict: &mut Verdict,
        disputed: &Disputed,
        context: &mut Context<'_, impl Effects>,
    ) -> Vec<Preference> {
        let Some(replica) = self.terms.prefers else {
            return Vec::new();
        };
        let range = self.replies.range();
        let mut surveys = self.surveys.iter();
        let not_read = match surveys.find(|survey| survey.replica == replica) {
            _ if self.replies.tally().succeeded().contains(replica) => Vec::new(),
            Some(survey) => survey.not_read(range),
            None => vec![range],
        };
        let block_sectors = context.core.policy.block_sectors;
        let undecided = &verdict.undecided;
        let preferences = context.shared().change_begins(range, |health| {
            let preferable = health.preferable_parts(replica, range, disputed);
            let readable = runs::without(&preferable, &not_read);
            let wins = runs::common(undecided, &readable);
            let left = runs::without(undecided, &wins);
            let blocks = decided(&runs::widened(&wins, block_sectors), &left, block_sectors);
            // A durable write that waits for its flush is not what the disk is going to hold (W5).
            health.may_be_undone(&runs::common(&wins, &blocks));
            let preference = |range: SectorRange| Preference {
                range,
                sectors: runs::common(&wins, &[range]),
                // From here on a failure of the replica is one during the write.
                begun: health.write_begins(range),
                holders: ReplicaSet::EMPTY,
                tally: Tally::default(),
            };
            blocks.into_iter().map(preference).collect::<Vec<_>>()
        });
        // Nothing is preferred where the mark was taken away again meanwhile.
        let preferences = preferences.unwrap_or_default();
        for Preference { range, sectors, .. } in &preferences {
            verdict.undecided = runs::without(&verdict.undecided, sectors);
            for run in sectors {
                let fact = Fact::PreferenceBegins(replica, *range, *run);
                context.effects.count(fact);
                verdict.winners.push(WinningRun {
                    range: *run,
                    held_by: replica,
                });
            }
        }
        verdict.winners.sort_unstable_by_key(|run| run.range.start);
        preferences
    }

    /// With its lock: whether it waits until its range is marked, since a preferred replica may
    /// change what the disk holds there (S4). If it cannot be marked, none is preferred.
    pub(super) fn waits_for_marks(&mut self, context: &mut Context<'_, impl Effects>) -> bool {
        if self.terms.prefers.is_none() {
            return false;
        }
        if context.core.withheld.take_refused(context.id) {
            self.terms.prefers = None;
        } else if !context.shared().may_change(self.replies.range()) {
            context.core.wait_for_marks(context.id);
            return true;
        }
        false
    }

    /// The blocks that are written.
    pub(super) fn preferred(&self) -> Vec<SectorRange> {
        self.preferences
            .iter()
            .map(|written| written.range)
            .collect()
    }

    /// The replicas that count as holders of what is preferred when it is written.
    pub(super) fn has_preferred(&self) -> ReplicaSet {
        let preferences = self.preferences.iter();
        preferences.fold(ReplicaSet::EMPTY, |all, written| {
            all.or(written.holders).or(written.tally.asked())
        })
    }

    /// The writes of what the preferred replica holds, as a part of `winner`: to all replicas in
    /// service that are not known to hold it.
    pub(super) fn writes_of_preferred(
        &mut self,
        winner: &Rc<Buffer>,
        context: &Context<'_, impl Effects>,
    ) -> Vec<RepairWrite> {
        let whole = self.replies.range();
        let (replies, shared) = (&self.replies, context.shared());
        let mut writes = Vec::new();
        for Preference {
            range,
            holders,
            tally,
            ..
        } in &mut self.preferences
        {
            let bytes = bytes_of(*range, whole);
            let (in_service, fresh) = shared.health(|health| {
                let is_fresh = |r: &ReplicaIndex| health.stale_parts(*r, *range).is_empty();
                let fresh: ReplicaSet = health.members().iter().filter(is_fresh).collect();
                (health.in_service(), fresh)
            });
            let holds = |replica: &ReplicaIndex| {
                replies.data(*replica)[bytes.clone()] == winner[bytes.clone()]
            };
            let read = replies.tally().succeeded().and(in_service).and(fresh);
            *holders = read.iter().filter(holds).collect();
            *tally = Tally::new(in_service.without(*holders));
            writes.extend(tally.waiting().iter().map(|replica| RepairWrite {
                replica,
                range: *range,
                zero: false,
                kind: RepairKind::Preferred,
                is_of_loser: false,
            }));
        }
        writes
    }

    /// A replica has replied to such a write.
    pub(super) fn preferred_written(
        &mut self,
        replica: ReplicaIndex,
        range: SectorRange,
        success: bool,
        context: &Context<'_, impl Effects>,
    ) {
        let mut preferences = self.preferences.iter_mut();
        let written = preferences.find(|written| written.range == range);
        let Some(Preference { tally, begun, .. }) = written else {
            unreachable!("a write of what is preferred");
        };
        tally.record(replica, success);
        if !success {
            let begun = *begun;
            let shared = context.shared();
            shared.change_health(|health| health.write_failed(begun, replica));
        }
    }

    /// Evicted replicas count as not asked: the write may still happen there, or not.
    pub(super) fn forget_preferred(&mut self, evicted: ReplicaSet) {
        for written in &mut self.preferences {
            written.tally.forget(evicted);
        }
    }

    /// All replicas have replied or were evicted: records what each of them holds.
    pub(super) fn finish_preferences(&mut self, context: &mut Context<'_, impl Effects>) {
        for written in std::mem::take(&mut self.preferences) {
            let Preference { range, begun, .. } = written;
            let succeeded = written.holders.or(written.tally.succeeded());
            let asked = succeeded.or(written.tally.failed());
            let (success, became_stale) = context.shared().write_ends(range, |health| {
                let success = succeeded.and(health.members()).len() >= health.threshold();
                let beside = runs::without(&[range], &written.sectors);
                let unproven = health.unproven_parts(&beside);
                let end = WriteEnd {
                    asked,
                    succeeded,
                    begun,
                    success,
                };
                let became_stale = health.write_ended(&end);
                // The rest of the blocks is a copy of what was there.
                health.mark_copied(&unproven);
                // It does not count as a write of the guest.
                health.may_be_undone(&written.sectors);
                (success, became_stale)
            });
            if became_stale {
                context.effects.health_changed();
            }
            let fact = Fact::PreferenceEnds(range, succeeded, success);
            context.effects.count(fact);
            if !success {
                self.end.undecided = runs::union(&self.end.undecided, &written.sectors);
                context.report_failure(Requester::Job, OperationType::Write, range);
            }
        }
    }
}
