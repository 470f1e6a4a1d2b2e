//! The daemon: builds the parts in the order in which they can fail, runs until it is told to stop,
//! and shuts them down in the opposite order.
//!
//! Invariants: everything that can be refused is refused before a socket exists; when it ends,
//! every request taken was answered and the replicas were flushed, or the time for that is over and
//! the exit status says so; an image that the kernel may still write to stays locked until it has.

mod connections;
pub mod logging;
mod operator;
mod panic_hook;
pub mod service_manager;
mod signals;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use log::{error, info, warn};
use sd_notify::NotifyState;

use self::connections::{Connections, FrontendListener};
use self::operator::DiskOperator;
use self::signals::Signals;
use crate::admin::Admin;
use crate::common::buffer::BUFFER_ALIGNMENT_BYTES;
use crate::common::message::{Quoted, Reason};
use crate::common::{ReplicaIndex, ReplicaSet, SECTOR_BYTES};
use crate::config::{Config, Listen, PassedSocket};
use crate::control::Operator;
use crate::control::events::Names;
use crate::control::http::MetricsServer;
use crate::control::publisher::{Monitor, Publisher};
use crate::control::queue::EventQueue;
use crate::control::socket::{BindError, Listener, adopt_unix_listener, bind_unix_listener};
use crate::device::connection::{CacheMode, ConnectionSlot};
use crate::device::frontend::Frontend;
use crate::device::{Capacity, DiskInfo};
use crate::engine::{Policy, ReadPattern, Shared};
use crate::jobs::Sizes;
use crate::limits::{CONNECTIONS_MAX, LAST_FLUSH_LIMIT, REPLICAS_MAX};
use crate::replica::file::{OpenError, ReplicaFile, open_all};
use crate::replica::ring::RingFile;
use crate::replica::table::ReplicaTable;
use crate::statistics::Statistics;
use crate::worker::{Disk, Stop, Workers};

/// Why the daemon could not start, or ended otherwise than asked. Each is one line for the
/// operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A replica cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A socket cannot be made.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Metrics cannot be served there.
    #[error("--metrics {address}: {}", Reason(.source))]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// `--fd` names something else than a listening socket.
    #[error("--fd {0}: not a listening UNIX stream socket")]
    NotAListener(RawFd),
    /// What the service manager passed is something else than a listening socket.
    #[error("what the service manager passed as {} (descriptor {}) is not a listening UNIX stream socket",
        Quoted(&.0.name), .0.fd)]
    PassedNoListener(PassedSocket),
    /// A replica wants buffers more aligned than any known disk does.
    #[error("{} needs buffers aligned to {alignment_bytes} bytes, more than is supported", Quoted(.path))]
    Alignment {
        /// The replica.
        path: PathBuf,
        /// What it wants.
        alignment_bytes: u32,
    },
    /// The system refused something the daemon cannot do without.
    #[error("{what}: {source}")]
    System {
        /// What was refused.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// `--blkverify` found a difference.
    #[error("the replicas differ at sector {0}")]
    ContentsDiffer(u64),
    /// A worker could not go on.
    #[error("{0}")]
    Broken(String),
    /// The last flush failed.
    #[error("{}: the last flush failed: {}", Quoted(.path), Reason(.source))]
    LastFlush {
        /// The replica.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { what, source }
}

/// Serves the disk that `config` describes until SIGTERM or SIGINT.
///
/// Signals are blocked in the calling thread, which must be the only one so far.
///
/// # Errors
/// If it cannot start, if `--blkverify` finds a difference, or if the replicas cannot be flushed in
/// the end.
pub fn run(config: &Config) -> Result<(), Error> {
    let signals = Signals::block().map_err(system("cannot block signals"))?;
    let replicas = open_all(&config.replicas, config.open_options())?;
    check_alignment(&replicas)?;
    let info = disk_info(config, &replicas);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(64));
    let count = config.queue_count.min(u16::try_from(threads).unwrap_or(1));
    let queue = EventQueue::new().map_err(system("cannot create an eventfd"))?;
    let (stop, stopped) = channel();
    let (released, is_released) = channel();
    let cache_mode = CacheMode::default();
    let slot = |_| ConnectionSlot::new(config.queue_count, config.queue_size, cache_mode.clone());
    let slots = (0..CONNECTIONS_MAX).map(slot);
    let disk = Disk {
        policy: policy(config, &info),
        info: info.clone(),
        shared: Arc::new(Shared::new(
            replicas.len(),
            config.vote_threshold,
            count,
            info.capacity.sectors(),
        )),
        files: replicas
            .iter()
            .map(|replica| RingFile::of(&replica.file))
            .collect(),
        released: released.clone(),
        slots: slots
            .collect::<Result<_, _>>()
            .map_err(|error| Error::Broken(format!("cannot create a queue: {error}")))?,
        statistics: Statistics::new(count, REPLICAS_MAX),
        events: queue,
        stop: stop.clone(),
    };
    let workers =
        Workers::start(&disk, count).map_err(system("cannot start a worker with io_uring"))?;
    let table = Arc::new(ReplicaTable::new(replicas));
    let admin = Admin::start(
        &disk,
        &workers,
        Arc::clone(&table),
        config.open_options(),
        is_released,
    );

    let served = admin
        .map_err(system("cannot start a thread"))
        .and_then(|admin| {
            serve(
                config,
                &disk,
                &workers,
                &Arc::new(admin),
                signals,
                (stop, &stopped),
            )
        });
    let mut unanswered = workers.exit();
    let ended = served.map(|(publisher, reason)| {
        let in_service = disk.shared.in_service();
        let flushed = flush(&table, in_service, config.read_only, &mut unanswered);
        publisher.stop();
        (reason, flushed)
    });
    // Of those that have not answered the kernel still has operations, and a write among them must
    // not land on what another program has done with the image since: their locks are not given
    // back here.
    for replica in table.close_all(unanswered) {
        warn!(
            replica = replica.node_name;
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

/// Creates the sockets and serves connections until there is a reason to stop. Returns with every
/// ring drained. The second half of [`run`], so that its errors end the workers.
fn serve(
    config: &Config,
    disk: &Disk,
    workers: &Workers,
    admin: &Arc<Admin>,
    signals: Signals,
    (stop, stopped): (Sender<Stop>, &Receiver<Stop>),
) -> Result<(Publisher, Stop), Error> {
    let events = config.events.as_ref().map(open_listener).transpose()?;
    let qmp = config.qmp.as_ref().map(open_listener).transpose()?;
    let metrics = config.metrics.map(listen_for_metrics).transpose()?;
    let listener = FrontendListener::new(open_listener(&config.listen)?)?;
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
    let frontends = disk.slots.iter().enumerate();
    let frontends = frontends.map(|(index, slot)| {
        Frontend::new(
            disk.info.clone(),
            slot.clone(),
            workers.virtqueue_server(index),
        )
    });
    let connections = Connections::start(listener, frontends.collect())
        .map_err(system("cannot start the frontend thread"))?;
    let status = format!(
        "serving {} MiB from {} replicas, vote threshold {}",
        disk.info.capacity.bytes() >> 20,
        config.replicas.len(),
        disk.policy.threshold
    );
    info!(
        size = disk.info.capacity.bytes(),
        replicas = config.replicas.len(),
        "vote-threshold" = disk.policy.threshold;
        "serving the disk"
    );
    service_manager::tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
    // Senders live as long as this function, so there is always a reason.
    let reason = stopped.recv().unwrap_or(Stop::Requested);
    let cause = match &reason {
        Stop::Requested => "requested",
        Stop::ContentsDiffer(_) => "replicas differ",
        Stop::Broken(_) => "worker failed",
    };
    info!(reason = cause; "stopping");
    service_manager::tell(&[NotifyState::Stopping, NotifyState::Status("stopping")]);
    connections.stop();
    Ok((publisher, reason))
}

fn open_listener(listen: &Listen) -> Result<Listener, Error> {
    // SAFETY: what is inherited or passed is for the purpose that it is named for, one descriptor
    // for one purpose, which the configuration sees to; nothing else has taken it, and it is
    // opened once.
    let adopted = |fd| unsafe { adopt_unix_listener(fd) }.map(Listener::Passed);
    match listen {
        Listen::Path(path) => Ok(Listener::Bound(bind_unix_listener(path)?)),
        Listen::Fd(fd) => adopted(*fd).ok_or(Error::NotAListener(*fd)),
        Listen::Passed(socket) => {
            adopted(socket.fd).ok_or_else(|| Error::PassedNoListener(socket.clone()))
        }
    }
}

fn listen_for_metrics(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).map_err(|source| Error::Metrics { address, source })
}

fn check_alignment(replicas: &[ReplicaFile]) -> Result<(), Error> {
    let too_much =
        |replica: &&ReplicaFile| replica.memory_alignment_bytes as usize > BUFFER_ALIGNMENT_BYTES;
    match replicas.iter().find(too_much) {
        Some(replica) => Err(Error::Alignment {
            path: replica.path.clone(),
            alignment_bytes: replica.memory_alignment_bytes,
        }),
        None => Ok(()),
    }
}

fn disk_info(config: &Config, replicas: &[ReplicaFile]) -> DiskInfo {
    let greatest = |bytes: fn(&ReplicaFile) -> u32| replicas.iter().map(bytes).max().unwrap_or(512);
    let block_bytes = greatest(|replica| replica.alignment_bytes);
    DiskInfo {
        capacity: Capacity::new(replicas[0].size_bytes / SECTOR_BYTES),
        block_bytes,
        physical_block_bytes: greatest(|replica| replica.physical_block_bytes).max(block_bytes),
        read_only: config.read_only,
        serial: config.serial.clone(),
        num_queues: config.queue_count,
        segments_max: config.segments_max(),
    }
}

fn policy(config: &Config, info: &DiskInfo) -> Policy {
    Policy {
        threshold: config.vote_threshold,
        read_pattern: match config.read_pattern {
            crate::config::ReadPattern::Quorum => ReadPattern::Quorum,
            crate::config::ReadPattern::Threshold => ReadPattern::Threshold,
            crate::config::ReadPattern::Fifo => ReadPattern::Fifo,
        },
        rewrite_corrupted: config.rewrite_corrupted,
        blkverify: config.blkverify,
        job_sizes: Sizes {
            neighbourhood_sectors: config.scrub_around_bytes / SECTOR_BYTES,
            ..Sizes::default()
        },
        block_sectors: u64::from(info.block_bytes) / SECTOR_BYTES,
        replica_timeout: config.replica_timeout,
    }
}

/// Flushes the replicas in service, all at once; one that has left would keep the daemon from
/// ending. Those that do not answer within [`LAST_FLUSH_LIMIT`] join the `unanswered`, which are
/// not asked at all.
fn flush(
    replicas: &ReplicaTable,
    in_service: ReplicaSet,
    read_only: bool,
    unanswered: &mut ReplicaSet,
) -> Result<(), Error> {
    if read_only {
        return Ok(());
    }
    let mut result = Ok(());
    let replicas = replicas.in_use();
    let mut failed = |index: ReplicaIndex, source: io::Error| {
        let named = replicas.iter().find(|(replica, _)| *replica == index);
        let (path, node_name) = match named {
            Some((_, file)) => (file.path.clone(), file.node_name.as_str()),
            None => Default::default(),
        };
        error!(replica = node_name, error:% = Reason(&source); "the last flush failed");
        result = Err(Error::LastFlush { path, source });
    };
    let (done, is_done) = channel();
    let mut waiting = in_service;
    let asked = in_service.without(*unanswered);
    for (index, replica) in replicas.iter().filter(|(index, _)| asked.contains(*index)) {
        let (index, done) = (*index, done.clone());
        let asked = replica.file.try_clone().and_then(|file| {
            std::thread::Builder::new()
                .name("last-flush".into())
                .spawn(move || done.send((index, file.sync_data())))
        });
        if let Err(error) = asked {
            waiting.remove(index);
            failed(index, error);
        }
    }
    drop(done);
    let deadline = Instant::now() + LAST_FLUSH_LIMIT;
    while let Ok((index, flushed)) =
        is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()))
    {
        waiting.remove(index);
        if let Err(error) = flushed {
            failed(index, error);
        }
    }
    for index in waiting.iter() {
        failed(index, io::ErrorKind::TimedOut.into());
    }
    *unanswered = unanswered.or(waiting);
    result
}
