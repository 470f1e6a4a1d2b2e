//! The engine's part of [`jobs`](crate::jobs): the engine of the first worker asks for the next
//! chunk when one has ended, when it is time, or when something has changed, and runs it like a
//! request of the guest.

use std::time::Duration;

use super::Engine;
use super::context::Core;
use super::interface::Effects;
use super::shared::WorkerIndex;
use crate::jobs::{Chunk, ChunkEnd, ChunkId, Next};

/// The worker that runs the jobs.
const WORKER: WorkerIndex = WorkerIndex(0);

/// What an engine knows of jobs.
#[derive(Debug, Default)]
pub(super) struct Background {
    /// [`Engine::next_chunk`] is to be called.
    due: bool,
    /// When the next chunk is due at the latest.
    at: Option<Duration>,
    stopped: bool,
    /// Chunks that have ended and are not with their jobs yet.
    ended: Vec<(ChunkId, ChunkEnd)>,
    /// Requests of the guest so far.
    requests: u64,
}

impl Background {
    /// When the next chunk is due.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.at
    }

    /// Whether [`Engine::next_chunk`] is to be called.
    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    /// Begins no chunk from now on.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        self.at = None;
    }
}

impl Core {
    /// The guest has made a request.
    pub(super) fn count_request(&mut self) {
        self.background.requests += 1;
        self.shared
            .count_requests(self.worker, self.background.requests);
    }

    /// Looks for a chunk: time has passed, or something has changed.
    pub(super) fn check_for_work(&mut self) {
        let anything = self.shared.has_jobs() || self.shared.anything_stale();
        self.background.due =
            self.worker == WORKER && (anything || !self.background.ended.is_empty());
        self.background.at = None;
    }

    /// A chunk has ended.
    pub(super) fn chunk_ended(&mut self, id: ChunkId, end: ChunkEnd) {
        self.background.ended.push((id, end));
        self.background.due = true;
    }
}

impl Engine {
    /// The next chunk of a job, if any is due.
    pub(super) fn next_chunk(&mut self, effects: &mut impl Effects) -> Option<Chunk> {
        let core = &mut self.core;
        let (now, guest) = (core.clock.now(), core.shared.guest_requests());
        let background = &mut core.background;
        let report = |event| effects.job_changed(event);
        let next = core.shared.jobs(report, |jobs, health| {
            for (id, end) in background.ended.drain(..) {
                jobs.ended(now, guest, id, &end, health);
            }
            if background.stopped {
                Next::Nothing
            } else {
                jobs.next(now, guest, health)
            }
        });
        background.at = None;
        match next {
            Next::Chunk(chunk) => return Some(chunk),
            Next::At(at) => background.at = Some(at),
            Next::Nothing => {}
        }
        background.due = false;
        None
    }
}
