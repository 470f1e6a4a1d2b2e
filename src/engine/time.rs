//! What an engine does because time passes: it evicts replicas that do not answer (W6), reads stop
//! waiting for slow ones (R7, R9), jobs go on.

use std::time::Duration;

use super::Engine;
use super::context::{Context, Core};
use super::interface::Effects;
use super::request::{Progress, Request};
use super::slots::Slot;
use crate::common::operation::RequestId;
use crate::common::report::{Cause, Report};
use crate::common::{Errno, ReplicaIndex, ReplicaSet};
use crate::limits::{REPLICAS_MAX, TICK_MICROSECONDS};

const TICK: Duration = Duration::from_micros(TICK_MICROSECONDS);

/// A read that has waited for so many times the usual latency asks other replicas, or goes for the
/// lock.
const SLOW_FACTOR: u32 = 4;

/// Every so many reads of `read-pattern=threshold` ask the replicas whose turn it is, so that each
/// replica is checked, even the slowest.
const TURN_EVERY: usize = 8;

/// How long replicas usually take.
#[derive(Debug)]
pub(super) struct Latencies {
    ticked_at: Duration,
    /// The latency of each replica: a moving average.
    usual: [Duration; REPLICAS_MAX],
    /// Counts the reads of `read-pattern=threshold`.
    turn: usize,
}

impl Latencies {
    pub(super) fn new() -> Self {
        Self {
            ticked_at: Duration::ZERO,
            usual: [Duration::ZERO; REPLICAS_MAX],
            turn: 0,
        }
    }

    /// A reply of `replica` came after `taken`.
    pub(super) fn observe(&mut self, replica: ReplicaIndex, taken: Duration) {
        let usual = &mut self.usual[replica.as_usize()];
        *usual = (*usual * 7 + taken) / 8;
    }

    /// After how long a read stops waiting for a slow replica.
    fn patience(&self, in_service: ReplicaSet) -> Duration {
        let usual = in_service
            .iter()
            .map(|replica| self.usual[replica.as_usize()])
            .min();
        (usual.unwrap_or_default() * SLOW_FACTOR).max(TICK)
    }
}

impl Engine {
    /// When [`Self::tick`] is wanted next; `None` as long as nothing happens.
    pub fn deadline(&self) -> Option<Duration> {
        let core = &self.core;
        let next_tick = if self.active > 0 {
            Some(core.latencies.ticked_at + TICK)
        } else if !core.shared.out_of_service().is_empty() {
            Some(core.latencies.ticked_at + (core.policy.replica_timeout / 8).max(TICK))
        } else {
            None
        };
        match core.background.deadline() {
            Some(chunk) => Some(next_tick.map_or(chunk, |tick| tick.min(chunk))),
            None => next_tick,
        }
    }

    /// Evicts and rejoins replicas, helps late reads, and begins chunks of jobs, where that is due.
    pub fn tick(&mut self, effects: &mut impl Effects) {
        let now = self.core.clock.now();
        self.core.latencies.ticked_at = now;
        self.evict_overdue(effects);
        let evicted = self.core.shared.out_of_service();
        if !evicted.is_empty() {
            let depends = |request: &Request| !request.depends_on().and(evicted).is_empty();
            self.for_each(depends, effects, |request, context| {
                request.evicted(evicted, context)
            });
            self.rejoin_drained(evicted, effects);
        }
        let in_service = self.core.shared.in_service();
        let late = now.saturating_sub(self.core.latencies.patience(in_service));
        let is_late = |request: &Request| match request {
            Request::Read(read) => read.is_late(late),
            _ => false,
        };
        self.for_each(is_late, effects, |request, context| match request {
            Request::Read(read) => read.reply_late(context),
            _ => Progress::Waiting,
        });
        self.core.check_for_work();
        self.run_ready(effects);
    }

    /// Begins no chunk of a job from now on.
    pub fn stop_background(&mut self) {
        self.core.background.stop();
    }

    /// Evicts the replicas that have not answered for the replica timeout (W6).
    fn evict_overdue(&mut self, effects: &mut impl Effects) {
        let core = &self.core;
        let Some(limit) = core.clock.now().checked_sub(core.policy.replica_timeout) else {
            return;
        };
        // Each replica once, however many requests wait for it: whether it is needed takes a look
        // at all that is stale.
        let mut seen = ReplicaSet::EMPTY;
        for (_, slot) in self.slots.iter() {
            for replica in slot.request.waiting_since(limit).without(seen).iter() {
                seen.insert(replica);
                if core.shared.change_health(|health| health.evict(replica)) {
                    let (operation, range) = slot.request.describe();
                    effects.report(Report::Bad {
                        replica,
                        operation,
                        range,
                        cause: Cause::Error(Errno(libc::ETIMEDOUT)),
                    });
                    effects.report(Report::Evicted(replica));
                    effects.health_changed();
                }
            }
        }
    }

    /// Lets evicted replicas rejoin, and frees the places of removed ones, when nothing of this
    /// worker is in flight on them.
    fn rejoin_drained(&mut self, evicted: ReplicaSet, effects: &mut impl Effects) {
        let core = &self.core;
        let worker = core.worker.0;
        let removed = evicted.without(core.shared.members());
        for replica in evicted.without(self.referred_to(removed)).iter() {
            let drained = core.in_flight.on_replica(replica) == 0;
            if removed.contains(replica) {
                if core
                    .shared
                    .change_health(|health| health.release(replica, worker, drained))
                {
                    effects.released(replica);
                }
            } else if drained
                && core
                    .shared
                    .change_health(|health| health.rejoin(replica, worker))
            {
                effects.report(Report::Rejoined(replica));
                effects.health_changed();
            }
        }
    }

    /// Those of `replicas` that some request refers to.
    fn referred_to(&self, replicas: ReplicaSet) -> ReplicaSet {
        if replicas.is_empty() {
            return ReplicaSet::EMPTY;
        }
        let slots = self.slots.iter();
        let all = slots.fold(ReplicaSet::EMPTY, |all, (_, Slot { request, .. })| {
            all.or(request.refers_to())
        });
        all.and(replicas)
    }

    /// Gives every request that is `wanted` the same input.
    fn for_each<E: Effects>(
        &mut self,
        wanted: impl Fn(&Request) -> bool,
        effects: &mut E,
        input: impl Fn(&mut Request, &mut Context<'_, E>) -> Progress,
    ) {
        let slots = self.slots.iter();
        let wanted: Vec<RequestId> = slots
            .filter(|(_, slot)| wanted(&slot.request))
            .map(|(id, _)| id)
            .collect();
        for id in wanted {
            self.advance(id, effects, &input);
        }
    }
}

impl Core {
    /// The `count` of `voters` to ask first (R9): mostly those whose replies are expected soonest,
    /// now and then those whose turn it is.
    pub(super) fn preferred(&mut self, voters: ReplicaSet, count: usize) -> ReplicaSet {
        self.latencies.turn += 1;
        let turn = self.latencies.turn;
        let by_turn = turn.is_multiple_of(TURN_EVERY);
        let start = if by_turn { turn / TURN_EVERY } else { turn };
        let cost = |replica: ReplicaIndex| {
            let place = (replica.as_usize() + start) % voters.places();
            let ahead = u32::try_from(self.in_flight.on_replica(replica)).unwrap_or(u32::MAX);
            let usual = self.latencies.usual[replica.as_usize()];
            let expected = if by_turn {
                Duration::ZERO
            } else {
                usual.saturating_mul(ahead.saturating_add(1))
            };
            // Differences below an eighth are noise; the turn decides then.
            (expected.as_micros().checked_ilog2(), place)
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
