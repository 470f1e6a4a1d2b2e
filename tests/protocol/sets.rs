//! Small sets: of replicas, of sectors, or of versions.

/// Bit i: i is in it.
pub(crate) type Set = u8;

pub(crate) const fn one(element: usize) -> Set {
    1 << element
}

pub(crate) const fn first(count: usize) -> Set {
    (1 << count) - 1
}

pub(crate) const fn has(set: Set, element: usize) -> bool {
    set >> element & 1 == 1
}

pub(crate) const fn len(set: Set) -> usize {
    set.count_ones() as usize
}

pub(crate) fn elements(set: Set) -> impl Iterator<Item = usize> + Clone {
    (0..Set::BITS as usize).filter(move |element| has(set, *element))
}

/// Its subsets, the empty one and itself included.
pub(crate) fn subsets(set: Set) -> impl Iterator<Item = Set> {
    (0..=set).filter(move |subset| subset & !set == 0)
}

/// An element as it is stored.
pub(crate) fn small(element: usize) -> u8 {
    u8::try_from(element).expect("a small set")
}
