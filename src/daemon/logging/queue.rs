//! The lines that wait to be written to stderr, and the thread that writes them.
//!
//! Invariants: a thread that adds a line never waits for the reader of stderr; the queue is
//! bounded, lines that do not fit are counted, and a line says how many there were as soon as
//! stderr takes lines again.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use log::Level;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::floods::{Floods, LeftOut, Site};
use crate::common::NOT_POISONED;
use crate::limits::LOG_QUEUE_BYTES_MAX;
use crate::sandbox;

/// How often a thread looks whether the queue has been written.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// Bytes that a pipe or a socket that is ready takes without waiting: PIPE_BUF.
const READY_BYTES: usize = 4096;

/// The queue, with its bound and what was left out of it.
pub(super) struct Queue {
    state: Mutex<State>,
    /// Notified when there is something to write.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Without a writer, lines are written at once if stderr takes them.
    has_writer: bool,
    lines: Vec<u8>,
    /// Lines that did not fit since the queue was last taken.
    dropped: u64,
    lines_dropped: u64,
    /// The writer has taken lines that it has not written yet.
    is_writing: bool,
    floods: Floods,
}

/// What the writer writes at once, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Batch {
    pub(super) lines: Vec<u8>,
    pub(super) dropped: u64,
    pub(super) left_out: Vec<LeftOut>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Whether a line from `site` is to be written. If not, it is counted.
    pub(super) fn admits(&self, site: Site, level: Level, text: std::fmt::Arguments<'_>) -> bool {
        let mut state = self.state();
        let was_empty = state.floods.due_at().is_none();
        let admits = state.floods.admit(site, level, text, Instant::now());
        if was_empty && !admits {
            self.changed.notify_one();
        }
        admits
    }

    /// Adds a line, or counts it if it does not fit. Lines for debugging leave half of the queue to
    /// the others.
    pub(super) fn push(&self, level: Level, line: &[u8]) {
        let bound = match level {
            Level::Error | Level::Warn | Level::Info => LOG_QUEUE_BYTES_MAX,
            Level::Debug | Level::Trace => LOG_QUEUE_BYTES_MAX / 2,
        };
        let mut state = self.state();
        let written = match !state.has_writer && state.lines.is_empty() {
            true => write_within(line, Duration::ZERO),
            false => 0,
        };
        let line = &line[written..];
        if state.lines.len() + line.len() > bound {
            state.dropped += 1;
            state.lines_dropped += 1;
        } else {
            state.lines.extend_from_slice(line);
            sandbox::set_log_pending(state.has_writer);
            self.changed.notify_one();
        }
    }

    /// Adds a line that may exceed the bound: the last one of the process.
    pub(super) fn push_last(&self, line: &[u8]) {
        let mut state = self.state();
        state.lines.extend_from_slice(line);
        sandbox::set_log_pending(state.has_writer);
        self.changed.notify_one();
    }

    /// How many lines did not fit, since the start.
    pub(super) fn lines_dropped(&self) -> u64 {
        self.state().lines_dropped
    }

    /// Waits until everything is written, for at most `limit`. Works in a thread that panics, too.
    /// Returns whether it is written.
    pub(super) fn flush(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            // A thread that has panicked may hold the lock.
            if let Ok(mut state) = self.state.try_lock() {
                state.floods.end_windows();
                if !state.has_writer {
                    let lines = std::mem::take(&mut state.lines);
                    return write_within(&lines, limit) == lines.len();
                }
                if !state.is_writing && state.is_written() {
                    return true;
                }
                self.changed.notify_one();
            }
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// From now on a thread takes the lines.
    pub(super) fn set_writer(&self) {
        self.state().has_writer = true;
    }

    /// The lines to write next; waits until there are some. To be called again when they are
    /// written.
    pub(super) fn take(&self) -> Batch {
        let mut state = self.state();
        state.is_writing = false;
        loop {
            let left_out = state.floods.take_due(Instant::now());
            if !left_out.is_empty() || !state.is_written() {
                state.is_writing = true;
                return Batch {
                    lines: std::mem::take(&mut state.lines),
                    dropped: std::mem::take(&mut state.dropped),
                    left_out,
                };
            }
            sandbox::set_log_pending(false);
            state = match state.floods.due_at() {
                None => self.changed.wait(state).expect(NOT_POISONED),
                Some(due_at) => {
                    let left = due_at.saturating_duration_since(Instant::now());
                    let waited = self.changed.wait_timeout(state, left);
                    waited.expect(NOT_POISONED).0
                }
            };
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NOT_POISONED)
    }
}

impl State {
    /// Nothing waits for the writer, but for floods that go on.
    fn is_written(&self) -> bool {
        let is_due = self.floods.due_at().is_some_and(|at| at <= Instant::now());
        self.lines.is_empty() && self.dropped == 0 && !is_due
    }
}

/// Writes to stderr, and waits as long as its reader does not read.
///
/// # Errors
/// If the reader is gone.
pub(super) fn write_all(mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(io::stderr(), bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            // Another process may have set O_NONBLOCK.
            Err(Errno::AGAIN) => {
                let stderr = io::stderr();
                let mut polls = [PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::OUT)];
                let _ = poll(&mut polls, None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes as much to stderr as it takes within `limit`. Returns how many bytes.
pub(super) fn write_within(bytes: &[u8], limit: Duration) -> usize {
    let deadline = Instant::now() + limit;
    let stderr = io::stderr();
    let mut written = 0;
    while written < bytes.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).expect("a short time");
        let mut polls = [PollFd::from_borrowed_fd(stderr.as_fd(), PollFlags::OUT)];
        let rest = &bytes[written..bytes.len().min(written + READY_BYTES)];
        if poll(&mut polls, Some(&left)) != Ok(1) {
            break;
        }
        match rustix::io::write(&stderr, rest) {
            Ok(count) => written += count,
            Err(_) => break,
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue() -> Queue {
        let queue = Queue::new();
        queue.set_writer();
        queue
    }

    #[test]
    fn lines_that_do_not_fit_are_counted_and_follow_what_did() {
        let queue = queue();
        let line = [b'x'; 1024];
        let fit = LOG_QUEUE_BYTES_MAX / line.len();
        for _ in 0..fit + 3 {
            queue.push(Level::Info, &line);
        }
        let batch = queue.take();
        assert_eq!(batch.lines.len(), fit * line.len());
        assert_eq!(batch.dropped, 3);
        queue.push(Level::Info, b"next\n");
        assert_eq!(queue.take().lines, b"next\n", "there is room again");
        assert_eq!(queue.lines_dropped(), 3);
    }

    #[test]
    fn lines_for_debugging_leave_room_for_the_others() {
        let queue = queue();
        let line = vec![b'x'; LOG_QUEUE_BYTES_MAX / 2];
        queue.push(Level::Trace, &line);
        queue.push(Level::Warn, b"important\n");
        assert!(queue.take().lines.ends_with(b"important\n"));
    }

    #[test]
    fn a_flush_waits_for_what_is_being_written_and_not_for_ever() {
        let queue = queue();
        assert!(queue.flush(Duration::ZERO), "there is nothing to write");
        queue.push(Level::Info, b"line\n");
        assert!(!queue.flush(Duration::ZERO), "not taken");
        queue.take();
        assert!(!queue.flush(Duration::ZERO), "taken and not written");
        thread::scope(|scope| {
            let flushed = scope.spawn(|| queue.flush(crate::limits::LOG_FLUSH_LIMIT * 10));
            // The next take says that the last batch is written; it waits for the next line.
            scope.spawn(|| queue.take());
            assert!(flushed.join().unwrap());
            queue.push(Level::Info, b"next\n");
        });
    }
}
