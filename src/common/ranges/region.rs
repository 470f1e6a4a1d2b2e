//! The regions of the tree, and runs of sectors in them.
//!
//! The smallest regions have 2¹² sectors, as many as a bitmap has bits. Each other one has eight
//! children, and a bitmap of it has a bit for each *granule*: of 8 sectors, if the region has 2¹⁵.

use std::ops::Range;

use super::bitmap::BITS;
use crate::common::SectorRange;

pub(super) const BRANCHES: usize = 8;
const BRANCH_BITS: u32 = BRANCHES.ilog2();
/// Of the smallest regions.
const LEAF_BITS: u32 = BITS.ilog2();
/// Of the largest region.
const ROOT_BITS_MAX: u32 = 63;

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

/// The sectors that a node stands for: 2ᵇ from `start` on, a multiple of that.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) start: u64,
    /// b.
    pub(super) bits: u32,
}

impl Region {
    /// The first of the smallest regions.
    pub(super) const SMALLEST: Self = Self {
        start: 0,
        bits: LEAF_BITS,
    };

    /// The region of which this one, which begins at 0, is the first child.
    pub(super) fn parent(self) -> Self {
        let bits = self.bits + BRANCH_BITS;
        assert!(self.start == 0 && bits <= ROOT_BITS_MAX, "no such sectors");
        Self { start: 0, bits }
    }

    pub(super) fn sectors(self) -> u64 {
        1 << self.bits
    }

    pub(super) fn end(self) -> u64 {
        self.start + self.sectors()
    }

    pub(super) fn is(self, run: Run) -> bool {
        run.start == self.start && run.end == self.end()
    }

    pub(super) fn granule_bits(self) -> u32 {
        self.bits - LEAF_BITS
    }

    /// The bits of a bitmap for `run`, if it consists of whole granules.
    pub(super) fn bits_of(self, run: Run) -> Option<Range<usize>> {
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
        index((sector - self.start) >> (self.bits - BRANCH_BITS))
    }

    pub(super) fn child(self, index: usize) -> Self {
        let bits = self.bits - BRANCH_BITS;
        let start = self.start + ((index as u64) << bits);
        Self { start, bits }
    }

    /// The child that all of `run` is in.
    pub(super) fn only_child(self, run: Run) -> Option<(usize, Self)> {
        let index = self.child_of(run.start);
        (index == self.child_of(run.end - 1)).then(|| (index, self.child(index)))
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
