//! What a seed chooses before its run: the disk, the guest, and which faults there are and how
//! often.
//!
//! Each seed enables a random subset of the faults ("swarm testing"): a run in which everything
//! happens all the time hides what needs a long quiet time, or two rare events and no other.

use std::time::Duration;

use super::random::Random;
use crate::common::SectorRange;
use crate::device::hold::{ErrorPolicy, OnError};
use crate::engine::ReadPattern;
use crate::jobs::{HoleSizes, Sizes};

/// Sectors of a simulated disk, at most: a set of sectors is a mask of 64 bits.
pub const SECTORS_MAX: u64 = 64;

/// Replicas of a simulated disk in the beginning, at most.
pub const REPLICAS_MAX: usize = 5;

/// Places for replicas: those in the beginning, and some that are added.
pub const PLACES: usize = 8;

/// How likely each fault is, in 65536ths of the occasions for it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// A read fails.
    pub read_error: u32,
    /// A write fails, and may have written any of its sectors.
    pub write_error: u32,
    /// A flush fails, and the pages it did not write are clean but not durable.
    pub flush_error: u32,
    /// Writeback in the background fails in the same way; the next flush that ends reports
    /// it.
    pub writeback_error: u32,
    /// For some time, writes and flushes fail on all replicas that may fail: their file system is
    /// full.
    pub full: u32,
    /// A sector at rest changes.
    pub rot: u32,
    /// Blocks cannot be read any more until they are written; some cannot be written either.
    pub unreadable: u32,
    /// A write succeeds without effect.
    pub lost: u32,
    /// A write lands on other sectors.
    pub misdirected: u32,
    /// A flush succeeds without effect.
    pub lying_flush: u32,
    /// The host crashes and starts again.
    pub crash: u32,
    /// A replica does nothing for some time, and may then fail what it was asked.
    pub hang: u32,
}

/// How slow operations are by themselves, whatever else happens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slowness {
    /// How long a flush takes, in hundredths of the replica timeout: half of it to all of it.
    pub flush: u32,
    /// The same of every other operation.
    pub other: u32,
    /// One replica after another is slow, not all together.
    pub in_turn: bool,
    /// The replicas that hang for a little longer than the timeout again and again, a mask.
    pub flapping: u32,
}

/// The write cache that the guest sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteCache {
    /// A write is durable after the next flush.
    On,
    /// The guest has no flush: a write is durable when it is answered.
    Off,
    /// The guest switches it on and off.
    Switched,
}

/// Everything a seed fixes before the first step.
#[derive(Clone, Debug)]
pub struct Plan {
    /// N.
    pub replicas: usize,
    /// t.
    pub threshold: usize,
    /// t was not given: it follows the number of replicas.
    pub follows: bool,
    /// Which replicas a read asks.
    pub read_pattern: ReadPattern,
    /// Whether the engine repairs the losers of a vote.
    pub rewrite_corrupted: bool,
    /// The replicas are compared before anything is repaired unasked.
    pub compares_first: bool,
    /// How many sectors it repairs unasked.
    pub repair_limit_sectors: u64,
    /// Engines that share the disk, as worker threads do.
    pub workers: usize,
    /// Requests in flight on one worker, at most.
    pub depth: usize,
    /// Sectors of the disk.
    pub sectors: u64,
    /// The block size, in sectors.
    pub block_sectors: u64,
    /// Blocks of one request, at most.
    pub blocks_max: u64,
    /// Requests that the guest makes.
    pub requests: u64,
    /// Of 100 requests, how many are reads, flushes, discards and write-zeroes; the rest are
    /// writes.
    pub reads: u64,
    /// See `reads`.
    pub flushes: u64,
    /// See `reads`.
    pub zeroes: u64,
    /// When a write must be durable.
    pub write_cache: WriteCache,
    /// The chances that the guest makes a request, against one for each operation in flight.
    pub eagerness: usize,
    /// An operation is applied sector by sector, in 65536ths of the occasions.
    pub tear: u32,
    /// A reply is delivered late, in 65536ths of the replies.
    pub late: u32,
    /// A dirty sector is written back in the background, in 65536ths of the steps.
    pub writeback: u32,
    /// The guest waits until all is quiet, in 65536ths of the requests.
    pub pause: u32,
    /// The replicas on which faults happen, a mask.
    pub faulty: u32,
    /// The replicas that are slow, a mask.
    pub slow: u32,
    /// The replicas that stop to answer at some time, until the end.
    pub dead: u32,
    /// How long operations take.
    pub slowness: Slowness,
    /// Time that passes in a step, on average.
    pub step: Duration,
    /// A replica that has not answered for this long is evicted.
    pub replica_timeout: Duration,
    /// How likely each fault is.
    pub faults: Faults,
    /// The operator acts, in 65536ths of the steps.
    pub operator: u32,
    /// Actions of the operator, at most.
    pub operator_actions: u32,
    /// How much jobs do at a time.
    pub job_sizes: Sizes,
    /// Runs of data in an answer to a question for holes.
    pub runs_per_answer: usize,
    /// What happens to requests that fail.
    pub on_error: ErrorPolicy,
    /// An input overlaps with one of another worker, in 65536ths of the inputs.
    pub overlap: u32,
    /// The replicas have records.
    pub records: bool,
    /// Old copies of images are put back before a start.
    pub old_copies: bool,
    /// Starts are forced.
    pub forces: bool,
    /// Sectors of an extent of the records.
    pub extent_sectors: u64,
}

const PATTERNS: [ReadPattern; 6] = [
    ReadPattern::Quorum,
    ReadPattern::Quorum,
    ReadPattern::Quorum,
    ReadPattern::Threshold,
    ReadPattern::Threshold,
    ReadPattern::Fifo,
];

const WRITE_CACHES: [WriteCache; 3] = [WriteCache::On, WriteCache::Off, WriteCache::Switched];
const RARE: u32 = 65536 / 300;
const OFTEN: u32 = 65536 / 30;
const HALF: u32 = 65536 / 2;

impl Plan {
    /// The plan of a seed.
    pub fn new(random: &mut Random) -> Self {
        let replicas = random.pick(&[1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5, 5]);
        let majority = replicas / 2 + 1;
        let threshold = if random.chance(HALF + HALF / 4) {
            majority
        } else {
            1 + random.index(replicas)
        };
        let read_pattern = random.pick(&PATTERNS);
        let block_sectors = random.pick(&[1, 1, 1, 1, 1, 2, 4]);
        let sectors = block_sectors * (1 + random.below(16.min(SECTORS_MAX / block_sectors)));
        let write_cache = random.pick(&WRITE_CACHES);
        let mut plan = Self {
            replicas,
            threshold,
            follows: false,
            read_pattern,
            rewrite_corrupted: random.below(3) > 0,
            compares_first: false,
            repair_limit_sectors: u64::MAX,
            workers: random.pick(&[1, 2, 2, 3]),
            depth: 1 + random.index(5),
            sectors,
            block_sectors,
            blocks_max: random.pick(&[1, 2, 2, 4, 8]).min(sectors / block_sectors),
            requests: random.pick(&[8, 15, 15, 25, 50]),
            reads: random.pick(&[20, 40, 40, 60, 80]),
            flushes: if write_cache == WriteCache::Off {
                0
            } else {
                random.pick(&[0, 5, 5, 15])
            },
            zeroes: random.pick(&[0, 0, 5, 20]),
            write_cache,
            eagerness: random.pick(&[1, 3, 10]),
            tear: random.pick(&[0, HALF, HALF + HALF / 2]),
            late: random.pick(&[0, RARE * 8, HALF / 2]),
            writeback: random.pick(&[0, RARE * 2, OFTEN * 6]),
            pause: random.pick(&[0, OFTEN, OFTEN * 4]),
            faulty: 0,
            slow: random.pick(&[0, 0, 1, 2, 3]),
            dead: 0,
            slowness: Slowness::default(),
            step: Duration::from_micros(random.pick(&[1, 30, 300])),
            replica_timeout: Duration::from_millis(random.pick(&[5, 20, 100])),
            faults: Faults::default(),
            operator: random.pick(&[0, 0, RARE * 2, OFTEN * 2]),
            operator_actions: 30,
            runs_per_answer: 1,
            job_sizes: Sizes {
                chunk_sectors: block_sectors * random.pick(&[1, 3, 64]),
                neighbourhood_sectors: random.pick(&[0, 0, 2, 64]),
                holes: HoleSizes::default(),
            },
            on_error: ErrorPolicy::default(),
            overlap: 0,
            records: false,
            extent_sectors: 1,
            old_copies: false,
            forces: false,
        };
        plan.choose_faults(random);
        plan.choose_slowness(random);
        if plan.workers > 1 {
            plan.overlap = random.pick(&[0, OFTEN * 4, HALF]);
        }
        plan.choose_holes(&mut random.clone());
        plan.choose_repair_limit(&mut random.clone());
        plan.choose_on_error(&mut Random::new(random.clone().bits()));
        plan.follows = threshold == majority && random.clone().below(3) > 0;
        plan.choose_records(&mut Random::new(!random.clone().bits()));
        plan
    }

    /// Half of all disks have records. Most have several extents.
    fn choose_records(&mut self, random: &mut Random) {
        self.records = random.below(2) == 0;
        self.old_copies = random.below(2) == 0;
        self.forces = random.below(2) == 0;
        self.extent_sectors = random.pick(&[1, 1, 2, 4, 8, 64]);
    }

    /// Half of all disks report all errors.
    fn choose_on_error(&mut self, random: &mut Random) {
        if random.below(2) == 0 {
            return;
        }
        self.on_error = ErrorPolicy {
            read: random.pick(&[OnError::Report, OnError::Stop]),
            write: random.pick(&[OnError::NoSpace, OnError::Stop, OnError::Stop]),
        };
    }

    /// Half of all disks are too small for questions.
    fn choose_holes(&mut self, random: &mut Random) {
        if random.below(2) == 0 {
            return;
        }
        let block = self.block_sectors;
        self.job_sizes.holes = HoleSizes {
            asked: block * random.pick(&[1, 5, 64]),
            locked: block * random.pick(&[1, 4, 64]),
            read_min: block * random.pick(&[1, 1, 3]),
            read_max: block * random.pick(&[4, 16]),
        };
        self.runs_per_answer = random.pick(&[1, 2, 64]);
    }

    /// One disk in three has a limit that is soon reached.
    fn choose_repair_limit(&mut self, random: &mut Random) {
        random.bits();
        if random.below(3) == 0 {
            self.repair_limit_sectors = self.block_sectors * random.pick(&[1, 2, 4, 16]);
        }
        self.compares_first = self.rewrite_corrupted && random.below(3) == 0;
    }

    /// Whether jobs ask where the replicas have holes.
    pub fn asks_for_holes(&self) -> bool {
        self.job_sizes.holes.read_min <= SECTORS_MAX
    }

    fn choose_slowness(&mut self, random: &mut Random) {
        if random.below(3) != 0 || self.dead != 0 {
            return;
        }
        self.slowness = Slowness {
            flush: random.pick(&[0, 60, 150, 400]),
            other: random.pick(&[0, 0, 20, 120, 250]),
            in_turn: random.below(3) == 0,
            flapping: 0,
        };
        if random.below(3) == 0 {
            for _ in 0..self.replicas - self.threshold {
                self.slowness.flapping |= 1 << random.index(self.replicas);
            }
        }
    }

    fn choose_faults(&mut self, random: &mut Random) {
        let faults = &mut self.faults;
        faults.crash = random.pick(&[0, 0, RARE / 2]);
        faults.hang = random.pick(&[0, 0, RARE]);
        if random.below(5) == 0 {
            for _ in 0..self.replicas - self.threshold {
                self.dead |= 1 << random.index(self.replicas);
            }
        }
        let everyone = (1 << self.replicas) - 1;
        self.faulty = match random.below(4) {
            // Only time is against the disk.
            0 => 0,
            // As many as the disk tolerates.
            1 | 2 => {
                let most = (self.replicas - self.threshold).min(self.threshold - 1);
                let mut mask = 0;
                for _ in 0..most {
                    mask |= 1 << random.index(self.replicas);
                }
                mask
            }
            _ => everyone,
        };
        if self.faulty == 0 {
            if self.dead != 0 {
                // No other replica may look dead.
                self.faults.hang = 0;
                self.slow = 0;
                self.step = self.step.min(Duration::from_micros(1));
            }
            return;
        }
        let faults = &mut self.faults;
        let mut rate = |rates: &[u32]| {
            if random.below(3) == 0 {
                random.pick(rates)
            } else {
                0
            }
        };
        let per_operation = [RARE, OFTEN, OFTEN * 4];
        let per_step = [RARE / 2, RARE * 2];
        faults.read_error = rate(&per_operation);
        faults.write_error = rate(&per_operation);
        faults.flush_error = rate(&[OFTEN, OFTEN * 4, OFTEN * 10]);
        faults.full = rate(&[RARE / 2, RARE * 2]);
        faults.rot = rate(&per_step);
        faults.unreadable = rate(&[RARE / 2, RARE * 2, RARE * 8]);
        faults.lost = rate(&per_operation);
        faults.misdirected = rate(&per_operation);
        faults.lying_flush = rate(&[OFTEN, OFTEN * 4]);
        faults.writeback_error = rate(&[RARE / 2, RARE * 2, RARE * 8]);
    }

    /// Whether the dead replicas are the only fault: then they may stay dead for good.
    pub fn only_dead_replicas(&self) -> bool {
        self.faulty == 0 && self.faults.hang == 0 && self.slow == 0
    }

    /// The range of a random request.
    pub fn range(&self, random: &mut Random) -> SectorRange {
        let blocks = self.sectors / self.block_sectors;
        let count = 1 + random.below(self.blocks_max);
        let start = random.below(blocks - count + 1);
        SectorRange::new(start * self.block_sectors, count * self.block_sectors)
    }

    /// The whole disk.
    pub fn disk(&self) -> SectorRange {
        SectorRange::new(0, self.sectors)
    }

    /// The sectors of `range` as a mask.
    pub fn mask(&self, range: SectorRange) -> u64 {
        mask_below(range.count) << range.start
    }

    /// Whether faults may happen on this replica.
    pub fn is_faulty(&self, replica: usize) -> bool {
        self.faulty & (1 << replica) != 0
    }
}

/// The blocks that contain one of these sectors, a mask of their sectors.
pub fn widen(sectors: u64, block_sectors: u64) -> u64 {
    let mut widened = 0;
    for sector in bits(sectors) {
        let start = sector as u64 - sector as u64 % block_sectors;
        widened |= mask_below(block_sectors) << start;
    }
    widened
}

/// The lowest `count` bits.
pub fn mask_below(count: u64) -> u64 {
    if count >= 64 {
        u64::MAX
    } else {
        (1 << count) - 1
    }
}

/// The sectors of these ranges as a mask.
pub fn mask_of(ranges: impl IntoIterator<Item = SectorRange>) -> u64 {
    let ranges = ranges.into_iter();
    ranges.fold(0, |mask, range| {
        mask | mask_below(range.count) << range.start
    })
}

/// The numbers of the bits that are set, lowest first.
pub fn bits(mask: u64) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let bit = rest.trailing_zeros() as usize;
        rest &= rest - 1;
        Some(bit)
    })
}
