//! Somebody who is connected: a reader of events, or a client of the monitor, which reads events
//! too once it has negotiated.
//!
//! Invariants: a client is heard only while it has read all that was for it and no command of it
//! runs, so it decides about nobody's memory and time but its own; one that closed its writing side
//! still gets its replies.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::qmp::executor::Executor;
use super::qmp::session::{READ_BYTES, Session, Step};
use super::reader::{LineEnd, Reader};

/// What is read of a client that is about to be disconnected.
const DISCARDED_BYTES_MAX: usize = 1 << 20;

pub(super) struct Client {
    reader: Reader,
    conversation: Option<Conversation>,
    /// What the epoll instance knows of [`Self::interest`].
    pub(super) registered: EventSet,
}

#[derive(Default)]
struct Conversation {
    session: Session,
    /// A command runs.
    busy: bool,
    /// Hears no more, and goes when it has read all.
    closing: bool,
}

impl Client {
    /// A reader of events alone.
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

    /// Sends lines that each stand for so many events, or counts them as missed.
    pub(super) fn tell(
        &mut self,
        name: u64,
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
        self.go_on(name, monitor)
    }

    /// Does what it is ready for. An error is its end.
    pub(super) fn serve(
        &mut self,
        name: u64,
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
        self.go_on(name, monitor)
    }

    /// Takes the reply to the command that runs.
    pub(super) fn answer(
        &mut self,
        name: u64,
        line: &[u8],
        monitor: Option<&Executor>,
    ) -> io::Result<()> {
        self.reader.reply(line);
        if let Some(conversation) = &mut self.conversation {
            conversation.busy = false;
        }
        self.reader.flush()?;
        self.go_on(name, monitor)
    }

    /// Takes the next steps of the conversation, until it has to wait.
    fn go_on(&mut self, name: u64, monitor: Option<&Executor>) -> io::Result<()> {
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
                    *busy = monitor.is_some_and(|monitor| monitor.send(name, call));
                    if !*busy {
                        return Err(ErrorKind::BrokenPipe.into());
                    }
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

    /// Whether it waits for something that is to come.
    pub(super) fn is_behind(&self) -> bool {
        let busy = self
            .conversation
            .as_ref()
            .is_some_and(|conversation| conversation.busy);
        busy || self.reader.is_behind()
    }

    /// To be called before it is closed: to close a socket with unread input would give the other
    /// side an error in place of an end.
    pub(super) fn discard_input(&mut self) {
        // More than a socket holds, of a client that goes on sending too.
        for _ in 0..DISCARDED_BYTES_MAX / READ_BYTES {
            if !matches!(self.reader.read(&mut [0; READ_BYTES]), Ok(1..)) {
                return;
            }
        }
    }

    /// What to be woken for.
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
