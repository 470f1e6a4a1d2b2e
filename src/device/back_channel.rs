//! The back channel of vhost-user ("Back-end communication"): a socket that the frontend passes, on
//! which the device reports that the configuration space has changed.
//!
//! The `vhost` crate has no call for that message, and keeps the socket that it wraps to itself. So
//! `peek` looks at a connection before the crate reads a message from it, and keeps a duplicate
//! of the descriptor that passes a back channel. The crate checks the message and its descriptor as
//! before.
//!
//! Invariant: no thread waits for a frontend that does not read its back channel.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use log::{debug, warn};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};

use crate::common::NOT_POISONED;

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;

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
        self.state().socket = socket;
    }

    /// Sets whether the frontend understands messages about the configuration space.
    pub(super) fn set_has_config(&self, has_config: bool) {
        self.state().has_config = has_config;
    }

    /// Forgets the socket: the connection has ended.
    pub(super) fn clear(&self) {
        *self.state() = State::default();
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
                state.socket = None;
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

/// Waits for the next message on a connection and leaves it there to be read. Returns a duplicate
/// of the descriptor that comes with it, if it passes a back channel. Errors are left to the read
/// of the message.
pub(super) fn peek(connection: &UnixStream) -> Option<OwnedFd> {
    let mut request = [0; size_of::<u32>()];
    let (count, _) = recv(connection, &mut request, RecvFlags::PEEK).ok()?;
    let is_whole = count == request.len();
    (is_whole && u32::from_ne_bytes(request) == SET_BACKEND_REQ_FD)
        .then(|| peek_descriptor(connection))
        .flatten()
}

/// A duplicate of the first descriptor that comes with the next byte, which is there already.
fn peek_descriptor(connection: &UnixStream) -> Option<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let parts = &mut [IoSliceMut::new(&mut byte)];
    let received = recvmsg(connection, parts, &mut control, flags).ok()?;
    if received.bytes != 1 {
        return None;
    }
    control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}
