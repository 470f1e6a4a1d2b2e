//! Changes of a disk while it is served: add, remove, resync and scrub replicas, and grow the disk.
//!
//! Any thread may call the methods, except the workers. They wait for the workers to accept a
//! change, and for the kernel to open and close files, never for a guest.
//!
//! Invariants: a file is closed, and its lock released, only when no worker uses it any more; one
//! change at a time adds or removes a replica or grows the disk. An image is opened before its
//! change begins, so one that does not answer keeps no other change waiting.

#![forbid(unsafe_code)]

mod error;
mod missing;
pub mod records;
mod resize;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use log::{info, warn};

pub use self::error::AdminError;
pub use self::missing::Recognition;
use self::resize::Growers;
pub use self::resize::NotGrown;
use crate::common::{NOT_POISONED, ReplicaIndex, SECTOR_BYTES};
use crate::control::events::{NodeNames, Notice};
use crate::control::queue::EventQueue;
use crate::device::Capacity;
use crate::device::back_channel::BackChannel;
use crate::device::hold::Hold;
use crate::engine::Shared;
use crate::jobs::{JobEvent, JobId, JobInfo, NotStarted};
use crate::quorum::health::{Loss, NotRemoved, Wanted};
use crate::replica::file::{
    ImageDirectories, OpenError, OpenOptions, Opening, Overwrite, ReplicaFile, ReplicaSource,
    Watched, check_beside, open_beside, watch,
};
use crate::replica::record_file::StateDirectory;
use crate::replica::table::{Member, ReplicaTable};
use crate::sandbox::{self, ThreadKind};
use crate::statistics::Statistics;
use crate::worker::control::WorkerControl;
use crate::worker::{Disk, Workers};

/// The state of a removed replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// Its image is closed and its lock released.
    Closed,
    /// It does not answer: its image stays locked until the kernel has ended the operations in
    /// flight.
    StillOpen,
}

/// See the [module](self).
pub struct Admin {
    shared: Arc<Shared>,
    workers: WorkerControl,
    table: Arc<ReplicaTable>,
    names: NodeNames,
    events: Arc<EventQueue>,
    statistics: Statistics,
    hold: Arc<Hold>,
    options: OpenOptions,
    opening: Opening,
    image_directories: ImageDirectories,
    /// Where records are; `None`: there are none.
    records: Option<StateDirectory>,
    capacity: Capacity,
    block_bytes: u32,
    blkverify: bool,
    /// How many replicas the disk should have.
    intended_replicas: AtomicUsize,
    /// The back channels of all connections.
    back_channels: Vec<BackChannel>,
    growers: Growers,
    /// Held while a replica is added or removed, or the disk grows.
    changing: Mutex<()>,
}

impl Admin {
    /// For a disk that `workers` serve from the files in `table`. `released` is the other end of
    /// [`Disk::released`].
    ///
    /// # Errors
    /// If the thread that closes files cannot be created.
    pub fn start(
        disk: &Disk,
        workers: &Workers,
        table: Arc<ReplicaTable>,
        (options, opening, image_directories): (OpenOptions, Opening, ImageDirectories),
        released: Receiver<ReplicaIndex>,
    ) -> io::Result<Self> {
        let admin = Self {
            shared: Arc::clone(&disk.shared),
            workers: workers.control(),
            intended_replicas: AtomicUsize::new(table.members().len()),
            names: table
                .members()
                .iter()
                .map(|(_, member)| member.node_name())
                .collect(),
            table,
            events: Arc::clone(&disk.events),
            statistics: disk.statistics.clone(),
            hold: Arc::clone(&disk.hold),
            options,
            opening,
            image_directories,
            records: None,
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
        // Ends with the workers, which own the other end of the channel.
        std::thread::Builder::new()
            .name("closing".into())
            .spawn(move || {
                sandbox::enter(ThreadKind::Images);
                close_released(&released, &workers, &table);
            })?;
        Ok(admin)
    }

    /// Has the images looked at again and again, on threads of their own, until this is dropped
    /// (O2). One that cannot be used any more is lost: the replica is missing from then on, if
    /// there are records to recognize it by (W13).
    ///
    /// # Errors
    /// If there is no thread for it.
    pub fn watch_images(self: &Arc<Self>) -> io::Result<()> {
        let capacity = self.capacity.clone();
        let events = Arc::clone(&self.events);
        let admin = Arc::downgrade(self);
        let told = move |replica, file: &Arc<ReplicaFile>, found| match found {
            Watched::Changed(changes) => events.push(Notice::Image(replica, changes)),
            Watched::Lost(error) => {
                if let Some(admin) = admin.upgrade() {
                    admin.lose(replica, file, &error.to_string());
                }
            }
        };
        watch(Arc::downgrade(&self.table), move || capacity.bytes(), told)
    }

    /// The names of the replicas, also of those that are added later.
    pub fn names(&self) -> NodeNames {
        self.names.clone()
    }

    /// The replicas of the disk, in order.
    pub fn replicas(&self) -> Vec<(ReplicaIndex, Member)> {
        self.table.members()
    }

    /// Adds a replica: its image is opened, checked and locked as at the start. It receives writes
    /// from now on and votes where it was written to. Returns the job that copies the rest, `None`
    /// if there are too many jobs: it starts by itself later.
    ///
    /// # Errors
    /// If the image cannot be used, or holds data that `overwrite` does not allow to lose. Nothing
    /// has changed then.
    pub fn add_replica(
        &self,
        source: &ReplicaSource,
        overwrite: Overwrite,
    ) -> Result<Option<JobId>, AdminError> {
        self.check_members_changeable()?;
        self.table.free_place().ok_or(AdminError::Full)?;
        self.check_beside_missing(source)?;
        let directory = self.image_directories.of(&source.path)?;
        // Before this change excludes others, because it may take long.
        let (file, mut access) = open_beside(
            &self.open_files(),
            source,
            (self.options, self.opening),
            self.capacity.bytes(),
            overwrite,
            directory,
        )?;
        let holder = self.make_record(&file, &mut access)?;
        drop(access);
        let _changing = self.changing.lock().expect(NOT_POISONED);
        let index = self.table.free_place().ok_or(AdminError::Full)?;
        self.check_beside_missing(source)?;
        self.settle_records()?;
        check_beside(&self.open_files(), &file, self.capacity.bytes())?;
        let node_name = source.node_name.clone();
        if let Err(source) = self.workers.set_file(index, Some(file.ring_file())) {
            let _ = self.workers.set_file(index, None);
            return Err(AdminError::Register { node_name, source });
        }
        info!(replica = node_name, file:% = source.path.display(); "replica added");
        self.names.set(index, &node_name);
        self.table.put(index, Arc::new(file));
        self.events.forget(index);
        self.statistics.replica_added(index);
        match holder {
            Some(holder) => self.shared.add_with_record(index, holder, &node_name),
            None => self.shared.add(index),
        }
        let started = self.with_jobs(|jobs, health| jobs.resync(index, 0, health));
        self.workers.tick_all();
        self.is_recorded();
        Ok(match started {
            Ok(id) | Err(NotStarted::InResync(id)) => Some(id),
            Err(_) => None,
        })
    }

    /// Checks that an image may be added from this path, without a look at what is there.
    ///
    /// # Errors
    /// If the path is outside of the directories from which images may be added.
    pub fn check_place(&self, image: &Path) -> Result<(), OpenError> {
        self.image_directories.of(image).map(drop)
    }

    /// How many replicas the disk should have: as many as it was started with, or as it had when
    /// the operator said so.
    pub fn intended_replicas(&self) -> usize {
        self.intended_replicas.load(Ordering::Relaxed)
    }

    /// The disk should have as many replicas as it has now.
    pub fn intend_present_replicas(&self) {
        let replicas = self.table.members().len();
        self.intended_replicas.store(replicas, Ordering::Relaxed);
    }

    /// Changes the vote threshold. One that is higher holds as soon as so many replicas are up to
    /// date (W10).
    ///
    /// # Errors
    /// If the disk has not so many replicas, or must have two that agree.
    pub fn set_threshold(&self, wanted: Wanted) -> Result<(), AdminError> {
        let _changing = self.changing.lock().expect(NOT_POISONED);
        self.check_changeable()?;
        self.settle_records()?;
        self.shared.want_threshold(wanted)?;
        let (mut now, wanted, follows) = self.shared.thresholds();
        if now < wanted {
            // What was copied or repaired is durable then, which is what the threshold waits for.
            self.workers.flush();
            self.shared.raise_threshold();
            (now, ..) = self.shared.thresholds();
        }
        info!("vote-threshold" = now, wanted, follows; "vote threshold changed");
        self.workers.tick_all();
        self.is_recorded();
        Ok(())
    }

    /// Submits the requests again that are held. Does not wait for them.
    pub fn continue_held(&self) {
        let requests = self.hold.continue_all();
        if requests > 0 {
            info!(requests; "held requests are submitted again");
        }
        self.workers.continue_all();
    }

    /// Gives a replica another name, in events and everywhere else.
    ///
    /// # Errors
    /// If there is no such replica, or another one has the name.
    pub fn rename_replica(&self, node_name: &str, new_name: &str) -> Result<(), AdminError> {
        let _changing = self.changing.lock().expect(NOT_POISONED);
        let index = self.index_of(node_name)?;
        if node_name != new_name && self.index_of(new_name).is_ok() {
            return Err(AdminError::NameTaken(new_name.to_owned()));
        }
        let mut members = self.table.members().into_iter();
        if let Some((_, member)) = members.find(|(at, _)| *at == index) {
            member.rename(new_name);
            self.names.set(index, new_name);
            self.shared.rename_in_records(index, new_name);
            self.is_recorded();
            info!(replica = new_name, before = node_name; "replica renamed");
        }
        Ok(())
    }

    /// Removes a replica, whether it answers or not. Waits, for a limited time, until no operation
    /// is in flight on it and its image is closed.
    ///
    /// # Errors
    /// If the disk needs it; nothing has changed.
    pub fn remove_replica(&self, node_name: &str) -> Result<Removed, AdminError> {
        let _changing = self.changing.lock().expect(NOT_POISONED);
        self.check_members_changeable()?;
        let index = self.index_of(node_name)?;
        self.settle_records()?;
        let report = |event| self.report(event);
        let removed = match self.shared.remove(index, report) {
            Err(NotRemoved::LastDurableCopies) => {
                self.workers.flush();
                self.shared.remove(index, report)
            }
            other => other,
        };
        removed.map_err(needed(node_name))?;
        Ok(self.is_removed(index, node_name))
    }

    /// What would be lost with a replica (W11).
    ///
    /// # Errors
    /// If it cannot be removed whatever is lost.
    pub fn loss_of(&self, node_name: &str) -> Result<Loss, AdminError> {
        self.check_members_changeable()?;
        let index = self.index_of(node_name)?;
        self.shared.loss_of(index).map_err(needed(node_name))
    }

    /// Removes a replica like [`Self::remove_replica`], whatever is lost with it (W11). Returns
    /// what is.
    ///
    /// # Errors
    /// If too few replicas would be left; nothing has changed.
    pub fn fail_replica(&self, node_name: &str) -> Result<Loss, AdminError> {
        let _changing = self.changing.lock().expect(NOT_POISONED);
        self.check_members_changeable()?;
        let index = self.index_of(node_name)?;
        self.settle_records()?;
        let loss = self.shared.loss_of(index).map_err(needed(node_name))?;
        if !loss.not_durable.is_empty() {
            self.workers.flush();
        }
        let failed = self.shared.fail(index, |event| self.report(event));
        let loss = failed.map_err(needed(node_name))?;
        warn!(
            replica = node_name,
            "lost-sectors" = loss.lost.sectors(),
            "doubtful-sectors" = loss.doubtful.sectors(),
            "not-durable-sectors" = loss.not_durable.sectors(),
            "undecided-sectors" = loss.undecided.sectors();
            "replica failed by the operator"
        );
        self.is_removed(index, node_name);
        Ok(loss)
    }

    /// Waits, for a limited time, until the image of a replica is closed that is removed now.
    fn is_removed(&self, index: ReplicaIndex, node_name: &str) -> Removed {
        let (threshold, ..) = self.shared.thresholds();
        info!(replica = node_name, "vote-threshold" = threshold; "replica removed");
        self.table.leaves(index);
        self.workers.tick_all();
        self.is_recorded();
        if self
            .table
            .wait_until_closed(index, self.workers.drain_limit())
        {
            return Removed::Closed;
        }
        warn!(
            replica = node_name;
            "removed replica does not answer: its image stays locked until the kernel has ended \
             the operations in flight"
        );
        Removed::StillOpen
    }

    /// Grows the disk: first all replicas, then the config space that the guest sees. With the
    /// current size it only notifies the frontends again.
    ///
    /// # Errors
    /// If the disk cannot have this size, or a replica cannot grow. The guest has seen nothing, and
    /// the replicas that have grown get their old size back.
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
            if let Some((_, missing)) = self.table.missing().first() {
                return Err(AdminError::Missing(missing.node_name().to_string()));
            }
            self.settle_records()?;
            let replicas = self.table.in_use().into_iter();
            let replicas: Vec<_> = replicas.map(|(_, file)| file).collect();
            self.growers
                .grow(&replicas, (from, size_bytes), self.workers.drain_limit())?;
            let sectors = size_bytes / SECTOR_BYTES;
            self.shared.grow(sectors);
            self.workers.tick_all();
            self.is_recorded();
            self.capacity.grow(sectors);
            info!(size = size_bytes; "disk has grown");
        }
        for back_channel in &self.back_channels {
            back_channel.send_config_change();
        }
        Ok(())
    }

    /// Starts a resync of a replica whose last one was cancelled.
    ///
    /// # Errors
    /// If there is no such replica, it has a resync already, or there are too many jobs.
    pub fn resync(&self, node_name: &str, speed_bytes: u64) -> Result<JobId, AdminError> {
        let index = self.index_of(node_name)?;
        let started = self.with_jobs(|jobs, health| jobs.resync(index, speed_bytes, health));
        started.map_err(|reason| AdminError::NotStarted {
            node_name: node_name.to_owned(),
            reason,
        })
    }

    /// Starts a scrub: reads all replicas, votes, and with `repair` repairs what is corrupt or
    /// unreadable. `speed_bytes` limits it, in bytes a second; 0: as fast as the guest's load
    /// allows.
    ///
    /// # Errors
    /// If the disk is read-only and `repair` is set, or there are too many jobs.
    pub fn scrub(&self, repair: bool, speed_bytes: u64) -> Result<JobId, AdminError> {
        if repair && self.options.read_only {
            return Err(AdminError::ReadOnly);
        }
        let started = self.with_jobs(|jobs, health| jobs.scrub(repair, speed_bytes, health));
        started.map_err(AdminError::NotScrubbed)
    }

    /// Starts a job in which a replica decides where no vote has a winner (W12): its copy is
    /// written over that of the others. `force`: they may lose theirs.
    ///
    /// # Errors
    /// If there is no such replica, it is evicted or not up to date there, every sector has a
    /// winner, the disk is read-only, or `force` is missing; the last one says how much is lost.
    pub fn prefer(
        &self,
        node_name: &str,
        force: bool,
        speed_bytes: u64,
    ) -> Result<JobId, AdminError> {
        if self.options.read_only {
            return Err(AdminError::ReadOnly);
        }
        let index = self.index_of(node_name)?;
        let not_started = |reason| AdminError::NotStarted {
            node_name: node_name.to_owned(),
            reason,
        };
        let preferable = self.shared.preferable(index).map_err(not_started)?;
        let undecided = preferable.undecided.sectors();
        if !force {
            return Err(AdminError::NotForced {
                node_name: node_name.to_owned(),
                sectors: preferable.sectors,
                undecided,
            });
        }
        let ranges = preferable.undecided;
        let started =
            self.with_jobs(|jobs, health| jobs.prefer(index, ranges, speed_bytes, health));
        let id = started.map_err(not_started)?;
        warn!(
            replica = node_name, "undecided-sectors" = undecided;
            "replica preferred by the operator where no vote has a winner"
        );
        Ok(id)
    }

    /// Has those replicas copied that are stale at the start, and begins the recovery of what an
    /// unclean end has left: until then the workers sleep.
    pub fn begin_jobs(&self) {
        let in_service = self.shared.in_service().iter();
        for replica in in_service.filter(|replica| self.shared.stale_sectors(*replica) > 0) {
            // One that cannot begin yet begins later, by itself.
            let _ = self.with_jobs(|jobs, health| jobs.resync(replica, 0, health));
        }
        self.workers.tick_first();
    }

    /// Has the images compared before anything is repaired unasked (O6).
    pub fn compare_first(&self) {
        self.shared.compare_first(|event| self.report(event));
        self.workers.tick_first();
    }

    /// All jobs, oldest first.
    pub fn jobs(&self) -> Vec<JobInfo> {
        let mut jobs = self.with_jobs(|jobs, health| jobs.list(health));
        jobs.sort_by_key(|job| job.id);
        jobs
    }

    /// Pauses a job.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_pause(&self, id: JobId) -> Result<(), AdminError> {
        Ok(self.with_jobs(|jobs, health| jobs.pause(id, health))?)
    }

    /// Resumes a job.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_resume(&self, id: JobId) -> Result<(), AdminError> {
        Ok(self.with_jobs(|jobs, health| jobs.resume(id, health))?)
    }

    /// Cancels a job. The replica of a cancelled resync stays stale where it was not written to,
    /// and does not vote there, until [`Self::resync`] or until it is removed.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_cancel(&self, id: JobId) -> Result<(), AdminError> {
        Ok(self.with_jobs(|jobs, health| jobs.cancel(id, health))?)
    }

    /// Sets the speed limit in bytes a second; 0: as fast as the guest's load allows.
    ///
    /// # Errors
    /// If there is no such job.
    pub fn job_set_speed(&self, id: JobId, speed_bytes: u64) -> Result<(), AdminError> {
        Ok(self.with_jobs(|jobs, _| jobs.set_speed(id, speed_bytes))?)
    }

    /// The open images, those of removed replicas included.
    fn open_files(&self) -> Vec<Arc<ReplicaFile>> {
        let open = self.table.open().into_iter();
        open.map(|(_, file)| file).collect()
    }

    fn check_changeable(&self) -> Result<(), AdminError> {
        if self.blkverify {
            return Err(AdminError::Blkverify);
        }
        Ok(())
    }

    /// The members of a read-only disk stay, since no record would have the change (S10).
    fn check_members_changeable(&self) -> Result<(), AdminError> {
        self.check_changeable()?;
        match self.options.read_only {
            true => Err(AdminError::ReadOnly),
            false => Ok(()),
        }
    }

    fn index_of(&self, node_name: &str) -> Result<ReplicaIndex, AdminError> {
        let members = self.table.members();
        let found = members
            .iter()
            .find(|(_, member)| *member.node_name() == *node_name);
        let found = found.map(|(index, _)| *index);
        found.ok_or_else(|| AdminError::UnknownReplica(node_name.to_owned()))
    }

    fn with_jobs<R>(
        &self,
        with: impl FnOnce(&mut crate::jobs::Jobs, &crate::quorum::health::Health) -> R,
    ) -> R {
        let result = self.shared.jobs(|event| self.report(event), with);
        self.workers.tick_first();
        result
    }

    fn report(&self, event: JobEvent) {
        self.events.push(event);
    }
}

/// The error of a removal that was refused.
fn needed(node_name: &str) -> impl Fn(NotRemoved) -> AdminError {
    move |reason| AdminError::Needed {
        node_name: node_name.to_owned(),
        reason,
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
