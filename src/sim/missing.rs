//! Members whose images are missing at a start, or lost while the disk is served, and there some
//! time later (W13).
//!
//! One that is missing at the first start holds bytes that no write has written, and is stale
//! everywhere.

use super::Violation;
use super::model::Value;
use super::plan::{Plan, bits, mask_of};
use super::state::{Checked, World, trace};
use crate::common::ReplicaIndex;
use crate::common::ranges::RangeSet;
use crate::engine::Shared;
use crate::quorum::health::Remembered;
use crate::record::Keeper;

/// How often images are lost in a run: each time all that is marked is copied.
const LOSSES_MAX: u64 = 4;

impl World {
    /// Before the engines start for the first time: sometimes a member is missing that the disk can
    /// spare.
    pub(super) fn leave_one_out(&mut self, shared: &Shared) {
        let Plan { dead, operator, .. } = self.plan;
        let is_needed = self.count() <= self.threshold || dead != 0;
        if is_needed || operator == 0 || self.random.below(4) > 0 {
            return;
        }
        let place = self.random.bit(u64::from(self.members)) as usize;
        trace!(self, "replica {place} is missing");
        self.statistics.missing += 1;
        for sector in 0..self.changed_at.len() {
            self.rotten += 1;
            self.replicas[place].rot(sector, Value::rotten(self.rotten));
        }
        let all = self.replicas[place].all();
        let bit = 1 << place;
        self.missing |= bit;
        self.unsynced |= bit;
        self.ledger.any = true;
        self.ledger.evicted |= bit;
        self.ledger.failures[place] += 1;
        self.ledger.evictions[place] += 1;
        self.ledger.unsound[place] = all;
        self.staleness.added(place);
        self.mark_excused(place, all);
        let mut stale = RangeSet::default();
        stale.insert(self.plan.disk());
        shared.leave_out(index(place), &stale);
    }

    /// The daemon starts again, and cannot open these images, a mask. What they hold is known.
    pub(super) fn leave_out(&mut self, missing: u32, remembered: &Remembered) {
        self.missing = missing;
        for place in bits(u64::from(missing)) {
            trace!(self, "replica {place} is missing");
            let copies = &remembered.copies[place];
            let mut stale = copies.stale.clone();
            stale.insert_all(&copies.doubtful);
            self.shared.leave_out(index(place), &stale);
            self.ledger.any = true;
            self.ledger.evicted |= 1 << place;
            self.ledger.failures[place] += 1;
            self.ledger.evictions[place] += 1;
            self.staleness.added(place);
            self.mark_excused(place, self.replicas[place].all());
        }
    }

    /// The image of a member cannot be used any more, as when its file system goes. What is in
    /// flight there may still happen.
    pub(super) fn lose_image(&mut self, place: usize) {
        let Plan { records, dead, .. } = self.plan;
        // Without another one, one that never answers may be needed.
        let may_be_lost =
            records && dead == 0 && self.missing == 0 && self.statistics.lost < LOSSES_MAX;
        if !may_be_lost || !self.shared.lose(index(place)) {
            return;
        }
        trace!(self, "the image of replica {place} is lost");
        self.statistics.lost += 1;
        self.missing = 1 << place;
        self.note_evictions();
        // Where something is marked it counts as stale when it is found.
        self.staleness.added(place);
        self.tick_wanted = (1 << self.plan.workers) - 1;
    }

    /// Whether its image may be opened again: nothing is in flight on the one that was lost, and
    /// the records say that it is out of service.
    fn is_drained(&self, place: usize) -> bool {
        let is_active = |keeper: &Keeper| keeper.is_active(index(place));
        // If not, it was removed.
        let is_missing = self.shared.missing().contains(index(place));
        let is_active = self.shared.records(is_active).unwrap_or(false);
        !is_missing || (self.shared.is_drained(index(place)) && !is_active)
    }

    /// No fault is left: all missing images are there.
    pub(super) fn find_all(&mut self) -> Checked {
        while self.missing != 0 {
            let mut missing = bits(u64::from(self.missing));
            if missing.any(|place| self.is_drained(place)) {
                self.find_missing()?;
            } else {
                // Now and then, so that the clock goes on meanwhile.
                if self.steps.is_multiple_of(64) {
                    self.tick_wanted = (1 << self.plan.workers) - 1;
                }
                self.step()?;
            }
        }
        Ok(())
    }

    /// The image of a missing member is there, if the member was not removed.
    pub(super) fn find_missing(&mut self) -> Checked {
        if self.missing == 0 {
            return Ok(());
        }
        let place = self.random.bit(u64::from(self.missing)) as usize;
        if !self.is_drained(place) {
            self.tick_wanted = (1 << self.plan.workers) - 1;
            return Ok(());
        }
        self.missing &= !(1 << place);
        let is_member = self.members >> place & 1 == 1;
        let mut stale = RangeSet::default();
        if is_member && self.plan.records {
            stale = self.find_record(place)?;
        }
        let found = self.shared.found(index(place), &stale);
        trace!(
            self,
            "the image of the missing replica {place} is there: {found}"
        );
        self.tick_wanted = (1 << self.plan.workers) - 1;
        if found {
            self.statistics.found += u64::from(self.crashed);
            // Where something is marked it may be an older copy: it votes when it is copied.
            self.ledger.unsound[place] |= mask_of(stale.iter());
            self.check_found(place)?;
            let disk = self.plan.mask(self.plan.disk());
            if self.view.stale[place] & disk == disk {
                self.records.uncopied |= 1 << place;
            }
        }
        Ok(())
    }

    /// S3: what was missing may vote where it has missed nothing.
    fn check_found(&mut self, place: usize) -> Checked {
        self.view.refresh(&self.shared, self.plan.disk());
        let may_be_lost = self.ledger.lost_by_crash | self.ledger.given_up;
        let excused = self.view.stale[place] | self.ledger.corrupt[place] | may_be_lost;
        for sector in bits(self.replicas[place].all() & !excused) {
            let value = self.replicas[place].value(sector);
            if !self.model.is_permitted(sector, value, self.now) {
                let text =
                    format!("replica {place} returns with {value} of {sector}, and may vote");
                return Err(Violation::new("S2", text).at(1 << sector));
            }
        }
        Ok(())
    }
}

fn index(place: usize) -> ReplicaIndex {
    ReplicaIndex(u8::try_from(place).expect("few"))
}
