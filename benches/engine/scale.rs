//! How the instructions of a request grow: linearly with the replicas, at most logarithmically with
//! the ranges in flight, and not with the size of the disk or the number of queues.
//!
//! Each table has a law, a row for each load and a column for each size. A row breaks the law if a
//! figure is off by more than the tolerance. Requests are 4 KiB long and on disjoint ranges;
//! operations are answered in the order of submission.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::Operation;
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, ReadPattern, Shared, WorkerIndex};
use quorum_blk::jobs::Sizes;

use super::count;
use super::driver::{self, Driver};

const BLOCK_SECTORS: u64 = 8;
const SHORT_REQUESTS: u64 = 5000;
const LONG_REQUESTS: u64 = 12_000;

// Defaults of a row.
const REPLICAS: usize = 3;
const DISK_SECTORS: u64 = 1 << 31;
const DEPTH: usize = 32;

/// Requests in flight in all queues together, in the table of queues.
const QUEUES_DEPTH: usize = 512;

/// Time between two requests of a queue: 250,000 requests a second.
const INTERVAL: Duration = Duration::from_micros(4);

/// Stale ranges of the replica in [`State::Stale`].
const STALE_RANGES: u64 = 16_000;

/// Writes of [`State::Unflushed`].
const UNFLUSHED_REQUESTS: u64 = 40_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

/// The history of the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// No writes and no faults.
    New,
    /// The last replica is stale in many ranges all over the disk, all written since the last
    /// flush.
    Stale,
    /// No history; the counted run is a long one of writes all over the disk, without a flush.
    Unflushed,
}

/// The offsets of requests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// All over the disk.
    Spread,
    /// Each follows the one before.
    SideBySide,
}

#[derive(Clone)]
struct Load {
    name: String,
    kind: Kind,
    state: State,
    layout: Layout,
    replicas: usize,
    disk_sectors: u64,
    /// Requests in flight in each queue.
    depth: usize,
    queues: u16,
}

impl Load {
    fn new(name: String, kind: Kind) -> Self {
        Self {
            name,
            kind,
            state: State::New,
            layout: Layout::Spread,
            replicas: REPLICAS,
            disk_sectors: DISK_SECTORS,
            depth: DEPTH,
            queues: 1,
        }
    }

    fn range(&self, number: u64) -> SectorRange {
        let blocks = self.disk_sectors / BLOCK_SECTORS;
        let block = match self.layout {
            // Steps of the golden ratio: evenly spread, and no block repeats before a third of all
            // blocks has been used.
            Layout::Spread => number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - blocks.ilog2()),
            Layout::SideBySide => number % blocks,
        };
        SectorRange::new(block * BLOCK_SECTORS, BLOCK_SECTORS)
    }
}

/// How the figures of a row may change from one column to the next.
#[derive(Clone, Copy)]
enum Law {
    /// Each added unit costs the same, within this many percent.
    Linear(f64),
    /// At most this many percent above the first column.
    Flat(f64),
    /// Each doubling adds at most this many percent of the figure in the first column.
    Logarithmic(f64),
}

struct Table {
    title: &'static str,
    law: Law,
    columns: Vec<(String, u32)>,
    rows: Vec<Row>,
}

struct Row {
    name: &'static str,
    loads: Vec<Load>,
}

fn row<C: Copy>(
    name: &'static str,
    kind: Kind,
    columns: &[(C, &str)],
    with: impl Fn(&mut Load, C),
) -> Row {
    let load = |(column, label): &(C, &str)| {
        let mut load = Load::new(format!("{name} {label}").replace(' ', "-"), kind);
        with(&mut load, *column);
        load
    };
    Row {
        name,
        loads: columns.iter().map(load).collect(),
    }
}

fn tables() -> Vec<Table> {
    vec![
        replicas(),
        disk_size(),
        disk_size_with_ranges(),
        in_flight(),
        queues(),
    ]
}

fn labels<C: Copy>(columns: &[(C, &str)], size: impl Fn(C) -> u32) -> Vec<(String, u32)> {
    let label = |(column, label): &(C, &str)| ((*label).to_owned(), size(*column));
    columns.iter().map(label).collect()
}

fn replicas() -> Table {
    let columns = [(1, "1"), (2, "2"), (4, "4"), (8, "8"), (16, "16")];
    let with = |load: &mut Load, replicas: u32| load.replicas = replicas as usize;
    Table {
        title: "replicas",
        law: Law::Linear(5.0),
        rows: vec![
            row("voted read by replicas", Kind::Read, &columns, with),
            row("write by replicas", Kind::Write, &columns, with),
        ],
        columns: labels(&columns, |replicas| replicas),
    }
}

const DISK_SIZES: [(u32, &str); 3] = [(21, "1 GiB"), (31, "1 TiB"), (35, "16 TiB")];

fn on_disk(state: State) -> impl Fn(&mut Load, u32) {
    move |load: &mut Load, bits: u32| {
        load.disk_sectors = 1 << bits;
        load.state = state;
    }
}

fn disk_size() -> Table {
    let columns = DISK_SIZES;
    Table {
        title: "disk size",
        law: Law::Flat(3.0),
        rows: vec![row("voted read", Kind::Read, &columns, on_disk(State::New))],
        columns: labels(&columns, |bits| bits),
    }
}

/// Thousands of ranges are dense on 1 GiB and become bitmaps there, which take the fewest
/// instructions. On larger disks they are lists.
fn disk_size_with_ranges() -> Table {
    let columns = DISK_SIZES;
    Table {
        title: "disk size, many ranges",
        law: Law::Flat(20.0),
        rows: vec![
            row("write", Kind::Write, &columns, on_disk(State::New)),
            row(
                "voted read, a replica stale",
                Kind::Read,
                &columns,
                on_disk(State::Stale),
            ),
            row(
                "write, a replica stale",
                Kind::Write,
                &columns,
                on_disk(State::Stale),
            ),
            row(
                "write, long without flush",
                Kind::Write,
                &columns,
                on_disk(State::Unflushed),
            ),
        ],
        columns: labels(&columns, |bits| bits),
    }
}

fn in_flight() -> Table {
    let columns = [(1, "1"), (32, "32"), (512, "512"), (2048, "2048")];
    let on = |layout: Layout| {
        move |load: &mut Load, depth: u16| {
            load.depth = depth.into();
            load.layout = layout;
        }
    };
    Table {
        title: "ranges in flight",
        law: Law::Logarithmic(5.0),
        rows: vec![
            row("write all over", Kind::Write, &columns, on(Layout::Spread)),
            row(
                "write side by side",
                Kind::Write,
                &columns,
                on(Layout::SideBySide),
            ),
            row(
                "voted read in flight",
                Kind::Read,
                &columns,
                on(Layout::Spread),
            ),
        ],
        columns: labels(&columns, u32::from),
    }
}

fn queues() -> Table {
    let columns = [(1, "1"), (4, "4"), (16, "16")];
    let with = |load: &mut Load, queues: u16| {
        load.queues = queues;
        load.depth = QUEUES_DEPTH / usize::from(queues);
    };
    Table {
        title: "queues, 512 in flight in all",
        law: Law::Flat(5.0),
        rows: vec![
            row("voted read by queues", Kind::Read, &columns, with),
            row("write by queues", Kind::Write, &columns, with),
        ],
        columns: labels(&columns, u32::from),
    }
}

/// The engines of a disk and their operations in flight.
struct Disk<'a> {
    load: &'a Load,
    pool: BufferPool,
    queues: Vec<Queue>,
    clock: TurnClock,
    submitted: u64,
}

/// A queue with a worker of its own.
struct Queue {
    engine: Engine,
    driver: Driver,
    /// Operations in flight, oldest first.
    in_flight: VecDeque<Operation>,
}

impl<'a> Disk<'a> {
    fn new(load: &'a Load) -> Self {
        let policy = Policy {
            threshold: load.replicas / 2 + 1,
            read_pattern: ReadPattern::Quorum,
            rewrite_corrupted: false,
            repair_limit_sectors: u64::MAX,
            blkverify: false,
            block_sectors: 1,
            replica_timeout: Duration::from_secs(1),
            job_sizes: Sizes::default(),
        };
        let shared = Shared::new(
            load.replicas,
            policy.threshold,
            load.queues,
            load.disk_sectors,
        );
        let (shared, pool) = (Arc::new(shared), BufferPool::default());
        let clock = TurnClock::default();
        let queue = |index| {
            let (policy, shared) = (policy.clone(), Arc::clone(&shared));
            Queue {
                engine: Engine::new(
                    WorkerIndex(index),
                    policy,
                    shared,
                    pool.clone(),
                    clock.clone(),
                ),
                driver: Driver::default(),
                in_flight: VecDeque::new(),
            }
        };
        Self {
            load,
            queues: (0..load.queues).map(queue).collect(),
            pool,
            clock,
            submitted: 0,
        }
    }

    /// Runs requests of `kind`, `depth` at a time in each queue. `failing` fails its operations.
    fn drive(&mut self, kind: Kind, requests: u64, failing: Option<ReplicaIndex>) {
        for _ in 0..requests {
            let range = self.load.range(self.submitted);
            let request = match kind {
                Kind::Read => GuestRequest::Read(range),
                Kind::Write => GuestRequest::Write {
                    range,
                    data: self
                        .pool
                        .take(usize::try_from(range.bytes()).expect("small")),
                    durable: false,
                },
            };
            let index = usize::try_from(self.submitted % u64::from(self.load.queues)).expect("few");
            let queue = &mut self.queues[index];
            self.clock
                .set(self.clock.now() + INTERVAL / u32::from(self.load.queues));
            queue.tick(self.clock.now());
            let per_request = self.load.replicas;
            while queue.in_flight.len() + per_request > self.load.depth * per_request {
                queue.answer_one(failing);
            }
            queue
                .engine
                .submit(driver::tag(self.submitted), request, &mut queue.driver);
            queue.in_flight.extend(queue.driver.operations.drain(..));
            self.submitted += 1;
        }
        for queue in &mut self.queues {
            while !queue.in_flight.is_empty() {
                queue.answer_one(failing);
            }
            assert!(queue.engine.is_idle());
        }
        let completed: u64 = self.queues.iter().map(|queue| queue.driver.completed).sum();
        assert_eq!(completed, self.submitted);
    }
}

impl Queue {
    /// Ticks the engine if it is due, as a worker does between requests.
    fn tick(&mut self, now: Duration) {
        if self
            .engine
            .deadline()
            .is_some_and(|deadline| deadline <= now)
        {
            self.engine.tick(&mut self.driver);
            self.take_operations();
        }
    }

    fn answer_one(&mut self, failing: Option<ReplicaIndex>) {
        let operation = self.in_flight.pop_front().expect("in flight");
        let failed = failing == Some(operation.replica);
        let result = if failed {
            Err(Errno(libc::EIO))
        } else {
            Ok(())
        };
        self.engine.reply(operation.reply(result), &mut self.driver);
        self.take_operations();
    }

    fn take_operations(&mut self) {
        if !self.driver.operations.is_empty() {
            self.in_flight.extend(self.driver.operations.drain(..));
        }
    }
}

/// Runs a load. Callgrind counts this run.
pub(crate) fn run_named(name: &str, requests: u64) {
    let rows = tables().into_iter().flat_map(|table| table.rows);
    let load = rows
        .flat_map(|row| row.loads)
        .find(|load| load.name == name);
    let load = load.unwrap_or_else(|| panic!("no load is called {name}"));
    let mut disk = Disk::new(&load);
    if load.state == State::Stale {
        for queue in &mut disk.queues {
            // The replica stays stale: no resync runs in the background.
            queue.engine.stop_background();
            queue.driver.expects_reports = true;
        }
        let last = u8::try_from(load.replicas - 1).expect("few");
        disk.drive(Kind::Write, STALE_RANGES, Some(ReplicaIndex(last)));
        for queue in &mut disk.queues {
            queue.driver.expects_reports = false;
        }
    }
    disk.drive(load.kind, requests, None);
}

/// Counts and prints the tables. Returns whether all laws hold.
pub(crate) fn check() -> Result<bool, String> {
    let mut all_hold = true;
    for table in tables() {
        let labels = table.columns.iter().map(|(label, _)| format!("{label:>9}"));
        println!("\n{:30}{}", table.title, labels.collect::<String>());
        for row in &table.rows {
            let figures = row
                .loads
                .iter()
                .map(measure)
                .collect::<Result<Vec<_>, _>>()?;
            let columns = figures.iter().map(|figure| format!("{figure:>9.0}"));
            let sizes: Vec<u32> = table.columns.iter().map(|(_, size)| *size).collect();
            let (comment, holds) = table.law.judge(&sizes, &figures);
            let verdict = if holds { "" } else { "  BROKEN" };
            println!(
                "{:30}{}  {comment}{verdict}",
                row.name,
                columns.collect::<String>()
            );
            all_hold &= holds;
        }
    }
    Ok(all_hold)
}

fn measure(load: &Load) -> Result<f64, String> {
    let more = match load.state {
        State::Unflushed => UNFLUSHED_REQUESTS,
        State::New | State::Stale => LONG_REQUESTS - SHORT_REQUESTS,
    };
    count::per_unit(&load.name, SHORT_REQUESTS, SHORT_REQUESTS + more)
}

impl Law {
    /// The comment on the figures of a row, and whether they keep the law.
    fn judge(self, sizes: &[u32], figures: &[f64]) -> (String, bool) {
        let last = figures.len() - 1;
        let pairs = sizes.windows(2).zip(figures.windows(2));
        match self {
            Self::Linear(tolerance) => {
                let slope = |sizes: [u32; 2], figures: [f64; 2]| {
                    (figures[1] - figures[0]) / f64::from(sizes[1] - sizes[0])
                };
                let mean = slope([sizes[0], sizes[last]], [figures[0], figures[last]]);
                let off = pairs
                    .map(|(sizes, figures)| slope([sizes[0], sizes[1]], [figures[0], figures[1]]))
                    .map(|slope| (slope / mean - 1.0) * 100.0)
                    .fold(
                        0.0,
                        |worst: f64, off| if off.abs() > worst.abs() { off } else { worst },
                    );
                let comment = format!(
                    "each added one {mean:.0}, at worst {off:+.1} % (at most ±{tolerance} %)"
                );
                (comment, off.abs() <= tolerance)
            }
            Self::Flat(tolerance) => {
                let most = figures.iter().copied().fold(figures[0], f64::max);
                let growth = (most / figures[0] - 1.0) * 100.0;
                (
                    format!("{growth:+.1} % (at most {tolerance} %)"),
                    growth <= tolerance,
                )
            }
            Self::Logarithmic(tolerance) => {
                let per_doubling = |(sizes, figures): (&[u32], &[f64])| {
                    let doublings = (f64::from(sizes[1]) / f64::from(sizes[0])).log2();
                    (figures[1] - figures[0]) / doublings
                };
                let most = pairs.map(per_doubling).fold(0.0, f64::max) / figures[0] * 100.0;
                let comment = format!("{most:.1} % for each doubling (at most {tolerance} %)");
                (comment, most <= tolerance)
            }
        }
    }
}
