//! The engine's part of [`jobs`](crate::jobs): the engine of the first worker asks for the next
//! chunk of work when one has ended, when time has passed, or when something has changed, and does
//! it like a request of the guest.

use std::time::Duration;

use super::flush::Flush;
use super::read::{Purpose, Read};
use super::{Core, Effects, Engine, Request, WorkerIndex};
use crate::jobs::{Chunk, ChunkEnd, ChunkId, Next, Work};

/// Which worker does the jobs.
const WORKER: WorkerIndex = WorkerIndex(0);

/// What an engine knows of jobs.
#[derive(Debug, Default)]
pub(super) struct Background {
    /// There may be something to do.
    look: bool,
    /// When there is something to do at the latest.
    at: Option<Duration>,
    stopped: bool,
    /// Chunks of work that have ended since the last look.
    ended: Vec<(ChunkId, ChunkEnd)>,
    /// Requests of the guest so far.
    requests: u64,
}

impl Background {
    /// When something is due.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.at
    }

    /// Whether [`Engine::next_work`] is to be called.
    pub(super) fn is_due(&self) -> bool {
        self.look
    }

    /// From now on nothing is begun.
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

    /// Time has passed, or something has changed.
    pub(super) fn check_for_work(&mut self) {
        let anything = self.shared.has_jobs() || self.shared.anything_stale();
        self.background.look =
            self.worker == WORKER && (anything || !self.background.ended.is_empty());
        self.background.at = None;
    }

    /// A chunk of work has ended.
    pub(super) fn chunk_ended(&mut self, id: ChunkId, end: ChunkEnd) {
        self.background.ended.push((id, end));
        self.background.look = true;
    }
}

impl Engine {
    /// The next request of a job, if any is due.
    pub(super) fn next_work(&mut self, effects: &mut impl Effects) -> Option<Request> {
        let core = &mut self.core;
        let (now, guest) = (core.clock.now(), core.shared.guest_requests());
        let background = &mut core.background;
        let tell = |event| effects.job_changed(event);
        let next = core.shared.jobs(tell, |jobs, health| {
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
            Next::Chunk(chunk) => return Some(request(chunk)),
            Next::At(at) => background.at = Some(at),
            Next::Nothing => {}
        }
        background.look = false;
        None
    }
}

fn request(Chunk { id, work }: Chunk) -> Request {
    match work {
        Work::Resync { replica, range } => {
            let purpose = Purpose::Resync { replica, chunk: id };
            Request::Read(Read::of_job(range, purpose))
        }
        Work::Scrub {
            range,
            repair,
            spreads,
        } => {
            let purpose = Purpose::Scrub {
                chunk: id,
                repair,
                spreads,
            };
            Request::Read(Read::of_job(range, purpose))
        }
        Work::Flush => Request::Flush(Flush::of_job(id)),
    }
}
