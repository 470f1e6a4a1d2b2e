//! What the operator does while the guest runs: adds and removes replicas, grows the disk, begins,
//! pauses and cancels jobs.
//!
//! A replica that was added begins with bytes that no write has written, or with holes, so that a
//! read which returns them is a violation.

use std::time::Duration;

use super::Violation;
use super::given_up::Lost;
use super::model::Value;
use super::pending::PendingKind;
use super::plan::{PLACES, SECTORS_MAX, bits};
use super::replica::SimReplica;
use super::state::{Checked, World, trace};
use crate::common::{ReplicaIndex, SectorRange};
use crate::jobs::{JobEvent, JobId, NotStarted};
use crate::quorum::health::{NotRemoved, majority};

impl World {
    /// The operator does something.
    pub(super) fn act_as_operator(&mut self) -> Checked {
        if self.missing != 0 && self.random.below(2) == 0 {
            return self.find_missing();
        }
        if !self.shared.unresolved().is_empty() && self.random.below(3) == 0 {
            return self.prefer();
        }
        match self.random.below(13) {
            0 | 1 => self.add_replica(),
            2 | 3 => self.remove_replica(),
            4 | 5 => {
                let repair = self.random.below(2) == 0;
                trace!(self, "operator: scrub, repair {repair}");
                self.statistics.scrubs += 1;
                self.with_jobs(|jobs, health| jobs.scrub(repair, 0, health))
                    .map(|_| ())
            }
            12 => self.prefer(),
            11 => self.change_threshold(),
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
        let command = match choice {
            6 => "pause",
            7 => "resume",
            8 => "cancel",
            _ => "set the speed of",
        };
        trace!(self, "operator: {command} {id} ({speed} bytes a second)");
        self.with_jobs(|jobs, health| match choice {
            6 => jobs.pause(id, health),
            7 => jobs.resume(id, health),
            8 => jobs.cancel(id, health),
            _ => jobs.set_speed(id, speed),
        })
        .map(|_| ())
    }

    /// The disk grows. Every replica is longer by zeroes, durably, before the engines know.
    fn grow(&mut self) {
        let blocks = (SECTORS_MAX - self.plan.sectors) / self.plan.block_sectors;
        if blocks == 0 {
            return;
        }
        self.plan.sectors += (1 + self.random.below(blocks.min(4))) * self.plan.block_sectors;
        trace!(self, "operator: the disk grows to {}", self.plan.sectors);
        self.statistics.grown += 1;
        let (from, sectors) = (
            self.changed_at.len(),
            usize::try_from(self.plan.sectors).expect("few"),
        );
        self.changed_at.resize(sectors, 0);
        self.model.grow(sectors);
        for replica in &mut self.replicas {
            replica.grow(sectors);
        }
        // A replica that is evicted does not take part there either until it rejoins.
        let new = self
            .plan
            .mask(SectorRange::new(from as u64, (sectors - from) as u64));
        for place in bits(u64::from(self.ledger.evicted)) {
            self.mark_excused(place, new);
        }
        self.shared.grow(self.plan.sectors);
    }

    /// Adds a replica, if there is a place.
    fn add_replica(&mut self) -> Checked {
        if !self.may_change_members() {
            return Ok(());
        }
        let taken = self.members | self.to_be_released;
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
        let sectors = self.changed_at.len();
        let mut replica = SimReplica::new(sectors);
        // A new file is a hole.
        let holes = match self.plan.asks_for_holes() {
            true => [0, u64::MAX, self.random.bits()][self.random.index(3)],
            false => 0,
        };
        for sector in (0..sectors).filter(|sector| holes >> sector & 1 == 0) {
            self.rotten += 1;
            replica.rot(sector, Value::rotten(self.rotten));
        }
        let all = replica.all();
        self.replicas[place] = replica;
        self.members |= bit;
        self.ledger.any = true;
        self.unsynced |= bit;
        self.members_ever += 1;
        self.plan.dead &= !bit;
        self.plan.slow &= !bit;
        self.hung_until[place] = Duration::ZERO;
        if self.plan.faulty != 0 && self.random.below(3) == 0 {
            self.plan.faulty |= bit;
        } else {
            self.plan.faulty &= !bit;
        }
        self.ledger.forget(place);
        self.ledger.unsound[place] = all;
        self.staleness.added(place);
        self.evicted_at[place].clear();
        for pending in &mut self.pending {
            // It takes no part in the running flush, also not where the disk grows.
            pending.seen.excused[place] = u64::MAX;
            if let PendingKind::Write(write) = &mut pending.kind {
                // What another replica in this place has written does not count.
                write.succeeded &= !bit;
                write.failed &= !bit;
            }
        }
        self.forget_preferred_by(place);
        self.mark_excused(place, all);
        match self.plan.records {
            true => self.add_record(place),
            false => self.shared.add(index(place)),
        }
        self.tick_wanted = (1 << self.plan.workers) - 1;
        if self.random.below(2) == 0 {
            self.resync(place)?;
        }
        Ok(())
    }

    /// Removes a replica, if the engine agrees.
    fn remove_replica(&mut self) -> Checked {
        if !self.may_change_members() {
            return Ok(());
        }
        let place = self.random.bit(u64::from(self.members)) as usize;
        let bit = 1 << place;
        if self.plan.dead != 0 && self.plan.dead & bit == 0 {
            // Without it the disk might need one that never answers.
            return Ok(());
        }
        let mut events = Vec::new();
        let removed = self.shared.remove(index(place), |event| events.push(event));
        trace!(
            self,
            "operator: replica {place} is to be removed: {removed:?}"
        );
        if let Err(reason) = removed {
            let left = self.count() - 1;
            let needed = match self.wanted {
                Some(_) => self.threshold,
                None => self.threshold.min(majority(left)),
            };
            let too_few = left < needed;
            if (reason == NotRemoved::TooFew) != too_few {
                let text = format!("replica {place} of {:b} stays: {reason}", self.members);
                return Err(Violation::new("remove", text));
            }
            return match reason {
                NotRemoved::LastCopies | NotRemoved::LastDurableCopies | NotRemoved::Undecided
                    if self.random.below(3) == 0 =>
                {
                    self.fail_replica(place)
                }
                _ => Ok(()),
            };
        }
        self.statistics.removed += 1;
        self.is_removed(place, Lost::default(), events)
    }

    /// A replica is removed, and with it no more is `lost` than this.
    pub(super) fn is_removed(
        &mut self,
        place: usize,
        lost: Lost,
        events: Vec<JobEvent>,
    ) -> Checked {
        let bit = 1 << place;
        self.ledger.any = true;
        let before = self.members;
        self.members &= !bit;
        self.note_threshold()?;
        self.check_removal(place, before, lost)?;
        self.check_undecided(before, lost)?;
        self.to_be_released |= bit;
        self.unsynced &= !bit;
        self.ledger.evicted |= bit;
        self.ledger.failures[place] += 1;
        self.ledger.evictions[place] += 1;
        self.mark_excused(place, self.replicas[place].all());
        self.tick_wanted = (1 << self.plan.workers) - 1;
        self.jobs_reported(events)
    }

    /// At least t replicas are left, hold the newest version of every sector, and have what was
    /// flushed on disk.
    fn check_removal(&self, place: usize, before: u32, lost: Lost) -> Checked {
        let threshold = self.threshold;
        if self.count() < threshold {
            return Err(Violation::new("remove", "fewer than t replicas are left"));
        }
        let mut crashed = self.model.clone();
        crashed.crashed(self.now + 1);
        for sector in 0..self.changed_at.len() {
            let bit = 1 << sector;
            if self.unsynced >> place & 1 == 1 && self.ledger.excused[place] & bit != 0 {
                // It was added, and no write has been answered here since.
                continue;
            }
            let excused = |replica: usize| {
                let ledger = &self.ledger;
                (ledger.wrong(replica) | ledger.falsely_durable[replica]) & bit != 0
            };
            let durable = |replica: usize| {
                let value = self.replicas[replica].durable(sector);
                excused(replica) || crashed.is_permitted(sector, value, self.now + 1)
            };
            let fresh = |replica: usize| {
                let value = self.replicas[replica].value(sector);
                excused(replica) || self.model.is_permitted(sector, value, self.now)
            };
            let count = |members: u32, holds: &dyn Fn(usize) -> bool| {
                bits(u64::from(members))
                    .filter(|replica| holds(*replica))
                    .count()
            };
            let holders: [(&str, &dyn Fn(usize) -> bool); 2] =
                [("newest", &fresh), ("durable", &durable)];
            let lost = [lost.copies, lost.durable];
            for ((what, holds), lost) in holders.into_iter().zip(lost) {
                if lost & bit != 0 {
                    continue;
                }
                if count(before, holds) >= threshold && count(self.members, holds) < threshold {
                    let text =
                        format!("replica {place} had one of the last {what} copies of {sector}");
                    return Err(Violation::new("remove", text).at(bit));
                }
            }
        }
        Ok(())
    }

    /// I2, W7: where a failed write has left versions, none loses the copies that it wins with.
    fn check_undecided(&self, before: u32, lost: Lost) -> Checked {
        for sector in bits(self.undecided & !lost.undecided) {
            let votes = |members: u32| {
                let excused = |r: &usize| self.ledger.excused[*r] >> sector & 1 == 1;
                let voters = bits(u64::from(members));
                let values: Vec<_> = voters
                    .filter(|r| !excused(r))
                    .map(|r| self.replicas[r].value(sector))
                    .collect();
                let same = |value| values.iter().filter(|other| *other == value).count();
                values.iter().map(same).max().unwrap_or(0)
            };
            let needed = self.threshold;
            if votes(before) >= needed && votes(self.members) < needed {
                let text = format!("{sector} is undecided, and has no winner after the removal");
                return Err(Violation::new("I2", text).at(1 << sector));
            }
        }
        Ok(())
    }

    /// The operator asks for a resync.
    fn resync(&mut self, replica: usize) -> Checked {
        let asked = self.with_jobs(|jobs, health| jobs.resync(index(replica), 0, health))?;
        if let Ok(id) | Err(NotStarted::InResync(id)) = asked {
            let failures = self.ledger.failures[replica];
            self.asked_resyncs.push((id, failures));
        }
        Ok(())
    }

    /// Every job goes on at full speed, and every replica is resynced.
    pub(super) fn resume_jobs(&mut self) -> Checked {
        let ids: Vec<JobId> = self.jobs.iter().map(|job| job.id).collect();
        let members: Vec<usize> = self.members().collect();
        self.with_jobs(|jobs, health| {
            for id in ids {
                let _ = jobs.resume(id, health);
                let _ = jobs.set_speed(id, 0);
            }
        })?;
        members
            .into_iter()
            .try_for_each(|replica| self.resync(replica))
    }
}

pub(super) fn index(place: usize) -> ReplicaIndex {
    ReplicaIndex(u8::try_from(place).expect("few"))
}
