//! The protocols of systemd and other service managers: sockets that the service manager passes
//! (sd_listen_fds(3)), and notifications of the state of the daemon (sd_notify(3)). Without a
//! service manager there are neither.

#![forbid(unsafe_code)]

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;
use std::sync::OnceLock;

use log::warn;
use sd_notify::NotifyState;

use crate::common::message::Reason;
use crate::config::PassedSocket;

/// The variable that names the socket of the service manager.
const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// A socket that is connected to it.
static SOCKET: OnceLock<UnixDatagram> = OnceLock::new();

/// The variables of the service manager contradict each other.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use the sockets of the service manager (LISTEN_FDS, LISTEN_FDNAMES): {}",
    Reason(.0)
)]
pub struct PassedError(#[from] io::Error);

/// The sockets that the service manager passed to this process; children do not inherit them.
///
/// The variables stay in the environment: changing it is unsafe once there are threads, and
/// LISTEN_PID names this process only.
///
/// # Errors
/// If descriptors are missing, or their number and that of their names differ.
pub fn take_passed_sockets() -> Result<Vec<PassedSocket>, PassedError> {
    // Variables for another process, whose child this one is, may even be invalid.
    if sd_notify::listen_fds()?.len() == 0 {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds_with_names()?;
    Ok(passed.map(|(fd, name)| PassedSocket { name, fd }).collect())
}

/// Connects to the service manager, if there is one. `sd_notify::notify` does so each time, for
/// which each thread that notifies would have to be allowed to connect to any socket.
pub(super) fn connect() {
    let connected = std::env::var_os(NOTIFY_SOCKET).map(|name| {
        let socket = UnixDatagram::unbound()?;
        match name.as_bytes().strip_prefix(b"@") {
            Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
            None => socket.connect(Path::new(&name))?,
        }
        Ok(socket)
    });
    match connected {
        None => {}
        Some(Ok(socket)) => drop(SOCKET.set(socket)),
        Some(Err(error)) => cannot_notify(&error),
    }
}

/// Sends a state to the service manager, if there is one.
pub(super) fn notify(state: &[NotifyState<'_>]) {
    let Some(socket) = SOCKET.get() else {
        return;
    };
    let lines = state.iter().map(|line| format!("{line}\n"));
    if let Err(error) = socket.send(lines.collect::<String>().as_bytes()) {
        cannot_notify(&error);
    }
}

fn cannot_notify(error: &io::Error) {
    warn!(error:%; "cannot notify the service manager");
}
