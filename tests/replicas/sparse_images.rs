//! Large images with little data: jobs pass over what is a hole on every replica. A file system
//! that does not say where one has holes delays nothing but the answer.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};
use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::{allocated_bytes, are_identical, corrupt_sectors};
use testkit::load::figure;
use testkit::machine::shared;
use testkit::monitor::Monitor;
use testkit::process::wait_until;

use crate::faults::stale_bytes;

const MEBIBYTE: usize = 1 << 20;
const SIZE_BYTES: u64 = 8 << 40;
/// Places with data, of one MiB each, all over the disk.
const PLACES: u64 = 64;
/// More than this is never read for so little data.
const READ_BYTES_MAX: u64 = 16 << 30;

fn place(index: u64) -> u64 {
    index * (SIZE_BYTES / PLACES)
}

/// Images with the same data in the same places.
fn serve() -> Disk {
    let plan = Plan {
        size_bytes: SIZE_BYTES,
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    for image in &disk.images {
        let image = OpenOptions::new().write(true).open(image).unwrap();
        for index in 0..PLACES {
            image.write_all_at(&[7; MEBIBYTE], place(index)).unwrap();
        }
        image.sync_all().unwrap();
    }
    disk
}

/// An image of holes beside those of the disk.
fn new_image(disk: &Disk, size_bytes: u64) -> (PathBuf, File) {
    let image = disk.images[0].with_file_name("new.raw");
    let new = File::create_new(&image).unwrap();
    new.set_len(size_bytes).unwrap();
    (image, new)
}

/// Adds it.
fn add(monitor: &mut Monitor, image: &Path) {
    monitor.execute(
        "blockdev-add",
        json!({ "driver": "file", "node-name": "new", "filename": image }),
    );
    monitor.execute(
        "x-blockdev-change",
        json!({ "parent": "quorum0", "node": "new", "force": true }),
    );
}

/// The bytes that were read from the first replica.
fn read_bytes(state: &Value) -> u64 {
    let bytes = &state["replicas"][0]["operations"]["read"]["bytes"];
    bytes.as_u64().expect("a number")
}

#[test]
fn a_scrub_of_8_tib_with_little_data_is_a_matter_of_the_data() {
    let _machine = shared();
    let disk = serve();
    // It looks at all that is there, and at what only one replica has, or has not.
    let sector = place(PLACES - 1) / 512 + 100;
    corrupt_sectors(&disk.images[1], sector..sector + 3, 0x55);
    let sector = (place(3) + (1 << 30)) / 512;
    corrupt_sectors(&disk.images[1], sector..sector + 2, 0x55);
    let image = OpenOptions::new()
        .write(true)
        .open(&disk.images[2])
        .unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&image, punch, place(5), MEBIBYTE as u64).unwrap();
    image.sync_all().unwrap();
    let mut monitor = disk.monitor();
    let id = monitor.execute("quorum-scrub", json!({}))["id"].clone();
    let mut ended = false;
    let mut progress = Value::Null;
    wait_until(HANG_LIMIT, || {
        let jobs = monitor.execute("query-jobs", json!({}));
        let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == id);
        match job {
            Some(job) => progress = job["current-progress"].clone(),
            None => ended = true,
        }
        ended || read_bytes(&disk.state()) > READ_BYTES_MAX
    });
    let state = disk.state();
    figure(
        "a scrub of 8 TiB with 64 MiB of data",
        &format!(
            "{} bytes read of each replica, ended: {ended}, at {progress} when last seen",
            read_bytes(&state)
        ),
    );
    assert!(ended, "{state:#}");
    assert!(read_bytes(&state) <= READ_BYTES_MAX);
    for (replica, sectors) in [(0, 0), (1, 5), (2, MEBIBYTE / 512)] {
        let found = &state["replicas"][replica]["corrupt-sectors-found"];
        assert_eq!(*found, sectors, "{state:#}");
    }
}

#[test]
fn a_replica_is_added_to_8_tib_with_little_data_at_its_price() {
    let _machine = shared();
    let disk = serve();
    let (image, new) = new_image(&disk, SIZE_BYTES);
    // Old data where the others have a hole.
    let old = place(7) + (1 << 30);
    new.write_all_at(&[9; MEBIBYTE], old).unwrap();
    new.sync_all().unwrap();
    add(&mut disk.monitor(), &image);
    let mut left = u64::MAX;
    wait_until(HANG_LIMIT, || {
        let state = disk.state();
        left = stale_bytes(&state, 3);
        left == 0 || read_bytes(&state) > READ_BYTES_MAX
    });
    let state = disk.state();
    figure(
        "a replica added to 8 TiB with 64 MiB of data",
        &format!(
            "{} bytes read of each replica, {left} bytes stay stale, {} bytes allocated",
            read_bytes(&state),
            allocated_bytes(&image)
        ),
    );
    assert_eq!(left, 0);
    assert!(read_bytes(&state) <= READ_BYTES_MAX);
    let copy = File::open(&image).unwrap();
    for index in 0..PLACES {
        let mut bytes = vec![0; MEBIBYTE];
        copy.read_exact_at(&mut bytes, place(index)).unwrap();
        assert!(bytes == [7; MEBIBYTE], "place {index}");
    }
    let mut bytes = vec![1; MEBIBYTE];
    copy.read_exact_at(&mut bytes, old).unwrap();
    assert!(bytes == [0; MEBIBYTE], "old data");
    assert!(
        allocated_bytes(&image) < (4 * PLACES) << 20,
        "holes stay holes"
    );
}

/// Starts a job on replicas of which one hangs when it is asked for holes. Meanwhile the guest
/// writes, and the job ends.
fn hang(start: impl FnOnce(&Disk, &mut Monitor), has_ended: impl Fn(&Disk, &mut Monitor) -> bool) {
    let disk = Disk::start(
        System::Ours,
        &Plan {
            faulty: vec![0],
            size_bytes: 64 << 20,
            replica_timeout: Duration::from_millis(500),
            ..Plan::default()
        },
    );
    let fuse = disk.faulty(0);
    let _fault_guard = fuse.fault_guard();
    fuse.answer_where_holes_are();
    // The start looks for data, too.
    let asked = fuse.asked(Operation::FindData);
    let done = fuse.done(Operation::FindData);
    fuse.inject(Operation::FindData, Fault::Hang);
    let (mut client, mut monitor) = (disk.connect(), disk.monitor());
    start(&disk, &mut monitor);
    let is_asked = || fuse.asked(Operation::FindData) > asked;
    assert!(wait_until(HANG_LIMIT, is_asked), "{:#}", disk.state());
    // The kernel keeps writes of a file waiting while it asks its file system for holes.
    for place in 0..4 {
        client.write(0, place << 24, &[5; 4096]).unwrap();
        assert_eq!(client.read(0, place << 24, 4096).unwrap(), [5; 4096]);
    }
    let ended = wait_until(HANG_LIMIT, || has_ended(&disk, &mut monitor));
    assert!(ended, "{:#}", disk.state());
    assert_eq!(fuse.done(Operation::FindData), done, "it hangs still");
    fuse.clear_faults();
    disk.state_when(|state| stale_bytes(state, 0) == 0);
    drop(client);
    disk.end();
    assert!(are_identical(&disk.images));
}

#[test]
fn a_replica_asked_for_holes_that_hangs_delays_no_scrub() {
    let _machine = shared();
    hang(
        |_, monitor| drop(monitor.execute("quorum-scrub", json!({}))),
        |_, monitor| monitor.execute("query-jobs", json!({})) == json!([]),
    );
}

#[test]
fn a_replica_asked_for_holes_that_hangs_delays_no_resync() {
    let _machine = shared();
    hang(
        |disk, monitor| add(monitor, &new_image(disk, 64 << 20).0),
        |disk, _| stale_bytes(&disk.state(), 3) == 0,
    );
}
