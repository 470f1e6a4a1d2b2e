//! The daemon: builds the parts in the order in which they can fail, runs until it is told to stop, and shuts
//! them down in the opposite order.
//!
//! Invariants: everything that can be refused is refused before a socket exists; when it ends, every request
//! taken was answered and the replicas were flushed, or the time for that is over and the exit status says so; an
//! image that the kernel may still write to stays locked until it has.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use log::{debug, error, info, warn};

use crate::config::{Config, Listen};
use crate::control::events::Names;
use crate::control::publisher::Publisher;
use crate::control::queue::EventQueue;
use crate::control::socket::{BindError, BoundListener, bind_unix_listener};
use crate::device::DiskInfo;
use crate::device::frontend::{CacheMode, ConnectionSlot, Frontend};
use crate::engine::{Policy, ReadPattern, Shared};
use crate::limits::{CONNECTIONS_MAX, LAST_FLUSH_LIMIT};
use crate::message::{Quoted, Reason};
use crate::quorum::{ReplicaIndex, ReplicaSet, SECTOR_BYTES};
use crate::replica::buffer::BUFFER_ALIGNMENT_BYTES;
use crate::replica::file::{OpenError, ReplicaFile, open_all};
use crate::worker::{Disk, Stop, Workers};

/// Why the daemon could not start, or ended otherwise than asked. Each is one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A replica cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A socket cannot be made.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// `--fd` names something else than a listening socket.
    #[error("--fd {0}: not a listening UNIX socket")]
    NotAListener(RawFd),
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
/// If it cannot start, if `--blkverify` finds a difference, or if the replicas cannot be flushed in the end.
pub fn run(config: &Config) -> Result<(), Error> {
    let signals = Signals::block().map_err(system("cannot block signals"))?;
    let replicas = open_all(&config.replicas, config.open_options())?;
    check_alignment(&replicas)?;
    let info = disk_info(config, &replicas);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(64));
    let count = config.queue_count.min(u16::try_from(threads).unwrap_or(1));
    let queue = EventQueue::new().map_err(system("cannot create an eventfd"))?;
    let (stop, stopped) = channel();
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
            info.capacity_sectors,
        )),
        files: replicas.iter().map(|replica| replica.file.as_raw_fd()).collect(),
        slots: slots
            .collect::<Result<_, _>>()
            .map_err(|error| Error::Broken(format!("cannot create a queue: {error}")))?,
        events: Arc::clone(&queue),
        stop: stop.clone(),
    };
    let workers = Workers::start(&disk, count).map_err(system("cannot start a worker with io_uring"))?;

    let served = serve(config, &disk, &workers, queue, signals, stop, &stopped);
    let mut unanswered = workers.exit();
    let counters = &disk.shared.counters;
    debug!("{counters:?}");
    let ended = served.map(|(publisher, reason)| {
        let in_service = disk.shared.in_service();
        let flushed = flush(&replicas, in_service, config.read_only, &mut unanswered);
        publisher.stop();
        (reason, flushed)
    });
    close(replicas, unanswered);
    match ended? {
        (Stop::Requested, flushed) => flushed,
        (Stop::ContentsDiffer(range), _) => Err(Error::ContentsDiffer(range.start)),
        (Stop::Broken(why), _) => Err(Error::Broken(why)),
    }
}

/// Creates the sockets and serves connections until there is a reason to stop. Returns with every ring
/// drained. The second half of [`run`], so that its errors end the workers.
fn serve(
    config: &Config,
    disk: &Disk,
    workers: &Workers,
    queue: Arc<EventQueue>,
    signals: Signals,
    stop: Sender<Stop>,
    stopped: &Receiver<Stop>,
) -> Result<(Publisher, Stop), Error> {
    let events = config.events.as_deref().map(bind_unix_listener).transpose()?;
    let listener = Arc::new(FrontendListener::new(&config.listen)?);
    let names = Names {
        reference: config.node_name.clone(),
        nodes: config
            .replicas
            .iter()
            .map(|replica| replica.node_name.clone())
            .collect(),
    };
    let publisher =
        Publisher::spawn(events, queue, names).map_err(system("cannot start the event publisher"))?;
    signals
        .forward_to(stop)
        .map_err(system("cannot start the signal thread"))?;
    let frontends = disk.slots.iter().enumerate();
    let frontends = frontends
        .map(|(index, slot)| Frontend::new(disk.info.clone(), slot.clone(), workers.ring_server(index)));
    let connections = Connections::start(listener, frontends.collect())
        .map_err(system("cannot start the frontend thread"))?;
    info!(
        "serving {} MiB from {} replicas, vote threshold {}",
        (disk.info.capacity_sectors * SECTOR_BYTES) >> 20,
        disk.policy.replicas,
        disk.policy.threshold
    );
    // Senders live as long as this function, so there is always a reason.
    let reason = stopped.recv().unwrap_or(Stop::Requested);
    info!("stopping: {reason:?}");
    connections.stop();
    Ok((publisher, reason))
}

fn check_alignment(replicas: &[ReplicaFile]) -> Result<(), Error> {
    let too_much = |replica: &&ReplicaFile| replica.memory_alignment_bytes as usize > BUFFER_ALIGNMENT_BYTES;
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
        capacity_sectors: replicas[0].size_bytes / SECTOR_BYTES,
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
        replicas: config.replicas.len(),
        threshold: config.vote_threshold,
        read_pattern: match config.read_pattern {
            crate::config::ReadPattern::Quorum => ReadPattern::Quorum,
            crate::config::ReadPattern::Threshold => ReadPattern::Threshold,
            crate::config::ReadPattern::Fifo => ReadPattern::Fifo,
        },
        rewrite_corrupted: config.rewrite_corrupted,
        blkverify: config.blkverify,
        block_sectors: u64::from(info.block_bytes) / SECTOR_BYTES,
        replica_timeout: config.replica_timeout,
    }
}

/// Flushes the replicas in service, all at once; one that has left would keep the daemon from ending. Those that
/// do not answer within [`LAST_FLUSH_LIMIT`] join the `unanswered`, which are not asked at all.
fn flush(
    replicas: &[ReplicaFile],
    in_service: ReplicaSet,
    read_only: bool,
    unanswered: &mut ReplicaSet,
) -> Result<(), Error> {
    if read_only {
        return Ok(());
    }
    let mut result = Ok(());
    let mut failed = |index: ReplicaIndex, source: io::Error| {
        let path = replicas[index.as_usize()].path.clone();
        error!("{}: the last flush failed: {source}", Quoted(&path));
        result = Err(Error::LastFlush { path, source });
    };
    let (done, is_done) = channel();
    let mut waiting = in_service;
    for index in in_service.without(*unanswered).iter() {
        let done = done.clone();
        let asked = replicas[index.as_usize()].file.try_clone().and_then(|file| {
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
    while let Ok((index, flushed)) = is_done.recv_timeout(deadline.saturating_duration_since(Instant::now()))
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

/// Closes the images. Of those in `unanswered` the kernel still has operations, and a write among them must not
/// land on what another program has done with the image since: their locks are not given back here, but go with
/// the last of the operations.
fn close(replicas: Vec<ReplicaFile>, unanswered: ReplicaSet) {
    for (index, replica) in (0..).map(ReplicaIndex).zip(replicas) {
        if unanswered.contains(index) {
            warn!(
                "{} does not answer; it stays locked until the kernel has ended what is in flight there",
                Quoted(&replica.path)
            );
            std::mem::forget(replica);
        }
    }
}

/// Where frontends connect.
enum FrontendListener {
    Bound(BoundListener),
    Inherited(UnixListener),
}

impl FrontendListener {
    fn new(listen: &Listen) -> Result<Self, Error> {
        match listen {
            Listen::Path(path) => Ok(Self::Bound(bind_unix_listener(path)?)),
            Listen::Fd(fd) => inherited(*fd)
                .map(Self::Inherited)
                .ok_or(Error::NotAListener(*fd)),
        }
    }

    fn socket(&self) -> &UnixListener {
        match self {
            Self::Bound(bound) => bound.socket(),
            Self::Inherited(socket) => socket,
        }
    }

    /// Makes a blocked and every later `accept` fail.
    fn close(&self) {
        // SAFETY: a system call on a descriptor that we own; it touches no memory.
        unsafe { libc::shutdown(self.socket().as_raw_fd(), libc::SHUT_RDWR) };
    }
}

/// The listening UNIX socket that was passed as descriptor `fd`, if it is one.
fn inherited(fd: RawFd) -> Option<UnixListener> {
    if fd <= libc::STDERR_FILENO {
        return None;
    }
    let option = |name| {
        let mut value: libc::c_int = 0;
        let mut len = libc::socklen_t::try_from(size_of_val(&value)).expect("4 bytes");
        // SAFETY: `value` and `len` are valid for the write of an int option.
        let result =
            unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &raw mut len) };
        (result == 0).then_some(value)
    };
    if option(libc::SO_DOMAIN) != Some(libc::AF_UNIX) || option(libc::SO_ACCEPTCONN) != Some(1) {
        return None;
    }
    // SAFETY: the descriptor is open (the calls above succeeded) and was passed for us to own.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    Some(owned.into())
}

/// The thread that accepts connections, and those that serve one each.
struct Connections {
    listener: Arc<FrontendListener>,
    slots: Arc<Slots>,
    thread: JoinHandle<()>,
}

/// Who is connected.
struct Slots {
    frontends: Vec<Arc<Mutex<Frontend>>>,
    current: Mutex<Current>,
    /// A slot has become free.
    freed: Condvar,
}

struct Current {
    /// The connections, by slot, to be able to end them.
    connections: Vec<Option<UnixStream>>,
    /// Nothing is to be served any more.
    stopping: bool,
}

impl Slots {
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns when all connections that were closed by their frontends have been drained. Who connects
    /// after that, a guest that was started again for one, must not see writes of before take effect.
    fn wait_for_the_closed(&self) {
        let any_closed = |current: &mut Current| current.connections.iter().flatten().any(is_closed);
        let waited = self.freed.wait_while(self.current(), any_closed);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Gives a free slot to a connection, if there is one.
    fn take(&self, connection: &UnixStream) -> io::Result<Option<usize>> {
        let mut current = self.current();
        // A frontend whose thread has panicked is of no use any more.
        let is_free =
            |slot: &usize| current.connections[*slot].is_none() && !self.frontends[*slot].is_poisoned();
        let free = (0..self.frontends.len()).find(is_free);
        if let Some(slot) = free {
            current.connections[slot] = Some(connection.try_clone()?);
            if current.stopping {
                end(connection);
            }
        }
        Ok(free)
    }

    fn free(&self, slot: usize) {
        self.current().connections[slot] = None;
        self.freed.notify_all();
    }

    fn end_all(&self) {
        self.current().stopping = true;
        let is_connected = |slot: &usize| self.current().connections[*slot].is_some();
        for slot in (0..self.frontends.len()).filter(is_connected) {
            let frontend = self.frontends[slot].lock();
            frontend.unwrap_or_else(PoisonError::into_inner).stop_rings();
        }
        self.current().connections.iter().flatten().for_each(end);
    }

    /// Serves the connection that has the slot until it ends.
    fn serve(&self, slot: usize, connection: UnixStream) {
        /// Frees the slot whatever happens, since others may be waiting for that.
        struct Free<'a>(&'a Slots, usize);
        impl Drop for Free<'_> {
            fn drop(&mut self) {
                self.0.free(self.1);
            }
        }
        let _free = Free(self, slot);
        Frontend::serve(&self.frontends[slot], connection);
    }
}

fn end(connection: &UnixStream) {
    // Fails only for one that has ended.
    let _ = connection.shutdown(std::net::Shutdown::Both);
}

/// Whether the frontend has closed its end, whatever it has sent before.
fn is_closed(connection: &UnixStream) -> bool {
    let mut poll = libc::pollfd {
        fd: connection.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one initialised pollfd, valid for the call, which does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

impl Connections {
    fn start(listener: Arc<FrontendListener>, frontends: Vec<Frontend>) -> io::Result<Self> {
        let slots = Arc::new(Slots {
            current: Mutex::new(Current {
                connections: frontends.iter().map(|_| None).collect(),
                stopping: false,
            }),
            frontends: frontends
                .into_iter()
                .map(|frontend| Arc::new(Mutex::new(frontend)))
                .collect(),
            freed: Condvar::new(),
        });
        let thread = {
            let (listener, slots) = (Arc::clone(&listener), Arc::clone(&slots));
            std::thread::Builder::new()
                .name("frontend".into())
                .spawn(move || accept_all(&listener, &slots))?
        };
        Ok(Self {
            listener,
            slots,
            thread,
        })
    }

    /// Ends all connections and returns when their rings are drained.
    fn stop(self) {
        self.slots.end_all();
        self.listener.close();
        if self.thread.join().is_err() {
            error!("a frontend thread panicked");
        }
    }
}

/// Accepts connections until the listener is closed, and returns when those accepted have ended.
fn accept_all(listener: &FrontendListener, slots: &Slots) {
    std::thread::scope(|scope| {
        loop {
            let accepted = listener.socket().accept();
            if slots.current().stopping {
                return;
            }
            let connection = match accepted {
                Ok((connection, _)) => connection,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    // For want of descriptors or memory; that may pass, and the disk must not go for it.
                    warn!("cannot accept a connection: {error}");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    continue;
                }
            };
            slots.wait_for_the_closed();
            let slot = match slots.take(&connection) {
                Ok(Some(slot)) => slot,
                Ok(None) => {
                    warn!("a frontend is turned away: {CONNECTIONS_MAX} are connected");
                    continue;
                }
                Err(error) => {
                    warn!("cannot serve a connection: {error}");
                    continue;
                }
            };
            let thread = std::thread::Builder::new().name(format!("frontend-{slot}"));
            let serving = thread.spawn_scoped(scope, move || slots.serve(slot, connection));
            if let Err(error) = serving {
                slots.free(slot);
                warn!("cannot serve a connection: {error}");
            }
        }
    });
}

/// SIGTERM and SIGINT, taken from the threads and given to one that waits for them.
struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks them in this thread and those it will start.
    fn block() -> io::Result<Self> {
        // SAFETY: `sigset_t` is plain data that `sigemptyset` initialises; the pointers are to locals.
        let (set, result) = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            let result = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            (set, result)
        };
        if result == 0 {
            Ok(Self(set))
        } else {
            Err(io::Error::from_raw_os_error(result))
        }
    }

    /// Starts the thread that turns a signal into [`Stop::Requested`]. The second one ends the process at
    /// once: who sends it does not want to wait.
    fn forward_to(self, stop: Sender<Stop>) -> io::Result<()> {
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for first in [true, false] {
                    let mut signal = 0;
                    // SAFETY: the set is initialised and `signal` is valid for the write.
                    while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
                    if !first {
                        error!("signal {signal} again: ending at once");
                        std::process::exit(128 + signal);
                    }
                    let _ = stop.send(Stop::Requested);
                }
            })?;
        Ok(())
    }
}
