//! A worker thread: its rings, its engine and its io_uring, and the loop that moves requests
//! between them.
//!
//! It has its share of the rings of each connection; connections that nobody uses are not looked
//! at.
//!
//! One turn of the loop takes what the rings hold, hands everything that comes of it to the kernel
//! with one system call, feeds what has completed to the engine, and signals each ring at most
//! once. The thread sleeps in that same system call, where kicks and messages wake it too.

pub mod control;
mod guests;
mod mailbox;
mod spin;
mod threads;

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use log::{debug, warn};
use vhost_user_backend::VringT;

use self::guests::Guests;
use self::mailbox::{Mailbox, Message};
use self::spin::Spin;
pub use self::threads::Workers;
use crate::common::buffer::BufferPool;
use crate::common::operation::{Operation, RequestId};
use crate::common::report::Report;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::control::queue::EventQueue;
use crate::device::DiskInfo;
use crate::device::connection::ConnectionSlot;
use crate::device::guest::Guest;
use crate::engine::{Effects, Engine, Failed, GuestRequest, Policy, Shared, Tag, WorkerIndex};
use crate::jobs::JobEvent;
use crate::limits::{
    BATCH_BYTES_MAX, BATCH_MAX, REPLICAS_MAX, TICK_MICROSECONDS, UNSIGNALLED_TURNS_MAX, drain_limit,
};
use crate::replica::ring::{Completion, Ring, Wait, Watch, WatchToken};
use crate::statistics::{Recorder, Statistics, TurnTime};

/// The watch of the mailbox, and those of all kicks: every ring is looked at in any case.
const MAILBOX: WatchToken = WatchToken(0);
const KICK: WatchToken = WatchToken(1);

/// The tag of a flush that no guest asked for. Those of guests have chains behind them, which are
/// fewer.
const OWN_FLUSH: Tag = Tag(u64::MAX);

/// What one turn of the loop takes at most, sleep not included.
const TURN_LIMIT: Duration = Duration::from_millis(50);

/// How often rings that are held are looked at.
const TICK: Duration = Duration::from_micros(TICK_MICROSECONDS);

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
    /// The open replicas, in order. They stay open as long as any worker runs, or until they are
    /// released.
    pub files: Vec<RawFd>,
    /// Where to tell that no worker uses a removed replica any more.
    pub released: std::sync::mpsc::Sender<ReplicaIndex>,
    /// Room for connections.
    pub slots: Vec<ConnectionSlot>,
    /// Where figures are kept, for each worker.
    pub statistics: Statistics,
    /// Where reports go.
    pub events: Arc<EventQueue>,
    /// Where to tell that the daemon must stop.
    pub stop: std::sync::mpsc::Sender<Stop>,
}

struct Worker {
    engine: Engine,
    io: Io,
    mailbox: Arc<Mailbox>,
    /// With this worker's rings only.
    slots: Vec<ConnectionSlot>,
    /// By slot and ring.
    kicks: Vec<Vec<Option<Watch>>>,
    /// Rings that were stopped and are not drained yet.
    draining: Vec<Draining>,
    /// When to end at the latest.
    exit_by: Option<Duration>,
    drain_limit: Duration,
    clock: Clock,
    spin: Spin,
    /// Turns since drivers were last told of what is done.
    turns_unsignalled: usize,
}

/// The time by which replicas are late: time in which this thread could not run, for want of a CPU
/// or because the host was suspended, does not count.
struct Clock {
    looked_at: Instant,
    now: Duration,
}

impl Clock {
    fn new() -> Self {
        Self {
            looked_at: Instant::now(),
            now: Duration::ZERO,
        }
    }

    /// The time when it was last looked at.
    fn now(&self) -> Duration {
        self.now
    }

    /// Looks at the time after a turn that has waited.
    fn advance(&mut self, waited: Wait) -> Duration {
        let looked_at = Instant::now();
        let limit = match waited {
            Wait::No => TURN_LIMIT,
            Wait::AtMost(limit) => limit.saturating_add(TURN_LIMIT),
            Wait::Forever => Duration::MAX,
        };
        self.now += (looked_at - self.looked_at).min(limit);
        self.looked_at = looked_at;
        self.now
    }
}

struct Draining {
    slot: usize,
    ring: usize,
    /// When what is still in flight is abandoned.
    until: Duration,
    /// Who waits for that; to be dropped.
    _done: SyncSender<()>,
}

/// Everything that the engine has an effect on.
struct Io {
    ring: Ring,
    /// Operations in flight on each replica.
    in_flight: [usize; REPLICAS_MAX],
    recorder: Recorder,
    released: std::sync::mpsc::Sender<ReplicaIndex>,
    guests: Guests,
    mailboxes: Vec<Arc<Mailbox>>,
    events: Arc<EventQueue>,
    /// Who waits for a flush of ours; they are answered in order.
    flushing: VecDeque<SyncSender<bool>>,
    stop: std::sync::mpsc::Sender<Stop>,
    /// The first failure of the ring; found by the loop.
    failure: Option<io::Error>,
}

impl Io {
    /// The replicas that have operations in flight.
    fn replicas_asked(&self) -> ReplicaSet {
        let asked = |replica: &ReplicaIndex| self.in_flight[replica.as_usize()] > 0;
        ReplicaSet::first(self.in_flight.len())
            .iter()
            .filter(asked)
            .collect()
    }
}

impl Effects for Io {
    fn submit(&mut self, operation: Operation) {
        self.in_flight[operation.replica.as_usize()] += 1;
        self.recorder.operation_begun(&operation);
        if let Err(error) = self.ring.push(operation, self.recorder.now()) {
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
        self.recorder.reported(&report);
        self.events.push(report);
    }

    fn repaired(&mut self, replica: ReplicaIndex, range: SectorRange) {
        self.events.mended(replica, range);
    }

    fn wake(&mut self, worker: WorkerIndex, request: RequestId) {
        self.mailboxes[usize::from(worker.0)].send(Message::Granted(request));
    }

    fn health_changed(&mut self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Tick);
        }
    }

    fn job_changed(&mut self, event: JobEvent) {
        self.events.push(event);
    }

    fn released(&mut self, replica: ReplicaIndex) {
        // Nobody listens only when the daemon stops already.
        let _ = self.released.send(replica);
    }

    fn contents_differ(&mut self, range: SectorRange) {
        // Nobody listens only when the daemon stops already.
        let _ = self.stop.send(Stop::ContentsDiffer(range));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl Worker {
    fn new(index: WorkerIndex, disk: Disk, mailboxes: Vec<Arc<Mailbox>>) -> io::Result<Self> {
        let pool = BufferPool::with_arena();
        let mut ring = Ring::new(&disk.files)?;
        ring.register_arena(&pool);
        let mailbox = Arc::clone(&mailboxes[usize::from(index.0)]);
        // Watched as long as the ring lives.
        ring.watch(&mailbox.event, MAILBOX)?;
        let drain_limit = drain_limit(disk.policy.replica_timeout);
        let statistics = disk.statistics.of_worker(index.0);
        let recorder = Recorder::new(statistics, TurnTime::default());
        let guests = disk.slots.iter().map(|slot| {
            let (info, pool) = (disk.info.clone(), pool.clone());
            let mut guest = Guest::new(info, slot.memory.clone(), slot.vrings.clone(), pool);
            guest.set_recorder(recorder.clone());
            guest
        });
        let guests = Guests::new(guests.collect());
        let kicks = disk.slots.iter();
        let kicks = kicks.map(|slot| slot.vrings.iter().map(|_| None).collect());
        Ok(Self {
            engine: Engine::new(index, disk.policy, disk.shared, pool.clone()),
            kicks: kicks.collect(),
            io: Io {
                ring,
                in_flight: [0; REPLICAS_MAX],
                recorder,
                released: disk.released,
                guests,
                mailboxes,
                events: disk.events,
                flushing: VecDeque::new(),
                stop: disk.stop,
                failure: None,
            },
            mailbox,
            slots: disk.slots,
            draining: Vec::new(),
            exit_by: None,
            drain_limit,
            clock: Clock::new(),
            spin: Spin::new(),
            turns_unsignalled: 0,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        loop {
            let worked = self.take_requests();
            self.abandon_overdue();
            self.signal();
            self.finish_draining();
            if let Some(exit_by) = self.exit_by {
                let late = self.clock.now() >= exit_by;
                if self.engine.is_idle() {
                    debug!("the worker ends, nothing is in flight");
                    return Ok(());
                } else if late {
                    warn!("the worker ends, although the replicas have not answered everything");
                    return Ok(());
                }
            }
            if worked {
                self.spin.found();
            }
            if worked
                || (!self.io.ring.is_writing_long() && self.spin.look_again(self.clock.looked_at))
            {
                self.turn(Wait::No)?;
                continue;
            }
            // Asking for kicks is the last thing before sleeping: whatever comes later wakes us.
            let blocked = !self.engine.has_room();
            let idle = blocked || !self.io.guests.ask_for_kicks();
            let slept_from = self.clock.looked_at;
            self.turn(if idle { self.wait() } else { Wait::No })?;
            self.spin.slept(self.clock.looked_at - slept_from);
        }
    }

    /// How long there is nothing to do but wait.
    fn wait(&self) -> Wait {
        let drains = self.draining.iter().map(|draining| draining.until);
        let held = self.io.guests.is_held().then(|| self.clock.now() + TICK);
        let deadlines = drains.chain(self.exit_by).chain(held);
        let first = deadlines.chain(self.engine.deadline()).min();
        match first {
            Some(deadline) => Wait::AtMost(deadline.saturating_sub(self.clock.now())),
            None => Wait::Forever,
        }
    }

    /// Moves requests from the rings to the engine, as many as it has room for and a turn takes.
    fn take_requests(&mut self) -> bool {
        let (mut taken, mut bytes) = (0, 0);
        while taken < BATCH_MAX && bytes < BATCH_BYTES_MAX && self.engine.has_room() {
            let Some((tag, request)) = self.io.guests.next_request() else {
                break;
            };
            bytes += request.bytes();
            self.engine.submit(tag, request, &mut self.io);
            taken += 1;
        }
        taken > 0
    }

    /// Tells drivers of what is done. A driver that has much in flight is told less often: to be
    /// woken costs it, and us, more than a request does. What is left in its ring must be
    /// enough to do until it has made new requests.
    fn signal(&mut self) {
        self.turns_unsignalled += 1;
        if self.turns_unsignalled >= UNSIGNALLED_TURNS_MAX || !self.io.guests.has_more() {
            self.turns_unsignalled = 0;
            self.io.guests.signal();
        }
    }

    /// One system call, and what came of it.
    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        if let Some(error) = self.io.failure.take() {
            return Err(error);
        }
        let mut completions = std::mem::take(self.io.ring.enter(wait)?);
        let now = self.clock.advance(wait);
        if !completions.is_empty() {
            self.spin.found();
        }
        self.engine.set_time(now);
        self.io.recorder.set_time(now);
        let mut mail = false;
        for completion in completions.drain(..) {
            match completion {
                Completion::Reply(reply, since) => {
                    self.io.recorder.operation_ended(&reply, since);
                    self.io.in_flight[reply.replica.as_usize()] -= 1;
                    self.engine.reply(reply, &mut self.io);
                }
                Completion::Readable(MAILBOX) => mail = true,
                Completion::Readable(_) => {}
            }
        }
        self.io.ring.recycle(completions);
        if self
            .engine
            .deadline()
            .is_some_and(|deadline| deadline <= now)
        {
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
                self.engine
                    .submit(OWN_FLUSH, GuestRequest::Flush, &mut self.io);
            }
            Message::Tick => self.engine.tick(self.clock.now(), &mut self.io),
            Message::SetFile {
                replica,
                file,
                done,
            } => {
                // Who asked may have given up.
                let _ = done.send(self.io.ring.set_file(replica, file));
            }
            Message::Exit => {
                self.engine.stop_background();
                self.exit_by = Some(self.clock.now() + self.drain_limit);
            }
            Message::Refresh {
                slot,
                ring,
                region,
                done,
            } => {
                let watched = &mut self.kicks[slot][ring];
                if let Some(watch) = watched.take() {
                    self.io.ring.unwatch(&watch)?;
                }
                let ConnectionSlot {
                    choices, vrings, ..
                } = &self.slots[slot];
                let durable_writes = choices.durable_writes();
                if self.io.guests.refresh(slot, ring, region, durable_writes) {
                    let state = vrings[ring].get_ref();
                    if let Some(kick) = state.get_kick() {
                        *watched = Some(self.io.ring.watch(kick, KICK)?);
                    }
                } else {
                    self.draining.push(Draining {
                        slot,
                        ring,
                        until: self.clock.now() + self.drain_limit,
                        _done: done,
                    });
                }
            }
        }
        Ok(())
    }

    /// Abandons what is in flight of rings that were stopped, where it is time.
    fn abandon_overdue(&mut self) {
        if self.draining.is_empty() {
            return;
        }
        let now = self.clock.now();
        for draining in self
            .draining
            .iter()
            .filter(|draining| draining.until <= now)
        {
            self.io.guests.abandon(draining.slot, draining.ring);
        }
    }

    /// Tells those who stopped a ring when nothing of it is in flight any more. They may take its
    /// call descriptor away then.
    fn finish_draining(&mut self) {
        if self.draining.is_empty() {
            return;
        }
        let guests = &mut self.io.guests;
        self.draining
            .retain(|draining| !guests.is_drained(draining.slot, draining.ring));
        guests.forget_idle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_the_thread_could_not_run_does_not_count() {
        let mut clock = Clock::new();
        let ago = |seconds| Instant::now() - Duration::from_secs(seconds);
        clock.looked_at = ago(3600);
        let wait = Duration::from_millis(2);
        assert_eq!(clock.advance(Wait::AtMost(wait)), wait + TURN_LIMIT);
        clock.looked_at = ago(5);
        assert_eq!(clock.advance(Wait::No), wait + 2 * TURN_LIMIT);
        clock.looked_at = ago(5);
        let now = clock.advance(Wait::AtMost(Duration::from_secs(60)));
        assert!(
            now >= Duration::from_secs(5),
            "slept as it was meant to: {now:?}"
        );
    }
}
