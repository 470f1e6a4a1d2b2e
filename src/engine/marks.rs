//! Which extents are marked in the records as being changed (S4).
//!
//! A write waits until its extent is marked durably on all active replicas; extents ahead of a
//! sequential writer are marked before it comes to them. A mark goes when all of them have flushed
//! what was written there.

use crate::common::SectorRange;
use crate::limits::{
    MARKING_ROUNDS_DOUBLING, MARKING_ROUNDS_MAX, MARKS_AHEAD_MAX, MARKS_AROUND_MAX, MARKS_EARLY,
    MARKS_EARLY_MAX, MARKS_ROW,
};
use crate::quorum::health::{FlushEpoch, Health};
use crate::record::Extents;

/// Which extents are marked as being changed.
#[derive(Clone, Debug)]
pub(super) struct Marks {
    /// Durably, on all active replicas: the guest may change these.
    durable: Extents,
    /// To be marked.
    wanted: Extents,
    /// A write has begun or ended there since the last flush began.
    written: Extents,
    /// The same before a flush that began since the last one that has succeeded everywhere.
    unflushed: Extents,
    /// The same since the last sweep.
    recent: Extents,
    /// How often marks were made since the last sweep.
    rounds: u64,
    /// There may be marks that are needed no more, now or later.
    sweepable: bool,
    /// Something is wanted that no write waits for yet.
    ahead: bool,
    /// Where fewer extents than this are marked ahead of a row, more are to be marked.
    early: u64,
    /// Since the last round a row has caught up with what was to be marked ahead of it.
    caught_up: bool,
}

impl Marks {
    /// These are marked already.
    pub(super) fn new(durable: Extents) -> Self {
        let layout = durable.layout();
        Self {
            wanted: Extents::new(layout),
            // Nothing is known of what was changed before.
            written: durable.clone(),
            unflushed: Extents::new(layout),
            recent: Extents::new(layout),
            durable,
            rounds: 0,
            sweepable: false,
            ahead: false,
            early: MARKS_EARLY,
            caught_up: false,
        }
    }

    /// The guest is to change `range`: whether it may, since all of it is marked. If not, it will
    /// be.
    #[inline]
    pub(super) fn begin(&mut self, range: SectorRange) -> bool {
        let may = self.durable.contains(range);
        if !may {
            self.want(range);
        } else {
            self.written.insert(range);
            if self.recent.insert(range) {
                self.look_ahead(range);
            }
        }
        may
    }

    /// A write goes on to an extent of `range`. Where it is one of many in a row, those that
    /// probably follow are to be marked before they are reached.
    #[cold]
    fn look_ahead(&mut self, range: SectorRange) {
        let layout = self.durable.layout();
        let (extent, capacity) = (layout.extent_sectors(), layout.capacity());
        let next = range.end().div_ceil(extent) * extent;
        let early = next.saturating_add(self.early * extent);
        let early = SectorRange::new(early.min(capacity - 1), 1);
        if next >= capacity
            || self.durable.overlaps(early)
            || self.wanted.overlaps(early)
            || !self.is_in_a_row(next)
        {
            return;
        }
        // As many in each round as where a write waits for it.
        let ahead = (self.early + self.early.max(MARKS_AHEAD_MAX)) * extent;
        let end = next.saturating_add(ahead).min(capacity);
        self.wanted.insert(SectorRange::new(next, end - next));
        self.ahead = true;
    }

    /// Whether all that comes before this extent was written since the last sweep.
    fn is_in_a_row(&self, next: u64) -> bool {
        let row = MARKS_ROW * self.durable.layout().extent_sectors();
        let start = next.checked_sub(row);
        start.is_some_and(|start| self.recent.contains(SectorRange::new(start, row)))
    }

    /// Whether something is to be marked that no write waits for yet. Said once.
    #[inline]
    pub(super) fn take_ahead(&mut self) -> bool {
        std::mem::take(&mut self.ahead)
    }

    /// A write of `range` begins or has ended.
    #[inline]
    pub(super) fn touch(&mut self, range: SectorRange) {
        self.written.insert(range);
        self.recent.insert(range);
    }

    /// `range` is to be marked, and what will probably follow: as much as is marked before it, and
    /// what lies around it, the more the more often marks were made since the last sweep.
    #[cold]
    pub(super) fn want(&mut self, range: SectorRange) {
        let layout = self.durable.layout();
        let (extent, capacity) = (layout.extent_sectors(), layout.capacity());
        let first = range.start / extent;
        // A row has caught up with what is being marked ahead of it.
        if !self.caught_up && self.wanted.overlaps(range) && self.is_in_a_row(first * extent) {
            self.early = (2 * self.early).min(MARKS_EARLY_MAX);
            self.caught_up = true;
        }
        let marked = |index: &u64| {
            let extent = layout.extent(*index);
            self.durable.contains(extent) || self.wanted.contains(extent)
        };
        let before = (first.saturating_sub(MARKS_AHEAD_MAX)..first).rev();
        let ahead = before.take_while(marked).count() as u64 * extent;
        let end = range.end().saturating_add(ahead).min(capacity);
        self.wanted
            .insert(SectorRange::new(range.start, end - range.start));
        let doublings = self.rounds / MARKING_ROUNDS_DOUBLING;
        let around = (1 << doublings.min(u64::from(u32::BITS))).min(MARKS_AROUND_MAX);
        let start = first / around * around;
        self.wanted
            .insert(SectorRange::new(start * extent, around * extent));
    }

    /// What is to be marked.
    pub(super) fn wanted(&self) -> &Extents {
        &self.wanted
    }

    /// These are marked now.
    pub(super) fn are_marked(&mut self, marked: &Extents) {
        if marked.layout() != self.durable.layout() {
            return;
        }
        self.rounds += u64::from(!marked.is_empty());
        self.caught_up = false;
        self.durable.insert_all(marked);
        self.wanted.remove_all(marked);
    }

    /// The health has changed; these were its last flush and the last one that had succeeded
    /// everywhere.
    #[inline]
    pub(super) fn follow(&mut self, earlier: (FlushEpoch, FlushEpoch), health: &Health) {
        if (health.last_flush(), health.flushed_everywhere()) != earlier {
            self.flush(health.last_flush() != earlier.0);
        }
    }

    /// A flush has begun, or has succeeded everywhere.
    fn flush(&mut self, begins: bool) {
        let layout = self.durable.layout();
        if begins {
            self.unflushed.insert_all(&self.written);
            self.written = Extents::new(layout);
        } else {
            self.unflushed = Extents::new(layout);
            self.sweepable = true;
        }
    }

    /// The disk grows: everything is to be marked again, where it is marked now.
    pub(super) fn grow(&mut self, capacity: u64) {
        let layout = self.durable.layout().grown(capacity);
        let mut grown = Self::new(Extents::new(layout));
        for set in [&self.durable, &self.wanted] {
            grown.wanted.insert_all(set);
        }
        for set in [&self.written, &self.unflushed] {
            grown.written.insert_all(set);
        }
        *self = grown;
    }

    /// Which marks are needed no more by what is known of the replicas (`health`, a copy): a flush
    /// that began after the last write there has made all of it durable everywhere, and that is
    /// some time ago. `None`: it is not time to take any away.
    pub(super) fn idle(&self, health: &Health) -> Option<Extents> {
        let mut idle = self.durable.clone();
        for set in [&self.written, &self.unflushed] {
            idle.remove_all(set);
        }
        for range in health.unsettled() {
            idle.remove(range);
        }
        (!idle.is_empty()).then_some(idle)
    }

    /// Takes those of the `idle` marks away that nothing has touched since the last sweep. From now
    /// on the guest may not change them. `is_same`: the replicas are as they were when these were
    /// found to be idle.
    pub(super) fn sweep(&mut self, idle: Option<Extents>, is_same: bool) -> Option<Extents> {
        let layout = self.durable.layout();
        let recent = std::mem::replace(&mut self.recent, Extents::new(layout));
        // What moves on and on stays marked instead of being marked again and again.
        let moves = std::mem::take(&mut self.rounds) > MARKING_ROUNDS_MAX;
        self.early = (self.early / 2).max(MARKS_EARLY);
        let mut idle = idle.filter(|idle| idle.layout() == layout);
        let later = moves || !is_same;
        self.sweepable = later || idle.as_ref().is_some_and(|idle| idle.overlaps_any(&recent));
        if let Some(idle) = &mut idle {
            idle.remove_all(&recent);
        }
        let idle = idle.filter(|idle| !later && !idle.is_empty())?;
        self.durable.remove_all(&idle);
        Some(idle)
    }

    /// Whether marks may be needed no more, now or later.
    pub(super) fn is_sweepable(&self) -> bool {
        self.sweepable
    }

    /// Has the next sweep come, although no mark may be needed no more.
    pub(super) fn want_sweep(&mut self) {
        self.sweepable = true;
    }

    /// Whether all of `range` is marked.
    #[cfg(any(test, feature = "sim"))]
    pub(super) fn are_durable(&self, range: SectorRange) -> bool {
        self.durable.contains(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::ReplicaSet;
    use crate::quorum::health::WriteEnd;
    use crate::record::Layout;

    /// Sectors of an extent.
    const EXTENT: u64 = 2048;

    fn extent(index: u64) -> SectorRange {
        SectorRange::new(index * EXTENT, 8)
    }

    fn marked(extents: &[u64]) -> Extents {
        let mut marked = Extents::new(Layout::new(64 * EXTENT));
        for index in extents {
            marked.insert(extent(*index));
        }
        marked
    }

    /// What is marked and idle, by index.
    fn idle(marks: &Marks, health: &Health) -> Vec<u64> {
        let idle = marks.idle(health);
        let ranges: Vec<_> = idle.iter().flat_map(Extents::iter).collect();
        let indices = ranges.iter();
        let indices = indices.flat_map(|r| r.start / EXTENT..r.end().div_ceil(EXTENT));
        indices.collect()
    }

    /// Two replicas, and marks that follow what happens to them.
    struct Disk {
        health: Health,
        marks: Marks,
    }

    impl Disk {
        fn change<R>(&mut self, change: impl FnOnce(&mut Health) -> R) -> R {
            let earlier = (self.health.last_flush(), self.health.flushed_everywhere());
            let result = change(&mut self.health);
            self.marks.follow(earlier, &self.health);
            result
        }

        fn write(&mut self, index: u64) {
            let both = ReplicaSet::first(2);
            assert!(self.marks.begin(extent(index)), "it is marked");
            let begun = self.health.write_begins(extent(index));
            self.marks.touch(extent(index));
            self.change(|health| {
                health.write_ended(&WriteEnd {
                    asked: both,
                    succeeded: both,
                    begun,
                    success: true,
                })
            });
        }

        fn flush(&mut self, succeeded: ReplicaSet) {
            let epoch = self.change(Health::flush_begins);
            for replica in ReplicaSet::first(2).iter() {
                let success = succeeded.contains(replica);
                self.change(|health| health.flush_ended(epoch, replica, success));
            }
            self.change(|health| health.flush_decided(epoch, succeeded, true, &mut []));
        }
    }

    fn disk(extents: &[u64]) -> Disk {
        let mut disk = Disk {
            health: Health::new(ReplicaSet::first(2), 1, 1, 64 * EXTENT),
            marks: Marks::new(marked(extents)),
        };
        disk.flush(ReplicaSet::first(2));
        disk
    }

    #[test]
    fn a_mark_stays_until_a_flush_after_the_last_write_has_succeeded_everywhere() {
        let mut disk = disk(&[3, 5]);
        assert_eq!(idle(&disk.marks, &disk.health), [3, 5]);
        disk.write(3);
        assert_eq!(idle(&disk.marks, &disk.health), [5], "not flushed");
        disk.flush(ReplicaSet::first(1));
        assert_eq!(idle(&disk.marks, &disk.health), [5], "one has failed");
        disk.write(3);
        disk.flush(ReplicaSet::first(2));
        assert_eq!(idle(&disk.marks, &disk.health), [3, 5]);
    }

    #[test]
    fn a_mark_stays_where_something_was_changed_since_the_last_sweep() {
        let mut disk = disk(&[3, 5]);
        disk.write(3);
        disk.flush(ReplicaSet::first(2));
        let found = disk.marks.idle(&disk.health);
        assert_eq!(disk.marks.sweep(found, true), Some(marked(&[5])));
        assert!(disk.marks.is_sweepable() && !disk.marks.begin(extent(5)));
        let found = disk.marks.idle(&disk.health);
        assert_eq!(
            disk.marks.sweep(found.clone(), false),
            None,
            "another state"
        );
        assert_eq!(disk.marks.sweep(found, true), Some(marked(&[3])));
    }

    #[test]
    fn as_much_is_marked_ahead_as_is_marked_before() {
        let mut marks = Marks::new(marked(&[10]));
        assert!(!marks.begin(extent(20)) && !marks.begin(extent(11)));
        assert_eq!(*marks.wanted(), marked(&[11, 12, 20]));
        let wanted = marks.wanted().clone();
        marks.are_marked(&wanted);
        assert!(marks.begin(extent(12)) && marks.wanted().is_empty());
        assert!(!marks.begin(extent(13)));
        assert_eq!(*marks.wanted(), marked(&[13, 14, 15, 16]));
    }

    #[test]
    fn what_follows_a_row_is_marked_before_it_is_reached() {
        let layout = Layout::new(200 * EXTENT);
        let mut marks = Marks::new(Extents::full(layout));
        let behind = SectorRange::new(20 * EXTENT, 180 * EXTENT);
        marks.durable.remove(behind);
        marks.written = Extents::new(layout);
        for index in 0..MARKS_ROW - 1 {
            assert!(marks.begin(extent(index)) && !marks.take_ahead(), "{index}");
        }
        assert!(marks.begin(extent(12)) && !marks.take_ahead(), "no row");
        assert!(marks.begin(extent(MARKS_ROW - 1)) && marks.take_ahead());
        assert!(!marks.take_ahead() && !marks.durable.overlaps(behind));
        let end = MARKS_ROW + MARKS_EARLY + MARKS_AHEAD_MAX;
        let ahead = SectorRange::new(20 * EXTENT, (end - 20) * EXTENT);
        assert!(marks.wanted.contains(ahead));
        assert!(
            !marks
                .wanted
                .overlaps(SectorRange::new(end * EXTENT, EXTENT))
        );
        assert!(
            marks.begin(extent(MARKS_ROW)) && !marks.take_ahead(),
            "it is wanted"
        );
    }

    #[test]
    fn more_is_marked_ahead_of_a_row_that_catches_up() {
        let mut marks = Marks::new(Extents::new(Layout::new(10_000 * EXTENT)));
        let mut distances = Vec::new();
        let mut next = 0;
        for _ in 0..8 {
            // The writer is as fast as can be: a round ends when it waits.
            while marks.begin(extent(next)) {
                next += 1;
            }
            marks.begin(extent(next + 1));
            distances.push(marks.early);
            let wanted = marks.wanted().clone();
            marks.are_marked(&wanted);
        }
        assert_eq!(distances[..2], [MARKS_EARLY; 2], "no row yet");
        assert_eq!(distances.last(), Some(&MARKS_EARLY_MAX));
        let doubles = |pair: &[u64]| [pair[0], 2 * pair[0]].contains(&pair[1]);
        assert!(distances.windows(2).all(doubles), "{distances:?}");
        marks.sweep(None, true);
        assert_eq!(marks.early, MARKS_EARLY_MAX / 2);
    }

    #[test]
    fn what_follows_a_row_is_marked_up_to_the_end_of_the_disk() {
        let mut marks = Marks::new(Extents::full(Layout::new(20 * EXTENT)));
        let end = SectorRange::new(10 * EXTENT, 10 * EXTENT);
        marks.durable.remove(end);
        (0..MARKS_ROW).for_each(|index| assert!(marks.begin(extent(index))));
        assert!(marks.take_ahead() && marks.wanted.contains(end));
    }

    #[test]
    fn what_is_marked_again_and_again_is_marked_in_larger_parts() {
        let mut marks = Marks::new(Extents::new(Layout::new(10_000 * EXTENT)));
        let mut round = |index| {
            assert!(!marks.begin(extent(index)));
            let wanted = marks.wanted().clone();
            marks.are_marked(&wanted);
            wanted.iter().collect::<Vec<_>>()
        };
        let whole = |start: u64, count: u64| SectorRange::new(start * EXTENT, count * EXTENT);
        for index in 0..16 {
            assert_eq!(round(2 * index), [whole(2 * index, 1)]);
        }
        assert_eq!(round(101), [whole(100, 2)]);
        (1..80).for_each(|index| drop(round(200 + 64 * index)));
        assert_eq!(round(9999), [whole(9984, 16)], "up to the end of the disk");
        assert_eq!(round(9000), [whole(8960, 64)], "at most so many");
    }
}
