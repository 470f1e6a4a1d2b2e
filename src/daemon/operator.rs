//! What commands of the monitor do, and what there is to be seen of the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use clap::ValueEnum as _;

use crate::config::{Cache, Config};
use crate::control::Operator;
use crate::control::state::{ByOperation, DiskState, PolicyState, ReplicaState, Requests, ServiceState};
use crate::engine::Shared;
use crate::quorum::report::OperationType;
use crate::quorum::{ReplicaIndex, SECTOR_BYTES};
use crate::replica::file::ReplicaFile;
use crate::statistics::{RequestKind, Statistics};
use crate::upkeep::Upkeep;
use crate::worker::{Disk, Stop};

/// The disk as the operator has it before him.
pub(super) struct DiskOperator {
    /// All that does not change.
    is: Fixed,
    shared: Arc<Shared>,
    statistics: Statistics,
    upkeep: Arc<Upkeep>,
    stop: Sender<Stop>,
}

struct Fixed {
    node_name: String,
    size: u64,
    policy: PolicyState,
    read_only: bool,
    direct: bool,
    workers: usize,
    queues: u16,
}

impl DiskOperator {
    pub(super) fn new(config: &Config, disk: &Disk, upkeep: Arc<Upkeep>, stop: Sender<Stop>) -> Self {
        let pattern = config.read_pattern.to_possible_value();
        let is = Fixed {
            node_name: config.node_name.clone(),
            size: disk.info.capacity_sectors * SECTOR_BYTES,
            policy: PolicyState {
                vote_threshold: config.vote_threshold,
                read_pattern: pattern.map_or_else(String::new, |value| value.get_name().to_owned()),
                rewrite_corrupted: config.rewrite_corrupted,
                blkverify: config.blkverify,
            },
            read_only: config.read_only,
            direct: config.cache == Cache::None,
            workers: disk.statistics.workers(),
            queues: config.queue_count,
        };
        Self {
            is,
            shared: Arc::clone(&disk.shared),
            statistics: disk.statistics.clone(),
            upkeep,
            stop,
        }
    }

    fn replicas(&self) -> Vec<ReplicaState> {
        let in_service = self.shared.in_service();
        let replica_state = |(index, is): (ReplicaIndex, Arc<ReplicaFile>)| {
            let stale = self.shared.stale_sectors(index);
            let counters = self.shared.counters.of(index);
            let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            let operations = |kind| self.statistics.operations(index.as_usize(), kind).into();
            ReplicaState {
                node_name: is.node_name.clone(),
                file: is.path.to_string_lossy().into_owned(),
                is_block_device: is.is_block_device,
                state: match in_service.contains(index) {
                    true => ServiceState::InService,
                    false => ServiceState::Out,
                },
                stale_bytes: stale * SECTOR_BYTES,
                wrong_sectors: count(&counters.sectors_wrong),
                mended_sectors: count(&counters.sectors_rewritten),
                unmended_sectors: count(&counters.sectors_not_rewritten),
                resynced_sectors: count(&counters.sectors_resynced),
                departures: count(&counters.departures),
                returns: count(&counters.returns),
                operations: by_operation(operations),
            }
        };
        self.upkeep.replicas().into_iter().map(replica_state).collect()
    }
}

impl Operator for DiskOperator {
    fn state(&self) -> DiskState {
        let requests = |kind| self.statistics.requests(kind).into();
        let counters = &self.shared.counters;
        DiskState {
            node_name: self.is.node_name.clone(),
            size: self.is.size,
            policy: self.is.policy.clone(),
            read_only: self.is.read_only,
            direct: self.is.direct,
            workers: self.is.workers,
            queues: self.is.queues,
            requests: Requests {
                read: requests(RequestKind::Read),
                write: requests(RequestKind::Write),
                zero: requests(RequestKind::Zero),
                flush: requests(RequestKind::Flush),
                refused: self.statistics.refused(),
                written_to_byte: self.statistics.written_to_byte(),
            },
            failures: by_operation(|kind| self.statistics.failures(kind)),
            suspicions: counters.suspicions.load(Ordering::Relaxed),
            suspicions_dropped: counters.suspicions_dropped.load(Ordering::Relaxed),
            replicas: self.replicas(),
        }
    }

    fn quit(&self) {
        // Nobody listens only when the daemon stops already.
        let _ = self.stop.send(Stop::Requested);
    }
}

fn by_operation<T>(of: impl Fn(OperationType) -> T) -> ByOperation<T> {
    ByOperation {
        read: of(OperationType::Read),
        write: of(OperationType::Write),
        flush: of(OperationType::Flush),
    }
}
