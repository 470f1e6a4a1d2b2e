//! The operations and watches of a ring that are in flight.
//!
//! Invariants, which hold in production too:
//! - Each operation in the table has exactly one submission with the kernel, and each completion
//!   belongs to exactly one entry. The user data of a submission is the entry's slot and a serial
//!   number, so a completion cannot be taken for that of a later submission in the same slot.
//! - An operation stays in the table, with its buffer, until its last completion.

#![forbid(unsafe_code)]

use std::os::fd::RawFd;

use io_uring::types::Fd;
use io_uring::{opcode, squeue};
use rustix::event::PollFlags;
use slab::Slab;

use super::WatchToken;
use super::kernel::KernelCompletion;
use super::operation::PendingOperation;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::REPLICAS_MAX;

/// The operations and watches in flight.
pub(super) struct Table {
    slots: Slab<Slot>,
    /// Operations on each replica.
    by_replica: [usize; REPLICAS_MAX],
    operations: usize,
    watches: usize,
    /// Operations that a kernel thread carries out from the start.
    long_writes: usize,
    /// Submissions of operations that the kernel has not completed.
    submitted_operations: usize,
    last_serial: u32,
}

struct Slot {
    work: Work,
    /// The user data of the submission that the kernel has.
    submission: Option<u64>,
}

/// An entry of the table.
pub(super) enum Work {
    Operation(PendingOperation),
    Watch(PendingWatch),
}

/// A watched descriptor.
pub(super) struct PendingWatch {
    pub(super) fd: RawFd,
    pub(super) token: WatchToken,
    pub(super) state: WatchState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WatchState {
    /// The kernel reports each write to the descriptor.
    Armed,
    /// The kernel cannot watch this descriptor. The owner of the watch does not know.
    Failed,
    /// The owner has ended the watch; completions that still arrive are ignored.
    Ended,
}

impl Table {
    pub(super) fn new() -> Self {
        Self {
            slots: Slab::new(),
            by_replica: [0; REPLICAS_MAX],
            operations: 0,
            watches: 0,
            long_writes: 0,
            submitted_operations: 0,
            last_serial: 0,
        }
    }

    pub(super) fn operations(&self) -> usize {
        self.operations
    }

    pub(super) fn long_writes(&self) -> usize {
        self.long_writes
    }

    /// The replicas with operations in flight.
    pub(super) fn busy_replicas(&self) -> ReplicaSet {
        let is_busy = |replica: &ReplicaIndex| self.by_replica[replica.as_usize()] > 0;
        ReplicaSet::first(REPLICAS_MAX)
            .iter()
            .filter(is_busy)
            .collect()
    }

    pub(super) fn insert_operation(&mut self, operation: PendingOperation) -> usize {
        self.operations += 1;
        self.by_replica[operation.replica().as_usize()] += 1;
        self.long_writes += usize::from(operation.is_long_write());
        self.insert(Work::Operation(operation))
    }

    pub(super) fn insert_watch(&mut self, watch: PendingWatch) -> usize {
        self.watches += 1;
        self.insert(Work::Watch(watch))
    }

    fn insert(&mut self, work: Work) -> usize {
        self.slots.insert(Slot {
            work,
            submission: None,
        })
    }

    /// Removes an operation whose last completion has arrived.
    pub(super) fn remove_operation(&mut self, slot: usize) -> PendingOperation {
        let Slot { work, submission } = self.slots.remove(slot);
        assert_eq!(
            submission, None,
            "an operation ends while the kernel has it"
        );
        let Work::Operation(operation) = work else {
            panic!("a watch is removed as an operation");
        };
        self.operations -= 1;
        self.by_replica[operation.replica().as_usize()] -= 1;
        self.long_writes -= usize::from(operation.is_long_write());
        operation
    }

    /// Removes a watch that the kernel does not have.
    pub(super) fn remove_watch(&mut self, slot: usize) {
        let Slot { work, submission } = self.slots.remove(slot);
        assert_eq!(submission, None, "a watch ends while the kernel has it");
        assert!(
            matches!(work, Work::Watch(_)),
            "an operation is removed as a watch"
        );
        self.watches -= 1;
    }

    pub(super) fn watch(&mut self, slot: usize) -> &mut PendingWatch {
        match &mut self.slots[slot].work {
            Work::Watch(watch) => watch,
            Work::Operation(_) => panic!("an operation is taken for a watch"),
        }
    }

    /// The user data of the submission of an entry, if the kernel has one.
    pub(super) fn submission(&self, slot: usize) -> Option<u64> {
        self.slots[slot].submission
    }

    /// The next submission of an entry. The caller hands it to the kernel.
    pub(super) fn submit(&mut self, slot: usize, arena_registered: bool) -> squeue::Entry {
        self.last_serial = self.last_serial.wrapping_add(1);
        let user_data = user_data(slot, self.last_serial);
        let entry = &mut self.slots[slot];
        assert_eq!(
            entry.submission, None,
            "an entry is submitted while the kernel has it"
        );
        entry.submission = Some(user_data);
        let submission = match &mut entry.work {
            Work::Operation(operation) => {
                self.submitted_operations += 1;
                operation.entry(arena_registered)
            }
            Work::Watch(watch) => opcode::PollAdd::new(Fd(watch.fd), POLL_IN)
                .multi(true)
                .build(),
        };
        submission.user_data(user_data)
    }

    /// The entry that a completion belongs to, and its slot.
    ///
    /// # Panics
    /// If it belongs to none: the kernel and the table disagree about what is in flight, so memory
    /// may be in use that the table has freed.
    pub(super) fn complete(&mut self, completion: &KernelCompletion) -> (usize, &mut Work) {
        let slot = slot_of(completion.user_data);
        let entry = self.slots.get_mut(slot);
        let entry = entry.filter(|entry| entry.submission == Some(completion.user_data));
        let Some(entry) = entry else {
            panic!("{completion:?} belongs to no submission in flight");
        };
        if let Work::Operation(_) = entry.work {
            assert!(
                !completion.more,
                "{completion:?} of an operation announces another completion"
            );
            self.submitted_operations -= 1;
        }
        if !completion.more {
            entry.submission = None;
        }
        (slot, &mut entry.work)
    }

    /// Checks the invariants that hold while no completion is being handled.
    pub(super) fn assert_consistent(&self) {
        assert_eq!(
            self.operations, self.submitted_operations,
            "operations in the ring's table and operations that the kernel has"
        );
        assert_eq!(
            self.operations + self.watches,
            self.slots.len(),
            "operations and watches, and entries of the ring's table"
        );
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }
}

fn user_data(slot: usize, serial: u32) -> u64 {
    let slot = u32::try_from(slot).expect("slots are bounded");
    u64::from(serial) << 32 | u64::from(slot)
}

fn slot_of(user_data: u64) -> usize {
    usize::try_from(user_data & u64::from(u32::MAX)).expect("a slot fits usize")
}

const POLL_IN: u32 = PollFlags::IN.bits() as u32;
