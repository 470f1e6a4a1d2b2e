//! A set of extents of a disk, a bit for each: the intent map, or a stale map with too many runs.
//!
//! Invariant: bits beyond the last extent are zero.

use super::layout::{Layout, PAGE_BYTES, PAGE_EXTENTS, PAGE_HEAD_BYTES};
use crate::common::SectorRange;

/// A set of extents of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents {
    layout: Layout,
    /// Bit `i % 64` of word `i / 64` stands for extent `i`.
    words: Vec<u64>,
}

/// Words of a page of the map.
const PAGE_WORDS: usize = (PAGE_BYTES - PAGE_HEAD_BYTES) / 8;

impl Extents {
    /// No extent.
    pub fn new(layout: Layout) -> Self {
        let words = usize::try_from(layout.extents().div_ceil(64)).expect("a map is small");
        Self {
            layout,
            words: vec![0; words],
        }
    }

    /// All extents.
    pub fn full(layout: Layout) -> Self {
        let mut full = Self::new(layout);
        full.insert(SectorRange::new(0, layout.capacity()));
        full
    }

    /// The layout of the disk.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Inserts each extent in which `range` has a sector. Whether one of them is new.
    pub fn insert(&mut self, range: SectorRange) -> bool {
        let mut is_new = false;
        self.change(range, |word, mask| {
            is_new |= *word & mask != mask;
            *word |= mask;
        });
        is_new
    }

    /// Inserts all of `other`, the map of a disk of any capacity.
    pub fn insert_all(&mut self, other: &Self) {
        if self.layout == other.layout {
            for (word, other) in self.words.iter_mut().zip(&other.words) {
                *word |= other;
            }
        } else {
            for range in other.iter() {
                self.insert(range);
            }
        }
    }

    /// Removes each extent in which `range` has a sector. Whether one of them was in the set.
    pub fn remove(&mut self, range: SectorRange) -> bool {
        let mut was_in = false;
        self.change(range, |word, mask| {
            was_in |= *word & mask != 0;
            *word &= !mask;
        });
        was_in
    }

    /// Removes all of `other`, a map of the same disk.
    pub fn remove_all(&mut self, other: &Self) {
        assert_eq!(self.layout, other.layout, "maps of one disk");
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// Whether some extent is in both maps of one disk.
    pub fn overlaps_any(&self, other: &Self) -> bool {
        assert_eq!(self.layout, other.layout, "maps of one disk");
        let mut words = self.words.iter().zip(&other.words);
        words.any(|(word, other)| word & other != 0)
    }

    /// Whether every sector of `range` is in an extent of the set.
    pub fn contains(&self, range: SectorRange) -> bool {
        let mut contains = true;
        self.look(range, |word, mask| contains &= word & mask == mask);
        contains
    }

    /// Whether a sector of `range` is in an extent of the set.
    pub fn overlaps(&self, range: SectorRange) -> bool {
        let mut overlaps = false;
        self.look(range, |word, mask| overlaps |= word & mask != 0);
        overlaps
    }

    /// Whether no extent is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// How many extents are in the set.
    pub fn count(&self) -> u64 {
        let ones = self.words.iter().map(|word| u64::from(word.count_ones()));
        ones.sum()
    }

    /// The sectors of the extents, in order, as ranges of which no two touch.
    pub fn iter(&self) -> impl Iterator<Item = SectorRange> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = self.next(from, true)?;
            let end = self.next(start, false).unwrap_or(self.layout.extents());
            from = end;
            let sectors = self.layout.extent_sectors();
            let last = (end * sectors).min(self.layout.capacity());
            Some(SectorRange::new(start * sectors, last - start * sectors))
        })
    }

    /// The same sectors, and no fewer, as a map of a disk with another layout. What lies beyond its
    /// end is left out.
    #[must_use]
    pub fn fitted(&self, layout: Layout) -> Self {
        let mut fitted = Self::new(layout);
        fitted.insert_all(self);
        fitted
    }

    /// A bit for each extent, the first ones first, the lowest bits first.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let bytes = self.words.iter().flat_map(|word| word.to_le_bytes());
        let count = usize::try_from(self.layout.map_bytes()).expect("a map is small");
        bytes.take(count).collect()
    }

    /// The opposite of [`Self::to_bytes`]. `None` if there are not as many bytes as that makes, or
    /// a bit beyond the last extent is set.
    pub(super) fn from_bytes(layout: Layout, bytes: &[u8]) -> Option<Self> {
        let mut map = Self::new(layout);
        if u64::try_from(bytes.len()) != Ok(layout.map_bytes()) {
            return None;
        }
        map.load(0, bytes);
        (map == map.clipped()).then_some(map)
    }

    /// The bits of a page, zeroes behind the last extent.
    pub(super) fn page(&self, page: u32) -> [u8; PAGE_BYTES - PAGE_HEAD_BYTES] {
        let mut bits = [0; PAGE_BYTES - PAGE_HEAD_BYTES];
        let words = self.words.iter().skip(page as usize * PAGE_WORDS);
        for (place, word) in bits.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bits
    }

    /// Inserts the extents of a page, from its bits.
    pub(super) fn load_page(&mut self, page: u32, bits: &[u8]) {
        self.load(page as usize * PAGE_WORDS, bits);
        *self = self.clipped();
    }

    /// Inserts all extents of a page.
    pub(super) fn fill_page(&mut self, page: u32) {
        let sectors = PAGE_EXTENTS * self.layout.extent_sectors();
        self.insert(SectorRange::new(u64::from(page) * sectors, sectors));
    }

    fn load(&mut self, from: usize, bytes: &[u8]) {
        for (word, bytes) in self.words.iter_mut().skip(from).zip(bytes.chunks(8)) {
            let mut all = [0; 8];
            all[..bytes.len()].copy_from_slice(bytes);
            *word |= u64::from_le_bytes(all);
        }
    }

    /// Without bits beyond the last extent.
    fn clipped(&self) -> Self {
        let mut clipped = self.clone();
        let used = self.layout.extents() % 64;
        if let Some(last) = clipped.words.last_mut()
            && used != 0
        {
            *last &= (1 << used) - 1;
        }
        clipped
    }

    /// The first extent from `from` on that is in the set, or is not.
    fn next(&self, from: u64, is_in: bool) -> Option<u64> {
        let mut at = from;
        while at < self.layout.extents() {
            let word = self.words[word_of(at)];
            let word = if is_in { word } else { !word } >> (at % 64);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < self.layout.extents()).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Calls `change` for each word with a bit of `range`, and these bits.
    fn change(&mut self, range: SectorRange, mut change: impl FnMut(&mut u64, u64)) {
        for (word, mask) in masks(self.layout, range) {
            change(&mut self.words[word], mask);
        }
    }

    fn look(&self, range: SectorRange, mut look: impl FnMut(u64, u64)) {
        for (word, mask) in masks(self.layout, range) {
            look(self.words[word], mask);
        }
    }
}

fn word_of(extent: u64) -> usize {
    usize::try_from(extent / 64).expect("a map is small")
}

/// The words with bits of `range`, as far as it lies on the disk, each with these bits.
fn masks(layout: Layout, range: SectorRange) -> impl Iterator<Item = (usize, u64)> {
    let sectors = layout.extent_sectors();
    let end = range.end().min(layout.capacity()).div_ceil(sectors);
    let mut at = if range.count == 0 {
        end
    } else {
        range.start / sectors
    };
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (start, stop) = (at, ((at / 64 + 1) * 64).min(end));
        at = stop;
        let ones = u64::MAX >> (64 - (stop - start));
        Some((word_of(start), ones << (start % 64)))
    })
}
