//! What follows from the capacity of a disk: the size of an extent, and so of the maps.
//!
//! Invariant: a map takes at most [`RECORD_MAP_BYTES_MAX`] bytes.

use crate::common::{SECTOR_BYTES, SectorRange};
use crate::limits::{
    RECORD_EXTENT_BYTES_MIN, RECORD_MAP_BYTES_MAX, RECORD_NUMBER_MAX, RECORD_RUNS_BYTES_MIN,
    RECORD_SLOT_BYTES,
};

/// Bytes of a page of the intent map.
pub const PAGE_BYTES: usize = 4096;

/// Bytes of a page before its bits.
pub(super) const PAGE_HEAD_BYTES: usize = 16;

/// Extents in a page of the intent map.
pub const PAGE_EXTENTS: u64 = 8 * (PAGE_BYTES - PAGE_HEAD_BYTES) as u64;

/// Bytes of a run in a list of stale runs.
pub(super) const RUN_BYTES: u64 = 16;

/// The sizes and places in the record of a disk of a given capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    capacity: u64,
    extent_sectors: u64,
}

impl Layout {
    /// Bytes of a file with room for the maps of any capacity: the disk may grow.
    pub const FILE_BYTES_MAX: u64 = {
        let pages = (8 * RECORD_MAP_BYTES_MAX).div_ceil(PAGE_EXTENTS);
        2 * RECORD_SLOT_BYTES + pages * PAGE_BYTES as u64
    };

    /// The layout of a new disk of `capacity` sectors.
    pub fn new(capacity: u64) -> Self {
        Self::with_extents(capacity, RECORD_EXTENT_BYTES_MIN / SECTOR_BYTES)
    }

    /// The layout for a disk of `capacity` sectors with extents of `extent_sectors`, a power of
    /// two; larger ones if a map would be too large.
    pub fn with_extents(capacity: u64, mut extent_sectors: u64) -> Self {
        assert!(capacity <= RECORD_NUMBER_MAX, "a capacity of a disk");
        assert!(extent_sectors.is_power_of_two(), "a size of an extent");
        while capacity.div_ceil(extent_sectors) > 8 * RECORD_MAP_BYTES_MAX {
            extent_sectors *= 2;
        }
        Self {
            capacity,
            extent_sectors,
        }
    }

    /// The layout after the disk has grown to `capacity` sectors.
    #[must_use]
    pub fn grown(self, capacity: u64) -> Self {
        Self::with_extents(capacity, self.extent_sectors)
    }

    /// The layout that a record says it has. `None` if no disk has it: its extents are no power of
    /// two, so small that a map would be too large, or larger than those of a new disk.
    pub(super) fn recorded(capacity: u64, extent_sectors: u64) -> Option<Self> {
        let most = Self::new(capacity).extent_sectors;
        if !extent_sectors.is_power_of_two() || extent_sectors > most {
            return None;
        }
        let layout = Self::with_extents(capacity, extent_sectors);
        (layout.extent_sectors == extent_sectors).then_some(layout)
    }

    /// Sectors of the disk.
    pub fn capacity(self) -> u64 {
        self.capacity
    }

    /// Sectors of an extent.
    pub fn extent_sectors(self) -> u64 {
        self.extent_sectors
    }

    /// How many extents the disk has. The last one may be shorter.
    pub fn extents(self) -> u64 {
        self.capacity.div_ceil(self.extent_sectors)
    }

    /// The sectors of an extent.
    pub fn extent(self, index: u64) -> SectorRange {
        let start = index * self.extent_sectors;
        SectorRange::new(start, self.extent_sectors.min(self.capacity - start))
    }

    /// Bytes of a map: a bit for each extent.
    pub fn map_bytes(self) -> u64 {
        self.extents().div_ceil(8)
    }

    /// How many runs an exact list of stale sectors may have.
    pub fn runs_max(self) -> u64 {
        self.map_bytes().max(RECORD_RUNS_BYTES_MIN) / RUN_BYTES
    }

    /// Pages of the intent map.
    pub fn pages(self) -> u32 {
        u32::try_from(self.extents().div_ceil(PAGE_EXTENTS)).expect("a map is small")
    }

    /// The page of the intent map that has the extent of `sector`.
    pub fn page_of(self, sector: u64) -> u32 {
        u32::try_from(sector / self.extent_sectors / PAGE_EXTENTS).expect("a map is small")
    }

    /// Where the slot of a record with this sequence number begins in the file.
    pub fn slot_offset(sequence: u64) -> u64 {
        sequence % 2 * RECORD_SLOT_BYTES
    }

    /// Where a page of the intent map begins in the file.
    pub fn page_offset(page: u32) -> u64 {
        2 * RECORD_SLOT_BYTES + u64::from(page) * PAGE_BYTES as u64
    }

    /// Bytes of the whole file.
    pub fn file_bytes(self) -> u64 {
        Self::page_offset(self.pages())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_are_no_smaller_than_the_maps_allow_and_no_larger_than_those_of_a_new_disk() {
        let tib = (1 << 40) / SECTOR_BYTES;
        let recorded = |extent_sectors| Layout::recorded(tib, extent_sectors);
        let new = Layout::new(tib);
        assert_eq!(new.extent_sectors(), 16 << 11);
        assert_eq!(recorded(16 << 11), Some(new));
        assert_eq!(recorded(8 << 11), None, "a map would be too large");
        assert_eq!(recorded(32 << 11), None);
        assert_eq!(recorded((16 << 11) - 1), None, "no power of two");
        assert_eq!(Layout::new(1).grown(tib), new);
        let small = Layout::recorded(64, 4);
        assert_eq!(small.map(Layout::extents), Some(16));
        assert_eq!(small.map(|layout| layout.grown(128).extents()), Some(32));
    }
}
