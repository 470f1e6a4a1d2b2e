//! Which repairs may be done unasked (O5): up to a limit, then none until the operator decides.
//!
//! Pure. Repairs that an operator asks for, by a scrub that repairs, are not counted; such a scrub
//! is also the decision.

use crate::jobs::{JobChange, JobEvent, JobKind, JobStatus};

/// See the [module](self).
#[derive(Debug)]
pub(super) struct RepairGate {
    limit_sectors: u64,
    /// Sectors of the repairs that were begun unasked since the last decision.
    begun_sectors: u64,
    /// The limit was reached: the operator is to decide.
    is_closed: bool,
    /// Scrubs that repair and have not ended.
    repairing_scrubs: u32,
}

/// Whether a repair may be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Permission {
    Granted,
    /// From now on all are refused.
    LimitReached,
    Refused,
}

impl RepairGate {
    pub(super) fn new() -> Self {
        Self {
            limit_sectors: u64::MAX,
            begun_sectors: 0,
            is_closed: false,
            repairing_scrubs: 0,
        }
    }

    pub(super) fn configure(&mut self, limit_sectors: u64) {
        self.limit_sectors = limit_sectors;
    }

    /// Whether so many sectors may be repaired unasked, counted for each replica. If so they are.
    pub(super) fn begin(&mut self, sectors: u64) -> Permission {
        if self.repairing_scrubs > 0 {
            return Permission::Granted;
        }
        if self.is_closed {
            return Permission::Refused;
        }
        let begun_sectors = self.begun_sectors.saturating_add(sectors);
        if begun_sectors > self.limit_sectors {
            self.is_closed = true;
            return Permission::LimitReached;
        }
        self.begun_sectors = begun_sectors;
        Permission::Granted
    }

    /// Whether repairs are refused until the operator decides.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }

    /// Takes a change of a job in: a scrub that repairs is the decision of the operator.
    pub(super) fn job_changed(&mut self, event: &JobEvent) {
        let is_repairing = event.job.kind == JobKind::Scrub { repair: true };
        if !is_repairing || event.what != JobChange::Status {
            return;
        }
        match event.job.status {
            JobStatus::Created => {
                self.repairing_scrubs += 1;
                self.decided();
            }
            JobStatus::Null => self.repairing_scrubs -= 1,
            _ => {}
        }
    }

    fn decided(&mut self) {
        self.begun_sectors = 0;
        self.is_closed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::{ReplicaIndex, ReplicaSet};
    use crate::jobs::{FindingsByReplica, JobId, JobInfo, Places};

    fn event(kind: JobKind, status: JobStatus) -> JobEvent {
        JobEvent {
            job: JobInfo {
                id: JobId(0),
                kind,
                status,
                current_bytes: 0,
                total_bytes: 0,
                speed_bytes: 0,
                corrupt_sectors_found: 0,
                unreadable_sectors_found: 0,
                sectors_written: 0,
                findings: FindingsByReplica::new(),
                undecided: Places::default(),
                unread: ReplicaSet::EMPTY,
                error: None,
            },
            what: JobChange::Status,
        }
    }

    #[test]
    fn repairs_end_at_the_limit_until_a_scrub_repairs() {
        let mut gate = RepairGate::new();
        gate.configure(10);
        assert_eq!(gate.begin(8), Permission::Granted);
        assert_eq!(gate.begin(3), Permission::LimitReached);
        assert!(gate.is_closed());
        assert_eq!(gate.begin(1), Permission::Refused, "although it fits");
        for kind in [
            JobKind::Scrub { repair: false },
            JobKind::NeighbourhoodScrub,
            JobKind::Resync(ReplicaIndex(0)),
        ] {
            gate.job_changed(&event(kind, JobStatus::Created));
            gate.job_changed(&event(kind, JobStatus::Null));
            assert!(gate.is_closed());
        }
        let kind = JobKind::Scrub { repair: true };
        gate.job_changed(&event(kind, JobStatus::Created));
        assert!(!gate.is_closed());
        assert_eq!(gate.begin(100), Permission::Granted, "beside the scrub");
        gate.job_changed(&event(kind, JobStatus::Null));
        assert_eq!(gate.begin(10), Permission::Granted);
        assert_eq!(gate.begin(1), Permission::LimitReached);
    }
}
