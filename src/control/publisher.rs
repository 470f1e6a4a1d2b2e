//! The thread that talks to operators: it sends events to whoever listens at `--events`, to the
//! clients of the monitor at `--qmp`, whose commands it passes on, and to the log.
//!
//! Invariants:
//! - It waits in one place, for everything at once; no client makes it wait for itself.
//! - Every event goes to the log once and to each reader that is connected when it is sent. None is
//!   kept for a reader that comes later.
//! - Readers and clients are at most [`EVENT_READERS_MAX`] and [`QMP_CLIENTS_MAX`], each with a
//!   bounded backlog (`reader`).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Operator;
use super::client::Client;
use super::door::Door;
use super::events::Names;
use super::qmp::executor::Executor;
use super::queue::EventQueue;
use super::socket::Listener;
use crate::common::NOT_POISONED;
use crate::limits::{EVENT_READERS_MAX, QMP_CLIENTS_MAX};

/// How long [`Publisher::stop`] waits for clients that are behind.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// Events that are made into lines between two rounds of writing, so that the first of many is out
/// early.
const EVENTS_PER_ROUND: usize = 64;

const CLIENTS_MAX: usize = EVENT_READERS_MAX + QMP_CLIENTS_MAX;

const QUEUE_TOKEN: u64 = 0;
const REPLIES_TOKEN: u64 = 1;
const EVENTS_TOKEN: u64 = 2;
const MONITOR_TOKEN: u64 = 3;
const FIRST_CLIENT_TOKEN: u64 = 4;

/// A running publisher. Dropping it stops it.
pub struct Publisher {
    queue: Arc<EventQueue>,
    thread: Option<JoinHandle<()>>,
}

/// Where clients of the monitor connect, and who does what they ask for.
pub struct Monitor {
    /// The socket.
    pub listener: Listener,
    /// Does what commands say.
    pub operator: Arc<dyn Operator>,
}

impl Publisher {
    /// Starts to serve `queue` at the sockets there are. Without any the events go to the log
    /// alone, so that nothing is left in the queue. A queue has one publisher in its life.
    pub fn spawn(
        events: Option<Listener>,
        monitor: Option<Monitor>,
        queue: Arc<EventQueue>,
        names: Names,
    ) -> io::Result<Self> {
        let server = Server::new(events, monitor, queue.clone(), names)?;
        let thread = std::thread::Builder::new()
            .name("events".into())
            .spawn(move || server.run())?;
        Ok(Self {
            queue,
            thread: Some(thread),
        })
    }

    /// Sends what is in the queue, folded or not, lets the commands that run end, closes the
    /// connections (those that are behind after half a second at most) and removes the sockets.
    /// What is pushed later is not sent: stop what pushes first.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.queue.close();
        if let Some(thread) = self.thread.take() {
            thread.join().expect(NOT_POISONED);
        }
    }
}

struct Server {
    /// Of readers of events.
    events: Option<Door>,
    /// Of clients of the monitor.
    monitor: Option<Door>,
    executor: Option<Executor>,
    queue: Arc<EventQueue>,
    names: Names,
    epoll: Epoll,
    clients: BTreeMap<u64, (Kind, Client)>,
    next_token: u64,
}

/// By what door a client came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reader,
    Monitor,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Reader => "event reader",
            Self::Monitor => "monitor client",
        }
    }

    fn most(self) -> usize {
        match self {
            Self::Reader => EVENT_READERS_MAX,
            Self::Monitor => QMP_CLIENTS_MAX,
        }
    }
}

impl Server {
    fn new(
        events: Option<Listener>,
        monitor: Option<Monitor>,
        queue: Arc<EventQueue>,
        names: Names,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wait_for = |fd, token| {
            epoll.ctl(
                ControlOperation::Add,
                fd,
                EpollEvent::new(EventSet::IN, token),
            )
        };
        wait_for(queue.as_raw_fd(), QUEUE_TOKEN)?;
        let events = events.map(|listener| Door::open(listener, EVENTS_TOKEN, &epoll));
        let (mut door, mut executor) = (None, None);
        if let Some(Monitor { listener, operator }) = monitor {
            let runs = executor.insert(Executor::spawn(operator)?);
            wait_for(runs.as_raw_fd(), REPLIES_TOKEN)?;
            door = Some(Door::open(listener, MONITOR_TOKEN, &epoll)?);
        }
        Ok(Self {
            events: events.transpose()?,
            monitor: door,
            executor,
            queue,
            names,
            epoll,
            clients: BTreeMap::new(),
            next_token: FIRST_CLIENT_TOKEN,
        })
    }

    fn run(mut self) {
        let mut timeout = None;
        loop {
            self.wait(timeout);
            let batch = self.queue.take();
            if !batch.events.is_empty() {
                // Whoever had connected when they were pushed gets them.
                self.accept_waiting(Kind::Reader);
                self.accept_waiting(Kind::Monitor);
            }
            for round in batch.events.chunks(EVENTS_PER_ROUND) {
                let lines: Vec<(Vec<u8>, u64)> = round
                    .iter()
                    .filter_map(|event| Some((event.to_line(&self.names)?, event.stands_for())))
                    .collect();
                self.send(&lines);
                round.iter().for_each(|event| event.log(&self.names));
            }
            if batch.last {
                return self.finish();
            }
            let doors = [&mut self.events, &mut self.monitor].into_iter().flatten();
            let resume_in = doors.filter_map(|door| door.resume(&self.epoll)).min();
            timeout = [batch.again_in, resume_in].into_iter().flatten().min();
        }
    }

    /// Gives the clients that are behind a last chance.
    fn finish(mut self) {
        // First, so that nobody connects in vain.
        (self.events, self.monitor) = (None, None);
        // What is pushed from now on is not sent and must not wake.
        let queue_fd = self.queue.as_raw_fd();
        let _ = self.control(
            ControlOperation::Delete,
            queue_fd,
            EventSet::empty(),
            QUEUE_TOKEN,
        );
        let deadline = Instant::now() + STOP_PATIENCE;
        while self.clients.values().any(|(_, client)| client.is_behind()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                info!("clients have not read everything; disconnecting them");
                break;
            }
            self.wait(Some(left));
        }
        for (_, client) in self.clients.values_mut() {
            client.discard_input();
        }
    }

    fn send(&mut self, lines: &[(Vec<u8>, u64)]) {
        let tokens: Vec<u64> = self.clients.keys().copied().collect();
        for token in tokens {
            self.one_client(token, |client, monitor| client.tell(token, lines, monitor));
        }
    }

    /// Waits for the queue, a door, a client or a reply for one, and serves all but the first.
    fn wait(&mut self, timeout: Option<Duration>) {
        // Rounded up: to come back early would be to come back twice.
        let timeout_ms = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let mut fired = [EpollEvent::default(); CLIENTS_MAX + 4];
        let count = match self.epoll.wait(timeout_ms, &mut fired) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            // It is our own fd and our own memory.
            Err(error) => panic!("epoll_wait: {error}"),
        };
        let (mut readers, mut clients) = (false, false);
        for event in &fired[..count] {
            match event.data() {
                QUEUE_TOKEN => {}
                REPLIES_TOKEN => self.pass_replies_on(),
                EVENTS_TOKEN => readers = true,
                MONITOR_TOKEN => clients = true,
                token => self.one_client(token, |client, monitor| {
                    client.serve(token, event.event_set(), monitor)
                }),
            }
        }
        // Last, so that those who left have made room.
        if readers {
            self.accept_waiting(Kind::Reader);
        }
        if clients {
            self.accept_waiting(Kind::Monitor);
        }
    }

    fn pass_replies_on(&mut self) {
        let replies = self.executor.as_ref().map(Executor::take);
        for (token, line) in replies.unwrap_or_default() {
            // Who asked may have left.
            self.one_client(token, |client, monitor| {
                client.answer(token, &line, monitor)
            });
        }
    }

    /// Accepts who waits at a door, in a number that lets nobody keep the thread here.
    fn accept_waiting(&mut self, kind: Kind) {
        for _ in 0..kind.most() {
            let door = match kind {
                Kind::Reader => &mut self.events,
                Kind::Monitor => &mut self.monitor,
            };
            let Some(stream) = door.as_mut().and_then(|door| door.accept(&self.epoll)) else {
                return;
            };
            let present = self
                .clients
                .values()
                .filter(|(other, _)| *other == kind)
                .count();
            if present >= kind.most() {
                info!(clients = present; "{} turned away: too many clients", kind.name());
            } else if let Err(error) = self.admit(kind, stream) {
                warn!(error:%; "{} turned away", kind.name());
            }
        }
    }

    fn admit(&mut self, kind: Kind, stream: UnixStream) -> io::Result<()> {
        let client = match kind {
            Kind::Reader => Client::reader(stream)?,
            Kind::Monitor => Client::conversation(stream)?,
        };
        let token = self.next_token;
        let fd = client.as_raw_fd();
        self.control(ControlOperation::Add, fd, client.registered, token)?;
        self.next_token += 1;
        self.clients.insert(token, (kind, client));
        Ok(())
    }

    /// Does `action`, then tells epoll what the client waits for now. A client for which either
    /// fails is gone.
    fn one_client(
        &mut self,
        token: u64,
        action: impl FnOnce(&mut Client, Option<&Executor>) -> io::Result<()>,
    ) {
        let Some((kind, client)) = self.clients.get_mut(&token) else {
            return;
        };
        let mut result = action(client, self.executor.as_ref());
        let interest = client.interest();
        if result.is_ok() && interest != client.registered {
            client.registered = interest;
            let event = EpollEvent::new(interest, token);
            result = self
                .epoll
                .ctl(ControlOperation::Modify, client.as_raw_fd(), event);
        }
        if let Err(error) = result {
            debug!(error:%; "{} disconnected", kind.name());
            // Closing the fd takes it out of the epoll set.
            self.clients.remove(&token);
        }
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        interest: EventSet,
        token: u64,
    ) -> io::Result<()> {
        self.epoll
            .ctl(operation, fd, EpollEvent::new(interest, token))
    }
}
