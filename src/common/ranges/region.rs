//! The regions of the tree, and runs of sectors in them.
//!
//! A region of level 0 has 2¹² sectors, one of the next level eight times as many, and so on. The
//! bits of a bitmap stand for granules of 8ˡ sectors in a region of level l.

use std::ops::Range;

use super::bitmap::BITS;
use crate::common::SectorRange;

pub(super) const BRANCHES: usize = 8;
const BRANCH_BITS: u32 = BRANCHES.ilog2();
const LEAF_BITS: u32 = BITS.ilog2();

/// The region of this level has 2⁶³ sectors.
pub(super) const LEVEL_MAX: u32 = (63 - LEAF_BITS) / BRANCH_BITS;

/// Sectors `[start, end)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) end: u64,
}

impl Run {
    pub(super) fn sectors(self) -> u64 {
        self.end - self.start
    }

    pub(super) fn within(self, region: Region) -> Self {
        Self {
            start: self.start.max(region.start),
            end: self.end.min(region.end()),
        }
    }
}

impl From<SectorRange> for Run {
    fn from(range: SectorRange) -> Self {
        Self {
            start: range.start,
            end: range.end(),
        }
    }
}

/// The sectors that a node stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) start: u64,
    pub(super) level: u32,
}

impl Region {
    pub(super) fn sectors(self) -> u64 {
        1 << (LEAF_BITS + BRANCH_BITS * self.level)
    }

    pub(super) fn end(self) -> u64 {
        self.start + self.sectors()
    }

    pub(super) fn is(self, run: Run) -> bool {
        run.start == self.start && run.end == self.end()
    }

    pub(super) fn granule_bits(self) -> u32 {
        BRANCH_BITS * self.level
    }

    /// The bits of a bitmap for `run`, if it consists of whole granules.
    pub(super) fn bits(self, run: Run) -> Option<Range<usize>> {
        let misaligned = (run.start | run.end) & ((1 << self.granule_bits()) - 1);
        (misaligned == 0).then(|| self.bit(run.start)..self.bit(run.end - 1) + 1)
    }

    /// The bit of a bitmap for the granule of `sector`.
    pub(super) fn bit(self, sector: u64) -> usize {
        index((sector - self.start) >> self.granule_bits())
    }

    pub(super) fn first_sector(self, bit: usize) -> u64 {
        self.start + ((bit as u64) << self.granule_bits())
    }

    /// The child that `sector` is in.
    pub(super) fn child_of(self, sector: u64) -> usize {
        index((sector - self.start) >> (LEAF_BITS + BRANCH_BITS * (self.level - 1)))
    }

    pub(super) fn child(self, index: usize) -> Self {
        let level = self.level - 1;
        let start = self.start + ((index as u64) << (LEAF_BITS + BRANCH_BITS * level));
        Self { start, level }
    }

    /// The children that overlap `run`, with the part of it that is in each.
    pub(super) fn children(self, run: Run) -> impl Iterator<Item = (usize, Self, Run)> {
        (self.child_of(run.start)..=self.child_of(run.end - 1)).map(move |index| {
            let child = self.child(index);
            (index, child, run.within(child))
        })
    }
}

fn index(small: u64) -> usize {
    usize::try_from(small).expect("within a region")
}
