//! What happens next: one thing out of all that could.
//!
//! An operation takes effect on a sector, a reply reaches an engine, the guest makes a request, a
//! grant of a lock reaches another worker, a worker looks at the clock, a fault strikes. When
//! nothing can happen by itself the clock jumps to the next moment at which something is due.

use std::time::Duration;

use super::Violation;
use super::effects::number_of;
use super::flight::Flight;
use super::plan::PLACES;
use super::state::{Checked, World};
use crate::jobs::{JobInfo, JobStatus};

/// Steps of a run, at most: a longer run never ends.
const STEPS_MAX: u64 = 600_000;

/// Steps for which a guest that has its answers waits until all is quiet, on average.
const PAUSED_STEPS: u64 = 1024;

/// Steps after which the operator does something about what is held, on average.
const CONTINUED_STEPS: u64 = 64;

/// The weight of what may happen next, against that of an operation that hardly makes progress.
const WEIGHT: u64 = 36;

/// How often an operation of a slow replica is passed over, and a late reply.
const SLOW: u64 = 3;
const LATE: u64 = 12;

/// The operations that have no reply, among what may happen next.
#[derive(Clone, Copy, Debug, Default)]
struct Weights {
    /// If each went on at full speed.
    all: u64,
    /// As they go on now.
    ready: u64,
    /// Some wait.
    wait: bool,
    /// The replicas that do nothing now, a mask.
    hanging: u32,
    /// When the first of those goes on.
    next: Duration,
}

impl World {
    /// One thing happens.
    pub(super) fn step(&mut self) -> Checked {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(Violation::new("I6", "the run does not come to an end"));
        }
        if !self.faults_ended {
            self.inject_faults()?;
            if self.is_lost {
                return Ok(());
            }
        }
        self.pass_time();
        // Jobs that fail again and again leave no moment in which all is quiet.
        if self.paused && self.pending.is_empty() && self.random.below(PAUSED_STEPS) == 0 {
            self.paused = false;
        }
        let may_submit = !self.paused && !self.faults_ended && self.requests < self.plan.requests;
        // W9: nothing new is taken while something is held.
        let may_submit = may_submit && !self.hold.is_holding();
        if self.hold.is_holding() && self.random.below(CONTINUED_STEPS) == 0 {
            self.end_holding()?;
        }
        let again = self.next_held();
        let may_submit = may_submit && (0..self.plan.workers).any(|worker| self.has_room(worker));
        let due = self.due();
        let ticks = u64::from(due.count_ones());
        let wakes = 2 * self.wakes.len() as u64;
        let guest = if may_submit || again.is_some() {
            self.plan.eagerness as u64
        } else {
            0
        };
        let flights = self.weigh_flights();
        let own = (ticks + wakes + guest) * WEIGHT;
        let (all, ready) = (own + flights.all, own + flights.ready);
        if ready == 0 {
            return self.jump();
        }
        // So that a replica that hangs does not have all the others work for it in vain.
        let in_vain = flights.wait && ticks + wakes == 0;
        if in_vain && self.random.below(all + 15 * ready) < all {
            return self.jump();
        }
        let choice = self.random.below(ready);
        let place = choice.checked_sub(own);
        let flight = place.map(|place| self.flight_at(place, flights.hanging));
        self.pass_over(all, ready, flights.next);
        let number = choice / WEIGHT;
        if let Some(flight) = flight {
            self.move_flight(flight)?;
        } else if number < ticks {
            self.tick(due)?;
        } else if number < ticks + wakes {
            let index = usize::try_from((number - ticks) / 2).expect("few");
            let (worker, request) = self.wakes.swap_remove(index);
            self.grant(worker, request)?;
        } else if let Some(worker) = again {
            self.submit_held(worker)?;
        } else {
            self.submit_something()?;
        }
        self.note_round()?;
        if self.is_quiet() {
            self.check_nothing_held()?;
            self.check_quiet()?;
        }
        Ok(())
    }

    /// A little time passes.
    fn pass_time(&mut self) {
        let most = u64::try_from(self.plan.step.as_nanos()).expect("short") * 2;
        self.clock += Duration::from_nanos(self.random.below(most));
    }

    /// The workers that are to be ticked now, a mask.
    fn due(&self) -> u32 {
        let due = |worker: &usize| {
            let deadline = self.engines[*worker].deadline();
            self.tick_wanted >> worker & 1 == 1
                || deadline.is_some_and(|deadline| deadline <= self.clock)
        };
        (0..self.plan.workers)
            .filter(due)
            .fold(0, |mask, worker| mask | 1 << worker)
    }

    /// Nothing happens by itself: the clock goes on to the next moment at which something is due.
    fn jump(&mut self) -> Checked {
        if self.is_quiet() && self.paused {
            self.paused = false;
            return Ok(());
        }
        if !self.held.is_empty() && self.next_held().is_none() {
            return self.end_holding();
        }
        let is_paused = |job: &JobInfo| job.status == JobStatus::Paused;
        let deadlines = self.engines.iter().filter_map(|engine| engine.deadline());
        let hung = self.flights.iter().map(|flight| self.goes_on_at(flight));
        let next = deadlines.chain(hung).min();
        match next {
            Some(next) if next < Duration::MAX => {
                self.check_jump(next)?;
                self.clock = self.clock.max(next);
                Ok(())
            }
            _ if self.is_quiet() || self.next_held().is_some() => Ok(()),
            // The job waits for the operator, and what it has in flight for a dead replica.
            _ if self.pending.is_empty() && self.jobs.iter().any(is_paused) => {
                self.paused = false;
                Ok(())
            }
            _ => {
                let waiting: Vec<_> = self.pending.iter().map(|p| number_of(p.tag)).collect();
                let text =
                    format!("nothing will ever happen; requests without an answer: {waiting:?}");
                Err(Violation::new("I6", text))
            }
        }
    }

    /// The weight of the operation among all that may happen next; 0: it waits. That of one which
    /// is neither slow nor late is [`WEIGHT`]. `hanging`: see [`Weights`].
    fn weight(&self, flight: &Flight, hanging: u32) -> u64 {
        let replica = flight.replica();
        let waits = !self.faults_ended && flight.not_before > self.clock;
        if waits || hanging >> replica & 1 == 1 {
            return 0;
        }
        let slow = !self.faults_ended && self.plan.slow >> replica & 1 == 1;
        let late = !self.faults_ended && flight.late && flight.done.is_some();
        WEIGHT / if slow { SLOW } else { 1 } / if late { LATE } else { 1 }
    }

    fn weigh_flights(&self) -> Weights {
        let hanging = |mask, replica| mask | u32::from(self.hangs(replica)) << replica;
        let mut weights = Weights {
            all: self.flights.len() as u64 * WEIGHT,
            hanging: (0..PLACES).fold(0, hanging),
            next: Duration::MAX,
            ..Weights::default()
        };
        for flight in &self.flights {
            let weight = self.weight(flight, weights.hanging);
            weights.ready += weight;
            if weight == 0 {
                weights.wait = true;
                weights.next = weights.next.min(self.goes_on_at(flight));
            }
        }
        weights
    }

    /// The operation at this place, if all are laid out by their weights.
    fn flight_at(&self, mut place: u64, hanging: u32) -> usize {
        for (index, flight) in self.flights.iter().enumerate() {
            let weight = self.weight(flight, hanging);
            if place < weight {
                return index;
            }
            place -= weight;
        }
        unreachable!("a place beyond all weights")
    }

    /// What does not go on is passed over, again and again until something does: as much time
    /// passes, but not beyond the moment at which something else is due.
    fn pass_over(&mut self, all: u64, ready: u64, next: Duration) {
        if all == ready {
            return;
        }
        let deadlines = self.engines.iter().filter_map(|engine| engine.deadline());
        let next = deadlines.fold(next, Duration::min);
        let step = u64::try_from(self.plan.step.as_nanos()).expect("short");
        let most = step * 2 * (all - ready) / ready;
        let until = self.clock + Duration::from_nanos(self.random.below(most + 1));
        self.clock = self.clock.max(until.min(next));
    }

    /// An operation makes progress.
    fn move_flight(&mut self, index: usize) -> Checked {
        if self.flights[index].done.is_some() {
            return self.deliver_reply(index);
        }
        self.advance(index);
        Ok(())
    }

    /// Whether the worker may take another request.
    fn has_room(&mut self, worker: usize) -> bool {
        let in_flight = self.pending.iter().filter(|p| p.worker == worker).count();
        in_flight < self.plan.depth && self.engines[worker].has_room()
    }

    /// The guest makes a request.
    fn submit_something(&mut self) -> Checked {
        let worker = self.random.index(self.plan.workers);
        if !self.has_room(worker) {
            return Ok(());
        }
        self.paused = self.random.chance(self.plan.pause);
        let kind = self.random.below(100);
        if kind < self.plan.flushes {
            return self.submit_flush(worker);
        }
        let range = self.plan.range(&mut self.random);
        if kind < self.plan.flushes + self.plan.reads {
            self.submit_read(worker, range)
        } else if kind < self.plan.flushes + self.plan.reads + self.plan.zeroes {
            let unmap = self.random.below(2) == 0;
            self.submit_zero(worker, range, unmap)
        } else {
            self.submit_write(worker, range)
        }
    }
}
