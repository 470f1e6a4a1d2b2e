//! The way of a report from the threads that serve the guest to the one that tells the operator.
//!
//! Invariants:
//! - [`push`](EventQueue::push) waits for no reader: it holds one lock that is never held over a
//!   system call, and writes at most one eventfd, which is non-blocking.
//! - The map of what was found where is kept behind a lock of its own, which is held as shortly.
//! - What nobody takes stays bounded: it is folded (`fold`) and remains counted.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use vmm_sys_util::eventfd::EventFd;

use super::events::{Event, Notice};
use super::fold::{Fold, FoldLimits};
use super::map::DiskMap;
use crate::common::{NOT_POISONED, ReplicaIndex, SectorRange};
use crate::limits::{EVENT_BURST, EVENT_WINDOW_MS, REPLICAS_MAX};

/// Twice (see [`FoldLimits::ready_max`]) what a burst of every replica comes to.
const READY_MAX: usize = 2 * REPLICAS_MAX * EVENT_BURST as usize;

/// Far above the kinds that occur: three operations on each replica, and about forty errors each.
const KINDS_MAX: usize = REPLICAS_MAX * EVENT_BURST as usize;

/// Reports on their way to the [`Publisher`](super::publisher::Publisher).
pub struct EventQueue {
    state: Mutex<State>,
    /// Sees everything, before it is folded.
    map: Mutex<DiskMap>,
    /// Readable when there is something new for the publisher.
    wake: EventFd,
    /// The zero of the folding's time.
    opened_at: Instant,
}

struct State {
    fold: Fold,
    closed: bool,
}

/// What the publisher finds when it looks.
pub(super) struct Batch {
    pub(super) events: Vec<Event>,
    /// Look again after this long even if nothing wakes you.
    pub(super) again_in: Option<Duration>,
    /// Nothing will come after this batch.
    pub(super) last: bool,
}

impl EventQueue {
    /// An empty queue.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            state: Mutex::new(State {
                fold: Fold::new(FoldLimits {
                    burst: EVENT_BURST,
                    window: Duration::from_millis(EVENT_WINDOW_MS),
                    ready_max: READY_MAX,
                    kinds_max: KINDS_MAX,
                }),
                closed: false,
            }),
            map: Mutex::new(DiskMap::new()),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            opened_at: Instant::now(),
        }))
    }

    /// Hands over news of this moment. Never waits for a reader, never fails.
    pub fn push(&self, notice: impl Into<Notice>) {
        let event = Event {
            notice: notice.into(),
            made_at: SystemTime::now(),
            suppressed: 0,
        };
        self.map().record(&event.notice);
        let wake = {
            let mut state = self.state();
            state.fold.push(self.opened_at.elapsed(), event)
        };
        if wake {
            self.wake();
        }
    }

    /// Sectors of a replica that were wrong have been written with the winner. Nobody is told; the
    /// map remembers it.
    pub fn mended(&self, replica: ReplicaIndex, range: SectorRange) {
        self.map().mended(replica, range);
    }

    /// The place of this replica is that of another one now: the map forgets what was found there.
    pub fn forget(&self, replica: ReplicaIndex) {
        self.map().forget(replica);
    }

    /// Where on the disk which replica was bad.
    pub(super) fn map(&self) -> MutexGuard<'_, DiskMap> {
        // Counts and ranges are whole between any two statements that could panic.
        self.map.lock().expect(NOT_POISONED)
    }

    /// In how many sectors a replica was wrong when they were last looked at.
    pub fn corrupt_sectors(&self, replica: ReplicaIndex) -> u64 {
        self.map().corrupt_sectors(replica)
    }

    /// In how many sectors reads failed for want of a winner, since the last scrub.
    pub fn undecided_sectors(&self) -> u64 {
        self.map().undecided_sectors()
    }

    /// Takes what is to be sent now; everything, once the queue was closed.
    pub(super) fn take(&self) -> Batch {
        // Before looking: a push after the look makes it readable again.
        let _ = self.wake.read();
        let mut state = self.state();
        if state.closed {
            return Batch {
                events: state.fold.take_all(),
                again_in: None,
                last: true,
            };
        }
        let now = self.opened_at.elapsed();
        let (events, again_at) = state.fold.take(now);
        Batch {
            events,
            again_in: again_at.map(|at| at.saturating_sub(now)),
            last: false,
        }
    }

    /// Makes the next batch the last one.
    pub(super) fn close(&self) {
        self.state().closed = true;
        self.wake();
    }

    fn wake(&self) {
        // It can fail only when the counter is full, and then the publisher is being woken anyway.
        let _ = self.wake.write(1);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counts and lists are whole between any two statements that could panic.
        self.state.lock().expect(NOT_POISONED)
    }
}

impl AsRawFd for EventQueue {
    /// Readable when there is something to take.
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::operation::OperationType;
    use crate::common::report::Report;

    fn failure(sector: u64) -> Report {
        Report::Failure {
            operation: OperationType::Read,
            range: SectorRange::new(sector, 1),
        }
    }

    #[test]
    fn the_first_event_wakes_and_is_there_at_once() {
        let queue = EventQueue::new().unwrap();
        queue.push(failure(1));
        assert_eq!(queue.wake.read().unwrap(), 1);
        let batch = queue.take();
        assert_eq!(batch.events.len(), 1);
        assert!(batch.again_in.is_some());
        queue.push(failure(2));
        assert_eq!(queue.wake.read().unwrap(), 1, "woken again after a take");
    }

    #[test]
    fn nothing_accumulates_without_a_consumer_and_nothing_is_lost() {
        let queue = EventQueue::new().unwrap();
        let pushers: Vec<_> = (0..4)
            .map(|_| {
                let queue = queue.clone();
                std::thread::spawn(move || (0..25_000).for_each(|n| queue.push(failure(n))))
            })
            .collect();
        for pusher in pushers {
            pusher.join().unwrap();
        }
        queue.close();
        let batch = queue.take();
        assert!(batch.last);
        assert!(batch.events.len() <= READY_MAX);
        assert_eq!(
            batch.events.iter().map(Event::stands_for).sum::<u64>(),
            100_000
        );
    }
}
