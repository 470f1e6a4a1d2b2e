//! A socket at which clients arrive.
//!
//! Invariant: a system that has no means for another client is asked again after a pause, and is
//! not spun upon meanwhile: level-triggered, the listener would keep the thread awake.

use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use log::warn;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::socket::Listener;

/// How long nobody is accepted after the system had no means for that.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

pub(super) struct Door {
    listener: Listener,
    token: u64,
    /// When to listen again, if accepting was suspended.
    accept_again_at: Option<Instant>,
}

impl Door {
    /// Has `epoll` wait for clients under the name `token`.
    pub(super) fn open(listener: Listener, token: u64, epoll: &Epoll) -> io::Result<Self> {
        listener.socket().set_nonblocking(true)?;
        let door = Self {
            listener,
            token,
            accept_again_at: None,
        };
        door.listen(epoll)?;
        Ok(door)
    }

    /// Who waits, if anybody does.
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
        warn!(error:%; "cannot accept a client; trying again later");
        let fd = self.listener.socket().as_raw_fd();
        // Should it fail, the thread spins for the length of the pause.
        let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        self.accept_again_at = Some(Instant::now() + ACCEPT_PAUSE);
    }

    /// Listens again if it is time to, or says how long that is.
    pub(super) fn resume(&mut self, epoll: &Epoll) -> Option<Duration> {
        let left = self
            .accept_again_at?
            .saturating_duration_since(Instant::now());
        if !left.is_zero() {
            return Some(left);
        }
        match self.listen(epoll) {
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

    fn listen(&self, epoll: &Epoll) -> io::Result<()> {
        let fd = self.listener.socket().as_raw_fd();
        epoll.ctl(
            ControlOperation::Add,
            fd,
            EpollEvent::new(EventSet::IN, self.token),
        )
    }
}
