//! The daemon: builds the parts in the order in which they can fail, serves until there is a reason
//! to stop, and shuts the parts down in the opposite order.
//!
//! Invariants: all checks of the configuration and the images come before the first socket exists,
//! and it is known before that it can be created: a start that is refused changes no image;
//! at the end every accepted request is answered and the replicas are flushed, or the exit status
//! says that this took too long; an image that the kernel may still write to stays locked until the
//! kernel has finished.

mod allocator;
mod confinement;
mod connections;
mod descriptors;
mod error;
mod last_flush;
mod listeners;
pub mod logging;
mod operator;
mod panic_hook;
mod records;
mod replicas;
pub mod service_manager;
mod signals;
mod watchdog;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use log::{info, warn};
use sd_notify::NotifyState;

pub use self::confinement::print_sandbox;
use self::connections::{Connections, FrontendListener};
pub use self::error::Error;
use self::error::system;
use self::listeners::Listeners;
use self::operator::DiskOperator;
use self::replicas::Replicas;
use self::signals::Signals;
use self::watchdog::Watchdog;
use crate::admin::Admin;
use crate::common::{ReplicaIndex, SECTOR_BYTES};
use crate::config::{Config, OnReadError, OnWriteError, Records};
use crate::control::Operator;
use crate::control::events::Names;
use crate::control::http::MetricsServer;
use crate::control::publisher::{Monitor, Publisher};
use crate::control::queue::EventQueue;
use crate::device::connection::{CacheMode, ConnectionSlot};
use crate::device::disk_use::DiskUse;
use crate::device::frontend::Frontend;
use crate::device::hold::{ErrorPolicy, Hold, OnError};
use crate::device::{Capacity, DiskInfo};
use crate::engine::{Policy, ReadPattern, Shared, buffer_bytes_min};
use crate::jobs::Sizes;
use crate::limits::{
    BUFFER_BYTES_MAX, CONNECTIONS_MAX, QUEUE_SIZE_MAX, REPLICAS_MAX, watchdog_limit,
};
use crate::replica::file::Opening;
use crate::replica::ring::Aio;
use crate::replica::table::ReplicaTable;
use crate::sandbox::{self, ThreadKind};
use crate::statistics::Statistics;
use crate::untrusted::close::start_with;
use crate::worker::{Disk, Stop, Workers};

/// Starts the log of the disk named `disk`, and has a panic of any thread end the process from now
/// on. `verbosity` is the number of `-v`.
///
/// # Errors
/// If [`logging::LEVEL_VARIABLE`] is set and does not hold levels.
pub fn start_log(disk: &str, verbosity: u8) -> Result<(), logging::UnknownLevel> {
    logging::start(disk, verbosity)?;
    panic_hook::install();
    Ok(())
}

/// Serves the disk that `config` describes until SIGTERM or SIGINT.
///
/// The calling thread must be the only one: signals are blocked in it and in the threads it starts.
///
/// # Errors
/// If it cannot start, if `--blkverify` finds a difference, or if the last flush fails.
pub fn run(config: &Config) -> Result<(), Error> {
    signals::ignore();
    allocator::share();
    descriptors::raise_limit();
    // Until the images are open, there is nothing that SIGTERM would have to end in order: it ends
    // the process at once.
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(64));
    let count = config.queue_count.min(u16::try_from(threads).unwrap_or(1));
    let memory_bytes_max = memory_bytes_max(config, count)?;
    confinement::check(config)?;
    listeners::check(config)?;
    let mut replicas = Replicas::open(config)?;
    let signals = Signals::block().map_err(system("cannot block signals"))?;
    let listeners = Listeners::open(config)?;
    service_manager::connect();
    confinement::confine(config)?;
    let (stop, stopped) = channel();
    let (released, is_released) = channel();
    let workers = (count, memory_bytes_max);
    let disk = disk(config, &replicas, workers, (stop.clone(), released))?;
    let has_records = replicas.has_records();
    if let Some(keeper) = replicas.keeper() {
        disk.events.restore_jobs(&keeper.record().jobs);
    }
    let is_new = replicas.remember(&disk.shared, |event| disk.events.push(event))?;
    let files = replicas.ring_files();
    logging::start_writer().map_err(system("cannot start a thread"))?;
    let workers = Workers::start(&disk, files, count).map_err(worker_error(config.aio))?;
    let table = Arc::new(ReplicaTable::with_missing(replicas.members));
    let admin = Admin::start(
        &disk,
        &workers,
        Arc::clone(&table),
        (
            config.open_options(),
            Opening::Apart,
            config.image_directories.clone(),
        ),
        is_released,
    );

    // Records say that the images belong together.
    let compares = is_new || config.rewrite_corrupted && !has_records;
    if let Ok(admin) = &admin {
        admin.begin_jobs();
    }
    if let Ok(admin) = &admin
        && compares
        && config.replicas.len() > 1
    {
        admin.compare_first();
    }
    let served = admin
        .map_err(system("cannot start a thread"))
        .and_then(|admin| {
            let admin = match has_records {
                false => Arc::new(admin),
                true => seeking(admin, &disk, &config.records)?,
            };
            let watched = admin.watch_images();
            watched.map_err(system("cannot start a thread"))?;
            let parts = (&disk, &workers, &admin);
            serve(config, parts, listeners, signals, (stop, &stopped))
        });
    let mut unanswered = workers.exit();
    let ended = served.map(|(publisher, reason)| {
        let in_service = disk.shared.in_service();
        let flushed = last_flush::flush(&table, in_service, config.read_only, &mut unanswered);
        if matches!(reason, Stop::Requested) && flushed.is_ok() && unanswered.is_empty() {
            records::close(&disk.shared, &table);
        }
        publisher.stop();
        (reason, flushed)
    });
    // The kernel still has operations on a replica that has not answered. A late write must not
    // overwrite what another process writes to the image meanwhile, so its lock is not released.
    for replica in table.close_all(unanswered) {
        warn!(
            replica:% = replica.node_name();
            "replica does not answer: its image stays locked until the kernel has ended the \
             operations in flight"
        );
    }
    match ended? {
        (Stop::Requested, flushed) => flushed,
        (Stop::ContentsDiffer(range), _) => Err(Error::ContentsDiffer(range.start)),
        (Stop::Broken(why), _) => Err(Error::Broken(why)),
    }
}

/// Has the missing members taken in when they are there again, and records made for new ones.
fn seeking(admin: Admin, disk: &Disk, records: &Records) -> Result<Arc<Admin>, Error> {
    let admin = Arc::new(admin.with_records(records.directory.clone()));
    let members = records::Members::new(&disk.shared, &records.directory);
    let keeping = Arc::downgrade(&admin);
    disk.events.keep_jobs_with(Box::new(move |jobs| {
        if let Some(admin) = keeping.upgrade() {
            admin.keep_jobs(jobs);
        }
    }));
    let sought = admin.seek_missing(Arc::new(members));
    sought.map_err(system("cannot start a thread"))?;
    Ok(admin)
}

/// Serves connections until there is a reason to stop. Returns with every
/// virtqueue drained. The second half of [`run`], so that its errors end the workers.
fn serve(
    config: &Config,
    (disk, workers, admin): (&Disk, &Workers, &Arc<Admin>),
    listeners: Listeners,
    signals: Signals,
    (stop, stopped): (Sender<Stop>, &Receiver<Stop>),
) -> Result<(Publisher, Stop), Error> {
    let Listeners {
        events,
        qmp,
        metrics,
        frontend,
    } = listeners;
    let listener = FrontendListener::new(frontend)?;
    let names = Names {
        reference: config.node_name.clone(),
        nodes: admin.names(),
    };
    let operator: Arc<dyn Operator> = Arc::new(DiskOperator::new(
        config,
        disk,
        Arc::clone(admin),
        stop.clone(),
    ));
    let _metrics = metrics
        .map(|listener| MetricsServer::spawn(listener, &operator))
        .transpose()
        .map_err(system("cannot start the metrics server"))?;
    let monitor = qmp.map(|listener| Monitor {
        listener,
        operator: Arc::clone(&operator),
    });
    let queue = Arc::clone(&disk.events);
    let publisher = Publisher::spawn(events, monitor, queue, names)
        .map_err(system("cannot start the event publisher"))?;
    signals
        .forward_to(stop)
        .map_err(system("cannot start the signal thread"))?;
    start_with(|| sandbox::enter(ThreadKind::Closing)).map_err(system("cannot start a thread"))?;
    let frontends = disk.slots.iter().enumerate();
    let frontends = frontends.map(|(index, slot)| {
        Frontend::new(
            disk.info.clone(),
            slot.clone(),
            workers.virtqueue_server(index),
        )
    });
    let uses = disk.slots.iter().map(|slot| slot.disk_use.clone());
    // A frontend that waits at the socket is served at once, and its line is not to come first.
    announce(disk, admin.replicas().len());
    let connections = Connections::start(listener, frontends.zip(uses).collect())
        .map_err(system("cannot start the frontend thread"))?;
    let watchdog = Watchdog::start(watchdog_limit(config.replica_timeout))
        .map_err(system("cannot start a thread"))?;
    sandbox::enter(ThreadKind::Main);
    let reason = stopped.recv().expect("this function owns a sender");
    let cause = match &reason {
        Stop::Requested => "requested",
        Stop::ContentsDiffer(_) => "replicas differ",
        Stop::Broken(_) => "worker failed",
    };
    // The end has limits of its own.
    drop(watchdog);
    info!(reason = cause; "stopping");
    service_manager::notify(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
    connections.stop();
    Ok((publisher, reason))
}

/// Reports to the log and the service manager that the disk is served.
fn announce(disk: &Disk, replicas: usize) {
    let (size, threshold) = (disk.info.capacity.bytes(), disk.policy.threshold);
    let aio = match disk.aio {
        Aio::IoUring => "io_uring",
        Aio::Threads => "threads",
    };
    let status = format!(
        "serving {} MiB from {replicas} replicas, vote threshold {threshold}",
        size >> 20
    );
    info!(size, replicas, "vote-threshold" = threshold, aio; "serving the disk");
    service_manager::notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// Why no worker starts.
fn worker_error(aio: crate::config::Aio) -> impl FnOnce(io::Error) -> Error {
    move |source| match aio {
        crate::config::Aio::IoUring => Error::IoUring(source),
        crate::config::Aio::Threads => system("cannot start a worker")(source),
    }
}

/// Unless a bound on the memory is given, it is so many times the least one.
const USUAL_TIMES_LEAST: u64 = 3;

/// The bound on the memory of `workers` for requests, in bytes.
///
/// # Errors
/// If a bound is given with which not every worker can serve a request.
fn memory_bytes_max(config: &Config, workers: u16) -> Result<u64, Error> {
    let replicas = config.replicas.len();
    let least = buffer_bytes_min(workers, replicas);
    match config.memory_bytes_max {
        Some(given) if given < least => Err(Error::MemoryMax {
            workers,
            replicas,
            least,
        }),
        Some(given) => Ok(given),
        // With the least, each worker has one request in flight, however short it is.
        None => Ok(BUFFER_BYTES_MAX.max(USUAL_TIMES_LEAST * least)),
    }
}

/// The parts of the disk that so many workers serve, with so many bytes of buffers at most.
fn disk(
    config: &Config,
    replicas: &Replicas,
    (workers, memory_bytes_max): (u16, u64),
    (stop, released): (Sender<Stop>, Sender<ReplicaIndex>),
) -> Result<Disk, Error> {
    let info = disk_info(config, replicas);
    let cache_mode = CacheMode::default();
    let slots = DiskUse::of_slots(CONNECTIONS_MAX, config.shared || config.read_only);
    let slots = slots.into_iter().map(|disk_use| {
        let slot = ConnectionSlot::new(config.queue_count, QUEUE_SIZE_MAX, cache_mode.clone())?;
        Ok(ConnectionSlot { disk_use, ..slot })
    });
    let mut shared = Shared::new(
        replicas.members.len(),
        replicas.votes,
        workers,
        info.capacity.sectors(),
    );
    shared.limit_buffers(memory_bytes_max);
    Ok(Disk {
        policy: policy(config, replicas.votes, &info),
        info,
        aio: match config.aio {
            crate::config::Aio::IoUring => Aio::IoUring,
            crate::config::Aio::Threads => Aio::Threads,
        },
        shared: Arc::new(shared),
        released,
        slots: slots
            .collect::<Result<_, virtio_queue::Error>>()
            .map_err(|error| Error::Broken(format!("cannot create a queue: {error}")))?,
        statistics: Statistics::new(workers, REPLICAS_MAX),
        events: EventQueue::new().map_err(system("cannot create an eventfd"))?,
        hold: Arc::new(Hold::new(error_policy(config))),
        stop,
    })
}

fn disk_info(config: &Config, replicas: &Replicas) -> DiskInfo {
    let block_bytes = config.block_bytes;
    let files = replicas.open_files();
    let physical = files.map(|file| file.physical_block_bytes);
    DiskInfo {
        capacity: Capacity::new(replicas.size_bytes / SECTOR_BYTES),
        block_bytes,
        physical_block_bytes: physical.max().unwrap_or(0).max(block_bytes),
        read_only: config.read_only,
        serial: config.serial.clone(),
        num_queues: config.queue_count,
        segments_max: config.segments_max(),
    }
}

fn error_policy(config: &Config) -> ErrorPolicy {
    ErrorPolicy {
        read: match config.rerror {
            OnReadError::Report => OnError::Report,
            OnReadError::Stop => OnError::Stop,
        },
        write: match config.werror {
            OnWriteError::Report => OnError::Report,
            OnWriteError::Stop => OnError::Stop,
            OnWriteError::Enospc => OnError::NoSpace,
        },
    }
}

fn policy(config: &Config, threshold: usize, info: &DiskInfo) -> Policy {
    Policy {
        threshold,
        read_pattern: match config.read_pattern {
            crate::config::ReadPattern::Quorum => ReadPattern::Quorum,
            crate::config::ReadPattern::Threshold => ReadPattern::Threshold,
            crate::config::ReadPattern::Fifo => ReadPattern::Fifo,
        },
        rewrite_corrupted: config.rewrite_corrupted,
        repair_limit_sectors: config.repair_limit_bytes / SECTOR_BYTES,
        blkverify: config.blkverify,
        job_sizes: Sizes {
            neighbourhood_sectors: config.scrub_around_bytes / SECTOR_BYTES,
            ..Sizes::default()
        },
        block_sectors: u64::from(info.block_bytes) / SECTOR_BYTES,
        replica_timeout: config.replica_timeout,
    }
}
