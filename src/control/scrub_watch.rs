//! Recognises when a scrub has read the whole disk: what it did not find again is over. Pure.

use crate::jobs::{JobChange, JobEvent, JobId, JobKind, JobStatus};

/// The running scrub; the first if there are several.
#[derive(Debug, Default)]
pub(super) struct ScrubWatch(Option<JobId>);

/// What a scrub has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScrubStep {
    /// It reads everything from now on.
    Started,
    /// It has read everything, on every replica, since it started.
    ReadAll,
}

impl ScrubWatch {
    /// Takes a change of a job.
    pub(super) fn see(&mut self, event: &JobEvent) -> Option<ScrubStep> {
        if !matches!(event.job.kind, JobKind::Scrub { .. }) {
            return None;
        }
        let id = event.job.id;
        match event.what {
            JobChange::Status if self.0.is_none() && event.job.status == JobStatus::Created => {
                self.0 = Some(id);
                Some(ScrubStep::Started)
            }
            JobChange::Completed if self.0 == Some(id) => {
                self.0 = None;
                // Its error may be another one, for the same or for other sectors.
                event.job.unread.is_empty().then_some(ScrubStep::ReadAll)
            }
            JobChange::Cancelled if self.0 == Some(id) => {
                self.0 = None;
                None
            }
            JobChange::Status | JobChange::Completed | JobChange::Cancelled => None,
        }
    }
}
