//! Exclusive locks on ranges of sectors, granted in the order in which they were asked for
//! (contract W2).
//!
//! A request waits for every earlier one that asked for an overlapping range, and for no other:
//!
//! ```text
//!   asked 1st  |----A----|                    granted
//!   asked 2nd        |----B----|              waits for A
//!   asked 3rd                |----C----|      waits for B, although C's sectors are free
//!   asked 4th  |-D-|                          waits for A
//! ```
//!
//! If C overtook B, replicas could see B and C in different orders.
//!
//! Each entry counts the entries it waits for. Entries are kept in classes, by their length rounded
//! up to a power of two. All entries of a class that can overlap a range start within that length
//! before it, and few others do: however many ranges are locked side by side, a new one is compared
//! with its neighbours only.

use std::collections::BTreeMap;

use crate::common::{SECTOR_BYTES, SectorRange};
use crate::limits::{HOLE_LOCK_BYTES_MAX, ZERO_BYTES_MAX};

/// The longest range that can be locked, in sectors.
pub(super) const LOCK_SECTORS_MAX: u64 = HOLE_LOCK_BYTES_MAX / SECTOR_BYTES;
const _: () = assert!(ZERO_BYTES_MAX <= HOLE_LOCK_BYTES_MAX);

/// How many classes of lengths there are: 1, 2, up to 4, up to 8, ... sectors.
const CLASSES: usize = LOCK_SECTORS_MAX.ilog2() as usize + 1;
const _: () = assert!(LOCK_SECTORS_MAX.is_power_of_two() && CLASSES <= u32::BITS as usize);

/// Names a lock, granted or waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LockKey {
    class: usize,
    place: Place,
}

/// Where an entry is among those of its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    start: u64,
    ticket: u64,
}

/// The locks of a disk. `O` names the owner of a lock.
#[derive(Debug)]
pub(super) struct RangeLocks<O> {
    by_class: [BTreeMap<Place, Entry<O>>; CLASSES],
    /// A bit for each class that has entries: most loads have few.
    used: u32,
    next_ticket: u64,
}

#[derive(Debug)]
struct Entry<O> {
    range: SectorRange,
    owner: O,
    /// How many overlapping entries with an earlier ticket there are.
    waits_for: usize,
}

impl<O> Default for RangeLocks<O> {
    fn default() -> Self {
        Self {
            by_class: std::array::from_fn(|_| BTreeMap::new()),
            used: 0,
            next_ticket: 0,
        }
    }
}

impl<O: Copy> RangeLocks<O> {
    /// Asks for `range`. The flag says whether it was granted at once; otherwise `owner` is named
    /// by a later [`Self::release`].
    pub(super) fn acquire(&mut self, range: SectorRange, owner: O) -> (LockKey, bool) {
        assert!(range.count > 0 && range.count <= LOCK_SECTORS_MAX);
        let key = LockKey {
            class: range.count.next_power_of_two().ilog2() as usize,
            place: Place {
                start: range.start,
                ticket: self.next_ticket,
            },
        };
        self.next_ticket += 1;
        let overlapping = |class: usize| {
            let near = self.by_class[class].range(window(class, range));
            near.filter(|(_, entry)| entry.range.overlaps(range))
                .count()
        };
        let waits_for = classes(self.used).map(overlapping).sum();
        let entry = Entry {
            range,
            owner,
            waits_for,
        };
        self.by_class[key.class].insert(key.place, entry);
        self.used |= 1 << key.class;
        (key, waits_for == 0)
    }

    /// Releases a granted lock. Adds the owners of the locks that this grants to `granted`, in
    /// the order in which they asked.
    pub(super) fn release(&mut self, key: LockKey, granted: &mut Vec<O>) {
        let entries = &mut self.by_class[key.class];
        let entry = entries.remove(&key.place).expect("a lock is released once");
        self.used &= !(u32::from(entries.is_empty()) << key.class);
        assert_eq!(entry.waits_for, 0, "only a granted lock is released");
        let mut ready: Vec<(u64, O)> = Vec::new();
        for class in classes(self.used) {
            let near = self.by_class[class].range_mut(window(class, entry.range));
            for (place, other) in near.filter(|(_, other)| other.range.overlaps(entry.range)) {
                // The released lock was granted, so every overlapping entry came after it.
                other.waits_for -= 1;
                if other.waits_for == 0 {
                    ready.push((place.ticket, other.owner));
                }
            }
        }
        ready.sort_unstable_by_key(|(ticket, _)| *ticket);
        granted.extend(ready.into_iter().map(|(_, owner)| owner));
    }
}

impl<O> RangeLocks<O> {
    /// Asserts that `used` and every count of earlier overlapping entries are right. Compares every
    /// two entries: for tests.
    pub(super) fn self_check(&self) {
        for (class, entries) in self.by_class.iter().enumerate() {
            let is_used = self.used & (1 << class) != 0;
            assert_eq!(is_used, !entries.is_empty(), "class {class}");
        }
        let of_class = |class| std::iter::repeat(class).zip(&self.by_class[class]);
        let all = || classes(self.used).flat_map(of_class);
        for (class, (place, entry)) in all() {
            assert_eq!(place.start, entry.range.start, "an entry by its start");
            assert!(place.ticket < self.next_ticket, "a ticket to come");
            let rounded = entry.range.count.next_power_of_two();
            assert_eq!(rounded, 1 << class, "an entry by its length");
            let earlier = all().filter(|(_, (other, _))| other.ticket < place.ticket);
            let overlapping = earlier.filter(|(_, (_, other))| other.range.overlaps(entry.range));
            assert_eq!(entry.waits_for, overlapping.count(), "locks waited for");
        }
    }
}

/// The classes whose bits are set.
fn classes(mut bits: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let class = (bits != 0).then(|| bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(class)
    })
}

/// The places of all entries of `class` that can overlap `range`.
fn window(class: usize, range: SectorRange) -> std::ops::Range<Place> {
    let from = |start| Place { start, ticket: 0 };
    let longest = 1 << class;
    from(range.start.saturating_sub(longest - 1))..from(range.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A naive implementation: a list of all locks in the order in which they were asked for.
    #[derive(Default)]
    struct Oracle {
        asked: Vec<(usize, SectorRange)>,
    }

    impl Oracle {
        fn granted(&self) -> Vec<usize> {
            let is_granted = |index: usize| {
                let (_, range) = self.asked[index];
                self.asked[..index]
                    .iter()
                    .all(|(_, earlier)| !earlier.overlaps(range))
            };
            (0..self.asked.len())
                .filter(|index| is_granted(*index))
                .map(|index| self.asked[index].0)
                .collect()
        }
    }

    /// Asks for a range, or releases a granted one.
    fn step() -> impl Strategy<Value = (bool, u64, u64, prop::sample::Index)> {
        let (start, count) = (0..3000_u64, 1..1_u64 << 14);
        (any::<bool>(), start, count, any::<prop::sample::Index>())
    }

    proptest! {
        #[test]
        fn grants_the_same_locks_as_a_naive_list(
            steps in proptest::collection::vec(step(), 1..80),
        ) {
            let mut locks = RangeLocks::default();
            let mut oracle = Oracle::default();
            let mut keys = Vec::new();
            let mut held: Vec<usize> = Vec::new();
            for (acquire, start, count, pick) in steps {
                if acquire || held.is_empty() {
                    let range = SectorRange::new(start, count);
                    let owner = keys.len();
                    let (key, at_once) = locks.acquire(range, owner);
                    keys.push(key);
                    oracle.asked.push((owner, range));
                    if at_once { held.push(owner); }
                } else {
                    let owner = held.swap_remove(pick.index(held.len()));
                    locks.release(keys[owner], &mut held);
                    oracle.asked.retain(|(o, _)| *o != owner);
                }
                locks.self_check();
                let mut sorted = held.clone();
                sorted.sort_unstable();
                let mut expected = oracle.granted();
                expected.sort_unstable();
                prop_assert_eq!(sorted, expected);
            }
        }
    }

    #[test]
    fn grants_in_the_order_of_requests() {
        let mut locks = RangeLocks::default();
        let (first, _) = locks.acquire(SectorRange::new(0, 100), 'a');
        locks.acquire(SectorRange::new(50, 1), 'b');
        locks.acquire(SectorRange::new(10, 1), 'c');
        let mut granted = Vec::new();
        locks.release(first, &mut granted);
        assert_eq!(granted, ['b', 'c']);
    }
}
