//! When a job asks for holes, which it need not read.
//!
//! It asks where it begins, and behind each stretch of which it knows where the data is: that it
//! reads. Each time that there is no hole it reads twice as much before it asks again: an image
//! without holes costs few questions, and one with little data is mostly skipped.

use std::collections::VecDeque;

use crate::common::SectorRange;
use crate::limits::{
    HOLE_BYTES_MAX, HOLE_LOCK_BYTES_MAX, HOLE_READ_BYTES_MAX, HOLE_READ_BYTES_MIN, SECTOR_BYTES,
};

/// The sizes of questions for holes, in sectors.
#[derive(Clone, Copy, Debug)]
pub struct HoleSizes {
    /// For how much a scrub asks at a time.
    pub asked: u64,
    /// The same for a resync and a recovery, which lock the range.
    pub locked: u64,
    /// What is read at least where there is no hole, before the next question. Less than that is
    /// read in any case.
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
    /// What lies before is read, but for what is skipped.
    read_until: u64,
    /// How much was to be read after the last question.
    stretch: u64,
    /// What is skipped, and the job has not come to, in order. Only a scrub needs it: of the others
    /// it is known what is left to do.
    ahead: VecDeque<SectorRange>,
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

    /// The answer: what is skipped, and up to where that is known. Returns the start of the range.
    pub(super) fn answered(
        &mut self,
        skipped: &[SectorRange],
        known_until: u64,
        sizes: &HoleSizes,
    ) -> u64 {
        let range = self.asked.take().expect("a question has one answer");
        let is_within = |run: &SectorRange| run.start >= range.start && run.end() <= range.end();
        assert!(
            skipped.iter().all(is_within),
            "more is skipped than was asked for"
        );
        if skipped.is_empty() {
            self.stretch = (self.stretch * 2).clamp(sizes.read_min, sizes.read_max);
            self.read_until = known_until.max(range.start + self.stretch);
        } else {
            self.stretch = 0;
            self.read_until = known_until;
        }
        range.start
    }

    /// What is skipped is passed over when the job comes there.
    pub(super) fn skip(&mut self, skipped: &[SectorRange]) {
        self.ahead = skipped.iter().copied().collect();
    }

    /// The job has come to `sector`: returns from where on it has something to do.
    pub(super) fn pass(&mut self, sector: u64) -> u64 {
        match self.ahead.front() {
            Some(hole) if hole.start <= sector => {
                let end = hole.end();
                self.ahead.pop_front();
                end
            }
            Some(_) | None => sector,
        }
    }

    /// Where the job, which is before, comes to what it skips.
    pub(super) fn next_skipped(&self) -> Option<u64> {
        self.ahead.front().map(|hole| hole.start)
    }

    /// How much is skipped and the job has not come to.
    pub(super) fn ahead_sectors(&self) -> u64 {
        self.ahead.iter().map(|hole| hole.count).sum()
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

    /// Asks at `sector`, of which so much is a hole; up to where that is known. Returns up to where
    /// the job does not ask.
    fn ask(holes: &mut Holes, sector: u64, skipped: u64, known_until: u64) -> u64 {
        let range = SectorRange::new(sector, SIZES.asked);
        assert!(holes.is_due(range, &SIZES));
        holes.ask(range);
        let hole = SectorRange::new(sector, skipped);
        let skipped = if skipped > 0 { vec![hole] } else { Vec::new() };
        assert_eq!(holes.answered(&skipped, known_until, &SIZES), sector);
        holes.read_until
    }

    #[test]
    fn the_less_holes_the_fewer_questions() {
        let mut holes = Holes::default();
        assert_eq!(ask(&mut holes, 0, 100, 100), 100);
        assert_eq!(ask(&mut holes, 100, 30, 140), 140);
        assert!(!holes.is_due(SectorRange::new(139, 100), &SIZES));
        assert!(
            !holes.is_due(SectorRange::new(140, 9), &SIZES),
            "little is left"
        );
        assert_eq!(ask(&mut holes, 140, 0, 145), 150);
        assert_eq!(ask(&mut holes, 150, 0, 151), 170);
        assert_eq!(ask(&mut holes, 170, 0, 171), 210);
        assert_eq!(ask(&mut holes, 210, 0, 211), 250, "at most so many");
        assert_eq!(ask(&mut holes, 250, 0, 350), 350, "what is known");
        assert_eq!(ask(&mut holes, 350, 1, 400), 400);
        assert_eq!(ask(&mut holes, 400, 0, 401), 410);
    }

    #[test]
    fn what_is_skipped_is_passed_over_when_the_job_comes_there() {
        let mut holes = Holes::default();
        holes.skip(&[SectorRange::new(0, 10), SectorRange::new(20, 5)]);
        assert_eq!((holes.pass(0), holes.next_skipped()), (10, Some(20)));
        assert_eq!((holes.pass(12), holes.ahead_sectors()), (12, 5));
        assert_eq!((holes.pass(20), holes.next_skipped()), (25, None));
        assert_eq!((holes.pass(30), holes.ahead_sectors()), (30, 0));
    }
}
