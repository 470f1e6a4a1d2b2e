//! What happens next: one thing out of all that could.
//!
//! An operation takes effect on a sector, a reply arrives, the guest asks for something, a grant
//! reaches another worker, a worker looks at the clock, a fault strikes. When nothing can happen by
//! itself the clock jumps to the next moment at which something is due.

use std::time::Duration;

use super::Violation;
use super::world::{Checked, World, trace};

/// Steps of a run, at most: more means that it goes round in circles.
const STEPS_MAX: u64 = 400_000;

impl World {
    /// One thing happens.
    pub(super) fn step(&mut self) -> Checked {
        self.steps += 1;
        if self.steps > STEPS_MAX {
            return Err(Violation::new("I6", "the run does not come to an end"));
        }
        if !self.calm {
            self.strike()?;
        }
        self.pass_time();
        let may_submit = !self.paused && !self.calm && self.requests < self.plan.requests;
        let may_submit = may_submit && (0..self.plan.workers).any(|worker| self.has_room(worker));
        let due = self.due();
        let ticks = usize::try_from(due.count_ones()).expect("few");
        let (wakes, flights) = (2 * self.wakes.len(), self.flights.len());
        let guest = if may_submit { self.plan.eagerness } else { 0 };
        let waits = self
            .flights
            .iter()
            .any(|flight| self.hangs(flight.replica()));
        if waits && ticks + wakes == 0 && self.random.below(16) == 0 {
            // While one hangs nothing much happens for long.
            return self.jump();
        }
        if ticks + wakes + guest == 0
            && self
                .flights
                .iter()
                .all(|flight| self.hangs(flight.replica()))
        {
            return self.jump();
        }
        let choice = self.random.index(ticks + wakes + flights + guest);
        if choice < ticks {
            self.tick(due)?;
        } else if choice < ticks + wakes {
            let (worker, request) = self.wakes.swap_remove((choice - ticks) / 2);
            trace!(
                self,
                "worker {}: request {} has its lock", worker.0, request.0
            );
            let (engine, effects) = self.engine(usize::from(worker.0));
            engine.granted(request, effects);
            self.look_at_effects(None)?;
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

    fn tick(&mut self, due: u32) -> Checked {
        let worker = self.random.bit(u64::from(due));
        self.tick_wanted &= !(1 << worker);
        let clock = self.clock;
        let (engine, effects) = self.engine(worker as usize);
        engine.tick(clock, effects);
        self.look_at_effects(None)
    }

    /// Nothing happens by itself: on to the next moment at which something is due.
    fn jump(&mut self) -> Checked {
        if self.is_quiet() && self.paused {
            self.paused = false;
            return Ok(());
        }
        let deadlines = self
            .engines
            .iter()
            .filter_map(crate::engine::Engine::deadline);
        let hung = self
            .flights
            .iter()
            .map(|flight| self.hung_until[flight.replica()]);
        let next = deadlines.chain(hung).min();
        match next {
            Some(next) if next < Duration::MAX => {
                self.clock = self.clock.max(next);
                Ok(())
            }
            _ if self.is_quiet() => Ok(()),
            _ => {
                let waiting: Vec<_> = self.pending.iter().map(|p| p.tag.0).collect();
                let text =
                    format!("nothing will ever happen; requests without an answer: {waiting:?}");
                Err(Violation::new("I6", text))
            }
        }
    }

    /// Whether the replica does nothing now.
    pub(super) fn hangs(&self, replica: usize) -> bool {
        self.hung_until[replica] > self.clock
    }

    /// An operation makes progress, unless its replica is slow or hangs.
    fn move_flight(&mut self, index: usize) -> Checked {
        let replica = self.flights[index].replica();
        let slow = !self.calm && self.plan.slow & (1 << replica) != 0 && self.random.below(3) != 0;
        if slow || self.hangs(replica) {
            return Ok(());
        }
        self.advance(index)
    }

    /// Things that happen by themselves.
    fn strike(&mut self) -> Checked {
        let faults = self.plan.faults;
        let replica = self.random.bit(u64::from(self.members)) as usize;
        let guest_goes_on = self.requests < self.plan.requests && !self.paused;
        if guest_goes_on && self.plan.acts > 0 && self.random.chance(self.plan.operator) {
            self.plan.acts -= 1;
            self.operate()?;
        }
        if self.random.chance(self.plan.writeback) {
            let sectors = self.random.bits() & self.random.bits();
            self.write_back(replica, sectors);
        }
        if self.replicas[replica].lost() != 0 && self.random.chance(1 << 12) {
            self.evict(replica);
        }
        if self.random.chance(faults.hang) && !self.hangs(replica) {
            let most = u64::try_from(self.plan.replica_timeout.as_micros()).expect("short") * 4;
            let time = Duration::from_micros(self.random.below(most));
            trace!(self, "replica {replica} hangs for {time:?}");
            self.hung_until[replica] = self.clock + time;
        }
        if self.plan.dead >> replica & 1 == 1 && self.random.chance(1 << 9) && !self.hangs(replica)
        {
            trace!(self, "replica {replica} is as good as dead");
            let long = self.clock + self.plan.replica_timeout * 20;
            self.hung_until[replica] = if self.plan.only_death() {
                Duration::MAX
            } else {
                long
            };
        }
        if self.random.chance(faults.crash) {
            return self.crash();
        }
        if self.plan.is_faulty(replica) {
            if self.random.chance(faults.rot) {
                self.rot(replica);
            }
            if self.random.chance(faults.writeback_error) {
                self.fail_writeback(replica);
            }
        }
        Ok(())
    }

    fn has_room(&self, worker: usize) -> bool {
        let in_flight = self.pending.iter().filter(|p| p.worker == worker).count();
        in_flight < self.plan.depth && self.engines[worker].has_room()
    }

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
