//! Stands between a frontend and the `vhost` crate.
//!
//! The crate closes what it does not want of the descriptors that come with a message, or in the
//! middle of one; it ends the connection when it does not know the message, or when it comes in
//! parts; and it waits for room for its reply. So the crate has one end of a socket pair. It gets
//! there what it knows, whole, with descriptors that are closed at once. What it answers is sent on
//! from there.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use log::debug;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost::vhost_user::message::MAX_ATTACHED_FD_ENTRIES;
use vhost::vhost_user::{Error, Result};

use crate::limits::REPLY_LIMIT;
use crate::untrusted::close::close;
use crate::untrusted::descriptor::{check_is_local, is_socket};

/// Bytes of a header: request, flags and size of the body.
const HEADER_BYTES: usize = 12;

/// Longest body, as in the crate.
const BODY_BYTES_MAX: usize = 0x1000;

/// Most descriptors that Linux passes at once.
const DESCRIPTORS_AT_ONCE_MAX: usize = 253;

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;

/// Flags of a header: the version, and whether a reply is asked for.
const VERSION_MASK: u32 = 3;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// A connection, and the socket that leads to the crate.
pub(super) struct Intake {
    connection: UnixStream,
    inner: UnixStream,
}

/// A message that the crate has been given.
pub(super) struct Admitted {
    /// The descriptor that it passes, if it passes a back channel.
    pub(super) back_channel: Option<OwnedFd>,
    /// Duplicates of other sockets, which the crate does not keep. Others may lie in them that take
    /// long to close. They are to be dropped when the message is handled.
    _sockets: Passed,
}

/// Descriptors that a frontend has passed, which may take long to close.
#[derive(Default)]
struct Passed(Vec<OwnedFd>);

impl Drop for Passed {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            close(std::mem::take(&mut self.0));
        }
    }
}

/// A message as it has come.
struct Message {
    request: u32,
    flags: u32,
    /// With its header.
    bytes: Vec<u8>,
    passed: Passed,
}

impl Intake {
    /// The other end of the pair is for the crate.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub(super) fn new(connection: UnixStream) -> io::Result<(Self, UnixStream)> {
        let (inner, end) = UnixStream::pair()?;
        Ok((Self { connection, inner }, end))
    }

    pub(super) fn connection(&self) -> &UnixStream {
        &self.connection
    }

    /// Waits for the next message and gives it to the crate. What the device does not know is
    /// answered with an error here, if that was asked for, and else ignored.
    ///
    /// # Errors
    /// If the connection ends: by the frontend, or because of what it has sent, or left unread.
    pub(super) fn next(&self, has_acknowledgements: bool) -> Result<Admitted> {
        loop {
            let mut message = self.receive()?;
            if is_known(message.request) {
                let sent = send(&self.inner, &message.bytes, &message.passed.0);
                // It is not the frontend that has ended this one.
                sent.map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
                let passed = &mut message.passed.0;
                let is_channel = message.request == SET_BACKEND_REQ_FD && !passed.is_empty();
                let back_channel = is_channel.then(|| passed.swap_remove(0));
                passed.retain(is_socket);
                return Ok(Admitted {
                    back_channel,
                    _sockets: message.passed,
                });
            }
            let request = message.request;
            debug!(request; "a frontend sends a message that the device does not know");
            if message.flags & NEED_REPLY != 0 && has_acknowledgements {
                let mut reply = [request, VERSION | REPLY, 8].map(u32::to_ne_bytes).concat();
                reply.extend(1_u64.to_ne_bytes());
                send(&self.connection, &reply, &[])?;
            }
        }
    }

    /// Sends on what the crate has answered.
    ///
    /// # Errors
    /// If the connection has ended, or the frontend leaves its replies unread.
    pub(super) fn send_replies(&self) -> Result<()> {
        let mut bytes = [0; HEADER_BYTES + BODY_BYTES_MAX];
        loop {
            let mut passed = Passed::default();
            match receive_part(&self.inner, &mut bytes, RecvFlags::DONTWAIT, &mut passed) {
                Ok(0) => return Ok(()),
                Ok(count) => send(&self.connection, &bytes[..count], &passed.0)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(ended(error)),
            }
        }
    }

    /// Waits for a whole message, and what is passed with any part of it.
    fn receive(&self) -> Result<Message> {
        let mut passed = Passed::default();
        let mut bytes = vec![0; HEADER_BYTES];
        self.receive_all(&mut bytes, &mut passed)?;
        let word = |at: usize| u32::from_ne_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
        let (request, flags, body_bytes) = (word(0), word(4), word(8) as usize);
        if flags & (VERSION_MASK | REPLY) != VERSION || body_bytes > BODY_BYTES_MAX {
            return Err(Error::InvalidMessage);
        }
        bytes.resize(HEADER_BYTES + body_bytes, 0);
        self.receive_all(&mut bytes[HEADER_BYTES..], &mut passed)?;
        Ok(Message {
            request,
            flags,
            bytes,
            passed,
        })
    }

    fn receive_all(&self, mut bytes: &mut [u8], passed: &mut Passed) -> Result<()> {
        let mut is_first = true;
        while !bytes.is_empty() {
            let received = receive_part(&self.connection, bytes, RecvFlags::empty(), passed);
            match received.map_err(ended)? {
                0 if is_first => return Err(Error::Disconnected),
                0 => return Err(Error::PartialMessage),
                count => bytes = &mut bytes[count..],
            }
            is_first = false;
            passed
                .0
                .iter()
                .try_for_each(check_is_local)
                .map_err(Error::ReqHandlerError)?;
            if passed.0.len() > MAX_ATTACHED_FD_ENTRIES {
                return Err(Error::IncorrectFds);
            }
        }
        Ok(())
    }
}

/// The frontend has ended the connection, or something else has.
fn ended(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(_) => Error::SocketBroken(error),
        None => Error::ReqHandlerError(error),
    }
}

/// Receives some bytes, and what is passed with them. Linux adds nothing that comes later.
fn receive_part(
    socket: &UnixStream,
    bytes: &mut [u8],
    flags: RecvFlags,
    passed: &mut Passed,
) -> io::Result<usize> {
    let mut space =
        [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_AT_ONCE_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = flags | RecvFlags::CMSG_CLOEXEC;
    let parts = &mut [IoSliceMut::new(bytes)];
    let received = retry_on_intr(|| recvmsg(socket, parts, &mut control, flags))?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            passed.0.extend(descriptors);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        let text = "there are too few descriptors left for what it passes";
        return Err(io::Error::other(text));
    }
    Ok(received.bytes)
}

/// Sends bytes, and descriptors with the first of them. Waits for room, but not forever.
fn send(socket: &UnixStream, mut bytes: &[u8], descriptors: &[OwnedFd]) -> Result<()> {
    let limit = Timespec::try_from(REPLY_LIMIT).expect("short");
    let broken = |error: Errno| Error::SocketBroken(error.into());
    let mut descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    while !bytes.is_empty() {
        let mut polls = [PollFd::new(socket, PollFlags::OUT)];
        if retry_on_intr(|| poll(&mut polls, Some(&limit))).map_err(broken)? == 0 {
            let text = "it leaves its replies unread";
            return Err(Error::ReqHandlerError(io::Error::other(text)));
        }
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(count) => {
                bytes = &bytes[count..];
                descriptors.clear();
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(broken(error)),
        }
    }
    Ok(())
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
