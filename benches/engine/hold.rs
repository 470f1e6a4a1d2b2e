//! How long the mutex of all workers is held when much is stale: the instructions of what is done
//! under it.
//!
//! One replica is stale in many ranges. Each case is one use of the mutex that changes, copies or
//! looks at sets of ranges; none may take more than [`HELD_MAX`] instructions, so that it takes
//! 100 µs at most. What is prepared without the mutex is prepared before; then another write ends.

use quorum_blk::common::{ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::quorum::health::{Beginning, Health, Prepared, WriteEnd};

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

const CASES: [Case; 10] = [
    ("a write ends", |disk| disk.write(false)),
    ("a flush begins and ends", Disk::flush_a_copy),
    ("a flush after a failed one", Disk::begin_flush_after_resync),
    ("a copy to decide on", |disk| {
        std::mem::forget(disk.health.snapshot());
    }),
    ("an eviction, a rejoin", Disk::evict_and_rejoin),
    ("a failed flush", Disk::fail_flush),
    ("one of 15,000 writes fails", Disk::fail_flush_of_many),
    ("one of 15,000 copies fails", Disk::fail_flush_of_copies),
    ("an eviction after as many", Disk::evict_with_many),
    ("a flush that decides much", Disk::decide_much),
];

struct Disk {
    health: Health,
    /// The same with many writes since the last flush.
    unflushed: Health,
    /// Then the flush begins.
    flushing: Health,
    /// Half of what is stale is resynced meanwhile, and the flush comes back from all replicas.
    flushed: Health,
    /// All that is stale was resynced twice: before a flush that failed, and after it.
    resynced: Health,
    /// All replicas have lost what was written, perhaps, and hold copies of what a vote has found.
    copied: Health,
    beginning: Vec<Beginning>,
    eviction: Prepared,
    failure: Prepared,
    failure_of_copies: Prepared,
    settlement: Vec<Prepared>,
    blocks_bits: u32,
    written: u64,
}

impl Disk {
    fn new(bits: u32) -> Self {
        let new = || Health::new(ReplicaSet::first(3), 2, 1, 1 << bits);
        let mut disk = Self {
            eviction: new().loss(STALE),
            failure: new().loss(STALE),
            failure_of_copies: new().loss(STALE),
            settlement: Vec::new(),
            health: new(),
            unflushed: new(),
            flushing: new(),
            flushed: new(),
            resynced: new(),
            copied: new(),
            beginning: Vec::new(),
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
        disk.eviction = disk.unflushed.loss(STALE);
        disk.flushing = disk.unflushed.snapshot();
        let epoch = disk.flushing.flush_begins();
        disk.failure = disk.flushing.loss(STALE);
        disk.flushed = disk.flushing.snapshot();
        for number in 1..=RANGES / 2 {
            let began = disk.flushed.failure_epoch();
            let range = range(number, disk.blocks_bits);
            disk.flushed.repaired(STALE, range, began, false);
        }
        for replica in disk.flushed.in_service().iter() {
            disk.flushed.flush_ended(epoch, replica, true);
        }
        disk.settlement = disk.flushed.settlement();
        disk.resynced = disk.health.snapshot();
        for fails in [true, false] {
            for number in 1..=RANGES {
                let began = disk.resynced.failure_epoch();
                // Half of them are at other places.
                let number = number + if fails { 0 } else { RANGES / 2 };
                let range = range(number, disk.blocks_bits);
                disk.resynced.repaired(STALE, range, began, true);
            }
            if fails {
                let epoch = disk.resynced.flush_begins();
                for replica in disk.resynced.in_service().iter() {
                    disk.resynced.flush_ended(epoch, replica, replica != STALE);
                }
            }
        }
        disk.beginning = disk.resynced.beginning();
        disk.copy_everywhere();
        disk.flush();
        disk
    }

    /// A write all over the disk.
    fn write(&mut self, fails: bool) {
        self.written += 1;
        write(
            &mut self.health,
            range(self.written, self.blocks_bits),
            fails,
        );
    }

    /// A write all over a copy.
    fn write_to(&mut self, copy: &mut Health) {
        self.written += 1;
        write(copy, range(self.written, self.blocks_bits), false);
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
        let mut loss = snapshot.loss(STALE);
        self.write(false);
        let evicted = self.health.evict_as_on(&snapshot, &mut loss);
        assert_eq!(evicted, Some(true));
        assert!(self.health.rejoin(STALE, 0));
        std::mem::forget((snapshot, loss));
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

impl Disk {
    fn fail_flush_of_many(&mut self) {
        let mut copy = self.flushing.snapshot();
        let mut loss = self.failure.clone();
        self.write_to(&mut copy);
        assert!(copy.flush_failed(&mut loss, false));
        std::mem::forget((copy, loss));
    }

    /// Makes [`Self::copied`].
    fn copy_everywhere(&mut self) {
        let (disk, bits) = (&mut self.copied, self.blocks_bits);
        for number in 1..=RANGES {
            write(disk, range(number, bits), false);
        }
        let epoch = disk.flush_begins();
        for replica in disk.in_service().iter() {
            disk.flush_ended(epoch, replica, false);
        }
        for number in 1..=RANGES {
            let began = disk.failure_epoch();
            for replica in disk.in_service().iter() {
                disk.repaired(replica, range(number, bits), began, false);
            }
        }
        disk.flush_begins();
        self.failure_of_copies = disk.loss(STALE);
    }

    fn fail_flush_of_copies(&mut self) {
        let mut copy = self.copied.snapshot();
        let mut loss = self.failure_of_copies.clone();
        self.write_to(&mut copy);
        assert!(copy.flush_failed(&mut loss, false));
        std::mem::forget((copy, loss));
    }

    fn begin_flush_after_resync(&mut self) {
        let mut copy = self.resynced.snapshot();
        let mut beginning = self.beginning.clone();
        self.write_to(&mut copy);
        copy.flush_begins_as_on(&mut beginning);
        std::mem::forget((copy, beginning));
    }

    fn evict_with_many(&mut self) {
        let mut copy = self.unflushed.snapshot();
        let mut loss = self.eviction.clone();
        self.write_to(&mut copy);
        let evicted = copy.evict_as_on(&self.unflushed, &mut loss);
        assert_eq!(evicted, Some(true));
        std::mem::forget((copy, loss));
    }

    fn decide_much(&mut self) {
        let mut copy = self.flushed.snapshot();
        let mut settlement = self.settlement.clone();
        self.write_to(&mut copy);
        let (epoch, all) = (copy.last_flush(), copy.in_service());
        assert!(copy.flush_decided(epoch, all, true, &mut settlement));
        std::mem::forget((copy, settlement));
    }
}

/// Where the write of this number goes.
fn range(number: u64, blocks_bits: u32) -> SectorRange {
    // Steps of the golden ratio are evenly spread.
    let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let block = place >> (u64::BITS - blocks_bits);
    SectorRange::new(block * BLOCK_SECTORS, BLOCK_SECTORS)
}

fn write(health: &mut Health, range: SectorRange, fails: bool) {
    let asked = health.in_service();
    let mut succeeded = asked;
    if fails {
        succeeded.remove(STALE);
    }
    let begun = health.write_begins(range);
    health.write_ended(&WriteEnd {
        asked,
        succeeded,
        begun,
        success: true,
    });
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
