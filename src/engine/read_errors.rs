//! Which failed reads of the guest are followed up: by a repair of what is unreadable, if the disk
//! repairs, and by a scrub of the surroundings (R4, R6). And how far a job searches a range for
//! what can be read of it.
//!
//! Bounded for each replica: one that fails every read would otherwise cost the others many times
//! its reads.

use std::time::Duration;

use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::{
    FAILED_PARTS_JOB_MAX, FAILED_PARTS_MAX, FOLLOWED_ERRORS_BURST, FOLLOWED_ERRORS_EVERY,
    FOLLOWED_ERRORS_REST, LONG_SEARCHES_BURST, LONG_SEARCHES_EVERY, REPLICAS_MAX,
};

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct ReadErrors {
    by_replica: [Followed; REPLICAS_MAX],
    long_searches: [Bucket; REPLICAS_MAX],
}

#[derive(Clone, Copy, Debug, Default)]
struct Followed {
    lately: Bucket,
    rest_until: Duration,
}

/// Allows for a number of things at once, and then for one more from time to time.
#[derive(Clone, Copy, Debug, Default)]
struct Bucket {
    /// Done lately.
    count: u32,
    /// When `count` was last made smaller.
    since: Duration,
}

impl ReadErrors {
    /// The replicas in `failed` whose failed read is to be followed up, which counts.
    pub(super) fn take(&mut self, failed: ReplicaSet, now: Duration) -> ReplicaSet {
        failed
            .iter()
            .filter(|replica| self.by_replica[replica.as_usize()].take(now))
            .collect()
    }

    /// A repair of `replica` has failed, or it is unreadable nearly everywhere and nothing repairs
    /// it: it rests.
    pub(super) fn rest(&mut self, replica: ReplicaIndex, now: Duration) {
        self.by_replica[replica.as_usize()].rest_until = now + FOLLOWED_ERRORS_REST;
    }

    /// How many parts of a range `replica` may fail to read before a job gives up on the rest.
    pub(super) fn failed_parts_of_job(&mut self, replica: ReplicaIndex, now: Duration) -> u64 {
        let searches = &mut self.long_searches[replica.as_usize()];
        match searches.take(LONG_SEARCHES_BURST, LONG_SEARCHES_EVERY, now) {
            true => FAILED_PARTS_JOB_MAX,
            false => FAILED_PARTS_MAX,
        }
    }

    /// The search of the job was short, or has found something.
    pub(super) fn was_worth_it(&mut self, replica: ReplicaIndex) {
        let searches = &mut self.long_searches[replica.as_usize()];
        searches.count = searches.count.saturating_sub(1);
    }
}

impl Followed {
    fn take(&mut self, now: Duration) -> bool {
        now >= self.rest_until
            && self
                .lately
                .take(FOLLOWED_ERRORS_BURST, FOLLOWED_ERRORS_EVERY, now)
    }
}

impl Bucket {
    /// Whether it may be done once more, which counts.
    fn take(&mut self, burst: u32, every: Duration, now: Duration) -> bool {
        let expired = now.saturating_sub(self.since).as_nanos() / every.as_nanos();
        if expired > 0 {
            let expired = u32::try_from(expired).unwrap_or(u32::MAX);
            self.count = self.count.saturating_sub(expired);
            self.since = now;
        }
        let may = self.count < burst;
        self.count += u32::from(may);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_fails_every_read_is_followed_up_now_and_then() {
        let mut read_errors = ReadErrors::default();
        let (one, other) = (ReplicaIndex(1), ReplicaIndex(2));
        let failed: ReplicaSet = [one].into_iter().collect();
        let mut now = Duration::from_secs(100);
        for _ in 0..FOLLOWED_ERRORS_BURST {
            assert_eq!(read_errors.take(failed, now), failed);
        }
        assert_eq!(read_errors.take(failed, now), ReplicaSet::EMPTY);
        let both = [one, other].into_iter().collect();
        assert_eq!(read_errors.take(both, now), [other].into_iter().collect());
        now += FOLLOWED_ERRORS_EVERY;
        assert_eq!(read_errors.take(failed, now), failed);
        assert_eq!(read_errors.take(failed, now), ReplicaSet::EMPTY);
        now += FOLLOWED_ERRORS_EVERY * FOLLOWED_ERRORS_BURST;
        read_errors.rest(one, now);
        assert_eq!(read_errors.take(failed, now), ReplicaSet::EMPTY);
        assert_eq!(read_errors.take(failed, now + FOLLOWED_ERRORS_REST), failed);
    }

    #[test]
    fn a_job_searches_far_as_long_as_it_finds_something() {
        let mut read_errors = ReadErrors::default();
        let (replica, mut now) = (ReplicaIndex(1), Duration::from_secs(100));
        for _ in 0..LONG_SEARCHES_BURST * 2 {
            let allowed = read_errors.failed_parts_of_job(replica, now);
            assert_eq!(allowed, FAILED_PARTS_JOB_MAX);
            read_errors.was_worth_it(replica);
        }
        for _ in 0..LONG_SEARCHES_BURST {
            read_errors.failed_parts_of_job(replica, now);
        }
        let allowed = read_errors.failed_parts_of_job(replica, now);
        assert_eq!(allowed, FAILED_PARTS_MAX);
        now += LONG_SEARCHES_EVERY;
        let allowed = read_errors.failed_parts_of_job(replica, now);
        assert_eq!(allowed, FAILED_PARTS_JOB_MAX);
    }
}
