//! Which failed reads of the guest are followed up: by a repair of what is unreadable, if the disk
//! repairs, and by a scrub of the surroundings (R4, R6).
//!
//! Bounded for each replica: one that fails every read would otherwise cost the others many times
//! its reads.

use std::time::Duration;

use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::{
    FOLLOWED_ERRORS_BURST, FOLLOWED_ERRORS_EVERY, FOLLOWED_ERRORS_REST, REPLICAS_MAX,
};

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct ReadErrors {
    by_replica: [Followed; REPLICAS_MAX],
}

#[derive(Clone, Copy, Debug, Default)]
struct Followed {
    /// Followed up lately.
    count: u32,
    /// When `count` was last made smaller.
    since: Duration,
    rest_until: Duration,
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
}

impl Followed {
    fn take(&mut self, now: Duration) -> bool {
        let expired = now.saturating_sub(self.since).as_nanos() / FOLLOWED_ERRORS_EVERY.as_nanos();
        if expired > 0 {
            let expired = u32::try_from(expired).unwrap_or(u32::MAX);
            self.count = self.count.saturating_sub(expired);
            self.since = now;
        }
        let may = self.count < FOLLOWED_ERRORS_BURST && now >= self.rest_until;
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
}
