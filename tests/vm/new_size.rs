//! A Linux guest sees its disk grow while it runs, and uses the new part.

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::guest::GuestBuilder;
use testkit::images::{are_identical, create_images};
use testkit::monitor::Monitor;
use testkit::process::wait_until;

const SIZE_BYTES: u64 = 64 << 20;
const NEW_BYTES: u64 = 160 << 20;

#[test]
fn a_running_guest_sees_the_new_size_and_uses_it() {
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, SIZE_BYTES);
    let monitor = directory.path().join("blkd-qmp.sock");
    let mut arguments = replica_arguments(&images);
    arguments.extend(["--qmp".into(), monitor.clone().into()]);
    // Nothing hangs here; the machine may be slow.
    arguments.extend(["--replica-timeout", "30000", "-v"].map(Into::into));
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket()).start();
    let mut monitor = Monitor::connect(&monitor);
    let sectors = |bytes: u64| (bytes / 512).to_string();
    assert_eq!(guest.answer("cat /sys/block/vda/size"), sectors(SIZE_BYTES));
    guest.run_successfully("mke2fs -b 4096 /dev/vda && mount -o noatime /dev/vda /mnt");
    guest.run_successfully("dd if=/dev/urandom of=/mnt/file bs=1M count=16 conv=fsync");
    let sum = guest.checksum("/mnt/file");

    // A write is in flight meanwhile.
    guest.begin("dd if=/dev/urandom of=/mnt/other bs=1M count=24 conv=fsync");
    monitor.execute(
        "block_resize",
        json!({ "node-name": "quorum0", "size": NEW_BYTES }),
    );
    assert_eq!(guest.finish().status, 0);
    let seen = wait_until(HANG_LIMIT, || {
        guest.answer("cat /sys/block/vda/size") == sectors(NEW_BYTES)
    });
    assert!(seen, "{}", daemon.log());
    let said = "vda: detected capacity change from 131072 to 327680";
    assert!(guest.console_log().contains(said) || guest.answer("dmesg").contains(said));
    // From before the old end to the new one, past the cache.
    let blocks = (NEW_BYTES - SIZE_BYTES) >> 20;
    guest.run_successfully(&format!(
        "dd if=/dev/vda bs=1M skip={} count={blocks} | cmp -n {} - /dev/zero",
        SIZE_BYTES >> 20,
        NEW_BYTES - SIZE_BYTES
    ));
    guest.run_successfully("dd if=/dev/urandom of=/tmp/new bs=1M count=8");
    let new_sum = guest.checksum("/tmp/new");
    let last = (NEW_BYTES >> 20) - 8;
    guest.run_successfully(&format!(
        "dd if=/tmp/new of=/dev/vda bs=1M seek={last} conv=fsync"
    ));
    guest.run_successfully("rm /tmp/new; sync; echo 3 >/proc/sys/vm/drop_caches");
    guest.run_successfully(&format!(
        "dd if=/dev/vda of=/tmp/new bs=1M skip={last} count=8"
    ));
    assert_eq!(guest.checksum("/tmp/new"), new_sum);
    assert_eq!(guest.checksum("/mnt/file"), sum);
    guest.run_successfully("umount /mnt");
    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert!(are_identical(&images));
    assert_eq!(images[0].metadata().expect("an image").len(), NEW_BYTES);
}
