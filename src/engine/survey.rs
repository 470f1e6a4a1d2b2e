//! What is known of one replica's copy of a range that it could not read as a whole, and which
//! part of it to read next (R4).
//!
//! A range that cannot be read is cut into quarters, and so on down to single blocks. Quarters find
//! one unreadable block with as many reads as halves do, in half as many rounds.
//!
//! Pure. Invariant: the open, readable and unreadable parts and those being read are disjoint and
//! consist of whole blocks.

use crate::common::{Errno, ReplicaIndex, SectorRange};
use crate::limits::FAILED_PARTS_MAX;

/// Into how many parts a range is cut that cannot be read.
const PARTS: u64 = 4;

/// Each part that is read allows for this many more that fail.
const FAILURES_PER_SUCCESS: u64 = 8;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) replica: ReplicaIndex,
    block_sectors: u64,
    /// In order.
    open: Vec<Open>,
    /// The parts that are being read.
    reading: Vec<SectorRange>,
    /// In order, not joined.
    readable: Vec<SectorRange>,
    /// In order, not joined.
    unreadable: Vec<Unreadable>,
    succeeded: u64,
    failed: u64,
    /// How many parts may fail, more than those that success allows for.
    failed_max: u64,
    has_given_up: bool,
    is_closed: bool,
}

/// A part of which it is not known which blocks can be read.
#[derive(Clone, Copy, Debug)]
struct Open {
    range: SectorRange,
    /// It could not be read as a whole. Otherwise only a range around it could not.
    failed: bool,
}

/// Blocks that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unreadable {
    pub(super) range: SectorRange,
    /// The error of the part. `None`: this is the whole range, whose error is known.
    pub(super) errno: Option<Errno>,
}

/// Which open part comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// The one with the lowest sector: it soon shows a block that cannot be read.
    Lowest,
    /// The largest: it soon shows most of what can be read.
    Largest,
}

impl Survey {
    /// `replica` failed a read of `range`, which is whole blocks. `closed`: the runs, in order,
    /// where its copy does not matter. `failed_max`: how many parts may fail before a search
    /// without success ends.
    pub(super) fn new(
        replica: ReplicaIndex,
        range: SectorRange,
        block_sectors: u64,
        closed: &[SectorRange],
        failed_max: u64,
    ) -> Self {
        let mut survey = Self {
            replica,
            block_sectors,
            open: Vec::new(),
            reading: Vec::new(),
            readable: Vec::new(),
            unreadable: Vec::new(),
            succeeded: 0,
            failed: 0,
            failed_max,
            has_given_up: false,
            is_closed: false,
        };
        let mut start = range.start;
        for run in closed {
            // A block counts as closed only if all of it is.
            let end = run.start.next_multiple_of(block_sectors).min(range.end());
            survey.open_part(start, end, range);
            start = start.max(end).max(run.end() - run.end() % block_sectors);
        }
        survey.open_part(start, range.end(), range);
        if let [
            Open {
                range,
                failed: true,
            },
        ] = survey.open[..]
            && range.count <= block_sectors
        {
            survey.open.clear();
            let errno = None;
            survey.unreadable.push(Unreadable { range, errno });
        }
        survey
    }

    fn open_part(&mut self, start: u64, end: u64, whole: SectorRange) {
        if start < end {
            let range = SectorRange::new(start, end - start);
            let failed = range == whole;
            self.open.push(Open { range, failed });
        }
    }

    /// The next parts to read, of those that overlap `wanted`, which is in order. Empty: nothing is
    /// left to find out there. [`Self::ended`] must follow for each.
    pub(super) fn next_parts(&mut self, wanted: &[SectorRange], order: Order) -> Vec<SectorRange> {
        let overlaps = |(index, open): (usize, &Open)| {
            let part = overlap(open.range, wanted, self.block_sectors)?;
            Some((index, part))
        };
        let mut candidates = self.open.iter().enumerate().filter_map(overlaps);
        let chosen = match order {
            Order::Lowest => candidates.next(),
            Order::Largest => candidates.reduce(|best, next| {
                if next.1.count > best.1.count {
                    next
                } else {
                    best
                }
            }),
        };
        let Some((index, part)) = chosen else {
            return Vec::new();
        };
        let Open { range, failed } = self.open.remove(index);
        let before = SectorRange::new(range.start, part.start - range.start);
        let after = SectorRange::new(part.end(), range.end() - part.end());
        let rest = [before, after].map(|range| Open {
            range,
            failed: false,
        });
        let rest = rest.into_iter().filter(|open| open.range.count > 0);
        self.open.splice(index..index, rest);
        let parts = if failed && part == range {
            cut(part, self.block_sectors)
        } else {
            vec![part]
        };
        self.reading.extend(&parts);
        parts
    }

    /// A part has been read, or not.
    pub(super) fn ended(&mut self, part: SectorRange, result: Result<(), Errno>) {
        let index = self.reading.iter().position(|reading| *reading == part);
        self.reading.swap_remove(index.expect("a part ends once"));
        match result {
            Ok(()) => {
                self.succeeded += 1;
                let at = self.readable.partition_point(|run| run.start < part.start);
                self.readable.insert(at, part);
            }
            Err(errno) => {
                self.failed += 1;
                if part.count > self.block_sectors {
                    let at = self
                        .open
                        .partition_point(|open| open.range.start < part.start);
                    let open = Open {
                        range: part,
                        failed: true,
                    };
                    self.open.insert(at, open);
                } else {
                    self.mark_unreadable(part, errno);
                }
            }
        }
    }

    /// Gives up if so much has failed, measured by what has succeeded, that the rest is not worth
    /// its reads: what could not be read as a whole counts as unreadable, with `errno`.
    pub(super) fn give_up_if_hopeless(&mut self, errno: Errno) {
        if self.failed < self.failed_max + FAILURES_PER_SUCCESS * self.succeeded {
            return;
        }
        let failed: Vec<Open> = self.open.extract_if(.., |open| open.failed).collect();
        self.has_given_up |= !failed.is_empty();
        for open in failed {
            self.mark_unreadable(open.range, errno);
        }
    }

    /// Reads nothing more: the replica is out of service.
    pub(super) fn close(&mut self) {
        self.open.clear();
        self.reading.clear();
        self.is_closed = true;
    }

    fn mark_unreadable(&mut self, range: SectorRange, errno: Errno) {
        let at = self
            .unreadable
            .partition_point(|run| run.range.start < range.start);
        let errno = Some(errno);
        self.unreadable.insert(at, Unreadable { range, errno });
    }

    /// How many parts could not be read.
    pub(super) fn failed(&self) -> u64 {
        self.failed
    }

    /// Whether it has given up on parts that could not be read.
    pub(super) fn has_given_up(&self) -> bool {
        self.has_given_up
    }

    /// Whether it has found nothing for a long time.
    pub(super) fn was_in_vain(&self) -> bool {
        self.has_given_up || (self.succeeded == 0 && self.failed > FAILED_PARTS_MAX)
    }

    /// Whether it is known of each block that matters whether it can be read.
    pub(super) fn is_complete(&self) -> bool {
        self.open.is_empty() && self.reading.is_empty() && !self.is_closed
    }

    /// The parts of `range` that have not been read, in order.
    pub(super) fn not_read(&self, range: SectorRange) -> Vec<SectorRange> {
        complement(range, &self.readable)
    }

    /// The parts of `range`, in order, that have not been read and will not be.
    pub(super) fn unavailable(&self, range: SectorRange) -> Vec<SectorRange> {
        let open = self.open.iter().map(|open| open.range);
        let mut available: Vec<SectorRange> = open.chain(self.reading.iter().copied()).collect();
        available.extend(&self.readable);
        available.sort_unstable_by_key(|run| run.start);
        complement(range, &available)
    }

    /// The blocks that cannot be read, in order, those that meet joined.
    pub(super) fn unreadable(&self) -> Vec<Unreadable> {
        let mut runs: Vec<Unreadable> = Vec::new();
        for next in &self.unreadable {
            match runs.last_mut() {
                Some(last) if last.range.end() == next.range.start => {
                    last.range.count += next.range.count;
                }
                _ => runs.push(*next),
            }
        }
        runs
    }
}

/// The parts of `range` between `runs`, which are in order and disjoint.
fn complement(range: SectorRange, runs: &[SectorRange]) -> Vec<SectorRange> {
    let mut start = range.start;
    let mut between = Vec::new();
    let end = SectorRange::new(range.end(), 0);
    for run in runs.iter().chain([&end]) {
        if start < run.start {
            between.push(SectorRange::new(start, run.start - start));
        }
        start = run.end();
    }
    between
}

/// The blocks of `range`, which is whole blocks, from the first to the last that overlaps `wanted`.
fn overlap(range: SectorRange, wanted: &[SectorRange], block_sectors: u64) -> Option<SectorRange> {
    let mut overlapping = wanted.iter().filter(|run| run.overlaps(range));
    let first = overlapping.next()?;
    let last = overlapping.next_back().unwrap_or(first);
    let start = first.start - first.start % block_sectors;
    let start = start.max(range.start);
    let end = last.end().next_multiple_of(block_sectors).min(range.end());
    Some(SectorRange::new(start, end - start))
}

/// Cuts `range` into [`PARTS`] parts of whole blocks, or into as many as it has blocks.
fn cut(range: SectorRange, block_sectors: u64) -> Vec<SectorRange> {
    let blocks = range.count.div_ceil(block_sectors);
    let step = blocks.div_ceil(PARTS) * block_sectors;
    let starts = (range.start..range.end()).step_by(usize::try_from(step).expect("a fragment"));
    let part = |start| SectorRange::new(start, step.min(range.end() - start));
    starts.map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::FAILED_PARTS_JOB_MAX;
    use proptest::prelude::*;

    const EIO: Errno = Errno(5);
    const REPLICA: ReplicaIndex = ReplicaIndex(1);

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(start, count)
    }

    /// Reads parts until nothing is left to find out; `bad` sectors cannot be read. Returns the
    /// number of reads, and that of rounds.
    fn run(survey: &mut Survey, wanted: &[SectorRange], order: Order, bad: &[u64]) -> (u64, u64) {
        let (mut reads, mut rounds) = (0, 0);
        loop {
            let parts = survey.next_parts(wanted, order);
            if parts.is_empty() {
                return (reads, rounds);
            }
            rounds += 1;
            for part in parts {
                reads += 1;
                let fails = bad.iter().any(|bad| part.overlaps(range(*bad, 1)));
                survey.ended(part, if fails { Err(EIO) } else { Ok(()) });
            }
        }
    }

    fn unreadable(survey: &Survey) -> Vec<SectorRange> {
        survey.unreadable().iter().map(|run| run.range).collect()
    }

    #[test]
    fn one_unreadable_block_is_found_with_few_reads() {
        let whole = range(2048, 2048);
        let mut survey = Survey::new(REPLICA, whole, 8, &[], FAILED_PARTS_MAX);
        let cost = run(&mut survey, &[whole], Order::Lowest, &[3001]);
        assert_eq!(cost, (16, 4));
        assert_eq!(unreadable(&survey), [range(3000, 8)]);
        assert_eq!(survey.not_read(whole), [range(3000, 8)]);
    }

    #[test]
    fn only_what_is_wanted_is_read() {
        let whole = range(0, 256);
        let mut survey = Survey::new(REPLICA, whole, 8, &[], FAILED_PARTS_MAX);
        let cost = run(&mut survey, &[range(17, 2)], Order::Lowest, &[40]);
        assert_eq!(cost, (1, 1));
        assert_eq!(survey.readable, [range(16, 8)]);
        // The rest is found out from where that has left off.
        run(&mut survey, &[whole], Order::Largest, &[40]);
        assert_eq!(unreadable(&survey), [range(40, 8)]);
    }

    #[test]
    fn a_single_block_is_not_read_again() {
        let survey = Survey::new(REPLICA, range(8, 8), 8, &[], FAILED_PARTS_MAX);
        assert_eq!(unreadable(&survey), [range(8, 8)]);
        assert_eq!(survey.unreadable()[0].errno, None, "its error was reported");
    }

    #[test]
    fn where_the_copy_does_not_matter_nothing_is_read() {
        let whole = range(0, 64);
        let closed = [range(0, 24), range(28, 8), range(60, 4)];
        let mut survey = Survey::new(REPLICA, whole, 8, &closed, FAILED_PARTS_MAX);
        assert_eq!(survey.unavailable(whole), [range(0, 24)]);
        run(&mut survey, &[whole], Order::Lowest, &[3, 30, 50]);
        assert_eq!(unreadable(&survey), [range(24, 8), range(48, 8)]);
        let survey = Survey::new(REPLICA, whole, 8, &[whole], FAILED_PARTS_MAX);
        assert!(survey.open.is_empty());
    }

    #[test]
    fn a_replica_that_fails_everywhere_is_given_up() {
        let whole = range(0, 2048);
        let mut survey = Survey::new(REPLICA, whole, 1, &[], FAILED_PARTS_MAX);
        let mut reads = 0;
        loop {
            let parts = survey.next_parts(&[whole], Order::Largest);
            if parts.is_empty() {
                break;
            }
            for part in parts {
                reads += 1;
                survey.ended(part, Err(EIO));
            }
            survey.give_up_if_hopeless(EIO);
        }
        assert!(reads <= FAILED_PARTS_MAX + PARTS, "{reads}");
        assert_eq!(unreadable(&survey), [whole]);
        assert!(survey.has_given_up() && survey.is_complete());
    }

    #[test]
    fn one_unreadable_block_in_each_16_kib_is_no_reason_for_a_job_to_give_up() {
        let whole = range(0, 2048);
        let bad: Vec<u64> = (0..2048).step_by(32).map(|start| start + 11).collect();
        let mut survey = Survey::new(REPLICA, whole, 8, &[], FAILED_PARTS_JOB_MAX);
        loop {
            let parts = survey.next_parts(&[whole], Order::Largest);
            if parts.is_empty() {
                break;
            }
            for part in parts {
                let fails = bad.iter().any(|bad| part.overlaps(range(*bad, 1)));
                survey.ended(part, if fails { Err(EIO) } else { Ok(()) });
                survey.give_up_if_hopeless(EIO);
            }
        }
        assert!(!survey.has_given_up());
        let blocks: Vec<_> = bad.iter().map(|bad| range(bad - bad % 8, 8)).collect();
        assert_eq!(unreadable(&survey), blocks);
    }

    proptest! {
        /// Whatever is unreadable, closed or wanted: every block that is wanted ends up on the
        /// right side, and no block is on both.
        #[test]
        fn every_block_is_found(
            block in prop::sample::select(vec![1_u64, 4]),
            bad in prop::collection::vec(0_u64..64, 0..12),
            wanted in (0_u64..64, 1_u64..64),
            largest in any::<bool>(),
        ) {
            let whole = range(0, 64);
            let order = if largest { Order::Largest } else { Order::Lowest };
            let wanted = range(wanted.0, wanted.1.min(64 - wanted.0));
            let mut survey = Survey::new(REPLICA, whole, block, &[], FAILED_PARTS_MAX);
            let (reads, _) = run(&mut survey, &[wanted], order, &bad);
            prop_assert!(reads <= 2 * 64 / block);
            for start in (0..64).step_by(usize::try_from(block).unwrap()) {
                let this = range(start, block);
                let fails = bad.iter().any(|bad| this.overlaps(range(*bad, 1)));
                let is_bad = unreadable(&survey).iter().any(|run| run.overlaps(this));
                let is_good = survey.readable.iter().any(|run| run.overlaps(this));
                let on_wrong_side = if fails { is_good } else { is_bad };
                prop_assert!(!on_wrong_side);
                prop_assert!(!this.overlaps(wanted) || is_bad || is_good);
            }
        }
    }
}
