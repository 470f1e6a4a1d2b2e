//! A Linux guest does not notice that its daemon is killed, or replaced by another, while it works.
//! QEMU connects again (`reconnect=1`) and hands over the requests in flight.

use testkit::HANG_LIMIT;

use testkit::daemon::{Daemon, replica_arguments};
use testkit::fuse::{FuseImage, Operation};
use testkit::guest::{Guest, GuestBuilder};
use testkit::images::{allocated_bytes, are_identical, create_images};
use testkit::process::wait_until;

const COLD_CACHE: &str = "sync; echo 3 >/proc/sys/vm/drop_caches";

/// The daemon is killed, or stopped and replaced, while a guest copies files. The guest only
/// notices a pause.
#[test]
fn a_copy_goes_on_when_the_daemon_is_killed_or_replaced() {
    const ROUNDS: usize = 6;
    const KILLED_IN: [usize; 3] = [1, 2, 4];
    const REPLACED_IN: [usize; 2] = [3, 5];

    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, 256 << 20);
    // Nothing hangs here; the machine may be slow.
    let arguments = || {
        let mut arguments = replica_arguments(&images);
        arguments.extend(["--num-queues", "2", "--replica-timeout", "30000"].map(Into::into));
        arguments
    };
    let mut daemon = Daemon::start_with_records(directory.path(), arguments());
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
        .queues(2)
        .cpus(2)
        .reconnect()
        .start();
    guest.run_successfully(
        "/sbin/mke2fs -q -t ext4 -b 4096 /dev/vda && mount -t ext4 -o noatime /dev/vda /mnt",
    );
    guest.run_successfully("dd if=/dev/urandom of=/mnt/source bs=1M count=16 conv=fsync");
    let sum = guest.checksum("/mnt/source");

    // Reads and writes are in flight at the same time.
    guest.begin(&format!(
        "cd /mnt; for round in $(seq {ROUNDS}); do echo round $round; \
         echo 3 >/proc/sys/vm/drop_caches; \
         sha512sum <source >/tmp/sum & reader=$!; \
         cp source copy-$round && sync && wait $reader || exit 1; \
         echo \"{sum}  -\" | cmp - /tmp/sum || exit 1; done"
    ));
    for round in 1..=ROUNDS {
        guest.wait_for_output(&format!("round {round}\n"));
        let is_killed = KILLED_IN.contains(&round);
        if !is_killed && !REPLACED_IN.contains(&round) {
            continue;
        }
        let allocated_before = allocated_bytes(&images[0]);
        let is_writing = || allocated_bytes(&images[0]) > allocated_before + (1 << 20);
        assert!(
            wait_until(HANG_LIMIT, is_writing),
            "round {round} writes nothing"
        );
        if is_killed {
            println!("killing the daemon in round {round}");
            drop(daemon);
        } else {
            println!("replacing the daemon in round {round}");
            assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
        }
        daemon = Daemon::start_with_records(directory.path(), arguments());
    }
    let copy = guest.finish();
    assert_eq!(copy.status, 0, "{copy:?}");
    let logs = daemon.log();
    println!("{logs}");
    assert!(
        logs.contains("requests in flight are submitted again"),
        "no kill hit a request"
    );

    guest.run_successfully(COLD_CACHE);
    for round in 1..=ROUNDS {
        assert_eq!(
            guest.checksum(&format!("/mnt/copy-{round}")),
            sum,
            "round {round}"
        );
    }
    guest.run_successfully("umount /mnt && e2fsck -fn /dev/vda");
    let console = guest.console_log();
    for complaint in [
        "I/O error",
        "EXT4-fs error",
        "EXT4-fs warning",
        "blocked for more than",
    ] {
        assert!(!console.contains(complaint), "{console}");
    }
    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert!(are_identical(&images));
}

/// A guest that has switched its disk to write-through does not flush any more.
#[test]
fn write_through_makes_every_write_durable() {
    write_through(|daemon, _| daemon);
}

/// QEMU does not send a new daemon the cache mode that the guest has chosen.
#[test]
fn write_through_holds_when_the_daemon_is_replaced() {
    write_through(|mut daemon, start| {
        assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
        start()
    });
}

/// Makes the guest switch to write-through; then `replaced` returns another daemon or the same.
fn write_through(replaced: impl FnOnce(Daemon, &dyn Fn() -> Daemon) -> Daemon) {
    let directory = tempfile::tempdir().expect("creating a directory");
    let mut images = create_images(directory.path(), 3, 8 << 20);
    let watched = FuseImage::serve(&images[0]);
    images[0] = watched.path();
    let start = || Daemon::start_with_records(directory.path(), replica_arguments(&images));
    let daemon = start();
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
        .reconnect()
        .start();
    let durable = || watched.done(Operation::Sync);
    let made_durable = |guest: &mut Guest| {
        let before = durable();
        guest.run_successfully(
            "dd if=/dev/urandom of=/dev/vda bs=4k count=1 oflag=direct conv=notrunc",
        );
        durable() - before
    };

    assert_eq!(guest.answer("cat /sys/block/vda/cache_type"), "write back");
    assert_eq!(made_durable(&mut guest), 0);
    guest.run_successfully("echo write through >/sys/block/vda/cache_type");
    let mut daemon = replaced(daemon, &start);
    assert_eq!(
        guest.answer("cat /sys/block/vda/cache_type"),
        "write through"
    );
    assert_ne!(made_durable(&mut guest), 0, "writes are not durable");
    // One with O_DSYNC might report the loss of another one.
    assert_eq!(watched.durable_writes(), 0);

    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
}
