//! Exclusive locks on ranges of sectors, granted in the order in which they were asked for (contract W2).
//!
//! Whoever wants a range waits for everyone who asked for an overlapping one before, and for nobody else:
//!
//! ```text
//!   asked 1st  |----A----|                    granted
//!   asked 2nd        |----B----|              waits for A
//!   asked 3rd                |----C----|      waits for B, although nobody holds C's sectors yet:
//!   asked 4th  |-D-|                          waits for A            overtaking would reorder B and C
//! ```
//!
//! Each entry counts those it waits for. A range is at most [`LOCK_SECTORS_MAX`] long, so all entries that can
//! overlap one start within that distance before it: an ordered map is all the index it takes.

use std::collections::BTreeMap;

use crate::limits::ZERO_BYTES_MAX;
use crate::quorum::{SECTOR_BYTES, SectorRange};

/// The longest range that can be locked, in sectors.
pub(super) const LOCK_SECTORS_MAX: u64 = ZERO_BYTES_MAX / SECTOR_BYTES;

/// Names a lock, granted or waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LockKey {
    start: u64,
    ticket: u64,
}

/// The locks of a disk. `O` is whom to tell when a lock is granted.
#[derive(Debug)]
pub(super) struct RangeLocks<O> {
    entries: BTreeMap<LockKey, Entry<O>>,
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
            entries: BTreeMap::new(),
            next_ticket: 0,
        }
    }
}

impl<O: Copy> RangeLocks<O> {
    /// Asks for `range`. The flag says whether it was granted at once; otherwise `owner` is named by a later
    /// [`Self::release`].
    pub(super) fn acquire(&mut self, range: SectorRange, owner: O) -> (LockKey, bool) {
        assert!(range.count > 0 && range.count <= LOCK_SECTORS_MAX);
        let key = LockKey {
            start: range.start,
            ticket: self.next_ticket,
        };
        self.next_ticket += 1;
        let waits_for = self.overlapping(range).count();
        let entry = Entry {
            range,
            owner,
            waits_for,
        };
        self.entries.insert(key, entry);
        (key, waits_for == 0)
    }

    /// Gives a granted lock back. Adds the owners of the locks that this grants to `granted`, in the order in
    /// which they asked.
    pub(super) fn release(&mut self, key: LockKey, granted: &mut Vec<O>) {
        let entry = self.entries.remove(&key).expect("a lock is released once");
        debug_assert_eq!(entry.waits_for, 0, "only a granted lock is released");
        let mut ready: Vec<(u64, O)> = Vec::new();
        for (other_key, other) in overlapping_mut(&mut self.entries, entry.range) {
            // The released lock was granted, so every overlapping entry came after it.
            other.waits_for -= 1;
            if other.waits_for == 0 {
                ready.push((other_key.ticket, other.owner));
            }
        }
        ready.sort_unstable_by_key(|(ticket, _)| *ticket);
        granted.extend(ready.into_iter().map(|(_, owner)| owner));
    }

    fn overlapping(&self, range: SectorRange) -> impl Iterator<Item = &Entry<O>> {
        self.entries
            .range(window(range))
            .map(|(_, entry)| entry)
            .filter(move |entry| entry.range.overlaps(range))
    }
}

fn overlapping_mut<O>(
    entries: &mut BTreeMap<LockKey, Entry<O>>,
    range: SectorRange,
) -> impl Iterator<Item = (&LockKey, &mut Entry<O>)> {
    entries
        .range_mut(window(range))
        .filter(move |(_, entry)| entry.range.overlaps(range))
}

/// The keys of all entries that can overlap `range`.
fn window(range: SectorRange) -> std::ops::Range<LockKey> {
    let from = |start| LockKey { start, ticket: 0 };
    from(range.start.saturating_sub(LOCK_SECTORS_MAX - 1))..from(range.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same, naively: a list in the order of asking.
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

    proptest! {
        #[test]
        fn grants_what_the_naive_list_grants(
            steps in proptest::collection::vec((any::<bool>(), 0..3000u64, 1..LOCK_SECTORS_MAX, any::<prop::sample::Index>()), 1..80),
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
                let mut sorted = held.clone();
                sorted.sort_unstable();
                let mut expected = oracle.granted();
                expected.sort_unstable();
                prop_assert_eq!(sorted, expected);
            }
        }
    }

    #[test]
    fn grants_in_the_order_of_asking() {
        let mut locks = RangeLocks::default();
        let (first, _) = locks.acquire(SectorRange::new(0, 100), 'a');
        locks.acquire(SectorRange::new(50, 1), 'b');
        locks.acquire(SectorRange::new(10, 1), 'c');
        let mut granted = Vec::new();
        locks.release(first, &mut granted);
        assert_eq!(granted, ['b', 'c']);
    }
}
