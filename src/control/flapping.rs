//! Replicas that are evicted again and again (W6). Pure; the time is passed in.

use std::collections::VecDeque;
use std::time::Duration;

use super::events::Notice;
use crate::common::ReplicaIndex;
use crate::common::report::Report;
use crate::limits::{FLAPPING_EVICTIONS, FLAPPING_WINDOW, REPLICAS_MAX};

/// The last evictions of each replica, at most [`FLAPPING_EVICTIONS`].
#[derive(Debug, Default)]
pub(super) struct Evictions([VecDeque<Duration>; REPLICAS_MAX]);

impl Evictions {
    /// Records an event.
    pub(super) fn record(&mut self, notice: &Notice, now: Duration) {
        if let Notice::Report(Report::Evicted(replica)) = notice {
            let last = &mut self.0[replica.as_usize()];
            if last.len() == FLAPPING_EVICTIONS {
                last.pop_front();
            }
            last.push_back(now);
        }
    }

    /// Whether the replica was evicted often of late.
    pub(super) fn is_flapping(&self, replica: ReplicaIndex, now: Duration) -> bool {
        let last = &self.0[replica.as_usize()];
        let first = last.front().filter(|_| last.len() == FLAPPING_EVICTIONS);
        first.is_some_and(|first| now.saturating_sub(*first) < FLAPPING_WINDOW)
    }

    /// Another replica has this index.
    pub(super) fn forget(&mut self, replica: ReplicaIndex) {
        self.0[replica.as_usize()].clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_flaps_while_its_last_evictions_are_recent() {
        const REPLICA: ReplicaIndex = ReplicaIndex(3);
        let mut evictions = Evictions::default();
        let evicted = Notice::Report(Report::Evicted(REPLICA));
        let mut now = Duration::from_secs(1000);
        for _ in 1..FLAPPING_EVICTIONS {
            evictions.record(&evicted, now);
            assert!(!evictions.is_flapping(REPLICA, now));
            now += FLAPPING_WINDOW / 4;
        }
        evictions.record(&evicted, now);
        evictions.record(&Notice::Report(Report::Rejoined(REPLICA)), now);
        assert!(evictions.is_flapping(REPLICA, now));
        assert!(!evictions.is_flapping(ReplicaIndex(2), now));
        now += FLAPPING_WINDOW / 4 * 3;
        assert!(!evictions.is_flapping(REPLICA, now));
        evictions.record(&evicted, now);
        evictions.record(&evicted, now);
        assert!(evictions.is_flapping(REPLICA, now));
        evictions.forget(REPLICA);
        assert!(!evictions.is_flapping(REPLICA, now));
    }
}
