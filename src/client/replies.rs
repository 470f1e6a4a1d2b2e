//! The members of the monitor's replies that this program uses; it ignores all others.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;

use super::format::printable;
use super::wait::Ended;
use crate::common::message::counted;

/// The reply to query-quorum.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Disk {
    pub(super) node_name: String,
    pub(super) size: u64,
    pub(super) health: String,
    pub(super) conditions: Vec<String>,
    pub(super) errors: Errors,
    pub(super) vote_threshold: u64,
    #[serde(default)]
    pub(super) wanted_vote_threshold: u64,
    #[serde(default)]
    pub(super) intended_replicas: u64,
    pub(super) read_pattern: String,
    pub(super) rewrite_corrupted: bool,
    #[serde(default)]
    pub(super) repair_limit: u64,
    pub(super) read_only: bool,
    #[serde(default)]
    pub(super) held_requests: u64,
    #[serde(default)]
    pub(super) aio: String,
    pub(super) undecided_sectors: u64,
    /// An earlier daemon has none.
    #[serde(default)]
    pub(super) records: bool,
    pub(super) requests: Requests,
    pub(super) replicas: Vec<Replica>,
}

/// Of the requests of the guest, those that no replica had to do with.
#[derive(Debug, Deserialize)]
pub(super) struct Requests {
    pub(super) rejected: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Replica {
    pub(super) node_name: String,
    pub(super) file: String,
    pub(super) state: String,
    pub(super) conditions: Vec<String>,
    pub(super) errors: Errors,
    pub(super) stale_bytes: u64,
    pub(super) corrupt_sectors_found: u64,
    pub(super) repaired_sectors: u64,
    pub(super) corrupt_sectors: u64,
    pub(super) kept_out_ms: Option<u64>,
    pub(super) missing_reason: Option<String>,
    pub(super) missing_retried: Option<bool>,
    pub(super) operations: ByOperation<Operations>,
}

/// Errors that are not cleared.
#[derive(Debug, Deserialize)]
pub(super) struct Errors {
    read: u64,
    write: u64,
    flush: u64,
    pub(super) last: Option<LastError>,
}

#[derive(Debug, Deserialize)]
pub(super) struct LastError {
    pub(super) r#type: String,
    ret: Option<i64>,
    pub(super) error: Option<String>,
    timestamp: Timestamp,
}

/// A time, since 1970.
#[derive(Debug, Deserialize)]
pub(super) struct Timestamp {
    pub(super) seconds: u64,
    pub(super) microseconds: u32,
}

impl Timestamp {
    /// How many seconds before `now` it was. None if the clock has been set back.
    pub(super) fn seconds_before(&self, now: SystemTime) -> Option<u64> {
        let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
        now.checked_sub(self.seconds)
    }
}

impl Errors {
    pub(super) fn sum(&self) -> u64 {
        let writes = self.write.saturating_add(self.flush);
        self.read.saturating_add(writes)
    }

    /// How many seconds before `now` the last one was.
    pub(super) fn seconds_before(&self, now: SystemTime) -> Option<u64> {
        self.last.as_ref()?.timestamp.seconds_before(now)
    }

    /// Whether the last error is ENOSPC, or the quota's EDQUOT.
    pub(super) fn is_out_of_space(&self) -> bool {
        let errno = self.last.as_ref().and_then(|last| last.ret);
        matches!(errno, Some(-28 | -122))
    }
}

#[derive(Debug, Deserialize)]
pub(super) struct ByOperation<T> {
    pub(super) read: T,
    pub(super) write: T,
    pub(super) flush: T,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Operations {
    pub(super) in_flight: u64,
    pub(super) latency: Option<Latency>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Latency {
    pub(super) p99_ns: u64,
}

/// An element of the reply to query-jobs.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Job {
    pub(super) id: String,
    pub(super) r#type: String,
    pub(super) status: String,
    pub(super) current_progress: u64,
    pub(super) total_progress: u64,
    pub(super) error: Option<String>,
    pub(super) node_name: Option<String>,
    #[serde(default)]
    pub(super) speed: u64,
    #[serde(default)]
    pub(super) corrupt_sectors_found: u64,
    #[serde(default)]
    pub(super) unreadable_sectors_found: u64,
    #[serde(default)]
    pub(super) sectors_written: u64,
}

/// The data of BLOCK_JOB_COMPLETED and BLOCK_JOB_CANCELLED.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct JobEnd {
    pub(super) r#type: String,
    pub(super) device: String,
    #[serde(default)]
    pub(super) len: u64,
    #[serde(default)]
    pub(super) offset: u64,
    pub(super) error: Option<String>,
    pub(super) node_name: Option<String>,
    #[serde(default)]
    pub(super) corrupt_sectors_found: u64,
    #[serde(default)]
    pub(super) unreadable_sectors_found: u64,
    #[serde(default)]
    pub(super) sectors_written: u64,
    #[serde(default)]
    pub(super) replicas: Vec<Findings>,
    pub(super) undecided: Option<Places>,
}

/// An element of the reply to query-quorum-jobs.
#[derive(Debug, Deserialize)]
pub(super) struct EndedJob {
    #[serde(flatten)]
    pub(super) job: Job,
    pub(super) cancelled: bool,
    pub(super) timestamp: Timestamp,
    /// It ended before the daemon started: another job may have its name now.
    #[serde(default, rename = "before-start")]
    pub(super) before_start: bool,
    #[serde(default)]
    replicas: Vec<Findings>,
    undecided: Option<Places>,
}

impl EndedJob {
    pub(super) fn end(&self) -> Ended {
        let job = &self.job;
        let end = JobEnd {
            r#type: job.r#type.clone(),
            device: job.id.clone(),
            len: job.total_progress,
            offset: job.current_progress,
            error: job.error.clone(),
            node_name: job.node_name.clone(),
            corrupt_sectors_found: job.corrupt_sectors_found,
            unreadable_sectors_found: job.unreadable_sectors_found,
            sectors_written: job.sectors_written,
            replicas: self.replicas.clone(),
            undecided: self.undecided.clone(),
        };
        Ended::Reported {
            end: Box::new(end),
            cancelled: self.cancelled,
        }
    }
}

/// What a job has found on a replica and written to it.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Findings {
    pub(super) node_name: String,
    corrupt: Option<Places>,
    unreadable: Option<Places>,
    sectors_written: u64,
    sectors_not_written: u64,
    read_error: Option<Reason>,
    write_error: Option<Reason>,
    flush_error: Option<Reason>,
}

/// Sectors, and where the first ones are.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Places {
    sectors: u64,
    ranges: Vec<Range>,
    #[serde(default)]
    ranges_truncated: bool,
}

/// Why an operation failed.
#[derive(Clone, Debug, Deserialize)]
struct Reason {
    error: String,
}

/// Runs of sectors that are listed in a line.
const LISTED_MAX: usize = 3;

impl Places {
    /// `sectors 8-15, 24`.
    pub(super) fn to_text(&self) -> String {
        let run = |run: &Range| {
            let last = run
                .sector_num
                .saturating_add(run.sector_count.saturating_sub(1));
            match run.sector_count {
                1 => run.sector_num.to_string(),
                _ => format!("{}-{last}", run.sector_num),
            }
        };
        let listed: Vec<_> = self.ranges.iter().take(LISTED_MAX).map(run).collect();
        let plural = if self.sectors == 1 { "" } else { "s" };
        let more = match self.ranges_truncated || self.ranges.len() > LISTED_MAX {
            true => ", ...",
            false => "",
        };
        format!("sector{plural} {}{more}", listed.join(", "))
    }
}

impl Findings {
    /// What was bad where, and what was done about it, in one line.
    pub(super) fn to_line(&self) -> String {
        let mut parts = Vec::new();
        let because = |reason: &Option<Reason>| {
            let reason = reason.as_ref().map(|reason| printable(&reason.error));
            reason.map_or_else(String::new, |reason| format!(" ({reason})"))
        };
        for (places, what) in [(&self.corrupt, "corrupt"), (&self.unreadable, "unreadable")] {
            if let Some(places) = places {
                let cause = match what {
                    "corrupt" => String::new(),
                    _ => because(&self.read_error),
                };
                let (count, place) = (places.sectors, places.to_text());
                parts.push(format!("{count} {what}, {place}{cause}"));
            }
        }
        if self.unreadable.is_none() && self.read_error.is_some() {
            parts.push(format!("failed reads{}", because(&self.read_error)));
        }
        if self.sectors_written > 0 {
            parts.push(format!("{} written", self.sectors_written));
        }
        if self.sectors_not_written > 0 {
            let (count, cause) = (self.sectors_not_written, because(&self.write_error));
            parts.push(format!("{count} not written{cause}"));
        }
        if self.flush_error.is_some() {
            parts.push(format!("a failed flush{}", because(&self.flush_error)));
        }
        format!("{}: {}", printable(&self.node_name), parts.join("; "))
    }
}

impl JobEnd {
    /// Sectors that a scrub found corrupt or unreadable.
    pub(super) fn found(&self) -> u64 {
        self.corrupt_sectors_found
            .saturating_add(self.unreadable_sectors_found)
    }

    /// What a scrub found, in words.
    pub(super) fn findings(&self) -> String {
        let corrupt = counted(self.corrupt_sectors_found, "corrupt sector");
        match self.unreadable_sectors_found {
            0 => corrupt,
            unreadable => format!("{corrupt} and {unreadable} unreadable"),
        }
    }
}

/// The reply to a command that starts a job.
#[derive(Debug, Deserialize)]
pub(super) struct StartedJob {
    pub(super) id: String,
}

/// The reply to query-quorum-map.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DiskMap {
    pub(super) node_name: String,
    pub(super) size: u64,
    pub(super) health: String,
    pub(super) bucket_bytes: u64,
    pub(super) failures: Failures,
    pub(super) replicas: Vec<ReplicaMap>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Failures {
    pub(super) buckets: Vec<FailureBucket>,
    pub(super) undecided: Vec<Range>,
    #[serde(default)]
    pub(super) undecided_truncated: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct FailureBucket {
    pub(super) offset: u64,
    pub(super) failed: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ReplicaMap {
    pub(super) node_name: String,
    pub(super) buckets: Vec<Bucket>,
    pub(super) corrupt: Vec<Range>,
    #[serde(default)]
    pub(super) corrupt_truncated: bool,
    pub(super) stale: Vec<Range>,
    #[serde(default)]
    pub(super) stale_truncated: bool,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Bucket {
    pub(super) offset: u64,
    pub(super) corrupt_sectors_ever: u64,
    pub(super) corrupt_sectors_found: u64,
    pub(super) repaired_sectors: u64,
    pub(super) errors: u64,
    pub(super) corrupt_sectors: u64,
    pub(super) stale_sectors: u64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Range {
    pub(super) sector_num: u64,
    pub(super) sector_count: u64,
}
