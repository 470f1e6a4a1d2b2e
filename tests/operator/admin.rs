//! An operator repairs a disk over the monitor while its guest works: adds and removes a replica,
//! and scrubs.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use testkit::HANG_LIMIT;

use serde_json::{Value, json};
use testkit::client::Client;
use testkit::disk::{Disk, Plan, System, node_name};
use testkit::images::{Random, are_identical, corrupt_sectors, data_ranges};
use testkit::monitor::Monitor;
use testkit::process::wait_until;
use testkit::stop::StopOnDrop;

const BLOCK_BYTES: usize = 4096;
const SIZE_BYTES: u64 = 64 << 20;

/// The guest uses the first half; only jobs read the other one.
const GUEST_BLOCKS: u64 = SIZE_BYTES / 2 / BLOCK_BYTES as u64;

fn serve() -> Disk {
    Disk::start(
        System::Ours,
        &Plan {
            size_bytes: SIZE_BYTES,
            ..Plan::default()
        },
    )
}

/// Writes and reads blocks until `stop`, and checks every byte that is read. Returns how many
/// requests that were.
fn work(client: &mut Client, random: &mut Random, stop: &AtomicBool) -> usize {
    let count = usize::try_from(GUEST_BLOCKS).unwrap();
    let mut contents = vec![0; count];
    let mut requests = 0;
    while !stop.load(Ordering::Relaxed) {
        requests += 1;
        let block = random.within(0..GUEST_BLOCKS);
        let offset = block * BLOCK_BYTES as u64;
        let content: &mut u8 = &mut contents[usize::try_from(block).unwrap()];
        if random.within(0..2) == 0 {
            *content = random.mask();
            client
                .write(0, offset, &[*content; BLOCK_BYTES])
                .expect("a write");
        } else {
            let read = client.read(0, offset, BLOCK_BYTES).expect("a read");
            assert!(
                read.iter().all(|byte| byte == content),
                "block {block} holds other data"
            );
        }
    }
    client.flush(0).expect("a flush");
    requests
}

/// Does something while a guest works.
fn beside_a_guest<R>(disk: &Disk, with: impl FnOnce(&mut Monitor) -> R) -> R {
    let (mut client, mut random) = (disk.connect(), Random::from_environment());
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let running = StopOnDrop(&stop);
        let guest = scope.spawn(|| work(&mut client, &mut random, &stop));
        let result = with(&mut disk.monitor());
        drop(running);
        assert!(guest.join().expect("the guest") > 0);
        result
    })
}

fn add(monitor: &mut Monitor, image: &Path, name: &str) {
    let node = json!({ "driver": "file", "node-name": name, "filename": image });
    monitor.execute(
        "blockdev-add",
        json!({ "driver": "raw", "node-name": name, "file": {
            "driver": "file", "filename": image,
        }}),
    );
    let again = monitor.try_execute("blockdev-add", node);
    assert_eq!(
        again.expect_err("the name is taken")["class"],
        "GenericError"
    );
    monitor.execute(
        "x-blockdev-change",
        json!({ "parent": "quorum0", "node": name, "force": true }),
    );
}

fn remove(monitor: &mut Monitor, child: &str) -> Result<Value, Value> {
    monitor.try_execute(
        "x-blockdev-change",
        json!({ "parent": "quorum0", "child": child }),
    )
}

/// The end of a job of this type, and that it had no error.
fn wait_for_end(monitor: &mut Monitor, kind: &str) -> Value {
    let is_end = |message: &Value| {
        message["event"] == "BLOCK_JOB_COMPLETED" && message["data"]["type"] == kind
    };
    let end = monitor
        .wait_for_event(is_end, HANG_LIMIT)
        .unwrap_or_else(|| panic!("no end of {kind}"));
    assert!(end["data"].get("error").is_none(), "{end}");
    end
}

fn replica(monitor: &mut Monitor, name: &str) -> Value {
    let state = monitor.execute("query-quorum", json!({}));
    let mut replicas = state["replicas"].as_array().expect("replicas").iter();
    replicas
        .find(|replica| replica["node-name"] == name)
        .cloned()
        .unwrap_or_default()
}

fn new_image(disk: &Disk, name: &str) -> PathBuf {
    let image = disk.images[0].with_file_name(name);
    File::create_new(&image)
        .unwrap()
        .set_len(SIZE_BYTES)
        .unwrap();
    image
}

/// Whether QEMU can open the image for writing: it is not locked.
fn is_free(image: &Path) -> bool {
    let mut io = Command::new("qemu-io");
    let output = io
        .args(["-f", "raw", "-c", "write 0 512"])
        .arg(image)
        .output();
    output
        .expect("qemu-io, of Debian's qemu-utils")
        .status
        .success()
}

#[test]
fn a_replica_is_replaced_while_the_guest_works() {
    let disk = serve();
    let image = new_image(&disk, "new.raw");
    beside_a_guest(&disk, |monitor| {
        add(monitor, &image, "new");
        wait_for_end(monitor, "quorum-resync");
        let new = replica(monitor, "new");
        assert_eq!(
            (&new["state"], &new["stale-bytes"]),
            (&json!("in-service"), &json!(0))
        );
        assert!(!is_free(&image), "it is locked like the others");
        remove(monitor, &node_name(1)).unwrap();
        assert_eq!(replica(monitor, &node_name(1)), Value::Null);
    });
    assert!(is_free(&disk.images[1]), "it was given back");
    assert_eq!(disk.end(), Vec::<Value>::new());
    let images = [&disk.images[0], &disk.images[2], &image].map(Clone::clone);
    assert!(are_identical(&images));
    // In the half that is used the copy has more data: short runs of zeroes are copied with what is
    // around them.
    let unused = images.map(|image| {
        let mut data = data_ranges(&image);
        data.retain(|range| range.end > SIZE_BYTES / 2);
        data
    });
    assert_eq!(unused[2], unused[0], "holes stay holes");
}

#[test]
fn a_scrub_finds_and_repairs_what_the_guest_never_reads() {
    const CORRUPT: u64 = 1000;
    let disk = serve();
    let found = beside_a_guest(&disk, |monitor| {
        let mut random = Random::from_environment();
        let first = GUEST_BLOCKS * BLOCK_BYTES as u64 / 512;
        for place in 0..CORRUPT {
            // One sector in each eight, so that none is chosen twice.
            let sector = first + place * 8 + random.within(0..8);
            corrupt_sectors(&disk.images[1], sector..sector + 1, 0x55);
        }
        let begun = monitor.execute("quorum-scrub", json!({ "repair": true }));
        let jobs = monitor.execute("query-jobs", json!({}));
        let is_it = |job: &&Value| job["id"] == begun["id"];
        assert_eq!(
            jobs.as_array().unwrap().iter().filter(is_it).count(),
            1,
            "{jobs}"
        );
        wait_for_end(monitor, "quorum-scrub");
        replica(monitor, &node_name(1))
    });
    assert_eq!(found["repaired-sectors"], CORRUPT, "{found:#}");
    disk.end();
    assert!(are_identical(&disk.images));
}

#[test]
fn the_disk_grows_while_the_guest_and_jobs_work() {
    const STEPS: u64 = 8;
    let disk = serve();
    let image = new_image(&disk, "new.raw");
    beside_a_guest(&disk, |monitor| {
        add(monitor, &image, "new");
        monitor.execute("quorum-scrub", json!({ "repair": true }));
        for step in 1..=STEPS {
            let size = SIZE_BYTES + (step << 20);
            monitor.execute("block_resize", json!({ "device": "quorum0", "size": size }));
        }
        wait_for_end(monitor, "quorum-scrub");
        // The scrub covers the new part, also on the replica that was added.
        let no_job = |monitor: &mut Monitor| monitor.execute("query-jobs", json!({})) == json!([]);
        assert!(wait_until(HANG_LIMIT, || no_job(monitor)));
        monitor.execute("quorum-scrub", json!({ "repair": true }));
        let end = wait_for_end(monitor, "quorum-scrub");
        assert_eq!(end["data"]["len"], SIZE_BYTES + (STEPS << 20), "{end}");
    });
    assert_eq!(disk.end(), Vec::<Value>::new());
    let images: Vec<_> = disk.images.iter().cloned().chain([image]).collect();
    assert!(are_identical(&images));
}

#[test]
fn a_job_is_paused_slowed_resumed_and_cancelled() {
    let disk = serve();
    let monitor = &mut disk.monitor();
    let begun = monitor.execute("quorum-scrub", json!({ "speed": 1 << 20 }));
    let id = begun["id"].as_str().unwrap().to_owned();
    let status = |monitor: &mut Monitor| {
        let jobs = monitor.execute("query-jobs", json!({}));
        let mut jobs = jobs.as_array().unwrap().iter();
        jobs.find(|job| job["id"] == id.as_str())
            .map(|job| job["status"].clone())
    };
    monitor.execute("job-pause", json!({ "id": id }));
    assert_eq!(status(monitor), Some(json!("paused")));
    monitor.execute("job-resume", json!({ "id": id }));
    assert_eq!(status(monitor), Some(json!("running")));
    monitor.execute(
        "block-job-set-speed",
        json!({ "device": id, "speed": 4096 }),
    );
    monitor.execute("job-cancel", json!({ "id": id }));
    let is_end = |message: &Value| message["event"] == "BLOCK_JOB_CANCELLED";
    assert!(monitor.wait_for_event(is_end, HANG_LIMIT).is_some());
    let unknown = monitor.try_execute("job-pause", json!({ "id": "job999" }));
    assert_eq!(unknown.expect_err("no such job")["class"], "GenericError");
}

#[test]
fn a_refused_command_changes_nothing() {
    let disk = serve();
    let monitor = &mut disk.monitor();
    let before = monitor.execute("query-quorum", json!({}))["replicas"].clone();
    let short = disk.images[0].with_file_name("short.raw");
    let missing = disk.images[0].with_file_name("missing.raw");
    File::create_new(&short)
        .unwrap()
        .set_len(SIZE_BYTES / 2)
        .unwrap();
    for (name, path) in [
        ("short", short.as_path()),
        ("twice", disk.images[2].as_path()),
        ("missing", missing.as_path()),
    ] {
        monitor.execute(
            "blockdev-add",
            json!({ "driver": "file", "node-name": name, "filename": path }),
        );
        let added = monitor.try_execute(
            "x-blockdev-change",
            json!({ "parent": "quorum0", "node": name }),
        );
        assert_eq!(added.expect_err(name)["class"], "GenericError");
        monitor.execute("blockdev-del", json!({ "node-name": name }));
    }
    for arguments in [
        json!({ "parent": "quorum0" }),
        json!({ "parent": "quorum0", "node": "none" }),
        json!({ "parent": "quorum0", "child": "none" }),
        json!({ "parent": "quorum0", "child": "r0", "node": "none" }),
        json!({ "parent": "other", "child": "r0" }),
    ] {
        let changed = monitor.try_execute("x-blockdev-change", arguments.clone());
        assert!(changed.is_err(), "{arguments}");
    }
    assert_eq!(
        monitor.execute("query-quorum", json!({}))["replicas"],
        before
    );
    remove(monitor, "children.1").expect("two are enough");
    let refused = remove(monitor, "r0").expect_err("two are needed");
    assert_eq!(refused["class"], "GenericError");
    assert!(is_free(&disk.images[1]));
}
