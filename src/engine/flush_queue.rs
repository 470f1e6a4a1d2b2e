//! What waits for the next flush of an engine: guests and jobs that have asked for one, writes that
//! must be durable before they are answered (W5), and what a vote can decide only then (S5).
//!
//! All of them share that flush, since it covers whatever was written before it begins.
//!
//! Invariant: while anything waits, a flush is going to begin that takes all of it.

use super::interface::{Mark, Tag};
use crate::common::SectorRange;
use crate::common::operation::RequestId;
use crate::jobs::ChunkId;
use crate::quorum::health::{FlushAsked, FlushEpoch};

/// What a flush is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// A request for a flush.
    Request(Tag),
    /// A write of this range that has a quorum since then. It is answered when the range is
    /// durable.
    Write(Tag, SectorRange, Mark),
    /// The end of a job.
    Job(ChunkId),
    /// A request that has written the winner of a vote, and goes on after the flush.
    Winner {
        request: RequestId,
        /// The guest waits for it.
        of_guest: bool,
    },
}

/// An origin that has no answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    pub(super) origin: Origin,
    /// The last flush, by any engine, that had begun when it joined: later ones cover it.
    pub(super) since: FlushEpoch,
    /// What the guest knew when it joined.
    pub(super) asked: FlushAsked,
    /// What it waits for is durable on enough replicas.
    pub(super) is_durable: bool,
}

impl Origin {
    /// The range that must be durable. `None`: all that was written.
    pub(super) fn range(self) -> Option<SectorRange> {
        match self {
            Self::Write(_, range, _) => Some(range),
            Self::Request(_) | Self::Job(_) | Self::Winner { .. } => None,
        }
    }
}

/// The queue.
#[derive(Debug, Default)]
pub(super) struct FlushQueue {
    waiting: Vec<Waiting>,
    /// Emptied lists, for reuse.
    spare: Vec<Vec<Waiting>>,
    /// Origins without an answer, those of flushes in flight included.
    unanswered: usize,
}

impl FlushQueue {
    /// Waits for the next flush. `true` if that one must be begun for it.
    #[must_use]
    pub(super) fn join(&mut self, origin: Origin, since: FlushEpoch, asked: FlushAsked) -> bool {
        let first = self.waiting.is_empty();
        self.waiting.push(Waiting {
            origin,
            since,
            asked,
            is_durable: false,
        });
        self.unanswered += 1;
        first
    }

    /// A flush begins for all that waits.
    pub(super) fn take(&mut self) -> Vec<Waiting> {
        let empty = self.spare.pop().unwrap_or_default();
        std::mem::replace(&mut self.waiting, empty)
    }

    /// An origin has its answer.
    pub(super) fn answered(&mut self) {
        self.unanswered -= 1;
    }

    /// Keeps the memory of a list that a flush has emptied.
    pub(super) fn recycle(&mut self, emptied: Vec<Waiting>) {
        assert!(emptied.is_empty(), "every origin is answered");
        // An engine has one flush in flight and one that waits.
        if self.spare.len() < 2 {
            self.spare.push(emptied);
        }
    }

    /// Origins without an answer.
    pub(super) fn unanswered(&self) -> usize {
        self.unanswered
    }

    /// Those that wait for the next flush.
    pub(super) fn waiting(&self) -> &[Waiting] {
        &self.waiting
    }
}
