//! A bounded set of sectors, kept as ranges.
//!
//! Invariants ([`RangeSet::self_check`]): no range is empty, the ranges are in order and do not
//! touch each other, and there are at most as many as the set's bound, which is [`RANGES_MAX`] by
//! default. Above the bound the set gets coarser: it then includes sectors that were never
//! inserted, and never loses one that was. Every user of a set is safe if a sector is in it
//! needlessly.

use std::collections::BTreeMap;

use super::SectorRange;
use crate::limits::RANGES_MAX;

/// A bounded set of sectors.
#[derive(Clone, Debug)]
pub struct RangeSet {
    /// First sector of each range to the first sector after it.
    ranges: BTreeMap<u64, u64>,
    /// An insertion is widened to multiples of this many sectors, a power of two.
    granule_sectors: u64,
    /// The end of the disk: widening stops here.
    end_sector: u64,
    ranges_max: usize,
}

impl Default for RangeSet {
    fn default() -> Self {
        Self::below(u64::MAX)
    }
}

impl RangeSet {
    /// An empty set of sectors below `end_sector`, the end of the disk.
    pub fn below(end_sector: u64) -> Self {
        Self::with_bound(1, end_sector, RANGES_MAX)
    }

    /// An empty set of at most `ranges_max` ranges.
    pub fn bounded(ranges_max: usize) -> Self {
        Self::with_bound(1, u64::MAX, ranges_max)
    }

    fn with_bound(granule_sectors: u64, end_sector: u64, ranges_max: usize) -> Self {
        assert!(granule_sectors.is_power_of_two() && ranges_max > 0);
        Self {
            ranges: BTreeMap::new(),
            granule_sectors,
            end_sector,
            ranges_max,
        }
    }

    /// Accepts that the disk has grown to `end_sector`.
    pub fn grow(&mut self, end_sector: u64) {
        self.end_sector = self.end_sector.max(end_sector);
    }

    /// Whether no sector is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = SectorRange> {
        self.ranges
            .iter()
            .map(|(&start, &end)| SectorRange::new(start, end - start))
    }

    /// Inserts `range`.
    pub fn insert(&mut self, range: SectorRange) {
        if range.count == 0 {
            return;
        }
        self.join(range.start, range.end());
        self.coarsen_above_bound();
    }

    /// Inserts all of `other`.
    pub fn insert_all(&mut self, other: &Self) {
        for range in other.iter() {
            self.insert(range);
        }
    }

    /// Removes exactly the sectors of `range`.
    pub fn remove(&mut self, range: SectorRange) {
        if range.count == 0 {
            return;
        }
        let (start, end) = (range.start, range.end());
        while let Some((&found_start, &found_end)) = self.ranges.range(..end).next_back() {
            if found_end <= start {
                break;
            }
            self.ranges.remove(&found_start);
            if found_end > end {
                self.ranges.insert(end, found_end);
            }
            if found_start < start {
                self.ranges.insert(found_start, start);
                break;
            }
        }
        self.coarsen_above_bound();
    }

    /// Whether a sector of `range` is in the set.
    pub fn overlaps(&self, range: SectorRange) -> bool {
        let last = self.ranges.range(..range.end()).next_back();
        range.count > 0 && last.is_some_and(|(_, &end)| end > range.start)
    }

    /// The parts of `range` that are in the set, in order.
    pub fn within(&self, range: SectorRange) -> Vec<SectorRange> {
        if !self.overlaps(range) {
            return Vec::new();
        }
        let mut parts: Vec<_> = self
            .ranges
            .range(..range.end())
            .rev()
            .take_while(|(_, end)| **end > range.start)
            .map(|(&start, &end)| {
                let start = start.max(range.start);
                SectorRange::new(start, end.min(range.end()) - start)
            })
            .collect();
        parts.reverse();
        parts
    }

    /// The first part of `range` that is in the set.
    pub fn first_within(&self, range: SectorRange) -> Option<SectorRange> {
        let reaches_in = self.ranges.range(..=range.start).next_back();
        let (&start, &end) = reaches_in
            .filter(|(_, end)| **end > range.start && range.count > 0)
            .or_else(|| self.ranges.range(range.start..range.end()).next())?;
        let start = start.max(range.start);
        Some(SectorRange::new(start, end.min(range.end()) - start))
    }

    /// Asserts the invariants of the [module](self).
    pub fn self_check(&self) {
        assert!(self.ranges.len() <= self.ranges_max, "too many ranges");
        assert!(self.granule_sectors.is_power_of_two());
        let mut last_end = None;
        for (&start, &end) in &self.ranges {
            assert!(start < end, "an empty range");
            assert!(last_end < Some(start), "two ranges touch or overlap");
            last_end = Some(end);
        }
    }

    /// Inserts `[start, end)`, widened to the granule and joined with the ranges that it touches.
    fn join(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = self.widened(start, end);
        while let Some((&found_start, &found_end)) = self.ranges.range(..=end).next_back() {
            if found_end < start {
                break;
            }
            self.ranges.remove(&found_start);
            start = start.min(found_start);
            end = end.max(found_end);
        }
        self.ranges.insert(start, end);
    }

    fn widened(&self, start: u64, end: u64) -> (u64, u64) {
        let granules_end = end.checked_next_multiple_of(self.granule_sectors);
        (
            start - start % self.granule_sectors,
            granules_end
                .unwrap_or(u64::MAX)
                .min(self.end_sector)
                .max(end),
        )
    }

    /// If there are too many ranges, makes the granule coarse enough to join a quarter of them.
    /// Rebuilding the set is expensive: one rebuild suffices, however far apart the ranges are, and
    /// the next one comes only after a quarter of the bound has been inserted again.
    fn coarsen_above_bound(&mut self) {
        let count = self.ranges.len();
        if count <= self.ranges_max {
            return;
        }
        let mut joining = [0; u64::BITS as usize];
        let neighbours = self.ranges.values().zip(self.ranges.keys().skip(1));
        for (&end, &start) in neighbours {
            joining[doublings_to_join(end, start)] += 1;
        }
        let mut unwanted = (count / 4).max(count - self.ranges_max);
        let mut doublings = 0;
        while joining[doublings] < unwanted {
            unwanted -= joining[doublings];
            doublings += 1;
        }
        self.granule_sectors = self.granule_sectors.max(1 << doublings);
        let mut joined: Vec<(u64, u64)> = Vec::with_capacity(count);
        for (start, end) in std::mem::take(&mut self.ranges) {
            let (start, end) = self.widened(start, end);
            match joined.last_mut() {
                Some((_, last_end)) if start <= *last_end => *last_end = end.max(*last_end),
                _ => joined.push((start, end)),
            }
        }
        self.ranges = joined.into_iter().collect();
    }
}

/// The least k for which a granule of 2ᵏ sectors joins a range that ends before `end` with the next
/// one, which begins at `start`: ⌊start / 2ᵏ⌋ is at most one more than ⌊(end - 1) / 2ᵏ⌋.
fn doublings_to_join(end: u64, start: u64) -> usize {
    let last = end - 1;
    let least = (start - last).ilog2();
    let doublings = least + u32::from((start >> least) - (last >> least) > 1);
    doublings.min(u64::BITS - 1) as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPAN: u64 = 96;

    #[derive(Clone, Debug)]
    enum Change {
        Insert(SectorRange),
        Remove(SectorRange),
    }

    fn range() -> impl Strategy<Value = SectorRange> {
        (0..SPAN, 0..12u64).prop_map(|(start, count)| SectorRange::new(start, count))
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let change = prop_oneof![
            range().prop_map(Change::Insert),
            range().prop_map(Change::Remove)
        ];
        proptest::collection::vec(change, 0..60)
    }

    const MANY_SECTORS: u64 = 512;

    fn many_short_changes() -> impl Strategy<Value = Vec<Change>> {
        let range = || {
            (0..MANY_SECTORS - 4, 1..4u64).prop_map(|(start, count)| SectorRange::new(start, count))
        };
        let change = prop_oneof![
            8 => range().prop_map(Change::Insert),
            1 => range().prop_map(Change::Remove)
        ];
        proptest::collection::vec(change, 0..200)
    }

    proptest! {
        /// A set below its bound is exact.
        #[test]
        fn agrees_with_a_flag_for_each_sector(changes in changes(), probe in range()) {
            let mut set = RangeSet::default();
            let mut naive = [false; 128];
            for change in changes {
                let (range, value) = match change {
                    Change::Insert(range) => { set.insert(range); (range, true) }
                    Change::Remove(range) => { set.remove(range); (range, false) }
                };
                for sector in range.start..range.end() {
                    naive[usize::try_from(sector).unwrap()] = value;
                }
                set.self_check();
            }
            let at = |sector: u64| naive[usize::try_from(sector).unwrap()];
            for sector in 0..128 {
                prop_assert_eq!(set.overlaps(SectorRange::new(sector, 1)), at(sector));
            }
            prop_assert_eq!(set.overlaps(probe), (probe.start..probe.end()).any(at));
            let within = set.within(probe).into_iter();
            let within: Vec<u64> = within.flat_map(|r| r.start..r.end()).collect();
            let expected: Vec<u64> = (probe.start..probe.end()).filter(|s| at(*s)).collect();
            prop_assert_eq!(within, expected);
            prop_assert_eq!(set.first_within(probe), set.within(probe).first().copied());
            let sectors: u64 = set.iter().map(|range| range.count).sum();
            prop_assert_eq!(sectors, naive.iter().filter(|f| **f).count() as u64);
        }

        /// A set above its bound holds at least what was inserted.
        #[test]
        fn a_bounded_set_never_loses_a_sector(changes in changes()) {
            let mut set = RangeSet::with_bound(1, 128, 3);
            let mut naive = [false; 128];
            for change in changes {
                let (range, value) = match change {
                    Change::Insert(range) => { set.insert(range); (range, true) }
                    Change::Remove(range) => { set.remove(range); (range, false) }
                };
                for sector in range.start..range.end() {
                    naive[usize::try_from(sector).unwrap()] = value;
                }
                set.self_check();
            }
            for (sector, expected) in naive.into_iter().enumerate() {
                prop_assert!(!expected || set.overlaps(SectorRange::new(sector as u64, 1)));
            }
        }
    }

    proptest! {
        /// The same with many short ranges and a bound that holds most of them, so that insertions
        /// and removals coarsen large sets too.
        #[test]
        fn a_bounded_set_never_loses_one_of_many_ranges(
            changes in many_short_changes(),
            ranges_max in 1..64usize,
        ) {
            let mut set = RangeSet::with_bound(1, MANY_SECTORS, ranges_max);
            let mut naive = vec![false; usize::try_from(MANY_SECTORS).unwrap()];
            for change in changes {
                let (range, value) = match change {
                    Change::Insert(range) => { set.insert(range); (range, true) }
                    Change::Remove(range) => { set.remove(range); (range, false) }
                };
                for sector in range.start..range.end() {
                    naive[usize::try_from(sector).unwrap()] = value;
                }
                set.self_check();
                for (sector, expected) in naive.iter().enumerate() {
                    let sector = SectorRange::new(sector as u64, 1);
                    prop_assert!(!*expected || set.overlaps(sector), "{sector:?} is lost");
                }
            }
        }
    }

    /// One coarsening is enough, however far apart the ranges are, and no coarser than necessary.
    #[test]
    fn one_coarsening_is_enough() {
        for apart in [4, 1000, 1 << 40] {
            let mut set = RangeSet::with_bound(1, u64::MAX, 64);
            for index in 0..65 {
                set.insert(SectorRange::new(index * apart, 1));
            }
            set.self_check();
            let count = set.iter().count();
            assert!(count <= 49, "{count} ranges are left");
            // The least power of two that is not below the distance joins all of them.
            assert!(
                set.granule_sectors < 2 * apart,
                "a granule of {}",
                set.granule_sectors
            );
        }
    }

    /// Each hole in a long range makes one more range.
    #[test]
    fn coarsens_when_removals_make_too_many_ranges() {
        let mut set = RangeSet::with_bound(1, u64::MAX, 64);
        set.insert(SectorRange::new(0, 1 << 30));
        for index in 0..1000 {
            set.remove(SectorRange::new((index + 1) << 14, 8 + index));
            set.self_check();
        }
    }

    #[test]
    fn does_not_widen_beyond_the_end_of_the_disk() {
        let mut set = RangeSet::with_bound(2048, 5000, 3);
        set.insert(SectorRange::new(4500, 1));
        assert_eq!(
            set.iter().collect::<Vec<_>>(),
            [SectorRange::new(4096, 904)]
        );
    }

    #[test]
    fn widens_up_to_the_new_end_of_a_grown_disk() {
        let mut set = RangeSet::with_bound(2048, 5000, 3);
        set.insert(SectorRange::new(4500, 1));
        set.grow(10_000);
        assert_eq!(
            set.iter().collect::<Vec<_>>(),
            [SectorRange::new(4096, 904)]
        );
        set.insert(SectorRange::new(9000, 1));
        let parts: Vec<_> = set.iter().collect();
        assert_eq!(
            parts,
            [SectorRange::new(4096, 904), SectorRange::new(8192, 1808)]
        );
    }

    #[test]
    fn holds_the_last_sector_number() {
        let mut set = RangeSet::with_bound(2048, u64::MAX, 3);
        set.insert(SectorRange::new(u64::MAX - 1, 1));
        assert!(set.overlaps(SectorRange::new(u64::MAX - 1, 1)));
    }
}
