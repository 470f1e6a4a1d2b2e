//! Sectors, the unit of virtio and of the vote, and ranges of them.

pub use crate::limits::SECTOR_BYTES;

/// A run of sectors of the voted disk. Its end fits a `u64`: input is checked before it becomes a
/// range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SectorRange {
    /// The first sector.
    pub start: u64,
    /// How many sectors.
    pub count: u64,
}

impl SectorRange {
    /// The range `[start, start + count)`.
    pub fn new(start: u64, count: u64) -> Self {
        assert!(
            start.checked_add(count).is_some(),
            "a range ends within the number space"
        );
        Self { start, count }
    }

    /// The first sector after the range.
    pub fn end(self) -> u64 {
        self.start + self.count
    }

    /// Whether the two ranges have a sector in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        self.count * SECTOR_BYTES
    }
}
