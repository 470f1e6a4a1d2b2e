//! The queue of events, from the threads that serve the guest to the publisher.
//!
//! Invariants:
//! - [`push`](EventQueue::push) waits for no reader: it takes one lock, which is never held during
//!   a system call, and writes at most one eventfd, which does not block.
//! - The map of findings, the log of errors and that of evictions have locks of their own, which
//!   are held as briefly.
//! - Events that are not taken stay bounded: they are folded (`fold`) and remain counted.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use super::errors::{ErrorLog, Errors};
use super::events::{Event, Names, Notice};
use super::flapping::Evictions;
use super::fold::{Fold, FoldLimits};
use super::job_history::{EndedJob, JobHistory};
use super::map::DiskMap;
use super::wake::Wake;
use crate::common::{NOT_POISONED, ReplicaIndex, SectorRange};
use crate::limits::{EVENT_BURST, EVENT_WINDOW_MS, REPLICAS_MAX};
use crate::record::PastJob;

/// Twice (see [`FoldLimits::ready_max`]) a burst of every replica.
const READY_MAX: usize = 2 * REPLICAS_MAX * EVENT_BURST as usize;

/// Far above the kinds that occur: three operations on each replica, and some forty errors of each.
const KINDS_MAX: usize = REPLICAS_MAX * EVENT_BURST as usize;

/// Has the records keep the results of jobs.
pub type KeepJobs = Box<dyn Fn(Vec<PastJob>) + Send + Sync>;

/// Events for the [`Publisher`](super::publisher::Publisher).
pub struct EventQueue {
    state: Mutex<State>,
    /// Gets every notice, before it is folded.
    map: Mutex<DiskMap>,
    /// Likewise.
    errors: Mutex<ErrorLog>,
    /// Likewise.
    evictions: Mutex<Evictions>,
    /// Gets every event when it is sent.
    ended_jobs: Mutex<JobHistory>,
    /// Gets what the records are to keep of the jobs that have ended.
    keep_jobs: OnceLock<KeepJobs>,
    /// Readable when there is something new for the publisher.
    wake: Wake,
    /// The start of the time of the folding.
    opened_at: Instant,
}

struct State {
    fold: Fold,
    closed: bool,
}

/// What the publisher takes at a time.
pub(super) struct Batch {
    pub(super) events: Vec<Event>,
    /// Take again after this time at the latest.
    pub(super) again_in: Option<Duration>,
    /// The queue is closed: no batch follows.
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
            errors: Mutex::default(),
            evictions: Mutex::default(),
            ended_jobs: Mutex::default(),
            keep_jobs: OnceLock::new(),
            wake: Wake::new()?,
            opened_at: Instant::now(),
        }))
    }

    /// Queues a notice with the current time. Does not wait for a reader, and does not fail.
    pub fn push(&self, notice: impl Into<Notice>) {
        let mut event = Event {
            notice: notice.into(),
            made_at: SystemTime::now(),
            suppressed: 0,
        };
        self.map().record(&event.notice);
        event.notice.forget_unlisted();
        self.errors().record(&event.notice, event.made_at);
        self.evictions()
            .record(&event.notice, self.opened_at.elapsed());
        let wake = {
            let mut state = self.state();
            state.fold.push(self.opened_at.elapsed(), event)
        };
        if wake {
            self.wake.signal();
        }
    }

    /// Records in the map that corrupt sectors of a replica were repaired. There is no event for
    /// it.
    pub fn repaired(&self, replica: ReplicaIndex, range: SectorRange) {
        self.map().repaired(replica, range);
    }

    /// Clears the row of the map, the errors and the evictions: a new replica has this index.
    pub fn forget(&self, replica: ReplicaIndex) {
        self.map().forget(replica);
        self.clear_errors(replica);
        self.evictions().forget(replica);
    }

    /// Whether a replica was evicted often of late.
    pub fn is_flapping(&self, replica: ReplicaIndex) -> bool {
        self.evictions()
            .is_flapping(replica, self.opened_at.elapsed())
    }

    /// How much longer the replica is kept out, even if it answers.
    pub fn kept_out_for(&self, replica: ReplicaIndex) -> Duration {
        self.evictions()
            .kept_out_for(replica, self.opened_at.elapsed())
    }

    /// The errors of a replica that are not cleared.
    pub fn errors_of(&self, replica: ReplicaIndex) -> Errors {
        self.errors().of(replica)
    }

    /// The I/O errors of the guest that are not cleared.
    pub fn guest_errors(&self) -> Errors {
        self.errors().of_guest()
    }

    /// Clears the errors of a replica.
    pub fn clear_errors(&self, replica: ReplicaIndex) {
        self.errors().clear(replica);
    }

    /// Clears the I/O errors of the guest.
    pub fn clear_guest_errors(&self) {
        self.errors().clear_guest();
    }

    /// The map of findings.
    pub(super) fn map(&self) -> MutexGuard<'_, DiskMap> {
        self.map.lock().expect(NOT_POISONED)
    }

    /// Sectors of a replica that were corrupt when they were last read.
    pub fn corrupt_sectors(&self, replica: ReplicaIndex) -> u64 {
        self.map().corrupt_sectors(replica)
    }

    /// Keeps the result of a job that has ended, with the names that its replicas have now.
    pub(super) fn keep_result(&self, event: &Event, names: &Names) {
        let past = {
            let mut jobs = self.ended_jobs.lock().expect(NOT_POISONED);
            let has_ended = jobs.record(&event.notice, event.made_at, names);
            has_ended.then(|| jobs.past())
        };
        if let Some((past, keep)) = past.zip(self.keep_jobs.get()) {
            keep(past);
        }
    }

    /// Begins with the jobs that the records have.
    pub fn restore_jobs(&self, jobs: &[PastJob]) {
        self.ended_jobs.lock().expect(NOT_POISONED).restore(jobs);
    }

    /// From now on `keep` gets what the records are to keep, each time that a job has ended.
    pub fn keep_jobs_with(&self, keep: KeepJobs) {
        // Once, at the start.
        let _ = self.keep_jobs.set(keep);
    }

    /// The last jobs that have ended.
    pub fn ended_jobs(&self) -> Vec<EndedJob> {
        self.ended_jobs.lock().expect(NOT_POISONED).list()
    }

    /// Takes the events that are due; all of them once the queue is closed.
    pub(super) fn take(&self) -> Batch {
        // First, so that a later push makes the queue readable again.
        self.wake.clear();
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
        self.wake.signal();
    }

    fn errors(&self) -> MutexGuard<'_, ErrorLog> {
        self.errors.lock().expect(NOT_POISONED)
    }

    fn evictions(&self) -> MutexGuard<'_, Evictions> {
        self.evictions.lock().expect(NOT_POISONED)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect(NOT_POISONED)
    }
}

impl AsRawFd for EventQueue {
    /// Readable when there are events to take.
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::operation::OperationType;
    use crate::common::report::{Report, Requester};

    fn failure(sector: u64) -> Report {
        Report::Failure {
            operation: OperationType::Read,
            range: SectorRange::new(sector, 1),
            requester: Requester::Guest,
            error: None,
            no_space: false,
        }
    }

    #[test]
    fn the_first_event_wakes_the_publisher_at_once() {
        let queue = EventQueue::new().unwrap();
        queue.push(failure(1));
        assert_eq!(queue.wake.clear(), 1);
        let batch = queue.take();
        assert_eq!(batch.events.len(), 1);
        assert!(batch.again_in.is_some());
        queue.push(failure(2));
        assert_eq!(queue.wake.clear(), 1, "woken again after a take");
    }

    #[test]
    fn untaken_events_are_bounded_and_stay_counted() {
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
