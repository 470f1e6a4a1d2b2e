//! The members of the monitor's replies that this program uses; it ignores all others.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;

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
    pub(super) read_pattern: String,
    pub(super) rewrite_corrupted: bool,
    pub(super) read_only: bool,
    #[serde(default)]
    pub(super) held_requests: u64,
    pub(super) undecided_sectors: u64,
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

impl Errors {
    pub(super) fn sum(&self) -> u64 {
        let writes = self.write.saturating_add(self.flush);
        self.read.saturating_add(writes)
    }

    /// How many seconds before `now` the last one was.
    pub(super) fn seconds_before(&self, now: SystemTime) -> Option<u64> {
        let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
        now.checked_sub(self.last.as_ref()?.timestamp.seconds)
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
