//! A start is forced although others could have gone on alone (S3): a branch begins, and what only
//! those others hold is given up.
//!
//! They are left behind. They are never started without a replica of the branch, where they would
//! go on, too; so each of them is stale everywhere when it turns up, or refused.

use super::ledger::Ledger;
use super::model::Value;
use super::state::{World, trace};
use crate::common::SectorRange;
use crate::record::start::Start;

impl World {
    /// The start was forced, and the images in `there`, a mask, go on. From now on the disk holds
    /// what they hold where they may vote. `killed`: the page cache outlives the daemon, and an
    /// error is still to come where a page was dropped; a crash has settled what the image holds
    /// there.
    pub(super) fn begin_branch(
        &mut self,
        start: &Start,
        there: u32,
        (before, killed): (&Ledger, bool),
    ) {
        self.statistics.forced += 1;
        self.records.branches += 1;
        self.records.left_behind |= self.records.named() & !there;
        trace!(self, "left behind: {:b}", self.records.left_behind);
        let layout = start.record.layout();
        for sector in 0..self.changed_at.len() {
            let bit = 1 << sector;
            // Of what the disk has grown by since, the records that go on know nothing. It may grow
            // again, and any copy is legal there then.
            let is_beyond = sector as u64 >= start.record.capacity;
            let mut values: Vec<Value> = Vec::new();
            for place in Self::places(there & self.members) {
                let member = self.member_in(place);
                let image = start.images.iter().find(|image| image.member == member);
                let votes = image.is_some_and(|image| {
                    let stale = image.stale.to_ranges(layout);
                    image.votes() && !stale.overlaps(SectorRange::new(sector as u64, 1))
                });
                let replica = &self.replicas[place];
                let holds = || self.may_go_on_with(place, sector, (before, killed));
                if (votes || is_beyond) && holds() {
                    // After a kill the page cache may be lost later.
                    values.extend([replica.value(sector), replica.durable(sector)]);
                }
            }
            if values.is_empty() {
                self.ledger.lost_by_crash |= bit;
                self.ledger.mixed |= bit;
            } else {
                self.model.branch(sector, &values, self.now);
            }
        }
    }

    /// Whether a vote after the end may go on with what the image holds there: it is legal, or it
    /// is what the image has held for long, and no fault that was not reported.
    fn may_go_on_with(
        &self,
        place: usize,
        sector: usize,
        (before, killed): (&Ledger, bool),
    ) -> bool {
        let value = self.replicas[place].value(sector);
        let dropped = if killed { before.dropped[place] } else { 0 };
        let lied = before.corrupt[place] | before.falsely_durable[place] | dropped;
        self.model.is_permitted(sector, value, self.now) || lied >> sector & 1 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::plan::Plan;

    #[test]
    fn a_crash_settles_what_an_image_holds_whose_page_was_dropped() {
        let mut world = World::planned(1, |plan| Plan {
            sectors: 1,
            block_sectors: 1,
            ..plan
        });
        let value = Value::written(1, 0);
        world.model.write_began(0, value, 3);
        world.model.write_ended(0, value, 4, true, false);
        world.model.flushed(5, 6);
        world.now = 7;
        // It has not got what the others have.
        assert!(!world.model.is_permitted(0, world.replicas[0].value(0), 7));
        let mut before = Ledger::default();
        assert!(world.may_go_on_with(0, 0, (&before, true)));
        before.dropped[0] = 1;
        assert!(world.may_go_on_with(0, 0, (&before, false)));
        assert!(!world.may_go_on_with(0, 0, (&before, true)));
        before.corrupt[0] = 1;
        assert!(!world.may_go_on_with(0, 0, (&before, false)));
    }
}
