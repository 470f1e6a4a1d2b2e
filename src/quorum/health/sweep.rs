//! A look at every sector of the disk at once.

use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::REPLICAS_MAX;

/// Whether `holds` for the replicas that have a sector in one of their sets, for every sector of a
/// disk.
pub(super) fn every_sector<'a>(
    sets: impl Iterator<Item = (ReplicaIndex, &'a RangeSet)>,
    capacity_sectors: u64,
    holds: impl Fn(ReplicaSet) -> bool,
) -> bool {
    // Sweep over the ends of all ranges; between two of them the sets do not change.
    let mut ends: Vec<(u64, ReplicaIndex, bool)> = sets
        .flat_map(|(replica, ranges)| {
            ranges.iter().flat_map(move |range| {
                [(range.start, replica, true), (range.end(), replica, false)]
            })
        })
        .collect();
    ends.sort_unstable();
    // How many of its sets each replica is in.
    let mut inside = [0_u8; REPLICAS_MAX];
    let mut with = ReplicaSet::EMPTY;
    let mut from = 0;
    for (sector, replica, begins) in ends {
        if sector > from && !holds(with) {
            return false;
        }
        from = sector;
        let count = &mut inside[replica.as_usize()];
        if begins {
            *count += 1;
            with.insert(replica);
        } else {
            *count -= 1;
            if *count == 0 {
                with.remove(replica);
            }
        }
    }
    from >= capacity_sectors || holds(with)
}
