//! A connection that sends lines to a client that may read slowly.
//!
//! Invariants:
//! - No call blocks: the stream is non-blocking.
//! - The backlog holds whole lines, except for the part of the first one that is written. Events
//!   fill it up to [`EVENT_READER_BACKLOG_BYTES`]; an event that does not fit is counted as missed,
//!   not cut. A reply always fits: a client gets the next one only after it has read the last.
//! - After a missed event no line enters the backlog until it is empty, so QUORUM_EVENTS_MISSED
//!   stands where events are missing.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::SystemTime;

use vmm_sys_util::epoll::EventSet;

use super::events::missed_line;
use crate::limits::EVENT_READER_BACKLOG_BYTES;

/// Bytes of one write. Few enough for Linux to write all or none of them, so even a reader that is
/// disconnected at shutdown gets whole lines.
const WRITE_BYTES_MAX: usize = 16 << 10;

/// The end of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineEnd {
    /// LF, as in text files.
    Newline,
    /// CR LF, as in QMP.
    ReturnNewline,
}

pub(super) struct Reader {
    stream: UnixStream,
    line_end: LineEnd,
    backlog: Vec<u8>,
    /// Bytes of the backlog that are written.
    written: usize,
    /// Events that this reader missed since its last QUORUM_EVENTS_MISSED.
    missed: u64,
    /// Whether the other side may still send.
    input_open: bool,
}

impl Reader {
    pub(super) fn new(stream: UnixStream, line_end: LineEnd) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream,
            line_end,
            backlog: Vec::new(),
            written: 0,
            missed: 0,
            input_open: true,
        })
    }

    /// Queues an event, a line with its end, or counts the events that it stands for as missed.
    pub(super) fn offer(&mut self, line: &[u8], stands_for: u64) -> io::Result<()> {
        if self.missed == 0 && !self.has_room(line.len()) {
            self.flush()?;
        }
        if self.missed > 0 || !self.has_room(line.len()) {
            self.missed += stands_for;
            return Ok(());
        }
        self.event(line);
        Ok(())
    }

    /// Queues a line, given without its end.
    pub(super) fn reply(&mut self, line: &[u8]) {
        self.append(line);
        self.append(match self.line_end {
            LineEnd::Newline => b"\n",
            LineEnd::ReturnNewline => b"\r\n",
        });
    }

    /// Writes as much as the socket accepts, then QUORUM_EVENTS_MISSED if events were missed.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        loop {
            if self.written == self.backlog.len() {
                self.backlog.clear();
                self.written = 0;
                if self.missed == 0 {
                    return Ok(());
                }
                self.event(&missed_line(self.missed, SystemTime::now()));
                self.missed = 0;
            }
            match (&self.stream).write(self.next_write()) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => self.written += written,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads what the client sent. The end of the input does not end the connection: a client that
    /// closes only its writing side, as `nc -N` does, still gets what is sent to it.
    pub(super) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.stream.read(into) {
            Ok(0) => {
                self.input_open = false;
                Ok(0)
            }
            Ok(count) => Ok(count),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the other side may still send.
    pub(super) fn is_input_open(&self) -> bool {
        self.input_open
    }

    /// Whether lines wait to be written.
    pub(super) fn is_behind(&self) -> bool {
        self.written < self.backlog.len() || self.missed > 0
    }

    /// The events that epoll waits for.
    pub(super) fn interest(&self) -> EventSet {
        let mut interest = EventSet::empty();
        interest.set(EventSet::IN, self.input_open);
        interest.set(EventSet::OUT, self.is_behind());
        interest
    }

    fn has_room(&self, bytes: usize) -> bool {
        // `<`, not `<=`: the end of a line may be one byte longer in the backlog.
        self.backlog.len() - self.written + bytes < EVENT_READER_BACKLOG_BYTES
    }

    fn event(&mut self, line: &[u8]) {
        self.reply(line.strip_suffix(b"\n").expect("a line has an end"));
    }

    fn append(&mut self, line: &[u8]) {
        if self.backlog.len() + line.len() > EVENT_READER_BACKLOG_BYTES {
            self.backlog.drain(..self.written);
            self.written = 0;
        }
        self.backlog.extend_from_slice(line);
    }

    /// As many whole lines as fit into one write, or the part of a longer line.
    fn next_write(&self) -> &[u8] {
        let rest = &self.backlog[self.written..];
        let bytes = &rest[..rest.len().min(WRITE_BYTES_MAX)];
        match bytes.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => &bytes[..=end],
            None => bytes,
        }
    }
}

impl AsRawFd for Reader {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::BufRead;

    #[test]
    fn a_stalled_reader_gets_whole_lines_and_one_notice_per_gap() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut reader = Reader::new(ours, LineEnd::Newline).unwrap();
        let line = [b"x".repeat(299).as_slice(), b"\n"].concat();
        let offered: u64 = 10_000;
        for _ in 0..offered {
            reader.offer(&line, 2).unwrap();
            reader.flush().unwrap();
            assert!(reader.backlog.len() <= EVENT_READER_BACKLOG_BYTES);
        }
        assert!(reader.missed > 0 && reader.is_behind());

        let pump = std::thread::spawn(move || {
            while reader.is_behind() {
                reader.flush().unwrap();
            }
            reader.offer(b"last\n", 1).unwrap();
            reader.flush().unwrap();
        });
        let lines: Vec<String> = io::BufReader::new(theirs)
            .lines()
            .map(Result::unwrap)
            .collect();
        pump.join().unwrap();

        let (last, rest) = lines.split_last().unwrap();
        assert_eq!(last, "last");
        let (notice, events) = rest.split_last().unwrap();
        assert!(events.iter().all(|line| line.len() == 299));
        let notice: serde_json::Value = serde_json::from_str(notice).unwrap();
        let missed = notice["data"]["missed"].as_u64().unwrap();
        assert_eq!(missed + 2 * events.len() as u64, 2 * offered);
    }

    #[test]
    fn a_reader_that_closes_its_sending_side_still_gets_lines() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut reader = Reader::new(ours, LineEnd::Newline).unwrap();
        (&theirs).write_all(b"hello?").unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        reader.read(&mut [0; 64]).unwrap();
        assert!(reader.interest().contains(EventSet::IN));
        reader.read(&mut [0; 64]).unwrap();
        assert!(!reader.interest().contains(EventSet::IN));
        reader.offer(b"line\n", 1).unwrap();
        reader.flush().unwrap();
        let mut got = [0; 5];
        (&theirs).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"line\n");
    }
}
