//! The results of the jobs that have ended, also before the daemon started, as far as the records
//! have them (O7). Pure.
//!
//! Invariants: at most [`ENDED_JOBS_MAX`] are kept, the last ones; and of the scrubs that have
//! completed the last one, however many other jobs have ended since.

use std::collections::VecDeque;
use std::time::SystemTime;

use serde::Serialize;

use super::errors::Timestamp;
use super::events::{Names, Notice};
use super::job_state::{JobResult, JobState};
use crate::jobs::{JobChange, JobKind, JobStatus};
use crate::limits::{ENDED_JOBS_MAX, RECORD_JOBS_MAX};
use crate::record::PastJob;

/// A job that has ended.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct EndedJob {
    /// The job at its end.
    #[serde(flatten)]
    pub job: JobState,
    /// It was cancelled.
    pub cancelled: bool,
    /// When it ended.
    pub timestamp: Timestamp,
    /// It ended before the daemon started, as the records say: another job may have its name now.
    pub before_start: bool,
    #[serde(skip)]
    is_whole_scrub: bool,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct JobHistory(VecDeque<EndedJob>);

impl JobHistory {
    /// Records the end of a job; ignores other notices. Whether it was one.
    pub(super) fn record(&mut self, notice: &Notice, at: SystemTime, names: &Names) -> bool {
        let Notice::Job(event) = notice else {
            return false;
        };
        let cancelled = match event.what {
            JobChange::Status => return false,
            JobChange::Completed => false,
            JobChange::Cancelled => true,
        };
        let mut job = JobState::new(&event.job, &names.nodes);
        job.status = JobStatus::Concluded.name();
        self.push(EndedJob {
            job,
            cancelled,
            timestamp: at.into(),
            before_start: false,
            is_whole_scrub: !cancelled && matches!(event.job.kind, JobKind::Scrub { .. }),
        });
        true
    }

    /// Begins with the jobs that the records have.
    pub(super) fn restore(&mut self, jobs: &[PastJob]) {
        for job in jobs.iter().filter_map(EndedJob::of_past) {
            self.push(job);
        }
    }

    fn push(&mut self, job: EndedJob) {
        if self.0.len() >= ENDED_JOBS_MAX {
            let oldest = usize::from(is_last_scrub(&self.0, 0));
            self.0.remove(oldest);
        }
        self.0.push_back(job);
    }

    /// The jobs, in the order in which they have ended.
    pub(super) fn list(&self) -> Vec<EndedJob> {
        self.0.iter().cloned().collect()
    }

    /// What the records are to keep.
    pub(super) fn past(&self) -> Vec<PastJob> {
        let mut jobs = self.0.clone();
        while jobs.len() > RECORD_JOBS_MAX {
            let oldest = usize::from(is_last_scrub(&jobs, 0));
            jobs.remove(oldest);
        }
        jobs.iter().map(EndedJob::past).collect()
    }
}

fn is_last_scrub(jobs: &VecDeque<EndedJob>, index: usize) -> bool {
    let mut later = jobs.iter().skip(index + 1);
    jobs[index].is_whole_scrub && !later.any(|ended| ended.is_whole_scrub)
}

impl EndedJob {
    /// As the records keep it, without the places of what it has found.
    fn past(&self) -> PastJob {
        let job = &self.job;
        PastJob {
            id: job.id.clone(),
            r#type: job.r#type.to_owned(),
            node_name: job.node_name.clone(),
            cancelled: self.cancelled,
            error: job.error.clone(),
            ended: self.timestamp.seconds,
            done_bytes: job.current_progress,
            total_bytes: job.total_progress,
            corrupt_sectors: job.result.corrupt_sectors_found,
            unreadable_sectors: job.result.unreadable_sectors_found,
            sectors_written: job.result.sectors_written,
        }
        .bounded()
    }

    /// One that the records have. `None`: of a type that this version does not know.
    fn of_past(past: &PastJob) -> Option<Self> {
        let r#type = JobKind::TYPES
            .into_iter()
            .find(|name| *name == past.r#type)?;
        Some(Self {
            job: JobState {
                id: past.id.clone(),
                r#type,
                status: JobStatus::Concluded.name(),
                current_progress: past.done_bytes,
                total_progress: past.total_bytes,
                error: past.error.clone(),
                node_name: past.node_name.clone(),
                speed: 0,
                result: JobResult {
                    corrupt_sectors_found: past.corrupt_sectors,
                    unreadable_sectors_found: past.unreadable_sectors,
                    sectors_written: past.sectors_written,
                    replicas: Vec::new(),
                    undecided: None,
                },
            },
            cancelled: past.cancelled,
            timestamp: Timestamp {
                seconds: past.ended,
                microseconds: 0,
            },
            before_start: true,
            is_whole_scrub: !past.cancelled && r#type == JobKind::SCRUB,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::map::tests::scrub;
    use std::time::UNIX_EPOCH;

    #[test]
    fn the_last_jobs_are_kept_and_the_last_scrub_that_completed() {
        let names = Names {
            reference: "disk".into(),
            nodes: std::iter::empty::<&str>().collect(),
        };
        let mut history = JobHistory::default();
        let mut end = |id: usize, what| {
            let notice = scrub(&format!("job{id}"), what, JobStatus::Running, None);
            history.record(&notice, UNIX_EPOCH, &names);
            history.list()
        };
        assert!(end(0, JobChange::Status).is_empty());
        end(1, JobChange::Completed);
        let mut list = Vec::new();
        for id in 2..3 * ENDED_JOBS_MAX {
            list = end(id, JobChange::Cancelled);
        }
        assert_eq!(list.len(), ENDED_JOBS_MAX);
        assert_eq!(list[0].job.id, "job1", "the last scrub");
        assert!(!list[0].cancelled && list[1].cancelled);
        let last = format!("job{}", 3 * ENDED_JOBS_MAX - 1);
        assert_eq!(list.last().unwrap().job.id, last);
        let list = end(4 * ENDED_JOBS_MAX, JobChange::Completed);
        assert_eq!(list[0].job.id, "job1");
        let list = end(5 * ENDED_JOBS_MAX, JobChange::Cancelled);
        assert_ne!(list[0].job.id, "job1", "there is a later one");
    }

    #[test]
    fn the_records_have_the_last_ones_and_the_last_scrub() {
        let names = Names {
            reference: "disk".into(),
            nodes: std::iter::empty::<&str>().collect(),
        };
        let mut history = JobHistory::default();
        let at = UNIX_EPOCH + std::time::Duration::from_micros(7_500_000);
        for id in 0..2 * RECORD_JOBS_MAX {
            let what = match id {
                3 => JobChange::Completed,
                _ => JobChange::Cancelled,
            };
            let notice = scrub(&format!("job{id}"), what, JobStatus::Running, None);
            history.record(&notice, at, &names);
        }
        let past = history.past();
        assert_eq!(past.len(), RECORD_JOBS_MAX);
        assert_eq!((past[0].id.as_str(), past[0].ended), ("job3", 7));
        let mut restored = JobHistory::default();
        let unknown = PastJob {
            r#type: "of-a-later-version".to_owned(),
            ..past[0].clone()
        };
        restored.restore(&[&past[..], &[unknown]].concat());
        assert_eq!(restored.past(), past);
        let list = restored.list();
        assert!(list[0].before_start && list[0].is_whole_scrub && !list[1].is_whole_scrub);
    }
}
