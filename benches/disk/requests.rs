//! The requests of a load, from a seeded generator, so that every system gets the same ones.

use super::plan::{Access, Row};
use testkit::images::Random;

/// Unit in which write data is made unique, in bytes.
const BLOCK_BYTES: usize = 4096;

/// The kind of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A flush.
    Flush,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Its kind.
    pub kind: Kind,
    /// Its offset on the disk.
    pub offset: u64,
}

/// The requests of one queue.
///
/// No two requests in flight overlap. Some systems let replicas diverge when writes race, which
/// would make later reads slower; the benchmark measures speed only.
pub struct Requests {
    random: Random,
    access: Access,
    disk_bytes: u64,
    len: u64,
    /// The first slot of this queue, and the number of slots of all queues.
    slots: (u64, u64),
    /// For sequential requests: the first block of this queue's part, the number of its blocks,
    /// and the next block.
    part: (u64, u64),
    next: u64,
    /// Slots that have written and not flushed since.
    owes_flush: Vec<bool>,
}

impl Requests {
    /// The requests of queue `queue` of `row` to a disk of `disk_bytes`. The offsets depend on
    /// `seed`.
    pub fn new(row: &Row, disk_bytes: u64, queue: usize, seed: u64) -> Self {
        let [queue, queues, depth, len] =
            [queue, row.queues, row.pattern.depth, row.pattern.len].map(|number| number as u64);
        let blocks = disk_bytes / len / queues;
        Self {
            random: Random::from_seed((seed << 8) + queue),
            access: row.pattern.access,
            disk_bytes,
            len,
            slots: (queue * depth, queues * depth),
            part: (queue * blocks, blocks),
            next: 0,
            owes_flush: vec![false; row.pattern.depth],
        }
    }

    /// The next request of a slot whose last request has completed.
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
                // Each slot has its own blocks, spread over the whole disk.
                let (first, all) = self.slots;
                let blocks = self.disk_bytes / self.len;
                self.random.within(0..blocks / all) * all + first + slot as u64
            }
        };
        Request {
            kind,
            offset: block * self.len,
        }
    }

    /// Whether the last request of a slot completes what counts as one request.
    pub fn is_whole(&self, slot: usize) -> bool {
        !self.owes_flush[slot]
    }
}

/// Generates data to write: random, with a counter that makes every block unique in every write.
pub struct WriteData(Random);

impl WriteData {
    /// A generator that gives the same data in every run.
    pub fn new() -> Self {
        Self(Random::from_seed(0x7772_6974_6564))
    }

    /// Fills `memory`.
    pub fn fill(&mut self, memory: &mut [u8]) {
        for word in memory.chunks_exact_mut(8) {
            word.copy_from_slice(&self.0.number().to_le_bytes());
        }
    }

    /// Makes the blocks of `memory`, which was filled before, unique again.
    pub fn renew(&mut self, memory: &mut [u8]) {
        for block in memory.chunks_mut(BLOCK_BYTES) {
            block[..8].copy_from_slice(&self.0.number().to_le_bytes());
        }
    }
}
