//! Where a member is stale, as a record keeps it: exact where that takes little room.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::extents::Extents;
use super::layout::Layout;
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;

/// Where a member is stale. Its memory has a bound: a set with many runs is kept as extents.
#[derive(Clone, Debug)]
pub enum Stale {
    /// Nowhere.
    None,
    /// Everywhere.
    All,
    /// In exactly these sectors, at most as many runs as [`Layout::runs_max`] says.
    Runs(RangeSet),
    /// In these extents.
    Extents(Extents),
}

impl Stale {
    /// A set of sectors of a disk with this layout.
    pub fn of(ranges: &RangeSet, layout: Layout) -> Self {
        let mut ranges = ranges.clone();
        let capacity = layout.capacity();
        ranges.remove(SectorRange::new(capacity, u64::MAX - capacity));
        if ranges.is_empty() {
            return Self::None;
        }
        if ranges.sectors() == capacity {
            return Self::All;
        }
        let runs_max = usize::try_from(layout.runs_max()).expect("a few");
        if ranges.iter().nth(runs_max).is_none() {
            return Self::Runs(ranges);
        }
        let mut extents = Extents::new(layout);
        let indices = 0..layout.extents();
        for extent in indices.map(|index| layout.extent(index)) {
            if ranges.overlaps(extent) {
                extents.insert(extent);
            }
        }
        Self::Extents(extents)
    }

    /// All sectors of `extents`, as a set of a disk with this layout.
    pub fn of_extents(extents: &Extents, layout: Layout) -> Self {
        let fitted = extents.fitted(layout);
        let first = fitted.iter().next();
        match first {
            None => Self::None,
            Some(first) if first.count == layout.capacity() => Self::All,
            Some(_) => Self::Extents(fitted),
        }
    }

    /// Whether the member is stale nowhere.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Whether the member is stale everywhere.
    pub fn is_all(&self) -> bool {
        matches!(self, Self::All)
    }

    /// The same sectors, as a set of a disk with this layout.
    #[must_use]
    pub fn fitted(&self, layout: Layout) -> Self {
        match self {
            Self::None => Self::None,
            Self::All => Self::All,
            Self::Runs(runs) => Self::of(runs, layout),
            Self::Extents(extents) => Self::of_extents(extents, layout),
        }
    }

    /// The sectors of both sets.
    #[must_use]
    pub fn union(&self, other: &Self, layout: Layout) -> Self {
        match (self, other) {
            (Self::All, _) | (_, Self::All) => Self::All,
            (Self::None, set) | (set, Self::None) => set.fitted(layout),
            (Self::Runs(runs), Self::Runs(others)) => {
                let mut runs = runs.clone();
                runs.insert_all(others);
                Self::of(&runs, layout)
            }
            _ => {
                let mut extents = Extents::new(layout);
                for set in [self, other] {
                    set.mark(&mut extents);
                }
                Self::of_extents(&extents, layout)
            }
        }
    }

    /// The sectors that are not in `other`. A result with many runs is widened to extents, and may
    /// then have sectors of `other` again.
    #[must_use]
    pub fn without(&self, other: &Self, layout: Layout) -> Self {
        match (self, other) {
            (Self::None, _) | (_, Self::All) => Self::None,
            (set, Self::None) => set.fitted(layout),
            _ => {
                let mut ranges = self.to_ranges(layout);
                ranges.remove_all(&other.to_ranges(layout));
                Self::of(&ranges, layout)
            }
        }
    }

    /// Whether `range` has a sector of the set.
    pub fn overlaps(&self, range: SectorRange) -> bool {
        match self {
            Self::None => false,
            Self::All => range.count > 0,
            Self::Runs(runs) => runs.overlaps(range),
            Self::Extents(extents) => extents.overlaps(range),
        }
    }

    /// The set as one of ranges, for a disk with this layout.
    pub fn to_ranges(&self, layout: Layout) -> RangeSet {
        let mut ranges = RangeSet::default();
        match self {
            Self::None => {}
            Self::All => ranges.insert(SectorRange::new(0, layout.capacity())),
            Self::Runs(runs) => ranges.clone_from(runs),
            Self::Extents(extents) => extents.iter().for_each(|range| ranges.insert(range)),
        }
        ranges
    }

    fn mark(&self, extents: &mut Extents) {
        match self {
            Self::None | Self::All => {}
            Self::Runs(runs) => {
                for run in runs.iter() {
                    extents.insert(run);
                }
            }
            Self::Extents(others) => extents.insert_all(others),
        }
    }
}

impl PartialEq for Stale {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::None, Self::None) | (Self::All, Self::All) => true,
            (Self::Runs(runs), Self::Runs(others)) => runs.iter().eq(others.iter()),
            (Self::Extents(extents), Self::Extents(others)) => extents == others,
            _ => false,
        }
    }
}

impl Eq for Stale {}

/// `"nowhere"`, `"everywhere"`, or the number of sectors.
impl Serialize for Stale {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let sectors = match self {
            Self::None => return serializer.serialize_str("nowhere"),
            Self::All => return serializer.serialize_str("everywhere"),
            Self::Runs(runs) => runs.sectors(),
            Self::Extents(extents) => extents.iter().map(|range| range.count).sum(),
        };
        let mut map = serializer.serialize_map(Some(1))?;
        map.serialize_entry("sectors-count", &sectors)?;
        map.end()
    }
}
