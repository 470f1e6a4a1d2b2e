//! The disk as the monitor and the metrics see it, and what their commands do.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::admin::{Admin, AdminError};
use crate::common::message::Quoted;
use crate::common::operation::OperationType;
use crate::common::{NOT_POISONED, ReplicaIndex, SECTOR_BYTES};
use crate::config::{Cache, Config, check_node_name};
use crate::control::condition;
use crate::control::job_history::EndedJob;
use crate::control::job_state::JobState;
use crate::control::loss_state::LossState;
use crate::control::map_state::{MapState, MappedDisk, ReplicaPlaces};
use crate::control::queue::EventQueue;
use crate::control::state::{
    ByOperation, DiskState, PolicyState, ReplicaState, Requests, ServiceState,
};
use crate::control::{Change, JobOrder, Operator};
use crate::device::Capacity;
use crate::device::hold::Hold;
use crate::engine::{Shared, UnaskedRepairs};
use crate::jobs::UnknownJob;
use crate::limits::REPLICAS_MAX;
use crate::quorum::health::Wanted;
use crate::replica::file::{Overwrite, ReplicaSource};
use crate::replica::table::Member;
use crate::statistics::{RequestKind, Statistics};
use crate::worker::{Disk, Stop};

/// Implements [`Operator`] for the served disk.
pub(super) struct DiskOperator {
    fixed: Fixed,
    shared: Arc<Shared>,
    reports: Arc<EventQueue>,
    statistics: Statistics,
    hold: Arc<Hold>,
    admin: Arc<Admin>,
    /// Images of blockdev-add that are not replicas yet.
    nodes: Mutex<BTreeMap<String, Node>>,
    stop: Sender<Stop>,
}

/// An image of blockdev-add.
struct Node {
    path: PathBuf,
    /// It is being opened to become a replica.
    is_being_added: bool,
}

/// The properties that do not change while the disk is served.
struct Fixed {
    node_name: String,
    capacity: Capacity,
    policy: PolicyState,
    read_only: bool,
    direct: bool,
    aio: String,
    workers: usize,
    queues: u16,
}

impl DiskOperator {
    pub(super) fn new(config: &Config, disk: &Disk, admin: Arc<Admin>, stop: Sender<Stop>) -> Self {
        let fixed = Fixed {
            node_name: config.node_name.clone(),
            capacity: disk.info.capacity.clone(),
            policy: PolicyState {
                vote_threshold: config.vote_threshold,
                wanted_vote_threshold: config.vote_threshold,
                vote_threshold_follows: config.threshold_follows,
                read_pattern: name_of(config.read_pattern),
                rewrite_corrupted: config.rewrite_corrupted,
                repair_limit: config.repair_limit_bytes,
                blkverify: config.blkverify,
                rerror: name_of(config.rerror),
                werror: name_of(config.werror),
            },
            read_only: config.read_only,
            direct: config.cache == Cache::None,
            aio: name_of(config.aio),
            workers: disk.statistics.workers(),
            queues: config.queue_count,
        };
        Self {
            fixed,
            shared: Arc::clone(&disk.shared),
            reports: Arc::clone(&disk.events),
            statistics: disk.statistics.clone(),
            hold: Arc::clone(&disk.hold),
            admin,
            nodes: Mutex::default(),
            stop,
        }
    }

    fn add_node(&self, node_name: String, path: PathBuf) -> Result<(), String> {
        check_node_name(&node_name)?;
        self.admin
            .check_place(&path)
            .map_err(|error| error.to_string())?;
        let mut nodes = self.nodes();
        let mut replicas = self.admin.replicas().into_iter();
        let is_taken = node_name == self.fixed.node_name || nodes.contains_key(&node_name);
        if is_taken || replicas.any(|(_, member)| *member.node_name() == *node_name) {
            return Err(format!("a node {} exists already", Quoted(&node_name)));
        }
        if nodes.len() >= REPLICAS_MAX {
            return Err(format!("there are {REPLICAS_MAX} unused nodes already"));
        }
        let node = Node {
            path,
            is_being_added: false,
        };
        nodes.insert(node_name, node);
        Ok(())
    }

    /// Gives a replica a name that no other node has.
    fn rename(&self, node_name: &str, new_name: &str) -> Result<(), String> {
        check_node_name(new_name)?;
        // Not held meanwhile: the change may have to wait for another one.
        let is_taken = self.nodes().contains_key(new_name);
        if new_name == self.fixed.node_name || is_taken {
            return Err(format!("a node {} exists already", Quoted(new_name)));
        }
        self.admin.rename_replica(node_name, new_name).map_err(line)
    }

    fn remove_node(&self, node_name: &str) -> Result<(), String> {
        let mut nodes = self.nodes();
        unused(&mut nodes, node_name)?;
        nodes.remove(node_name);
        Ok(())
    }

    /// A node that cannot be added stays an unused node.
    fn add_replica(&self, node_name: String, force: bool) -> Result<(), String> {
        let path = {
            let mut nodes = self.nodes();
            let node = unused(&mut nodes, &node_name)?;
            node.is_being_added = true;
            node.path.clone()
        };
        let source = ReplicaSource { path, node_name };
        let overwrite = if force {
            Overwrite::Allowed
        } else {
            Overwrite::Never
        };
        let added = self.admin.add_replica(&source, overwrite);
        let mut nodes = self.nodes();
        match added {
            Ok(_) => {
                nodes.remove(&source.node_name);
                Ok(())
            }
            Err(error) => {
                if let Some(node) = nodes.get_mut(&source.node_name) {
                    node.is_being_added = false;
                }
                Err(line(error))
            }
        }
    }

    fn order_job(&self, id: &str, order: JobOrder) -> Result<(), String> {
        let id = id.parse().map_err(|error: UnknownJob| error.to_string())?;
        let done = match order {
            JobOrder::Pause => self.admin.job_pause(id),
            JobOrder::Resume => self.admin.job_resume(id),
            JobOrder::Cancel => self.admin.job_cancel(id),
            JobOrder::Speed(bytes) => self.admin.job_set_speed(id, bytes),
        };
        done.map_err(line)
    }

    fn clear_errors(&self, node_name: Option<&str>) -> Result<(), String> {
        let mut cleared = self.admin.replicas();
        match node_name {
            Some(name) => {
                cleared.retain(|(_, member)| *member.node_name() == *name);
                if cleared.is_empty() {
                    return Err(line(AdminError::UnknownReplica(name.to_owned())));
                }
            }
            None => {
                self.reports.clear_guest_errors();
                self.admin.intend_present_replicas();
            }
        }
        for (index, _) in cleared {
            self.reports.clear_errors(index);
        }
        Ok(())
    }

    fn nodes(&self) -> MutexGuard<'_, BTreeMap<String, Node>> {
        self.nodes.lock().expect(NOT_POISONED)
    }

    fn replicas(&self) -> Vec<ReplicaState> {
        let (missing, in_service) = (self.shared.missing(), self.shared.in_service());
        let replica_state = |(index, member): (ReplicaIndex, Member)| {
            let file = member.file();
            let stale = self.shared.stale_sectors(index);
            let totals = self.statistics.replica(index);
            let operations = |kind| self.statistics.operations(index.as_usize(), kind).into();
            let state = match (in_service.contains(index), stale) {
                (true, 0) => ServiceState::InService,
                (true, _) => ServiceState::Syncing,
                (false, _) if missing.contains(index) => ServiceState::Missing,
                (false, _) => ServiceState::Evicted,
            };
            let stale_bytes = stale * SECTOR_BYTES;
            let corrupt_sectors = self.reports.corrupt_sectors(index);
            let errors = self.reports.errors_of(index);
            let kept_out_for = self.reports.kept_out_for(index);
            ReplicaState {
                node_name: member.node_name().to_string(),
                file: member.path().to_string_lossy().into_owned(),
                is_block_device: file.is_some_and(|file| file.is_block_device),
                direct_io: file.is_some_and(|file| file.is_direct),
                state,
                conditions: condition::of_replica(
                    state,
                    self.reports.is_flapping(index),
                    stale_bytes,
                    corrupt_sectors,
                    &errors,
                    file.map(|file| file.changes()).unwrap_or_default(),
                ),
                missing_reason: match &member {
                    Member::Open(_) => None,
                    Member::Missing(missing) => Some(missing.why().to_string()),
                },
                // On a read-only disk, which keeps no records, none is sought.
                missing_retried: match &member {
                    Member::Open(_) => None,
                    Member::Missing(missing) => {
                        Some(missing.is_named() && self.shared.has_records())
                    }
                },
                errors,
                stale_bytes,
                corrupt_sectors_found: totals.sectors_corrupt,
                repaired_sectors: totals.sectors_repaired,
                repair_failed_sectors: totals.sectors_not_repaired,
                corrupt_sectors,
                resynced_sectors: totals.sectors_resynced,
                record_write_errors: self.shared.record_write_errors(index),
                evictions: totals.evictions,
                rejoins: totals.rejoins,
                kept_out_ms: (!kept_out_for.is_zero())
                    .then(|| u64::try_from(kept_out_for.as_millis()).unwrap_or(u64::MAX)),
                operations: by_operation(operations),
            }
        };
        self.admin
            .replicas()
            .into_iter()
            .map(replica_state)
            .collect()
    }
}

impl Operator for DiskOperator {
    fn state(&self) -> DiskState {
        let requests = |kind| self.statistics.requests(kind).into();
        let replicas = self.replicas();
        let undecided_sectors = self.shared.unresolved().sectors();
        let errors = self.reports.guest_errors();
        let held_requests = self.hold.count() as u64;
        let records = self.shared.record_figures();
        let repairs = self.shared.unasked_repairs();
        let have_stopped = repairs == UnaskedRepairs::Stopped;
        let intended_replicas = self.admin.intended_replicas();
        let fewer = replicas.len() < intended_replicas;
        let conditions = condition::of_disk(
            held_requests,
            undecided_sectors,
            &errors,
            have_stopped,
            fewer,
        );
        let mut policy = self.fixed.policy.clone();
        (
            policy.vote_threshold,
            policy.wanted_vote_threshold,
            policy.vote_threshold_follows,
        ) = self.shared.thresholds();
        DiskState {
            node_name: self.fixed.node_name.clone(),
            size: self.fixed.capacity.bytes(),
            health: condition::health(&conditions, &replicas),
            conditions,
            errors,
            policy,
            repairs: match repairs {
                _ if !self.fixed.policy.rewrite_corrupted => "off",
                UnaskedRepairs::Done => "on",
                UnaskedRepairs::Comparing => "comparing",
                UnaskedRepairs::Stopped => "stopped",
            },
            records: self.shared.has_records(),
            marked_bytes: records.marked_sectors * SECTOR_BYTES,
            unrecovered_bytes: self.shared.unrecovered_sectors() * SECTOR_BYTES,
            record_rounds: records.rounds,
            read_only: self.fixed.read_only,
            direct: self.fixed.direct,
            aio: self.fixed.aio.clone(),
            workers: self.fixed.workers,
            queues: self.fixed.queues,
            requests: Requests {
                read: requests(RequestKind::Read),
                write: requests(RequestKind::Write),
                zero: requests(RequestKind::Zero),
                flush: requests(RequestKind::Flush),
                rejected: self.statistics.rejected(),
                written_to_byte: self.statistics.written_to_byte(),
            },
            failures: by_operation(|kind| self.statistics.failures(kind)),
            held_requests,
            undecided_sectors,
            confirmations: self.statistics.confirmations(),
            confirmations_without_fault: self.statistics.confirmations_without_fault(),
            log_lines_dropped: super::logging::dropped(),
            intended_replicas,
            replicas,
        }
    }

    fn map(&self, buckets: usize) -> MapState {
        let replicas = self.admin.replicas().into_iter();
        let places = replicas.map(|(index, member)| ReplicaPlaces {
            index,
            node_name: member.node_name().to_string(),
            stale: self.shared.stale_ranges(index),
        });
        let DiskState {
            node_name,
            size,
            health,
            ..
        } = self.state();
        let disk = MappedDisk {
            node_name,
            size,
            health,
            undecided: self.shared.unresolved(),
        };
        MapState::new(&self.reports, disk, buckets, places)
    }

    fn jobs(&self) -> Vec<JobState> {
        let names = self.admin.names();
        let jobs = self.admin.jobs();
        jobs.iter().map(|job| JobState::new(job, &names)).collect()
    }

    fn ended_jobs(&self) -> Vec<EndedJob> {
        self.reports.ended_jobs()
    }

    fn change(&self, change: Change) -> Result<Option<String>, String> {
        let admin = &self.admin;
        let started = match change {
            Change::AddNode { node_name, path } => self.add_node(node_name, path).map(|()| None)?,
            Change::RemoveNode(node_name) => self.remove_node(&node_name).map(|()| None)?,
            Change::AddReplica { node_name, force } => {
                self.add_replica(node_name, force).map(|()| None)?
            }
            Change::RenameReplica {
                node_name,
                new_name,
            } => self.rename(&node_name, &new_name).map(|()| None)?,
            Change::RemoveReplica(node_name) => admin
                .remove_replica(&node_name)
                .map(|_| None)
                .map_err(line)?,
            Change::Resize { size_bytes } => {
                admin.resize(size_bytes).map(|()| None).map_err(line)?
            }
            Change::Scrub {
                repair,
                speed_bytes,
            } => Some(admin.scrub(repair, speed_bytes).map_err(line)?),
            Change::Resync {
                node_name,
                speed_bytes,
            } => Some(admin.resync(&node_name, speed_bytes).map_err(line)?),
            Change::Prefer {
                node_name,
                force,
                speed_bytes,
            } => {
                let started = admin.prefer(&node_name, force, speed_bytes);
                Some(started.map_err(line)?)
            }
            Change::ClearErrors(node_name) => {
                self.clear_errors(node_name.as_deref()).map(|()| None)?
            }
            Change::Threshold(threshold) => {
                let wanted = threshold.map_or(Wanted::Majority, Wanted::Given);
                admin.set_threshold(wanted).map(|()| None).map_err(line)?
            }
            Change::Continue => {
                admin.continue_held();
                None
            }
            Change::Job { id, order } => self.order_job(&id, order).map(|()| None)?,
        };
        Ok(started.map(|id| id.to_string()))
    }

    fn fail(&self, node_name: &str, force: bool) -> Result<LossState, String> {
        let loss = match force {
            true => self.admin.fail_replica(node_name),
            false => self.admin.loss_of(node_name),
        };
        let loss = loss.map_err(line)?;
        Ok(LossState {
            removed: force,
            lost_sectors: loss.lost.sectors(),
            doubtful_sectors: loss.doubtful.sectors(),
            not_durable_sectors: loss.not_durable.sectors(),
            undecided_sectors: loss.undecided.sectors(),
        })
    }

    fn quit(&self) {
        // Fails only if the daemon is stopping already.
        let _ = self.stop.send(Stop::Requested);
    }
}

/// A node that is not a replica, nor on its way to become one.
fn unused<'a>(
    nodes: &'a mut BTreeMap<String, Node>,
    node_name: &str,
) -> Result<&'a mut Node, String> {
    match nodes.get_mut(node_name) {
        Some(node) if node.is_being_added => Err(format!(
            "the node {} is being added to the disk",
            Quoted(node_name)
        )),
        Some(node) => Ok(node),
        None => Err(format!("there is no unused node {}", Quoted(node_name))),
    }
}

/// The name of the value of an option.
fn name_of(value: impl clap::ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

fn line(error: AdminError) -> String {
    error.to_string()
}

fn by_operation<T>(of: impl Fn(OperationType) -> T) -> ByOperation<T> {
    ByOperation {
        read: of(OperationType::Read),
        write: of(OperationType::Write),
        flush: of(OperationType::Flush),
    }
}
