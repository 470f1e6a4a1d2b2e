//! The thread that sends events to whoever listens at `--events`, and to the log.
//!
//! Invariants:
//! - It waits in one place, for everything at once; no reader makes it wait for itself.
//! - Every event goes to the log once and to each reader that is connected when it is sent. None is kept for
//!   a reader that comes later.
//! - Readers are at most [`EVENT_READERS_MAX`], each with a bounded backlog (`reader`).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::events::Names;
use super::queue::EventQueue;
use super::reader::Reader;
use super::socket::BoundListener;
use crate::limits::EVENT_READERS_MAX;

/// How long [`Publisher::stop`] waits for readers that are behind.
const STOP_PATIENCE: Duration = Duration::from_millis(500);

/// How long no reader is accepted after the system had no means for one; level-triggered, the listener would
/// otherwise keep the thread spinning.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Events that are made into lines between two rounds of writing, so that the first of many is out early.
const EVENTS_PER_ROUND: usize = 64;

const QUEUE_TOKEN: u64 = 0;
const LISTENER_TOKEN: u64 = 1;
const FIRST_READER_TOKEN: u64 = 2;

/// A running publisher. Dropping it stops it.
pub struct Publisher {
    queue: Arc<EventQueue>,
    thread: Option<JoinHandle<()>>,
}

impl Publisher {
    /// Starts to serve `queue` at `listener`. Without a listener the events go to the log alone, so that
    /// nothing is left in the queue. A queue has one publisher in its life.
    pub fn spawn(listener: Option<BoundListener>, queue: Arc<EventQueue>, names: Names) -> io::Result<Self> {
        let server = Server::new(listener, queue.clone(), names)?;
        let thread = std::thread::Builder::new()
            .name("events".into())
            .spawn(move || server.run())?;
        Ok(Self {
            queue,
            thread: Some(thread),
        })
    }

    /// Sends what is in the queue, folded or not, closes the readers (those that are behind after half a
    /// second at most) and removes the socket. What is pushed later is not sent: stop what pushes first.
    pub fn stop(self) {
        drop(self);
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.queue.close();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the event publisher had panicked; events were lost");
        }
    }
}

struct Server {
    listener: Option<BoundListener>,
    queue: Arc<EventQueue>,
    names: Names,
    epoll: Epoll,
    readers: BTreeMap<u64, Registered>,
    next_token: u64,
    /// When to listen again, if accepting was suspended.
    accept_again_at: Option<Instant>,
}

struct Registered {
    reader: Reader,
    /// What the epoll instance knows of [`Reader::interest`].
    interest: EventSet,
}

impl Server {
    fn new(listener: Option<BoundListener>, queue: Arc<EventQueue>, names: Names) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let server = Self {
            listener,
            queue,
            names,
            epoll,
            readers: BTreeMap::new(),
            next_token: FIRST_READER_TOKEN,
            accept_again_at: None,
        };
        server.control(
            ControlOperation::Add,
            server.queue.as_raw_fd(),
            EventSet::IN,
            QUEUE_TOKEN,
        )?;
        if let Some(listener) = &server.listener {
            listener.socket().set_nonblocking(true)?;
            server.listen()?;
        }
        Ok(server)
    }

    fn run(mut self) {
        let mut timeout = None;
        loop {
            self.wait(timeout);
            let batch = self.queue.take();
            if !batch.events.is_empty() {
                // Whoever had connected when they were pushed gets them.
                self.accept_waiting();
            }
            for round in batch.events.chunks(EVENTS_PER_ROUND) {
                let lines: Vec<(Vec<u8>, u64)> = round
                    .iter()
                    .map(|event| (event.to_line(&self.names), event.stands_for()))
                    .collect();
                self.send(&lines);
                for (line, _) in &lines {
                    warn!("{}", String::from_utf8_lossy(line).trim_end());
                }
            }
            if batch.last {
                return self.finish();
            }
            timeout = [batch.again_in, self.resume_accepting()]
                .into_iter()
                .flatten()
                .min();
        }
    }

    /// Gives the readers that are behind a last chance.
    fn finish(mut self) {
        // First, so that nobody connects in vain.
        self.listener = None;
        // What is pushed from now on is not sent and must not wake.
        let queue_fd = self.queue.as_raw_fd();
        let _ = self.control(ControlOperation::Delete, queue_fd, EventSet::empty(), QUEUE_TOKEN);
        let deadline = Instant::now() + STOP_PATIENCE;
        while self
            .readers
            .values()
            .any(|registered| registered.reader.is_behind())
        {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                info!("a reader of events was cut off at shutdown, it had not read all of them");
                break;
            }
            self.wait(Some(left));
        }
        for registered in self.readers.values_mut() {
            // To close a socket with unread input would give the other side an error in place of an end.
            let _ = registered.reader.discard_input();
        }
    }

    fn send(&mut self, lines: &[(Vec<u8>, u64)]) {
        self.each_reader(|reader| {
            for (line, stands_for) in lines {
                reader.offer(line, *stands_for)?;
            }
            reader.flush()
        });
    }

    /// Waits for the queue, the listener or a reader, and serves the latter two.
    fn wait(&mut self, timeout: Option<Duration>) {
        // Rounded up: to come back early would be to come back twice.
        let timeout_ms = timeout.map_or(-1, |timeout| {
            i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        });
        let mut fired = [EpollEvent::default(); EVENT_READERS_MAX + 2];
        let count = match self.epoll.wait(timeout_ms, &mut fired) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            // It is our own fd and our own memory.
            Err(error) => panic!("epoll_wait: {error}"),
        };
        let mut accept = false;
        for event in &fired[..count] {
            match event.data() {
                QUEUE_TOKEN => {}
                LISTENER_TOKEN => accept = true,
                token => self.serve(token, event.event_set()),
            }
        }
        // Last, so that those who left have made room.
        if accept {
            self.accept_waiting();
        }
    }

    fn serve(&mut self, token: u64, ready: EventSet) {
        self.one_reader(token, |reader| {
            if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            if ready.contains(EventSet::IN) {
                reader.discard_input()?;
            }
            reader.flush()
        });
    }

    /// Accepts who waits at the listener, in a number that lets nobody keep the thread here.
    fn accept_waiting(&mut self) {
        for _ in 0..EVENT_READERS_MAX {
            let Some(listener) = &self.listener else {
                return;
            };
            if self.accept_again_at.is_some() {
                return;
            }
            match listener.socket().accept() {
                Ok((stream, _)) => self.admit(stream),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) => return self.suspend_accepting(&error),
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) {
        if self.readers.len() >= EVENT_READERS_MAX {
            info!("a reader of events was turned away: there are {EVENT_READERS_MAX} already");
        } else if let Err(error) = self.register(stream) {
            warn!("a reader of events was turned away: {error}");
        }
    }

    fn register(&mut self, stream: UnixStream) -> io::Result<()> {
        let reader = Reader::new(stream)?;
        let interest = reader.interest();
        let token = self.next_token;
        self.control(ControlOperation::Add, reader.as_raw_fd(), interest, token)?;
        self.next_token += 1;
        self.readers.insert(token, Registered { reader, interest });
        Ok(())
    }

    fn suspend_accepting(&mut self, error: &io::Error) {
        warn!("no reader of events can be accepted for now: {error}");
        if let Some(listener) = &self.listener {
            let fd = listener.socket().as_raw_fd();
            // Should it fail, the thread spins for the length of the pause.
            let _ = self.control(ControlOperation::Delete, fd, EventSet::empty(), LISTENER_TOKEN);
        }
        self.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
    }

    /// Listens again if it is time to, or says how long that is.
    fn resume_accepting(&mut self) -> Option<Duration> {
        let left = self.accept_again_at?.saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Some(left);
        }
        match self.listen() {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                self.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
                Some(ACCEPT_PAUSE)
            }
            _ => {
                self.accept_again_at = None;
                None
            }
        }
    }

    fn listen(&self) -> io::Result<()> {
        match &self.listener {
            Some(listener) => {
                let fd = listener.socket().as_raw_fd();
                self.control(ControlOperation::Add, fd, EventSet::IN, LISTENER_TOKEN)
            }
            None => Ok(()),
        }
    }

    fn each_reader(&mut self, mut action: impl FnMut(&mut Reader) -> io::Result<()>) {
        let tokens: Vec<u64> = self.readers.keys().copied().collect();
        for token in tokens {
            self.one_reader(token, &mut action);
        }
    }

    /// Does `action`, then tells epoll what the reader waits for now. A reader for which either fails is gone.
    fn one_reader(&mut self, token: u64, action: impl FnOnce(&mut Reader) -> io::Result<()>) {
        let Some(registered) = self.readers.get_mut(&token) else {
            return;
        };
        let mut result = action(&mut registered.reader);
        let interest = registered.reader.interest();
        if result.is_ok() && interest != registered.interest {
            registered.interest = interest;
            let fd = registered.reader.as_raw_fd();
            result = self.control(ControlOperation::Modify, fd, interest, token);
        }
        if let Err(error) = result {
            debug!("a reader of events left: {error}");
            // Closing the fd takes it out of the epoll set.
            self.readers.remove(&token);
        }
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        interest: EventSet,
        token: u64,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(interest, token))
    }
}
