//! `make bench-jobs`: what a scrub and a resync at their default speed cost a guest.
//!
//! One daemon and one client. The job is paused and resumed in turn, and the guest's requests are
//! counted in both states, so each pair differs only by the job. The replica of a resync is stale
//! in both.
//!
//! `BENCH_SECONDS` is the time of one measurement (default 0.5), `BENCH_ROUNDS` the number of pairs
//! (default 7), `BENCH_MIB` the size of the disk (default 2048), `BENCH_DIR` the directory of its
//! images. `BENCH_ONLY` is parts of the names of rows, separated by commas.

// Part of the shared modules is unused here. `pub` in them means public within this program.
#![allow(unreachable_pub, dead_code)]

#[path = "../disk/plan.rs"]
mod disk_plan;
#[path = "../disk/drive.rs"]
mod drive;
#[path = "../disk/guest.rs"]
mod guest;
#[path = "../disk/images.rs"]
mod images;
#[path = "../disk/interrupt.rs"]
mod interrupt;
#[path = "../disk/requests.rs"]
mod requests;
mod rows;
#[path = "../disk/settings.rs"]
mod settings;
#[path = "../disk/spread.rs"]
mod spread;
mod under;

/// The load, as the disk benchmark describes it.
mod plan {
    pub use super::disk_plan::{Access, Row, Storage};
}

use std::env;
use std::process::ExitCode;
use std::time::Instant;

use images::Images;
use interrupt::Interrupted;
use rows::{DISK_BYTES, JobKind, Row, rows};
use settings::Settings;
use spread::Spread;
use under::{FILL_BYTES, Measured, REPLICAS, Served};

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this program too.
    if !env::args().any(|argument| argument == "--bench") {
        println!("run this with `make bench-jobs`");
        return ExitCode::SUCCESS;
    }
    interrupt::catch();
    let settings = Settings::from_environment(0.5, 7);
    let rows = settings.wanted(&rows());
    if rows.is_empty() {
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
        let (storage, directory) = (rows[0].storage, &settings.directory);
        let images = Images::create(storage, REPLICAS, *DISK_BYTES, FILL_BYTES, directory)?;
        images.prepare(REPLICAS)?;
        for row in rows {
            let mut served = Served::start(row, &images);
            let mut measured = Vec::new();
            for round in 0..rounds {
                measured.push(served.measure(settings.time, round + 1)?);
            }
            print(row, &measured);
            served.end()?;
        }
    }
    Ok(())
}

fn print(row: &Row, measured: &[Measured]) {
    let spread = |figure: fn(&Measured) -> f64| Spread::of(measured.iter().map(figure));
    let text = |figure| {
        let Spread { median, min, max } = spread(figure);
        format!("{median:.0} ({min:.0} to {max:.0})")
    };
    let job = text(|measured| measured.job_bytes / 1e6);
    if row.load.is_none() {
        return println!("| {row} | | | | {job} |");
    }
    let alone = text(|measured| measured.alone);
    let beside = text(|measured| measured.beside);
    let Spread { median, min, max } = spread(|measured| measured.beside / measured.alone * 100.0);
    println!("| {row} | {alone} | {beside} | {median:.1} % ({min:.1} to {max:.1}) | {job} |");
}

impl JobKind {
    fn name(self) -> &'static str {
        match self {
            Self::Scrub => "scrub",
            Self::Resync => "resync",
        }
    }
}
