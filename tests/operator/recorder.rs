//! A stand-in operator for tests of the monitor: it shows a disk, changes nothing, and records its
//! commands. The unit tests, the integration tests and the fuzz target use it.
//!
//! Invariant: a reply depends on the command only.

use std::sync::{Mutex, PoisonError};

use quorum_blk::control::condition::Health;
use quorum_blk::control::errors::Errors;
use quorum_blk::control::job_history::EndedJob;
use quorum_blk::control::job_state::JobState;
use quorum_blk::control::loss_state::LossState;
use quorum_blk::control::map_state::{FailuresState, MapState, UndecidedRanges};
use quorum_blk::control::state::{
    ByOperation, DiskState, Operations, PolicyState, ReplicaState, Requests, ServiceState,
};
use quorum_blk::control::{Change, Operator};
use quorum_blk::statistics::Figures;

/// The name of its disk.
pub const DISK: &str = "quorum0";

/// The names of its replicas, with every kind of character.
pub const REPLICAS: [&str; 3] = ["0.raw", "é \"\\\n\u{1f600}", "children.0"];

/// A command of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A change of the disk.
    Change(Change),
    /// A replica that the operator gives up, or may.
    Fail(String, bool),
    /// The end of the daemon.
    Quit,
}

/// See the [module](self).
pub struct Recorder {
    asked: Mutex<Vec<Asked>>,
    on_quit: Box<dyn Fn() + Send + Sync>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self::with_quit(|| ())
    }
}

impl Recorder {
    /// An operator that calls `on_quit` for the command `quit`.
    pub fn with_quit(on_quit: impl Fn() + Send + Sync + 'static) -> Self {
        let (asked, on_quit) = (Mutex::default(), Box::new(on_quit));
        Self { asked, on_quit }
    }

    /// All commands, in order.
    pub fn asked(&self) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.clone()
    }

    fn remember(&self, asked: Asked) {
        let mut all = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(asked);
    }
}

impl Operator for Recorder {
    fn state(&self) -> DiskState {
        disk()
    }

    fn map(&self, buckets: usize) -> MapState {
        map(buckets)
    }

    fn jobs(&self) -> Vec<JobState> {
        Vec::new()
    }

    fn ended_jobs(&self) -> Vec<EndedJob> {
        Vec::new()
    }

    fn change(&self, change: Change) -> Result<Option<String>, String> {
        self.remember(Asked::Change(change.clone()));
        answer(&change)
    }

    fn fail(&self, node_name: &str, force: bool) -> Result<LossState, String> {
        self.remember(Asked::Fail(node_name.to_owned(), force));
        Ok(LossState {
            removed: force,
            ..LossState::default()
        })
    }

    fn quit(&self) {
        self.remember(Asked::Quit);
        (self.on_quit)();
    }
}

/// The reply to a change: a scrub is a job, and every replica has a name.
pub fn answer(change: &Change) -> Result<Option<String>, String> {
    match change {
        Change::Scrub { .. } => Ok(Some("job7".into())),
        Change::Resync { node_name, .. } if !node_name.is_empty() => Ok(Some("job8".into())),
        Change::RemoveReplica(name) if !name.is_empty() => Ok(None),
        Change::Job { id, .. } if !id.is_empty() => Ok(None),
        _ => Err(format!("not here: {change:?}")),
    }
}

/// The map of that disk: without faults.
fn map(buckets: usize) -> MapState {
    let size = disk().size;
    MapState {
        node_name: DISK.into(),
        size,
        health: Health::Healthy,
        bucket_bytes: size.div_ceil(buckets.max(1) as u64),
        failures: FailuresState {
            buckets: Vec::new(),
            undecided: UndecidedRanges {
                ranges: Vec::new(),
                truncated: false,
            },
        },
        replicas: Vec::new(),
    }
}

fn none() -> Operations {
    Figures::default().into()
}

fn by_operation<T>(make: impl Fn() -> T) -> ByOperation<T> {
    ByOperation {
        read: make(),
        write: make(),
        flush: make(),
    }
}

/// A disk that was never used.
pub fn disk() -> DiskState {
    let replicas = REPLICAS.map(|name| ReplicaState {
        node_name: name.into(),
        file: format!("/images/{name}"),
        is_block_device: false,
        direct_io: true,
        state: ServiceState::InService,
        conditions: Vec::new(),
        missing_reason: None,
        missing_retried: None,
        errors: Errors::default(),
        stale_bytes: 0,
        corrupt_sectors_found: 0,
        corrupt_sectors: 0,
        repaired_sectors: 0,
        repair_failed_sectors: 0,
        resynced_sectors: 0,
        record_write_errors: 0,
        evictions: 0,
        rejoins: 0,
        kept_out_ms: None,
        operations: by_operation(none),
    });
    DiskState {
        node_name: DISK.into(),
        size: 1 << 30,
        health: Health::Healthy,
        conditions: Vec::new(),
        errors: Errors::default(),
        policy: PolicyState {
            vote_threshold: 2,
            wanted_vote_threshold: 2,
            vote_threshold_follows: true,
            read_pattern: "quorum".into(),
            rewrite_corrupted: false,
            repair_limit: 16 << 20,
            blkverify: false,
            rerror: "report".into(),
            werror: "report".into(),
        },
        repairs: "off",
        read_only: false,
        direct: true,
        aio: "io_uring".into(),
        workers: 1,
        queues: 1,
        requests: Requests {
            read: none(),
            write: none(),
            zero: none(),
            flush: none(),
            rejected: 0,
            written_to_byte: 0,
        },
        failures: by_operation(|| 0),
        confirmations: 0,
        confirmations_without_fault: 0,
        held_requests: 0,
        undecided_sectors: 0,
        records: true,
        marked_bytes: 0,
        unrecovered_bytes: 0,
        record_rounds: 0,
        log_lines_dropped: 0,
        intended_replicas: replicas.len(),
        replicas: replicas.into(),
    }
}
