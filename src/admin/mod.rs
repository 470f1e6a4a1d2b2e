//! What an operator does to a disk while it is served: replicas are added and removed, brought up
//! to date, scrubbed; the disk grows.
//!
//! Its methods may be called from any thread but those of the workers. They wait for the workers to
//! take note, and for the kernel to open and close files, never for a guest.
//!
//! Invariants: a file is closed when no worker uses it any more, and its lock is given back then,
//! not sooner; one replica is added or removed at a time.

#![forbid(unsafe_code)]

mod resize;

use std::io;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use log::{info, warn};

use self::resize::Growers;
pub use self::resize::NotGrown;
use crate::common::buffer::BUFFER_ALIGNMENT_BYTES;
use crate::common::message::{Quoted, Reason};
use crate::common::{NOT_POISONED, ReplicaIndex, SECTOR_BYTES};
use crate::control::events::NodeNames;
use crate::control::queue::EventQueue;
use crate::device::Capacity;
use crate::device::back_channel::BackChannel;
use crate::engine::Shared;
use crate::jobs::{JobEvent, JobId, JobInfo, NotStarted, UnknownJob};
use crate::quorum::health::NotRemoved;
use crate::replica::file::{OpenError, OpenOptions, ReplicaFile, ReplicaSource, open_beside};
use crate::replica::ring::RingFile;
use crate::replica::table::ReplicaTable;
use crate::worker::control::WorkerControl;
use crate::worker::{Disk, Workers};

/// Why something was not done. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The image cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It wants buffers more aligned than any known disk does.
    #[error("{} needs buffers aligned to {alignment_bytes} bytes, more than is supported", Quoted(.node_name))]
    Alignment {
        /// The replica.
        node_name: String,
        /// What it wants.
        alignment_bytes: u32,
    },
    /// Nothing can be written.
    #[error("the disk is read-only")]
    ReadOnly,
    /// `--blkverify` is about two replicas.
    #[error(
        "a disk that is served with --blkverify has two replicas; none can be added or removed"
    )]
    Blkverify,
    /// A disk has so many replicas at most.
    #[error(
        "no place for another replica is free; try again when one has been removed for some seconds"
    )]
    Full,
    /// The workers cannot use the file.
    #[error("{} cannot be used: {}", Quoted(.node_name), Reason(.source))]
    Register {
        /// The replica.
        node_name: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no replica of that name.
    #[error("there is no replica {}", Quoted(.0))]
    UnknownReplica(String),
    /// The disk cannot do without it.
    #[error("{} cannot be removed: {reason}", Quoted(.node_name))]
    Needed {
        /// The replica.
        node_name: String,
        /// Why.
        reason: NotRemoved,
    },
    /// A resync cannot begin.
    #[error("{}: {reason}", Quoted(.node_name))]
    NotResynced {
        /// The replica.
        node_name: String,
        /// Why.
        reason: NotStarted,
    },
    /// A scrub cannot begin.
    #[error(transparent)]
    NotScrubbed(NotStarted),
    /// There is no job of that name.
    #[error(transparent)]
    UnknownJob(#[from] UnknownJob),
    /// A disk only grows.
    #[error(
        "the disk has {0} bytes; it can be made larger, not smaller: what is stored at its end would be lost"
    )]
    Smaller(u64),
    /// The size is not one that a disk can have.
    #[error("the size must be a multiple of {0} bytes, and less than 8 EiB")]
    Size(u32),
    /// An image is still waited for.
    #[error(
        "a replica that did not answer has not been put back since the last time; try again later, or remove it"
    )]
    Unsettled,
    /// A replica cannot be made longer.
    #[error(transparent)]
    NotGrown(NotGrown),
}

/// What has come of removing a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// Its image is closed and not locked any more.
    Closed,
    /// It does not answer: its image stays locked until the kernel has ended what is in flight
    /// there.
    StillOpen,
}

/// See the [module](self).
pub struct Admin {
    shared: Arc<Shared>,
    workers: WorkerControl,
    table: Arc<ReplicaTable>,
    names: NodeNames,
    events: Arc<EventQueue>,
    options: OpenOptions,
    capacity: Capacity,
    block_bytes: u32,
    blkverify: bool,
    /// Of all connections.
    back_channels: Vec<BackChannel>,
    growers: Growers,
    /// Held while a replica is added or removed, or the disk grows.
    changing: Mutex<()>,
}

impl Admin {
    /// For a disk that `workers` serve from what is in `table`. `released` is the other end of
    /// [`Disk::released`].
    ///
    /// # Errors
    /// If the thread that closes files cannot be made.
    pub fn start(
        disk: &Disk,
        workers: &Workers,
        table: Arc<ReplicaTable>,
        options: OpenOptions,
        released: Receiver<ReplicaIndex>,
    ) -> io::Result<Self> {
        let admin = Self {
            shared: Arc::clone(&disk.shared),
            workers: workers.control(),
            names: table
                .in_use()
                .iter()
                .map(|(_, file)| &file.node_name)
                .collect(),
            table,
            events: Arc::clone(&disk.events),
            options,
            capacity: disk.info.capacity.clone(),
            block_bytes: disk.info.block_bytes,
            blkverify: disk.policy.blkverify,
            back_channels: disk
                .slots
                .iter()
                .map(|slot| slot.back_channel.clone())
                .collect(),
            growers: Growers::default(),
            changing: Mutex::new(()),
        };
        let (workers, table) = (admin.workers.clone(), Arc::clone(&admin.table));
        // Ends when the workers have ended, which have the other end of the channel.
        std::thread::Builder::new()
            .name("closing".into())
            .spawn(move || close_released(&released, &workers, &table))?;
        Ok(admin)
    }

    /// The names of the replicas, also of those that are added later.
    pub fn names(&self) -> NodeNames {
        self.names.clone()
    }

    /// The replicas of the disk, in order.
    pub fn replicas(&self) -> Vec<(ReplicaIndex, Arc<ReplicaFile>)> {
        self.table.in_use()
    }

    /// Adds a replica: its image is opened, checked and locked as at the start. It is written to
    /// from now on, votes where it has been written to, and is brought up to date by the job
    /// that is returned. (`None` if there are too many jobs: it begins by itself when there is
    /// room.)
    ///
    /// # Errors
    /// If the image cannot be used; then nothing has changed.
    pub fn add_replica(&self, source: &ReplicaSource) -> Result<Option<JobId>, AdminError> {
        let _changing = self.changing.lock().expect(NOT_POISONED);
        self.check_changeable()?;
        if self.options.read_only {
            return Err(AdminError::ReadOnly);
        }
        let index = self.table.free_place().ok_or(AdminError::Full)?;
        let open = self.table.open();
        let others: Vec<_> = open.into_iter().map(|(_, file)| file).collect();
        let file = open_beside(
            &others,
            source,
            self.options,
            self.capacity.bytes(),
            self.block_bytes,
        )?;
        let node_name = source.node_name.clone();
        let alignment_bytes = file.memory_alignment_bytes;
        if alignment_bytes as usize > BUFFER_ALIGNMENT_BYTES {
            return Err(AdminError::Alignment {
                node_name,
                alignment_bytes,
            });
        }
        if let Err(source) = self.workers.set_file(index, Some(RingFile::of(&file.file))) {
            let _ = self.workers.set_file(index, None);
            return Err(AdminError::Register { node_name, source });
        }
        info!(replica = node_name, file:% = source.path.display(); "replica added");
        self.names.set(index, &node_name);
        self.table.put(index, Arc::new(file));
        self.events.forget(index);
        self.shared.add(index);
        let begun = self.jobs_do(|jobs, health| jobs.resync(index, 0, health));
        self.workers.tick_all();
        Ok(match begun {
            Ok(id) | Err(NotStarted::InResync(id)) => Some(id),
            Err(NotStarted::TooMany | NotStarted::NotAReplica) => None,
        })
    }

    /// Removes a replica, whether it answers or not. Its image is closed when nothing is in flight
    /// there any more, which is waited for as long as a replica that hangs is waited for.
    ///
    /// # Errors
    /// If the disk cannot do without it; then nothing has changed.
    pub fn remove_replica(&self, node_name: &str) -> Result<Removed, AdminError> {
        let _changing = self.changing.lock().expect(NOT_POISONED);
        self.check_changeable()?;
        let index = self.index_of(node_name)?;
        let tell = |event| self.tell(event);
        let removed = match self.shared.remove(index, tell) {
            Err(NotRemoved::LastDurableCopies) => {
                self.workers.flush();
                self.shared.remove(index, tell)
            }
            other => other,
        };
        removed.map_err(|reason| AdminError::Needed {
            node_name: node_name.to_owned(),
            reason,
        })?;
        info!(replica = node_name; "replica removed");
        self.table.leaves(index);
        self.workers.tick_all();
        if self
            .table
            .wait_until_closed(index, self.workers.drain_limit())
        {
            return Ok(Removed::Closed);
        }
        warn!(
            replica = node_name;
            "removed replica does not answer: its image stays locked until the kernel has ended \
             the operations in flight"
        );
        Ok(Removed::StillOpen)
    }

    /// Makes the disk larger: all its replicas, and then tells the guest. With the size that it has
    /// the guest is told once more.
    ///
    /// # Errors
    /// If the size is none for this disk, or a replica cannot have it; then the guest has seen
    /// nothing, and those that were made longer already are put back.
    pub fn resize(&self, size_bytes: u64) -> Result<(), AdminError> {
        let _changing = self.changing.lock().expect(NOT_POISONED);
        if self.options.read_only {
            return Err(AdminError::ReadOnly);
        }
        let from = self.capacity.bytes();
        if size_bytes < from {
            return Err(AdminError::Smaller(from));
        }
        if !size_bytes.is_multiple_of(u64::from(self.block_bytes))
            || i64::try_from(size_bytes).is_err()
        {
            return Err(AdminError::Size(self.block_bytes));
        }
        if size_bytes > from {
            let replicas: Vec<_> = self.replicas().into_iter().map(|(_, file)| file).collect();
            self.growers
                .grow(&replicas, (from, size_bytes), self.workers.drain_limit())?;
            let sectors = size_bytes / SECTOR_BYTES;
            self.shared.grow(sectors);
            self.capacity.grow(sectors);
            info!(size = size_bytes; "disk has grown");
        }
        for back_channel in &self.back_channels {
            back_channel.send_config_change();
        }
        Ok(())
    }

    /// Brings a replica up to date whose resync was cancelled.
    ///
    /// # Errors
    /// If there is no such replica, or it is being brought up to date already.
    pub fn resync(&self, node_name: &str, speed_bytes: u64) -> Result<JobId, AdminError> {
        let index = self.index_of(node_name)?;
        let begun = self.jobs_do(|jobs, health| jobs.resync(index, speed_bytes, health));
        begun.map_err(|reason| AdminError::NotResynced {
            node_name: node_name.to_owned(),
            reason,
        })
    }

    /// Reads every sector of every replica, votes, and with `repair` writes the winner over what
    /// lost. Not faster than `speed_bytes` a second; 0: as fast as leaves the guest its share.
    ///
    /// # Errors
    /// If nothing can be repaired, or there are too many jobs.
    pub fn scrub(&self, repair: bool, speed_bytes: u64) -> Result<JobId, AdminError> {
        if repair && self.options.read_only {
            return Err(AdminError::ReadOnly);
        }
        let begun = self.jobs_do(|jobs, health| jobs.scrub(repair, speed_bytes, health));
        begun.map_err(AdminError::NotScrubbed)
    }

    /// All jobs, oldest first.
    pub fn jobs(&self) -> Vec<JobInfo> {
        let mut jobs = self.jobs_do(|jobs, health| jobs.list(health));
        jobs.sort_by_key(|job| job.id);
        jobs
    }

    /// The job begins nothing until it is resumed.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_pause(&self, id: JobId) -> Result<(), AdminError> {
        Ok(self.jobs_do(|jobs, health| jobs.pause(id, health))?)
    }

    /// The job goes on.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_resume(&self, id: JobId) -> Result<(), AdminError> {
        Ok(self.jobs_do(|jobs, health| jobs.resume(id, health))?)
    }

    /// The job ends. The replica of a cancelled resync stays stale where it has not been written
    /// to, and does not vote there, until [`Self::resync`] or until it is removed.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_cancel(&self, id: JobId) -> Result<(), AdminError> {
        Ok(self.jobs_do(|jobs, health| jobs.cancel(id, health))?)
    }

    /// Bytes a second at most from now on; 0: as fast as leaves the guest its share.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_set_speed(&self, id: JobId, speed_bytes: u64) -> Result<(), AdminError> {
        Ok(self.jobs_do(|jobs, _| jobs.set_speed(id, speed_bytes))?)
    }

    fn check_changeable(&self) -> Result<(), AdminError> {
        if self.blkverify {
            return Err(AdminError::Blkverify);
        }
        Ok(())
    }

    fn index_of(&self, node_name: &str) -> Result<ReplicaIndex, AdminError> {
        let in_use = self.table.in_use();
        let found = in_use.iter().find(|(_, file)| file.node_name == node_name);
        let found = found.map(|(index, _)| *index);
        found.ok_or_else(|| AdminError::UnknownReplica(node_name.to_owned()))
    }

    fn jobs_do<R>(
        &self,
        with: impl FnOnce(&mut crate::jobs::Jobs, &crate::quorum::health::Health) -> R,
    ) -> R {
        let result = self.shared.jobs(|event| self.tell(event), with);
        self.workers.tick_first();
        result
    }

    fn tell(&self, event: JobEvent) {
        self.events.push(event);
    }
}

/// Closes the files of removed replicas when no worker uses them any more.
fn close_released(
    released: &Receiver<ReplicaIndex>,
    workers: &WorkerControl,
    table: &ReplicaTable,
) {
    while let Ok(index) = released.recv() {
        if let Err(error) = workers.set_file(index, None) {
            // The io_uring keeps the file open, but nothing is in flight there.
            warn!(error:%; "cannot close the image of a removed replica");
        }
        table.close(index);
    }
}
