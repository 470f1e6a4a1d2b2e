//! A run from its first step to its last, and how it ends: the faults are over, and everything that
//! is still wrong must be found and repaired.

use std::time::Duration;

use super::Violation;
use super::ledger::Masks;
use super::plan::{PLACES, WriteCache, bits, widen};
use super::state::{Checked, World, show, trace};
use crate::common::SectorRange;
use crate::jobs::{JobId, JobInfo, JobStatus};
use crate::limits::FLAPPING_WINDOW;
use crate::limits::FOLLOWED_ERRORS_REST;

/// Steps in which all may become quiet once the guest has its answers. While replicas fail and are
/// resynced again and again it never does.
const STEPS_TO_QUIET: u64 = 4_000;

impl World {
    /// Runs to the end.
    ///
    /// # Errors
    /// The first violation.
    pub fn run(&mut self) -> Checked {
        self.compare_first()?;
        let mut steps_left = STEPS_TO_QUIET;
        while self.requests < self.plan.requests || (!self.is_quiet() && steps_left > 0) {
            self.step()?;
            if self.is_lost {
                return Ok(());
            }
            if self.pending.is_empty() {
                steps_left = steps_left.saturating_sub(1);
            }
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
        self.find_all()?;
        self.ledger.unwritable = Masks::default();
        let is_aborting = |job: &JobInfo| job.status == JobStatus::Aborting;
        let any_aborting = self.jobs.iter().any(is_aborting);
        self.resume_jobs()?;
        self.continue_held();
        self.finish_comparison()?;
        self.settle()?;
        if any_aborting {
            // Where a cancelled resync had not ended yet, no other one could begin.
            self.resume_jobs()?;
        }
        self.rest()?;
        self.check_resynced()?;
        // A replica whose repair failed is not repaired for some time.
        self.clock += FOLLOWED_ERRORS_REST;
        let failures = self.ledger.failures;
        self.read_all()?;
        // Of what the guest has its answer to, no vote is taken again if a replica reports only now
        // what it has lost.
        if self.ledger.failures == failures {
            self.check_recovered()?;
        }
        self.check_rewritten()?;
        self.check_scrub()?;
        self.prefer_all()?;
        self.check_flushes()?;
        for part in self.parts() {
            self.submit_write(0, part)?;
        }
        self.settle()?;
        if self.plan.write_cache != WriteCache::Off {
            self.submit_flush(0)?;
            self.settle()?;
        }
        self.check_durable_everywhere()?;
        self.check_all_written()?;
        self.check_limit_reported()?;
        self.read_all()
    }

    /// R3: what was written has a winner. Not where a replica has missed an earlier write and may
    /// have lost this one.
    fn check_all_written(&self) -> Checked {
        for range in self.shared.unresolved().iter() {
            let sectors = self.plan.mask(range);
            if bits(sectors).any(|sector| self.must_be_readable(1 << sector)) {
                let text = format!("{} was written, and counts as undecided", show(range));
                return Err(Violation::new("R3", text).at(sectors));
            }
        }
        Ok(())
    }

    /// Reads the whole disk.
    fn read_all(&mut self) -> Checked {
        for part in self.parts() {
            self.submit_read(0, part)?;
        }
        self.settle()
    }

    /// Until everything is answered and nothing is in flight, not even on an evicted replica.
    pub(super) fn settle(&mut self) -> Checked {
        while !self.is_quiet() || !self.flights.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// Long enough for everything that the engine does by itself: what it tries again and again,
    /// and the rejoin of a replica that is kept out.
    fn rest(&mut self) -> Checked {
        let timeout = self.plan.replica_timeout;
        let rest = Duration::from_secs(1) + timeout * 90;
        let latest = self.clock + rest + FLAPPING_WINDOW.min(timeout * 600);
        let mut until = self.clock + rest;
        let due = |world: &Self| {
            let mut engines = world.engines.iter();
            world.tick_wanted != 0 || engines.any(|engine| engine.deadline().is_some())
        };
        while self.clock < until && due(self) {
            self.step()?;
            let out = self.ledger.evicted & self.members | self.to_be_released;
            if out != 0 && self.clock < latest {
                until = self.clock + rest;
            }
        }
        self.settle()
    }

    /// A scrub finds every difference and every block that cannot be read, and accuses no replica
    /// otherwise; one that is to repair repairs it, and writes nowhere else.
    fn check_scrub(&mut self) -> Checked {
        self.finish_jobs()?;
        for repair in [false, true] {
            let equal = self.are_equal();
            let differ = self.sectors_that_differ();
            let may_write = self.may_be_repaired();
            let unreadable = self.unreadable_sectors();
            let stale = self.ledger.excused;
            let failures = self.ledger.failures;
            let threshold = self.threshold;
            self.accused = 0;
            self.rewritten = Masks::default();
            trace!(self, "-- scrub, repair {repair}; these differ: {differ:?}");
            let begun = self.with_jobs(|jobs, health| jobs.scrub(repair, 0, health))?;
            let Ok(id) = begun else {
                return Err(Violation::new("scrub", "it does not begin"));
            };
            self.finish_jobs()?;
            if self.jobs.iter().any(|job| job.id == id) {
                return Err(Violation::new("scrub", "it does not end"));
            }
            if equal && self.accused != 0 {
                let text = format!("all are equal, and {:b} is accused", self.accused);
                return Err(Violation::new("scrub", text).at(self.accused));
            }
            if equal && failures == self.ledger.failures {
                // W7: a resync, or a vote on copies in doubt, writes what is equal again.
                let stale = stale.map(|sectors| widen(sectors, self.plan.block_sectors));
                self.check_nothing_else_written(&stale)?;
            }
            // Fewer versions win if it was raised meanwhile (W10).
            let same_threshold = threshold == self.threshold;
            if let Some(sector) = differ
                .iter()
                .find(|sector| same_threshold && self.accused >> **sector & 1 == 0)
            {
                let text = format!("{sector} differs and was not found");
                return Err(Violation::new("scrub", text).at(1 << sector));
            }
            // After a failed flush a resync writes too.
            if let Some(may_write) = may_write.filter(|_| failures == self.ledger.failures) {
                self.check_unreadable(id, unreadable, repair)?;
                self.check_nothing_else_written(&may_write)?;
            }
            self.check_without_winner()?;
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

    /// R4: the scrub `id` has counted the sectors of the blocks that cannot be read, and has
    /// repaired what has a winner.
    fn check_unreadable(&self, id: JobId, sectors: u64, repair: bool) -> Checked {
        // Otherwise another scrub or a resync may have repaired some before.
        let alone = !self.plan.rewrite_corrupted && !repair;
        let counted = self.completed_job.as_ref();
        let counted = counted.filter(|job| alone && job.id == id);
        let is_wrong = |job: &&JobInfo| job.unreadable_sectors_found != sectors;
        if let Some(job) = counted.filter(is_wrong) {
            let text = format!(
                "{sectors} sectors cannot be read, and the scrub found {}",
                job.unreadable_sectors_found
            );
            return Err(Violation::new("R4", text));
        }
        if !repair {
            return Ok(());
        }
        for replica in self.members() {
            for sector in bits(self.ledger.unreadable[replica]) {
                if self.block_of(sector).all(|sector| self.has_winner(sector)) {
                    let text = format!("{sector} cannot be read on replica {replica}");
                    return Err(Violation::new("R6", text).at(1 << sector));
                }
            }
        }
        Ok(())
    }

    /// R3: after a scrub it is known which sectors have no winner. Not where it may have found
    /// holes, which it does not read.
    fn check_without_winner(&self) -> Checked {
        if !self.is_fresh() || self.ledger.evicted & self.members != 0 || self.plan.asks_for_holes()
        {
            return Ok(());
        }
        let known = self.shared.unresolved();
        let is_known = |sector: usize| known.overlaps(SectorRange::new(sector as u64, 1));
        let is_wrong = |sector: &usize| is_known(*sector) == self.has_winner(*sector);
        match (0..self.changed_at.len()).find(is_wrong) {
            None => Ok(()),
            Some(sector) => {
                let text = format!("{sector} counts as undecided: {}", is_known(sector));
                Err(Violation::new("R3", text).at(1 << sector))
            }
        }
    }

    /// R6: a repair has written no more than these.
    fn check_nothing_else_written(&self, may_write: &Masks) -> Checked {
        for replica in self.members() {
            let more = self.rewritten[replica] & !may_write[replica];
            if more != 0 {
                let text = format!("replica {replica} was repaired where nothing is corrupt");
                return Err(Violation::new("R6", text).at(more));
            }
        }
        Ok(())
    }

    /// Whether no replica is stale.
    fn is_fresh(&self) -> bool {
        self.members()
            .all(|replica| self.ledger.excused[replica] == 0)
    }

    /// The number of sectors that cannot be read, counted for each replica.
    fn unreadable_sectors(&self) -> u64 {
        let sectors = |r: usize| u64::from(self.ledger.unreadable[r].count_ones());
        self.members().map(sectors).sum()
    }

    /// The blocks of each replica that differ from the others or cannot be read. `None` if some
    /// replica may be stale.
    fn may_be_repaired(&self) -> Option<Masks> {
        let mut blocks = Masks::default();
        for replica in self.members() {
            let differs = |sector: &usize| {
                let value = self.replicas[replica].value(*sector);
                let mut others = self.members();
                others.any(|other| self.replicas[other].value(*sector) != value)
            };
            let differing = (0..self.changed_at.len()).filter(differs);
            let sectors = differing.fold(self.ledger.unreadable[replica], |mask, sector| {
                mask | 1 << sector
            });
            blocks[replica] = widen(sectors, self.plan.block_sectors);
        }
        self.is_fresh().then_some(blocks)
    }

    /// Until no job is left.
    pub(super) fn finish_jobs(&mut self) -> Checked {
        while !self.jobs.is_empty() || !self.is_quiet() || !self.flights.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// W7: if all copies are equal, flushes succeed again: the first may report what went wrong
    /// before, and the second what a job has flushed in vain.
    fn check_flushes(&mut self) -> Checked {
        if self.plan.write_cache == WriteCache::Off {
            return Ok(());
        }
        for last in [false, false, true] {
            self.must_flush = last;
            self.submit_flush(0)?;
            self.settle()?;
            self.rest()?;
            self.finish_jobs()?;
        }
        self.must_flush = false;
        Ok(())
    }

    /// Whether all replicas hold the same.
    pub(super) fn are_equal(&self) -> bool {
        let all = self.plan.mask(self.plan.disk());
        let is_readable = |r: usize| self.ledger.unreadable[r] == 0;
        self.are_equal_at(all) && self.members().all(is_readable)
    }

    /// Whether all replicas hold the same in these sectors, can be read there, and have missed
    /// nothing there since they flushed. Not what was not durable enough when a replica was given
    /// up (W11): a failed flush may have left too few copies that vote.
    pub(super) fn must_be_readable(&self, sectors: u64) -> bool {
        if sectors & self.ledger.lost_by_crash != 0 {
            return false;
        }
        let doubt = |r: usize| self.ledger.unsound[r] | self.ledger.unreadable[r];
        self.are_equal_at(sectors) && self.members().all(|r| doubt(r) & sectors == 0)
    }

    /// Whether all replicas hold the same in these sectors.
    fn are_equal_at(&self, sectors: u64) -> bool {
        let first = self.members().next().unwrap_or(0);
        let value = |replica: usize, sector| self.replicas[replica].value(sector);
        let is_first = |sector: usize| {
            self.members()
                .all(|r| value(r, sector) == value(first, sector))
        };
        bits(sectors).all(is_first)
    }

    /// The sectors of the block.
    pub(super) fn block_of(&self, sector: usize) -> std::ops::Range<usize> {
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        let start = sector - sector % block;
        start..start + block
    }

    /// The most votes for a version of the sector, and how many replicas vote. A stale replica has
    /// no vote; which ones are stale only the engine knows.
    fn votes(&self, sector: usize) -> (usize, usize) {
        let votes = |r: &usize| {
            let readable = self.ledger.unreadable[*r] >> sector & 1 == 0;
            self.ledger.excused[*r] == 0 && readable
        };
        let values: Vec<_> = self
            .members()
            .filter(votes)
            .map(|r| self.replicas[r].value(sector))
            .collect();
        let same = |value| values.iter().filter(|other| *other == value).count();
        (values.iter().map(same).max().unwrap_or(0), values.len())
    }

    fn has_winner(&self, sector: usize) -> bool {
        self.votes(sector).0 >= self.threshold
    }

    /// Whether a page that was not written back, and that is wrong or was said to be flushed, hides
    /// a hole (W8).
    pub(super) fn hides_a_hole(&self, replica: usize, sector: usize) -> bool {
        let is_lost = self.replicas[replica].lost() >> sector & 1 == 1;
        let lied = self.ledger.wrong(replica) | self.ledger.falsely_durable[replica];
        self.plan.asks_for_holes()
            && is_lost
            && lied >> sector & 1 == 1
            && self.replicas[replica].is_hole(sector)
    }

    /// The sectors in which replicas differ, if each sector of their block has a winner. Not those
    /// where a page hides a hole.
    fn sectors_that_differ(&self) -> Vec<usize> {
        let hides_a_hole = |sector: usize| {
            let mut members = self.members();
            members.any(|replica| self.hides_a_hole(replica, sector))
        };
        let differs = |sector: &usize| {
            let (most, voters) = self.votes(*sector);
            let is_decided = self.block_of(*sector).all(|sector| self.has_winner(sector));
            is_decided && most < voters && !hides_a_hole(*sector)
        };
        (0..self.changed_at.len()).filter(differs).collect()
    }
}
