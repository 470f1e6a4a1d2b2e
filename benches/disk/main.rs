//! `make bench`: quorum-blkd compared with qemu-storage-daemon's quorum and with the ceiling, one
//! thread that only reads and writes the files.
//!
//! `BENCH_SECONDS` is the time of one measurement (default 1), `BENCH_ROUNDS` the number of rounds
//! (default 3), `BENCH_DIR` the directory of the images that are not on tmpfs. `BENCH_ONLY` is the
//! name of a row, or parts of names separated by commas; then docs/ is not written.

// `pub` in these modules means public within this program.
#![allow(unreachable_pub)]

mod ceiling;
mod drive;
mod guest;
mod images;
mod interrupt;
mod machine;
mod measure;
mod plan;
mod plot;
mod process_usage;
mod report;
mod requests;
mod settings;
mod spread;
mod summary;
mod systems;

use std::env;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use images::Images;
use interrupt::Interrupted;
use measure::measure;
use plan::{IMAGE_BYTES, Row};
use settings::Settings;
use summary::{Outcome, microseconds, percent, short, times};
use systems::System;

/// Bytes of one write when images are created. A page cache entry keeps the size of its first
/// access: writes of a megabyte create large folios, in which ext4 then takes ten times as long for
/// each write of 4 KiB.
const FILL_BYTES: usize = 4 << 10;

/// How often to try a measurement in which no request completes, which can happen if it is short
/// and the machine is busy.
const TRIES_MAX: usize = 3;

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this program too.
    if !env::args().any(|argument| argument == "--bench") {
        println!("run this with `make bench`");
        return ExitCode::SUCCESS;
    }
    interrupt::catch();
    let settings = Settings::from_environment(1.0, 3);
    let rows = settings.wanted(&plan::rows());
    if rows.is_empty() {
        return ExitCode::FAILURE;
    }
    let began = Instant::now();
    match run(&rows, &settings) {
        Ok(()) => {
            println!("\n{:.0} s", began.elapsed().as_secs_f64());
            ExitCode::SUCCESS
        }
        Err(Interrupted) => {
            println!("\ninterrupted");
            ExitCode::from(130)
        }
    }
}

fn run(rows: &[Row], settings: &Settings) -> Result<(), Interrupted> {
    let (count, rounds, seconds) = (rows.len(), settings.rounds, settings.time.as_secs_f64());
    let of_round: usize = rows.iter().map(|row| System::of(row).len()).sum();
    // The warm-up, start, stop and writing back are included.
    let minutes = rounds as f64 * of_round as f64 * (seconds * 1.2 + 0.12) / 60.0;
    println!(
        "{count} rows, {rounds} rounds of {seconds} s for each system: about {minutes:.1} minutes"
    );
    println!(
        "columns: requests/s, median (lowest to highest); latencies p50, p99, p99.9; CPU time of \
         the system per request; its peak memory; share of a core that the client uses"
    );
    let mut outcomes = Vec::new();
    for rows in rows.chunk_by(|left, right| left.storage == right.storage) {
        let most = rows
            .iter()
            .map(|row| row.replicas)
            .max()
            .unwrap_or_default();
        let images = Images::create(
            rows[0].storage,
            most,
            IMAGE_BYTES,
            FILL_BYTES,
            &settings.directory,
        )?;
        for rows in rows.chunk_by(|left, right| left.replicas == right.replicas) {
            let replicas = rows[0].replicas;
            images.prepare(replicas)?;
            for row in rows {
                let outcome = run_row(row, &images, settings)?;
                print(&outcome);
                outcomes.push(outcome);
            }
            images.assert_identical(replicas);
        }
    }
    if settings.only.is_empty() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
        report::write(&outcomes, settings, &docs);
        println!("\ndocs/benchmarks.md is written");
    }
    Ok(())
}

/// Measures all rounds of a row; in each round the systems take turns.
fn run_row(row: &Row, images: &Images, settings: &Settings) -> Result<Outcome, Interrupted> {
    let mut rounds: Vec<_> = System::of(row)
        .into_iter()
        .map(|system| (system, Vec::new()))
        .collect();
    for round in 0..settings.rounds {
        for (system, measured) in &mut rounds {
            let measured_now = (0..TRIES_MAX)
                .find_map(|_| measure(*system, row, images, settings.time, round + 1).transpose());
            let measured_now = measured_now
                .unwrap_or_else(|| panic!("{row}: {} completes no request", system.name()));
            measured.push(measured_now?);
        }
    }
    Ok(Outcome { row: *row, rounds })
}

fn print(outcome: &Outcome) {
    println!("\n{}", outcome.row);
    for (system, _) in &outcome.rounds {
        let figures = outcome.figures(*system).expect("measured");
        let rate = figures.requests_per_second;
        let range = format!("({} to {})", short(rate.min), short(rate.max));
        print!(
            "  {:<20}{:>7}/s {range:<18}{:>7} MB/s {:>22} µs  CPU {:>6} µs",
            system.name(),
            short(rate.median),
            short(figures.megabytes_per_second),
            figures.latency_us.map(microseconds).join(" "),
            short(figures.cpu_us),
        );
        if let (Some(memory), Some(client)) = (figures.memory_mib, figures.client_cores) {
            print!("  {:>5} MiB  client {}", short(memory), percent(client));
        }
        println!();
    }
    if let Some(ratio) = outcome.ratio_to(System::Threads) {
        let [median, min, max] = [ratio.median, ratio.min, ratio.max].map(times);
        println!("  {median} of --aio threads ({min} to {max})");
    }
    if let Some(ratio) = outcome.ratio_to(System::Peer) {
        let [median, min, max] = [ratio.median, ratio.min, ratio.max].map(times);
        print!("  {median} of the peer ({min} to {max}),");
    }
    if let Some(fraction) = outcome.ratio_to(System::Ceiling) {
        println!("  {} of the ceiling", percent(fraction.median));
    }
}
