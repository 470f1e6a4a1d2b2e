//! The sockets that the daemon listens on: created here, or inherited from the process that started
//! the daemon.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};

use super::Error;
use crate::config::{Config, Listen};
use crate::control::socket::{Listener, SocketAccess, bind_unix_listener, check_unix_listener};

/// The sockets of a daemon. Dropping it removes their names.
pub(super) struct Listeners {
    /// Of the events.
    pub(super) events: Option<Listener>,
    /// Of the monitor.
    pub(super) qmp: Option<Listener>,
    /// Of the metrics.
    pub(super) metrics: Option<TcpListener>,
    /// Of the frontends.
    pub(super) frontend: Listener,
}

impl Listeners {
    /// Opens all of them, with that of the frontends as the last one. What connects waits until it
    /// is served.
    pub(super) fn open(config: &Config) -> Result<Self, Error> {
        // A client of these can stop the disk, or sees what happens on it.
        let for_owner = |listen| open(listen, SocketAccess::OWNER);
        Ok(Self {
            events: config.events.as_ref().map(for_owner).transpose()?,
            qmp: config.qmp.as_ref().map(for_owner).transpose()?,
            metrics: config.metrics.map(listen_for_metrics).transpose()?,
            frontend: open(&config.listen, access_of_frontends(config))?,
        })
    }
}

/// Opens the socket that an option or a service manager names. One that this creates has this
/// `access`.
fn open(listen: &Listen, access: SocketAccess) -> Result<Listener, Error> {
    // SAFETY: a descriptor is inherited for the one purpose that its option or name gives: it was
    // open before any socket of this process (`check`). The configuration accepts each descriptor
    // once, and this opens each socket once.
    let adopted = |fd| unsafe { adopt(fd) }.map(Listener::Passed);
    match listen {
        Listen::Path(path) => Ok(Listener::Bound(bind_unix_listener(path, access)?)),
        Listen::Fd(fd) => adopted(*fd).ok_or(Error::NotAListener(*fd)),
        Listen::Passed(socket) => {
            adopted(socket.fd).ok_or_else(|| Error::PassedNoListener(socket.clone()))
        }
    }
}

/// Checks that the sockets can be created that [`open`] and [`listen_for_metrics`] are to create,
/// and that the others are inherited: before the images have records, and jobs begin, and before a
/// socket of this process gets the number that an option names.
pub(super) fn check(config: &Config) -> Result<(), Error> {
    let for_owner = [&config.events, &config.qmp].into_iter().flatten();
    let for_owner = for_owner.map(|listen| (listen, SocketAccess::OWNER));
    let for_frontend = (&config.listen, access_of_frontends(config));
    for (listen, access) in for_owner.chain([for_frontend]) {
        match listen {
            Listen::Path(path) => check_unix_listener(path, access)?,
            Listen::Fd(fd) if !is_listener(*fd) => return Err(Error::NotAListener(*fd)),
            Listen::Passed(socket) if !is_listener(socket.fd) => {
                return Err(Error::PassedNoListener(socket.clone()));
            }
            Listen::Fd(_) | Listen::Passed(_) => {}
        }
    }
    config
        .metrics
        .map_or(Ok(()), |address| listen_for_metrics(address).map(drop))
}

/// Who may connect as a frontend.
fn access_of_frontends(config: &Config) -> SocketAccess {
    SocketAccess {
        mode: config.socket_mode,
        group: config.socket_group,
    }
}

/// Listens for clients that read the metrics.
fn listen_for_metrics(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).map_err(|source| Error::Metrics { address, source })
}

/// The inherited descriptor `fd`, if it is a listening UNIX stream socket.
///
/// # Safety
/// Nothing else in this process may own the descriptor.
unsafe fn adopt(fd: RawFd) -> Option<UnixListener> {
    // SAFETY: the descriptor is open, as it listens, and the caller says that nothing else owns it.
    is_listener(fd).then(|| unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Whether `fd` is a listening UNIX stream socket, and no standard stream.
fn is_listener(fd: RawFd) -> bool {
    if fd <= io::stderr().as_raw_fd() {
        return false;
    }
    // SAFETY: the system calls below reject a descriptor that is not open; nothing closes one
    // meanwhile, as no other thread has it.
    let passed = unsafe { BorrowedFd::borrow_raw(fd) };
    socket_domain(passed) == Ok(AddressFamily::UNIX)
        && socket_type(passed) == Ok(SocketType::STREAM)
        && socket_acceptconn(passed) == Ok(true)
}
