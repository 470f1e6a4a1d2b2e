//! Replicas that are evicted again and again (W6). Pure; the time is passed in.

use std::collections::VecDeque;
use std::time::Duration;

use super::events::Notice;
use crate::common::ReplicaIndex;
use crate::common::report::Report;
use crate::limits::{FLAPPING_EVICTIONS, FLAPPING_WINDOW, REPLICAS_MAX};

/// What is known of the evictions of each replica.
#[derive(Debug, Default)]
pub(super) struct Evictions([OfReplica; REPLICAS_MAX]);

#[derive(Debug, Default)]
struct OfReplica {
    /// The last ones, at most [`FLAPPING_EVICTIONS`].
    last: VecDeque<Duration>,
    /// It does not rejoin before, unless the disk needs it.
    kept_out_until: Option<Duration>,
}

impl Evictions {
    /// Records an event.
    pub(super) fn record(&mut self, notice: &Notice, now: Duration) {
        match notice {
            Notice::Report(Report::Evicted(replica)) => {
                let last = &mut self.0[replica.as_usize()].last;
                if last.len() == FLAPPING_EVICTIONS {
                    last.pop_front();
                }
                last.push_back(now);
            }
            Notice::Report(Report::KeptOut { replica, time }) => {
                let until = now.saturating_add(*time);
                self.0[replica.as_usize()].kept_out_until = Some(until);
            }
            Notice::Report(Report::Rejoined(replica)) => {
                self.0[replica.as_usize()].kept_out_until = None;
            }
            Notice::Report(
                Report::Bad { .. } | Report::Failure { .. } | Report::RepairLimit { .. },
            )
            | Notice::Job(_)
            | Notice::Image(..)
            | Notice::Missing { .. } => {}
        }
    }

    /// How much longer the replica is kept out, even if it answers.
    pub(super) fn kept_out_for(&self, replica: ReplicaIndex, now: Duration) -> Duration {
        let until = self.0[replica.as_usize()].kept_out_until;
        until.unwrap_or_default().saturating_sub(now)
    }

    /// Whether the replica was evicted often of late.
    pub(super) fn is_flapping(&self, replica: ReplicaIndex, now: Duration) -> bool {
        let last = &self.0[replica.as_usize()].last;
        let first = last.front().filter(|_| last.len() == FLAPPING_EVICTIONS);
        first.is_some_and(|first| now.saturating_sub(*first) < FLAPPING_WINDOW)
    }

    /// Another replica has this index.
    pub(super) fn forget(&mut self, replica: ReplicaIndex) {
        self.0[replica.as_usize()] = OfReplica::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_is_kept_out_until_its_time_has_passed_or_it_rejoins() {
        const REPLICA: ReplicaIndex = ReplicaIndex(3);
        let mut evictions = Evictions::default();
        let (now, time) = (Duration::from_secs(1000), Duration::from_secs(16));
        let kept_out = Notice::Report(Report::KeptOut {
            replica: REPLICA,
            time,
        });
        assert_eq!(evictions.kept_out_for(REPLICA, now), Duration::ZERO);
        evictions.record(&kept_out, now);
        assert_eq!(
            evictions.kept_out_for(REPLICA, now + time / 4),
            time / 4 * 3
        );
        assert_eq!(evictions.kept_out_for(REPLICA, now + time), Duration::ZERO);
        evictions.record(&Notice::Report(Report::Rejoined(REPLICA)), now);
        assert_eq!(evictions.kept_out_for(REPLICA, now), Duration::ZERO);
    }

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
