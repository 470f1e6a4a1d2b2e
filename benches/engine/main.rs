//! `make bench-engine`: counts the instructions that the engine alone needs for a request: vote,
//! locks and request states, without I/O and guest.
//!
//! Callgrind counts, so the figures do not depend on the load of the machine. The bench compares
//! them with `benches/engine/record.txt`, which `--record` writes, and checks that they grow with
//! the disk no faster than allowed ([`scale`]). `--scale` does only that check.

mod count;
mod driver;
mod hold;
mod scale;

use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::SectorRange;
use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::engine::{Engine, GuestRequest, Policy, ReadPattern, Shared, WorkerIndex};
use quorum_blk::jobs::Sizes;

use self::driver::Driver;

/// Requests in flight at a time, as with a guest of queue depth 32.
const DEPTH: u64 = 32;
const SHORT_BATCHES: u64 = 20;
const LONG_BATCHES: u64 = 120;

/// The record, and the growth in percent above which a figure counts as a regression.
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/engine/record.txt");
const TOLERANCE_PERCENT: f64 = 1.0;

const DISK_SECTORS: u64 = 1 << 21;

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
}

struct Case {
    name: &'static str,
    kind: Kind,
    replicas: usize,
    read_pattern: ReadPattern,
    sectors: u64,
}

const fn case(
    name: &'static str,
    kind: Kind,
    replicas: usize,
    read_pattern: ReadPattern,
    sectors: u64,
) -> Case {
    Case {
        name,
        kind,
        replicas,
        read_pattern,
        sectors,
    }
}

const CASES: [Case; 6] = [
    case(
        "voted-read-4k-3-replicas",
        Kind::Read,
        3,
        ReadPattern::Quorum,
        8,
    ),
    case(
        "voted-read-4k-5-replicas",
        Kind::Read,
        5,
        ReadPattern::Quorum,
        8,
    ),
    case(
        "threshold-read-4k-3-replicas",
        Kind::Read,
        3,
        ReadPattern::Threshold,
        8,
    ),
    case("read-4k-1-replica", Kind::Read, 1, ReadPattern::Quorum, 8),
    case(
        "voted-read-1m-3-replicas",
        Kind::Read,
        3,
        ReadPattern::Quorum,
        2048,
    ),
    case(
        "write-4k-3-replicas",
        Kind::Write,
        3,
        ReadPattern::Quorum,
        8,
    ),
];

/// Runs a case. Callgrind counts this run.
fn run(case: &Case, requests: u64) {
    let batches = requests / DEPTH;
    let policy = Policy {
        threshold: case.replicas / 2 + 1,
        read_pattern: case.read_pattern,
        rewrite_corrupted: false,
        repair_limit_sectors: u64::MAX,
        blkverify: false,
        job_sizes: Sizes::default(),
        block_sectors: 1,
        replica_timeout: Duration::from_secs(1),
    };
    let shared = Arc::new(Shared::new(
        case.replicas,
        policy.threshold,
        1,
        DISK_SECTORS,
    ));
    let pool = BufferPool::default();
    let clock = TurnClock::default();
    let mut engine = Engine::new(WorkerIndex(0), policy, shared, pool.clone(), clock.clone());
    let mut driver = Driver::default();
    let (mut number, mut in_flight) = (0, Vec::new());
    for batch in 0..batches {
        clock.set(Duration::from_micros(batch * 100));
        for _ in 0..DEPTH {
            number += 1;
            let start = number * 7919 * case.sectors % DISK_SECTORS;
            let range = SectorRange::new(start, case.sectors);
            let request = match case.kind {
                Kind::Read => GuestRequest::Read(range),
                Kind::Write => GuestRequest::Write {
                    range,
                    data: pool.take(usize::try_from(range.bytes()).expect("small")),
                    durable: false,
                },
            };
            engine.submit(driver::tag(number), request, &mut driver);
        }
        while !driver.operations.is_empty() {
            in_flight.append(&mut driver.operations);
            for operation in in_flight.drain(..) {
                engine.reply(operation.reply(Ok(())), &mut driver);
            }
        }
        clock.set(Duration::from_micros(batch * 100 + 50));
        engine.tick(&mut driver);
    }
    assert_eq!(driver.completed, batches * DEPTH);
    assert!(engine.is_idle());
}

fn recorded(record: &str, name: &str) -> Option<f64> {
    let mut lines = record.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()?.parse().ok())?)
}

/// Compares with the record. Returns whether no case has regressed.
fn compare(writes_record: bool) -> Result<bool, String> {
    let record = std::fs::read_to_string(Path::new(RECORD)).unwrap_or_default();
    let mut new_record = String::from("# Instructions for each request, by `make bench-engine`.\n");
    let mut passes = true;
    for case in &CASES {
        let (short, long) = (SHORT_BATCHES * DEPTH, LONG_BATCHES * DEPTH);
        let now = count::per_unit(case.name, short, long)?;
        let _ = writeln!(new_record, "{} {now:.1}", case.name);
        let old = recorded(&record, case.name);
        let change = old.map(|old| (now / old - 1.0) * 100.0);
        let text = match (old, change) {
            (Some(old), Some(change)) => {
                format!("recorded {old:9.1}, {change:+.1} %")
            }
            _ => String::from("not recorded yet"),
        };
        println!("{:30} {now:9.1} instructions a request; {text}", case.name);
        passes &= change.is_none_or(|change| change <= TOLERANCE_PERCENT);
    }
    if writes_record {
        std::fs::write(RECORD, new_record).map_err(|error| format!("{RECORD}: {error}"))?;
        return Ok(true);
    }
    Ok(passes)
}

/// The run that callgrind counts.
fn run_named(name: &str, requests: u64) {
    match CASES.iter().find(|case| case.name == name) {
        Some(case) => run(case, requests),
        None if name.starts_with("held:") => hold::run_named(name, requests),
        None => scale::run_named(name, requests),
    }
}

/// Runs the bench. Returns why it fails, if it does.
fn bench(arguments: &[String]) -> Result<Option<&'static str>, String> {
    let asks_for = |option: &str| arguments.iter().any(|argument| argument == option);
    let more = "more instructions than recorded; `make bench-engine RECORD=1` accepts them";
    if !asks_for("--scale") && !compare(asks_for("--record"))? {
        return Ok(Some(more));
    }
    if !scale::check()? {
        return Ok(Some("the cost of a request grows faster than allowed"));
    }
    Ok((!hold::check()?).then_some("the mutex of all workers is held for too long"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(place) = arguments.iter().position(|argument| argument == "--run") {
        run_named(
            &arguments[place + 1],
            arguments[place + 2].parse().expect("a number"),
        );
        return ExitCode::SUCCESS;
    }
    match bench(&arguments) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(failure)) => {
            eprintln!("{failure}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
