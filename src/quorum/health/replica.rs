//! The state of one replica.

use std::collections::VecDeque;

use super::FailureEpoch;
use super::durability::FlushEpoch;
use crate::common::SectorRange;
use crate::common::ranges::RangeSet;
use crate::common::runs;

#[derive(Clone, Debug, Default)]
pub(super) struct ReplicaHealth {
    pub(super) stale: RangeSet,
    /// Of what is stale: this replica has missed or failed the newest write.
    pub(super) missed: RangeSet,
    /// Of what is stale: the stable storage of this replica may hold something older than what t
    /// members have made durable, or corrupt bytes. What is stale and neither missed nor behind is
    /// *doubtful*: a failed flush may have lost the newest version, or not (W7).
    pub(super) behind: RangeSet,
    /// Was behind, and has been written since the last flush began. If the next flush fails here,
    /// it is behind again.
    pub(super) weak: RangeSet,
    /// The same of a flush that this replica has not confirmed yet.
    pub(super) weak_before_flush: RangeSet,
    /// Of what the last flush covers, what this replica is known not to have made durable: what
    /// was stale when it began, and what has become so since. Newer writes may refresh that, but
    /// not for this flush.
    pub(super) uncovered: RangeSet,
    /// Has not been written to since this replica was added.
    pub(super) blank: RangeSet,
    /// Was repaired or resynced here since the last flush began: a write of this replica alone.
    pub(super) rewritten: RangeSet,
    /// Was stale or corrupt, and has been written since the last flush began. Other members may
    /// have made durable long ago what this one had not.
    pub(super) refreshed: RangeSet,
    /// The same of a flush that this replica has not confirmed yet.
    pub(super) refreshed_before_flush: RangeSet,
    /// Was neither, and has been repaired since the last flush began: what is on stable storage
    /// here may be unreadable, but is not older than elsewhere.
    pub(super) restored: RangeSet,
    /// The same of a flush that this replica has not confirmed yet.
    pub(super) restored_before_flush: RangeSet,
    /// Was copied here from members that were not proven, since the last flush began: all may have
    /// lost the same write, and report that with their next flush.
    pub(super) copied: RangeSet,
    /// The same before a flush that began since the last one that has succeeded.
    pub(super) copied_before_flush: RangeSet,
    /// What was written before a flush that this replica has not confirmed yet, by that flush.
    pub(super) unconfirmed: VecDeque<(FlushEpoch, RangeSet)>,
    pub(super) last_failure: FailureEpoch,
    /// How many writes it has missed for each of which the records had to say more.
    pub(super) misses: u64,
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
    #[inline]
    pub(super) fn mark_fresh(&mut self, range: SectorRange) {
        if !self.stale.is_empty() && self.stale.overlaps(range) {
            self.refresh(range);
        }
    }

    #[cold]
    #[inline(never)]
    fn refresh(&mut self, range: SectorRange) {
        for part in self.stale.within(range) {
            self.refreshed.insert(part);
        }
        for part in self.behind.within(range) {
            self.weak.insert(part);
        }
        self.stale.remove(range);
        self.missed.remove(range);
        self.behind.remove(range);
        self.blank.remove(range);
    }

    /// All sets of sectors that are not fresh, or not durable, or not known to be.
    pub(super) fn sets(&self) -> impl Iterator<Item = &RangeSet> {
        let unconfirmed = self.unconfirmed.iter().map(|(_, written)| written);
        [
            &self.stale,
            &self.missed,
            &self.behind,
            &self.uncovered,
            &self.blank,
            &self.refreshed,
            &self.refreshed_before_flush,
            &self.restored,
            &self.restored_before_flush,
        ]
        .into_iter()
        .chain(unconfirmed)
    }

    /// A copy that knows of the sectors in `ranges` only.
    pub(super) fn part_in(&self, ranges: &RangeSet) -> Self {
        let part = |set: &RangeSet| set.part_in(ranges);
        let unconfirmed = self.unconfirmed.iter();
        Self {
            stale: part(&self.stale),
            missed: part(&self.missed),
            behind: part(&self.behind),
            weak: part(&self.weak),
            weak_before_flush: part(&self.weak_before_flush),
            uncovered: part(&self.uncovered),
            blank: part(&self.blank),
            rewritten: part(&self.rewritten),
            refreshed: part(&self.refreshed),
            refreshed_before_flush: part(&self.refreshed_before_flush),
            restored: part(&self.restored),
            restored_before_flush: part(&self.restored_before_flush),
            copied: part(&self.copied),
            copied_before_flush: part(&self.copied_before_flush),
            unconfirmed: unconfirmed
                .map(|(epoch, written)| (*epoch, part(written)))
                .collect(),
            ..*self
        }
    }

    /// Where this replica has missed something, or may hold something older than what t members
    /// have made durable after a crash of the host. What is doubtful is not in it.
    pub(super) fn illegal_after_a_crash(&self) -> RangeSet {
        let mut set = self.missed.clone();
        for other in [&self.behind, &self.weak, &self.weak_before_flush] {
            set.insert_all(other);
        }
        set
    }

    /// What was repaired in `range` since the last flush was something else than the winner of a
    /// vote. Whether there is any.
    pub(super) fn weaken(&mut self, range: SectorRange) -> bool {
        let sets = [
            (&self.restored, &mut self.weak),
            (&self.restored_before_flush, &mut self.weak_before_flush),
        ];
        let mut any = false;
        for (restored, weak) in sets {
            for part in restored.within(range) {
                weak.insert(part);
                any = true;
            }
        }
        any
    }

    /// `range` was not written here, or in vain.
    pub(super) fn mark_missed(&mut self, range: SectorRange) {
        self.stale.insert(range);
        self.missed.insert(range);
    }

    /// The parts of `range` that are doubtful, in order.
    pub(super) fn doubtful(&self, range: SectorRange) -> Vec<SectorRange> {
        let barred = runs::union(&self.missed.within(range), &self.behind.within(range));
        runs::without(&self.stale.within(range), &barred)
    }

    /// Whether some of what is stale in `range` is not doubtful: it has no vote.
    pub(super) fn has_no_vote(&self, range: SectorRange) -> bool {
        self.missed.overlaps(range) || self.behind.overlaps(range)
    }

    /// A flush has succeeded: every sector that it covers is durable on t members, and here some
    /// are not.
    pub(super) fn fall_behind(&mut self, _written: &RangeSet) {
        self.behind.insert_all(&self.uncovered);
        // Fresh again since the flush began.
        for range in self.refreshed.iter() {
            for part in runs::without(&[range], &self.stale.within(range)) {
                self.behind.remove(part);
            }
        }
        self.weak.insert_all(&self.refreshed);
        self.weak_before_flush
            .insert_all(&self.refreshed_before_flush);
        for (_, written) in &self.unconfirmed {
            self.weak_before_flush.insert_all(written);
        }
    }

    /// `range` is durable on t members, although a flush has not succeeded everywhere. Here some of
    /// it may not be.
    pub(super) fn fall_behind_in(&mut self, range: SectorRange) {
        let mut ranges = RangeSet::default();
        ranges.insert(range);
        let mut part = self.part_in(&ranges);
        part.fall_behind(&RangeSet::default());
        self.behind.insert_all(&part.behind);
        self.weak.insert_all(&part.weak);
        self.weak_before_flush.insert_all(&part.weak_before_flush);
    }

    /// Sectors that are not on stable storage here, although they may be elsewhere.
    pub(super) fn not_durable_here(&self) -> impl Iterator<Item = &RangeSet> {
        [
            &self.stale,
            &self.refreshed,
            &self.refreshed_before_flush,
            &self.restored,
            &self.restored_before_flush,
        ]
        .into_iter()
    }
}
