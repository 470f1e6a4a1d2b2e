//! The rows of the benchmark, each with its load as the disk benchmark describes it.

use std::fmt;
use std::sync::LazyLock;

use super::disk_plan::{Pattern, ReadPattern, Row as Load, Storage, patterns};
use super::settings::variable;

/// Bytes of the disk.
pub static DISK_BYTES: LazyLock<u64> =
    LazyLock::new(|| variable("BENCH_MIB").unwrap_or(2048u64) << 20);

/// The part of the disk that the guest uses: smaller than the smallest disk worth measuring.
pub const GUEST_BYTES: u64 = 1 << 30;

/// The job beside the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// A scrub of all replicas.
    Scrub,
    /// A resync of one replica.
    Resync,
}

/// One row of the result.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Where the images are.
    pub storage: Storage,
    /// The job beside the guest.
    pub job: JobKind,
    /// The load of the guest, if any.
    pub load: Option<Load>,
}

/// The name of the row: `cache/scrub/randread/32`.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/", self.storage.name(), self.job.name())?;
        match &self.load {
            Some(load) => write!(f, "{}/{}", load.pattern.name, load.pattern.depth),
            None => f.write_str("idle"),
        }
    }
}

/// Every row, by storage.
pub fn rows() -> Vec<Row> {
    let is_wanted = |pattern: &Pattern| {
        matches!(
            (pattern.name, pattern.depth),
            ("randread" | "randwrite", 1 | 32) | ("write-flush" | "read-1m", _)
        )
    };
    let patterns: Vec<Pattern> = patterns().into_iter().filter(is_wanted).collect();
    let mut rows = Vec::new();
    for storage in [Storage::Cache, Storage::Disk] {
        for job in [JobKind::Scrub, JobKind::Resync] {
            let row = |load| Row { storage, job, load };
            let load = |pattern: &Pattern| Load {
                storage,
                replicas: 3,
                queues: 1,
                read_pattern: ReadPattern::Quorum,
                pattern: *pattern,
            };
            rows.push(row(None));
            rows.extend(patterns.iter().map(|pattern| row(Some(load(pattern)))));
        }
    }
    rows
}
