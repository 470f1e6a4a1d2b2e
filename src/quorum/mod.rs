//! The vote: pure functions and plain values, no file, clock, thread or guest in sight.
//!
//! [`vote`] decides what a sector holds, [`tally`] whether a write or a flush succeeded, [`ranges`]
//! and [`health`] keep what each replica is known not to hold. [`report`] is what there is to tell
//! of it.

pub mod health;
pub mod ranges;
pub mod report;
pub mod tally;
pub mod vote;

use std::fmt;

pub use crate::limits::SECTOR_BYTES;
use crate::message::Reason;

/// Which replica, by its place on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaIndex(pub u8);

impl ReplicaIndex {
    /// The index as one into a slice.
    pub fn as_usize(self) -> usize {
        usize::from(self.0)
    }
}

/// A set of replicas, iterated in the order in which they were listed.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct ReplicaSet(u32);

impl ReplicaSet {
    /// No replica.
    pub const EMPTY: Self = Self(0);

    /// The first `count` replicas.
    pub fn first(count: usize) -> Self {
        assert!(count <= crate::limits::REPLICAS_MAX);
        Self(u32::try_from((1u64 << count) - 1).expect("at most 32 replicas"))
    }

    /// Whether `replica` is in the set.
    pub fn contains(self, replica: ReplicaIndex) -> bool {
        self.0 & (1 << replica.0) != 0
    }

    /// Puts `replica` into the set.
    pub fn insert(&mut self, replica: ReplicaIndex) {
        self.0 |= 1 << replica.0;
    }

    /// Takes `replica` out of the set.
    pub fn remove(&mut self, replica: ReplicaIndex) {
        self.0 &= !(1 << replica.0);
    }

    /// The set as a mask, bit `i` for replica `i`.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// The set of a mask.
    pub fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// One more than the greatest index in the set, or 0.
    pub fn places(self) -> usize {
        (u32::BITS - self.0.leading_zeros()) as usize
    }

    /// How many replicas are in the set.
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether the set is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Those of this set that are not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Those in either set.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Those in both sets.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// The members, first listed first.
    pub fn iter(self) -> impl Iterator<Item = ReplicaIndex> {
        let mut rest = self.0;
        std::iter::from_fn(move || {
            if rest == 0 {
                return None;
            }
            let index = rest.trailing_zeros();
            rest &= rest - 1;
            Some(ReplicaIndex(u8::try_from(index).expect("below 32")))
        })
    }
}

impl FromIterator<ReplicaIndex> for ReplicaSet {
    fn from_iter<I: IntoIterator<Item = ReplicaIndex>>(replicas: I) -> Self {
        let mut set = Self::EMPTY;
        for replica in replicas {
            set.insert(replica);
        }
        set
    }
}

impl fmt::Debug for ReplicaSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|r| r.0)).finish()
    }
}

/// A run of sectors of the voted disk. Never wraps: whoever makes one has checked it against the
/// capacity.
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
        Self { start, count }
    }

    /// The first sector after the range.
    pub fn end(self) -> u64 {
        self.start + self.count
    }

    /// Whether the two have a sector in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }

    /// Length in bytes.
    pub fn bytes(self) -> u64 {
        self.count * SECTOR_BYTES
    }
}

/// An errno value, positive, as the kernel gave it for an operation on a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Reason(&std::io::Error::from_raw_os_error(self.0)).fmt(f)
    }
}
