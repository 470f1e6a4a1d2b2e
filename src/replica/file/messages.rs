//! Messages between the daemon, the process that opens an image, and the one that starts it: JSON,
//! and a file with some.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::sandbox;

/// Bytes of a message: more than the longest one has, with two paths of a byte in two digits.
const MESSAGE_BYTES_MAX: usize = 32 << 10;

/// Both ends of a socket for messages.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (kind, flags) = (SocketType::SEQPACKET, SocketFlags::CLOEXEC);
    Ok(socketpair(AddressFamily::UNIX, kind, flags, None)?)
}

/// Sends a message, and a file with it.
pub(super) fn send(
    socket: &impl AsFd,
    message: &impl Serialize,
    file: Option<&File>,
) -> io::Result<()> {
    send_with(socket, message, file, SendFlags::empty())
}

/// The same, but fails with EAGAIN where it would wait for the other end.
pub(super) fn send_at_once(
    socket: &impl AsFd,
    message: &impl Serialize,
    file: Option<&File>,
) -> io::Result<()> {
    send_with(socket, message, file, SendFlags::DONTWAIT)
}

fn send_with(
    socket: &impl AsFd,
    message: &impl Serialize,
    file: Option<&File>,
    flags: SendFlags,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files: Vec<_> = file.into_iter().map(|file| file.as_fd()).collect();
    if !files.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    let flags = flags | SendFlags::NOSIGNAL;
    sendmsg(socket, &[IoSlice::new(&bytes)], &mut ancillary, flags)?;
    Ok(())
}

/// The next message and the file it carries; `None` if the other end is closed. That a process has
/// made a call that the sandbox does not allow is an error.
pub(super) fn receive<T: DeserializeOwned>(
    socket: &impl AsFd,
) -> io::Result<Option<(T, Option<File>)>> {
    let mut bytes = [0; MESSAGE_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        let mut into = [IoSliceMut::new(&mut bytes)];
        recvmsg(socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
    })?;
    if received.bytes == 0 {
        return Ok(None);
    }
    let file = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next().map(File::from),
        _ => None,
    });
    let bytes = &bytes[..received.bytes];
    if let Some(violation) = sandbox::violation(bytes) {
        return Err(io::Error::other(violation));
    }
    let message = serde_json::from_slice(bytes);
    Ok(Some((message.map_err(io::Error::other)?, file)))
}

/// Whether the other end of the socket is closed, whatever can still be read.
pub(super) fn is_closed(socket: &OwnedFd) -> bool {
    let mut polls = [PollFd::new(socket, PollFlags::empty())];
    let polled = rustix::io::retry_on_intr(|| poll(&mut polls, Some(&Timespec::default())));
    polled.is_ok() && polls[0].revents().contains(PollFlags::HUP)
}

/// Waits until the socket can be read, until `by`. Returns whether it can.
pub(super) fn is_readable(socket: &OwnedFd, by: Instant) -> io::Result<bool> {
    loop {
        let left = by.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut polls = [PollFd::new(socket, PollFlags::IN)];
        match poll(&mut polls, Some(&limit)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
