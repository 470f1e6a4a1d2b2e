use proptest::prelude::*;

use super::*;
use crate::common::{ReplicaIndex, ReplicaSet};

/// Enough sectors for branches on two levels.
const SPAN: usize = 1 << 16;

#[derive(Clone, Debug)]
struct Change {
    inserts: bool,
    start: usize,
    /// This many ranges of `len` sectors, `step` sectors apart.
    ranges: usize,
    len: usize,
    step: usize,
}

impl Change {
    fn ranges(&self) -> impl Iterator<Item = SectorRange> {
        (0..self.ranges).map(|index| {
            let start = (self.start + index * self.step).min(SPAN - self.len);
            range(start as u64, self.len as u64)
        })
    }
}

fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(start, count)
}

/// Single ranges and combs, of sectors, blocks or longer ranges, many of them aligned.
fn change() -> impl Strategy<Value = Change> {
    let unit = prop_oneof![Just(1_usize), Just(8), Just(64), Just(4096)];
    let ranges = prop_oneof![3 => Just(1_usize), 1 => 2..100_usize];
    (any::<bool>(), unit, 0..SPAN, ranges, 0..4_usize, 1..8_usize).prop_map(
        |(inserts, unit, start, ranges, len, gap)| Change {
            inserts,
            start: start - start % unit,
            ranges,
            len: len * unit,
            step: (len + gap) * unit,
        },
    )
}

fn changes(most: usize) -> impl Strategy<Value = Vec<Change>> {
    proptest::collection::vec(change(), 0..most)
}

fn naive_ranges(naive: &[bool]) -> Vec<SectorRange> {
    let mut ranges = Vec::new();
    let mut start = 0;
    for same in naive.chunk_by(|a, b| a == b) {
        if same[0] {
            ranges.push(range(start, same.len() as u64));
        }
        start += same.len() as u64;
    }
    ranges
}

/// A set, and a flag for each sector.
#[derive(Clone, Debug)]
struct Pair {
    set: RangeSet,
    naive: Vec<bool>,
}

impl Pair {
    fn new() -> Self {
        Self {
            set: RangeSet::default(),
            naive: vec![false; SPAN],
        }
    }

    fn after(changes: &[Change]) -> Self {
        let mut pair = Self::new();
        changes.iter().for_each(|change| pair.change(change));
        pair
    }

    fn change(&mut self, change: &Change) {
        for range in change.ranges() {
            match change.inserts {
                true => self.set.insert(range),
                false => self.set.remove(range),
            }
            let start = usize::try_from(range.start).unwrap();
            self.naive[start..start + change.len].fill(change.inserts);
        }
    }

    fn check(&self) {
        self.set.self_check();
        let ranges: Vec<_> = self.set.iter().collect();
        assert_eq!(ranges, naive_ranges(&self.naive));
        let sectors = self.naive.iter().filter(|flag| **flag).count();
        assert_eq!(self.set.sectors(), sectors as u64);
        assert_eq!(self.set.is_empty(), sectors == 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn agrees_with_a_flag_for_each_sector(
        changes in changes(24),
        probes in proptest::collection::vec((0..SPAN, 0..3000_usize), 8),
    ) {
        let mut pair = Pair::new();
        for change in changes {
            pair.change(&change);
            pair.check();
        }
        for (start, len) in probes {
            let end = (start + len).min(SPAN);
            let probe = range(start as u64, (end - start) as u64);
            let mut expected = naive_ranges(&pair.naive[start..end]);
            expected.iter_mut().for_each(|range| range.start += start as u64);
            prop_assert_eq!(pair.set.overlaps(probe), !expected.is_empty());
            prop_assert_eq!(pair.set.first_within(probe), expected.first().copied());
            prop_assert_eq!(pair.set.within(probe), expected);
        }
    }

    /// A clone keeps what it had.
    #[test]
    fn a_clone_does_not_change_with_its_original(before in changes(8), after in changes(8)) {
        let mut pair = Pair::after(&before);
        let clone = pair.clone();
        after.iter().for_each(|change| pair.change(change));
        pair.check();
        clone.check();
        let mut changed = RangeSet::default();
        assert!(pair.set.changes_since(&clone.set, &mut usize::MAX.clone(), &mut changed));
        let differ = pair.naive.iter().zip(&clone.naive).map(|(now, earlier)| now != earlier);
        let expected = naive_ranges(&differ.collect::<Vec<_>>());
        prop_assert_eq!(changed.iter().collect::<Vec<_>>(), expected);
        let both = pair.naive.iter().zip(&clone.naive).map(|(now, earlier)| *now && *earlier);
        let expected = naive_ranges(&both.collect::<Vec<_>>());
        let part = pair.set.part_in(&clone.set);
        prop_assert_eq!(part.iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn joins_two_sets(ours in changes(8), others in changes(8)) {
        let mut pair = Pair::after(&ours);
        let other = Pair::after(&others);
        pair.set.insert_all(&other.set);
        for (flag, other) in pair.naive.iter_mut().zip(&other.naive) {
            *flag |= other;
        }
        pair.check();
        other.check();
    }

    #[test]
    fn looks_at_every_sector_of_several_sets(
        all in proptest::collection::vec(changes(5), 0..5),
        threshold in 0..5_usize,
        end in 1..SPAN,
    ) {
        let beyond = range(end as u64, (SPAN - end) as u64);
        let mut sets: Vec<_> = all.iter().map(|changes| Pair::after(changes)).collect();
        for pair in &mut sets {
            pair.set.remove(beyond);
            pair.naive[end..].fill(false);
        }
        // Two sets of one replica.
        let replica = |index: usize| ReplicaIndex(u8::try_from(index / 2).unwrap());
        let few = |replicas: ReplicaSet| replicas.len() <= threshold;
        let expected = (0..end).all(|sector| {
            let with = sets.iter().enumerate().filter(|(_, pair)| pair.naive[sector]);
            few(with.map(|(index, _)| replica(index)).collect())
        });
        let all = || sets.iter().enumerate().map(|(index, pair)| (replica(index), &pair.set));
        prop_assert_eq!(every_sector(all(), end as u64, few, few), expected);
        prop_assert_eq!(every_sector(all(), end as u64, |_| false, few), expected);
    }
}

/// Each is a list of many runs or a bitmap, of which all but one are the same.
#[test]
fn a_change_beside_many_ranges_takes_few_steps() {
    for (ranges, apart, mut steps) in [(30, 64, 4), (2000, 2, 65), (3000, 16, 65)] {
        let mut set = RangeSet::default();
        for index in 0..ranges {
            set.insert(range(index * apart, 1));
        }
        let earlier = set.clone();
        let middle = ranges / 2 * apart;
        set.remove(range(middle, 1));
        let mut changed = RangeSet::default();
        assert!(set.changes_since(&earlier, &mut steps, &mut changed));
        assert!(changed.iter().eq([range(middle, 1)]));
        let mut none = RangeSet::default();
        assert!(set.changes_since(&set.clone(), &mut 0, &mut none));
        assert!(none.is_empty());
    }
}

/// Ranges all over 16 TiB, as single blocks and as single sectors.
#[test]
fn is_exact_however_many_ranges_there_are() {
    const RANGES: u64 = 50_000;
    const APART: u64 = (1 << 35) / RANGES;
    for (step, len) in [(APART, 1), (APART - APART % 8, 8), (16, 8), (2, 1)] {
        let mut set = RangeSet::default();
        for index in 0..RANGES {
            // Not in order.
            set.insert(range(index * 7919 % RANGES * step, len));
        }
        set.self_check();
        let expected = (0..RANGES).map(|index| range(index * step, len));
        assert!(set.iter().eq(expected.clone()));
        for range in expected.skip(1) {
            set.remove(range);
        }
        assert!(set.iter().eq([range(0, len)]));
    }
}

#[test]
fn a_set_inserted_into_an_empty_one_is_shared() {
    let mut set = RangeSet::default();
    for index in 0..1000 {
        set.insert(range(index * 1000, 1));
    }
    let mut copy = RangeSet::default();
    copy.insert_all(&set);
    let (Node::Branch(ours), Node::Branch(theirs)) = (&copy.root, &set.root) else {
        panic!("1000 ranges are divided");
    };
    assert!(std::sync::Arc::ptr_eq(ours, theirs));
    // The eighth of the region that holds no ranges yet is shared too.
    let mut other = RangeSet::default();
    for index in 0..100 {
        other.insert(range((1 << 20) + index * 2, 1));
    }
    other.insert_all(&set);
    other.self_check();
    let Node::Branch(joined) = &other.root else {
        panic!("1100 ranges are divided");
    };
    let Node::Branch(first) = &joined.children[0] else {
        panic!("an eighth with 263 ranges is divided");
    };
    let Node::Branch(original) = &ours.children[0] else {
        panic!("an eighth with 263 ranges is divided");
    };
    assert!(std::sync::Arc::ptr_eq(first, original));
}

#[test]
fn holds_all_sectors_of_the_largest_disk() {
    let mut set = RangeSet::default();
    let all = range(0, 1 << 63);
    set.insert(range(12, 1));
    set.insert(range((1 << 63) - 1, 1));
    assert!(set.overlaps(range((1 << 63) - 1, 1)));
    assert_eq!(
        set.first_within(range(13, u64::MAX - 13)),
        Some(range((1 << 63) - 1, 1))
    );
    set.insert(all);
    assert!(set.iter().eq([all]));
    set.remove(range(5, 1 << 62));
    set.self_check();
    assert_eq!(set.sectors(), 1 << 62);
    assert_eq!(
        set.first_within(range(6, u64::MAX - 6)).unwrap().start,
        5 + (1 << 62)
    );
    set.remove(range(0, u64::MAX));
    assert!(set.is_empty());
}
