//! The vote threshold, which the engines raise and the operator changes (W10).

use super::Violation;
use super::ledger::Masks;
use super::pending::PendingKind;
use super::plan::bits;
use super::state::{Checked, World, trace};
use crate::quorum::health::{Wanted, majority};

/// The thresholds that a decision may have been made with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Thresholds {
    pub(super) least: usize,
    pub(super) most: usize,
}

impl Thresholds {
    pub(super) fn only(threshold: usize) -> Self {
        Self {
            least: threshold,
            most: threshold,
        }
    }

    fn include(&mut self, threshold: usize) {
        self.least = self.least.min(threshold);
        self.most = self.most.max(threshold);
    }
}

impl World {
    /// The threshold with which a disk of the plan is started that has these replicas.
    pub(super) fn threshold_at_start(&self) -> usize {
        match self.plan.follows {
            // The records know a lower one that could not be raised.
            true if !(self.plan.records && self.crashed) => majority(self.count()),
            _ => self.plan.threshold.min(self.count()),
        }
    }

    /// Notes the threshold of the engines. One that is higher must be founded.
    pub(super) fn note_threshold(&mut self) -> Checked {
        let now = self.shared.threshold();
        let before = self.threshold;
        if now == before {
            return Ok(());
        }
        trace!(self, "the vote threshold is {now}, it was {before}");
        self.threshold = now;
        self.thresholds.include(now);
        self.least_threshold = self.least_threshold.min(now);
        self.one_has_decided |= now == 1;
        for pending in &mut self.pending {
            pending.thresholds.include(now);
        }
        if now > before {
            self.statistics.raised += 1;
            let stale_before = self.view.stale;
            self.view.refresh(&self.shared, self.plan.disk());
            self.check_raised(&stale_before)?;
        }
        Ok(())
    }

    /// W10: t replicas in service hold the newest version of every sector, have what was flushed on
    /// disk, and can still do every write in flight. No vote on a failed write is due.
    /// `stale_before`: where each replica was stale before the input.
    fn check_raised(&self, stale_before: &Masks) -> Checked {
        let needed = self.threshold;
        let wanted = self.wanted_threshold();
        if needed > wanted {
            let text = format!("the vote threshold is {needed}, and {wanted} is wanted");
            return Err(Violation::new("W10", text));
        }
        // The same input may have decided it.
        let undecided = self.undecided & self.view.undecided;
        if undecided != 0 {
            let text = "the vote threshold is raised, and a failed write is undecided";
            return Err(Violation::new("W10", text).at(undecided));
        }
        if self.wanted.is_none() {
            // Another worker may have learned of a failure right after that.
            let is_stale = |r: &usize| {
                let was_stale = !self.overlapped || stale_before[*r] != 0;
                was_stale && self.view.stale[*r] != 0
            };
            let copied = self.count() - self.members().filter(is_stale).count();
            if needed > majority(copied) {
                let text = format!("the vote threshold is {needed}, with {copied} resynced");
                return Err(Violation::new("W10", text));
            }
        }
        let mut crashed = self.model.clone();
        crashed.crashed(self.now + 1);
        let evicted = match self.overlapped {
            true => self.ledger.evicted & self.before_input.evicted,
            false => self.ledger.evicted,
        };
        let in_service = self.members & !evicted;
        for sector in 0..self.changed_at.len() {
            let holds = |replica: &usize| {
                let (ledger, bit) = (&self.ledger, 1 << sector);
                let (replica, at) = (*replica, &self.replicas[*replica]);
                let wrong = (ledger.wrong(replica) | ledger.falsely_durable[replica]) & bit != 0;
                let newest = self.model.is_permitted(sector, at.value(sector), self.now);
                let durable = crashed.is_permitted(sector, at.durable(sector), self.now + 1);
                wrong || (newest && durable)
            };
            let holders = bits(u64::from(in_service)).filter(holds).count();
            // A failed write or a crash has left versions that are legal all.
            if holders < needed && self.ledger.mixed >> sector & 1 == 0 {
                let text = format!("the vote threshold is {needed}, and {holders} hold {sector}");
                return Err(Violation::new("W10", text).at(1 << sector));
            }
        }
        for pending in &self.pending {
            let PendingKind::Write(write) = &pending.kind else {
                continue;
            };
            let may = write.submitted_to & !write.failed & in_service;
            let may = usize::try_from(may.count_ones()).expect("few");
            // Another worker may have learned of one more failure right after that.
            let may = may + usize::from(self.overlapped);
            if write.submitted_to != 0 && !write.ended && may < needed {
                let text = format!("the vote threshold is {needed}, and {may} may do a write");
                return Err(Violation::new("W10", text).at(self.plan.mask(pending.range)));
            }
        }
        Ok(())
    }

    fn wanted_threshold(&self) -> usize {
        self.wanted.unwrap_or_else(|| majority(self.count()))
    }

    /// The operator wants another threshold, or one that follows the replicas.
    pub(super) fn change_threshold(&mut self) -> Checked {
        // Not one that needs a replica which never answers.
        let may_raise = self.plan.dead == 0;
        let most = if may_raise {
            self.count()
        } else {
            self.threshold
        };
        let given = 1 + self.random.index(most);
        let follows = may_raise && self.random.below(2) == 0;
        let wanted = match follows {
            true => Wanted::Majority,
            false => Wanted::Given(given),
        };
        trace!(self, "operator: the vote threshold is to be {wanted:?}");
        self.wanted = (!follows).then_some(given);
        self.plan.follows = follows;
        let changed = self.shared.want_threshold(wanted);
        self.tick_wanted = (1 << self.plan.workers) - 1;
        changed.map_err(|error| Violation::new("W10", error.to_string()))?;
        self.note_threshold()
    }
}
