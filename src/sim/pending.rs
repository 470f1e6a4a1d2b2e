//! What the guest has asked for and has no answer to.

use super::Violation;
use super::ledger::Seen;
use super::model::Moment;
use super::plan::PLACES;
use super::threshold::Thresholds;
use crate::common::SectorRange;
use crate::device::hold::Ticket;
use crate::engine::{Mark, Tag};

/// A guest request that is not answered.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) tag: Tag,
    pub(super) worker: usize,
    pub(super) began: Moment,
    /// The round in which it began.
    pub(super) round: u64,
    /// How many rounds it may take.
    pub(super) rounds: u64,
    pub(super) range: SectorRange,
    /// The sectors of the disk when it began.
    pub(super) disk_sectors: usize,
    pub(super) seen: Seen,
    /// Those that there have been since it began.
    pub(super) thresholds: Thresholds,
    pub(super) kind: PendingKind,
    /// It was held, and is submitted again.
    pub(super) ticket: Option<Ticket>,
    /// When it was written, if it waits for a flush.
    pub(super) written: Option<Mark>,
    /// When it was written, or has failed; 0: it has not.
    pub(super) ended: Moment,
    /// It has succeeded, and the answer waits for the records (S2).
    pub(super) withheld: bool,
}

/// What the guest has asked for.
#[derive(Debug)]
pub(super) enum PendingKind {
    Read,
    Write(PendingWrite),
    Flush,
}

/// A guest write: each has a number, and the bytes that it writes carry it.
#[derive(Debug)]
pub(super) struct PendingWrite {
    pub(super) number: u64,
    /// It writes zeroes. Simulated zeroes carry the number of the write too, so that a read shows
    /// which write it saw.
    pub(super) zeroes: bool,
    /// It must be durable when it is answered.
    pub(super) durable: bool,
    /// It is durable when the flush ends that it waits for; the replicas have written it.
    pub(super) ended: bool,
    /// Where another write was in flight at the same time, a mask.
    pub(super) overlapped: u64,
    /// Where another version was preferred while it waits for its flush (W12), a mask.
    pub(super) preferred: u64,
    /// The replicas that it was submitted to, a mask.
    pub(super) submitted_to: u32,
    /// Those that have written it, a mask.
    pub(super) succeeded: u32,
    /// Those that have replied with an error, a mask.
    pub(super) failed: u32,
    /// [`Ledger::failures`](super::ledger::Ledger::failures) when it was submitted.
    pub(super) failures: [u32; PLACES],
    /// Whether a replica has had no space left for it.
    pub(super) no_space: NoSpace,
}

/// Whether an engine knows of a replica without space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum NoSpace {
    No,
    /// The replica was evicted before its reply, or at the same time.
    Perhaps,
    Yes,
}

impl PendingWrite {
    /// An engine submits it to a replica. Returns its number.
    pub(super) fn note_submission(
        &mut self,
        replica: usize,
        failures: [u32; PLACES],
    ) -> Result<u64, Violation> {
        let number = self.number;
        if self.submitted_to & (1 << replica) != 0 {
            let text = format!("w{number} is submitted to replica {replica} twice");
            return Err(Violation::new("W3", text));
        }
        if self.submitted_to == 0 {
            self.failures = failures;
        }
        self.submitted_to |= 1 << replica;
        Ok(number)
    }
}
