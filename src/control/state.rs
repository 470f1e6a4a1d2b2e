//! The state of a disk for operators: plain values, as `query-quorum` returns them. QEMU's queries
//! and the metrics are computed from the same values.

use serde::{Serialize, Serializer};

use super::condition::{DiskCondition, Health, ReplicaCondition};
use super::errors::Errors;
use crate::common::operation::OperationType;
use crate::statistics::{Distribution, Figures};

/// A disk at one moment.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskState {
    /// The name of the disk.
    pub node_name: String,
    /// Bytes.
    pub size: u64,
    /// Its health.
    pub health: Health,
    /// Why it is failing or degraded.
    pub conditions: Vec<DiskCondition>,
    /// I/O errors that the guest got and that are not cleared.
    pub errors: Errors,
    /// How it votes.
    #[serde(flatten)]
    pub policy: PolicyState,
    /// Whether corrupt sectors are repaired unasked: `off`, `comparing`, `on` or `stopped`.
    pub repairs: &'static str,
    /// Whether records say what each replica has missed, so that a restart knows it.
    pub records: bool,
    /// Bytes in which something may have been changed and not been flushed, as the records say.
    pub marked_bytes: u64,
    /// Bytes in which replicas may differ since the disk was not ended cleanly.
    pub unrecovered_bytes: u64,
    /// How often the records were written.
    pub record_rounds: u64,
    /// The guest cannot write.
    pub read_only: bool,
    /// Replicas are accessed with direct I/O.
    #[serde(skip)]
    pub direct: bool,
    /// The value of `--aio`.
    pub aio: String,
    /// Worker threads.
    pub workers: usize,
    /// Virtqueues.
    pub queues: u16,
    /// The guest's requests.
    pub requests: Requests,
    /// Requests that failed because there was no quorum.
    pub failures: ByOperation<u64>,
    /// Requests of the guest that failed and wait until the operator continues.
    pub held_requests: u64,
    /// Sectors that had no winner when they were last read.
    pub undecided_sectors: u64,
    /// Reads that were repeated under the range lock because the replies differed.
    pub confirmations: u64,
    /// Confirmations that found no replica at fault: writes were in flight.
    pub confirmations_without_fault: u64,
    /// Log lines that were dropped because stderr was not read.
    pub log_lines_dropped: u64,
    /// How many replicas the disk should have.
    pub intended_replicas: usize,
    /// The replicas, in order.
    pub replicas: Vec<ReplicaState>,
}

/// How a disk votes.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyState {
    /// The vote threshold.
    pub vote_threshold: usize,
    /// The one that it is to be when enough replicas are up to date.
    pub wanted_vote_threshold: usize,
    /// It follows the number of replicas.
    pub vote_threshold_follows: bool,
    /// The value of `--read-pattern`.
    pub read_pattern: String,
    /// Reads repair what they find corrupt.
    pub rewrite_corrupted: bool,
    /// Bytes that are repaired at most without being asked.
    pub repair_limit: u64,
    /// The daemon ends at the first difference.
    pub blkverify: bool,
    /// The value of `--rerror`.
    pub rerror: String,
    /// The value of `--werror`.
    pub werror: String,
}

/// The guest's requests by kind.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Requests {
    /// Reads.
    pub read: Operations,
    /// Writes.
    pub write: Operations,
    /// Discards and write-zeroes.
    pub zero: Operations,
    /// Flushes.
    pub flush: Operations,
    /// Requests that are invalid or unsupported.
    pub rejected: u64,
    /// The end of the highest write, in bytes.
    #[serde(skip)]
    pub written_to_byte: u64,
}

/// A replica at one moment.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicaState {
    /// Its name.
    pub node_name: String,
    /// Its path, as given.
    pub file: String,
    /// It is a block device.
    #[serde(skip)]
    pub is_block_device: bool,
    /// Operations bypass the page cache of the host.
    pub direct_io: bool,
    /// Whether it is in service.
    pub state: ServiceState,
    /// Why it is not good.
    pub conditions: Vec<ReplicaCondition>,
    /// Why its image cannot be opened. Left out if it is open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_reason: Option<String>,
    /// Whether its image is tried again. Left out if it is open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing_retried: Option<bool>,
    /// Errors that it returned and that are not cleared.
    pub errors: Errors,
    /// Bytes of which it does not hold the newest data.
    pub stale_bytes: u64,
    /// Corrupt sectors that were found; a sector that is found again counts again.
    pub corrupt_sectors_found: u64,
    /// Sectors that were repaired.
    pub repaired_sectors: u64,
    /// Sectors whose repair failed.
    pub repair_failed_sectors: u64,
    /// Sectors that were corrupt when they were last read.
    pub corrupt_sectors: u64,
    /// Stale sectors that were copied to it.
    pub resynced_sectors: u64,
    /// Writes to its record that failed.
    pub record_write_errors: u64,
    /// How often it was evicted.
    pub evictions: u64,
    /// How often it rejoined.
    pub rejoins: u64,
    /// For how much longer it does not rejoin even if it answers, in milliseconds. Left out if it
    /// may.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept_out_ms: Option<u64>,
    /// Its operations.
    pub operations: ByOperation<Operations>,
}

/// Whether a replica is in service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ServiceState {
    /// It is asked and votes.
    InService,
    /// It is asked, and votes where it is not stale: a resync copies the rest.
    Syncing,
    /// It did not answer in time and is not asked until it does.
    Evicted,
    /// Its image could not be opened at the start, and is tried again and again.
    Missing,
}

impl ServiceState {
    /// All states.
    pub const ALL: [Self; 4] = [Self::InService, Self::Syncing, Self::Evicted, Self::Missing];

    /// The name of the state.
    pub fn name(self) -> &'static str {
        match self {
            Self::InService => "in-service",
            Self::Syncing => "syncing",
            Self::Evicted => "evicted",
            Self::Missing => "missing",
        }
    }
}

/// A value for each type of operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ByOperation<T> {
    /// For reads.
    pub read: T,
    /// For writes, also of zeroes.
    pub write: T,
    /// For flushes.
    pub flush: T,
}

impl<T> ByOperation<T> {
    /// The value for an operation.
    pub(super) fn of(&mut self, operation: OperationType) -> &mut T {
        match operation {
            OperationType::Read => &mut self.read,
            OperationType::Write => &mut self.write,
            OperationType::Flush => &mut self.flush,
        }
    }

    /// The values with the names of their types.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &T)> {
        [
            ("read", &self.read),
            ("write", &self.write),
            ("flush", &self.flush),
        ]
        .into_iter()
    }
}

impl Requests {
    /// The types with their names.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Operations)> {
        let kinds = [
            ("read", &self.read),
            ("write", &self.write),
            ("zero", &self.zero),
            ("flush", &self.flush),
        ];
        kinds.into_iter()
    }
}

/// The requests or operations of one type.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Operations {
    /// Succeeded.
    pub completed: u64,
    /// Failed.
    pub failed: u64,
    /// In flight.
    pub in_flight: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Latency of those that succeeded. Left out if there are none.
    #[serde(serialize_with = "latency", skip_serializing_if = "is_empty")]
    pub latency: Distribution,
}

impl From<Figures> for Operations {
    fn from(figures: Figures) -> Self {
        Self {
            completed: figures.completed(),
            failed: figures.failed,
            in_flight: figures.in_flight(),
            bytes: figures.bytes,
            latency: figures.latency,
        }
    }
}

fn is_empty(latency: &Distribution) -> bool {
    latency.count() == 0
}

fn latency<S: Serializer>(latency: &Distribution, serializer: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct Latency {
        mean_ns: u64,
        p50_ns: u64,
        p90_ns: u64,
        p99_ns: u64,
        p999_ns: u64,
        max_ns: u64,
    }
    let quantile_ns = |per_mille| latency.quantile_us(per_mille).unwrap_or(0) * 1000;
    let latency = Latency {
        mean_ns: latency.sum_ns().checked_div(latency.count()).unwrap_or(0),
        p50_ns: quantile_ns(500),
        p90_ns: quantile_ns(900),
        p99_ns: quantile_ns(990),
        p999_ns: quantile_ns(999),
        max_ns: quantile_ns(1000),
    };
    latency.serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_serialized_by_name() {
        for state in ServiceState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
