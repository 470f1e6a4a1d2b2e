//! Which evicted replicas do not rejoin at once, because they were evicted too often (W6).
//!
//! A replica that hangs again and again makes the guest wait each time, and each time a resync
//! follows. From its third eviction on, without a good time in between, it is kept out for twice as
//! long each time. Pure; the time is passed in. The engine of the first worker decides for all.

use std::time::Duration;

use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::{FLAPPING_EVICTIONS, FLAPPING_WINDOW, REPLICAS_MAX};

#[derive(Debug)]
pub(super) struct Flapping {
    timeout: Duration,
    replicas: [Record; REPLICAS_MAX],
    /// The replicas that are known to be evicted, or missing.
    out: ReplicaSet,
}

#[derive(Clone, Copy, Debug, Default)]
struct Record {
    /// Evictions without a good time in between.
    evictions: usize,
    rejoined_at: Duration,
    kept_out_until: Duration,
}

/// What has changed since the last look.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Changes {
    /// These have been evicted.
    pub(super) evicted: ReplicaSet,
    /// These are in service again.
    rejoined: ReplicaSet,
}

impl Changes {
    pub(super) fn is_empty(self) -> bool {
        self.evicted.or(self.rejoined).is_empty()
    }
}

impl Flapping {
    /// Those that are `missing` at the start are out of service without an eviction.
    pub(super) fn new(timeout: Duration, missing: ReplicaSet) -> Self {
        Self {
            timeout,
            replicas: [Record::default(); REPLICAS_MAX],
            out: missing,
        }
    }

    /// Compares what is known with the replicas that are `evicted` now.
    pub(super) fn look(&self, evicted: ReplicaSet) -> Changes {
        Changes {
            evicted: evicted.without(self.out),
            rejoined: self.out.without(evicted),
        }
    }

    /// Takes the changes in.
    pub(super) fn note(&mut self, changes: Changes, now: Duration) {
        let good = self.longest();
        for replica in changes.rejoined.iter() {
            self.replicas[replica.as_usize()].rejoined_at = now;
        }
        for replica in changes.evicted.iter() {
            let record = &mut self.replicas[replica.as_usize()];
            if now.saturating_sub(record.rejoined_at) >= good {
                record.evictions = 0;
            }
            record.evictions += 1;
            let kept_out = delay(self.timeout, record.evictions).min(good);
            record.kept_out_until = now + kept_out;
        }
        self.out = self.out.without(changes.rejoined).or(changes.evicted);
    }

    /// For how long an evicted replica is kept out from now on.
    pub(super) fn kept_out_for(&self, replica: ReplicaIndex, now: Duration) -> Duration {
        let until = self.replicas[replica.as_usize()].kept_out_until;
        until.saturating_sub(now)
    }

    /// The replicas that are kept out.
    pub(super) fn kept_out(&self, now: Duration) -> ReplicaSet {
        let is_kept = |replica: &ReplicaIndex| !self.kept_out_for(*replica, now).is_zero();
        self.out.iter().filter(is_kept).collect()
    }

    /// Another replica is late and cannot be evicted: all may rejoin that answer.
    pub(super) fn let_all_in(&mut self) {
        for record in &mut self.replicas {
            record.kept_out_until = Duration::ZERO;
        }
    }

    /// Another replica may have this place.
    pub(super) fn forget(&mut self, replica: ReplicaIndex) {
        self.replicas[replica.as_usize()] = Record::default();
        self.out.remove(replica);
    }

    /// The longest that a replica is kept out; after as long without an eviction it is good again.
    fn longest(&self) -> Duration {
        FLAPPING_WINDOW.min(self.timeout * 600)
    }
}

/// After how many evictions a replica is kept out for how long.
fn delay(timeout: Duration, evictions: usize) -> Duration {
    if evictions < FLAPPING_EVICTIONS {
        return Duration::ZERO;
    }
    let doublings = (evictions - FLAPPING_EVICTIONS + 1).min(16);
    timeout * (1 << doublings)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPLICA: ReplicaIndex = ReplicaIndex(1);

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Evicts the replica, and lets it rejoin as soon as it may. Returns for how long it was out.
    fn evict(flapping: &mut Flapping, now: &mut Duration) -> Duration {
        let out = std::iter::once(REPLICA).collect();
        flapping.note(flapping.look(out), *now);
        let kept_out = flapping.kept_out_for(REPLICA, *now);
        assert_eq!(flapping.kept_out(*now).is_empty(), kept_out.is_zero());
        *now += kept_out;
        flapping.note(flapping.look(ReplicaSet::EMPTY), *now);
        kept_out
    }

    #[test]
    fn a_replica_that_is_often_evicted_is_kept_out_for_longer_and_longer() {
        let mut flapping = Flapping::new(seconds(1), ReplicaSet::EMPTY);
        let mut now = seconds(1000);
        let mut kept_out = Vec::new();
        for _ in 0..14 {
            kept_out.push(evict(&mut flapping, &mut now).as_secs());
            now += seconds(5);
        }
        assert_eq!(
            kept_out,
            [0, 0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 600, 600, 600]
        );
        now += seconds(600);
        assert_eq!(
            evict(&mut flapping, &mut now),
            Duration::ZERO,
            "a good time"
        );
    }

    #[test]
    fn one_that_was_missing_at_the_start_was_not_evicted() {
        let out = std::iter::once(REPLICA).collect();
        let mut flapping = Flapping::new(seconds(1), out);
        let mut now = seconds(1000);
        assert!(flapping.look(out).is_empty());
        flapping.note(flapping.look(ReplicaSet::EMPTY), now);
        let kept_out: Vec<u64> = (0..3)
            .map(|_| evict(&mut flapping, &mut now).as_secs())
            .collect();
        assert_eq!(kept_out, [0, 0, 2]);
    }

    #[test]
    fn one_that_is_needed_rejoins_at_once() {
        let mut flapping = Flapping::new(seconds(1), ReplicaSet::EMPTY);
        let mut now = seconds(1000);
        for _ in 0..3 {
            evict(&mut flapping, &mut now);
        }
        let out = std::iter::once(REPLICA).collect();
        flapping.note(flapping.look(out), now);
        assert!(!flapping.kept_out_for(REPLICA, now).is_zero());
        flapping.let_all_in();
        assert!(flapping.kept_out_for(REPLICA, now).is_zero());
    }
}
