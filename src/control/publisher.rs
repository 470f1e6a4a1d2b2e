//! The thread that serves operators: it sends events to the readers of `--events`, to the clients
//! of the monitor (`--qmp`) and to the log, and passes on the commands of those clients.
//!
//! Invariants:
//! - It waits in one place, for everything at once, and never for a single client.
//! - Every event goes to the log once, and to each reader that is connected when it is sent. Events
//!   are not kept for later readers.
//! - There are at most [`EVENT_READERS_MAX`] readers and [`QMP_CLIENTS_MAX`] clients, each with a
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
use super::acceptor::Acceptor;
use super::client::Client;
use super::events::Names;
use super::qmp::executor::Executor;
use super::queue::EventQueue;
use super::socket::Listener;
use crate::common::{NOT_POISONED, pulse};
use crate::limits::{EVENT_READERS_MAX, QMP_CLIENTS_MAX};
use crate::sandbox::{self, ThreadKind};

/// How long [`Publisher::stop`] waits for clients that have not read everything.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// Events that are formatted before the next write, so that the first of many is sent early.
const EVENTS_PER_ROUND: usize = 64;

const CLIENTS_MAX: usize = EVENT_READERS_MAX + QMP_CLIENTS_MAX;

const QUEUE_TOKEN: u64 = 0;
const REPLIES_TOKEN: u64 = 1;
const EVENTS_TOKEN: u64 = 2;
const MONITOR_TOKEN: u64 = 3;
const FIRST_CLIENT_TOKEN: u64 = 4;

/// The running thread. Dropping it stops it.
pub struct Publisher {
    queue: Arc<EventQueue>,
    thread: Option<JoinHandle<()>>,
}

/// The socket of the monitor, and what runs its commands.
pub struct Monitor {
    /// The socket.
    pub listener: Listener,
    /// Runs the commands.
    pub operator: Arc<dyn Operator>,
}

impl Publisher {
    /// Starts to publish `queue` at the given sockets. Without sockets the events go only to the
    /// log, so that the queue is emptied in any case. A queue has one publisher in its life.
    pub fn spawn(
        events: Option<Listener>,
        monitor: Option<Monitor>,
        queue: Arc<EventQueue>,
        names: Names,
    ) -> io::Result<Self> {
        let server = Server::new(events, monitor, queue.clone(), names)?;
        let thread = std::thread::Builder::new()
            .name("events".into())
            .spawn(move || {
                sandbox::enter(ThreadKind::Operator);
                server.run();
            })?;
        Ok(Self {
            queue,
            thread: Some(thread),
        })
    }

    /// Sends all events of the queue, waits for running commands, closes the connections (after
    /// half a second even if clients have not read everything) and removes the sockets. Events that
    /// are pushed later are not sent: stop the threads that push first.
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
    /// For readers of events.
    events: Option<Acceptor>,
    /// For clients of the monitor.
    monitor: Option<Acceptor>,
    executor: Option<Executor>,
    queue: Arc<EventQueue>,
    names: Names,
    epoll: Epoll,
    clients: BTreeMap<u64, (Kind, Client)>,
    next_token: u64,
}

/// The socket that a client connected to.
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

    fn count_max(self) -> usize {
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
        let events = events
            .map(|listener| Acceptor::new(listener, EVENTS_TOKEN, Kind::Reader.name(), &epoll));
        let (mut acceptor, mut executor) = (None, None);
        if let Some(Monitor { listener, operator }) = monitor {
            let executor = executor.insert(Executor::spawn(operator)?);
            wait_for(executor.as_raw_fd(), REPLIES_TOKEN)?;
            acceptor = Some(Acceptor::new(
                listener,
                MONITOR_TOKEN,
                Kind::Monitor.name(),
                &epoll,
            )?);
        }
        Ok(Self {
            events: events.transpose()?,
            monitor: acceptor,
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
        let _watched = pulse::watch();
        pulse::busy();
        loop {
            self.wait(timeout);
            let batch = self.queue.take();
            if !batch.events.is_empty() {
                // A client that connected before they were pushed gets them.
                self.accept_waiting(Kind::Reader);
                self.accept_waiting(Kind::Monitor);
            }
            for round in batch.events.chunks(EVENTS_PER_ROUND) {
                // First: a client that gets the event finds the result.
                round
                    .iter()
                    .for_each(|event| self.queue.keep_result(event, &self.names));
                let lines: Vec<(Vec<u8>, u64)> = round
                    .iter()
                    .flat_map(|event| {
                        let held = event.to_io_error_line(&self.names);
                        let lines = std::iter::once(event.to_line(&self.names)).chain(held);
                        lines.map(|line| (line, event.stands_for()))
                    })
                    .collect();
                self.send(&lines);
                round.iter().for_each(|event| event.log(&self.names));
            }
            if batch.last {
                return self.finish();
            }
            let acceptors = [&mut self.events, &mut self.monitor].into_iter().flatten();
            let resume_in = acceptors.filter_map(|acceptor| acceptor.resume(&self.epoll));
            let resume_in = resume_in.min();
            timeout = [batch.again_in, resume_in].into_iter().flatten().min();
        }
    }

    /// Lets the clients read what is queued for them, for a limited time.
    fn finish(mut self) {
        // First, so that no client connects in vain.
        (self.events, self.monitor) = (None, None);
        // Events that are pushed from now on are not sent and must not wake the thread.
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
                let behind = self.clients.values();
                let behind = behind.filter(|(_, client)| client.is_behind()).count();
                info!(clients = behind; "clients have not read everything; disconnecting them");
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
            self.with_client(token, |client, monitor| {
                client.send_events(token, lines, monitor)
            });
        }
    }

    /// Waits for the queue, a new client, a client or a reply, and serves all but the queue.
    fn wait(&mut self, timeout: Option<Duration>) {
        // Rounded up: a wake that is too early causes a second one.
        let timeout_ms = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let mut fired = [EpollEvent::default(); CLIENTS_MAX + 4];
        let count = match pulse::waiting(|| self.epoll.wait(timeout_ms, &mut fired)) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            // Other errors mean an invalid descriptor or buffer.
            Err(error) => panic!("epoll_wait: {error}"),
        };
        let (mut readers, mut clients) = (false, false);
        for event in &fired[..count] {
            match event.data() {
                QUEUE_TOKEN => {}
                REPLIES_TOKEN => self.forward_replies(),
                EVENTS_TOKEN => readers = true,
                MONITOR_TOKEN => clients = true,
                token => self.with_client(token, |client, monitor| {
                    client.serve(token, event.event_set(), monitor)
                }),
            }
        }
        // Last, so that clients that have just disconnected make room.
        if readers {
            self.accept_waiting(Kind::Reader);
        }
        if clients {
            self.accept_waiting(Kind::Monitor);
        }
    }

    fn forward_replies(&mut self) {
        let replies = self.executor.as_ref().map(Executor::take);
        for (token, line) in replies.unwrap_or_default() {
            // The client may have disconnected.
            self.with_client(token, |client, monitor| {
                client.answer(token, &line, monitor)
            });
        }
    }

    /// Accepts waiting clients, a bounded number of them.
    fn accept_waiting(&mut self, kind: Kind) {
        for _ in 0..kind.count_max() {
            let acceptor = match kind {
                Kind::Reader => &mut self.events,
                Kind::Monitor => &mut self.monitor,
            };
            let Some(stream) = acceptor
                .as_mut()
                .and_then(|acceptor| acceptor.accept(&self.epoll))
            else {
                return;
            };
            let present = self
                .clients
                .values()
                .filter(|(other, _)| *other == kind)
                .count();
            if present >= kind.count_max() {
                let client = kind.name();
                info!(client; "client rejected: {present} clients are served already");
            } else if let Err(error) = self.admit(kind, stream) {
                warn!(client = kind.name(), error:%; "cannot serve a client");
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

    /// Runs `action`, then updates the interest of the client in epoll. If either fails the client
    /// is disconnected.
    fn with_client(
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
            debug!(client = kind.name(), error:%; "client disconnected");
            // Closing the descriptor removes it from the epoll set.
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
