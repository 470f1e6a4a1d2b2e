//! `make bench-records`: what records cost a guest that writes (S2, S4).
//!
//! One daemon keeps records and one does not, each over sparse images of its own, and both get the
//! same requests in turn. *Cold* is the first time, when nothing is marked; then everything is
//! marked, and what follows is *warm*.
//!
//! `BENCH_SECONDS` is the time of one measurement (default 2), `BENCH_ROUNDS` the number of warm
//! pairs (default 5), `BENCH_DIR` the directory of the images. `BENCH_ONLY` is parts of the names
//! of rows, separated by commas. The images may take 48 GiB, and it does not begin without that.

// Part of the shared modules is unused here. `pub` in them means public within this program.
#![allow(unreachable_pub, dead_code)]

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
#[path = "../disk/settings.rs"]
mod settings;
#[path = "../disk/spread.rs"]
mod spread;

/// The load, as the disk benchmark describes it, on a larger disk.
mod plan {
    pub use super::disk_plan::{Access, Row};

    /// Bytes of an image.
    pub const IMAGE_BYTES: u64 = 8 << 30;
}

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use disk_plan::{Pattern, ReadPattern, Row, Storage, patterns};
use drive::drive;
use guest::{GuestQueue, QUEUE_SIZE};
use interrupt::Interrupted;
use plan::IMAGE_BYTES;
use requests::Requests;
use settings::Settings;
use spread::Spread;
use tempfile::TempDir;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, replica_arguments};

const REPLICAS: usize = 3;
/// The least extent of a record.
const EXTENT_BYTES: u64 = 1 << 20;

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this program too.
    if !env::args().any(|argument| argument == "--bench") {
        println!("run this with `make bench-records`");
        return ExitCode::SUCCESS;
    }
    interrupt::catch();
    let settings = Settings::from_environment(2.0, 5);
    let rows = settings.wanted(&rows());
    if rows.is_empty() {
        return ExitCode::FAILURE;
    }
    if let Err(why) = check_room(&settings.directory) {
        println!("{why}");
        return ExitCode::FAILURE;
    }
    match run(&rows, &settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Interrupted) => ExitCode::from(130),
    }
}

/// Checks that all images fit: a full disk would harm other programs too.
fn check_room(directory: &Path) -> Result<(), String> {
    let room = rustix::fs::statvfs(directory).map_err(|error| error.to_string())?;
    let (free, needed) = (
        room.f_bavail * room.f_frsize,
        2 * REPLICAS as u64 * IMAGE_BYTES,
    );
    match free >= needed {
        true => Ok(()),
        false => Err(format!(
            "{} has {} MiB free, and the images may take {}: choose another BENCH_DIR",
            directory.display(),
            free >> 20,
            needed >> 20
        )),
    }
}

/// Short random writes and long sequential ones.
fn rows() -> Vec<Row> {
    let is_wanted = |pattern: &Pattern| {
        matches!(
            (pattern.name, pattern.depth),
            ("randwrite", 1 | 32) | ("write-1m", _)
        )
    };
    let patterns: Vec<Pattern> = patterns().into_iter().filter(is_wanted).collect();
    let of_storage = |storage| {
        patterns.iter().map(move |pattern| Row {
            storage,
            replicas: REPLICAS,
            queues: 1,
            read_pattern: ReadPattern::Quorum,
            pattern: *pattern,
        })
    };
    let storages = [Storage::Cache, Storage::Disk].into_iter();
    storages.flat_map(of_storage).collect()
}

fn run(rows: &[Row], settings: &Settings) -> Result<(), Interrupted> {
    let (rounds, time) = (settings.rounds, settings.time);
    let seconds = time.as_secs_f64();
    println!("{rounds} warm rounds of {seconds} s, medians (lowest to highest), requests/s\n");
    println!("| row | without | with records | ratio | cold: without | with | ratio |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let start = |has_records| Served::start(row, has_records, &settings.directory);
        let mut both = [start(false), start(true)];
        let cold = measure(&mut both, row, time, 0)?;
        for served in &mut both {
            served.touch_all();
        }
        let mut warm = Vec::new();
        for round in 1..=rounds {
            warm.push(measure(&mut both, row, time, round)?);
        }
        let text = |index: usize| spread(warm.iter().map(|pair| pair[index]), 0);
        let ratio = spread(warm.iter().map(|[without, with]| with / without), 2);
        let [cold_without, cold_with] = cold;
        println!(
            "| {row} | {} | {} | {ratio} | {cold_without:.0} | {cold_with:.0} | {:.2} |",
            text(0),
            text(1),
            cold_with / cold_without,
        );
    }
    Ok(())
}

fn spread(figures: impl Iterator<Item = f64>, digits: usize) -> String {
    let Spread { median, min, max } = Spread::of(figures);
    format!("{median:.digits$} ({min:.digits$} to {max:.digits$})")
}

/// Requests a second without records and with them, of the same requests. Which one is first
/// changes each time.
fn measure(
    both: &mut [Served; 2],
    row: &Row,
    time: Duration,
    seed: u64,
) -> Result<[f64; 2], Interrupted> {
    let mut measured = [0.0; 2];
    let first = usize::from(seed % 2 == 1);
    for index in [first, 1 - first] {
        measured[index] = both[index].measure(row, time, seed)?;
    }
    Ok(measured)
}

/// A disk while it is served.
struct Served {
    // The queue must go before the daemon ends, and that before its images.
    client: Client,
    _daemon: Daemon,
    images: Vec<PathBuf>,
    _directory: TempDir,
}

impl Served {
    fn start(row: &Row, has_records: bool, directory: &Path) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("quorum-blk-bench-")
            .tempdir_in(directory)
            .expect("creating a directory");
        let create = |index| {
            let path = directory.path().join(format!("{index}.raw"));
            let image = File::create_new(&path).expect("creating an image");
            image.set_len(IMAGE_BYTES).expect("sizing an image");
            path
        };
        let images: Vec<PathBuf> = (0..REPLICAS).map(create).collect();
        let mut arguments = replica_arguments(&images);
        let (queue_size, state) = (
            QUEUE_SIZE.to_string(),
            if has_records { "records" } else { "none" },
        );
        let cache = match row.storage {
            Storage::Disk => "none",
            Storage::Cache | Storage::Tmpfs => "writeback",
        };
        // A disk that is busy writing back must not count as one that hangs.
        let options = [
            ["--queue-size", &queue_size],
            ["--replica-timeout", "20000"],
            ["--state", state],
            ["--cache", cache],
        ];
        arguments.extend(options.concat().into_iter().map(Into::into));
        let daemon = Daemon::start(directory.path(), arguments);
        Self {
            client: Client::connect_sized(daemon.socket(), 1, QUEUE_SIZE),
            _daemon: daemon,
            images,
            _directory: directory,
        }
    }

    /// Writes to each extent.
    fn touch_all(&mut self) {
        let offsets: Vec<u64> = (0..IMAGE_BYTES / EXTENT_BYTES).collect();
        for extents in offsets.chunks(64) {
            let write = |extent: &u64| Request::Write {
                offset: extent * EXTENT_BYTES,
                memory: 0,
                len: 4096,
            };
            let writes: Vec<_> = extents.iter().map(write).collect();
            assert!(self.client.run(0, &writes).iter().all(Result::is_ok));
        }
    }

    /// Requests a second from now on, after everything is written back.
    fn measure(&mut self, row: &Row, time: Duration, seed: u64) -> Result<f64, Interrupted> {
        for image in &self.images {
            interrupt::check()?;
            let synced = File::open(image).and_then(|image| image.sync_all());
            synced.expect("syncing an image");
        }
        let (queue, memory) = self.client.queues().next().expect("a queue");
        let mut requests = Requests::new(row, 0, seed);
        let mut queue = GuestQueue::new(queue, memory, row.pattern.len);
        let start = Instant::now();
        let window = start..start + time;
        let latencies = drive(&mut queue, &mut requests, row.pattern.depth, &window)?;
        Ok(latencies.len() as f64 / time.as_secs_f64())
    }
}
