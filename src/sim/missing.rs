//! A member whose image is missing at the first start, and there some time later (W13).
//!
//! It holds bytes that no write has written, and is stale everywhere.

use super::model::Value;
use super::plan::Plan;
use super::state::{World, trace};
use crate::common::ReplicaIndex;
use crate::common::ranges::RangeSet;
use crate::engine::Shared;

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

    /// The image of the missing member is there, if the member was not removed.
    pub(super) fn find_missing(&mut self) {
        if self.missing == 0 {
            return;
        }
        let place = self.missing.trailing_zeros() as usize;
        self.missing = 0;
        self.find_record(place);
        let found = self.shared.found(index(place), &RangeSet::default());
        trace!(
            self,
            "the image of the missing replica {place} is there: {found}"
        );
        self.tick_wanted = (1 << self.plan.workers) - 1;
    }
}

fn index(place: usize) -> ReplicaIndex {
    ReplicaIndex(u8::try_from(place).expect("few"))
}
