//! The engine's part of [`jobs`](crate::jobs): the engine of the first worker asks for the next
//! chunk when one has ended, when it is time, or when something has changed, and runs it like a
//! request of the guest.

use super::Engine;
use super::context::Core;
use super::interface::Effects;
use super::repair_gate::Compared;
use super::shared::WorkerIndex;
use crate::common::report::Report;
use crate::jobs::{Chunk, Jobs, Next};
use crate::quorum::health::Health;

/// The worker that runs the jobs.
const WORKER: WorkerIndex = WorkerIndex(0);

impl Core {
    /// The guest has made a request.
    pub(super) fn count_request(&mut self) {
        let requests = self.background.count_request();
        self.shared.count_requests(self.worker, requests);
    }

    /// Whether this is the engine of the first worker.
    pub(super) fn runs_jobs(&self) -> bool {
        self.worker == WORKER
    }

    /// Looks for a chunk: time has passed, or something has changed.
    pub(super) fn check_for_work(&mut self) {
        let anything = self.shared.has_jobs() || self.shared.anything_stale();
        self.background.check(self.worker == WORKER, anything);
    }
}

impl Engine {
    /// The next chunk of a job, if any is due.
    pub(super) fn next_chunk(&mut self, effects: &mut impl Effects) -> Option<Chunk> {
        let core = &mut self.core;
        let (now, guest) = (core.clock.now(), core.shared.guest_requests());
        let waits = core.shared.guest_waits();
        let background = &mut core.background;
        let report = |event| effects.job_changed(event);
        let next = core.shared.jobs(report, |jobs, health| {
            for (id, end) in background.take_ended() {
                jobs.ended(now, guest, id, &end, health);
            }
            if background.is_stopped() {
                Next::Nothing
            } else {
                jobs.guest_waits(waits);
                jobs.next(now, guest, health)
            }
        });
        match core.shared.take_compared() {
            None => {}
            Some(Compared::TooDifferent) => {
                let limit_sectors = core.policy.repair_limit_sectors;
                effects.report(Report::RepairLimit { limit_sectors });
            }
            Some(Compared::Alike) => {
                let report = |event| effects.job_changed(event);
                let repair_found = |jobs: &mut Jobs, health: &Health| jobs.repair_found(health);
                core.shared.jobs(report, repair_found);
                if !matches!(next, Next::Chunk(_)) {
                    return self.next_chunk(effects);
                }
            }
        }
        let at = match next {
            Next::Chunk(chunk) => {
                background.look_again();
                return Some(chunk);
            }
            Next::At(at) => Some(at),
            Next::Nothing => None,
        };
        background.wait_until(at);
        None
    }
}
