//! A worker thread: its rings, its engine and its io_uring, and the loop that moves requests between them.
//!
//! One turn of the loop takes what the rings hold, hands everything that comes of it to the kernel with one
//! system call, feeds what has completed to the engine, and signals each ring at most once. The thread
//! sleeps in that same system call, where kicks and messages wake it too.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use log::{debug, error};
use vhost_user_backend::VringT;
use vm_memory::GuestMemoryAtomic;
use vmm_sys_util::eventfd::EventFd;

use crate::control::queue::EventQueue;
use crate::device::frontend::{DriverChoices, RingServer};
use crate::device::guest::Guest;
use crate::device::{DiskInfo, GuestMemory, Vring};
use crate::engine::{Effects, Engine, Failed, GuestRequest, Policy, Shared, Tag, WorkerIndex};
use crate::quorum::SectorRange;
use crate::quorum::report::Report;
use crate::replica::buffer::BufferPool;
use crate::replica::operation::{Operation, RequestId};
use crate::replica::ring::{Completion, Ring, Wait, Watch, WatchToken};

/// The mailbox's watch; rings have their index.
const MAILBOX: WatchToken = WatchToken(u32::MAX);

/// The tag of a flush that no guest asked for. Those of guests have chains behind them, which are fewer.
const OWN_FLUSH: Tag = Tag(u64::MAX);

/// Why the daemon must stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Somebody asked for it.
    Requested,
    /// `--blkverify` found a difference.
    ContentsDiffer(SectorRange),
    /// A worker cannot go on.
    Broken(String),
}

/// What all workers of a disk are made from.
#[derive(Clone)]
pub struct Disk {
    /// What the disk is to the guest.
    pub info: DiskInfo,
    /// How it decides.
    pub policy: Policy,
    /// What the engines share.
    pub shared: Arc<Shared>,
    /// The open replicas, in order. They stay open as long as any worker runs.
    pub files: Vec<RawFd>,
    /// Guest memory.
    pub memory: GuestMemoryAtomic<GuestMemory>,
    /// What the driver has chosen.
    pub choices: Arc<DriverChoices>,
    /// Where reports go.
    pub events: Arc<EventQueue>,
    /// Where to tell that the daemon must stop.
    pub stop: std::sync::mpsc::Sender<Stop>,
}

enum Message {
    /// Look at the state of this ring; drop the sender when it is served accordingly.
    Refresh { ring: usize, done: SyncSender<()> },
    /// A range lock was granted.
    Granted(RequestId),
    /// Flush the replicas, and tell whether that went well.
    Flush { done: SyncSender<bool> },
    /// Look at the replicas' health.
    Tick,
    /// End when everything in flight is done.
    Exit,
}

#[derive(Debug)]
struct Mailbox {
    messages: Mutex<VecDeque<Message>>,
    event: EventFd,
}

impl Mailbox {
    fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            messages: Mutex::default(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        }))
    }

    fn send(&self, message: Message) {
        self.messages
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(message);
        // The counter cannot overflow: each write adds one.
        let _ = self.event.write(1);
    }

    fn take(&self) -> VecDeque<Message> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Refresh { .. } => "Refresh",
            Self::Granted(_) => "Granted",
            Self::Flush { .. } => "Flush",
            Self::Tick => "Tick",
            Self::Exit => "Exit",
        })
    }
}

/// The running worker threads of a disk. Queue `i` is served by worker `i mod count`.
#[derive(Debug)]
pub struct Workers {
    mailboxes: Vec<Arc<Mailbox>>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` workers for `vrings`.
    ///
    /// # Errors
    /// If a thread or its io_uring cannot be made; then none is left running.
    pub fn start(disk: &Disk, vrings: &[Vring], count: u16) -> io::Result<Self> {
        let count = count.max(1);
        let mailboxes = (0..count)
            .map(|_| Mailbox::new())
            .collect::<io::Result<Vec<_>>>()?;
        let mut workers = Self {
            mailboxes,
            threads: Vec::new(),
        };
        for index in 0..count {
            let disk = disk.clone();
            let mailboxes = workers.mailboxes.clone();
            let own: Vec<Vring> = vrings
                .iter()
                .skip(usize::from(index))
                .step_by(usize::from(count))
                .cloned()
                .collect();
            // The ring is made in the thread that uses it: the kernel can then do without locks.
            let (ready, is_ready) = sync_channel(1);
            let thread = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    let stop = disk.stop.clone();
                    let made = Worker::new(WorkerIndex(index), disk, own, mailboxes);
                    let (outcome, worker) = match made {
                        Ok(worker) => (Ok(()), Some(worker)),
                        Err(error) => (Err(error), None),
                    };
                    let _ = ready.send(outcome);
                    if let Some(Err(error)) = worker.map(Worker::run) {
                        error!("the io_uring of worker {index} failed: {error}");
                        let _ = stop.send(Stop::Broken(format!("io_uring: {error}")));
                    }
                })?;
            workers.threads.push(thread);
            let outcome = is_ready
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("the worker ended")));
            if let Err(error) = outcome {
                workers.exit();
                return Err(error);
            }
        }
        Ok(workers)
    }

    /// A handle for the frontend to have rings served.
    pub fn ring_server(&self) -> Box<dyn RingServer> {
        Box::new(Handle(self.mailboxes.clone()))
    }

    /// Lets the workers finish what is in flight and ends them.
    pub fn exit(self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Exit);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                error!("a worker panicked");
            }
        }
    }
}

struct Handle(Vec<Arc<Mailbox>>);

impl RingServer for Handle {
    fn refresh(&self, queue: u16) {
        let (done, is_done) = sync_channel(0);
        let queue = usize::from(queue);
        let (worker, ring) = (queue % self.0.len(), queue / self.0.len());
        self.0[worker].send(Message::Refresh { ring, done });
        // The worker drops its end; nothing is ever sent.
        let _ = is_done.recv();
    }

    fn flush(&self) -> bool {
        let (done, is_done) = sync_channel(1);
        self.0[0].send(Message::Flush { done });
        is_done.recv().unwrap_or(false)
    }
}

struct Worker {
    engine: Engine,
    io: Io,
    mailbox: Arc<Mailbox>,
    choices: Arc<DriverChoices>,
    vrings: Vec<Vring>,
    kicks: Vec<Option<Watch>>,
    /// Rings that were stopped and are not drained yet, and who waits for that.
    draining: Vec<(usize, SyncSender<()>)>,
    exiting: bool,
    started_at: Instant,
}

/// Everything that the engine has an effect on.
struct Io {
    ring: Ring,
    guest: Guest,
    mailboxes: Vec<Arc<Mailbox>>,
    events: Arc<EventQueue>,
    /// Who waits for a flush of ours; they are answered in order.
    flushing: VecDeque<SyncSender<bool>>,
    stop: std::sync::mpsc::Sender<Stop>,
    /// The first failure of the ring; found by the loop.
    failure: Option<io::Error>,
}

impl Effects for Io {
    fn submit(&mut self, operation: Operation) {
        if let Err(error) = self.ring.push(operation) {
            self.failure.get_or_insert(error);
        }
    }

    fn complete(&mut self, tag: Tag, result: Result<&[u8], Failed>) {
        if tag == OWN_FLUSH {
            if let Some(done) = self.flushing.pop_front() {
                // Who asked may have given up.
                let _ = done.send(result.is_ok());
            }
            return;
        }
        self.guest.answered(tag, result);
    }

    fn report(&mut self, report: Report) {
        self.events.push(report);
    }

    fn wake(&mut self, worker: WorkerIndex, request: RequestId) {
        self.mailboxes[usize::from(worker.0)].send(Message::Granted(request));
    }

    fn health_changed(&mut self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Tick);
        }
    }

    fn contents_differ(&mut self, range: SectorRange) {
        // Nobody listens only when the daemon stops already.
        let _ = self.stop.send(Stop::ContentsDiffer(range));
    }
}

impl Worker {
    fn new(
        index: WorkerIndex,
        disk: Disk,
        vrings: Vec<Vring>,
        mailboxes: Vec<Arc<Mailbox>>,
    ) -> io::Result<Self> {
        let pool = BufferPool::default();
        let mut ring = Ring::new(&disk.files)?;
        let mailbox = Arc::clone(&mailboxes[usize::from(index.0)]);
        // Watched as long as the ring lives.
        ring.watch(&mailbox.event, MAILBOX)?;
        Ok(Self {
            engine: Engine::new(index, disk.policy, disk.shared, pool.clone()),
            io: Io {
                ring,
                guest: Guest::new(disk.info, disk.memory, vrings.clone(), pool),
                mailboxes,
                events: disk.events,
                flushing: VecDeque::new(),
                stop: disk.stop,
                failure: None,
            },
            mailbox,
            choices: disk.choices,
            kicks: vrings.iter().map(|_| None).collect(),
            vrings,
            draining: Vec::new(),
            exiting: false,
            started_at: Instant::now(),
        })
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            let worked = self.take_requests();
            self.io.guest.signal();
            self.finish_draining();
            if self.exiting && self.engine.is_idle() {
                debug!("the worker ends, nothing is in flight");
                return Ok(());
            }
            // Asking for kicks is the last thing before sleeping: whatever comes later wakes us.
            let blocked = !self.engine.has_room();
            let idle = !worked && (blocked || !self.io.guest.ask_for_kicks());
            self.turn(if idle { self.wait() } else { Wait::No })?;
        }
    }

    /// How long there is nothing to do but wait.
    fn wait(&self) -> Wait {
        match self.engine.deadline() {
            Some(deadline) => Wait::AtMost(deadline.saturating_sub(self.started_at.elapsed())),
            None => Wait::Forever,
        }
    }

    /// Moves requests from the rings to the engine, as many as it has room for.
    fn take_requests(&mut self) -> bool {
        let mut worked = false;
        while self.engine.has_room() {
            let Some((tag, request)) = self.io.guest.next_request() else {
                break;
            };
            self.engine.submit(tag, request, &mut self.io);
            worked = true;
        }
        worked
    }

    /// One system call, and what came of it.
    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        if let Some(error) = self.io.failure.take() {
            return Err(error);
        }
        let mut completions = std::mem::take(self.io.ring.enter(wait)?);
        let now = self.started_at.elapsed();
        self.engine.set_time(now);
        let mut mail = false;
        for completion in completions.drain(..) {
            match completion {
                Completion::Reply(reply) => self.engine.reply(reply, &mut self.io),
                Completion::Readable(MAILBOX) => mail = true,
                // The ring is looked at in any case.
                Completion::Readable(_) => {}
            }
        }
        self.io.ring.recycle(completions);
        if self.engine.deadline().is_some_and(|deadline| deadline <= now) {
            self.engine.tick(now, &mut self.io);
        }
        if mail {
            for message in self.mailbox.take() {
                self.handle(message)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Granted(request) => self.engine.granted(request, &mut self.io),
            Message::Flush { done } => {
                self.io.flushing.push_back(done);
                self.engine.submit(OWN_FLUSH, GuestRequest::Flush, &mut self.io);
            }
            Message::Tick => self.engine.tick(self.started_at.elapsed(), &mut self.io),
            Message::Exit => {
                self.engine.stop_background();
                self.exiting = true;
            }
            Message::Refresh { ring, done } => {
                if let Some(watch) = self.kicks[ring].take() {
                    self.io.ring.unwatch(&watch)?;
                }
                if self.io.guest.refresh(ring, self.choices.durable_writes()) {
                    let state = self.vrings[ring].get_ref();
                    if let Some(kick) = state.get_kick() {
                        let token = WatchToken(u32::try_from(ring).expect("at most QUEUES_MAX"));
                        self.kicks[ring] = Some(self.io.ring.watch(kick, token)?);
                    }
                } else {
                    self.draining.push((ring, done));
                }
            }
        }
        Ok(())
    }

    /// Tells those who stopped a ring when nothing of it is in flight any more.
    fn finish_draining(&mut self) {
        let guest = &self.io.guest;
        self.draining.retain(|(ring, _done)| !guest.is_drained(*ring));
    }
}
