//! Frontends that connect, and their connections: each gets a slot with rings of its own.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use log::{info, warn};
use vmm_sys_util::eventfd::EventFd;

use super::{Error, system};
use crate::common::NOT_POISONED;
use crate::control::socket::Listener;
use crate::device::frontend::Frontend;
use crate::limits::CONNECTIONS_MAX;

/// Where frontends connect.
pub(super) struct FrontendListener(Listener);

impl FrontendListener {
    pub(super) fn new(listener: Listener) -> Result<Self, Error> {
        let set = listener.socket().set_nonblocking(true);
        set.map_err(system("cannot set up the listening socket"))?;
        Ok(Self(listener))
    }

    /// Waits for a connection, until `stop` is written to. A socket that was passed may have other
    /// users, now or later, so nothing is done to the socket itself; and one of them may take
    /// the connection before us.
    fn accept(&self, stop: &EventFd) -> io::Result<Accepted> {
        let wanted = |fd: RawFd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut polls = [
            wanted(self.0.socket().as_raw_fd()),
            wanted(stop.as_raw_fd()),
        ];
        // SAFETY: two initialised pollfds, valid for the call.
        if unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) } < 0 {
            return Err(io::Error::last_os_error());
        }
        if polls[1].revents != 0 {
            return Ok(Accepted::Stop);
        }
        self.0
            .socket()
            .accept()
            .map(|(connection, _)| Accepted::Connection(connection))
    }
}

/// What came of waiting for a connection.
enum Accepted {
    Connection(UnixStream),
    Stop,
}

/// The thread that accepts connections, and those that serve one each.
pub(super) struct Connections {
    stop: Arc<EventFd>,
    slots: Arc<Slots>,
    thread: JoinHandle<()>,
}

/// Who is connected.
struct Slots {
    frontends: Vec<Arc<Mutex<Frontend>>>,
    current: Mutex<Current>,
    /// A slot has become free.
    freed: Condvar,
}

struct Current {
    /// The connections, by slot, to be able to end them.
    connections: Vec<Option<UnixStream>>,
    /// Nothing is to be served any more.
    stopping: bool,
}

impl Slots {
    fn current(&self) -> MutexGuard<'_, Current> {
        self.current.lock().expect(NOT_POISONED)
    }

    /// Returns when all connections that were closed by their frontends have been drained. Who
    /// connects after that, a guest that was started again for one, must not see writes of
    /// before take effect.
    fn wait_for_the_closed(&self) {
        let any_closed =
            |current: &mut Current| current.connections.iter().flatten().any(is_closed);
        let waited = self.freed.wait_while(self.current(), any_closed);
        drop(waited.expect(NOT_POISONED));
    }

    /// Gives a free slot to a connection, if there is one.
    fn take(&self, connection: &UnixStream) -> io::Result<Option<usize>> {
        let mut current = self.current();
        let is_free = |slot: &usize| current.connections[*slot].is_none();
        let free = (0..self.frontends.len()).find(is_free);
        if let Some(slot) = free {
            current.connections[slot] = Some(connection.try_clone()?);
            if current.stopping {
                end(connection);
            }
        }
        Ok(free)
    }

    fn free(&self, slot: usize) {
        self.current().connections[slot] = None;
        self.freed.notify_all();
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

    /// Serves the connection that has the slot until it ends.
    fn serve(&self, slot: usize, connection: UnixStream) {
        info!(connection = slot; "frontend connected");
        match Frontend::serve(&self.frontends[slot], connection) {
            None => info!(connection = slot; "frontend disconnected"),
            Some(error) => {
                warn!(connection = slot, error:%; "frontend disconnected: its message is invalid");
            }
        }
        self.free(slot);
    }
}

fn end(connection: &UnixStream) {
    // Fails only for one that has ended.
    let _ = connection.shutdown(std::net::Shutdown::Both);
}

/// Whether the frontend has closed its end, whatever it has sent before.
fn is_closed(connection: &UnixStream) -> bool {
    let mut poll = libc::pollfd {
        fd: connection.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    // SAFETY: one initialised pollfd, valid for the call, which does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

impl Connections {
    pub(super) fn start(listener: FrontendListener, frontends: Vec<Frontend>) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new(libc::EFD_CLOEXEC)?);
        let slots = Arc::new(Slots {
            current: Mutex::new(Current {
                connections: frontends.iter().map(|_| None).collect(),
                stopping: false,
            }),
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
                .spawn(move || accept_all(&listener, &slots, &stop))?
        };
        Ok(Self {
            stop,
            slots,
            thread,
        })
    }

    /// Ends all connections and returns when their rings are drained.
    pub(super) fn stop(self) {
        self.slots.end_all();
        // The counter cannot overflow.
        let _ = self.stop.write(1);
        self.thread.join().expect(NOT_POISONED);
    }
}

/// Accepts connections until `stop` is written to, and returns when those accepted have ended.
fn accept_all(listener: &FrontendListener, slots: &Slots, stop: &EventFd) {
    std::thread::scope(|scope| {
        loop {
            let connection = match listener.accept(stop) {
                Ok(Accepted::Connection(connection)) => connection,
                Ok(Accepted::Stop) => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    // For want of descriptors or memory; that may pass, and the disk must not go
                    // for it.
                    warn!(error:%; "cannot accept the connection of a frontend");
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    continue;
                }
            };
            slots.wait_for_the_closed();
            let slot = match slots.take(&connection) {
                Ok(Some(slot)) => slot,
                Ok(None) => {
                    warn!(connections = CONNECTIONS_MAX; "frontend turned away: too many connections");
                    continue;
                }
                Err(error) => {
                    warn!(error:%; "cannot serve a frontend");
                    continue;
                }
            };
            let thread = std::thread::Builder::new().name(format!("frontend-{slot}"));
            let serving = thread.spawn_scoped(scope, move || slots.serve(slot, connection));
            if let Err(error) = serving {
                slots.free(slot);
                warn!(error:%; "cannot serve a frontend");
            }
        }
    });
}
