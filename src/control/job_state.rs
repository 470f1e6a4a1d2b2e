//! A job as operators see it: what it has found, where, and why it has failed, with the names of
//! replicas. The monitor and the events show the same.

use std::fmt::Write as _;

use serde::Serialize;

use super::errors::ErrorReason;
use super::events::{NodeNames, type_name};
use super::map_state::RangeState;
use crate::common::operation::OperationType;
use crate::jobs::{Findings, JobFailure, JobInfo, JobKind, Places};

/// A job at one moment, with the members of QEMU's JobInfo first.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobState {
    /// Its name.
    pub id: String,
    /// Its type.
    pub r#type: &'static str,
    /// Its status, with QEMU's name.
    pub status: &'static str,
    /// Bytes done.
    pub current_progress: u64,
    /// Bytes in all. May grow.
    pub total_progress: u64,
    /// Why it has failed, or will.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The replica of a resync.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Speed limit in bytes a second; 0: as fast as the guest's load allows.
    pub speed: u64,
    /// What it has found and written.
    #[serde(flatten)]
    pub result: JobResult,
}

/// What a job has found and written.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobResult {
    /// Corrupt sectors that it found, counted for each replica.
    pub corrupt_sectors_found: u64,
    /// Unreadable sectors that it found, counted for each replica.
    pub unreadable_sectors_found: u64,
    /// Sectors that it has written.
    pub sectors_written: u64,
    /// Where which replica was bad, and what was written to it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub replicas: Vec<ReplicaFindings>,
    /// Sectors without a winner.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub undecided: Option<PlacesState>,
}

/// What a job has found on a replica and written to it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicaFindings {
    /// The replica.
    pub node_name: String,
    /// Sectors that lost a vote.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<PlacesState>,
    /// Sectors that it could not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unreadable: Option<PlacesState>,
    /// Sectors that were written to it.
    pub sectors_written: u64,
    /// Sectors that could not be written to it.
    pub sectors_not_written: u64,
    /// Its last error of a read, if it returned one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_error: Option<ErrorReason>,
    /// Likewise of a write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write_error: Option<ErrorReason>,
    /// Likewise of a flush.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flush_error: Option<ErrorReason>,
}

/// Sectors: all of them counted, the first runs listed.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlacesState {
    /// How many.
    pub sectors: u64,
    /// The first runs.
    pub ranges: Vec<RangeState>,
    /// There are more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ranges_truncated: bool,
}

impl JobState {
    /// The job with the names of its replicas.
    pub(crate) fn new(job: &JobInfo, names: &NodeNames) -> Self {
        let replica = job.kind.replica();
        Self {
            id: job.id.to_string(),
            r#type: job.kind.name(),
            status: job.status.name(),
            current_progress: job.current_bytes,
            total_progress: job.total_bytes,
            error: error(job, names),
            node_name: replica.map(|replica| names.get(replica).to_string()),
            speed: job.speed_bytes,
            result: JobResult::new(job, names),
        }
    }
}

impl JobResult {
    pub(super) fn new(job: &JobInfo, names: &NodeNames) -> Self {
        let is_resync = matches!(job.kind, JobKind::Resync(_));
        // That a resync writes to its replica says no more than its progress.
        let all = job.findings.iter();
        let worth_telling = all.filter(|(_, found)| !is_resync || !found.is_good());
        let replicas = worth_telling.map(|(replica, found)| {
            let node_name = names.get(*replica).to_string();
            ReplicaFindings::new(node_name, found)
        });
        Self {
            corrupt_sectors_found: job.corrupt_sectors_found,
            unreadable_sectors_found: job.unreadable_sectors_found,
            sectors_written: job.sectors_written,
            replicas: replicas.collect(),
            undecided: PlacesState::new(&job.undecided),
        }
    }
}

impl ReplicaFindings {
    fn new(node_name: String, found: &Findings) -> Self {
        let error = |operation| found.error(operation).map(ErrorReason::from);
        Self {
            node_name,
            corrupt: PlacesState::new(&found.corrupt),
            unreadable: PlacesState::new(&found.unreadable),
            sectors_written: found.written,
            sectors_not_written: found.not_written,
            read_error: error(OperationType::Read),
            write_error: error(OperationType::Write),
            flush_error: error(OperationType::Flush),
        }
    }
}

impl PlacesState {
    fn new(places: &Places) -> Option<Self> {
        (places.sectors > 0).then(|| Self {
            sectors: places.sectors,
            ranges: places.runs.iter().map(RangeState::from).collect(),
            ranges_truncated: places.is_cut,
        })
    }
}

/// Why a job fails: with the replicas that are the reason, and their errors.
pub(super) fn error(job: &JobInfo, names: &NodeNames) -> Option<String> {
    let failure = job.error?;
    let causes = |operations: &[OperationType]| {
        let mut text = String::new();
        for (replica, found) in &job.findings {
            for operation in operations {
                if let Some(errno) = found.error(*operation) {
                    let name = names.get(*replica);
                    let operation = type_name(*operation);
                    let _ = write!(text, "; {name}: {operation}: {errno}");
                }
            }
        }
        text
    };
    use OperationType::{Flush, Read, Write};
    let causes = match failure {
        JobFailure::NotRead { replicas } => {
            let cause = |replica| {
                let found = job.findings.get(&replica);
                let error = found.and_then(|found| found.error(Read));
                let error = error.map_or_else(
                    || "evicted or missing".to_owned(),
                    |errno| errno.to_string(),
                );
                format!("{} ({error})", names.get(replica))
            };
            let causes: Vec<_> = replicas.iter().map(cause).collect();
            return Some(format!(
                "{} could not be read everywhere",
                causes.join(", ")
            ));
        }
        JobFailure::Removed => String::new(),
        JobFailure::NoQuorum { .. } => match job.kind {
            JobKind::Prefer(_) => causes(&[Write, Read]),
            _ => causes(&[Read]),
        },
        JobFailure::NotCopied { .. } => causes(&[Write, Read, Flush]),
        JobFailure::NotRepaired { .. } => causes(&[Write]),
        JobFailure::NotFlushed => causes(&[Flush]),
    };
    Some(format!("{failure}{causes}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
    use crate::jobs::{FindingsByReplica, JobId, JobStatus};

    fn job(error: JobFailure, findings: FindingsByReplica) -> JobInfo {
        JobInfo {
            id: JobId(3),
            kind: JobKind::Scrub { repair: true },
            status: JobStatus::Concluded,
            current_bytes: 0,
            total_bytes: 0,
            speed_bytes: 0,
            corrupt_sectors_found: 0,
            unreadable_sectors_found: 0,
            sectors_written: 0,
            findings,
            undecided: Places::default(),
            unread: ReplicaSet::EMPTY,
            error: Some(error),
        }
    }

    fn names() -> NodeNames {
        ["a.raw", "b.raw", "c.raw"].into_iter().collect()
    }

    #[test]
    fn a_failure_names_its_replicas_and_their_errors() {
        let mut findings = FindingsByReplica::new();
        let found = findings.entry(ReplicaIndex(1)).or_default();
        found.failed(OperationType::Read, Errno(libc::EIO));
        let found = findings.entry(ReplicaIndex(2)).or_default();
        found.failed(OperationType::Write, Errno(libc::ENOSPC));
        let replicas = [ReplicaIndex(0), ReplicaIndex(1)].into_iter().collect();
        for (failure, text) in [
            (
                JobFailure::NotRead { replicas },
                "a.raw (evicted or missing), b.raw (Input/output error) could not be read \
                 everywhere",
            ),
            (
                JobFailure::NotRepaired { sectors: 8 },
                "8 sectors could not be written; c.raw: write: No space left on device",
            ),
            (
                JobFailure::NotCopied { sectors: 8 },
                "8 sectors could not be copied; b.raw: read: Input/output error; \
                 c.raw: write: No space left on device",
            ),
            (
                JobFailure::NoQuorum { sectors: 1 },
                "no quorum for 1 sector; b.raw: read: Input/output error",
            ),
            (JobFailure::Removed, "the replica was removed"),
        ] {
            let job = job(failure, findings.clone());
            assert_eq!(error(&job, &names()).as_deref(), Some(text));
        }
    }

    #[test]
    fn a_job_says_where_which_replica_was_bad() {
        let mut findings = FindingsByReplica::new();
        let found = findings.entry(ReplicaIndex(1)).or_default();
        found.corrupt = Places {
            sectors: 2,
            runs: vec![SectorRange::new(8, 2)],
            is_cut: false,
        };
        found.not_written = 8;
        found.failed(OperationType::Write, Errno(libc::ENOSPC));
        let job = job(JobFailure::NotRepaired { sectors: 8 }, findings);
        let state = serde_json::to_value(JobState::new(&job, &names())).unwrap();
        assert_eq!(
            state["replicas"],
            serde_json::json!([{
                "node-name": "b.raw",
                "corrupt": { "sectors": 2, "ranges": [{ "sector-num": 8, "sector-count": 2 }] },
                "sectors-written": 0,
                "sectors-not-written": 8,
                "write-error": { "ret": -28, "error": "No space left on device" },
            }])
        );
        assert!(state.get("undecided").is_none());
    }
}
