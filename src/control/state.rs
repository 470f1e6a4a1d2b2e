//! What an operator sees of a disk: plain values, as `query-quorum` shows them. The other
//! interfaces, QEMU's queries and the metrics, are made from the same values.

use serde::{Serialize, Serializer};

use crate::statistics::{Distribution, Figures};

/// A disk at one moment.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskState {
    /// What the disk is called.
    pub node_name: String,
    /// Bytes.
    pub size: u64,
    /// How it decides.
    #[serde(flatten)]
    pub policy: PolicyState,
    /// The guest may not write.
    pub read_only: bool,
    /// Replicas are used past the host's page cache.
    #[serde(skip)]
    pub direct: bool,
    /// Threads that serve it.
    pub workers: usize,
    /// Virtqueues.
    pub queues: u16,
    /// The guest's requests.
    pub requests: Requests,
    /// Requests that found no quorum.
    pub failures: ByOperation<u64>,
    /// Sectors of reads that found no winner, and that no scrub has found to have one since.
    pub undecided_sectors: u64,
    /// Reads repeated because the replies differed.
    pub confirmations: u64,
    /// Those of them that found writes in flight to be the reason.
    pub confirmations_without_fault: u64,
    /// The replicas, in order.
    pub replicas: Vec<ReplicaState>,
}

/// How a disk decides.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PolicyState {
    /// t.
    pub vote_threshold: usize,
    /// As on the command line.
    pub read_pattern: String,
    /// Winners are written over what lost.
    pub rewrite_corrupted: bool,
    /// The first difference ends the daemon.
    pub blkverify: bool,
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
    /// Those that made no sense.
    pub rejected: u64,
    /// The byte after the last that was written.
    #[serde(skip)]
    pub written_to_byte: u64,
}

/// A replica at one moment.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicaState {
    /// What it is called.
    pub node_name: String,
    /// Its path, as it was given.
    pub file: String,
    /// It is a block device.
    #[serde(skip)]
    pub is_block_device: bool,
    /// Whether it is asked.
    pub state: ServiceState,
    /// Bytes it is known not to hold the newest data of.
    pub stale_bytes: u64,
    /// Sectors that lost a vote; one that is found again counts again.
    pub corrupt_sectors_found: u64,
    /// Of those, written with the winner.
    pub repaired_sectors: u64,
    /// Sectors that could not be written with the winner.
    pub repair_failed_sectors: u64,
    /// Sectors that had lost the vote when they were last looked at.
    pub corrupt_sectors: u64,
    /// Sectors brought up to date that were stale.
    pub resynced_sectors: u64,
    /// How often it left the set because it did not answer.
    pub evictions: u64,
    /// How often it came back.
    pub rejoins: u64,
    /// What it was asked to do.
    pub operations: ByOperation<Operations>,
}

/// A job at one moment, with the members of QEMU's JobInfo first.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobState {
    /// What it is called.
    pub id: String,
    /// What it does.
    pub r#type: &'static str,
    /// As QEMU has it.
    pub status: &'static str,
    /// Bytes done.
    pub current_progress: u64,
    /// Bytes to be done. May grow.
    pub total_progress: u64,
    /// What keeps it from having done what it was to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The replica that it brings up to date.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Bytes a second at most; 0: as fast as leaves the guest its share.
    pub speed: u64,
    /// Sectors that it found to be bad, counted once for each replica.
    pub corrupt_sectors_found: u64,
    /// Sectors that it has written.
    pub sectors_written: u64,
}

/// Whether a replica is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ServiceState {
    /// It is asked, and votes.
    InService,
    /// It is asked, and votes where it is not stale.
    Syncing,
    /// It did not answer, and is done without until it does.
    Evicted,
}

impl ServiceState {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::InService, Self::Syncing, Self::Evicted];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::InService => "in-service",
            Self::Syncing => "syncing",
            Self::Evicted => "evicted",
        }
    }
}

/// Something for each kind of operation on replicas.
#[derive(Clone, Debug, Serialize)]
pub struct ByOperation<T> {
    /// For reads.
    pub read: T,
    /// For writes, also of zeroes.
    pub write: T,
    /// For flushes.
    pub flush: T,
}

impl<T> ByOperation<T> {
    /// Each with its name.
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
    /// Each kind with its name.
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

/// What there was of one kind of requests or operations.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Operations {
    /// Ended well.
    pub completed: u64,
    /// Ended in an error.
    pub failed: u64,
    /// Begun and not ended.
    pub in_flight: u64,
    /// Bytes of those that ended well.
    pub bytes: u64,
    /// How long those took. Nothing where there are none.
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
    fn states_are_named_as_they_are_shown() {
        for state in ServiceState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }
}
