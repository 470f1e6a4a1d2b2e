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
    /// what they hold where they may vote.
    pub(super) fn begin_branch(&mut self, start: &Start, there: u32, before: &Ledger) {
        self.statistics.forced += 1;
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
                let lied =
                    before.corrupt[place] | before.falsely_durable[place] | before.dropped[place];
                let is_legal = self
                    .model
                    .is_permitted(sector, replica.value(sector), self.now);
                if (votes || is_beyond) && (is_legal || lied & bit == 0) {
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
}
