//! How long a disk recovers whose daemon was killed with writes in flight all over it, while the
//! guest does nothing, and while it goes on writing.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::json;
use testkit::client::{Client, Request};
use testkit::daemon::Daemon;
use testkit::images::Random;
use testkit::monitor::Monitor;

use super::disk_plan::{Storage, patterns};
use super::guest::QUEUE_SIZE;
use super::interrupt::{self, Interrupted};
use super::settings::Settings;
use super::{GIB, Row, Served, load, make_requests};

const DISK_BYTES: u64 = 100 * GIB;
/// How long to wait for the end of the recovery.
const LIMIT: Duration = Duration::from_secs(120);
/// How long the guest writes between two looks at the recovery.
const LOOK: Duration = Duration::from_millis(100);
const BLOCK_BYTES: usize = 4096;

pub(crate) fn run(settings: &Settings) -> Result<(), Interrupted> {
    println!("\n| killed on 3 x 100 GiB | writes | marked | guest | first read | recovered |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for storage in [Storage::Cache, Storage::Disk] {
        let pattern = patterns()
            .into_iter()
            .find(|pattern| (pattern.name, pattern.depth) == ("randwrite", 32));
        let row = Row {
            load: load(storage, pattern.expect("it is one of the loads")),
            disk_bytes: DISK_BYTES,
        };
        for is_busy in [false, true] {
            measure(&row, settings, is_busy)?;
        }
    }
    Ok(())
}

fn measure(row: &Row, settings: &Settings, is_busy: bool) -> Result<(), Interrupted> {
    let mut served = Served::start(row, true, &settings.directory);
    let time = 4 * settings.time;
    served.sync()?;
    let written = make_requests(&mut served.client, row, time, 0)?;
    let mut random = Random::from_seed(1);
    let writes: Vec<Request> = (0..32)
        .map(|slot| Request::Write {
            offset: random.within(0..DISK_BYTES / 4096) * 4096,
            memory: slot * BLOCK_BYTES,
            len: BLOCK_BYTES,
        })
        .collect();
    served.client.send(0, &writes);
    served.daemon.signal(libc::SIGKILL);
    served.daemon.wait();
    // The sockets of the one that was killed are there still.
    let sockets = served.directory.path().join("again");
    fs::create_dir(&sockets).expect("creating a directory");
    let qmp = sockets.join("qmp.sock");
    let mut arguments = row.arguments(&served.images, true);
    arguments.extend(["--qmp".into(), qmp.clone().into()]);
    let began = Instant::now();
    let mut daemon = Daemon::start(&sockets, arguments);
    let mut client = Client::connect_sized(daemon.socket(), 1, QUEUE_SIZE);
    let Request::Write { offset, .. } = writes[0] else {
        unreachable!("all are writes");
    };
    client
        .read(0, offset, 4096)
        .expect("a read while it recovers");
    let first_read = began.elapsed();
    let mut monitor = Monitor::connect(&qmp);
    let unrecovered = |monitor: &mut Monitor| {
        let state = monitor.execute("query-quorum", json!({}));
        state["unrecovered-bytes"].as_u64().expect("a number")
    };
    let marked = unrecovered(&mut monitor);
    let (mut left, mut requests) = (marked, 0);
    while left > 0 && began.elapsed() < LIMIT {
        interrupt::check()?;
        match is_busy {
            false => std::thread::sleep(Duration::from_millis(10)),
            true => requests += make_requests(&mut client, row, LOOK, requests)?,
        }
        left = unrecovered(&mut monitor);
    }
    println!(
        "| {row} | {written} | {} MiB | {} | {:.2} s | {} MiB in {:.2} s |",
        marked >> 20,
        match is_busy {
            false => "idle".to_owned(),
            true => format!("{:.0} /s", requests as f64 / began.elapsed().as_secs_f64()),
        },
        first_read.as_secs_f64(),
        marked.saturating_sub(left) >> 20,
        began.elapsed().as_secs_f64()
    );
    drop(client);
    daemon.terminate();
    // The client of the first daemon is connected to nothing.
    Ok(())
}
