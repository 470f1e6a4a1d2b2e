//! How long replicas usually take, and what reads conclude from it: after how long they stop
//! waiting for a slow replica, and which replicas they ask first (R7, R9).

use std::time::Duration;

use super::in_flight::InFlight;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::{REPLICAS_MAX, TICK_MICROSECONDS};

/// How often an engine looks for late replicas while requests are in flight.
pub(super) const TICK: Duration = Duration::from_micros(TICK_MICROSECONDS);

/// A read that has waited for so many times the usual latency asks other replicas, or goes for the
/// lock.
const SLOW_FACTOR: u32 = 4;

/// Every so many reads of `read-pattern=threshold` ask the replicas whose turn it is, so that each
/// replica is checked, even the slowest.
const TURN_EVERY: usize = 8;

/// Nanoseconds of a second.
const NANOS: u64 = 1_000_000_000;

/// How long replicas usually take.
#[derive(Debug)]
pub(super) struct Latencies {
    /// When the engine was last given a tick.
    pub(super) ticked_at: Duration,
    /// No read of the guest waits for a reply since before this moment.
    pub(super) oldest_read: Duration,
    /// The latency of each replica in nanoseconds: a moving average.
    usual: [u64; REPLICAS_MAX],
    /// Counts the reads of `read-pattern=threshold`.
    turn: usize,
}

impl Latencies {
    pub(super) fn new() -> Self {
        Self {
            ticked_at: Duration::ZERO,
            oldest_read: Duration::ZERO,
            usual: [0; REPLICAS_MAX],
            turn: 0,
        }
    }

    /// A reply of `replica` came after `taken`.
    pub(super) fn observe(&mut self, replica: ReplicaIndex, taken: Duration) {
        // At most some days, in integers: this is done for each reply.
        let taken = taken.as_secs().min(1 << 20) * NANOS + u64::from(taken.subsec_nanos());
        let usual = &mut self.usual[replica.as_usize()];
        *usual = (*usual * 7 + taken) / 8;
    }

    /// After how long a read stops waiting for a slow replica.
    pub(super) fn patience(&self, in_service: ReplicaSet) -> Duration {
        let usual = in_service
            .iter()
            .map(|replica| self.usual[replica.as_usize()])
            .min();
        let usual = Duration::from_nanos(usual.unwrap_or_default());
        (usual * SLOW_FACTOR).max(TICK)
    }

    /// The `count` of `voters` to ask first (R9): mostly those whose replies are expected soonest,
    /// now and then those whose turn it is.
    pub(super) fn preferred(
        &mut self,
        voters: ReplicaSet,
        count: usize,
        in_flight: &InFlight,
    ) -> ReplicaSet {
        self.turn += 1;
        let turn = self.turn;
        let by_turn = turn.is_multiple_of(TURN_EVERY);
        let start = if by_turn { turn / TURN_EVERY } else { turn };
        let cost = |replica: ReplicaIndex| {
            let place = (replica.as_usize() + start) % voters.places();
            let ahead = in_flight.on_replica(replica) as u64;
            let usual = self.usual[replica.as_usize()];
            let expected = if by_turn {
                0
            } else {
                usual.saturating_mul(ahead.saturating_add(1))
            };
            // Differences below an eighth are noise; the turn decides then.
            ((expected / 1000).checked_ilog2(), place)
        };
        let mut left = voters;
        let mut chosen = ReplicaSet::EMPTY;
        while chosen.len() < count {
            let Some(next) = left.iter().min_by_key(|replica| cost(*replica)) else {
                break;
            };
            left.remove(next);
            chosen.insert(next);
        }
        chosen
    }
}
