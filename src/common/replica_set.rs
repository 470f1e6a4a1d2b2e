//! Names of replicas, and sets of them.

use std::fmt;

/// Names a replica by its place: those of the command line come first, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaIndex(pub u8);

impl ReplicaIndex {
    /// As the index of a slice.
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

    /// Inserts `replica`.
    pub fn insert(&mut self, replica: ReplicaIndex) {
        self.0 |= 1 << replica.0;
    }

    /// Removes `replica` from the set.
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

    /// The replicas of this set that are not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The replicas in either set.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The replicas in both sets.
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
