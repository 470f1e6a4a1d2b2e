//! The file system of the images has no space left while a guest writes: with `--werror enospc` the
//! guest waits until there is some, and its file system never knows.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::guest::GuestBuilder;
use testkit::images::{are_identical, create_images};
use testkit::monitor::Monitor;
use testkit::process::wait_until;
use testkit::small_disk::SmallDisk;

const MEBIBYTE: u64 = 1 << 20;
const IMAGE_BYTES: u64 = 64 * MEBIBYTE;
/// Room for all images once the ballast is gone.
const HOST_BYTES: u64 = 3 * IMAGE_BYTES + 8 * MEBIBYTE;
/// Leaves room for a new file system on three images, and for some of the file.
const BALLAST_BYTES: u64 = HOST_BYTES - 48 * MEBIBYTE;

#[test]
fn a_guest_waits_for_space_and_its_file_system_is_intact() {
    let directory = tempfile::tempdir().expect("creating a directory");
    let host = SmallDisk::mount(HOST_BYTES);
    let images = create_images(&host.path(), 3, IMAGE_BYTES);
    let ballast = host.path().join("ballast");
    let file = File::create_new(&ballast).expect("creating a file");
    let mebibyte = vec![1; usize::try_from(MEBIBYTE).expect("small")];
    for start in (0..BALLAST_BYTES).step_by(mebibyte.len()) {
        file.write_all_at(&mebibyte, start).expect("writing a file");
    }
    let qmp = directory.path().join("qmp-disk.sock");
    let mut arguments = replica_arguments(&images);
    // Nothing hangs here; the machine may be slow.
    let options = ["--cache", "writeback", "--replica-timeout", "30000"];
    arguments.extend(options.map(Into::into));
    arguments.extend(["--werror", "enospc", "--qmp"].map(Into::into));
    arguments.push(qmp.clone().into());
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());
    let mut monitor = Monitor::connect(&qmp);
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket()).start();
    guest.run_successfully(
        "/sbin/mke2fs -q -t ext4 -b 4096 /dev/vda && mount -o errors=remount-ro /dev/vda /mnt",
    );
    guest.run_successfully("dd if=/dev/urandom of=/tmp/file bs=1M count=24");
    let sum = guest.checksum("/tmp/file");

    guest.begin("cp /tmp/file /mnt/file && sync");
    let is_held = |event: &Value| event["event"] == "BLOCK_IO_ERROR";
    let event = events.wait_for(is_held, HANG_LIMIT).expect("no space left");
    assert_eq!(
        (&event["data"]["action"], &event["data"]["nospace"]),
        (&json!("stop"), &json!(true))
    );
    let status = monitor.execute("query-status", json!({}));
    assert_eq!(status, json!({ "running": false, "status": "io-error" }));
    fs::remove_file(&ballast).expect("removing a file");
    drop(file);
    monitor.execute("cont", json!({}));
    let copy = guest.finish();
    assert_eq!(copy.status, 0, "{copy:?}\n{}", daemon.log());
    let status = monitor.execute("query-status", json!({}));
    assert_eq!(status, json!({ "running": true, "status": "running" }));

    guest.run_successfully("echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(guest.checksum("/mnt/file"), sum);
    guest.run_successfully("umount /mnt && /sbin/e2fsck -fn /dev/vda");
    let console = guest.console_log();
    assert!(!console.contains("I/O error"), "{console}");
    // What a replica has missed for want of space, if another one had some left.
    let mut state = Value::Null;
    let fresh = wait_until(HANG_LIMIT, || {
        state = monitor.execute("query-quorum", json!({}));
        let replicas = state["replicas"].as_array().expect("replicas");
        let mut stale = replicas.iter().filter(|one| one["stale-bytes"] != 0);
        let Some(one) = stale.next() else { return true };
        // It may be under way.
        let _ = monitor.try_execute("quorum-resync", json!({ "node-name": one["node-name"] }));
        false
    });
    assert!(fresh, "{state:#}");
    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert!(are_identical(&images));
}
