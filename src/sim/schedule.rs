//! What happens next: one thing out of all that could.
//!
//! An operation takes effect on a sector, a reply reaches an engine, the guest makes a request, a
//! grant of a lock reaches another worker, a worker looks at the clock, a fault strikes. When
//! nothing can happen by itself the clock jumps to the next moment at which something is due.

use std::time::Duration;

use super::Violation;
use super::effects::number_of;
use super::state::{Checked, World};
use crate::engine::Engine;

/// Steps of a run, at most: a longer run never ends.
const STEPS_MAX: u64 = 600_000;

/// Steps for which a guest that has its answers waits until all is quiet, on average.
const PAUSED_STEPS: u64 = 4096;

impl World {
    /// One thing happens.
    pub(super) fn step(&mut self) -> Checked {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(Violation::new("I6", "the run does not come to an end"));
        }
        if !self.faults_ended {
            self.inject_faults()?;
        }
        self.pass_time();
        // Jobs that fail again and again leave no moment in which all is quiet.
        if self.paused && self.pending.is_empty() && self.random.below(PAUSED_STEPS) == 0 {
            self.paused = false;
        }
        let may_submit = !self.paused && !self.faults_ended && self.requests < self.plan.requests;
        let may_submit = may_submit && (0..self.plan.workers).any(|worker| self.has_room(worker));
        let due = self.due();
        let ticks = usize::try_from(due.count_ones()).expect("few");
        let (wakes, flights) = (2 * self.wakes.len(), self.flights.len());
        let guest = if may_submit { self.plan.eagerness } else { 0 };
        let waits = self.flights.iter().any(|flight| self.waits(flight));
        if waits && ticks + wakes == 0 && self.random.below(16) == 0 {
            // So that a replica that hangs does not have all the others work for it in vain.
            return self.jump();
        }
        if ticks + wakes + guest == 0 && self.flights.iter().all(|flight| self.waits(flight)) {
            return self.jump();
        }
        let choice = self.random.index(ticks + wakes + flights + guest);
        if choice < ticks {
            self.tick(due)?;
        } else if choice < ticks + wakes {
            let (worker, request) = self.wakes.swap_remove((choice - ticks) / 2);
            self.grant(worker, request)?;
        } else if choice < ticks + wakes + flights {
            self.move_flight(choice - ticks - wakes)?;
        } else {
            self.submit_something()?;
        }
        if self.is_quiet() {
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
        let deadlines = self.engines.iter().filter_map(Engine::deadline);
        let hung = self.flights.iter().map(|flight| self.goes_on_at(flight));
        let next = deadlines.chain(hung).min();
        match next {
            Some(next) if next < Duration::MAX => {
                self.clock = self.clock.max(next);
                Ok(())
            }
            _ if self.is_quiet() => Ok(()),
            _ => {
                let waiting: Vec<_> = self.pending.iter().map(|p| number_of(p.tag)).collect();
                let text =
                    format!("nothing will ever happen; requests without an answer: {waiting:?}");
                Err(Violation::new("I6", text))
            }
        }
    }

    /// An operation makes progress, unless its replica is slow or hangs.
    fn move_flight(&mut self, index: usize) -> Checked {
        let replica = self.flights[index].replica();
        let slow =
            !self.faults_ended && self.plan.slow & (1 << replica) != 0 && self.random.below(3) != 0;
        if slow || self.waits(&self.flights[index]) {
            return Ok(());
        }
        if self.flights[index].done.is_some() {
            let late = self.flights[index].late && !self.faults_ended;
            if late && self.random.below(12) != 0 {
                return Ok(());
            }
            return self.deliver_reply(index);
        }
        self.advance(index);
        Ok(())
    }

    /// Whether the worker may take another request.
    fn has_room(&self, worker: usize) -> bool {
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
