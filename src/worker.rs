//! A worker thread: its rings, its engine and its io_uring, and the loop that moves requests between them.
//!
//! It has its share of the rings of each connection; connections that nobody uses are not looked at.
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
use vmm_sys_util::eventfd::EventFd;

use crate::control::queue::EventQueue;
use crate::device::DiskInfo;
use crate::device::frontend::{ConnectionSlot, RingServer};
use crate::device::guest::Guest;
use crate::engine::{Effects, Engine, Failed, GuestRequest, Policy, Shared, Tag, WorkerIndex};
use crate::quorum::SectorRange;
use crate::quorum::report::Report;
use crate::replica::buffer::BufferPool;
use crate::replica::operation::{Operation, RequestId};
use crate::replica::ring::{Completion, Ring, Wait, Watch, WatchToken};

/// The watch of the mailbox, and those of all kicks: every ring is looked at in any case.
const MAILBOX: WatchToken = WatchToken(0);
const KICK: WatchToken = WatchToken(1);

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
    /// Room for connections.
    pub slots: Vec<ConnectionSlot>,
    /// Where reports go.
    pub events: Arc<EventQueue>,
    /// Where to tell that the daemon must stop.
    pub stop: std::sync::mpsc::Sender<Stop>,
}

enum Message {
    /// Look at the state of this ring; drop the sender when it is served accordingly.
    Refresh {
        slot: usize,
        ring: usize,
        done: SyncSender<()>,
    },
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
    /// Starts `count` workers.
    ///
    /// # Errors
    /// If a thread or its io_uring cannot be made; then none is left running.
    pub fn start(disk: &Disk, count: u16) -> io::Result<Self> {
        let count = count.max(1);
        let mailboxes = (0..count)
            .map(|_| Mailbox::new())
            .collect::<io::Result<Vec<_>>>()?;
        let mut workers = Self {
            mailboxes,
            threads: Vec::new(),
        };
        for index in 0..count {
            let mut disk = disk.clone();
            let mailboxes = workers.mailboxes.clone();
            for slot in &mut disk.slots {
                let own = slot.vrings.drain(..).skip(usize::from(index));
                slot.vrings = own.step_by(usize::from(count)).collect();
            }
            // The ring is made in the thread that uses it: the kernel can then do without locks.
            let (ready, is_ready) = sync_channel(1);
            let thread = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    let stop = disk.stop.clone();
                    let made = Worker::new(WorkerIndex(index), disk, mailboxes);
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

    /// A handle for the frontend on a connection slot to have its rings served.
    pub fn ring_server(&self, slot: usize) -> Box<dyn RingServer> {
        let mailboxes = self.mailboxes.clone();
        Box::new(Handle { mailboxes, slot })
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

struct Handle {
    mailboxes: Vec<Arc<Mailbox>>,
    slot: usize,
}

impl RingServer for Handle {
    fn refresh(&self, queue: u16) {
        let (done, is_done) = sync_channel(0);
        let queue = usize::from(queue);
        let count = self.mailboxes.len();
        let (slot, ring) = (self.slot, queue / count);
        self.mailboxes[queue % count].send(Message::Refresh { slot, ring, done });
        // The worker drops its end; nothing is ever sent.
        let _ = is_done.recv();
    }

    fn flush(&self) -> bool {
        let (done, is_done) = sync_channel(1);
        self.mailboxes[0].send(Message::Flush { done });
        is_done.recv().unwrap_or(false)
    }
}

struct Worker {
    engine: Engine,
    io: Io,
    mailbox: Arc<Mailbox>,
    /// With this worker's rings only.
    slots: Vec<ConnectionSlot>,
    /// By slot and ring.
    kicks: Vec<Vec<Option<Watch>>>,
    /// Rings that were stopped and are not drained yet, by slot, and who waits for that.
    draining: Vec<(usize, usize, SyncSender<()>)>,
    exiting: bool,
    started_at: Instant,
}

/// Everything that the engine has an effect on.
struct Io {
    ring: Ring,
    guests: Guests,
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
        self.guests.answered(tag, result);
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
    fn new(index: WorkerIndex, disk: Disk, mailboxes: Vec<Arc<Mailbox>>) -> io::Result<Self> {
        let pool = BufferPool::default();
        let mut ring = Ring::new(&disk.files)?;
        let mailbox = Arc::clone(&mailboxes[usize::from(index.0)]);
        // Watched as long as the ring lives.
        ring.watch(&mailbox.event, MAILBOX)?;
        let guests = disk.slots.iter().map(|slot| {
            let (info, pool) = (disk.info.clone(), pool.clone());
            Guest::new(info, slot.memory.clone(), slot.vrings.clone(), pool)
        });
        let kicks = disk.slots.iter();
        let kicks = kicks.map(|slot| slot.vrings.iter().map(|_| None).collect());
        Ok(Self {
            engine: Engine::new(index, disk.policy, disk.shared, pool.clone()),
            kicks: kicks.collect(),
            io: Io {
                ring,
                guests: Guests::new(guests.collect()),
                mailboxes,
                events: disk.events,
                flushing: VecDeque::new(),
                stop: disk.stop,
                failure: None,
            },
            mailbox,
            slots: disk.slots,
            draining: Vec::new(),
            exiting: false,
            started_at: Instant::now(),
        })
    }

    fn run(mut self) -> io::Result<()> {
        loop {
            let worked = self.take_requests();
            self.io.guests.signal();
            self.finish_draining();
            if self.exiting && self.engine.is_idle() {
                debug!("the worker ends, nothing is in flight");
                return Ok(());
            }
            // Asking for kicks is the last thing before sleeping: whatever comes later wakes us.
            let blocked = !self.engine.has_room();
            let idle = !worked && (blocked || !self.io.guests.ask_for_kicks());
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
            let Some((tag, request)) = self.io.guests.next_request() else {
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
            Message::Refresh { slot, ring, done } => {
                let watched = &mut self.kicks[slot][ring];
                if let Some(watch) = watched.take() {
                    self.io.ring.unwatch(&watch)?;
                }
                let ConnectionSlot { choices, vrings, .. } = &self.slots[slot];
                if self.io.guests.refresh(slot, ring, choices.durable_writes()) {
                    let state = vrings[ring].get_ref();
                    if let Some(kick) = state.get_kick() {
                        *watched = Some(self.io.ring.watch(kick, KICK)?);
                    }
                } else {
                    self.draining.push((slot, ring, done));
                }
            }
        }
        Ok(())
    }

    /// Tells those who stopped a ring when nothing of it is in flight any more.
    fn finish_draining(&mut self) {
        if self.draining.is_empty() {
            return;
        }
        let guests = &mut self.io.guests;
        self.draining
            .retain(|(slot, ring, _done)| !guests.is_drained(*slot, *ring));
        guests.forget_idle();
    }
}

/// The guests of all connections, as one worker sees them.
struct Guests {
    /// By connection slot.
    guests: Vec<Guest>,
    /// The slots in which there may be something to do.
    in_use: Vec<usize>,
    /// Where in `in_use` to look for the next request, so that no guest starves another.
    next: usize,
}

/// Where the slot is in a [`Tag`], above what [`Guest`] has in it.
const SLOT_SHIFT: u32 = 56;

impl Guests {
    fn new(guests: Vec<Guest>) -> Self {
        Self {
            guests,
            in_use: Vec::new(),
            next: 0,
        }
    }

    /// See [`Guest::refresh`].
    fn refresh(&mut self, slot: usize, ring: usize, durable_writes: bool) -> bool {
        if !self.in_use.contains(&slot) {
            self.in_use.push(slot);
        }
        self.guests[slot].refresh(ring, durable_writes)
    }

    /// Does not look any more at guests with which there is nothing to do.
    fn forget_idle(&mut self) {
        self.in_use.retain(|slot| !self.guests[*slot].is_idle());
    }

    fn is_drained(&self, slot: usize, ring: usize) -> bool {
        self.guests[slot].is_drained(ring)
    }

    /// The next piece of work, of one guest after the other.
    fn next_request(&mut self) -> Option<(Tag, GuestRequest)> {
        for step in 0..self.in_use.len() {
            let index = (self.next + step) % self.in_use.len();
            let slot = self.in_use[index];
            if let Some((Tag(tag), request)) = self.guests[slot].next_request() {
                debug_assert_eq!(tag >> SLOT_SHIFT, 0);
                self.next = index + 1;
                return Some((Tag(tag | (slot as u64) << SLOT_SHIFT), request));
            }
        }
        None
    }

    fn answered(&mut self, Tag(tag): Tag, result: Result<&[u8], Failed>) {
        let slot = usize::try_from(tag >> SLOT_SHIFT).expect("it was one");
        self.guests[slot].answered(Tag(tag & ((1 << SLOT_SHIFT) - 1)), result);
    }

    fn signal(&mut self) {
        for &slot in &self.in_use {
            self.guests[slot].signal();
        }
    }

    fn ask_for_kicks(&mut self) -> bool {
        let mut more = false;
        for &slot in &self.in_use {
            more |= self.guests[slot].ask_for_kicks();
        }
        more
    }
}
