//! What the kernel is asked for, as entries of its submission queue, and what its answers mean.

use std::os::fd::RawFd;

use io_uring::types::{Fd, Fixed, FsyncFlags};
use io_uring::{opcode, squeue};

use super::WatchToken;
use crate::common::operation::{Action, Operation};
use crate::common::{Errno, SECTOR_BYTES, SectorRange};
use crate::replica::zero::{Way, ZEROES, ZEROES_BYTES};
use crate::statistics::Since;

/// The index by which the kernel knows the arena.
pub(super) const ARENA: u16 = 0;

/// What takes a slot of the ring.
pub(super) enum InFlight {
    Operation {
        operation: Operation,
        step: Step,
        done_bytes: usize,
        retries: u32,
        /// Given to a kernel thread at once.
        in_thread: bool,
        since: Since,
    },
    Watch {
        fd: RawFd,
        token: WatchToken,
        state: WatchState,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WatchState {
    /// The kernel tells when the descriptor is written to.
    Armed,
    /// The kernel does not watch it, and will not: it is none that can be. Whoever has the watch
    /// does not know.
    Failed,
    /// It was given back: what still arrives is ignored.
    GivenBack,
}

/// What the kernel is doing for an operation. Most take one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// What it says.
    Itself,
    /// Zeroing in this way.
    Zeroing(Way),
    /// The zeroes are there; they are made durable.
    Persisting,
}

/// What an answer of the kernel means.
pub(super) enum Outcome {
    /// All of it is done.
    Done,
    /// Partly done, or interrupted.
    Again {
        done: usize,
    },
    Failed(Errno),
}

impl Outcome {
    /// `result` is the kernel's, of a step of which `done_bytes` were done before.
    pub(super) fn of(action: &Action, step: Step, done_bytes: usize, result: i32) -> Self {
        match usize::try_from(result) {
            Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => Self::Again { done: 0 },
            Err(_) => Self::Failed(Errno(-result)),
            Ok(done) => {
                let left = match (action, step) {
                    (Action::Read { range, .. } | Action::Write { range, .. }, _)
                    | (Action::Zero { range, .. }, Step::Zeroing(Way::Write)) => {
                        len_of(range.bytes()) - done_bytes
                    }
                    (Action::Flush | Action::Zero { .. }, _) => return Self::Done,
                };
                match done {
                    done if done == left => Self::Done,
                    // The end of the file: it was cut while we had it open.
                    0 => Self::Failed(Errno(libc::EIO)),
                    done => Self::Again { done },
                }
            }
        }
    }
}

impl InFlight {
    /// The entry that asks for it, or for what is left of it.
    pub(super) fn entry(&mut self, arena_registered: bool) -> squeue::Entry {
        match self {
            Self::Watch { fd, .. } => opcode::PollAdd::new(Fd(*fd), POLLIN).multi(true).build(),
            Self::Operation {
                operation,
                step,
                done_bytes,
                in_thread,
                ..
            } => {
                let file = Fixed(u32::from(operation.replica.0));
                let skip = *done_bytes;
                match &mut operation.action {
                    Action::Read { range, into } => {
                        let registered = arena_registered && into.is_in_arena();
                        let offset = range.start * SECTOR_BYTES + skip as u64;
                        let rest = &mut into[skip..];
                        let (memory, len) = (rest.as_mut_ptr(), u32_of(rest.len()));
                        if registered {
                            opcode::ReadFixed::new(file, memory, len, ARENA)
                                .offset(offset)
                                .build()
                        } else {
                            opcode::Read::new(file, memory, len).offset(offset).build()
                        }
                    }
                    Action::Write {
                        range,
                        data,
                        offset_bytes,
                        durable,
                    } => {
                        let from = *offset_bytes + skip;
                        let rest = &data[from..*offset_bytes + len_of(range.bytes())];
                        let (memory, len) = (rest.as_ptr(), u32_of(rest.len()));
                        let offset = range.start * SECTOR_BYTES + skip as u64;
                        let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                        let entry = if arena_registered && data.is_in_arena() {
                            let write = opcode::WriteFixed::new(file, memory, len, ARENA);
                            write.offset(offset).rw_flags(flags).build()
                        } else {
                            let write = opcode::Write::new(file, memory, len);
                            write.offset(offset).rw_flags(flags).build()
                        };
                        if *in_thread {
                            entry.flags(squeue::Flags::ASYNC)
                        } else {
                            entry
                        }
                    }
                    Action::Zero { range, .. } => match step {
                        Step::Zeroing(way) => zeroing(file, *way, *range, skip),
                        Step::Itself | Step::Persisting => persisting(file),
                    },
                    Action::Flush => persisting(file),
                }
            }
        }
    }
}

fn persisting(file: Fixed) -> squeue::Entry {
    opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build()
}

fn zeroing(file: Fixed, way: Way, range: SectorRange, skip: usize) -> squeue::Entry {
    let start = range.start * SECTOR_BYTES;
    match way.fallocate_flags() {
        Some(flags) => opcode::Fallocate::new(file, range.bytes())
            .offset(start)
            .mode(flags.bits().cast_signed())
            .build(),
        None => {
            let len = (len_of(range.bytes()) - skip).min(ZEROES_BYTES);
            opcode::Write::new(file, ZEROES.0.as_ptr(), u32_of(len))
                .offset(start + skip as u64)
                .build()
        }
    }
}

const POLLIN: u32 = libc::POLLIN.cast_unsigned() as u32;

pub(super) fn len_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a piece fits memory")
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("a piece is at most 1 MiB")
}
