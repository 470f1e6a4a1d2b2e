//! The frontends' connections: each gets a slot with virtqueues of its own.

#![forbid(unsafe_code)]

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Instant;

use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Error, system};
use crate::common::{NOT_POISONED, pulse};
use crate::control::socket::Listener;
use crate::control::wake::Wake;
use crate::device::disk_use::DiskUse;
use crate::device::frontend::Frontend;
use crate::limits::{CONNECTIONS_MAX, GIVE_WAY_LIMIT};
use crate::sandbox::{self, ThreadKind};
use crate::untrusted::close::close;
use crate::untrusted::reserve::is_reserved;

/// How long accepting pauses after the system was out of resources for a connection.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// The socket that frontends connect to.
pub(super) struct FrontendListener(Listener);

impl FrontendListener {
    pub(super) fn new(listener: Listener) -> Result<Self, Error> {
        let set = listener.socket().set_nonblocking(true);
        set.map_err(system("cannot set up the listening socket"))?;
        Ok(Self(listener))
    }

    /// Waits for a connection; `None` when `stop` is signalled. Other processes may use an
    /// inherited socket too, so its state is left alone, and one of them may accept the
    /// connection first.
    fn accept(&self, stop: &Wake) -> io::Result<Option<UnixStream>> {
        let mut polls = [
            PollFd::new(self.0.socket(), PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        poll(&mut polls, None)?;
        if !polls[1].revents().is_empty() {
            return Ok(None);
        }
        let (connection, _) = self.0.socket().accept()?;
        Ok(Some(connection))
    }
}

/// The thread that accepts connections, and the threads that serve one each.
pub(super) struct Connections {
    stop: Arc<Wake>,
    slots: Arc<Slots>,
    thread: JoinHandle<()>,
}

/// The slots, free or not.
struct Slots {
    frontends: Vec<Arc<Mutex<Frontend>>>,
    /// By slot.
    uses: Vec<DiskUse>,
    current: Mutex<Current>,
    /// Notified when a slot becomes free.
    freed: Condvar,
}

struct Current {
    /// The connections, by slot.
    connections: Vec<Option<UnixStream>>,
    /// When each connection was accepted, by slot.
    accepted: Vec<Instant>,
    /// The daemon is stopping: a new connection ends at once.
    stopping: bool,
}

impl Slots {
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().expect(NOT_POISONED)
    }

    /// Waits until all connections that frontends have closed are drained. A later frontend, for
    /// example that of a restarted guest, must not see earlier writes take effect.
    fn drain_closed(&self) {
        let any_closed =
            |current: &mut Current| current.connections.iter().flatten().any(is_closed);
        let waited = self.freed.wait_while(self.current(), any_closed);
        drop(waited.expect(NOT_POISONED));
    }

    /// Gives the connection a free slot, if there is one. Where there is none, an idle connection
    /// gives way.
    fn take(&self, connection: &UnixStream) -> io::Result<Option<usize>> {
        let free = |current: &Current| current.connections.iter().position(Option::is_none);
        let mut current = self.current();
        if free(&current).is_none()
            && let Some(idle) = self.longest_idle(&current)
        {
            warn!(connection = idle; "idle frontend disconnected: another one has connected");
            current.connections[idle].iter().for_each(end);
            let waited = self
                .freed
                .wait_timeout_while(current, GIVE_WAY_LIMIT, |current| free(current).is_none());
            current = waited.expect(NOT_POISONED).0;
        }
        let free = free(&current);
        if let Some(slot) = free {
            current.connections[slot] = Some(connection.try_clone()?);
            current.accepted[slot] = Instant::now();
            if current.stopping {
                end(connection);
            }
        }
        Ok(free)
    }

    /// The connection that has not used the disk for longest: rather one that has not begun to,
    /// than the destination of a migration.
    fn longest_idle(&self, current: &Current) -> Option<usize> {
        let idle = (0..self.frontends.len()).filter(|slot| !self.uses[*slot].is_in_use());
        let age = |slot: &usize| {
            // One that handles a message is not idle.
            let is_owned = |frontend: MutexGuard<'_, Frontend>| frontend.is_owned();
            let is_owned = self.frontends[*slot].try_lock().map_or(true, is_owned);
            (is_owned, current.accepted[*slot])
        };
        idle.min_by_key(age)
    }

    fn free(&self, slot: usize) {
        let connection = self.current().connections[slot].take();
        self.freed.notify_all();
        // What lies in the socket unread may take long to close.
        close(connection);
    }

    fn end_all(&self) {
        self.current().stopping = true;
        let is_connected = |slot: &usize| self.current().connections[*slot].is_some();
        for slot in (0..self.frontends.len()).filter(is_connected) {
            let frontend = self.frontends[slot].lock();
            frontend.expect(NOT_POISONED).stop_virtqueues();
        }
        self.current().connections.iter().flatten().for_each(end);
    }

    /// Serves the connection of the slot until it ends.
    fn serve(&self, slot: usize, connection: UnixStream) {
        let _watched = pulse::watch();
        info!(connection = slot; "frontend connected");
        match Frontend::serve(&self.frontends[slot], connection) {
            None => info!(connection = slot; "frontend disconnected"),
            Some(error) => {
                warn!(connection = slot, error:%; "frontend disconnected: its message is rejected");
            }
        }
        self.free(slot);
    }
}

fn end(connection: &UnixStream) {
    // Fails only if the connection has ended.
    let _ = connection.shutdown(Shutdown::Both);
}

/// Whether the frontend has closed its end, even if messages of it are unread.
fn is_closed(connection: &UnixStream) -> bool {
    let mut polls = [PollFd::new(connection, PollFlags::RDHUP)];
    poll(&mut polls, Some(&Timespec::default())) == Ok(1)
}

impl Connections {
    pub(super) fn start(
        listener: FrontendListener,
        frontends: Vec<(Frontend, DiskUse)>,
    ) -> io::Result<Self> {
        let (frontends, uses): (Vec<_>, Vec<_>) = frontends.into_iter().unzip();
        let stop = Arc::new(Wake::new()?);
        let slots = Arc::new(Slots {
            current: Mutex::new(Current {
                connections: frontends.iter().map(|_| None).collect(),
                accepted: vec![Instant::now(); frontends.len()],
                stopping: false,
            }),
            uses,
            frontends: frontends
                .into_iter()
                .map(|frontend| Arc::new(Mutex::new(frontend)))
                .collect(),
            freed: Condvar::new(),
        });
        let thread = {
            let (slots, stop) = (Arc::clone(&slots), Arc::clone(&stop));
            std::thread::Builder::new()
                .name("frontend".into())
                .spawn(move || {
                    sandbox::enter(ThreadKind::Frontend);
                    accept_all(&listener, &slots, &stop);
                })?
        };
        Ok(Self {
            stop,
            slots,
            thread,
        })
    }

    /// Ends all connections and returns when their virtqueues are drained.
    pub(super) fn stop(self) {
        self.slots.end_all();
        self.stop.signal();
        self.thread.join().expect(NOT_POISONED);
    }
}

/// Accepts connections until `stop` is signalled. Returns when all of them have ended.
fn accept_all(listener: &FrontendListener, slots: &Slots, stop: &Wake) {
    std::thread::scope(|scope| {
        let _watched = pulse::watch();
        loop {
            let connection = match listener.accept(stop) {
                Ok(Some(connection)) => connection,
                Ok(None) => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    // The system is out of descriptors or memory, perhaps for a moment only. That
                    // must not end the disk.
                    warn!(error:%; "cannot accept the connection of a frontend");
                    std::thread::sleep(ACCEPT_PAUSE);
                    continue;
                }
            };
            if is_reserved(&connection) {
                warn!("frontend rejected: too few descriptors are left");
                close(connection);
                continue;
            }
            slots.drain_closed();
            let slot = match pulse::turn(|| slots.take(&connection)) {
                Ok(Some(slot)) => slot,
                Ok(None) => {
                    warn!("frontend rejected: {CONNECTIONS_MAX} connections are served already");
                    // Fails only if the connection has ended.
                    let _ = connection.shutdown(Shutdown::Both);
                    close(connection);
                    continue;
                }
                Err(error) => {
                    warn!(error:%; "cannot serve a frontend");
                    close(connection);
                    continue;
                }
            };
            let thread = std::thread::Builder::new().name(format!("frontend-{slot}"));
            let serving = thread.spawn_scoped(scope, move || slots.serve(slot, connection));
            if let Err(error) = serving {
                slots.free(slot);
                warn!(connection = slot, error:%; "cannot serve a frontend");
            }
        }
    });
}
