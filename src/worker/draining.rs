//! Virtqueues that were stopped while requests of theirs were still in flight.

use std::sync::mpsc::SyncSender;
use std::time::Duration;

use super::guests::Guests;

/// The virtqueues of one worker that are stopped but not drained yet.
#[derive(Default)]
pub(super) struct Draining(Vec<Queue>);

struct Queue {
    slot: usize,
    index: usize,
    /// When to abandon the requests that are still in flight.
    abandon_at: Duration,
    /// Dropped when the virtqueue is drained; the thread that stopped it waits for that.
    _done: SyncSender<()>,
}

impl Draining {
    /// Adds a virtqueue. `done` is dropped when it is drained.
    pub(super) fn push(
        &mut self,
        slot: usize,
        index: usize,
        abandon_at: Duration,
        done: SyncSender<()>,
    ) {
        self.0.push(Queue {
            slot,
            index,
            abandon_at,
            _done: done,
        });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// When the next virtqueue is due to be abandoned.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.0.iter().map(|queue| queue.abandon_at).min()
    }

    /// Abandons the requests of every virtqueue whose time is up.
    pub(super) fn abandon_overdue(&self, now: Duration, guests: &mut Guests) {
        for queue in self.0.iter().filter(|queue| queue.abandon_at <= now) {
            guests.abandon(queue.slot, queue.index);
        }
    }

    /// Reports every virtqueue that is drained now to the thread that stopped it. That thread may
    /// close the call descriptor from then on.
    pub(super) fn finish(&mut self, guests: &mut Guests) {
        if self.0.is_empty() {
            return;
        }
        self.0
            .retain(|queue| !guests.is_drained(queue.slot, queue.index));
        guests.forget_idle();
    }
}
