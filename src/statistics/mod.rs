//! Counts and latencies of the workers.
//!
//! Invariants: a [`Counter`] has one writer, its worker, so counting takes no lock and no atomic
//! read-modify-write. A reader sees each counter at some moment, not all of them at the same one.
//! No counter goes down: the totals of a replica that takes the place of another one start anew
//! because readers subtract the totals of the earlier replicas. Nothing is allocated after the
//! start.

#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::clock::TurnClock;
use crate::common::operation::{Operation, OperationType, Reply};
use crate::common::report::{Cause, Fact, Report};
use crate::common::{ReplicaIndex, SECTOR_BYTES, SectorRange};

/// A number that one thread writes and any thread reads.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    fn add(&self, amount: u64) {
        self.0
            .store(self.get().wrapping_add(amount), Ordering::Relaxed);
    }

    fn raise_to(&self, value: u64) {
        if self.get() < value {
            self.0.store(value, Ordering::Relaxed);
        }
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Buckets for each power of two of microseconds: the error of a bucket is at most 1/16.
const STEPS: u64 = 1 << STEPS_LOG2;
const STEPS_LOG2: u32 = 4;

/// All times above 2^32 microseconds, more than an hour, share the last bucket.
const BUCKETS: usize = (1 << STEPS_LOG2) * (32 - STEPS_LOG2 as usize + 1) + 1;

/// A histogram of times in microseconds, with buckets that get wider as times get longer.
#[derive(Debug)]
struct Histogram {
    buckets: Box<[Counter]>,
    sum_ns: Counter,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| Counter::default()).collect(),
            sum_ns: Counter::default(),
        }
    }
}

impl Histogram {
    fn record(&self, took: Duration) {
        let ns = took.as_secs() * 1_000_000_000 + u64::from(took.subsec_nanos());
        self.sum_ns.add(ns);
        self.buckets[bucket_of(ns / 1000)].add(1);
    }
}

/// Below 16 µs a bucket for each microsecond.
fn bucket_of(us: u64) -> usize {
    let octave = us.max(STEPS).ilog2() - STEPS_LOG2;
    let step = u64::from(octave) * STEPS + (us >> octave);
    usize::try_from(step).map_or(BUCKETS - 1, |step| step.min(BUCKETS - 1))
}

/// The first microsecond that is above the bucket.
fn end_of(bucket: usize) -> u64 {
    let next = bucket as u64 + 1;
    let octave = (next / STEPS).saturating_sub(1);
    (next - octave * STEPS) << octave
}

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

/// The writer of a worker's counters. Times have the resolution of a turn.
#[derive(Clone, Debug)]
pub struct Recorder {
    statistics: Arc<WorkerStatistics>,
    clock: TurnClock,
}

/// When a request or operation started.
#[derive(Clone, Copy, Debug)]
pub struct Since(Duration);

impl Recorder {
    /// Counts in `statistics`, by the time of `clock`.
    pub fn new(statistics: Arc<WorkerStatistics>, clock: TurnClock) -> Self {
        Self { statistics, clock }
    }

    /// A recorder whose counters nothing reads.
    pub fn detached() -> Self {
        Self::new(Arc::new(WorkerStatistics::new(0)), TurnClock::default())
    }

    /// The start of what starts now.
    pub fn now(&self) -> Since {
        Since(self.clock.now())
    }

    /// A guest request starts.
    pub fn request_begun(&self, kind: RequestKind) -> Since {
        self.statistics.requests[kind as usize].begun.add(1);
        self.now()
    }

    /// A guest request is answered.
    pub fn request_ended(
        &self,
        kind: RequestKind,
        range: SectorRange,
        since: Since,
        success: bool,
    ) {
        let bytes = range.bytes();
        self.ended(
            &self.statistics.requests[kind as usize],
            bytes,
            since,
            success,
        );
        if kind == RequestKind::Write && success {
            self.statistics.written_to_sector.raise_to(range.end());
        }
    }

    /// This process will not answer a guest request.
    pub fn request_abandoned(&self, kind: RequestKind) {
        self.statistics.requests[kind as usize].abandoned.add(1);
    }

    /// A guest request was invalid or unsupported.
    pub fn request_rejected(&self) {
        self.statistics.rejected.add(1);
    }

    /// An operation on a replica starts.
    pub fn operation_begun(&self, operation: &Operation) {
        let (kind, _) = operation.action.describe();
        self.statistics.replicas[operation.replica.as_usize()][kind as usize]
            .begun
            .add(1);
    }

    /// An operation on a replica has ended.
    pub fn operation_ended(&self, reply: &Reply, since: Since) {
        let (kind, range) = reply.action.describe();
        let operations = &self.statistics.replicas[reply.replica.as_usize()][kind as usize];
        self.ended(operations, range.bytes(), since, reply.result.is_ok());
    }

    /// The engine reports to the operator.
    pub fn reported(&self, report: &Report) {
        match report {
            Report::Failure { operation, .. } => {
                self.statistics.failures[*operation as usize].add(1);
            }
            Report::Bad { replica, cause, .. } => match cause {
                Cause::Corrupt(evidence) => {
                    self.totals(*replica).sectors_corrupt.add(evidence.sectors);
                }
                Cause::Error(_) => {}
            },
            Report::Evicted(replica) => self.totals(*replica).evictions.add(1),
            Report::KeptOut { .. } => {}
            Report::Rejoined(replica) => self.totals(*replica).rejoins.add(1),
        }
    }

    /// The engine has repaired sectors of a replica.
    pub fn repaired(&self, replica: ReplicaIndex, range: SectorRange) {
        self.totals(replica).sectors_repaired.add(range.count);
    }

    /// The engine states a fact that no event reports.
    pub fn count(&self, fact: Fact) {
        match fact {
            Fact::Confirmation => self.statistics.confirmations.add(1),
            Fact::ConfirmationWithoutFault => self.statistics.confirmations_without_fault.add(1),
            Fact::SectorsResynced(replica, sectors) => {
                self.totals(replica).sectors_resynced.add(sectors);
            }
            Fact::SectorsNotRepaired(replica, sectors) => {
                self.totals(replica).sectors_not_repaired.add(sectors);
            }
        }
    }

    fn totals(&self, replica: ReplicaIndex) -> &ReplicaTotals<Counter> {
        &self.statistics.totals[replica.as_usize()]
    }

    fn ended(&self, operations: &Operations, bytes: u64, since: Since, success: bool) {
        if success {
            operations.bytes.add(bytes);
            operations
                .latency
                .record(self.clock.now().saturating_sub(since.0));
        } else {
            operations.failed.add(1);
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

/// How many requests or operations took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// By bucket; shorter where nothing took as long.
    counts: Vec<u64>,
    sum_ns: u64,
}

impl Distribution {
    fn add(&mut self, histogram: &Histogram) {
        let used = histogram
            .buckets
            .iter()
            .rposition(|bucket| bucket.get() > 0);
        let used = used.map_or(0, |last| last + 1);
        if self.counts.len() < used {
            self.counts.resize(used, 0);
        }
        for (count, bucket) in self.counts.iter_mut().zip(&histogram.buckets) {
            *count += bucket.get();
        }
        self.sum_ns = self.sum_ns.wrapping_add(histogram.sum_ns.get());
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// How long all took together, in nanoseconds.
    pub fn sum_ns(&self) -> u64 {
        self.sum_ns
    }

    /// How many took less than `us` microseconds: exact for powers of two, and below 16.
    pub fn below_us(&self, us: u64) -> u64 {
        let buckets = self.counts.iter().enumerate();
        buckets
            .take_while(|(bucket, _)| end_of(*bucket) <= us)
            .map(|(_, count)| count)
            .sum()
    }

    /// The time that `per_mille` of them did not exceed, in microseconds, at most 1/16 too long.
    /// `None` if there are none.
    pub fn quantile_us(&self, per_mille: u64) -> Option<u64> {
        let count = self.count();
        let wanted = count.saturating_mul(per_mille).div_ceil(1000).max(1);
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        })?;
        Some(end_of(bucket))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::report::Evidence;
    use proptest::prelude::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    fn distribution(times: &[Duration]) -> Distribution {
        let histogram = Histogram::default();
        for time in times {
            histogram.record(*time);
        }
        let mut distribution = Distribution::default();
        distribution.add(&histogram);
        distribution
    }

    #[test]
    fn buckets_follow_one_another_and_are_narrow() {
        let mut start = 0;
        for bucket in 0..BUCKETS - 1 {
            let end = end_of(bucket);
            assert!(
                end > start && (end - start == 1 || (end - start) * STEPS <= start),
                "{start} {end}"
            );
            assert_eq!((bucket_of(start), bucket_of(end - 1)), (bucket, bucket));
            start = end;
        }
        assert_eq!(start, 1 << 32);
        assert_eq!(
            (bucket_of(start), bucket_of(u64::MAX)),
            (BUCKETS - 1, BUCKETS - 1)
        );
    }

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
        clock.set(us(300));
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

    #[test]
    fn an_empty_distribution_has_no_quantiles() {
        assert_eq!(Distribution::default().quantile_us(500), None);
        assert_eq!(distribution(&[Duration::ZERO]).quantile_us(1), Some(1));
    }

    proptest! {
        #[test]
        fn quantiles_and_counts_are_those_of_the_sorted_times(
            mut times in prop::collection::vec(0_u64..1 << 20, 1..200),
            per_mille in 0_u64..=1000,
            power in 0_u32..21,
        ) {
            let all = distribution(&times.iter().map(|time| us(*time)).collect::<Vec<_>>());
            times.sort_unstable();
            let rank = (times.len() as u64 * per_mille).div_ceil(1000).max(1);
            let exact = times[usize::try_from(rank).unwrap() - 1];
            let found = all.quantile_us(per_mille).unwrap();
            let is_close = found > exact && found <= exact + exact / STEPS + 1;
            prop_assert!(is_close, "{} for {}", found, exact);
            let below = times.iter().filter(|time| **time < 1 << power).count();
            prop_assert_eq!(all.below_us(1 << power), below as u64);
            let sum_ns = times.iter().sum::<u64>() * 1000;
            prop_assert_eq!((all.count(), all.sum_ns()), (times.len() as u64, sum_ns));
        }
    }
}
