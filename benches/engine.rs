//! Instructions that the engine alone takes for a request: vote, locks and request states, no I/O and no guest.
//!
//! `make bench-engine` counts them under callgrind, which gives the same figure each time, whatever else the
//! machine does, and compares them with those in `benches/engine.txt`. Called with `--record`, it writes that
//! file. Each figure is the difference between a long and a short run, so starting up does not count.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use quorum_blk::engine::{
    Effects, Engine, Failed, GuestRequest, Policy, ReadPattern, Shared, Tag, WorkerIndex,
};
use quorum_blk::jobs::{JobEvent, Sizes};
use quorum_blk::quorum::report::Report;
use quorum_blk::quorum::{ReplicaIndex, SectorRange};
use quorum_blk::replica::buffer::BufferPool;
use quorum_blk::replica::operation::{Operation, RequestId};

/// Requests in flight together, as a guest of queue depth 32 has them.
const DEPTH: u64 = 32;
const SHORT_BATCHES: u64 = 20;
const LONG_BATCHES: u64 = 120;

/// What is recorded, and how much more than that counts as a change for the worse, in percent.
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/engine.txt");
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
    case("voted-read-4k-3-replicas", Kind::Read, 3, ReadPattern::Quorum, 8),
    case("voted-read-4k-5-replicas", Kind::Read, 5, ReadPattern::Quorum, 8),
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
    case("write-4k-3-replicas", Kind::Write, 3, ReadPattern::Quorum, 8),
];

/// Keeps operations until they are answered, and counts answers.
#[derive(Default)]
struct Driver {
    operations: Vec<Operation>,
    completed: u64,
}

impl Effects for Driver {
    fn submit(&mut self, operation: Operation) {
        self.operations.push(operation);
    }

    fn complete(&mut self, _tag: Tag, result: Result<&[u8], Failed>) {
        assert!(result.is_ok());
        self.completed += 1;
    }

    fn report(&mut self, report: Report) {
        panic!("nothing is wrong with the replicas, and yet: {report:?}");
    }

    fn wake(&mut self, _worker: WorkerIndex, _request: RequestId) {
        panic!("there is one worker");
    }

    fn health_changed(&mut self) {}

    fn job_changed(&mut self, event: JobEvent) {
        panic!("nobody asked for a job, and yet: {event:?}");
    }

    fn released(&mut self, replica: ReplicaIndex) {
        panic!("nobody removed replica {}", replica.0);
    }

    fn contents_differ(&mut self, _range: SectorRange) {}
}

/// Runs a case; what is counted.
fn run(case: &Case, batches: u64) {
    let policy = Policy {
        threshold: case.replicas / 2 + 1,
        read_pattern: case.read_pattern,
        rewrite_corrupted: false,
        blkverify: false,
        job_sizes: Sizes::default(),
        block_sectors: 1,
        replica_timeout: Duration::from_secs(1),
    };
    let shared = Arc::new(Shared::new(case.replicas, policy.threshold, 1, DISK_SECTORS));
    let pool = BufferPool::default();
    let mut engine = Engine::new(WorkerIndex(0), policy, shared, pool.clone());
    let mut driver = Driver::default();
    let (mut number, mut in_flight) = (0, Vec::new());
    for batch in 0..batches {
        engine.set_time(Duration::from_micros(batch * 100));
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
            engine.submit(Tag(number), request, &mut driver);
        }
        while !driver.operations.is_empty() {
            in_flight.append(&mut driver.operations);
            for operation in in_flight.drain(..) {
                engine.reply(operation.reply(Ok(())), &mut driver);
            }
        }
        engine.tick(Duration::from_micros(batch * 100 + 50), &mut driver);
    }
    assert_eq!(driver.completed, batches * DEPTH);
    assert!(engine.is_idle());
}

/// Instructions of a run of this program.
fn count(case: &Case, batches: u64) -> Result<u64, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args(["--run", case.name, &batches.to_string()])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot run valgrind ({error}); install it first"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let collected = said.lines().find_map(|line| line.split("Collected :").nth(1));
    collected
        .and_then(|figure| figure.trim().parse().ok())
        .ok_or_else(|| format!("valgrind did not count: {said}"))
}

fn measure(case: &Case) -> Result<f64, String> {
    let (short, long) = (count(case, SHORT_BATCHES)?, count(case, LONG_BATCHES)?);
    let requests = (LONG_BATCHES - SHORT_BATCHES) * DEPTH;
    Ok(
        f64::from(u32::try_from(long - short).map_err(|error| error.to_string())?)
            / f64::from(u32::try_from(requests).expect("few")),
    )
}

fn recorded(record: &str, name: &str) -> Option<f64> {
    let mut lines = record.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()?.parse().ok())?)
}

fn compare(record_anew: bool) -> Result<bool, String> {
    let record = std::fs::read_to_string(Path::new(RECORD)).unwrap_or_default();
    let mut anew = String::from("# Instructions for each request, by `make bench-engine`.\n");
    let mut good = true;
    for case in &CASES {
        let now = measure(case)?;
        let _ = writeln!(anew, "{} {now:.1}", case.name);
        let before = recorded(&record, case.name);
        let change = before.map(|before| (now / before - 1.0) * 100.0);
        let text = match (before, change) {
            (Some(before), Some(change)) => format!("recorded {before:9.1}, {change:+.1} %"),
            _ => String::from("not recorded yet"),
        };
        println!("{:30} {now:9.1} instructions a request; {text}", case.name);
        good &= change.is_none_or(|change| change <= TOLERANCE_PERCENT);
    }
    if record_anew {
        std::fs::write(RECORD, anew).map_err(|error| format!("{RECORD}: {error}"))?;
        return Ok(true);
    }
    Ok(good)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(place) = arguments.iter().position(|argument| argument == "--run") {
        let case = CASES.iter().find(|case| case.name == arguments[place + 1]);
        run(
            case.expect("a case"),
            arguments[place + 2].parse().expect("a number"),
        );
        return ExitCode::SUCCESS;
    }
    match compare(arguments.iter().any(|argument| argument == "--record")) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("more instructions than recorded; `make bench-engine RECORD=1` if that is meant");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
