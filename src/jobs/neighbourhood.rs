//! The surroundings of corruption that a read has found, to be scrubbed once.
//!
//! Invariant: what was scrubbed within the last [`NEIGHBOURHOOD_REST`] is not scrubbed again, so a
//! guest that keeps reading a corrupt sector which is not repaired causes no endless scrub.

use std::time::Duration;

use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::limits::{JOBS_MAX, NEIGHBOURHOOD_REST};

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Neighbourhood {
    /// Corrupt ranges whose surroundings are to be scrubbed.
    found: Vec<SectorRange>,
    /// What was scrubbed lately.
    scrubbed: RangeSet,
    /// When `scrubbed` expires.
    scrubbed_until: Duration,
    capacity_sectors: u64,
}

impl Neighbourhood {
    pub(super) fn new(capacity_sectors: u64) -> Self {
        Self {
            found: Vec::new(),
            scrubbed: RangeSet::default(),
            scrubbed_until: Duration::ZERO,
            capacity_sectors,
        }
    }

    pub(super) fn grow(&mut self, capacity_sectors: u64) {
        self.capacity_sectors = capacity_sectors;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Remembers a corrupt range. Returns whether there was room.
    pub(super) fn add(&mut self, corrupt: SectorRange) -> bool {
        // Beyond the bound it is dropped: a later read or scrub finds what is around it.
        let has_room = self.found.len() < JOBS_MAX;
        if has_room {
            self.found.push(corrupt);
        }
        has_room
    }

    /// Takes the corrupt ranges. Forgets what was scrubbed if that has expired.
    pub(super) fn take(&mut self, now: Duration) -> Vec<SectorRange> {
        if now >= self.scrubbed_until && !self.scrubbed.is_empty() {
            self.scrubbed = RangeSet::default();
        }
        std::mem::take(&mut self.found)
    }

    /// The surroundings of `corrupt`, `reach_sectors` on either side and in whole blocks, without
    /// what was scrubbed lately.
    pub(super) fn around(
        &self,
        corrupt: SectorRange,
        reach_sectors: u64,
        block_sectors: u64,
    ) -> RangeSet {
        let start = corrupt.start.saturating_sub(reach_sectors);
        let start = start - start % block_sectors;
        let end = corrupt.end() + reach_sectors;
        let end = end
            .next_multiple_of(block_sectors)
            .min(self.capacity_sectors);
        let mut around = RangeSet::default();
        around.insert(SectorRange::new(start, end - start));
        for scrubbed in self.scrubbed.within(SectorRange::new(start, end - start)) {
            around.remove(scrubbed);
        }
        // The read that found the corruption has voted on these blocks.
        let inner_start = corrupt.start.next_multiple_of(block_sectors);
        let inner_end = corrupt.end() - corrupt.end() % block_sectors;
        around.remove(SectorRange::new(
            inner_start,
            inner_end.saturating_sub(inner_start),
        ));
        around
    }

    /// A chunk was scrubbed.
    pub(super) fn scrubbed(&mut self, range: SectorRange, now: Duration) {
        self.scrubbed.insert(range);
        self.scrubbed_until = now + NEIGHBOURHOOD_REST;
    }
}
