//! A run from its first step to its last, and how it ends: the faults are over, and everything that
//! is still wrong must be found and repaired.

use std::time::Duration;

use super::Violation;
use super::plan::{PLACES, WriteCache};
use super::state::{Checked, World, trace};

impl World {
    /// Runs to the end.
    ///
    /// # Errors
    /// The first violation.
    pub fn run(&mut self) -> Checked {
        while self.requests < self.plan.requests || !self.is_quiet() {
            self.step()?;
        }
        self.finale()
    }

    /// After the last request all replicas answer again and are resynced. A read of everything
    /// finds and repairs what is wrong, and so does a scrub. A write of everything leaves all
    /// replicas equal and durable.
    fn finale(&mut self) -> Checked {
        trace!(
            self,
            "-- no more faults: wait, read all, scrub, write all, flush, read all"
        );
        self.faults_ended = true;
        // So that no replica is late only because the others have their turn first.
        self.plan.step = Duration::from_nanos(10);
        self.hung_until = [Duration::ZERO; PLACES];
        self.resume_jobs()?;
        self.settle()?;
        self.rest()?;
        self.check_resynced()?;
        self.read_all()?;
        self.check_rewritten()?;
        self.check_scrub()?;
        for part in self.parts() {
            self.submit_write(0, part)?;
        }
        self.settle()?;
        if self.plan.write_cache != WriteCache::Off {
            self.submit_flush(0)?;
            self.settle()?;
        }
        self.check_durable_everywhere()?;
        self.read_all()
    }

    /// Reads the whole disk.
    fn read_all(&mut self) -> Checked {
        for part in self.parts() {
            self.submit_read(0, part)?;
        }
        self.settle()
    }

    /// Until everything is answered and nothing is in flight, not even on an evicted replica.
    fn settle(&mut self) -> Checked {
        while !self.is_quiet() || !self.flights.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// Long enough for everything that the engine does by itself.
    fn rest(&mut self) -> Checked {
        let until = self.clock + Duration::from_secs(10);
        let due = |world: &Self| {
            let deadline = world
                .engines
                .iter()
                .any(|engine| engine.deadline().is_some());
            deadline || world.tick_wanted != 0
        };
        while self.clock < until && due(self) {
            self.step()?;
        }
        self.settle()
    }

    /// A scrub finds every difference and accuses no replica otherwise; one that is to repair
    /// repairs it.
    fn check_scrub(&mut self) -> Checked {
        self.finish_jobs()?;
        let equal = self.are_equal();
        for repair in [false, true] {
            let differ = self.sectors_that_differ();
            self.accused = 0;
            let writes = self.rewrites;
            trace!(self, "-- scrub, repair {repair}; these differ: {differ:?}");
            let begun = self.with_jobs(|jobs, health| jobs.scrub(repair, 0, health))?;
            let Ok(id) = begun else {
                return Err(Violation::new("scrub", "it does not begin"));
            };
            self.finish_jobs()?;
            if self.jobs.iter().any(|job| job.id == id) {
                return Err(Violation::new("scrub", "it does not end"));
            }
            if equal && (self.accused != 0 || self.rewrites != writes) {
                let text = format!("all are equal, and {:b} is accused", self.accused);
                return Err(Violation::new("scrub", text));
            }
            if let Some(sector) = differ
                .iter()
                .find(|sector| self.accused >> **sector & 1 == 0)
            {
                let text = format!("{sector} differs and was not found");
                return Err(Violation::new("scrub", text).at(1 << sector));
            }
            let after = self.sectors_that_differ();
            if let Some(sector) = differ
                .iter()
                .find(|sector| repair && after.contains(sector))
            {
                let text = format!("{sector} differs and was not repaired");
                return Err(Violation::new("scrub", text).at(1 << sector));
            }
        }
        Ok(())
    }

    /// Until no job is left.
    fn finish_jobs(&mut self) -> Checked {
        while !self.jobs.is_empty() || !self.is_quiet() || !self.flights.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// Whether all replicas hold the same.
    fn are_equal(&self) -> bool {
        let first = self.members().next().unwrap_or(0);
        let value = |replica: usize, sector| self.replicas[replica].value(sector);
        let is_first = |sector: usize| {
            self.members()
                .all(|r| value(r, sector) == value(first, sector))
        };
        (0..self.changed_at.len()).all(is_first)
    }

    /// The sectors in which replicas differ, if each sector of their block has a winner.
    fn sectors_that_differ(&self) -> Vec<usize> {
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        let value = |replica: usize, sector| self.replicas[replica].value(sector);
        // A stale replica has no vote; which ones are stale only the engine knows.
        let voters: Vec<usize> = self
            .members()
            .filter(|r| self.ledger.excused[*r] == 0)
            .collect();
        let most = |sector: usize| {
            let votes = |r: &usize| {
                voters
                    .iter()
                    .filter(|o| value(**o, sector) == value(*r, sector))
                    .count()
            };
            voters.iter().map(votes).max().unwrap_or(0)
        };
        let has_winner = |sector: usize| most(sector) >= self.plan.threshold;
        let differs = |sector: &usize| {
            let start = sector - sector % block;
            (start..start + block).all(has_winner) && most(*sector) < voters.len()
        };
        (0..self.changed_at.len()).filter(differs).collect()
    }
}
