//! The results of the jobs that have ended, as long as the daemon runs. Pure.
//!
//! Invariants: at most [`ENDED_JOBS_MAX`] are kept, the last ones; and of the scrubs that have
//! completed the last one, however many other jobs have ended since.

use std::collections::VecDeque;
use std::time::SystemTime;

use serde::Serialize;

use super::errors::Timestamp;
use super::events::{Names, Notice};
use super::job_state::JobState;
use crate::jobs::{JobChange, JobKind, JobStatus};
use crate::limits::ENDED_JOBS_MAX;

/// A job that has ended.
#[derive(Clone, Debug, Serialize)]
pub struct EndedJob {
    /// The job at its end.
    #[serde(flatten)]
    pub job: JobState,
    /// It was cancelled.
    pub cancelled: bool,
    /// When it ended.
    pub timestamp: Timestamp,
    #[serde(skip)]
    is_whole_scrub: bool,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct JobHistory(VecDeque<EndedJob>);

impl JobHistory {
    /// Records the end of a job; ignores other notices.
    pub(super) fn record(&mut self, notice: &Notice, at: SystemTime, names: &Names) {
        let Notice::Job(event) = notice else {
            return;
        };
        let cancelled = match event.what {
            JobChange::Status => return,
            JobChange::Completed => false,
            JobChange::Cancelled => true,
        };
        if self.0.len() >= ENDED_JOBS_MAX {
            let is_last_scrub = |index: usize| {
                let mut later = self.0.iter().skip(index + 1);
                self.0[index].is_whole_scrub && !later.any(|ended| ended.is_whole_scrub)
            };
            let oldest = usize::from(is_last_scrub(0));
            self.0.remove(oldest);
        }
        let mut job = JobState::new(&event.job, &names.nodes);
        job.status = JobStatus::Concluded.name();
        self.0.push_back(EndedJob {
            job,
            cancelled,
            timestamp: at.into(),
            is_whole_scrub: !cancelled && matches!(event.job.kind, JobKind::Scrub { .. }),
        });
    }

    /// The jobs, in the order in which they have ended.
    pub(super) fn list(&self) -> Vec<EndedJob> {
        self.0.iter().cloned().collect()
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
}
