//! Two virtual machines on one socket: two guests that mount one file system destroy it.

use std::fs;

use serde_json::Value;
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::guest::GuestBuilder;
use testkit::images::{are_identical, create_images};
use testkit::process::wait_until;

/// Writes files and syncs them until there is `/tmp/end`.
const WORK: &str = "round=0; until [ -e /tmp/end ]; do round=$((round + 1)); \
    dd if=/dev/urandom of=/mnt/$((round % 8)) bs=64k count=4 conv=fsync 2>/dev/null || exit 1; \
    done";

#[test]
fn a_second_guest_has_no_disk_until_the_first_has_ended() {
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, 64 << 20);
    let mut daemon = Daemon::start_with_records(directory.path(), replica_arguments(&images));
    let events = EventReader::connect(daemon.events_socket());
    let guest = |name: &str| {
        let directory = directory.path().join(name);
        fs::create_dir(&directory).expect("creating a directory");
        GuestBuilder::new(&directory, daemon.socket())
    };

    let mut first = guest("first").start();
    first.run_successfully("/sbin/mke2fs -q -t ext4 -b 4096 /dev/vda");
    first.run_successfully("mount -t ext4 -o errors=remount-ro /dev/vda /mnt");
    first.run_successfully("dd if=/dev/urandom of=/mnt/file bs=64k count=64 conv=fsync");
    let sum = first.checksum("/mnt/file");
    first.run_successfully(&format!(
        "(({WORK}); echo $? >/tmp/status) >/dev/null 2>&1 &"
    ));

    let second = guest("second").start_without_waiting();
    let is_rejected = || {
        let log = daemon.log();
        log.contains("frontend rejected: another one uses the disk")
    };
    assert!(
        wait_until(HANG_LIMIT, is_rejected),
        "the second guest has the disk"
    );
    assert!(
        !second.console_log().contains("[vda]"),
        "{}",
        second.console_log()
    );
    second.quit();

    // The first one still works, and cleanly.
    first.run_successfully("touch /tmp/end; until [ -e /tmp/status ]; do sleep 0.1; done");
    assert_eq!(first.answer("cat /tmp/status"), "0");
    first.run_successfully("umount /mnt && /sbin/e2fsck -fn /dev/vda");
    first.poweroff();

    let mut next = guest("next").start();
    next.run_successfully("/sbin/e2fsck -fn /dev/vda && mount -t ext4 /dev/vda /mnt");
    assert_eq!(next.checksum("/mnt/file"), sum);
    next.run_successfully("umount /mnt");
    next.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert_eq!(events.all_but_jobs(), Vec::<Value>::new());
    assert!(are_identical(&images));
}
