//! Operations on replicas: those that have no reply, and what is remembered of the others.

use std::time::Duration;

use super::plan::PLACES;
use crate::common::operation::{Action, Operation, RequestId};
use crate::common::{Errno, SectorRange};

/// An operation that has no reply.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) operation: Operation,
    pub(super) worker: usize,
    pub(super) fault: Fault,
    /// The sectors on which it has still to take effect, a mask.
    pub(super) sectors: u64,
    /// Of a question: where it has seen data, a mask.
    pub(super) data: u64,
    /// The number of the guest write that it belongs to.
    pub(super) write: Option<u64>,
    /// It writes what a preferred replica holds (W12).
    pub(super) preferred: bool,
    /// That write was held since: the operation does not count for the next attempt.
    pub(super) outdated: bool,
    /// Its fault is that there is no space left.
    pub(super) no_space: bool,
    /// It reads a part of a range whose read has failed.
    pub(super) part: bool,
    pub(super) submitted_at: Duration,
    /// The round in which it was submitted.
    pub(super) round: u64,
    /// [`Ledger::failures`](super::ledger::Ledger::failures) of the replica when it was submitted.
    pub(super) failures: u32,
    /// [`Ledger::evictions`](super::ledger::Ledger::evictions) of the replica when it was
    /// submitted.
    pub(super) evictions: u32,
    /// It belongs to a job.
    pub(super) background: bool,
    /// It does nothing before.
    pub(super) not_before: Duration,
    /// Its reply is delivered late.
    pub(super) late: bool,
    /// The operation has ended with this reply, and an error reports the loss of these sectors.
    pub(super) done: Option<(Result<(), Errno>, u64)>,
}

/// An operation that has ended while others of its request are in flight.
#[derive(Clone, Copy, Debug)]
pub(super) struct Took {
    pub(super) worker: usize,
    pub(super) request: RequestId,
    pub(super) replica: usize,
    pub(super) time: Duration,
    pub(super) success: bool,
    pub(super) reads: bool,
}

/// When something last happened. Of two inputs that overlap the one may not know of the other.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LastTime {
    at: Duration,
    before: Duration,
}

impl LastTime {
    pub(super) fn set(&mut self, now: Duration) {
        if self.at < now {
            *self = Self {
                at: now,
                before: self.at,
            };
        }
    }

    /// The last time before this moment.
    pub(super) fn before(self, now: Duration) -> Duration {
        if self.at < now { self.at } else { self.before }
    }
}

/// What a worker has seen: when a replica had ended an operation for which others wait.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looked {
    pub(super) yielded: [u32; PLACES],
    pub(super) at: [Duration; PLACES],
    /// When it last looked.
    pub(super) last: Duration,
    /// Something has ended since the worker looked.
    pub(super) replied: [bool; PLACES],
}

/// The fault that is injected into an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// It fails; a write takes effect on some sectors.
    Error,
    /// It succeeds without effect on some sectors.
    Lost,
    /// The write lands this many sectors further on.
    Misdirected(usize),
}

impl Flight {
    pub(super) fn replica(&self) -> usize {
        self.operation.replica.as_usize()
    }

    pub(super) fn name(&self) -> &'static str {
        match (&self.operation.action, self.write) {
            (Action::Read { .. }, _) if self.part => "read of a part",
            (Action::Read { .. }, _) => "read",
            (Action::Write { .. }, Some(_)) => "write",
            (Action::Write { .. }, None) => "rewrite",
            (Action::Zero { .. }, _) => "zero",
            (Action::FindData { .. }, _) => "question",
            (Action::Flush, _) => "flush",
            (Action::Record { .. }, _) => "write to the record",
        }
    }

    /// It writes the winner of a vote, or copies it in a resync.
    pub(super) fn is_repair(&self) -> bool {
        let writes = matches!(
            self.operation.action,
            Action::Write { .. } | Action::Zero { .. }
        );
        writes && self.write.is_none()
    }

    /// It may take much longer than a read or a write.
    pub(super) fn is_long(&self) -> bool {
        self.operation.action.is_long()
    }

    /// Whether a job asks for holes.
    pub(super) fn is_question(&self) -> bool {
        matches!(self.operation.action, Action::FindData { .. })
    }

    pub(super) fn is_flush(&self) -> bool {
        matches!(self.operation.action, Action::Flush)
    }

    /// Its request waits for it, unless the replica is evicted. A read that has a quorum does not.
    /// Nor does a job that asks for holes: after a while it reads.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.reads() && !matches!(self.operation.action, Action::FindData { .. })
    }

    pub(super) fn reads(&self) -> bool {
        matches!(self.operation.action, Action::Read { .. })
    }

    pub(super) fn range(&self) -> Option<SectorRange> {
        match &self.operation.action {
            Action::Read { range, .. }
            | Action::Write { range, .. }
            | Action::Zero { range, .. }
            | Action::FindData { range, .. } => Some(*range),
            Action::Flush | Action::Record { .. } => None,
        }
    }
}
