//! O5: how much is repaired unasked, and that nothing is from the limit on until a scrub repairs.

use super::Violation;
use super::plan::Plan;
use super::state::{Checked, World};
use crate::common::operation::Operation;
use crate::jobs::{JobEvent, JobKind, JobStatus};

/// What has been repaired unasked.
#[derive(Debug, Default)]
pub(super) struct Unasked {
    /// Sectors since the last decision of the operator, counted for each replica.
    sectors: u64,
    /// The limit was reported, and the operator has not decided.
    is_reported: bool,
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
        let text = if self.unasked.is_reported {
            "a repair after the limit was reported".to_owned()
        } else if self.unasked.sectors > self.plan.repair_limit_sectors {
            format!("{} sectors are repaired unasked", self.unasked.sectors)
        } else {
            return Ok(());
        };
        let sectors = self.plan.mask(range);
        Err(Violation::new("O5", text).at(sectors))
    }

    /// An engine reports that the limit is reached.
    pub(super) fn limit_reported(&mut self) -> Checked {
        let Plan {
            rewrite_corrupted,
            repair_limit_sectors,
            ..
        } = self.plan;
        let may_be = rewrite_corrupted && repair_limit_sectors < u64::MAX;
        if !may_be || self.unasked.is_reported || self.unasked.scrubs > 0 {
            return Err(Violation::new("O5", "no limit was reached"));
        }
        self.unasked.is_reported = true;
        self.unasked.changed_at = self.steps;
        Ok(())
    }

    /// A scrub that repairs begins or has ended.
    pub(super) fn note_decision(&mut self, event: &JobEvent) {
        if event.job.kind != (JobKind::Scrub { repair: true }) {
            return;
        }
        match event.job.status {
            JobStatus::Created => {
                self.unasked.scrubs += 1;
                self.unasked.sectors = 0;
                self.unasked.is_reported = false;
            }
            JobStatus::Null => self.unasked.scrubs -= 1,
            _ => return,
        }
        self.unasked.changed_at = self.steps;
    }

    /// Whether losers are not repaired because of the limit.
    pub(super) fn leaves_losers(&self) -> bool {
        self.unasked.is_reported
    }
}
