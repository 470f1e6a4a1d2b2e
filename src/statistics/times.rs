//! How long requests and operations take: histograms of the workers, and their sum.

use std::time::Duration;

use super::counter::Counter;

/// Buckets for each power of two of microseconds: the error of a bucket is at most 1/16.
const STEPS: u64 = 1 << STEPS_LOG2;
const STEPS_LOG2: u32 = 4;

/// All times above 2^32 microseconds, more than an hour, share the last bucket.
const BUCKETS: usize = (1 << STEPS_LOG2) * (32 - STEPS_LOG2 as usize + 1) + 1;

/// A histogram of times in microseconds, with buckets that get wider as times get longer.
#[derive(Debug)]
pub(super) struct Histogram {
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
    pub(super) fn record(&self, took: Duration) {
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

/// How many requests or operations took how long.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Distribution {
    /// By bucket; shorter where nothing took as long.
    counts: Vec<u64>,
    sum_ns: u64,
}

impl Distribution {
    pub(super) fn add(&mut self, histogram: &Histogram) {
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
    /// `None` if nothing was measured.
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
