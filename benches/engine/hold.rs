//! How long the mutex of all workers is held when much is stale: the instructions of what is done
//! under it.
//!
//! One replica is stale in many ranges. Each case is one use of the mutex that changes, copies or
//! looks at sets of ranges; none may take more than [`HELD_MAX`] instructions, so that it takes
//! 100 µs at most.

use quorum_blk::common::{ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::quorum::health::{Health, WriteEnd};

use super::count;

/// Ranges in which a replica is stale, or that were written since the last flush.
const RANGES: u64 = 15_000;

/// Instructions of one use of the mutex.
const HELD_MAX: f64 = 100_000.0;

const BLOCK_SECTORS: u64 = 8;
const STALE: ReplicaIndex = ReplicaIndex(2);
const DISKS: [(u32, &str); 2] = [(24, "8 GiB"), (31, "1 TiB")];
const SHORT: u64 = 4;
const LONG: u64 = 24;

/// A name, and what is done under the mutex.
type Case = (&'static str, fn(&mut Disk));

const CASES: [Case; 5] = [
    ("a write ends", |disk| disk.write(false)),
    ("a flush begins and ends", Disk::flush_a_copy),
    ("a copy to decide on", |disk| {
        std::mem::forget(disk.health.snapshot());
    }),
    ("an eviction, a rejoin", Disk::evict_and_rejoin),
    ("a failed flush", Disk::fail_flush),
];

struct Disk {
    health: Health,
    /// The same with many writes since the last flush.
    unflushed: Health,
    blocks_bits: u32,
    written: u64,
}

impl Disk {
    fn new(bits: u32) -> Self {
        let new = || Health::new(ReplicaSet::first(3), 2, 1, 1 << bits);
        let mut disk = Self {
            health: new(),
            unflushed: new(),
            blocks_bits: bits - BLOCK_SECTORS.ilog2(),
            written: 0,
        };
        for _ in 0..RANGES {
            disk.write(true);
        }
        disk.flush();
        for _ in 0..RANGES {
            disk.write(false);
        }
        disk.unflushed = disk.health.snapshot();
        disk.flush();
        disk
    }

    /// A write all over the disk.
    fn write(&mut self, fails: bool) {
        self.written += 1;
        // Steps of the golden ratio are evenly spread.
        let place = self.written.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let block = place >> (u64::BITS - self.blocks_bits);
        let range = SectorRange::new(block * BLOCK_SECTORS, BLOCK_SECTORS);
        let asked = self.health.in_service();
        let mut succeeded = asked;
        if fails {
            succeeded.remove(STALE);
        }
        let begun = self.health.write_begins(range);
        self.health.write_ended(&WriteEnd {
            asked,
            succeeded,
            begun,
            success: true,
        });
    }

    fn flush(&mut self) {
        flush(&mut self.health);
    }

    /// On a copy, so that each time as many writes are flushed.
    fn flush_a_copy(&mut self) {
        let mut copy = self.unflushed.snapshot();
        flush(&mut copy);
        std::mem::forget(copy);
    }

    fn evict_and_rejoin(&mut self) {
        let snapshot = self.health.snapshot();
        self.write(false);
        assert_eq!(self.health.evict_as_on(&snapshot, STALE), Some(true));
        assert!(self.health.rejoin(STALE, 0));
        std::mem::forget(snapshot);
        std::mem::forget(self.health.take_garbage());
    }

    fn fail_flush(&mut self) {
        self.write(false);
        let epoch = self.health.flush_begins();
        for replica in self.health.in_service().iter() {
            self.health.flush_ended(epoch, replica, replica != STALE);
        }
        std::mem::forget(self.health.take_garbage());
    }
}

fn flush(health: &mut Health) {
    let epoch = health.flush_begins();
    for replica in health.in_service().iter() {
        health.flush_ended(epoch, replica, true);
    }
    std::mem::forget(health.durability());
    // They are freed without the mutex.
    std::mem::forget(health.take_garbage());
}

/// Runs a case. Callgrind counts this run.
pub(crate) fn run_named(name: &str, times: u64) {
    let cases = CASES.iter().flat_map(|case| DISKS.map(|disk| (case, disk)));
    let found = cases
        .into_iter()
        .find(|((case, _), (_, label))| self::name(case, label) == name);
    let ((_, run), (bits, _)) = found.unwrap_or_else(|| panic!("no load is called {name}"));
    let mut disk = Disk::new(bits);
    for _ in 0..times {
        run(&mut disk);
    }
    std::mem::forget(disk);
}

/// Counts and prints the cases. Returns whether none takes too long.
pub(crate) fn check() -> Result<bool, String> {
    let mut all_hold = true;
    println!("\ninstructions under the mutex    8 GiB    1 TiB  (at most {HELD_MAX})");
    for (case, _) in CASES {
        let figures = DISKS
            .map(|(_, label)| count::per_unit(&name(case, label), SHORT, LONG))
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?;
        let holds = figures.iter().all(|figure| *figure <= HELD_MAX);
        let columns = figures.iter().map(|figure| format!("{figure:>9.0}"));
        let verdict = if holds { "" } else { "  BROKEN" };
        println!("{case:28}{}{verdict}", columns.collect::<String>());
        all_hold &= holds;
    }
    Ok(all_hold)
}

fn name(case: &str, label: &str) -> String {
    format!("held: {case}, {label}").replace(' ', "-")
}
