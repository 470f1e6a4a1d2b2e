//! A connected client: a reader of events, or a client of the monitor, which gets events too once
//! it has negotiated.
//!
//! Invariants: the server reads from a client only while the client has read everything and none of
//! its commands runs, so the memory that it can use is bounded; a client that has closed its
//! writing side still gets its replies.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::qmp::executor::Executor;
use super::qmp::session::{READ_BYTES, Session, Step};
use super::reader::{LineEnd, Reader};

/// At most this many bytes are read from a client and discarded before it is disconnected.
const DISCARDED_BYTES_MAX: usize = 1 << 20;

pub(super) struct Client {
    reader: Reader,
    conversation: Option<Conversation>,
    /// The interest that is registered with epoll.
    pub(super) registered: EventSet,
}

#[derive(Default)]
struct Conversation {
    session: Session,
    /// A command of the client runs.
    busy: bool,
    /// The server reads no more from the client, and disconnects it when it has read everything.
    closing: bool,
}

impl Client {
    /// A reader of events.
    pub(super) fn reader(stream: UnixStream) -> io::Result<Self> {
        Self::new(Reader::new(stream, LineEnd::Newline)?, None)
    }

    /// A client of the monitor.
    pub(super) fn conversation(stream: UnixStream) -> io::Result<Self> {
        let mut reader = Reader::new(stream, LineEnd::ReturnNewline)?;
        reader.reply(&Session::greeting());
        reader.flush()?;
        Self::new(reader, Some(Conversation::default()))
    }

    fn new(reader: Reader, conversation: Option<Conversation>) -> io::Result<Self> {
        let mut client = Self {
            reader,
            conversation,
            registered: EventSet::empty(),
        };
        client.registered = client.interest();
        Ok(client)
    }

    /// Sends lines, each with the number of events that it stands for, or counts them as missed.
    pub(super) fn send_events(
        &mut self,
        token: u64,
        lines: &[(Vec<u8>, u64)],
        monitor: Option<&Executor>,
    ) -> io::Result<()> {
        let wanted = |conversation: &Conversation| conversation.session.is_negotiated();
        if !self.conversation.as_ref().is_none_or(wanted) {
            return Ok(());
        }
        for (line, stands_for) in lines {
            self.reader.offer(line, *stands_for)?;
        }
        self.reader.flush()?;
        self.proceed(token, monitor)
    }

    /// Reads and writes what epoll reports as ready. An error ends the connection.
    pub(super) fn serve(
        &mut self,
        token: u64,
        ready: EventSet,
        monitor: Option<&Executor>,
    ) -> io::Result<()> {
        if ready.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            return Err(ErrorKind::ConnectionReset.into());
        }
        self.reader.flush()?;
        if ready.contains(EventSet::IN) && self.interest().contains(EventSet::IN) {
            let mut bytes = [0; READ_BYTES];
            let count = self.reader.read(&mut bytes)?;
            if let Some(conversation) = &mut self.conversation {
                conversation.session.receive(&bytes[..count]);
            }
        }
        self.proceed(token, monitor)
    }

    /// Sends the reply to the running command.
    pub(super) fn answer(
        &mut self,
        token: u64,
        line: &[u8],
        monitor: Option<&Executor>,
    ) -> io::Result<()> {
        self.reader.reply(line);
        if let Some(conversation) = &mut self.conversation {
            conversation.busy = false;
        }
        self.reader.flush()?;
        self.proceed(token, monitor)
    }

    /// Continues the conversation until it has to wait.
    fn proceed(&mut self, token: u64, monitor: Option<&Executor>) -> io::Result<()> {
        let Some(Conversation {
            session,
            busy,
            closing,
        }) = &mut self.conversation
        else {
            return Ok(());
        };
        while !*busy && !self.reader.is_behind() {
            match session.step().filter(|_| !*closing) {
                Some(Step::Reply(line)) => self.reader.reply(&line),
                Some(Step::Close(line)) => {
                    self.reader.reply(&line);
                    *closing = true;
                }
                Some(Step::Execute(call)) => {
                    monitor.expect("a client of the monitor").send(token, call);
                    *busy = true;
                }
                None if *closing || !self.reader.is_input_open() => {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                None => return Ok(()),
            }
            self.reader.flush()?;
        }
        Ok(())
    }

    /// Whether the client still waits for a reply or has not read everything.
    pub(super) fn is_behind(&self) -> bool {
        let busy = self
            .conversation
            .as_ref()
            .is_some_and(|conversation| conversation.busy);
        busy || self.reader.is_behind()
    }

    /// To be called before the connection is closed: if input is unread then, the client gets an
    /// error instead of an end.
    pub(super) fn discard_input(&mut self) {
        // Bounded, because a client may go on sending. More than a socket buffers.
        for _ in 0..DISCARDED_BYTES_MAX / READ_BYTES {
            if !matches!(self.reader.read(&mut [0; READ_BYTES]), Ok(1..)) {
                return;
            }
        }
    }

    /// The events that epoll waits for.
    pub(super) fn interest(&self) -> EventSet {
        let mut interest = self.reader.interest();
        if self.conversation.is_some() && self.is_behind() {
            interest.remove(EventSet::IN);
        }
        interest
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        self.reader.as_raw_fd()
    }
}
