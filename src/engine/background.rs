//! What an engine knows of jobs: whether a chunk is due, and which have ended.

use std::time::Duration;

use crate::jobs::{ChunkEnd, ChunkId};

/// What an engine knows of jobs.
#[derive(Debug, Default)]
pub(super) struct Background {
    /// `Engine::next_chunk` is to be called.
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

    /// Whether `Engine::next_chunk` is to be called.
    pub(super) fn is_due(&self) -> bool {
        self.due
    }

    /// Begins no chunk from now on.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        self.at = None;
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// Counts a request of the guest; returns how many it has made.
    pub(super) fn count_request(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// A chunk has ended.
    pub(super) fn ended(&mut self, id: ChunkId, end: ChunkEnd) {
        self.ended.push((id, end));
        self.due = true;
    }

    /// The chunks that have ended since the last call.
    pub(super) fn take_ended(&mut self) -> impl Iterator<Item = (ChunkId, ChunkEnd)> + '_ {
        self.ended.drain(..)
    }

    /// Time has passed, or something has changed. `anything`: there may be work.
    pub(super) fn check(&mut self, runs_jobs: bool, anything: bool) {
        self.due = runs_jobs && (anything || !self.ended.is_empty());
        self.at = None;
    }

    /// A chunk has begun: there may be another one at once.
    pub(super) fn look_again(&mut self) {
        self.at = None;
    }

    /// No chunk is due before `at`, or before something changes.
    pub(super) fn wait_until(&mut self, at: Option<Duration>) {
        self.due = false;
        self.at = at;
    }
}
