//! What an engine does because time passes: replicas that do not answer leave the set (W6), reads
//! do not wait for slow ones (R7, R9), jobs go on.

use std::time::Duration;

use super::mutant::{Mutant, is_broken};
use super::{Core, Counters, Effects, Engine, Progress, Request, report_error};
use crate::common::operation::OperationType;
use crate::common::operation::RequestId;
use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use crate::limits::{REPLICAS_MAX, TICK_MICROSECONDS};

const TICK: Duration = Duration::from_micros(TICK_MICROSECONDS);

/// How many times what replies usually take a read waits before it asks others or goes for the
/// lock.
const SLOW_FACTOR: u32 = 4;

/// Every so many reads of `read-pattern=threshold` the turn decides who is asked, so that each
/// replica is checked, also the slowest.
const TURN_EVERY: usize = 8;

/// The time as the engine knows it, and what it does by it.
#[derive(Debug)]
pub(super) struct Clock {
    now: Duration,
    ticked_at: Duration,
    /// What a reply of each replica usually takes: a moving average.
    usual: [Duration; REPLICAS_MAX],
    /// Counts the reads of `read-pattern=threshold`.
    turn: usize,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self {
            now: Duration::ZERO,
            ticked_at: Duration::ZERO,
            usual: [Duration::ZERO; REPLICAS_MAX],
            turn: 0,
        }
    }

    pub(super) fn now(&self) -> Duration {
        self.now
    }

    /// A reply of `replica` to what it was asked at `asked_at` is in.
    pub(super) fn observe(&mut self, replica: ReplicaIndex, asked_at: Duration) {
        let taken = self.now.saturating_sub(asked_at);
        let usual = &mut self.usual[replica.as_usize()];
        *usual = (*usual * 7 + taken) / 8;
    }

    /// After how long a read looks for a way around whoever has not answered.
    fn patience(&self, in_service: ReplicaSet) -> Duration {
        let usual = in_service
            .iter()
            .map(|replica| self.usual[replica.as_usize()])
            .min();
        (usual.unwrap_or_default() * SLOW_FACTOR).max(TICK)
    }
}

impl Engine {
    /// Tells the engine the time, counted from any fixed moment. To be called before inputs; it
    /// never goes back.
    pub fn set_time(&mut self, now: Duration) {
        self.core.clock.now = now;
    }

    /// When [`Self::tick`] is wanted next; `None` as long as nothing happens.
    pub fn deadline(&self) -> Option<Duration> {
        let core = &self.core;
        let next_tick = if core.active > 0 {
            Some(core.clock.ticked_at + TICK)
        } else if !core.shared.out_of_service().is_empty() {
            Some(core.clock.ticked_at + (core.policy.replica_timeout / 8).max(TICK))
        } else {
            None
        };
        match core.background.deadline() {
            Some(work) => Some(next_tick.map_or(work, |tick| tick.min(work))),
            None => next_tick,
        }
    }

    /// Does what is due at `now`.
    pub fn tick(&mut self, now: Duration, effects: &mut impl Effects) {
        self.set_time(now);
        self.core.clock.ticked_at = now;
        self.evict_overdue(effects);
        let gone = self.core.shared.out_of_service();
        if !gone.is_empty() {
            self.for_each(
                |request| !request.depends_on().and(gone).is_empty(),
                effects,
                |id, request, core, effects| match request {
                    Request::Read(read) => read.abandon(id, gone, core, effects),
                    Request::Write(write) => write.abandon(gone, core, effects),
                    Request::Flush(flush) => flush.abandon(gone, core, effects),
                    Request::Orphaned => Progress::Retired,
                },
            );
            self.rejoin_drained(gone, effects);
        }
        let slow = now.saturating_sub(self.core.clock.patience(self.core.shared.in_service()));
        let is_slow = |request: &Request| match request {
            Request::Read(read) => read.tag.is_some() && !read.waiting_since(slow).is_empty(),
            _ => false,
        };
        self.for_each(
            is_slow,
            effects,
            |id, request, core, effects| match request {
                Request::Read(read) => read.reply_late(id, core, effects),
                _ => Progress::Waiting,
            },
        );
        self.core.check_for_work();
        self.run_ready(effects);
    }

    /// From now on nothing is begun that nobody asked for.
    pub fn stop_background(&mut self) {
        self.core.background.stop();
    }

    fn evict_overdue(&mut self, effects: &mut impl Effects) {
        let Some(limit) = self
            .core
            .clock
            .now
            .checked_sub(self.core.policy.replica_timeout)
        else {
            return;
        };
        // Each replica once, however many requests wait for it: whether it is needed takes a look
        // at all that is stale.
        let mut seen = ReplicaSet::EMPTY;
        for (_, slot) in &self.slots {
            for replica in slot.request.waiting_since(limit).without(seen).iter() {
                seen.insert(replica);
                if self.core.shared.health(|health| health.evict(replica)) {
                    Counters::add(&self.core.shared.counters.of(replica).evictions, 1);
                    let (operation, range) = slot.request.describe();
                    report_error(effects, replica, operation, range, Errno(libc::ETIMEDOUT));
                    effects.health_changed();
                }
            }
        }
    }

    /// Tells which of the replicas that left, or were removed, have none of this worker's
    /// operations any more.
    fn rejoin_drained(&mut self, gone: ReplicaSet, effects: &mut impl Effects) {
        let core = &mut self.core;
        let worker = core.worker.0;
        let removed = gone.without(core.shared.members());
        let remembered = removed.iter().filter(|replica| {
            let refers_to =
                |(_, slot): (usize, &super::Slot)| slot.request.refers_to().contains(*replica);
            self.slots.iter().any(refers_to)
        });
        let remembered: ReplicaSet = remembered.collect();
        for replica in gone.without(remembered).iter() {
            let has_operations = core.outstanding[replica.as_usize()].operations > 0;
            if removed.contains(replica) {
                let has_operations = has_operations && !is_broken(Mutant::ReleasedEarly);
                if core
                    .shared
                    .health(|health| health.release(replica, worker, has_operations))
                {
                    effects.released(replica);
                }
            } else if (!has_operations || is_broken(Mutant::ReturnEarly))
                && core.shared.health(|health| health.rejoin(replica, worker))
            {
                Counters::add(&core.shared.counters.of(replica).rejoins, 1);
                effects.health_changed();
            }
        }
    }

    /// Lets every request that is `wanted` take the same input in.
    fn for_each<E: Effects>(
        &mut self,
        wanted: impl Fn(&Request) -> bool,
        effects: &mut E,
        input: impl Fn(RequestId, &mut Request, &mut Core, &mut E) -> Progress,
    ) {
        let wanted: Vec<usize> = self
            .slots
            .iter()
            .filter(|(_, slot)| wanted(&slot.request))
            .map(|(key, _)| key)
            .collect();
        for key in wanted {
            let id = RequestId(u32::try_from(key).expect("slots are bounded"));
            self.advance(id, effects, |request, core, effects| {
                input(id, request, core, effects)
            });
        }
    }
}

impl Request {
    /// The replicas whose replies are out, if they were asked at `limit` or before.
    fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match self {
            Self::Read(read) => read.waiting_since(limit),
            Self::Write(write) => write.waiting_since(limit),
            Self::Flush(flush) => flush.waiting_since(limit),
            Self::Orphaned => ReplicaSet::EMPTY,
        }
    }

    /// The replicas that it has anything to do with: as long as it has, nobody takes their places.
    fn refers_to(&self) -> ReplicaSet {
        match self {
            Self::Read(read) => read.refers_to(),
            Self::Write(write) => write.refers_to(),
            Self::Flush(flush) => flush.refers_to(),
            Self::Orphaned => ReplicaSet::EMPTY,
        }
    }

    /// The replicas whose replies are out, or that may yet be asked.
    fn depends_on(&self) -> ReplicaSet {
        let unasked = match self {
            Self::Read(read) => read.unasked(),
            Self::Write(_) | Self::Flush(_) | Self::Orphaned => ReplicaSet::EMPTY,
        };
        self.waiting_since(Duration::MAX).or(unasked)
    }

    fn describe(&self) -> (OperationType, SectorRange) {
        match self {
            Self::Read(read) => (read.operation(), read.range()),
            Self::Write(write) => (OperationType::Write, write.range()),
            Self::Flush(_) | Self::Orphaned => (OperationType::Flush, super::flush::NO_RANGE),
        }
    }
}

impl Core {
    /// Of `voters` the `count` that are to be asked first (R9): mostly those from which a reply is
    /// expected soonest, now and then those whose turn it is.
    pub(super) fn preferred(&mut self, voters: ReplicaSet, count: usize) -> ReplicaSet {
        self.clock.turn += 1;
        let turn = self.clock.turn;
        let by_turn = turn.is_multiple_of(TURN_EVERY);
        let start = if by_turn { turn / TURN_EVERY } else { turn };
        let cost = |replica: ReplicaIndex| {
            let place = (replica.as_usize() + start) % voters.places();
            let ahead =
                u32::try_from(self.outstanding[replica.as_usize()].operations).unwrap_or(u32::MAX);
            let usual = self.clock.usual[replica.as_usize()];
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
