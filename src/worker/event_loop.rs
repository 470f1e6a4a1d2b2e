//! The loop of a worker thread.
//!
//! One turn takes requests off the virtqueues, hands every operation that results to the kernel
//! with one system call, feeds the completions to the engine, and signals each virtqueue at most
//! once. The thread sleeps in that same system call, where kicks and messages wake it too.
//!
//! Invariant: asking drivers for kicks is the last step before the thread sleeps, so a request
//! that arrives later wakes it.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use log::{debug, warn};
use vhost_user_backend::VringT;

use super::Disk;
use super::clock::Clock;
use super::draining::Draining;
use super::effects::Io;
use super::guests::Guests;
use super::mailbox::{Mailbox, Message};
use super::polled::Polled;
use super::spin::Spin;
use crate::common::buffer::BufferPool;
use crate::device::connection::ConnectionSlot;
use crate::device::guest::{Guest, Holder};
use crate::device::inflight::QueueRegion;
use crate::engine::{Engine, GuestRequest, Tag, WorkerIndex};
use crate::limits::{
    BATCH_BYTES_MAX, BATCH_MAX, TICK_MICROSECONDS, UNSIGNALLED_TURNS_MAX, drain_limit,
    drain_overtime,
};
use crate::replica::ring::kernel::{Kernel, Uring};
use crate::replica::ring::{Completion, Ring, Wait, Watch, WatchToken};
use crate::statistics::Recorder;
use crate::untrusted::signal;

/// The watch of the mailbox.
const MAILBOX: WatchToken = WatchToken(0);

/// The watches of all kicks. They share a token because a turn looks at every virtqueue anyway.
const KICK: WatchToken = WatchToken(1);

/// How often a worker looks at virtqueues that another process's requests hold back.
const TICK: Duration = Duration::from_micros(TICK_MICROSECONDS);

/// A worker: its virtqueues, its engine and its io_uring.
pub(super) struct Worker<K: Kernel = Uring> {
    index: WorkerIndex,
    engine: Engine,
    pub(super) io: Io<K>,
    mailbox: Arc<Mailbox>,
    /// Has an arena once a virtqueue has started: a worker that serves none takes no memory.
    pub(super) pool: BufferPool,
    /// With the virtqueues of this worker only.
    slots: Vec<ConnectionSlot>,
    /// By slot and virtqueue.
    kicks: Vec<Vec<Option<Watch>>>,
    polled: Polled,
    draining: Draining,
    /// When the worker ends even if requests are in flight. `None` until it is asked to end.
    exit_by: Option<Duration>,
    drain_limit: Duration,
    drain_overtime: Duration,
    clock: Clock,
    spin: Spin,
    /// Turns since drivers were last signalled.
    turns_unsignalled: usize,
}

impl<K: Kernel> Drop for Worker<K> {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl<K: Kernel> Worker<K> {
    pub(super) fn new(
        mut ring: Ring<K>,
        index: WorkerIndex,
        disk: Disk,
        mailboxes: Vec<Arc<Mailbox>>,
    ) -> io::Result<Self> {
        let pool = BufferPool::default();
        let mailbox = Arc::clone(&mailboxes[usize::from(index.0)]);
        // Never unwatched: it lasts as long as the ring.
        ring.watch(&mailbox.event, MAILBOX)?;
        signal::prepare()?;
        let statistics = disk.statistics.of_worker(index.0);
        let clock = Clock::new();
        let turn = clock.turn();
        let recorder = Recorder::new(statistics, turn.clone());
        let guests = disk.slots.iter().enumerate().map(|(connection, slot)| {
            let (info, pool) = (disk.info.clone(), pool.clone());
            let mut guest = Guest::new(info, slot.memory.clone(), slot.vrings.clone(), pool);
            guest.set_recorder(recorder.clone());
            guest.set_clock(turn.clone());
            let connection = u8::try_from(connection).expect("connections are few");
            guest.set_holder(Holder::new(Arc::clone(&disk.hold), index, connection));
            guest
        });
        let guests = Guests::new(guests.collect());
        let kicks = disk.slots.iter();
        let kicks = kicks.map(|slot| slot.vrings.iter().map(|_| None).collect());
        Ok(Self {
            index,
            kicks: kicks.collect(),
            polled: Polled::new(),
            io: Io {
                ring,
                recorder,
                released: disk.released,
                guests,
                mailboxes,
                events: disk.events,
                flushing: VecDeque::new(),
                hold: disk.hold,
                failing: None,
                stop: disk.stop,
                failure: None,
            },
            mailbox,
            pool: pool.clone(),
            slots: disk.slots,
            draining: Draining::default(),
            exit_by: None,
            drain_limit: drain_limit(disk.policy.replica_timeout),
            drain_overtime: drain_overtime(disk.policy.replica_timeout),
            clock,
            spin: Spin::new(),
            turns_unsignalled: 0,
            engine: Engine::new(index, disk.policy, disk.shared, pool, turn),
        })
    }

    /// Runs until the worker is asked to exit.
    ///
    /// # Errors
    /// If the io_uring fails.
    pub(super) fn run(&mut self) -> io::Result<()> {
        while self.step()? {}
        Ok(())
    }

    /// One round of the loop. Returns whether another one follows.
    pub(super) fn step(&mut self) -> io::Result<bool> {
        let worked = self.take_requests();
        if !self.draining.is_empty() {
            let overdue = self.clock.now().saturating_sub(self.overtime());
            self.draining.abandon_overdue(overdue, &mut self.io.guests);
        }
        self.signal();
        self.draining.finish(&mut self.io.guests);
        self.share_buffers();
        if self.io.hold.take_wake() {
            for mailbox in &self.io.mailboxes {
                mailbox.send(Message::Continue);
            }
        }
        if self.is_finished() {
            self.assert_accounted();
            return Ok(false);
        }
        if worked {
            self.spin.found();
            self.polled.found();
        }
        if worked || self.polls_again() {
            self.turn(Wait::No)?;
            return Ok(true);
        }
        self.assert_accounted();
        let blocked = !self.engine.has_room() || self.io.hold.is_holding();
        let idle = blocked || !self.io.guests.enable_kicks();
        let slept_from = self.clock.advanced_at();
        let wait = if idle { self.wait() } else { Wait::No };
        self.turn(wait)?;
        self.spin.slept(self.clock.advanced_at() - slept_from);
        Ok(true)
    }

    /// Checks that the engine and the ring agree about what is in flight. It is checked before each
    /// sleep, and at the end: what a worker leaves in flight decides which images stay locked. They
    /// may disagree while completions wait that the engine has not seen.
    fn assert_accounted(&self) {
        if self.io.failure.is_none() && !self.io.ring.has_completions() {
            assert_eq!(
                self.engine.replicas_in_flight(),
                self.io.ring.busy_replicas(),
                "replicas with operations in flight, to the engine and to the ring"
            );
        }
    }

    /// Makes the worker exit at this time at the latest.
    #[cfg(test)]
    pub(super) fn exit_at(&mut self, time: Duration) {
        self.exit_by = Some(time);
    }

    /// Whether the worker was asked to exit and may do so now.
    fn is_finished(&self) -> bool {
        let Some(exit_by) = self.exit_by else {
            return false;
        };
        if self.engine.is_idle() {
            debug!(worker = self.index.0; "worker stops; no request is in flight");
            return true;
        }
        let is_overdue = self.clock.now() >= exit_by + self.overtime();
        if is_overdue {
            let operations = self.io.ring.operations();
            warn!(
                worker = self.index.0, operations;
                "worker stops although replicas have not answered all operations"
            );
        }
        is_overdue
    }

    /// Whether to poll once more instead of sleeping. Never beside long writes: they need the CPU,
    /// and take longer than polling pays for.
    fn polls_again(&mut self) -> bool {
        !self.io.ring.is_writing_long() && self.spin.poll_again(self.clock.advanced_at())
    }

    /// How much longer than usual the worker waits for replicas before it exits, or abandons the
    /// requests of a virtqueue.
    fn overtime(&self) -> Duration {
        if self.engine.waits_for_long() {
            self.drain_overtime
        } else {
            Duration::ZERO
        }
    }

    /// How long the worker may sleep.
    fn wait(&mut self) -> Wait {
        let (now, is_holding) = (self.clock.now(), self.io.hold.is_holding());
        let awaits_others = !is_holding && self.io.guests.awaits_resubmission();
        let resubmission = awaits_others.then(|| now + TICK);
        let poll = if is_holding {
            None
        } else {
            self.polled.pause()
        };
        let ends = [self.draining.deadline(), self.exit_by];
        let end = ends.into_iter().flatten().min();
        let deadlines = [
            end.map(|end| end + self.overtime()),
            resubmission,
            poll.map(|pause| now + pause),
            self.engine.deadline(),
        ];
        match deadlines.into_iter().flatten().min() {
            Some(deadline) => Wait::AtMost(deadline.saturating_sub(now)),
            None => Wait::Forever,
        }
    }

    /// Moves requests from the virtqueues to the engine, as many as the engine has room for and
    /// one turn takes. Returns whether there were any.
    fn take_requests(&mut self) -> bool {
        if self.io.hold.is_holding() {
            return self.take_held();
        }
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

    /// Shares the memory for buffers with the other workers.
    #[inline]
    fn share_buffers(&mut self) {
        let woken = self.engine.share_buffers();
        if !woken.is_empty() {
            for (index, mailbox) in (0..).zip(&self.io.mailboxes) {
                if woken.contains(WorkerIndex(index)) {
                    mailbox.send(Message::Continue);
                }
            }
        }
    }

    /// Moves held requests to the engine again, if the operator has continued. Until these are
    /// done, nothing new is taken from the virtqueues (W9).
    #[cold]
    fn take_held(&mut self) -> bool {
        let mut taken = 0;
        while taken < BATCH_MAX && self.engine.has_room() {
            let Some((ticket, tag)) = self.io.hold.next(self.index) else {
                break;
            };
            let Tag::Guest {
                connection,
                fragment,
            } = tag
            else {
                unreachable!("only requests of guests are held");
            };
            self.io.hold.submits(ticket);
            if let Some(request) = self.io.guests.held_request(connection, fragment) {
                self.engine.submit(tag, request, &mut self.io);
            }
            self.io.hold.submitted(ticket);
            taken += 1;
        }
        taken > 0
    }

    /// Signals drivers that requests are done. A driver with many requests in flight is signalled
    /// less often, because an interrupt costs it and this worker more than a request does. The
    /// requests left in its virtqueue must last until it has made new ones.
    fn signal(&mut self) {
        self.turns_unsignalled += 1;
        // What is held keeps this worker from taking what is there.
        if self.turns_unsignalled >= UNSIGNALLED_TURNS_MAX
            || self.io.hold.is_holding()
            || !self.io.guests.has_more()
        {
            self.turns_unsignalled = 0;
            self.io.guests.signal();
        }
    }

    /// Makes one system call, then handles its completions and the messages that arrived.
    fn turn(&mut self, wait: Wait) -> io::Result<()> {
        if let Some(error) = self.io.failure.take() {
            return Err(error);
        }
        let mut completions = std::mem::take(self.io.ring.enter(wait)?);
        let now = self.clock.advance(wait);
        if !completions.is_empty() {
            self.spin.found();
        }
        let mut mail = false;
        for completion in completions.drain(..) {
            match completion {
                Completion::Reply(reply, since) => {
                    self.io.recorder.operation_ended(&reply, since);
                    self.engine.reply(reply, &mut self.io);
                }
                Completion::Progress(replica) => self.engine.progressed(replica),
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
            self.engine.tick(&mut self.io);
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
                    .submit(Tag::OwnFlush, GuestRequest::Flush, &mut self.io);
            }
            Message::Tick => self.engine.tick(&mut self.io),
            // The next turn looks at it.
            Message::Continue => {}
            Message::SetFile {
                replica,
                file,
                done,
            } => {
                // The thread that asked may have stopped waiting.
                let _ = done.send(self.io.ring.set_file(replica, file));
            }
            Message::Exit => {
                self.engine.stop_background();
                self.exit_by = Some(self.clock.now() + self.drain_limit);
            }
            Message::Refresh {
                slot,
                queue,
                region,
                done,
            } => {
                if !self.refresh(slot, queue, region)? {
                    let abandon_at = self.clock.now() + self.drain_limit;
                    self.draining.push(slot, queue, abandon_at, done);
                }
            }
        }
        Ok(())
    }

    /// Follows a change of a virtqueue's state. Returns whether it is active; if not, it has to
    /// drain.
    fn refresh(
        &mut self,
        slot: usize,
        queue: usize,
        region: Option<QueueRegion>,
    ) -> io::Result<bool> {
        let kick_watch = &mut self.kicks[slot][queue];
        if let Some(watch) = kick_watch.take() {
            self.io.ring.unwatch(watch)?;
        }
        let ConnectionSlot {
            choices, vrings, ..
        } = &self.slots[slot];
        let durable_writes = choices.durable_writes();
        let active = self.io.guests.refresh(slot, queue, region, durable_writes);
        let kick = vrings[queue].get_ref().get_kick().is_some();
        self.polled.set(slot, queue, active && !kick);
        if !active {
            return Ok(false);
        }
        if self.pool.arena().is_none() {
            self.pool.add_arena();
            self.io.ring.register_arena(&self.pool);
        }
        let state = vrings[queue].get_ref();
        if let Some(kick) = state.get_kick() {
            *kick_watch = Some(self.io.ring.watch(kick, KICK)?);
        }
        Ok(true)
    }
}
