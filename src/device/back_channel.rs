//! The back channel of vhost-user ("Back-end communication"): a socket that the frontend passes, on
//! which the device reports that the configuration space has changed.
//!
//! The `vhost` crate has no call for that message, and keeps the socket that it wraps to itself. So
//! `frontend::intake` keeps a duplicate of the descriptor that passes a back channel. The crate
//! checks the message and its descriptor as before.
//!
//! Invariant: no thread waits for a frontend that does not read its back channel.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};

use log::{debug, warn};
use rustix::net::{SendFlags, send};

use crate::common::NOT_POISONED;
use crate::untrusted::close::close;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no body, no reply requested.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The back channel of one connection, for the thread that serves the connection and for those that
/// report changes.
#[derive(Clone, Debug, Default)]
pub struct BackChannel(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    socket: Option<OwnedFd>,
    /// The frontend has negotiated that it reads the configuration space by messages
    /// (VHOST_USER_PROTOCOL_F_CONFIG).
    has_config: bool,
}

impl BackChannel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect(NOT_POISONED)
    }

    /// Sets the socket that the frontend has passed.
    pub(super) fn set(&self, socket: Option<OwnedFd>) {
        let before = std::mem::replace(&mut self.state().socket, socket);
        if let Some(socket) = before {
            close(socket);
        }
    }

    /// Sets whether the frontend understands messages about the configuration space.
    pub(super) fn set_has_config(&self, has_config: bool) {
        self.state().has_config = has_config;
    }

    /// Forgets the socket: the connection has ended.
    pub(super) fn clear(&self) {
        let before = std::mem::take(&mut *self.state());
        if let Some(socket) = before.socket {
            close(socket);
        }
    }

    /// Reports to the frontend, if it understands that, that the configuration space has changed.
    pub fn send_config_change(&self) {
        let mut state = self.state();
        let socket = state.socket.as_ref().filter(|_| state.has_config);
        match socket.map(|socket| send_message(socket, &CONFIG_CHANGE)) {
            None => {
                debug!("the frontend has no back channel; it reads the new size by itself");
            }
            Some(Ok(())) => debug!("the change of the configuration space is sent to the frontend"),
            Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                // Earlier messages fill the socket. One of them reports the change.
                warn!("the frontend does not read its back channel");
            }
            Some(Err(error)) => {
                warn!(error:%; "the back channel to the frontend failed and is closed");
                if let Some(socket) = state.socket.take() {
                    close(socket);
                }
            }
        }
    }
}

/// Sends a message, whole or not at all, without waiting for room.
fn send_message(socket: &OwnedFd, message: &[u32; 3]) -> io::Result<()> {
    let bytes = message.map(u32::to_ne_bytes).concat();
    let sent = send(socket, &bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    if sent == bytes.len() {
        Ok(())
    } else {
        // Linux does not cut so short a message; the next one would not be understood.
        Err(io::ErrorKind::WriteZero.into())
    }
}
