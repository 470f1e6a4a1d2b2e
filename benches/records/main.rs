//! `make bench-records`: what records cost a guest that writes (S2, S4).
//!
//! One daemon keeps records and one does not, each over sparse images of its own, and both get the
//! same requests in turn. *Cold* is the first time, four times as long, when nothing is marked,
//! three times on new disks; then everything is marked, and what follows is *warm*. At the end a
//! daemon is killed that has writes in flight all over a disk, to see how long the next one
//! recovers.
//!
//! `BENCH_SECONDS` is the time of one measurement (default 2), `BENCH_ROUNDS` the number of warm
//! pairs (default 5), `BENCH_DIR` the directory of the images. `BENCH_ONLY` is parts of the names
//! of rows, separated by commas, or `recovery`. The images may take 48 GiB, and it does not begin
//! without that.

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
mod recovery;
#[path = "../disk/requests.rs"]
mod requests;
#[path = "../disk/settings.rs"]
mod settings;
#[path = "../disk/spread.rs"]
mod spread;

/// The load, as the disk benchmark describes it.
mod plan {
    pub use super::disk_plan::{Access, Row};
}

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use disk_plan::{Access, Pattern, ReadPattern, Storage, patterns};
use drive::drive;
use guest::{GuestQueue, QUEUE_SIZE};
use interrupt::Interrupted;
use quorum_blk::common::SECTOR_BYTES;
use quorum_blk::record::Layout;
use requests::Requests;
use settings::Settings;
use spread::Spread;
use tempfile::TempDir;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, replica_arguments};

const REPLICAS: usize = 3;
/// How often a new disk is measured.
const COLD_ROUNDS: u64 = 3;
const GIB: u64 = 1 << 30;
/// What the images of a row may take at most.
const ROOM_BYTES: u64 = 2 * REPLICAS as u64 * 8 * GIB;

/// A load on a disk of some size.
#[derive(Clone, Copy, Debug)]
struct Row {
    load: disk_plan::Row,
    disk_bytes: u64,
}

impl Row {
    /// The arguments of a daemon that serves these images.
    fn arguments(&self, images: &[PathBuf], has_records: bool) -> Vec<OsString> {
        let state = if has_records { "records" } else { "none" };
        let cache = match self.load.storage {
            Storage::Disk => "none",
            Storage::Cache | Storage::Tmpfs => "writeback",
        };
        // A disk that is busy writing back must not count as one that hangs.
        let options = [
            ["--queue-size", &QUEUE_SIZE.to_string()],
            ["--replica-timeout", "20000"],
            ["--state", state],
            ["--cache", cache],
        ];
        let mut arguments = replica_arguments(images);
        arguments.extend(options.concat().into_iter().map(Into::into));
        arguments
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}g", self.load, self.disk_bytes / GIB)
    }
}

fn main() -> ExitCode {
    // `cargo test --all-targets` runs this program too.
    if !env::args().any(|argument| argument == "--bench") {
        println!("run this with `make bench-records`");
        return ExitCode::SUCCESS;
    }
    interrupt::catch();
    let settings = Settings::from_environment(2.0, 5);
    let is_recovery_alone = settings.only == ["recovery"];
    let rows = match is_recovery_alone {
        true => Vec::new(),
        false => settings.wanted(&rows()),
    };
    let recovers = settings.only.is_empty() || is_recovery_alone;
    if rows.is_empty() && !recovers {
        return ExitCode::FAILURE;
    }
    if let Err(why) = check_room(&settings.directory) {
        println!("{why}");
        return ExitCode::FAILURE;
    }
    match run(&rows, &settings).and_then(|()| match recovers {
        true => recovery::run(&settings),
        false => Ok(()),
    }) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Interrupted) => ExitCode::from(130),
    }
}

/// Checks that all images fit: a full disk would harm other programs too.
fn check_room(directory: &Path) -> Result<(), String> {
    let room = rustix::fs::statvfs(directory).map_err(|error| error.to_string())?;
    let (free, needed) = (room.f_bavail * room.f_frsize, ROOM_BYTES);
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

/// Short random writes, also all over a large disk, and long sequential ones.
fn rows() -> Vec<Row> {
    let is_wanted = |pattern: &Pattern, disk_bytes: u64| match (pattern.name, pattern.depth) {
        ("randwrite", 1 | 32) => true,
        ("write-1m", _) => disk_bytes == 8 * GIB,
        _ => false,
    };
    let mut rows = Vec::new();
    for storage in [Storage::Cache, Storage::Disk] {
        for disk_bytes in [8 * GIB, 1024 * GIB] {
            let patterns = patterns().into_iter();
            let wanted = patterns.filter(|pattern| is_wanted(pattern, disk_bytes));
            rows.extend(wanted.map(|pattern| Row {
                load: load(storage, pattern),
                disk_bytes,
            }));
        }
    }
    rows
}

fn load(storage: Storage, pattern: Pattern) -> disk_plan::Row {
    disk_plan::Row {
        storage,
        replicas: REPLICAS,
        queues: 1,
        read_pattern: ReadPattern::Quorum,
        pattern,
    }
}

fn run(rows: &[Row], settings: &Settings) -> Result<(), Interrupted> {
    let (rounds, time) = (settings.rounds, settings.time);
    let seconds = time.as_secs_f64();
    println!("{rounds} warm rounds of {seconds} s, medians (lowest to highest), requests/s\n");
    println!("| row | without | with records | ratio | cold: without | with | ratio |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let start = |has_records| Served::start(row, has_records, &settings.directory);
        let mut cold = Vec::new();
        let mut both = loop {
            let mut both = [start(false), start(true)];
            cold.push(measure(&mut both, row, 4 * time, cold.len() as u64)?);
            if cold.len() as u64 == COLD_ROUNDS {
                break both;
            }
        };
        for served in &mut both {
            served.touch_all(row)?;
        }
        let mut warm = Vec::new();
        for round in 1..=rounds {
            warm.push(measure(&mut both, row, time, round)?);
        }
        println!("| {row} | {} | {} |", columns(&warm), columns(&cold));
    }
    Ok(())
}

/// What was measured without records and with them, and the ratio of each pair.
fn columns(pairs: &[[f64; 2]]) -> String {
    let text = |index: usize| spread(pairs.iter().map(|pair| pair[index]), 0);
    let ratio = spread(pairs.iter().map(|[without, with]| with / without), 2);
    format!("{} | {} | {ratio}", text(0), text(1))
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
        // What is written back of one must not delay the other.
        for served in both.iter() {
            served.sync()?;
        }
        let requests = make_requests(&mut both[index].client, row, time, seed)?;
        measured[index] = requests as f64 / time.as_secs_f64();
    }
    Ok(measured)
}

/// A disk while it is served.
struct Served {
    // The queue must go before the daemon ends, and that before its images.
    client: Client,
    daemon: Daemon,
    images: Vec<PathBuf>,
    directory: TempDir,
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
            image.set_len(row.disk_bytes).expect("sizing an image");
            path
        };
        let images: Vec<PathBuf> = (0..REPLICAS).map(create).collect();
        let daemon = Daemon::start(directory.path(), row.arguments(&images, has_records));
        Self {
            client: Client::connect_sized(daemon.socket(), 1, QUEUE_SIZE),
            daemon,
            images,
            directory,
        }
    }

    /// Writes to each extent; all of it, where the writes measured are long: the first write to a
    /// block of a sparse image takes longer.
    fn touch_all(&mut self, row: &Row) -> Result<(), Interrupted> {
        let sectors = Layout::new(row.disk_bytes / SECTOR_BYTES).extent_sectors();
        let extent_bytes = sectors * SECTOR_BYTES;
        let len = row.load.pattern.len;
        let step_bytes = match row.load.pattern.access {
            Access::SequentialWrites => len as u64,
            _ => extent_bytes,
        };
        let offsets: Vec<u64> = (0..row.disk_bytes / step_bytes).collect();
        for steps in offsets.chunks(row.load.pattern.depth) {
            interrupt::check()?;
            let write = |step: &u64| Request::Write {
                offset: step * step_bytes,
                memory: 0,
                len,
            };
            let writes: Vec<_> = steps.iter().map(write).collect();
            assert!(self.client.run(0, &writes).iter().all(Result::is_ok));
        }
        Ok(())
    }

    /// Has everything written back.
    fn sync(&self) -> Result<(), Interrupted> {
        for image in &self.images {
            interrupt::check()?;
            let synced = File::open(image).and_then(|image| image.sync_all());
            synced.expect("syncing an image");
        }
        Ok(())
    }
}

/// The number of requests that a guest makes in this time.
fn make_requests(
    client: &mut Client,
    row: &Row,
    time: Duration,
    seed: u64,
) -> Result<u64, Interrupted> {
    let (queue, memory) = client.queues().next().expect("a queue");
    let mut requests = Requests::new(&row.load, row.disk_bytes, 0, seed);
    let mut queue = GuestQueue::new(queue, memory, row.load.pattern.len);
    let start = Instant::now();
    let window = start..start + time;
    let latencies = drive(&mut queue, &mut requests, row.load.pattern.depth, &window)?;
    Ok(latencies.len())
}
