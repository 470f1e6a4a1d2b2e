//! Looks at each message before the `vhost` crate reads it.
//!
//! The crate closes what it does not want of the descriptors that come with a message, ends the
//! connection when it does not know the message, and waits for room for its reply. So this lets
//! through only what it knows, with descriptors that are closed at once, when there is room.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use log::debug;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recv, recvmsg,
    send,
};
use vhost::vhost_user::{Error, Result};

use crate::limits::REPLY_LIMIT;
use crate::untrusted::close::close;
use crate::untrusted::descriptor::{check_is_local, is_socket};

/// Bytes of a header: request, flags and size of the body.
const HEADER_BYTES: usize = 12;

/// Longest body, as in the crate.
const BODY_BYTES_MAX: u32 = 0x1000;

/// Most descriptors that Linux passes with one message.
const DESCRIPTORS_MAX: usize = 253;

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;

/// Flags of a header: the version, and whether a reply is asked for.
const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A message that the crate may read.
pub(super) struct Admitted {
    /// The descriptor that it passes, if it passes a back channel.
    pub(super) back_channel: Option<OwnedFd>,
    /// Duplicates of other sockets, which the crate does not keep. Others may lie in them that take
    /// long to close. They are to be closed by [`close`] after the message is handled.
    pub(super) sockets: Vec<OwnedFd>,
}

/// Waits for the next message and leaves it to be read by the crate. What the device does not know
/// is answered with an error here, if that was asked for, and else ignored.
///
/// # Errors
/// If the connection ends: by the frontend, or because of what it has sent, or left unread.
pub(super) fn next(connection: &UnixStream, has_acknowledgements: bool) -> Result<Admitted> {
    loop {
        let (header, mut descriptors) = peek(connection)?;
        let [request, flags, size] = header;
        if let Err(error) = descriptors.iter().try_for_each(check_is_local) {
            close(descriptors);
            return Err(Error::ReqHandlerError(error));
        }
        await_room(connection)?;
        if is_known(request) || flags & (VERSION_MASK | REPLY) != VERSION || size > BODY_BYTES_MAX {
            let is_channel = request == SET_BACKEND_REQ_FD && !descriptors.is_empty();
            let back_channel = is_channel.then(|| descriptors.swap_remove(0));
            descriptors.retain(is_socket);
            return Ok(Admitted {
                back_channel,
                sockets: descriptors,
            });
        }
        debug!(request; "a frontend sends a message that the device does not know");
        close(descriptors);
        take(connection, HEADER_BYTES + size as usize)?;
        if flags & NEED_REPLY != 0 && has_acknowledgements {
            refuse(connection, request)?;
        }
    }
}

/// Whether the crate handles a request, be it by an error that ends the connection: that is right
/// where the frontend waits for a reply of another form than an acknowledgement.
fn is_known(request: u32) -> bool {
    // SET_LOG_FD, SEND_RARP and NET_SET_MTU, IOTLB_MSG and SET_VRING_ENDIAN, the crypto sessions
    // and POSTCOPY_LISTEN, VRING_KICK, SET_STATUS, and what later versions add.
    !matches!(
        request,
        7 | 19 | 20 | 22 | 23 | 26 | 27 | 29 | 35 | 39 | 45..
    ) && request != 0
}

/// The header of the next message, and duplicates of the descriptors that come with it; or, where
/// it has none, with a later one that is there too: Linux looks further than it is asked to.
fn peek(connection: &UnixStream) -> Result<([u32; 3], Vec<OwnedFd>)> {
    let mut header = [0; HEADER_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::WAITALL | RecvFlags::CMSG_CLOEXEC;
    let parts = &mut [IoSliceMut::new(&mut header)];
    let received = recvmsg(connection, parts, &mut control, flags);
    let received = received.map_err(|error| Error::SocketBroken(error.into()))?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        close(descriptors);
        let text = "there are too few descriptors left to see what it passes";
        return Err(Error::ReqHandlerError(io::Error::other(text)));
    }
    match received.bytes {
        0 => Err(Error::Disconnected),
        HEADER_BYTES => {
            let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
            Ok(([word(0), word(4), word(8)], descriptors))
        }
        // It has ended, or descriptors come in the middle.
        _ => {
            close(descriptors);
            Err(Error::PartialMessage)
        }
    }
}

/// Waits until the socket has room for a reply, so that sending one does not wait.
fn await_room(connection: &UnixStream) -> Result<()> {
    let mut polls = [PollFd::new(connection, PollFlags::OUT)];
    let limit = Timespec::try_from(REPLY_LIMIT).expect("short");
    match poll(&mut polls, Some(&limit)) {
        Ok(0) => Err(Error::ReqHandlerError(io::Error::other(
            "it leaves its replies unread",
        ))),
        Ok(_) => Ok(()),
        Err(error) => Err(Error::SocketBroken(error.into())),
    }
}

/// Takes a message that is not handled.
fn take(connection: &UnixStream, bytes: usize) -> Result<()> {
    let mut message = [0; HEADER_BYTES + BODY_BYTES_MAX as usize];
    let taken = recv(connection, &mut message[..bytes], RecvFlags::WAITALL);
    let (taken, _) = taken.map_err(|error| Error::SocketBroken(error.into()))?;
    if taken == bytes {
        Ok(())
    } else {
        Err(Error::PartialMessage)
    }
}

/// Acknowledges a message with an error.
fn refuse(connection: &UnixStream, request: u32) -> Result<()> {
    let mut reply = [request, VERSION | REPLY, 8].map(u32::to_ne_bytes).concat();
    reply.extend(1_u64.to_ne_bytes());
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = send(connection, &reply, flags);
    sent.map_err(|error| Error::SocketBroken(error.into()))?;
    Ok(())
}
