//! The state of one replica.

use std::collections::VecDeque;

use super::FailureEpoch;
use super::durability::FlushEpoch;
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;

#[derive(Clone, Debug, Default)]
pub(super) struct ReplicaHealth {
    pub(super) stale: RangeSet,
    /// Of what the last flush covers, what this replica is known not to have made durable: what
    /// was stale when it began, and what has become so since. Newer writes may refresh that, but
    /// not for this flush.
    pub(super) uncovered: RangeSet,
    /// Has not been written to since this replica was added.
    pub(super) blank: RangeSet,
    /// Was repaired or resynced here since the last flush began: a write of this replica alone.
    pub(super) rewritten: RangeSet,
    /// Was stale, or repaired, and has been written since the last flush began. Other members may
    /// have made durable long ago what this one had not.
    pub(super) refreshed: RangeSet,
    /// The same of a flush that this replica has not confirmed yet.
    pub(super) refreshed_before_flush: RangeSet,
    /// What was written before a flush that this replica has not confirmed yet, by that flush.
    pub(super) unconfirmed: VecDeque<(FlushEpoch, RangeSet)>,
    pub(super) last_failure: FailureEpoch,
    /// When a failure last turned out to have undone a write that had succeeded here: a read in
    /// flight may have seen the old data, even if it has been written again by the time the reply
    /// comes.
    pub(super) last_doubt: FailureEpoch,
    /// The workers that have had no operation in flight here since the eviction or removal.
    pub(super) drained_by: u64,
    /// The workers that have had no request that refers to this replica since its removal.
    pub(super) forgotten_by: u64,
}

impl ReplicaHealth {
    /// `range` was written.
    pub(super) fn mark_fresh(&mut self, range: SectorRange) {
        if !self.stale.overlaps(range) {
            return;
        }
        for part in self.stale.within(range) {
            self.refreshed.insert(part);
        }
        self.stale.remove(range);
        self.blank.remove(range);
    }

    /// All sets of sectors that are not fresh, or not durable, or not known to be.
    pub(super) fn sets(&self) -> impl Iterator<Item = &RangeSet> {
        let unconfirmed = self.unconfirmed.iter().map(|(_, written)| written);
        [
            &self.stale,
            &self.uncovered,
            &self.blank,
            &self.refreshed,
            &self.refreshed_before_flush,
        ]
        .into_iter()
        .chain(unconfirmed)
    }

    /// Forgets all sectors but those in `ranges`.
    pub(super) fn keep_only(&mut self, ranges: &RangeSet) {
        let unconfirmed = self.unconfirmed.iter_mut().map(|(_, written)| written);
        let sets = [
            &mut self.stale,
            &mut self.uncovered,
            &mut self.blank,
            &mut self.refreshed,
            &mut self.refreshed_before_flush,
        ];
        for set in sets.into_iter().chain(unconfirmed) {
            *set = set.part_in(ranges);
        }
    }

    /// Sectors that are not on stable storage here, although they may be elsewhere.
    pub(super) fn not_durable_here(&self) -> impl Iterator<Item = &RangeSet> {
        [&self.stale, &self.refreshed, &self.refreshed_before_flush].into_iter()
    }
}
