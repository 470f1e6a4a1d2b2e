//! A listening socket in an epoll set.
//!
//! Invariant: when the system is out of resources for another client, accepting is suspended and
//! resumed later. The listener is level-triggered: without the pause it would keep the thread busy.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::socket::Listener;

/// How long accepting is suspended.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Acceptor {
    listener: Listener,
    token: u64,
    /// What its clients are called in the log.
    client: &'static str,
    /// When to resume, if accepting is suspended.
    accept_again_at: Option<Instant>,
}

impl Acceptor {
    /// Adds the listener to `epoll`, as `token`. The log calls its clients `client`.
    pub(super) fn new(
        listener: Listener,
        token: u64,
        client: &'static str,
        epoll: &Epoll,
    ) -> io::Result<Self> {
        listener.socket().set_nonblocking(true)?;
        let acceptor = Self {
            listener,
            token,
            client,
            accept_again_at: None,
        };
        acceptor.add_to(epoll)?;
        Ok(acceptor)
    }

    /// The next client that waits, if there is one.
    pub(super) fn accept(&mut self, epoll: &Epoll) -> Option<UnixStream> {
        while self.accept_again_at.is_none() {
            match self.listener.socket().accept() {
                Ok((stream, _)) => return Some(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::ConnectionAborted | ErrorKind::Interrupted
                    ) => {}
                Err(error) => self.suspend(&error, epoll),
            }
        }
        None
    }

    fn suspend(&mut self, error: &io::Error, epoll: &Epoll) {
        warn!(client = self.client, error:%; "cannot accept a client; trying again later");
        let fd = self.listener.socket().as_raw_fd();
        // If this fails, the thread polls for the length of the pause.
        let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        self.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
    }

    /// Resumes accepting when the pause is over. Returns the rest of the pause.
    pub(super) fn resume(&mut self, epoll: &Epoll) -> Option<Duration> {
        let left = self
            .accept_again_at?
            .saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Some(left);
        }
        match self.add_to(epoll) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                self.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
                Some(ACCEPT_PAUSE)
            }
            _ => {
                self.accept_again_at = None;
                None
            }
        }
    }

    fn add_to(&self, epoll: &Epoll) -> io::Result<()> {
        let fd = self.listener.socket().as_raw_fd();
        let event = EpollEvent::new(EventSet::IN, self.token);
        epoll.ctl(ControlOperation::Add, fd, event)
    }
}
