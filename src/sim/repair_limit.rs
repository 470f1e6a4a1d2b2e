//! O5, O6: how much is repaired unasked, and that nothing is before the replicas are compared, nor
//! from the limit on until a scrub repairs.

use super::Violation;
use super::plan::Plan;
use super::state::{Checked, World};
use crate::common::operation::Operation;
use crate::jobs::{JobChange, JobEvent, JobInfo, JobKind, JobStatus};

/// What has been repaired unasked.
#[derive(Debug, Default)]
pub(super) struct Unasked {
    /// Sectors since the last decision of the operator, counted for each replica.
    sectors: u64,
    /// The limit was reported, and the operator has not decided.
    is_reported: bool,
    /// The comparison has found more than the limit, which is to be reported.
    is_due: bool,
    /// No scrub has read the whole disk yet.
    is_comparing: bool,
    /// Scrubs that repair.
    scrubs: u32,
    /// The last step in which any of this has changed but for a repair. An input that overlaps with
    /// that one may have begun a repair before.
    changed_at: u64,
}

impl World {
    /// An engine submits an operation: perhaps a repair.
    pub(super) fn check_unasked(&mut self, operation: &Operation) -> Checked {
        let engine = &self.engines[self.input_from];
        let (_, range) = operation.action.describe();
        let begun_before = self.overlapped && self.unasked.changed_at == self.steps;
        if self.unasked.scrubs > 0 || begun_before || !engine.repairs_unasked(operation) {
            return Ok(());
        }
        self.unasked.sectors += range.count;
        let rule = match self.unasked.is_comparing {
            true => "O6",
            false => "O5",
        };
        let text = if self.unasked.is_comparing {
            "a repair before the replicas are compared".to_owned()
        } else if self.leaves_losers() {
            "a repair after the limit was reached".to_owned()
        } else if self.unasked.sectors > self.plan.repair_limit_sectors {
            format!("{} sectors are repaired unasked", self.unasked.sectors)
        } else {
            return Ok(());
        };
        let sectors = self.plan.mask(range);
        Err(Violation::new(rule, text).at(sectors))
    }

    /// An engine reports that the limit is reached.
    pub(super) fn limit_reported(&mut self) -> Checked {
        let Plan {
            rewrite_corrupted,
            repair_limit_sectors,
            ..
        } = self.plan;
        let may_be = rewrite_corrupted && repair_limit_sectors < u64::MAX;
        let (is_new, is_due) = (!self.leaves_losers(), self.unasked.is_due);
        if !may_be || !(is_new || is_due) || self.unasked.scrubs > 0 {
            return Err(Violation::new("O5", "no limit was reached"));
        }
        (self.unasked.is_reported, self.unasked.is_due) = (true, false);
        self.unasked.changed_at = self.steps;
        Ok(())
    }

    /// A scrub that repairs begins or has ended, or the comparison has.
    pub(super) fn note_decision(&mut self, event: &JobEvent) {
        let JobKind::Scrub { repair } = event.job.kind else {
            return;
        };
        match (event.what, event.job.status) {
            (JobChange::Status, JobStatus::Created) if repair => {
                let scrubs = self.unasked.scrubs + 1;
                self.unasked = Unasked {
                    scrubs,
                    ..Unasked::default()
                };
            }
            (JobChange::Status, JobStatus::Null) if repair => self.unasked.scrubs -= 1,
            (JobChange::Completed, _) if self.unasked.is_comparing => {
                let job = &event.job;
                let found = job.corrupt_sectors_found + job.unreadable_sectors_found;
                self.unasked.is_comparing = false;
                self.unasked.is_due = found > self.plan.repair_limit_sectors;
            }
            _ => return,
        }
        self.unasked.changed_at = self.steps;
    }

    /// Whether losers are not repaired.
    pub(super) fn leaves_losers(&self) -> bool {
        self.unasked.is_reported || self.unasked.is_due || self.unasked.is_comparing
    }

    /// After a start of the daemon.
    pub(super) fn compare_first(&mut self) -> Checked {
        if !self.plan.compares_first {
            return Ok(());
        }
        self.unasked.is_comparing = true;
        let mut events = Vec::new();
        self.overlapped = false;
        self.shared.compare_first(|event| events.push(event));
        self.tick_wanted |= 1;
        self.jobs_reported(events)
    }

    /// What is due was reported.
    pub(super) fn check_limit_reported(&self) -> Checked {
        match self.unasked.is_due {
            true => Err(Violation::new(
                "O6",
                "the limit was reached, and not reported",
            )),
            false => Ok(()),
        }
    }

    /// Waits until the replicas are compared, unless the operator has cancelled that.
    pub(super) fn finish_comparison(&mut self) -> Checked {
        let is_scrub = |job: &JobInfo| matches!(job.kind, JobKind::Scrub { .. });
        while self.unasked.is_comparing && self.jobs.iter().any(is_scrub) {
            self.step()?;
        }
        Ok(())
    }
}
