//! When a job asks for holes, which it need not read.
//!
//! It asks where it begins, and behind each stretch that it has read. Each time that there is no
//! hole it reads twice as much before it asks again: an image without holes costs few questions,
//! and one with little data is mostly skipped.

use crate::common::SectorRange;
use crate::limits::{
    HOLE_BYTES_MAX, HOLE_LOCK_BYTES_MAX, HOLE_READ_BYTES_MAX, HOLE_READ_BYTES_MIN, SECTOR_BYTES,
};

/// The sizes of questions for holes, in sectors.
#[derive(Clone, Copy, Debug)]
pub struct HoleSizes {
    /// For how much a scrub asks at a time.
    pub asked: u64,
    /// The same for a resync, which locks the range.
    pub locked: u64,
    /// What is read at least before the next question. Less than that is read in any case.
    pub read_min: u64,
    /// What is read at most before the next question.
    pub read_max: u64,
}

impl Default for HoleSizes {
    fn default() -> Self {
        Self {
            asked: HOLE_BYTES_MAX / SECTOR_BYTES,
            locked: HOLE_LOCK_BYTES_MAX / SECTOR_BYTES,
            read_min: HOLE_READ_BYTES_MIN / SECTOR_BYTES,
            read_max: HOLE_READ_BYTES_MAX / SECTOR_BYTES,
        }
    }
}

/// The questions of one job.
#[derive(Debug, Default)]
pub(super) struct Holes {
    /// The question in flight. Until the answer the job does not know how to go on.
    asked: Option<SectorRange>,
    /// What lies before is read.
    read_until: u64,
    /// How much was to be read after the last question.
    stretch: u64,
}

impl Holes {
    pub(super) fn is_asking(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether to ask before the job reads from the start of `left` on.
    pub(super) fn is_due(&self, left: SectorRange, sizes: &HoleSizes) -> bool {
        left.start >= self.read_until && left.count >= sizes.read_min
    }

    /// The question for `range` begins.
    pub(super) fn ask(&mut self, range: SectorRange) {
        assert!(!self.is_asking(), "one question at a time");
        self.asked = Some(range);
    }

    /// The answer: how much of the range is skipped. Returns where the job goes on.
    pub(super) fn answered(&mut self, skipped: u64, sizes: &HoleSizes) -> u64 {
        let range = self.asked.take().expect("a question has one answer");
        assert!(skipped <= range.count, "more is skipped than was asked for");
        let next = range.start + skipped;
        self.stretch = match skipped {
            0 => (self.stretch * 2).clamp(sizes.read_min, sizes.read_max),
            _ => sizes.read_min,
        };
        if skipped < range.count {
            self.read_until = next + self.stretch;
        }
        next
    }

    /// The job begins again.
    pub(super) fn restart(&mut self) {
        self.read_until = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: HoleSizes = HoleSizes {
        asked: 100,
        locked: 100,
        read_min: 10,
        read_max: 40,
    };

    /// Asks at `sector`; returns where the job goes on, and up to where it reads.
    fn ask(holes: &mut Holes, sector: u64, skipped: u64) -> (u64, u64) {
        let range = SectorRange::new(sector, SIZES.asked);
        assert!(holes.is_due(range, &SIZES));
        holes.ask(range);
        let next = holes.answered(skipped, &SIZES);
        (next, holes.read_until)
    }

    #[test]
    fn the_less_holes_the_fewer_questions() {
        let mut holes = Holes::default();
        assert_eq!(ask(&mut holes, 0, 100), (100, 0), "the hole goes on");
        assert_eq!(ask(&mut holes, 100, 30), (130, 140));
        assert!(!holes.is_due(SectorRange::new(139, 100), &SIZES));
        assert!(
            !holes.is_due(SectorRange::new(140, 9), &SIZES),
            "little is left"
        );
        assert_eq!(ask(&mut holes, 140, 0), (140, 160));
        assert_eq!(ask(&mut holes, 160, 0), (160, 200));
        assert_eq!(ask(&mut holes, 200, 0), (200, 240), "at most so many");
        assert_eq!(ask(&mut holes, 240, 1), (241, 251));
        assert_eq!(ask(&mut holes, 251, 0), (251, 271));
    }
}
