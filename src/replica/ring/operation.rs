//! An operation in flight: the submissions it consists of, and the meaning of their completions.
//!
//! Most operations are one submission. Short reads and writes continue behind the bytes that are
//! done, interrupted ones are repeated, zeroing tries one way after another, and durable zeroes end
//! with a sync.

#![forbid(unsafe_code)]

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{opcode, squeue};

use crate::common::buffer::Buffer;
use crate::common::operation::{Action, Operation, Reply};
use crate::common::{Errno, ReplicaIndex, SECTOR_BYTES, SectorRange};
use crate::replica::zero::{Way, Ways, ZEROES, ZEROES_BYTES};
use crate::statistics::Since;

/// How often to repeat a submission that the kernel interrupted before that counts as an error.
pub(super) const RETRIES_MAX: u32 = 16;

/// The index of the registered arena among the fixed buffers.
const ARENA: u16 = 0;

/// An operation in flight.
pub(super) struct PendingOperation {
    operation: Operation,
    step: Step,
    /// Bytes of the step that are done.
    done_bytes: usize,
    /// Submissions in a row that the kernel interrupted.
    retries: u32,
    /// A kernel thread carries it out from the start.
    in_thread: bool,
    since: Since,
}

/// The part of an operation that its submission carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A read, write or flush.
    Whole,
    /// Zeroing, in this way.
    Zeroing(Way),
    /// Making zeroes durable that are in place.
    Persisting,
}

/// The meaning of a completion for its step.
enum Outcome {
    Done,
    /// Done up to these bytes, or interrupted.
    Again {
        done: usize,
    },
    Failed(Errno),
}

/// How an operation continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// With another submission.
    Submit,
    /// Not at all: this is its result.
    End(Result<(), Errno>),
}

impl PendingOperation {
    pub(super) fn new(operation: Operation, in_thread: bool, since: Since, ways: &Ways) -> Self {
        let step = match &operation.action {
            Action::Zero { unmap, .. } => Step::Zeroing(ways.best(operation.replica, *unmap)),
            Action::Read { .. } | Action::Write { .. } | Action::Flush => Step::Whole,
        };
        Self {
            operation,
            step,
            done_bytes: 0,
            retries: 0,
            in_thread,
            since,
        }
    }

    pub(super) fn replica(&self) -> ReplicaIndex {
        self.operation.replica
    }

    pub(super) fn is_in_thread(&self) -> bool {
        self.in_thread
    }

    /// The reply, and when the operation began.
    pub(super) fn reply(self, result: Result<(), Errno>) -> (Reply, Since) {
        (self.operation.reply(result), self.since)
    }

    /// The submission for what is left of the step.
    pub(super) fn entry(&mut self, arena_registered: bool) -> squeue::Entry {
        let file = Fixed(u32::from(self.operation.replica.0));
        let done = self.done_bytes;
        match (&mut self.operation.action, self.step) {
            (Action::Read { range, into }, _) => read(file, *range, into, done, arena_registered),
            (
                Action::Write {
                    range,
                    data,
                    offset_bytes,
                    durable,
                },
                _,
            ) => {
                let fixed = arena_registered && data.is_in_arena();
                let bytes = &data[*offset_bytes..][..len_of(range.bytes())];
                let entry = write(file, *range, bytes, done, *durable, fixed);
                if self.in_thread {
                    entry.flags(squeue::Flags::ASYNC)
                } else {
                    entry
                }
            }
            (Action::Zero { range, .. }, Step::Zeroing(way)) => zero(file, way, *range, done),
            (Action::Zero { .. } | Action::Flush, _) => sync(file),
        }
    }

    /// Takes in the completion of its submission.
    pub(super) fn completed(&mut self, result: i32, ways: &mut Ways) -> Next {
        let result = match self.outcome(result) {
            Outcome::Again { done } if done > 0 || self.retries < RETRIES_MAX => {
                self.done_bytes += done;
                self.retries = if done > 0 { 0 } else { self.retries + 1 };
                return Next::Submit;
            }
            Outcome::Again { .. } => Err(Errno(libc::EINTR)),
            Outcome::Done => Ok(()),
            Outcome::Failed(errno) => Err(errno),
        };
        match self.next_step(result, ways) {
            Some(step) => {
                (self.step, self.done_bytes, self.retries) = (step, 0, 0);
                Next::Submit
            }
            None => Next::End(result),
        }
    }

    fn outcome(&self, result: i32) -> Outcome {
        let Ok(done) = usize::try_from(result) else {
            return match -result {
                libc::EINTR | libc::EAGAIN => Outcome::Again { done: 0 },
                errno => Outcome::Failed(Errno(errno)),
            };
        };
        let Some(left) = self.left_bytes() else {
            return Outcome::Done;
        };
        assert!(
            done <= left,
            "the kernel completed {done} bytes of an operation with {left} bytes left"
        );
        match done {
            done if done == left => Outcome::Done,
            // The end of the file: another program has cut it while it was open.
            0 => Outcome::Failed(Errno(libc::EIO)),
            done => Outcome::Again { done },
        }
    }

    /// The bytes that are left of the step, if its completion counts bytes.
    fn left_bytes(&self) -> Option<usize> {
        match (&self.operation.action, self.step) {
            (Action::Read { range, .. } | Action::Write { range, .. }, _)
            | (Action::Zero { range, .. }, Step::Zeroing(Way::Write)) => {
                Some(len_of(range.bytes()) - self.done_bytes)
            }
            (Action::Zero { .. } | Action::Flush, _) => None,
        }
    }

    /// The step that follows one with this result.
    fn next_step(&self, result: Result<(), Errno>, ways: &mut Ways) -> Option<Step> {
        let (Step::Zeroing(way), Action::Zero { unmap, durable, .. }) =
            (self.step, &self.operation.action)
        else {
            return None;
        };
        match result {
            Ok(()) => durable.then_some(Step::Persisting),
            Err(errno) => {
                let other = ways.after(self.operation.replica, *unmap, way, errno);
                other.map(Step::Zeroing)
            }
        }
    }
}

fn read(
    file: Fixed,
    range: SectorRange,
    into: &mut Buffer,
    done: usize,
    arena_registered: bool,
) -> squeue::Entry {
    let fixed = arena_registered && into.is_in_arena();
    let rest = &mut into[done..];
    let (memory, len) = (rest.as_mut_ptr(), u32_of(rest.len()));
    let offset = offset_of(range, done);
    if fixed {
        let read = opcode::ReadFixed::new(file, memory, len, ARENA);
        read.offset(offset).build()
    } else {
        opcode::Read::new(file, memory, len).offset(offset).build()
    }
}

fn write(
    file: Fixed,
    range: SectorRange,
    bytes: &[u8],
    done: usize,
    durable: bool,
    fixed: bool,
) -> squeue::Entry {
    let rest = &bytes[done..];
    let (memory, len) = (rest.as_ptr(), u32_of(rest.len()));
    let offset = offset_of(range, done);
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    if fixed {
        let write = opcode::WriteFixed::new(file, memory, len, ARENA);
        write.offset(offset).rw_flags(flags).build()
    } else {
        let write = opcode::Write::new(file, memory, len);
        write.offset(offset).rw_flags(flags).build()
    }
}

fn sync(file: Fixed) -> squeue::Entry {
    opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build()
}

fn zero(file: Fixed, way: Way, range: SectorRange, done: usize) -> squeue::Entry {
    match way.fallocate_flags() {
        Some(flags) => opcode::Fallocate::new(file, range.bytes())
            .offset(offset_of(range, 0))
            .mode(flags.bits().cast_signed())
            .build(),
        None => {
            let len = (len_of(range.bytes()) - done).min(ZEROES_BYTES);
            opcode::Write::new(file, ZEROES.0.as_ptr(), u32_of(len))
                .offset(offset_of(range, done))
                .build()
        }
    }
}

fn offset_of(range: SectorRange, done: usize) -> u64 {
    range.start * SECTOR_BYTES + done as u64
}

pub(super) fn len_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("the bytes of an operation fit usize")
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("a submission is at most 1 MiB long")
}
