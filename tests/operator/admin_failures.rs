//! Replicas that fail while they are added, removed or resynced: the operator gets the reason, and
//! the guest does not notice.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use testkit::HANG_LIMIT;

use quorum_blk::replica::file::{self, OpenOptions};
use serde_json::{Value, json};
use testkit::client::Client;
use testkit::disk::{Disk, Plan, System, node_name};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::{are_identical, create_images};
use testkit::monitor::Monitor;
use testkit::oracle::text_of_errno;
use testkit::peer::Peer;
use testkit::process::wait_until;

const MEBIBYTE: u64 = 1 << 20;
const SIZE_BYTES: u64 = 32 * MEBIBYTE;
const TIMEOUT: Duration = Duration::from_secs(1);

fn serve(plan: Plan) -> Disk {
    let plan = Plan {
        size_bytes: SIZE_BYTES,
        replica_timeout: TIMEOUT,
        ..plan
    };
    Disk::start(System::Ours, &plan)
}

/// Images may be added that are anywhere.
const ANYWHERE: [&str; 2] = ["--image-dir", "/"];

/// Those of [`FuseImage`] are in no directory: without capabilities they cannot be opened.
const OUT_OF_THE_TREE: [&str; 4] = ["--image-dir", "/", "--sandbox", "off"];

fn serve_with(more: &[&'static str]) -> Disk {
    serve(Plan {
        more: more.to_vec(),
        ..Plan::default()
    })
}

/// Writes something to every block of the disk.
fn fill(client: &mut Client) {
    for place in 0..SIZE_BYTES / MEBIBYTE {
        let content = vec![mark(place); 1 << 20];
        client
            .write(0, place * MEBIBYTE, &content)
            .expect("a write");
    }
    client.flush(0).expect("a flush");
}

fn mark(place: u64) -> u8 {
    u8::try_from(place).expect("a small disk") | 0x80
}

/// The disk is as [`fill`] has left it, and can be written to.
fn works(client: &mut Client) {
    for place in 0..SIZE_BYTES / MEBIBYTE {
        let read = client.read(0, place * MEBIBYTE, 64 << 10).expect("a read");
        assert!(read.iter().all(|byte| *byte == mark(place)), "MiB {place}");
        client.write(0, place * MEBIBYTE, &read).expect("a write");
    }
    client.flush(0).expect("a flush");
}

/// A file system with one file, that is a new image.
struct NewImage {
    image: FuseImage,
    backing: PathBuf,
    _directory: tempfile::TempDir,
}

fn new_image() -> NewImage {
    let directory = tempfile::tempdir().expect("a directory");
    let backing = create_images(directory.path(), 1, SIZE_BYTES).remove(0);
    NewImage {
        image: FuseImage::serve(&backing),
        backing,
        _directory: directory,
    }
}

fn try_add(monitor: &mut Monitor, image: &Path, name: &str) -> Result<Value, String> {
    let node = json!({ "driver": "file", "node-name": name, "filename": image });
    monitor.execute("blockdev-add", node);
    let change = json!({ "parent": "quorum0", "node": name, "force": true });
    let added = monitor.try_execute("x-blockdev-change", change);
    added.map_err(|error| {
        assert_eq!(error["class"], "GenericError");
        monitor.execute("blockdev-del", json!({ "node-name": name }));
        error["desc"].as_str().expect("a text").to_owned()
    })
}

fn add(monitor: &mut Monitor, image: &Path, name: &str) {
    try_add(monitor, image, name).unwrap_or_else(|error| panic!("adding {name}: {error}"));
}

fn try_remove(monitor: &mut Monitor, name: &str) -> Result<Value, Value> {
    let change = json!({ "parent": "quorum0", "child": name });
    monitor.try_execute("x-blockdev-change", change)
}

fn replica(monitor: &mut Monitor, name: &str) -> Option<Value> {
    let state = monitor.execute("query-quorum", json!({}));
    let mut replicas = state["replicas"].as_array().expect("replicas").iter();
    replicas
        .find(|replica| replica["node-name"] == name)
        .cloned()
}

/// Waits until the replica is in service and no job runs.
fn wait_until_in_service(monitor: &mut Monitor, name: &str) {
    let is_there = wait_until(HANG_LIMIT, || {
        let in_service =
            replica(monitor, name).is_some_and(|replica| replica["state"] == "in-service");
        in_service && monitor.execute("query-jobs", json!({})) == json!([])
    });
    assert!(is_there, "{:?}", replica(monitor, name));
}

/// The end of the resync of a replica.
fn end_of_resync(monitor: &mut Monitor, name: &str) -> Value {
    let is_end = |event: &Value| {
        let data = &event["data"];
        event["event"] == "BLOCK_JOB_COMPLETED"
            && data["type"] == "quorum-resync"
            && data["node-name"] == name
    };
    let end = monitor
        .wait_for_event(is_end, HANG_LIMIT)
        .expect("the end of a resync");
    end["data"].clone()
}

/// Whether a process has a file open.
fn has_open(process: u32, file: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    let wanted = identity(file).expect("the image is there");
    let mut open = fs::read_dir(format!("/proc/{process}/fd")).expect("the daemon runs");
    open.any(|entry| identity(&entry.expect("an entry").path()) == Some(wanted))
}

fn is_locked(path: &Path) -> bool {
    let options = OpenOptions {
        read_only: false,
        direct: false,
        raw_anyway: true,
        block_bytes: 512,
    };
    match file::open(path, "probe", options) {
        Ok(_) => false,
        Err(error) => {
            assert!(
                error.to_string().contains("in use by another process"),
                "{error}"
            );
            true
        }
    }
}

#[test]
fn a_hung_replica_can_be_removed() {
    let disk = serve(Plan {
        faulty: vec![2],
        more: OUT_OF_THE_TREE.to_vec(),
        ..Plan::default()
    });
    let (hung, name) = (disk.faulty(2), node_name(2));
    let (mut client, mut monitor) = (disk.connect(), disk.monitor());
    fill(&mut client);
    for operation in [Operation::Read, Operation::Write, Operation::Sync] {
        hung.inject(operation, Fault::Hang);
    }
    // Something is in flight there when it is removed.
    works(&mut client);
    // The replica hangs until after this: the command does not wait for it without a limit.
    try_remove(&mut monitor, &name).expect("the command returns");
    assert_eq!(replica(&mut monitor, &name), None);
    works(&mut client);
    // The kernel may still write to it.
    assert!(is_locked(&hung.path()) && has_open(disk.process_id(), &hung.path()));
    let refused = try_add(&mut monitor, &hung.path(), &name).expect_err("it is still open");
    assert!(refused.contains("are the same image"), "{refused}");

    hung.clear_faults();
    assert!(wait_until(HANG_LIMIT, || !has_open(
        disk.process_id(),
        &hung.path()
    )));
    assert!(!is_locked(&hung.path()));
    add(&mut monitor, &hung.path(), &name);
    wait_until_in_service(&mut monitor, &name);
    works(&mut client);
    disk.end();
    assert!(are_identical(&disk.images));
}

/// Adds a replica, and makes it fail with this errno when a part of it is written.
fn fail_midway(disk: &Disk, monitor: &mut Monitor, target: &FuseImage, errno: i32) {
    target.inject(Operation::Write, Fault::PerSecond(50));
    add(monitor, &target.path(), "new");
    let before = target.done(Operation::Write);
    assert!(wait_until(HANG_LIMIT, || target.done(Operation::Write) >= before + 4));
    target.inject(Operation::Write, Fault::Fail(errno));
    let end = end_of_resync(monitor, "new");
    let error = end["error"].as_str().expect("it fails").to_owned();
    let state = replica(monitor, "new").expect("still a replica");
    let stale = state["stale-bytes"].as_u64().expect("a number");
    assert_eq!(
        error,
        format!(
            "{} sectors could not be copied; new: write: {}",
            stale / 512,
            text_of_errno(errno)
        ),
        "{end}"
    );
    assert_eq!(state["state"], "syncing");
    assert!(
        stale > 0 && stale < SIZE_BYTES,
        "some of it was copied: {state}"
    );
    let is_report = |event: &Value| {
        event["event"] == "QUORUM_REPORT_BAD"
            && event["data"]["node-name"] == "new"
            && event["data"]["type"] == "write"
            && event["data"]["ret"] == -errno
    };
    monitor
        .wait_for_event(is_report, HANG_LIMIT)
        .expect("it is named with its errno");
    works(&mut disk.connect());
}

#[test]
fn a_resync_that_fails_midway_is_reported_and_its_replica_replaced() {
    let (target, other) = (new_image(), new_image());
    let disk = serve_with(&OUT_OF_THE_TREE);
    let _fault_guard = target.image.fault_guard();
    let (mut client, mut monitor) = (disk.connect(), disk.monitor());
    fill(&mut client);
    fail_midway(&disk, &mut monitor, &target.image, libc::EIO);
    // It does not count for the threshold: only one of the others can be removed.
    try_remove(&mut monitor, &node_name(0)).expect("two are left");
    let refused = try_remove(&mut monitor, &node_name(1)).expect_err("one would be left");
    assert_eq!(refused["class"], "GenericError");
    try_remove(&mut monitor, "new").expect("it holds nothing that others do not");
    works(&mut client);
    add(&mut monitor, &other.image.path(), "other");
    wait_until_in_service(&mut monitor, "other");
    works(&mut client);
    disk.end();
    let images = [&disk.images[1], &disk.images[2], &other.backing];
    assert!(are_identical(&images.map(Clone::clone)));
}

#[test]
fn a_resync_onto_a_full_file_system_continues_when_there_is_room() {
    let target = new_image();
    let disk = serve_with(&OUT_OF_THE_TREE);
    let _fault_guard = target.image.fault_guard();
    let (mut client, mut monitor) = (disk.connect(), disk.monitor());
    fill(&mut client);
    fail_midway(&disk, &mut monitor, &target.image, libc::ENOSPC);
    target.image.clear_faults();
    wait_until_in_service(&mut monitor, "new");
    works(&mut client);
    disk.end();
    let images = [&disk.images[..], std::slice::from_ref(&target.backing)].concat();
    assert!(are_identical(&images));
}

#[test]
fn a_resync_copies_what_has_a_quorum() {
    let target = new_image();
    let disk = serve(Plan {
        faulty: vec![0, 1],
        more: OUT_OF_THE_TREE.to_vec(),
        ..Plan::default()
    });
    let _fault_guard = target.image.fault_guard();
    let (mut client, mut monitor) = (disk.connect(), disk.monitor());
    fill(&mut client);
    // From 9 to 10 MiB neither can be read.
    let failing = |from, to| Fault::FailIn(libc::EIO, from * MEBIBYTE, to * MEBIBYTE);
    disk.faulty(0).inject(Operation::Read, failing(5, 10));
    disk.faulty(1).inject(Operation::Read, failing(9, 14));
    add(&mut monitor, &target.image.path(), "new");
    let end = end_of_resync(&mut monitor, "new");
    // The chunks that touch the range that two cannot read: one of 1 MiB, or two that meet there.
    let error = end["error"].as_str().expect("it failed");
    let (sectors, causes) = error
        .split_once(" sectors could not be copied; ")
        .expect(error);
    assert_eq!(
        causes,
        "r0: read: Input/output error; r1: read: Input/output error"
    );
    let sectors: u64 = sectors.parse().expect(error);
    assert!((2048..=4096).contains(&sectors), "{error}");
    let state = replica(&mut monitor, "new").expect("still a replica");
    assert_eq!(
        (&state["state"], &state["stale-bytes"]),
        (&json!("syncing"), &json!(sectors * 512))
    );
    // Ranges that two replicas can read are read.
    for place in [4, 8, 10, 13] {
        let read = client
            .read(0, place * MEBIBYTE, 64 << 10)
            .expect("a quorum");
        assert!(read.iter().all(|byte| *byte == mark(place)));
    }
    client.read(0, 9 * MEBIBYTE, 4096).expect_err("no quorum");

    disk.faulty(0).clear_faults();
    wait_until_in_service(&mut monitor, "new");
    disk.faulty(1).clear_faults();
    works(&mut client);
    disk.end();
    let images = [&disk.images[..], std::slice::from_ref(&target.backing)].concat();
    assert!(are_identical(&images));
}

#[test]
fn an_image_that_is_refused_changes_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = create_images(directory.path(), 1, SIZE_BYTES).remove(0);
    let path = |name| directory.path().join(name);
    let disk = serve_with(&ANYWHERE);
    let (mut client, mut monitor) = (disk.connect(), disk.monitor());
    fill(&mut client);
    let mut refused = |image: &Path, why: &str| {
        let error = try_add(&mut monitor, image, "new").expect_err(why);
        assert!(
            error.contains(why) && !error.contains('\n'),
            "{why}: {error}"
        );
        println!("{error}");
    };
    // A hard link and a symbolic link to a replica.
    fs::hard_link(&disk.images[0], path("hard.raw")).expect("a link");
    refused(&path("hard.raw"), "are the same image");
    std::os::unix::fs::symlink(&disk.images[1], path("soft.raw")).expect("a link");
    refused(&path("soft.raw"), "are the same image");
    let sized = |name, bytes| {
        let path = path(name);
        fs::File::create(&path)
            .and_then(|file| file.set_len(bytes))
            .expect("a file");
        path
    };
    refused(&sized("odd.raw", SIZE_BYTES - 100), "less than the disk");
    refused(&sized("empty.raw", 0), "empty");
    refused(directory.path(), "directory");
    refused(&path("missing.raw"), "No such file");
    // In use by QEMU.
    let plan = Plan {
        replicas: 1,
        threshold: 1,
        ..Plan::default()
    };
    let (mut qemu, _events) = Peer::start(directory.path(), std::slice::from_ref(&image), &plan);
    refused(&image, "in use by another process");
    qemu.terminate();
    let state = monitor.execute("query-quorum", json!({}));
    assert_eq!(state["replicas"].as_array().map(Vec::len), Some(3));
    assert_eq!(monitor.execute("query-jobs", json!({})), json!([]));
    works(&mut client);

    add(&mut monitor, &image, "new");
    wait_until_in_service(&mut monitor, "new");
    works(&mut client);
    disk.end();
    assert!(are_identical(
        &[&disk.images[..], std::slice::from_ref(&image)].concat()
    ));
}

/// tmpfs supports direct I/O since Linux 6.6, in blocks of a page, which is more than the block
/// size of this disk.
#[test]
fn an_image_on_tmpfs_is_accepted_or_refused_with_the_reason() {
    let directory = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let image = create_images(directory.path(), 1, SIZE_BYTES).remove(0);
    let disk = serve_with(&ANYWHERE);
    let (mut client, mut monitor) = (disk.connect(), disk.monitor());
    fill(&mut client);
    if let Err(error) = try_add(&mut monitor, &image, "new") {
        let reasons = [
            "does not support O_DIRECT; use --cache writeback",
            "needs blocks of 4096 bytes, and the disk has blocks of 512",
        ];
        assert!(
            reasons.iter().any(|reason| error.contains(reason)),
            "{error}"
        );
        works(&mut client);
        return;
    }
    wait_until_in_service(&mut monitor, "new");
    works(&mut client);
    disk.end();
    assert!(are_identical(
        &[&disk.images[..], std::slice::from_ref(&image)].concat()
    ));
}
