//! vhost-user messages and descriptors, as a frontend sends them on a socket, against everything
//! that serves them: the connection, worker threads with their io_uring, the engine, and replicas
//! in memory.
//!
//! What must hold: nothing panics; the connection ends when the frontend has closed it, and leaves
//! no descriptor, no memory and no virtqueue behind; the disk works as before.

pub mod format;
pub mod prepared;

use std::fs::File;
use std::io::Write;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use quorum_blk::control::queue::EventQueue;
use quorum_blk::device::connection::{CacheMode, ConnectionSlot};
use quorum_blk::device::frontend::{Frontend, VirtqueueServer};
use quorum_blk::device::{Capacity, DiskInfo};
use quorum_blk::engine::{Policy, ReadPattern, Shared};
use quorum_blk::jobs::Sizes;
use quorum_blk::replica::ring::{Aio, RingFile};
use quorum_blk::statistics::Statistics;
use quorum_blk::worker::{Disk, Stop, Workers};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{Mode, OFlags, SealFlags, fcntl_add_seals, open};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::time::{TimerfdClockId, TimerfdFlags, timerfd_create};
use vhost_user_backend::VringT;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use self::format::{Kind, MEMORY_BYTES, Message, NEGOTIATE, PARTS, START};
use super::device::memory::memory_file;
use super::script::Script;
use super::signals::ignore_sigpipe;

/// Virtqueues of the device.
const QUEUES: u16 = 2;
const QUEUE_SIZE_MAX: u16 = 64;
const REPLICA_BYTES: u64 = 1 << 20;
const SPARSE_BYTES: u64 = 16 << 40;
const REPLICAS: usize = 3;
/// The most that one input sends: all of it must fit into the buffers of the socket.
const MESSAGES_MAX: usize = 64;
const DESCRIPTORS_MAX: usize = 120;

/// The parts that outlive an input: the disk, and descriptors to send.
struct Machine {
    frontend: Arc<Mutex<Frontend>>,
    slot: ConnectionSlot,
    server: Box<dyn VirtqueueServer>,
    _workers: Workers,
    _replicas: Vec<File>,
    _stopped: Receiver<Stop>,
    /// By [`Kind`].
    descriptors: Vec<Option<OwnedFd>>,
    /// The other ends of pipes and sockets.
    _others: Vec<OwnedFd>,
}

fn opened(path: &str, flags: OFlags) -> OwnedFd {
    open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("something that every system has")
}

/// One descriptor of each kind, and the other ends, which must stay open. The connection itself
/// stands in place of the one that nothing is sent for.
fn descriptors() -> (Vec<Option<OwnedFd>>, Vec<OwnedFd>) {
    let event = |count| eventfd(count, EventfdFlags::CLOEXEC).expect("an eventfd");
    let full = File::from(event(0));
    (&full)
        .write_all(&(u64::MAX - 1).to_ne_bytes())
        .expect("room for the greatest count");
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
    let (socket, peer) = UnixStream::pair().expect("a pair of sockets");
    let memory = memory_file(MEMORY_BYTES);
    let read_only = opened(
        &format!("/proc/self/fd/{}", memory.as_raw_fd()),
        OFlags::RDONLY,
    );
    let sealed = memory_file(MEMORY_BYTES);
    fcntl_add_seals(&sealed, SealFlags::WRITE | SealFlags::SHRINK).expect("seals");
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).expect("a timer");
    let (filled, filler) = UnixStream::pair().expect("a pair of sockets");
    let sent = filler.send_with_fds(&[&[0_u8][..]], &[socket.as_raw_fd()]);
    sent.expect("room for a byte");
    let network = TcpListener::bind(("127.0.0.1", 0)).expect("a local port");
    let before = [
        memory.into(),
        memory_file(MEMORY_BYTES).into(),
        event(0),
        full.into(),
        writer,
        reader,
        socket.into(),
        opened("/", OFlags::PATH),
        opened("/dev/zero", OFlags::RDWR),
        opened("/", OFlags::RDONLY | OFlags::DIRECTORY),
        read_only,
        sealed.into(),
        memory_file(0).into(),
        epoll::create(epoll::CreateFlags::CLOEXEC).expect("an epoll"),
        timer,
    ];
    let behind = [
        memory_file(SPARSE_BYTES).into(),
        filled.into(),
        network.into(),
    ];
    let descriptors = before.map(Some).into_iter();
    let descriptors = descriptors.chain([None]).chain(behind.map(Some));
    (descriptors.collect(), vec![peer.into(), filler.into()])
}

impl Machine {
    fn new() -> Self {
        let info = DiskInfo {
            capacity: Capacity::new(REPLICA_BYTES / 512),
            block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: false,
            serial: "quorum 0123".to_owned(),
            num_queues: QUEUES,
            segments_max: 62,
        };
        let replicas: Vec<File> = (0..REPLICAS).map(|_| memory_file(REPLICA_BYTES)).collect();
        let slot = ConnectionSlot::new(QUEUES, QUEUE_SIZE_MAX, CacheMode::default());
        let slot = slot.expect("a size that a queue can have");
        let (stop, stopped) = channel();
        let disk = Disk {
            policy: Policy {
                threshold: 2,
                read_pattern: ReadPattern::Quorum,
                rewrite_corrupted: true,
                repair_limit_sectors: u64::MAX,
                blkverify: false,
                block_sectors: 1,
                // No replica is evicted, however slow the machine is.
                replica_timeout: Duration::from_secs(3600),
                job_sizes: Sizes::default(),
            },
            aio: Aio::IoUring,
            shared: Arc::new(Shared::new(REPLICAS, 2, 1, info.capacity.sectors())),
            slots: vec![slot.clone()],
            events: EventQueue::new().expect("an eventfd"),
            hold: Arc::default(),
            statistics: Statistics::new(1, REPLICAS),
            stop,
            // No replica is ever removed.
            released: channel().0,
            info: info.clone(),
        };
        let files = replicas.iter().map(RingFile::of).collect();
        let workers = Workers::start(&disk, files, 1).expect("a worker with io_uring");
        let frontend = Frontend::new(info, slot.clone(), workers.virtqueue_server(0));
        let (descriptors, others) = descriptors();
        Self {
            frontend: Arc::new(Mutex::new(frontend)),
            slot,
            server: workers.virtqueue_server(0),
            _workers: workers,
            _replicas: replicas,
            _stopped: stopped,
            descriptors,
            _others: others,
        }
    }

    /// Locks the machine, which serves all inputs, one at a time.
    fn lock() -> MutexGuard<'static, Self> {
        static MACHINE: OnceLock<Mutex<Machine>> = OnceLock::new();
        ignore_sigpipe();
        let machine = MACHINE.get_or_init(|| Mutex::new(Self::new()));
        machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts guest memory into its file, followed by zeroes.
    fn set_memory(&self, content: &[u8]) {
        let mut memory = content.to_vec();
        memory.resize(usize::try_from(MEMORY_BYTES).expect("64 KiB"), 0);
        let file = self.descriptors[Kind::Memory as usize].as_ref();
        let file = file.and_then(|file| file.try_clone().ok());
        File::from(file.expect("a descriptor"))
            .write_all_at(&memory, 0)
            .expect("a memory file");
    }

    /// Asserts that nothing of the connection is left.
    fn check(&self, descriptors_before: usize) {
        assert_eq!(
            self.slot.memory.memory().num_regions(),
            0,
            "no memory is mapped"
        );
        for vring in &self.slot.vrings {
            let state = vring.get_ref();
            assert!(
                !state.is_enabled() && state.get_kick().is_none() && state.get_call().is_none()
            );
        }
        assert_eq!(
            open_descriptors(),
            descriptors_before,
            "no descriptor is left open"
        );
        assert!(self.server.flush(), "the disk works");
    }
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// Sends the messages of the input, and checks the device when the connection has ended.
pub fn run(input: &[u8]) {
    let machine = Machine::lock();
    let before = open_descriptors();
    let mut script = Script::new(input);
    let options = script.u8();
    let content_bytes = script.u16().into();
    let content = script.take(content_bytes);
    if content.is_empty() {
        machine.set_memory(&prepared::guest_memory());
    } else {
        machine.set_memory(content);
    }
    let mut prepared = Vec::new();
    if options & NEGOTIATE != 0 {
        prepared.extend(prepared::negotiation());
    }
    if options & START != 0 {
        prepared.extend(prepared::start());
    }
    let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
    ours.set_nonblocking(true).expect("a socket");
    let mut sender = Sender {
        machine: &machine,
        socket: &ours,
        descriptors_left: DESCRIPTORS_MAX,
        in_parts: options & PARTS != 0,
    };
    let mut prepared = Script::new(&prepared);
    while !prepared.is_empty() {
        sender.send(&Message::read(&mut prepared));
    }
    for _ in 0..MESSAGES_MAX {
        if script.is_empty() || !sender.send(&Message::read(&mut script)) {
            break;
        }
    }
    ours.shutdown(std::net::Shutdown::Write).expect("a socket");
    Frontend::serve(&machine.frontend, theirs);
    drop(ours);
    machine.check(before);
}

struct Sender<'a> {
    machine: &'a Machine,
    socket: &'a UnixStream,
    descriptors_left: usize,
    in_parts: bool,
}

impl Sender<'_> {
    /// Returns whether the socket had room for the message.
    fn send(&mut self, message: &Message<'_>) -> bool {
        let descriptors: Vec<RawFd> = message
            .kinds
            .iter()
            .take(self.descriptors_left)
            .map(|kind| {
                let descriptor = &self.machine.descriptors[usize::from(kind % Kind::COUNT)];
                let itself = self.socket.as_raw_fd();
                descriptor.as_ref().map_or(itself, AsRawFd::as_raw_fd)
            })
            .collect();
        self.descriptors_left -= descriptors.len();
        let bytes = message.bytes();
        let first = if self.in_parts { bytes.len() / 2 } else { 0 };
        let (first, bytes) = bytes.split_at(first);
        if bytes.is_empty() {
            return true;
        }
        if self.socket.write(first).ok() != Some(first.len()) {
            return false;
        }
        let sent = self.socket.send_with_fds(&[bytes], &descriptors);
        sent.is_ok_and(|sent| sent == bytes.len())
    }
}
