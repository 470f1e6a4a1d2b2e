//! The back channel of vhost-user: a socket that the frontend passes, on which the device tells it
//! that the configuration space has changed.
//!
//! The `vhost` crate has no call for that message, and does not hand out the socket that it wraps.
//! So a connection is looked at before the crate reads a message from it: of the one that passes a
//! back channel the descriptor is kept (`passed`). Whether it is one the crate checks as before.
//!
//! Invariant: nobody waits for a frontend that does not read what it is told.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::{debug, warn};

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, no body. No reply is asked for: nothing would
/// depend on it.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The back channel of one connection, for the thread that serves it and those that have something
/// to tell.
#[derive(Clone, Debug, Default)]
pub struct BackChannel(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    socket: Option<OwnedFd>,
    /// The frontend has negotiated that it reads the configuration space by messages.
    has_config: bool,
}

impl BackChannel {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the frontend has passed.
    pub(super) fn set(&self, socket: Option<OwnedFd>) {
        self.state().socket = socket;
    }

    /// Whether the frontend wants to be told of changes.
    pub(super) fn set_has_config(&self, has_config: bool) {
        self.state().has_config = has_config;
    }

    /// The connection has ended.
    pub(super) fn clear(&self) {
        *self.state() = State::default();
    }

    /// Tells the frontend, if it has asked for that, that the configuration space has changed.
    pub fn send_config_change(&self) {
        let mut state = self.state();
        let socket = state.socket.as_ref().filter(|_| state.has_config);
        match socket.map(|socket| send(socket, &CONFIG_CHANGE)) {
            None => {
                debug!("the frontend has no back channel; it finds the new size when it reads it")
            }
            Some(Ok(())) => {
                debug!("the frontend was told that the configuration space has changed")
            }
            Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                // There are such messages before it that it has not read.
                warn!("the frontend does not read its back channel");
            }
            Some(Err(error)) => {
                warn!("the back channel to the frontend is closed: {error}");
                state.socket = None;
            }
        }
    }
}

/// Sends a message, whole or not at all, without waiting for room.
fn send(socket: &OwnedFd, message: &[u32; 3]) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the message is valid for reads of its size; the descriptor is open.
    let sent = unsafe {
        libc::send(
            socket.as_raw_fd(),
            message.as_ptr().cast(),
            size_of_val(message),
            flags,
        )
    };
    match usize::try_from(sent) {
        Ok(count) if count == size_of_val(message) => Ok(()),
        // Linux does not cut so short a message; the next one would not be understood.
        Ok(_) => Err(io::ErrorKind::WriteZero.into()),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Waits for the next message on a connection, which stays there to be read. The descriptor that
/// comes with it, if it passes a back channel. Whatever is wrong is found by whoever reads the
/// message.
pub(super) fn passed(connection: RawFd) -> Option<OwnedFd> {
    let mut request = 0_u32;
    // SAFETY: `request` is valid for a write of its size; a descriptor that is none makes the call
    // fail.
    let count = unsafe {
        libc::recv(
            connection,
            (&raw mut request).cast(),
            size_of::<u32>(),
            libc::MSG_PEEK,
        )
    };
    let is_whole = usize::try_from(count) == Ok(size_of::<u32>());
    (is_whole && request == SET_BACKEND_REQ_FD)
        .then(|| peek_descriptor(connection))
        .flatten()
}

/// A duplicate of the descriptor that comes with the next byte, which is there.
fn peek_descriptor(connection: RawFd) -> Option<OwnedFd> {
    #[repr(C)]
    struct Control {
        header: libc::cmsghdr,
        descriptor: RawFd,
    }
    /// Without the padding at the end, in which the kernel would put a second one.
    const CONTROL_BYTES: usize = size_of::<libc::cmsghdr>() + size_of::<RawFd>();

    let mut byte = 0_u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut control = MaybeUninit::<Control>::zeroed();
    // SAFETY: for this structure zeroes are a valid value: no name, no parts, no control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL_BYTES;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: `message` refers to one byte and to `control`, both valid for writes of the lengths
    // given.
    let count = unsafe { libc::recvmsg(connection, &raw mut message, flags) };
    // SAFETY: integers only, zeroed in the beginning.
    let Control { header, descriptor } = unsafe { control.assume_init() };
    let is_descriptor = count == 1
        && header.cmsg_level == libc::SOL_SOCKET
        && header.cmsg_type == libc::SCM_RIGHTS
        && header.cmsg_len == CONTROL_BYTES;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
    is_descriptor.then(|| unsafe { OwnedFd::from_raw_fd(descriptor) })
}
