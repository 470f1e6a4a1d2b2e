//! The requests of a load, from a seeded generator: the same for every system.

use super::plan::{Access, IMAGE_BYTES, Row};
use testkit::images::Random;

/// Bytes of write data that are made unique.
const BLOCK_BYTES: usize = 4096;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To make durable what was written.
    Flush,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What it asks for.
    pub kind: Kind,
    /// Where on the disk.
    pub offset: u64,
}

/// The requests of one queue.
///
/// No two requests in flight touch the same bytes: this measures speed, and replicas that a system
/// lets diverge when writes race would make later reads slower.
pub struct Requests {
    random: Random,
    access: Access,
    len: u64,
    /// The first slot of this queue, and how many all queues have.
    slots: (u64, u64),
    /// Sequential requests: the first block of this queue's part, how many it has, and the next.
    part: (u64, u64),
    next: u64,
    /// Slots that have written and not flushed.
    owes_flush: Vec<bool>,
}

impl Requests {
    /// Those of queue `queue` of `row`; another `seed`, other offsets.
    pub fn new(row: &Row, queue: usize, seed: u64) -> Self {
        let [queue, queues, depth, len] =
            [queue, row.queues, row.pattern.depth, row.pattern.len].map(|number| number as u64);
        let blocks = IMAGE_BYTES / len / queues;
        Self {
            random: Random::from_seed((seed << 8) + queue),
            access: row.pattern.access,
            len,
            slots: (queue * depth, queues * depth),
            part: (queue * blocks, blocks),
            next: 0,
            owes_flush: vec![false; row.pattern.depth],
        }
    }

    /// The next request of a slot, whose last one has completed.
    pub fn next(&mut self, slot: usize) -> Request {
        let kind = match self.access {
            Access::SequentialReads => Kind::Read,
            Access::SequentialWrites => Kind::Write,
            Access::Random { reads_percent } if self.random.within(0..100) < reads_percent => {
                Kind::Read
            }
            Access::Random { .. } => Kind::Write,
            Access::WriteAndFlush => {
                self.owes_flush[slot] = !self.owes_flush[slot];
                if self.owes_flush[slot] {
                    Kind::Write
                } else {
                    Kind::Flush
                }
            }
        };
        let block = match self.access {
            Access::SequentialReads | Access::SequentialWrites => {
                let (first, count) = self.part;
                self.next += 1;
                first + (self.next - 1) % count
            }
            Access::Random { .. } | Access::WriteAndFlush => {
                // Each slot has blocks of its own, spread over the whole disk.
                let (first, all) = self.slots;
                let blocks = IMAGE_BYTES / self.len;
                self.random.within(0..blocks / all) * all + first + slot as u64
            }
        };
        Request {
            kind,
            offset: block * self.len,
        }
    }

    /// Has a slot done what counts as a request, now that its last one has completed?
    pub fn is_whole(&self, slot: usize) -> bool {
        !self.owes_flush[slot]
    }
}

/// Makes data to be written: random to begin with, and every block unlike all others whenever it is
/// written.
pub struct WriteData(Random);

impl WriteData {
    /// The same data in every run.
    pub fn new() -> Self {
        Self(Random::from_seed(0x7772_6974_6564))
    }

    /// Fills `memory`.
    pub fn fill(&mut self, memory: &mut [u8]) {
        for word in memory.chunks_exact_mut(8) {
            word.copy_from_slice(&self.0.number().to_le_bytes());
        }
    }

    /// Makes `memory`, which was filled, new before it is written once more.
    pub fn renew(&mut self, memory: &mut [u8]) {
        for block in memory.chunks_mut(BLOCK_BYTES) {
            block[..8].copy_from_slice(&self.0.number().to_le_bytes());
        }
    }
}
