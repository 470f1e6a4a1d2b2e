//! Before a start an old copy of an image is put back with its record, or the old record alone
//! (S3): such a replica is stale everywhere.
//!
//! The copy was made before an earlier start, fewer than t replicas are put back together, and no
//! start is without all others that know the newest table: the records cannot know more.

use uuid::Uuid;

use super::plan::bits;
use super::records::File;
use super::replica::SimReplica;
use super::state::{World, trace};

/// A copy of an image and its record.
#[derive(Debug)]
pub(super) struct OldCopy {
    place: usize,
    member: Uuid,
    record: File,
    image: SimReplica,
    /// How many branches had begun when it was made.
    branches: u64,
}

impl World {
    /// The daemon has ended: an image is copied, or an old copy is put back.
    pub(super) fn copy_or_put_back(&mut self) {
        if !self.plan.old_copies || self.plan.dead != 0 {
            return;
        }
        match self.records.old.take() {
            Some(old) if self.random.below(2) == 0 => self.records.old = Some(old),
            Some(old) => self.put_back(old),
            None => self.records.old = self.copy(),
        }
    }

    fn copy(&mut self) -> Option<OldCopy> {
        let place = self.random.bit(u64::from(self.members)) as usize;
        Some(OldCopy {
            place,
            member: self.records.member(place)?,
            record: self.records.file(place).clone(),
            image: self.replicas[place].clone(),
            branches: self.records.branches,
        })
    }

    fn put_back(&mut self, old: OldCopy) {
        let place = old.place;
        let is_same = *self.records.file(place) == old.record;
        let is_member = self.records.member(place) == Some(old.member);
        // One image alone is as good as the disk.
        let decides = self.threshold.min(self.least_threshold) < 2 || self.records.put_back != 0;
        let is_needed = self.count() <= self.threshold && self.random.below(4) > 0;
        if is_same || !is_member || decides || is_needed {
            return;
        }
        let with_image = self.random.below(3) > 0;
        trace!(
            self,
            "an old copy of replica {place} is put back, with its image: {with_image}"
        );
        self.statistics.put_back += 1;
        self.records.put_back |= 1 << place;
        self.records.uncopied |= 1 << place;
        if old.branches != self.records.branches {
            // Its record is from a branch that was given up, with what that has gone on to.
            self.records.left_behind |= 1 << place;
        }
        *self.records.file_mut(place) = old.record;
        if with_image {
            self.put_image_back(place, old.image);
        }
    }

    /// Where the disk has grown, and no record says so yet, an image that is put back is not stale.
    /// There it is as corrupt as it was.
    fn put_image_back(&mut self, place: usize, mut image: SimReplica) {
        image.grow(self.changed_at.len());
        image.crash(0);
        let rotten = |sector: &usize| image.value(*sector).is_rotten();
        let rotten = (0..self.changed_at.len()).filter(rotten);
        let rotten = rotten.fold(0, |mask, sector| mask | 1 << sector);
        self.replicas[place] = image;
        self.ledger.any = true;
        for mask in self.ledger.of_image(place) {
            *mask = 0;
        }
        self.ledger.corrupt[place] = rotten;
    }

    /// As long as a copy that was put back is not served: which other images know the newest table,
    /// a mask. One of them has to be at each start.
    pub(super) fn knowing(&self) -> u32 {
        let records = &self.records;
        match records.put_back {
            0 => 0,
            old => records.knowing(records.named() & !old & !records.left_behind),
        }
    }

    /// These images are served, a mask: their records are written anew.
    pub(super) fn are_served(&mut self, places: u32) {
        self.records.put_back &= !places;
        self.records.left_behind &= !places;
    }

    /// The places in a mask.
    pub(super) fn places(mask: u32) -> impl Iterator<Item = usize> {
        bits(u64::from(mask))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::model::Value;
    use crate::sim::plan::Plan;

    fn world() -> World {
        World::planned(1, |plan| Plan {
            replicas: 3,
            threshold: 2,
            records: true,
            follows: false,
            ..plan
        })
    }

    #[test]
    fn a_copy_is_as_corrupt_as_its_image_was() {
        let mut world = world();
        let mut image = world.replicas[1].clone();
        image.rot(3, Value::rotten(1));
        world.ledger.corrupt[1] = 1 << 4;
        world.put_image_back(1, image);
        assert_eq!(world.ledger.corrupt[1], 1 << 3);
    }

    #[test]
    fn a_copy_that_is_older_than_a_branch_is_left_behind_by_it() {
        for branches in [0, 1] {
            let mut world = world();
            let mut old = world.copy().expect("a member has a record");
            old.record = File::default();
            let bit = 1 << old.place;
            world.records.branches = branches;
            world.put_back(old);
            assert_eq!(world.records.put_back, bit);
            assert_eq!(world.records.left_behind, bit * u32::from(branches > 0));
        }
    }
}
