//! What a scrub and a resync at their default speed cost a guest: `make bench-jobs`.
//!
//! One daemon, one client; a job is paused and resumed turn by turn, and the guest's requests are counted in both. So each
//! pair differs in nothing but the job: a replica that is brought up to date is stale in both.
//!
//! `BENCH_SECONDS` is the time of one measurement (default 0.5), `BENCH_ROUNDS` how often each pair is measured (default 7),
//! `BENCH_ONLY` parts of the names of rows, separated by commas, `BENCH_MIB` the size of the disk (default 2048),
//! `BENCH_DIR` where its images go.

// Of what is shared, only a part is used; and what is public here is so within this program.
#![allow(unreachable_pub, dead_code)]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../disk/plan.rs"]
mod disk_plan;
#[path = "../disk/drive.rs"]
mod drive;
#[path = "../disk/guest.rs"]
mod guest;
#[path = "../disk/interrupt.rs"]
mod interrupt;
#[path = "../disk/requests.rs"]
mod requests;
mod rows;
mod under;

/// A load in the words of the other benchmark.
mod plan {
    pub use super::disk_plan::{Access, Row};
    pub use super::rows::GUEST_BYTES as IMAGE_BYTES;
}

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::time::{Duration, Instant};

use interrupt::Interrupted;
use rows::{JobKind, Row, rows};
use under::{Machine, Measured};

/// What a user can choose.
struct Settings {
    time: Duration,
    rounds: u64,
    only: Vec<String>,
    directory: PathBuf,
}

impl Settings {
    fn from_environment() -> Self {
        let only = variable("BENCH_ONLY").unwrap_or_else(String::new);
        let parts = only.split(',').map(str::trim).filter(|part| !part.is_empty());
        Self {
            time: Duration::from_secs_f64(variable("BENCH_SECONDS").unwrap_or(0.5)),
            rounds: variable("BENCH_ROUNDS").unwrap_or(7).max(1),
            only: parts.map(str::to_owned).collect(),
            directory: variable("BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()),
        }
    }

    fn wants(&self, row: &Row) -> bool {
        let name = row.to_string();
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part))
    }
}

fn variable<T: FromStr>(name: &str) -> Option<T> {
    let text = env::var(name).ok().filter(|text| !text.is_empty())?;
    let value = text.parse().ok();
    Some(value.unwrap_or_else(|| panic!("{name}={text}: not what it should be")))
}

fn main() -> ExitCode {
    // `cargo test --all-targets` starts it, too.
    if !env::args().any(|argument| argument == "--bench") {
        println!("to be run by `make bench-jobs`");
        return ExitCode::SUCCESS;
    }
    interrupt::catch();
    let settings = Settings::from_environment();
    let rows: Vec<Row> = rows().into_iter().filter(|row| settings.wants(row)).collect();
    if rows.is_empty() {
        println!("BENCH_ONLY fits no row");
        return ExitCode::FAILURE;
    }
    let began = Instant::now();
    match run(&rows, &settings) {
        Ok(()) => {
            println!("\n{:.0} s", began.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(Interrupted) => ExitCode::from(130),
    }
}

fn run(rows: &[Row], settings: &Settings) -> Result<(), Interrupted> {
    let (rounds, seconds) = (settings.rounds, settings.time.as_secs_f64());
    println!("{rounds} rounds of {seconds} s, medians (lowest to highest)\n");
    println!("| guest | alone, requests/s | beside the job | left | the job, MB/s |");
    println!("| --- | --- | --- | --- | --- |");
    for rows in rows.chunk_by(|left, right| left.storage == right.storage) {
        let machine = Machine::new(rows[0].storage, &settings.directory)?;
        for row in rows {
            let mut served = machine.serve(row);
            let mut measured = Vec::new();
            for round in 0..rounds {
                measured.push(served.measure(settings.time, round + 1)?);
            }
            print(row, &measured);
            served.end();
        }
    }
    Ok(())
}

/// Median, lowest and highest.
fn spread(values: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
}

fn print(row: &Row, measured: &[Measured]) {
    let text = |[median, low, high]: [f64; 3]| format!("{median:.0} ({low:.0} to {high:.0})");
    let job = text(spread(measured.iter().map(|measured| measured.job_bytes / 1e6)));
    if row.load.is_none() {
        return println!("| {row} | | | | {job} |");
    }
    let alone = text(spread(measured.iter().map(|measured| measured.alone)));
    let beside = text(spread(measured.iter().map(|measured| measured.beside)));
    let [left, low, high] = spread(
        measured
            .iter()
            .map(|measured| measured.beside / measured.alone * 100.0),
    );
    println!("| {row} | {alone} | {beside} | {left:.1} % ({low:.1} to {high:.1}) | {job} |");
}

impl JobKind {
    fn name(self) -> &'static str {
        match self {
            Self::Scrub => "scrub",
            Self::Resync => "resync",
        }
    }
}
