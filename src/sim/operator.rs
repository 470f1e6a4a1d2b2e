//! What the operator does while the guest runs: replicas are added and removed, the disk grows,
//! jobs are begun, paused, cancelled.
//!
//! What must hold of it: a replica that was added never counts where it has not been written to (it
//! begins with bytes that nobody wrote, so a read that returns them is noticed); none is removed
//! that is needed; its place is free only when nothing is in flight there; jobs go through their
//! states in order; a scrub finds whatever is damaged, mends it if it is to, and accuses nobody
//! otherwise; what a disk has grown by is zeroes until it is written, whoever is in service, on its
//! way in or out.

use super::Violation;
use super::model::Value;
use super::plan::{PLACES, SECTORS_MAX, bits};
use super::replica::SimReplica;
use super::world::{Checked, PendingKind, World, trace};
use crate::common::{ReplicaIndex, SectorRange};
use crate::engine::mutant::{Mutant, is_broken};
use crate::jobs::{JobChange, JobEvent, JobId, JobInfo, JobKind, JobStatus, Jobs};
use crate::quorum::health::{Health, NotRemoved};

impl World {
    /// How many replicas the disk has.
    pub(super) fn count(&self) -> usize {
        usize::try_from(self.members.count_ones()).expect("few")
    }

    /// The replicas of the disk.
    pub(super) fn members(&self) -> impl Iterator<Item = usize> + use<> {
        bits(u64::from(self.members))
    }

    /// Whether jobs may accuse anybody.
    pub(super) fn is_scrubbing(&self) -> bool {
        let is_scrub = |job: &&JobInfo| !matches!(job.kind, JobKind::Resync(_));
        self.jobs.iter().any(|job| is_scrub(&job))
    }

    /// The operator does something.
    pub(super) fn operate(&mut self) -> Checked {
        match self.random.below(11) {
            0 | 1 => self.add_replica(),
            2 | 3 => self.remove_replica(),
            4 | 5 => {
                let repair = self.random.below(2) == 0;
                trace!(self, "operator: scrub, repair {repair}");
                self.statistics.scrubs += 1;
                self.with_jobs(|jobs, health| jobs.scrub(repair, 0, health))
                    .map(|_| ())
            }
            10 => {
                self.grow();
                Ok(())
            }
            choice => self.operate_on_job(choice),
        }
    }

    fn operate_on_job(&mut self, choice: u64) -> Checked {
        if self.jobs.is_empty() {
            return Ok(());
        }
        let index = self.random.index(self.jobs.len());
        let id = self.jobs[index].id;
        let speed = self.random.pick(&[0, 512, 1 << 20]);
        trace!(self, "operator: {id}, {choice}, {speed}");
        self.with_jobs(|jobs, health| match choice {
            6 => jobs.pause(id, health),
            7 => jobs.resume(id, health),
            8 => jobs.cancel(id, health),
            _ => jobs.set_speed(id, speed),
        })
        .map(|_| ())
    }

    /// The disk grows. Every replica has been made longer by zeroes, durably, before anybody hears
    /// of it.
    fn grow(&mut self) {
        let blocks = (SECTORS_MAX - self.plan.sectors) / self.plan.block_sectors;
        if blocks == 0 {
            return;
        }
        self.plan.sectors += (1 + self.random.below(blocks.min(4))) * self.plan.block_sectors;
        trace!(self, "operator: the disk grows to {}", self.plan.sectors);
        self.statistics.grown += 1;
        let (from, sectors) = (
            self.stirred.len(),
            usize::try_from(self.plan.sectors).expect("few"),
        );
        self.stirred.resize(sectors, 0);
        self.model.grow(sectors);
        for replica in &mut self.replicas {
            replica.grow(sectors);
        }
        if is_broken(Mutant::GrownNotZeroed) {
            for place in self.members() {
                for sector in from..sectors {
                    self.rotten += 1;
                    self.replicas[place].rot(sector, Value::rotten(self.rotten));
                }
            }
        }
        // Who has left the set is not asked there either until it is back.
        let new = self
            .plan
            .mask(SectorRange::new(from as u64, (sectors - from) as u64));
        for place in bits(u64::from(self.ledger.out)) {
            self.mark_excused(place, new);
        }
        self.shared.grow(self.plan.sectors);
    }

    fn add_replica(&mut self) -> Checked {
        let taken = self.members | self.leaving;
        let free: Vec<usize> = (0..PLACES)
            .filter(|place| taken >> place & 1 == 0)
            .collect();
        if free.is_empty() || self.count() > 5 {
            return Ok(());
        }
        let place = free[self.random.index(free.len())];
        let bit = 1 << place;
        trace!(self, "operator: replica {place} is added");
        self.statistics.added += 1;
        let sectors = self.stirred.len();
        let mut replica = SimReplica::new(sectors);
        for sector in 0..sectors {
            self.rotten += 1;
            replica.rot(sector, Value::rotten(self.rotten));
        }
        let all = replica.all();
        self.replicas[place] = replica;
        self.members |= bit;
        self.ledger.any = true;
        self.unsynced |= bit;
        self.ever += 1;
        self.plan.dead &= !bit;
        self.plan.slow &= !bit;
        self.hung_until[place] = std::time::Duration::ZERO;
        if self.plan.faulty != 0 && self.random.below(3) == 0 {
            self.plan.faulty |= bit;
        } else {
            self.plan.faulty &= !bit;
        }
        self.ledger.forget(place);
        for pending in &mut self.pending {
            if let PendingKind::Write(write) = &mut pending.kind {
                // What the one before has done for it is forgotten.
                write.succeeded &= !bit;
                write.failed &= !bit;
            }
        }
        self.mark_excused(place, all);
        self.shared.add(index(place));
        self.tick_wanted = (1 << self.plan.workers) - 1;
        if self.random.below(2) == 0 {
            let _ = self.with_jobs(|jobs, health| jobs.resync(index(place), 0, health))?;
        }
        Ok(())
    }

    fn remove_replica(&mut self) -> Checked {
        let place = self.random.bit(u64::from(self.members)) as usize;
        let bit = 1 << place;
        if self.plan.dead != 0 && self.plan.dead & bit == 0 {
            // Without it those that are dead might be needed.
            return Ok(());
        }
        let mut events = Vec::new();
        let removed = self.shared.remove(index(place), |event| events.push(event));
        trace!(
            self,
            "operator: replica {place} is to be removed: {removed:?}"
        );
        if let Err(reason) = removed {
            let too_few = self.count() <= self.plan.threshold;
            if (reason == NotRemoved::TooFew) != too_few {
                let text = format!("replica {place} of {:b} stays: {reason}", self.members);
                return Err(Violation::new("remove", text));
            }
            return Ok(());
        }
        self.statistics.removed += 1;
        self.ledger.any = true;
        let before = self.members;
        self.members &= !bit;
        self.check_removal(place, before)?;
        self.leaving |= bit;
        self.unsynced &= !bit;
        self.ledger.out |= bit;
        self.ledger.failures[place] += 1;
        self.ledger.departures[place] += 1;
        self.mark_excused(place, self.replicas[place].all());
        self.tick_wanted = (1 << self.plan.workers) - 1;
        self.jobs_told(events)
    }

    /// As many as t are left, and hold the newest of every sector, and durably what was flushed.
    fn check_removal(&self, place: usize, before: u32) -> Checked {
        let threshold = self.plan.threshold;
        if self.count() < threshold {
            return Err(Violation::new("remove", "fewer than t replicas are left"));
        }
        let mut crashed = self.model.clone();
        crashed.crashed(self.now + 1);
        for sector in 0..self.stirred.len() {
            let bit = 1 << sector;
            if self.unsynced >> place & 1 == 1 && self.ledger.excused[place] & bit != 0 {
                // It was added, and nothing that it was written here has been answered.
                continue;
            }
            let lies = |replica: usize| {
                let lied = self.ledger.lied[replica] | self.ledger.lied_durable[replica];
                (lied | self.ledger.dropped[replica]) & bit != 0
            };
            let durable = |replica: usize| {
                let value = self.replicas[replica].durable(sector);
                lies(replica) || crashed.is_permitted(sector, value, self.now + 1)
            };
            let fresh = |replica: usize| {
                let value = self.replicas[replica].value(sector);
                lies(replica) || self.model.is_permitted(sector, value, self.now)
            };
            let count = |members: u32, holds: &dyn Fn(usize) -> bool| {
                bits(u64::from(members))
                    .filter(|replica| holds(*replica))
                    .count()
            };
            let holders: [(&str, &dyn Fn(usize) -> bool); 2] =
                [("newest", &fresh), ("durable", &durable)];
            for (what, holds) in holders {
                if count(before, holds) >= threshold && count(self.members, holds) < threshold {
                    let text =
                        format!("replica {place} had one of the last {what} copies of {sector}");
                    return Err(Violation::new("remove", text));
                }
            }
        }
        Ok(())
    }

    /// The place of a removed replica is free.
    pub(super) fn released(&mut self, replica: ReplicaIndex) -> Checked {
        let place = replica.as_usize();
        trace!(self, "replica {place} is released");
        let in_flight = self.flights.iter().any(|flight| flight.replica() == place);
        if self.leaving >> place & 1 == 0 || in_flight {
            let text = format!("the place of replica {place} is not free");
            return Err(Violation::new("remove", text));
        }
        self.leaving &= !(1 << place);
        Ok(())
    }

    /// Does something with the jobs, as another thread would.
    pub(super) fn with_jobs<R>(
        &mut self,
        with: impl FnOnce(&mut Jobs, &Health) -> R,
    ) -> Result<R, Violation> {
        let mut events = Vec::new();
        let result = self.shared.jobs(|event| events.push(event), with);
        self.tick_wanted |= 1;
        self.jobs_told(events)?;
        Ok(result)
    }

    fn jobs_told(&mut self, events: Vec<JobEvent>) -> Checked {
        events
            .into_iter()
            .try_for_each(|event| self.job_told(event))
    }

    /// An event of a job has come out.
    pub(super) fn job_told(&mut self, event: JobEvent) -> Checked {
        trace!(self, "job: {:?} {:?}", event.what, event.job);
        let (id, status) = (event.job.id, event.job.status);
        let known = self.jobs.iter().position(|job| job.id == id);
        let before = known.map(|known| self.jobs[known].status);
        let is_next = match (event.what, before) {
            (JobChange::Status, None) => status == JobStatus::Created,
            (JobChange::Status, Some(before)) => follows(before, status),
            (JobChange::Completed | JobChange::Cancelled, before) => before == Some(status),
        };
        if !is_next {
            let text = format!("{id} is {status:?} after {before:?}");
            return Err(Violation::new("jobs", text));
        }
        match known {
            Some(known) if status == JobStatus::Null => drop(self.jobs.swap_remove(known)),
            Some(known) => self.jobs[known] = event.job.clone(),
            None => self.jobs.push(event.job.clone()),
        }
        match (event.what, event.job.kind, event.job.error) {
            (JobChange::Completed, JobKind::Resync(replica), None) => {
                self.statistics.resynced += 1;
                self.unsynced &= !(1 << replica.0);
                self.check_progress(&event.job)?;
                self.check_synced(replica.as_usize())
            }
            (JobChange::Completed, _, None) => self.check_progress(&event.job),
            _ => Ok(()),
        }
    }

    fn check_progress(&self, job: &JobInfo) -> Checked {
        if job.current_bytes == job.total_bytes {
            return Ok(());
        }
        let text = format!(
            "{} is done at {} of {}",
            job.id, job.current_bytes, job.total_bytes
        );
        Err(Violation::new("jobs", text))
    }

    /// A replica that was added, and has not failed or left since, holds everything when its resync
    /// is over.
    fn check_synced(&self, replica: usize) -> Checked {
        if self.ledger.failures[replica] == 0 && self.ledger.excused[replica] != 0 {
            let text = format!(
                "replica {replica} is up to date, but was not written to at {:b}",
                self.ledger.excused[replica]
            );
            return Err(Violation::new("resync", text));
        }
        Ok(())
    }

    /// In the end: nobody holds a job up any more.
    pub(super) fn let_jobs_go_on(&mut self) -> Checked {
        let ids: Vec<JobId> = self.jobs.iter().map(|job| job.id).collect();
        let members: Vec<usize> = self.members().collect();
        self.with_jobs(|jobs, health| {
            for id in ids {
                let _ = jobs.resume(id, health);
                let _ = jobs.set_speed(id, 0);
            }
            for replica in members {
                let _ = jobs.resync(index(replica), 0, health);
            }
        })
    }

    /// Everything is calm: a scrub finds whatever differs, and one that repairs mends it.
    pub(super) fn check_scrub(&mut self) -> Checked {
        self.finish_jobs()?;
        let equal = self.are_equal();
        for repair in [false, true] {
            let differ = self.sectors_that_differ();
            self.accused = 0;
            let writes = self.rewrites;
            trace!(self, "-- scrub, repair {repair}; these differ: {differ:?}");
            let begun = self.with_jobs(|jobs, health| jobs.scrub(repair, 0, health))?;
            let Ok(id) = begun else {
                return Err(Violation::new("scrub", "it cannot be begun"));
            };
            self.finish_jobs()?;
            if self.jobs.iter().any(|job| job.id == id) {
                return Err(Violation::new("scrub", "it does not end"));
            }
            if equal && (self.accused != 0 || self.rewrites != writes) {
                let text = format!("all were equal, and {:b} is accused", self.accused);
                return Err(Violation::new("scrub", text));
            }
            if let Some(sector) = differ
                .iter()
                .find(|sector| self.accused >> **sector & 1 == 0)
            {
                return Err(Violation::new("scrub", format!("{sector} was not found")));
            }
            let after = self.sectors_that_differ();
            if let Some(sector) = differ
                .iter()
                .find(|sector| repair && after.contains(sector))
            {
                return Err(Violation::new("scrub", format!("{sector} was not mended")));
            }
        }
        Ok(())
    }

    fn are_equal(&self) -> bool {
        let first = self.members().next().unwrap_or(0);
        let value = |replica: usize, sector| self.replicas[replica].value(sector);
        let is_first = |sector: usize| {
            self.members()
                .all(|r| value(r, sector) == value(first, sector))
        };
        (0..self.stirred.len()).all(is_first)
    }

    /// Until no job is left.
    fn finish_jobs(&mut self) -> Checked {
        while !self.jobs.is_empty() || !self.is_quiet() || !self.flights.is_empty() {
            self.step()?;
        }
        Ok(())
    }

    /// The sectors that have a winner, and so has their block, and somebody who holds something
    /// else.
    fn sectors_that_differ(&self) -> Vec<usize> {
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        let value = |replica: usize, sector| self.replicas[replica].value(sector);
        // Who is behind has no vote, and nobody knows here who is.
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
        (0..self.stirred.len()).filter(differs).collect()
    }
}

/// Whether a job can be in the one state right after the other.
fn follows(before: JobStatus, after: JobStatus) -> bool {
    use JobStatus::{Aborting, Concluded, Created, Null, Paused, Running};
    matches!(
        (before, after),
        (Created, Running)
            | (Running, Paused | Aborting | Concluded)
            | (Paused, Running | Aborting)
            | (Aborting, Concluded)
            | (Concluded, Null)
    )
}

fn index(place: usize) -> ReplicaIndex {
    ReplicaIndex(u8::try_from(place).expect("few"))
}
