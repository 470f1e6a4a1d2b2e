//! Inputs of two workers that overlap: the one runs in the middle of the other, before one of its
//! accesses to what the workers share.
//!
//! Their effects are carried out in the order in which the engines asked for them.

use std::cell::RefCell;
use std::rc::Rc;

use super::effects::Collected;
use super::flight::Flight;
use super::inputs::{Delivered, InputChecks};
use super::state::{Checked, ExpectedReport, World, trace};
use super::threshold::Thresholds;
use crate::common::operation::{Reply, RequestId};
use crate::engine::{Engine, WorkerIndex, interleaving};

/// Accesses of an input before the other one runs, at most.
const ACCESSES_MAX: u64 = 12;

/// What a worker is given.
enum Input {
    Tick,
    Granted(RequestId),
    Reply(Reply),
}

impl Input {
    fn give(self, engine: &mut Engine, effects: &mut Collected) {
        match self {
            Self::Tick => engine.tick(effects),
            Self::Granted(request) => engine.granted(request, effects),
            Self::Reply(reply) => engine.reply(reply, effects),
        }
    }
}

impl World {
    /// Gives the engine of a worker an input, perhaps together with another worker, and carries out
    /// the effects. `expected`: the input is an error of an operation.
    pub(super) fn input(
        &mut self,
        worker: usize,
        expected: Option<ExpectedReport>,
        give: impl FnOnce(&mut Engine, &mut Collected),
    ) -> Checked {
        self.turn.set(self.clock);
        self.thresholds = Thresholds::only(self.threshold);
        self.before_input = self.ledger.known_failures();
        self.note_votes_again();
        let mut checks = self.input_checks(worker, expected);
        let mut effects = std::mem::take(&mut self.collected);
        let other_input = self.draw_other_input(worker);
        self.overlapped = other_input.is_some();
        let before_reply = self.before_reply.take();
        if let Some(before) = before_reply.filter(|_| self.overlapped) {
            // The other worker may be first, and not know of the failure that the reply reports.
            self.before_input = before;
        }
        if let Some((other, input, reply)) = other_input {
            let overlap = self.give_both(&checks, (other, input), &mut effects, give);
            let (mut others, before) = overlap;
            self.engines[other].self_check();
            self.note_evictions();
            self.note_threshold()?;
            self.view_before = self.view;
            self.note_recovering_writes(worker, &effects)?;
            self.note_recovering_writes(other, &others)?;
            self.note_decisions()?;
            self.note_owed();
            self.carry_out(&mut effects, before, &mut checks)?;
            let expected = reply.and_then(|reply| self.note_reply(&reply));
            let mut others_checks = self.input_checks(other, expected);
            let count = others.effects.len();
            self.carry_out(&mut others, count, &mut others_checks)?;
            Self::check_input(&others_checks)?;
        } else {
            give(&mut self.engines[worker], &mut effects);
            self.engines[worker].self_check();
            self.note_evictions();
            self.note_threshold()?;
            self.view_before = self.view;
            self.note_recovering_writes(worker, &effects)?;
            self.note_decisions()?;
            self.note_owed();
        }
        let count = effects.effects.len();
        self.carry_out(&mut effects, count, &mut checks)?;
        effects.values.clear();
        self.collected = effects;
        Self::check_input(&checks)?;
        self.check_chunks()?;
        self.check_remembered()?;
        self.check_staleness()
    }

    fn input_checks(&self, worker: usize, expected: Option<ExpectedReport>) -> InputChecks {
        InputChecks {
            worker,
            expected,
            failures: 0,
            values_used: 0,
            scrubbing: self.is_scrubbing(),
        }
    }

    /// Gives two engines their inputs, that of `other` in the middle of the first. Returns the
    /// effects of `other`, and how many effects of the first came before them.
    fn give_both(
        &mut self,
        first: &InputChecks,
        (other, input): (usize, Input),
        effects: &mut Collected,
        give: impl FnOnce(&mut Engine, &mut Collected),
    ) -> (Collected, usize) {
        // The other engine leaves its place, so that both can be used.
        let mut engine = self.engines.remove(other);
        let result = Rc::new(RefCell::new(None));
        let place = Rc::clone(&result);
        let count = Rc::clone(&effects.count);
        count.set(0);
        let accesses = u32::try_from(self.random.below(ACCESSES_MAX)).expect("few");
        interleaving::plan(accesses, move || {
            let mut effects = Collected::default();
            input.give(&mut engine, &mut effects);
            place.replace(Some((engine, effects, count.get())));
        });
        let index = first.worker - usize::from(other < first.worker);
        give(&mut self.engines[index], effects);
        interleaving::finish();
        let (engine, others, before) = result.take().expect("it has run");
        self.engines.insert(other, engine);
        self.engines[first.worker].self_check();
        (others, before)
    }

    /// What another worker is given at the same time: mostly nothing.
    fn draw_other_input(&mut self, worker: usize) -> Option<(usize, Input, Option<Delivered>)> {
        if !self.random.chance(self.plan.overlap) {
            return None;
        }
        let other = self.random.index(self.plan.workers);
        if other == worker {
            return None;
        }
        let wake = |(of, _): &(WorkerIndex, RequestId)| usize::from(of.0) == other;
        let arrives = |flight: &Flight| {
            let comes = flight.done.is_some() && !flight.late && !self.hangs(flight.replica());
            comes && flight.worker == other
        };
        let done = self.flights.iter().position(arrives);
        if let Some(index) = self.wakes.iter().position(wake) {
            let (_, request) = self.wakes.swap_remove(index);
            trace!(
                self,
                "worker {other}, meanwhile: request {} has its lock", request.0
            );
            Some((other, Input::Granted(request), None))
        } else if let Some(index) = done.filter(|_| self.random.below(2) == 0) {
            trace!(self, "worker {other}, meanwhile:");
            let (reply, delivered) = self.take_reply(index);
            Some((other, Input::Reply(reply), Some(delivered)))
        } else if self.tick_wanted >> other & 1 == 1 || self.engines[other].deadline().is_some() {
            trace!(self, "worker {other}, meanwhile: looks at the clock");
            self.tick_wanted &= !(1 << other);
            self.note_look(other);
            Some((other, Input::Tick, None))
        } else {
            None
        }
    }
}
