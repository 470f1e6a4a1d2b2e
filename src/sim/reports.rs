//! I3: every report has a cause.

use super::Violation;
use super::ledger::Seen;
use super::plan::{bits, mask_below, widen};
use super::state::{Checked, ExpectedReport, World, trace};
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Report};
use crate::common::{Errno, ReplicaIndex, SectorRange};
use crate::engine::ReadPattern;

/// The error in the report of an eviction.
const TIMED_OUT: Errno = Errno(110);

impl World {
    /// I3, R3, R4: a report has a cause. `failures` counts the QUORUM_FAILUREs.
    pub(super) fn check_report(
        &mut self,
        report: &Report,
        expected: &mut Option<ExpectedReport>,
        failures: &mut i64,
    ) -> Checked {
        trace!(self, "report: {}", show_report(report));
        let (replica, operation, range, cause) = match report {
            Report::Failure { .. } => {
                *failures += 1;
                return Ok(());
            }
            Report::Evicted(replica) => {
                let bit = 1 << replica.0;
                if self.timed_out & bit != 0 {
                    self.timed_out &= !bit;
                    return self.check_eviction(replica.as_usize());
                }
                // S2: its record cannot be written.
                if self.records.failed & bit == 0 {
                    let text = format!("replica {} is evicted without an error", replica.0);
                    return Err(Violation::new("I3", text));
                }
                self.records.failed &= !bit;
                return Ok(());
            }
            Report::KeptOut { .. } => return Ok(()),
            Report::RepairLimit { .. } => return self.limit_reported(),
            Report::Rejoined(replica) => {
                // Whatever has failed before, its record is written again.
                self.records.failed &= !(1 << replica.0);
                return self.check_rejoin(replica.as_usize());
            }
            Report::Bad {
                replica,
                operation,
                range,
                cause,
            } => (*replica, *operation, range, cause),
        };
        match cause {
            Cause::Error(errno) => {
                if *errno == TIMED_OUT {
                    self.timed_out |= 1 << replica.0;
                    return self.check_eviction(replica.as_usize());
                }
                let is_this = |t: &ExpectedReport| {
                    (t.replica, t.operation, t.errno) == (replica, operation, *errno)
                };
                let is_read = operation == OperationType::Read;
                if expected.as_ref().is_some_and(is_this) {
                    *expected = None;
                } else if !is_read || !self.note_unreadable(replica, *range) {
                    let text = format!("replica {} has not had this error: {errno}", replica.0);
                    return Err(Violation::new("I3", text));
                }
            }
            Cause::Corrupt(evidence) => {
                self.statistics.accusations += 1;
                if self.plan.read_pattern == ReadPattern::Fifo && self.jobs.is_empty() {
                    return Err(Violation::new("R8", "read-pattern=fifo takes no vote"));
                }
                if evidence.bad_sectors_cut {
                    self.accused |= self.plan.mask(*range);
                }
                for run in &evidence.bad_sectors {
                    self.accused |= mask_below(run.count) << run.start;
                    let sectors = mask_below(run.count) << run.start;
                    for sector in bits(sectors) {
                        self.check_accusation(replica.as_usize(), sector)?;
                    }
                    self.ledger.unsound[replica.as_usize()] |=
                        widen(sectors, self.plan.block_sectors);
                }
            }
        }
        Ok(())
    }

    /// Whether the report is of blocks that could not be read by themselves.
    pub(super) fn note_unreadable(&mut self, replica: ReplicaIndex, range: SectorRange) -> bool {
        let (replica, sectors) = (replica.as_usize(), self.plan.mask(range));
        let is_reported = sectors & !self.ledger.parts_failed[replica] == 0;
        if is_reported {
            self.ledger.parts_failed[replica] &= !sectors;
            self.ledger.parts_unreported[replica] &= !sectors;
        }
        is_reported
    }

    /// A vote may have come before the error that reports a lost page to another worker.
    pub(super) fn with_lost_pages(&self, mut seen: Seen) -> Seen {
        if self.overlapped {
            for (now, before) in seen.dropped.iter_mut().zip(self.before_input.dropped) {
                *now |= before;
            }
        }
        seen
    }

    /// I3, W7: a replica is reported for a sector only if a fault may have corrupted it; a failed
    /// write has not.
    pub(super) fn check_accusation(&mut self, replica: usize, sector: usize) -> Checked {
        let now = self.with_lost_pages(self.ledger.seen());
        if (now.wrong(replica) | self.ledger.accusable) >> sector & 1 == 1 {
            return Ok(());
        }
        let wrong = now.wrong_at(sector);
        // More of the fresh ones are wrong than not, and copies in doubt have voted with them.
        let in_doubt = |r: &usize| (now.excused[*r] & !now.wrong(*r)) >> sector & 1 == 1;
        let is_right = |r: &usize| (now.excused[*r] | now.wrong(*r)) >> sector & 1 == 0;
        let right = self.members().filter(is_right).count();
        let supporters = match wrong > right {
            true => self.members().filter(in_doubt).count(),
            false => 0,
        };
        if wrong + supporters >= self.least_threshold {
            // The corrupt replicas have won; a repair may replace right bytes now.
            self.mark_accusable(1 << sector);
            return Ok(());
        }
        let text = format!("replica {replica} is accused, and no fault has made {sector} wrong");
        Err(Violation::new("I3", text).at(1 << sector))
    }
}

fn show_report(report: &Report) -> String {
    match report {
        Report::Failure { operation, .. } => format!("QUORUM_FAILURE {operation:?}"),
        Report::Evicted(replica) => format!("replica {} evicted", replica.0),
        Report::KeptOut { replica, time } => format!("replica {} kept out for {time:?}", replica.0),
        Report::RepairLimit { limit_sectors } => format!("limit of {limit_sectors} reached"),
        Report::Rejoined(replica) => format!("replica {} rejoined", replica.0),
        Report::Bad {
            replica,
            operation,
            cause,
            ..
        } => match cause {
            Cause::Error(errno) => format!(
                "QUORUM_REPORT_BAD {operation:?}: replica {}: {errno}",
                replica.0
            ),
            Cause::Corrupt(evidence) => {
                format!(
                    "QUORUM_REPORT_BAD: replica {} at {:?}",
                    replica.0, evidence.bad_sectors
                )
            }
        },
    }
}
