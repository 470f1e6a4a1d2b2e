//! Counts and latencies of the workers.
//!
//! Invariants: a counter has one writer, its worker, so counting takes no lock and no atomic
//! read-modify-write. A reader sees each counter at some moment, not all of them at the same one.
//! No counter goes down: the totals of a replica that takes the place of another one start anew
//! because readers subtract the totals of the earlier replicas. Nothing is allocated after the
//! start.

#![forbid(unsafe_code)]

mod counter;
mod recorder;
mod times;

use std::sync::Arc;

use self::counter::Counter;
pub use self::recorder::{Recorder, Since};
pub use self::times::Distribution;
use self::times::Histogram;
use crate::common::operation::OperationType;
use crate::common::{ReplicaIndex, SECTOR_BYTES};

/// A kind of guest request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A discard or write-zeroes.
    Zero,
    /// A flush.
    Flush,
}

/// The counters of one worker, on cache lines of their own.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerStatistics {
    /// By [`RequestKind`].
    requests: [Operations; 4],
    /// Requests that were invalid or unsupported.
    rejected: Counter,
    /// By [`OperationType`], requests that failed without a quorum.
    failures: [Counter; 3],
    /// The greatest end of a write.
    written_to_sector: Counter,
    confirmations: Counter,
    confirmations_without_fault: Counter,
    /// By replica and [`OperationType`].
    replicas: Box<[[Operations; 3]]>,
    /// By replica.
    totals: Box<[ReplicaTotals<Counter>]>,
}

/// Totals of one replica.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReplicaTotals<T = u64> {
    /// Sectors that lost a confirmed vote; one that is found again counts again.
    pub sectors_corrupt: T,
    /// Sectors repaired.
    pub sectors_repaired: T,
    /// Sectors whose repair failed.
    pub sectors_not_repaired: T,
    /// Stale sectors that a resync has written.
    pub sectors_resynced: T,
    /// Evictions.
    pub evictions: T,
    /// Rejoins.
    pub rejoins: T,
}

impl<T> ReplicaTotals<T> {
    /// Joins each total with the same one of `other`.
    fn zip<U, R>(&self, other: &ReplicaTotals<U>, with: impl Fn(&T, &U) -> R) -> ReplicaTotals<R> {
        ReplicaTotals {
            sectors_corrupt: with(&self.sectors_corrupt, &other.sectors_corrupt),
            sectors_repaired: with(&self.sectors_repaired, &other.sectors_repaired),
            sectors_not_repaired: with(&self.sectors_not_repaired, &other.sectors_not_repaired),
            sectors_resynced: with(&self.sectors_resynced, &other.sectors_resynced),
            evictions: with(&self.evictions, &other.evictions),
            rejoins: with(&self.rejoins, &other.rejoins),
        }
    }
}

#[derive(Debug, Default)]
struct Operations {
    begun: Counter,
    failed: Counter,
    abandoned: Counter,
    bytes: Counter,
    /// Of those that succeeded.
    latency: Histogram,
}

impl WorkerStatistics {
    fn new(replicas: usize) -> Self {
        Self {
            requests: Default::default(),
            rejected: Counter::default(),
            failures: Default::default(),
            written_to_sector: Counter::default(),
            confirmations: Counter::default(),
            confirmations_without_fault: Counter::default(),
            replicas: (0..replicas).map(|_| Default::default()).collect(),
            totals: (0..replicas).map(|_| Default::default()).collect(),
        }
    }
}

/// The counters of all workers of a disk.
#[derive(Clone, Debug)]
pub struct Statistics {
    workers: Arc<[Arc<WorkerStatistics>]>,
    /// By place: the totals of the replicas that had the place before. The one writer is the thread
    /// that changes the replicas of the disk.
    earlier: Arc<[ReplicaTotals<Counter>]>,
}

impl Statistics {
    /// For `workers` workers and `replicas` replicas.
    pub fn new(workers: u16, replicas: usize) -> Self {
        let workers = (0..workers).map(|_| Arc::new(WorkerStatistics::new(replicas)));
        Self {
            workers: workers.collect(),
            earlier: (0..replicas).map(|_| ReplicaTotals::default()).collect(),
        }
    }

    /// The counters of the worker with this index.
    pub fn of_worker(&self, index: u16) -> Arc<WorkerStatistics> {
        Arc::clone(&self.workers[usize::from(index)])
    }

    /// The number of workers.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Guest requests of a kind.
    pub fn requests(&self, kind: RequestKind) -> Figures {
        self.sum(|worker| &worker.requests[kind as usize])
    }

    /// Operations of a kind on a replica.
    pub fn operations(&self, replica: usize, kind: OperationType) -> Figures {
        self.sum(|worker| &worker.replicas[replica][kind as usize])
    }

    /// Guest requests that were invalid or unsupported.
    pub fn rejected(&self) -> u64 {
        self.total(|worker| &worker.rejected)
    }

    /// Requests that failed without a quorum.
    pub fn failures(&self, kind: OperationType) -> u64 {
        self.total(|worker| &worker.failures[kind as usize])
    }

    /// Reads repeated under a lock because the replies differed.
    pub fn confirmations(&self) -> u64 {
        self.total(|worker| &worker.confirmations)
    }

    /// Those of them that found no fault: a write was in flight.
    pub fn confirmations_without_fault(&self) -> u64 {
        self.total(|worker| &worker.confirmations_without_fault)
    }

    /// The totals of the replica that has this place now.
    pub fn replica(&self, replica: ReplicaIndex) -> ReplicaTotals {
        let earlier = &self.earlier[replica.as_usize()];
        self.of_place(replica).zip(earlier, |total, earlier| {
            total.saturating_sub(earlier.get())
        })
    }

    /// Another replica takes this place: its totals start anew. To be called before any worker
    /// counts for it, by one thread at a time.
    pub fn replica_added(&self, replica: ReplicaIndex) {
        let earlier = &self.earlier[replica.as_usize()];
        earlier.zip(&self.of_place(replica), |earlier, total| {
            earlier.raise_to(*total)
        });
    }

    /// The totals of all replicas that have had this place.
    fn of_place(&self, replica: ReplicaIndex) -> ReplicaTotals {
        let workers = self.workers.iter();
        workers.fold(ReplicaTotals::default(), |sum, worker| {
            let totals = &worker.totals[replica.as_usize()];
            sum.zip(totals, |sum, total| sum.wrapping_add(total.get()))
        })
    }

    /// The end of the highest write, in bytes.
    pub fn written_to_byte(&self) -> u64 {
        let workers = self.workers.iter();
        let ends = workers.map(|worker| worker.written_to_sector.get());
        ends.max().unwrap_or(0) * SECTOR_BYTES
    }

    fn total(&self, part: impl Fn(&WorkerStatistics) -> &Counter) -> u64 {
        self.workers.iter().map(|worker| part(worker).get()).sum()
    }

    fn sum<'a>(&'a self, part: impl Fn(&'a WorkerStatistics) -> &'a Operations) -> Figures {
        let mut figures = Figures::default();
        for operations in self.workers.iter().map(|worker| part(worker)) {
            // Ends before starts, so that there are never more ends than starts.
            figures.failed += operations.failed.get();
            figures.abandoned += operations.abandoned.get();
            // A guest that zeroes the same sectors again and again can make the sum wrap, as a
            // counter does.
            figures.bytes = figures.bytes.wrapping_add(operations.bytes.get());
            figures.latency.add(&operations.latency);
            figures.begun += operations.begun.get();
        }
        figures
    }
}

/// The figures of one kind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    begun: u64,
    /// Failed.
    pub failed: u64,
    abandoned: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// How long those took.
    pub latency: Distribution,
}

impl Figures {
    /// How many succeeded.
    pub fn completed(&self) -> u64 {
        self.latency.count()
    }

    /// How many have begun and not ended.
    pub fn in_flight(&self) -> u64 {
        let ended = self.completed() + self.failed + self.abandoned;
        self.begun.saturating_sub(ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::SectorRange;
    use crate::common::clock::TurnClock;
    use crate::common::report::{Cause, Evidence, Fact, Report};
    use std::time::Duration;

    #[test]
    fn a_request_is_in_flight_until_it_ends_or_is_abandoned() {
        let statistics = Statistics::new(2, 1);
        let clock = TurnClock::default();
        let recorders: Vec<_> = (0..2)
            .map(|index| Recorder::new(statistics.of_worker(index), clock.clone()))
            .collect();
        let range = SectorRange::new(8, 8);
        let [kept, ended, failed, gone] =
            [0, 1, 0, 1].map(|index: usize| recorders[index].request_begun(RequestKind::Write));
        let _ = (kept, gone);
        clock.set(Duration::from_micros(300));
        recorders[1].request_ended(RequestKind::Write, range, ended, true);
        recorders[0].request_ended(RequestKind::Write, range, failed, false);
        recorders[1].request_abandoned(RequestKind::Write);
        let figures = statistics.requests(RequestKind::Write);
        assert_eq!(
            (figures.in_flight(), figures.completed(), figures.failed),
            (1, 1, 1)
        );
        assert_eq!((figures.bytes, figures.latency.sum_ns()), (4096, 300_000));
        assert_eq!(statistics.written_to_byte(), 8192);
        assert_eq!(statistics.requests(RequestKind::Read), Figures::default());
    }

    fn count_one_of_each(recorder: &Recorder, replica: ReplicaIndex) {
        let range = SectorRange::new(0, 8);
        recorder.reported(&Report::Bad {
            replica,
            operation: OperationType::Read,
            range,
            cause: Cause::Corrupt(Evidence {
                bad_sectors: vec![SectorRange::new(2, 1)],
                bad_sectors_cut: true,
                unlisted: Vec::new(),
                sectors: 3,
                digest: [0; 32],
                winner_digest: [1; 32],
            }),
        });
        recorder.repaired(replica, range);
        recorder.count(Fact::SectorsNotRepaired(replica, 5));
        recorder.count(Fact::SectorsResynced(replica, 7));
        recorder.reported(&Report::Evicted(replica));
        recorder.reported(&Report::Rejoined(replica));
        recorder.count(Fact::Confirmation);
        recorder.count(Fact::ConfirmationWithoutFault);
    }

    #[test]
    fn the_totals_of_a_replica_start_anew_with_another_one_in_its_place() {
        let statistics = Statistics::new(2, 2);
        let recorders: Vec<_> = (0..2)
            .map(|index| Recorder::new(statistics.of_worker(index), TurnClock::default()))
            .collect();
        let [taken, other] = [ReplicaIndex(0), ReplicaIndex(1)];
        let once = ReplicaTotals {
            sectors_corrupt: 3,
            sectors_repaired: 8,
            sectors_not_repaired: 5,
            sectors_resynced: 7,
            evictions: 1,
            rejoins: 1,
        };
        let times = |count| once.zip(&once, |total, _| total * count);
        for round in 1..4 {
            for recorder in &recorders {
                count_one_of_each(recorder, taken);
                count_one_of_each(recorder, other);
            }
            assert_eq!(statistics.replica(taken), times(2));
            assert_eq!(statistics.replica(other), times(2 * round));
            let confirmations = statistics.confirmations();
            assert_eq!(confirmations, 4 * round);
            assert_eq!(statistics.confirmations_without_fault(), confirmations);
            statistics.replica_added(taken);
            assert_eq!(statistics.replica(taken), ReplicaTotals::default());
        }
    }

    #[test]
    fn bytes_wrap_in_a_sum_as_in_a_counter() {
        let statistics = Statistics::new(2, 1);
        for worker in 0..2 {
            let recorder = Recorder::new(statistics.of_worker(worker), TurnClock::default());
            let since = recorder.request_begun(RequestKind::Zero);
            let half_of_all = SectorRange::new(0, 1 << 54);
            recorder.request_ended(RequestKind::Zero, half_of_all, since, true);
        }
        let figures = statistics.requests(RequestKind::Zero);
        assert_eq!((figures.bytes, figures.completed()), (0, 2));
    }
}
