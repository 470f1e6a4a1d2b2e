//! Which repairs may be done unasked: none before the images are compared (O6), then up to a limit,
//! then none until the operator decides (O5).
//!
//! Pure. Repairs that an operator asks for, by a scrub that repairs, are not counted; such a scrub
//! is also the decision.

use crate::jobs::{JobChange, JobEvent, JobKind, JobStatus};

/// See the [module](self).
#[derive(Debug)]
pub(super) struct RepairGate {
    limit_sectors: u64,
    /// The images are not compared yet.
    is_comparing: bool,
    /// Sectors of the repairs that were begun unasked since the last decision.
    begun_sectors: u64,
    /// The limit was reached: the operator is to decide.
    is_closed: bool,
    /// How the comparison has ended.
    news: Option<Compared>,
    /// Scrubs that repair and have not ended.
    repairing_scrubs: u32,
}

/// Which repairs are done unasked, if any are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnaskedRepairs {
    /// Up to the limit.
    Done,
    /// None: the images are not compared yet.
    Comparing,
    /// None: the limit was reached, and the operator is to decide.
    Stopped,
}

/// What the comparison has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    /// No more than is repaired unasked.
    Alike,
    /// More: the limit is reached, which is to be reported.
    TooDifferent,
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
            is_comparing: false,
            begun_sectors: 0,
            is_closed: false,
            news: None,
            repairing_scrubs: 0,
        }
    }

    pub(super) fn configure(&mut self, limit_sectors: u64) {
        self.limit_sectors = limit_sectors;
    }

    /// Repairs wait until a scrub has read the whole disk.
    pub(super) fn compare_first(&mut self) {
        self.is_comparing = true;
    }

    /// Whether so many sectors may be repaired unasked, counted for each replica. If so they are.
    pub(super) fn begin(&mut self, sectors: u64) -> Permission {
        if self.repairing_scrubs > 0 {
            return Permission::Granted;
        }
        if self.is_closed || self.is_comparing {
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

    /// Which repairs are done.
    pub(super) fn state(&self) -> UnaskedRepairs {
        if self.is_closed {
            UnaskedRepairs::Stopped
        } else if self.is_comparing {
            UnaskedRepairs::Comparing
        } else {
            UnaskedRepairs::Done
        }
    }

    /// How the comparison has ended, once.
    pub(super) fn take_news(&mut self) -> Option<Compared> {
        self.news.take()
    }

    /// Takes a change of a job in: a scrub that repairs is the decision of the operator, and one
    /// that has read the whole disk has compared the images.
    pub(super) fn job_changed(&mut self, event: &JobEvent) {
        let JobKind::Scrub { repair } = event.job.kind else {
            return;
        };
        match (event.what, event.job.status) {
            (JobChange::Status, JobStatus::Created) if repair => {
                self.repairing_scrubs += 1;
                self.begun_sectors = 0;
                (self.is_comparing, self.is_closed, self.news) = (false, false, None);
            }
            (JobChange::Status, JobStatus::Null) if repair => self.repairing_scrubs -= 1,
            (JobChange::Completed, _) if self.is_comparing => {
                let job = &event.job;
                let found = job.corrupt_sectors_found + job.unreadable_sectors_found;
                self.is_comparing = false;
                self.is_closed = found > self.limit_sectors;
                self.news = Some(match self.is_closed {
                    true => Compared::TooDifferent,
                    false => Compared::Alike,
                });
            }
            _ => {}
        }
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
        assert_eq!(gate.state(), UnaskedRepairs::Stopped);
        assert_eq!(gate.begin(1), Permission::Refused, "although it fits");
        for kind in [
            JobKind::Scrub { repair: false },
            JobKind::NeighbourhoodScrub,
            JobKind::Resync(ReplicaIndex(0)),
        ] {
            gate.job_changed(&event(kind, JobStatus::Created));
            gate.job_changed(&event(kind, JobStatus::Null));
            assert_eq!(gate.state(), UnaskedRepairs::Stopped);
        }
        let kind = JobKind::Scrub { repair: true };
        gate.job_changed(&event(kind, JobStatus::Created));
        assert_eq!(gate.state(), UnaskedRepairs::Done);
        assert_eq!(gate.begin(100), Permission::Granted, "beside the scrub");
        gate.job_changed(&event(kind, JobStatus::Null));
        assert_eq!(gate.begin(10), Permission::Granted);
        assert_eq!(gate.begin(1), Permission::LimitReached);
    }

    #[test]
    fn nothing_is_repaired_before_the_images_are_compared() {
        let scrub = JobKind::Scrub { repair: false };
        let ends = |what, found| {
            let mut end = event(scrub, JobStatus::Running);
            end.what = what;
            end.job.corrupt_sectors_found = found;
            end.job.unreadable_sectors_found = 1;
            end
        };
        for (found, state) in [(9, UnaskedRepairs::Done), (10, UnaskedRepairs::Stopped)] {
            let mut gate = RepairGate::new();
            gate.configure(10);
            gate.compare_first();
            assert_eq!(gate.begin(1), Permission::Refused);
            gate.job_changed(&event(scrub, JobStatus::Created));
            gate.job_changed(&ends(JobChange::Cancelled, found));
            assert_eq!(gate.begin(1), Permission::Refused);
            assert_eq!(gate.state(), UnaskedRepairs::Comparing);
            gate.job_changed(&ends(JobChange::Completed, found));
            assert_eq!(gate.state(), state);
            let (news, permission) = match state {
                UnaskedRepairs::Done => (Compared::Alike, Permission::Granted),
                _ => (Compared::TooDifferent, Permission::Refused),
            };
            assert_eq!((gate.take_news(), gate.take_news()), (Some(news), None));
            assert_eq!(gate.begin(1), permission);
            // Later ones are scrubs like others.
            gate.job_changed(&ends(JobChange::Completed, found));
            assert_eq!((gate.state(), gate.take_news()), (state, None));
        }
        let mut gate = RepairGate::new();
        gate.compare_first();
        let kind = JobKind::Scrub { repair: true };
        gate.job_changed(&event(kind, JobStatus::Created));
        gate.job_changed(&event(kind, JobStatus::Null));
        assert_eq!(
            gate.state(),
            UnaskedRepairs::Done,
            "the operator has decided"
        );
    }
}
