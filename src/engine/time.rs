//! What an engine does because time passes: it evicts replicas that do not answer (W6), reads stop
//! waiting for slow ones (R7, R9), jobs go on.
//!
//! Most ticks look at no request: as long as the replicas answer in time, the moment at which one
//! of them may be late at the earliest is known from the last look.

use std::time::Duration;

use super::Engine;
use super::context::{Context, Progress};
use super::interface::Effects;
use super::latencies::TICK;
use super::request::Request;
use super::slots::Slot;
use crate::common::operation::RequestId;
use crate::common::report::{Cause, Report};
use crate::common::{Errno, ReplicaSet};

impl Engine {
    /// When [`Self::tick`] is wanted next; `None` as long as nothing happens.
    pub fn deadline(&self) -> Option<Duration> {
        let core = &self.core;
        let next_tick = if self.active > 0 || core.lateness.guest_waits {
            Some(core.latencies.ticked_at + TICK)
        } else if !core.shared.evicted().is_empty()
            || (core.runs_jobs() && core.shared.raises_threshold())
        {
            Some(core.latencies.ticked_at + (core.policy.replica_timeout / 8).max(TICK))
        } else {
            None
        };
        let others = [core.background.deadline(), core.records_due()];
        next_tick
            .into_iter()
            .chain(others.into_iter().flatten())
            .min()
    }

    /// Evicts and rejoins replicas, helps late reads, and begins chunks of jobs, where that is due.
    pub fn tick(&mut self, effects: &mut impl Effects) {
        let now = self.core.clock.now();
        self.core.latencies.ticked_at = now;
        self.evict_late(effects);
        let evicted = self.core.shared.out_of_service();
        if !evicted.is_empty() {
            let depends = |request: &Request| !request.depends_on().and(evicted).is_empty();
            self.for_each(depends, effects, |request, context| {
                request.evicted(evicted, context)
            });
        }
        if self.core.runs_jobs() {
            self.core.shared.raise_threshold();
            self.note_flapping(self.core.shared.out_of_service(), effects);
        }
        if !evicted.is_empty() {
            self.rejoin_drained(evicted, effects);
        }
        self.write_records();
        self.help_late_reads(effects);
        self.give_up_questions(effects);
        self.core.check_for_work();
        self.run_ready(effects);
    }

    /// Begins no chunk of a job from now on.
    pub fn stop_background(&mut self) {
        self.core.background.stop();
    }

    /// Has the records say what they do not say yet, although no answer waits for it, and now and
    /// then takes marks away.
    fn write_records(&mut self) {
        let core = &mut self.core;
        let now = core.clock.now();
        if core.records_due().is_some_and(|due| due <= now) {
            if !core.shared.is_remembered() {
                core.have_remembered();
            } else {
                core.have_swept(now);
            }
        }
    }

    /// Has reads of the guest go on that have waited longer than replicas usually take (R7, R9).
    fn help_late_reads(&mut self, effects: &mut impl Effects) {
        let core = &self.core;
        let now = core.clock.now();
        let patience = core.latencies.patience(core.shared.in_service());
        let limit = now.saturating_sub(patience);
        if core.latencies.oldest_read > limit {
            return;
        }
        let mut oldest = now;
        let is_late = |request: &Request| {
            let Request::Read(read) = request else {
                return false;
            };
            let since = read.guest_waits_since();
            oldest = oldest.min(since.unwrap_or(now));
            since.is_some_and(|since| since <= limit)
        };
        self.for_each(is_late, effects, |request, context| match request {
            Request::Read(read) => read.reply_late(context),
            _ => Progress::Waiting,
        });
        self.core.latencies.oldest_read = oldest;
    }

    /// Has jobs read where no replica has said in time that there is a hole (W8).
    fn give_up_questions(&mut self, effects: &mut impl Effects) {
        if !self.core.runs_jobs() || !self.core.shared.has_jobs() {
            return;
        }
        let timeout = self.core.policy.replica_timeout;
        let Some(limit) = self.core.clock.now().checked_sub(timeout) else {
            return;
        };
        let is_late = |request: &Request| match request {
            Request::Skip(skip) => !skip.waits_for_lock() && !skip.waiting_since(limit).is_empty(),
            _ => false,
        };
        self.for_each(is_late, effects, |request, context| match request {
            Request::Skip(skip) => skip.give_up(context),
            _ => Progress::Waiting,
        });
    }

    /// Evicts the replicas that are late and not needed (W6).
    fn evict_late(&mut self, effects: &mut impl Effects) {
        let core = &mut self.core;
        let in_flight = &core.in_flight;
        // What an evicted replica ends is not news any more when it rejoins.
        core.lateness.look(
            core.shared.in_service().or(core.shared.out_of_service()),
            core.shared.loads(),
            |replica| in_flight.ended_on(replica),
            core.clock.now(),
        );
        if !core.lateness.is_due(core.clock.now()) {
            return;
        }
        // Without one replica a request may be decided without another that is late too.
        let waits = loop {
            let (evicted, waits) = self.evict_some(effects);
            if !evicted {
                break waits;
            }
        };
        if waits != self.core.lateness.guest_waits {
            self.core.lateness.guest_waits = waits;
            self.core.shared.set_guest_waits(waits);
            if !waits {
                // Jobs may go on.
                effects.health_changed();
            }
        }
    }

    /// Returns whether a replica was evicted, and whether the guest waits for one too long.
    fn evict_some(&mut self, effects: &mut impl Effects) -> (bool, bool) {
        let core = &mut self.core;
        let (now, loads) = (core.clock.now(), core.shared.loads());
        // Each replica once, however many requests wait for it: whether it is needed takes a look
        // at all that is stale.
        let mut seen = ReplicaSet::EMPTY;
        let (mut evicted, mut waits) = (false, false);
        core.lateness.look_begins(now);
        for (_, slot) in self.slots.iter() {
            let Some(mut out) = slot.request.out(&core.policy, core.threshold()) else {
                continue;
            };
            if !core.lateness.exceeds_limit(&out, now) {
                continue;
            }
            let in_service = core.shared.in_service();
            out.waiting = out.waiting.and(in_service);
            waits |= core.lateness.keeps_guest_waiting(&out, now);
            if core.lateness.wants_news(&out, now) {
                effects.health_changed();
            }
            let late = core.lateness.late(&out, in_service, loads, now);
            for replica in late.without(seen).iter() {
                seen.insert(replica);
                if core.shared.evict(replica) {
                    evicted = true;
                    let (operation, range) = slot.request.describe();
                    effects.report(Report::Bad {
                        replica,
                        operation,
                        range,
                        cause: Cause::Error(Errno(libc::ETIMEDOUT)),
                    });
                    effects.report(Report::Evicted(replica));
                    effects.health_changed();
                } else if !core.shared.kept_out().is_empty() {
                    core.shared.want_all();
                    effects.health_changed();
                }
            }
        }
        (evicted, waits)
    }

    /// Decides which of the replicas that are out of service do not rejoin yet.
    fn note_flapping(&mut self, out: ReplicaSet, effects: &mut impl Effects) {
        let core = &mut self.core;
        let (now, flapping) = (core.clock.now(), &mut core.flapping);
        let members = core.shared.members();
        let changes = flapping.look(out.and(members));
        if !changes.is_empty() {
            flapping.note(changes, now);
            for replica in changes.evicted.iter() {
                let time = flapping.kept_out_for(replica, now);
                if !time.is_zero() {
                    effects.report(Report::KeptOut { replica, time });
                }
            }
        }
        for replica in out.without(members).iter() {
            flapping.forget(replica);
        }
        if !out.is_empty() || !core.shared.kept_out().is_empty() {
            if core.shared.take_wants_all() {
                flapping.let_all_in();
            }
            // One whose image was lost is drained meanwhile.
            let missing = core.shared.missing();
            core.shared
                .set_kept_out(flapping.kept_out(now).without(missing));
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
                && !(core.runs_jobs() && core.shared.kept_out().contains(replica))
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
        mut wanted: impl FnMut(&Request) -> bool,
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
