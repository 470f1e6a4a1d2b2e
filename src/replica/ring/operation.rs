//! An operation in flight: the submissions it consists of, and the meaning of their completions.
//!
//! Most operations are one submission. Short reads and writes continue behind the bytes that are
//! done. What the kernel interrupts (EINTR) is repeated at once, and what it has no means for at
//! the moment (EAGAIN) after a pause; a sync is not repeated. Zeroing goes on by bounded steps, so
//! that what else waits for the file gets its turn, and tries one way after another.
//!
//! A write to the record of a replica is made by another thread from the start: the record is open
//! with O_DSYNC, and the thread of the ring must not wait until that is durable.
//!
//! Only a flush makes anything in an image durable: the kernel reports the loss of a page once, to
//! whichever fsync or O_DSYNC write of the open file ends next, and flushes run one at a time (W5).

#![forbid(unsafe_code)]

use io_uring::types::{Fixed, FsyncFlags, Timespec};
use io_uring::{opcode, squeue};

use crate::common::buffer::Buffer;
use crate::common::operation::{Action, Operation, Reply};
use crate::common::{Errno, ReplicaIndex, SECTOR_BYTES, SectorRange};
use crate::limits::{REPLICAS_MAX, ZERO_STEP_BYTES};
use crate::replica::zero::{Way, Ways, ZEROES, ZEROES_BYTES};
use crate::statistics::Since;

/// How often to repeat a submission that the kernel interrupted before that counts as an error.
pub(super) const RETRIES_MAX: u32 = 16;

/// How long to pause before a repetition after EAGAIN: longer and longer, and 700 ms in all, about
/// as long as a replica may take by default. The kernel reads it from here.
static PAUSES: [Timespec; 7] = {
    const MILLISECOND: u32 = 1_000_000;
    let mut pauses = [Timespec::new(); 7];
    let mut place = 0;
    while place < pauses.len() {
        pauses[place] = Timespec::new().nsec(MILLISECOND << place);
        place += 1;
    }
    pauses
};

/// The index of the registered arena among the fixed buffers.
const ARENA: u16 = 0;

/// The place of a replica's file in the table of files that the kernel has.
pub(super) fn place_of(replica: ReplicaIndex) -> u32 {
    u32::from(replica.0)
}

/// The place of its record there, behind those of all files.
pub(super) fn record_place_of(replica: ReplicaIndex) -> u32 {
    u32_of(REPLICAS_MAX) + place_of(replica)
}

/// An operation in flight.
pub(super) struct PendingOperation {
    operation: Operation,
    step: Step,
    /// Bytes of the operation that are done.
    done_bytes: usize,
    /// Submissions in a row that the kernel interrupted.
    retries: u32,
    /// The kernel has a timer instead of the operation.
    pauses: bool,
    carrier: Carrier,
    since: Since,
}

/// Who carries out an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Carrier {
    /// The thread that submits it, as far as it need not wait.
    Submitter,
    /// A kernel thread from the start.
    Thread,
    /// The same, and it is busy for some time.
    LongWrite,
}

/// The part of an operation that its submission carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A read, write or flush.
    Whole,
    /// Zeroing, in this way.
    Zeroing(Way),
}

/// The meaning of a completion for its step.
enum Outcome {
    Done,
    /// So many more bytes are done.
    Partly(usize),
    /// Nothing is done. Again, at once or after a pause.
    Interrupted(Errno),
    Failed(Errno),
}

/// How an operation continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// With another submission.
    Submit,
    /// Likewise: a step of it is done.
    Progress,
    /// Not at all: this is its result.
    End(Result<(), Errno>),
}

impl PendingOperation {
    pub(super) fn new(operation: Operation, carrier: Carrier, since: Since, ways: &Ways) -> Self {
        let step = match &operation.action {
            Action::Zero { unmap, .. } => Step::Zeroing(ways.best(operation.replica, *unmap)),
            Action::Read { .. } | Action::Write { .. } | Action::Flush | Action::Record { .. } => {
                Step::Whole
            }
            Action::FindData { .. } => unreachable!("the kernel is not asked for holes"),
        };
        Self {
            operation,
            step,
            done_bytes: 0,
            retries: 0,
            pauses: false,
            carrier,
            since,
        }
    }

    pub(super) fn replica(&self) -> ReplicaIndex {
        self.operation.replica
    }

    pub(super) fn is_long_write(&self) -> bool {
        self.carrier == Carrier::LongWrite
    }

    /// The reply, and when the operation began.
    pub(super) fn reply(self, result: Result<(), Errno>) -> (Reply, Since) {
        (self.operation.reply(result), self.since)
    }

    /// The submission for what is left of the step.
    pub(super) fn entry(&mut self, arena_registered: bool) -> squeue::Entry {
        if self.pauses {
            return opcode::Timeout::new(self.pause()).build();
        }
        let file = Fixed(place_of(self.operation.replica));
        let done = self.done_bytes;
        let entry = match (&mut self.operation.action, self.step) {
            (Action::Read { range, into }, _) => read(file, *range, into, done, arena_registered),
            (
                Action::Write {
                    range,
                    data,
                    offset_bytes,
                },
                _,
            ) => {
                let fixed = arena_registered && data.is_in_arena();
                let bytes = &data[*offset_bytes..][..len_of(range.bytes())];
                write(file, *range, bytes, done, fixed)
            }
            (Action::Zero { range, .. }, Step::Zeroing(way)) => zero(file, way, *range, done),
            (
                Action::Record {
                    offset_bytes,
                    bytes,
                },
                _,
            ) => {
                let record = Fixed(record_place_of(self.operation.replica));
                write_record(record, *offset_bytes, bytes, done)
            }
            (Action::Zero { .. } | Action::FindData { .. } | Action::Flush, _) => sync(file),
        };
        match self.carrier {
            Carrier::Submitter => entry,
            Carrier::Thread | Carrier::LongWrite => entry.flags(squeue::Flags::ASYNC),
        }
    }

    /// Takes in the completion of its submission.
    pub(super) fn completed(&mut self, result: i32, ways: &mut Ways) -> Next {
        if std::mem::take(&mut self.pauses) {
            return Next::Submit;
        }
        let result = match self.outcome(result) {
            Outcome::Partly(done) => {
                self.done_bytes += done;
                self.retries = 0;
                return match self.step {
                    Step::Zeroing(_) => Next::Progress,
                    Step::Whole => Next::Submit,
                };
            }
            Outcome::Interrupted(errno) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                self.pauses = errno == Errno(libc::EAGAIN);
                return Next::Submit;
            }
            Outcome::Done => Ok(()),
            Outcome::Interrupted(errno) | Outcome::Failed(errno) => Err(errno),
        };
        match self.next_step(result, ways) {
            Some(step) => {
                // Another way goes on where this one has failed.
                (self.step, self.retries) = (step, 0);
                Next::Submit
            }
            None => Next::End(result),
        }
    }

    /// How long to pause before this repetition.
    fn pause(&self) -> &'static Timespec {
        let place = (self.retries as usize).saturating_sub(1);
        &PAUSES[place.min(PAUSES.len() - 1)]
    }

    fn outcome(&self, result: i32) -> Outcome {
        let Ok(done) = usize::try_from(result) else {
            return match -result {
                // Not a sync: this may be the kernel's one report of pages that it has lost.
                errno @ (libc::EINTR | libc::EAGAIN) if self.left_bytes().is_some() => {
                    Outcome::Interrupted(Errno(errno))
                }
                errno => Outcome::Failed(Errno(errno)),
            };
        };
        let Some(left) = self.left_bytes() else {
            return Outcome::Done;
        };
        // A completion of fallocate counts no bytes.
        let done = match self.step {
            Step::Zeroing(Way::PunchHole | Way::ZeroRange) => left.min(ZERO_STEP_BYTES),
            _ => done,
        };
        assert!(
            done <= left,
            "the kernel completed {done} bytes of an operation with {left} bytes left"
        );
        match done {
            done if done == left => Outcome::Done,
            // The end of the file: another program has cut it while it was open.
            0 => Outcome::Failed(Errno(libc::EIO)),
            done => Outcome::Partly(done),
        }
    }

    /// The bytes that are left, if the operation has any.
    fn left_bytes(&self) -> Option<usize> {
        match (&self.operation.action, self.step) {
            (Action::Read { range, .. } | Action::Write { range, .. }, _)
            | (Action::Zero { range, .. }, Step::Zeroing(_)) => {
                Some(len_of(range.bytes()) - self.done_bytes)
            }
            (Action::Record { bytes, .. }, _) => Some(bytes.len() - self.done_bytes),
            (Action::Zero { .. } | Action::FindData { .. } | Action::Flush, _) => None,
        }
    }

    /// The step that follows one with this result.
    fn next_step(&self, result: Result<(), Errno>, ways: &mut Ways) -> Option<Step> {
        let (Step::Zeroing(way), Action::Zero { unmap, .. }, Err(errno)) =
            (self.step, &self.operation.action, result)
        else {
            return None;
        };
        let other = ways.after(self.operation.replica, *unmap, way, errno);
        other.map(Step::Zeroing)
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

fn write(file: Fixed, range: SectorRange, bytes: &[u8], done: usize, fixed: bool) -> squeue::Entry {
    let rest = &bytes[done..];
    let (memory, len) = (rest.as_ptr(), u32_of(rest.len()));
    let offset = offset_of(range, done);
    if fixed {
        let write = opcode::WriteFixed::new(file, memory, len, ARENA);
        write.offset(offset).build()
    } else {
        opcode::Write::new(file, memory, len).offset(offset).build()
    }
}

fn write_record(record: Fixed, offset: u64, bytes: &[u8], done: usize) -> squeue::Entry {
    let rest = &bytes[done..];
    let write = opcode::Write::new(record, rest.as_ptr(), u32_of(rest.len()));
    write.offset(offset + done as u64).build()
}

fn sync(file: Fixed) -> squeue::Entry {
    opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build()
}

fn zero(file: Fixed, way: Way, range: SectorRange, done: usize) -> squeue::Entry {
    let left = len_of(range.bytes()) - done;
    let offset = offset_of(range, done);
    match way.fallocate_flags() {
        Some(flags) => opcode::Fallocate::new(file, left.min(ZERO_STEP_BYTES) as u64)
            .offset(offset)
            .mode(flags.bits().cast_signed())
            .build(),
        None => {
            let len = u32_of(left.min(ZEROES_BYTES));
            opcode::Write::new(file, ZEROES.0.as_ptr(), len)
                .offset(offset)
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
    u32::try_from(len).expect("a submission is a few MiB long at most")
}
