//! An exact set of sectors, however many ranges it has.
//!
//! A set is a tree of regions (`node`). A region that holds few ranges lists them; one that holds
//! many is a bitmap or is divided into eight. So a set takes 16 to 100 bytes for each range and is
//! never much larger than a bitmap: 36 MiB for 1 TiB if all ranges consist of blocks of 4 KiB, 290
//! MiB if they do not. An operation on one range takes time logarithmic in the number of ranges.
//!
//! The tree is shared, and copied where it is changed: a clone costs nothing, and a set that is
//! inserted into an empty one, or into an empty region of one, is not copied. Freeing a large set
//! takes time in proportion to its ranges.
//!
//! Invariants ([`RangeSet::self_check`]): those of the `node`, and `sectors` is right.

mod bitmap;
mod node;
mod region;
mod sweep;

pub use self::sweep::every_sector;

use self::node::Node;
use self::region::{Region, Run};
use super::SectorRange;

/// An exact set of sectors, all of them below 2⁶³.
#[derive(Clone, Debug)]
pub struct RangeSet {
    root: Node,
    /// The first one, and large enough for all sectors of the set.
    region: Region,
    sectors: u64,
}

impl Default for RangeSet {
    fn default() -> Self {
        Self {
            root: Node::Empty,
            region: Region::SMALLEST,
            sectors: 0,
        }
    }
}

impl RangeSet {
    /// Whether no sector is in the set.
    pub fn is_empty(&self) -> bool {
        self.sectors == 0
    }

    /// How many sectors are in the set.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// The ranges, in order. No two of them touch.
    pub fn iter(&self) -> impl Iterator<Item = SectorRange> {
        self.iter_within(0, u64::MAX)
    }

    /// Inserts `range`.
    pub fn insert(&mut self, range: SectorRange) {
        if range.count == 0 {
            return;
        }
        self.reach(range.end());
        let run = Run::from(range);
        self.sectors += self.root.insert(self.region, run);
    }

    /// Inserts all of `other`.
    pub fn insert_all(&mut self, other: &Self) {
        if other.is_empty() {
            return;
        }
        if self.is_empty() {
            self.clone_from(other);
            return;
        }
        self.reach(other.region.end());
        let mut other = other.clone();
        other.reach(self.region.end());
        self.sectors += self.root.insert_all(self.region, &other.root);
    }

    /// Removes exactly the sectors of `range`.
    pub fn remove(&mut self, range: SectorRange) {
        let run = self.within_region(range);
        if run.start < run.end {
            self.sectors -= self.root.remove(self.region, run);
            if self.is_empty() {
                self.region = Region::SMALLEST;
            }
        }
    }

    /// Removes all of `ranges`. Where none of them is in the set, nothing is copied.
    pub fn remove_all(&mut self, ranges: &Self) {
        for range in ranges.iter() {
            if self.overlaps(range) {
                self.remove(range);
            }
        }
    }

    /// Whether a sector of `range` is in the set.
    pub fn overlaps(&self, range: SectorRange) -> bool {
        let run = self.within_region(range);
        run.start < run.end && self.root.overlaps(self.region, run)
    }

    /// The parts of `range` that are in the set, in order.
    pub fn within(&self, range: SectorRange) -> Vec<SectorRange> {
        self.iter_within(range.start, range.end()).collect()
    }

    /// The first part of `range` that is in the set.
    pub fn first_within(&self, range: SectorRange) -> Option<SectorRange> {
        let mut run = self.within_region(range);
        if run.start >= run.end {
            return None;
        }
        run.start = self.root.next(self.region, run, true)?;
        if run.start >= run.end {
            return None;
        }
        let end = self.root.next(self.region, run, false);
        let end = end.unwrap_or(run.end).min(run.end);
        Some(SectorRange::new(run.start, end - run.start))
    }

    /// Inserts into `changed` where this set differs from `earlier`, an earlier copy of it. This
    /// takes time in proportion to what has changed. `false` if it takes more than `steps`, from
    /// which those taken are subtracted.
    pub fn changes_since(&self, earlier: &Self, steps: &mut usize, changed: &mut Self) -> bool {
        let (mut now, mut earlier) = (self.clone(), earlier.clone());
        now.reach(earlier.region.end());
        earlier.reach(now.region.end());
        now.root
            .changes_since(now.region, &earlier.root, steps, changed)
    }

    /// The part of the set that is in `ranges`, another set.
    pub fn part_in(&self, ranges: &Self) -> Self {
        let mut part = Self::default();
        if self.is_empty() {
            return part;
        }
        for range in ranges.iter() {
            for own in self.iter_within(range.start, range.end()) {
                part.insert(own);
            }
        }
        part
    }

    /// Asserts the invariants of the [module](self).
    pub fn self_check(&self) {
        self.root.self_check(self.region);
        assert_eq!(self.sectors, self.root.sectors(self.region));
    }

    /// The part of `range` that is in the region of the root; empty if it ends before it starts.
    fn within_region(&self, range: SectorRange) -> Run {
        Run {
            start: range.start,
            end: range.end().min(self.region.end()),
        }
    }

    /// Makes the region of the root large enough to hold sectors below `end`.
    fn reach(&mut self, end: u64) {
        while self.region.end() < end {
            self.region = self.root.raise(self.region);
        }
    }

    fn iter_within(&self, start: u64, end: u64) -> impl Iterator<Item = SectorRange> {
        let mut from = start;
        std::iter::from_fn(move || {
            let rest = SectorRange::new(from, end.checked_sub(from)?);
            let part = self.first_within(rest)?;
            from = part.end();
            Some(part)
        })
    }
}

#[cfg(test)]
mod tests;
