//! A Linux guest works with ext4 on three images on disks with a full page cache: each flush takes
//! longer than the time limit of a replica. Nothing fails, and no replica is evicted.
//!
//! `QUORUM_BLK_SLOW_SECONDS` is how long the guest works; ten minutes show that nothing adds up.

use std::env;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::guest::GuestBuilder;
use testkit::images::{are_identical, create_images};
use testkit::monitor::Monitor;

const IMAGE_BYTES: u64 = 256 << 20;
/// Of a flush: about one and a half times `--replica-timeout`, which has its default.
const FLUSH: Fault = Fault::Delay(Duration::from_millis(1300), Duration::from_millis(1700));
/// How long the guest works if the environment does not say.
const SECONDS: u64 = 45;

/// Writes a file, syncs it, and reads it back from the disk, again and again; prints a line each
/// time. `NAME` and `SECONDS` are replaced.
const WORK: &str = "end=$(($(cut -d. -f1 /proc/uptime) + SECONDS)); n=0; \
    while [ $(cut -d. -f1 /proc/uptime) -lt $end ]; do n=$((n+1)); file=/mnt/NAME-$((n % 8)); \
    dd if=/dev/urandom of=/tmp/NAME bs=64k count=$((n % 24 + 1)) 2>/dev/null; \
    dd if=/tmp/NAME of=$file bs=64k conv=fsync 2>/dev/null || { echo NAME failed; break; }; \
    echo 3 >/proc/sys/vm/drop_caches; \
    cmp /tmp/NAME $file || { echo NAME failed; break; }; \
    echo NAME round $n; done";
/// How many of these work side by side.
const WORKERS: usize = 3;

#[test]
fn an_ext4_guest_works_on_replicas_whose_flushes_are_slow() {
    let seconds = match env::var("QUORUM_BLK_SLOW_SECONDS") {
        Ok(text) => text.parse().expect("QUORUM_BLK_SLOW_SECONDS is a number"),
        Err(_) => SECONDS,
    };
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, IMAGE_BYTES);
    let slow: Vec<_> = images.iter().map(|image| FuseImage::serve(image)).collect();
    let _fault_guards: Vec<_> = slow.iter().map(FuseImage::fault_guard).collect();
    let paths: Vec<_> = slow.iter().map(FuseImage::path).collect();
    let mut arguments = replica_arguments(&paths);
    for (argument, index) in arguments.iter_mut().skip(1).step_by(2).zip(0..) {
        argument.push(format!(",node-name=r{index}"));
    }
    let qmp = directory.path().join("qmp-disk.sock");
    arguments.extend(["--qmp".into(), qmp.clone().into()]);
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket()).start();
    for image in &slow {
        image.inject(Operation::Sync, FLUSH);
    }

    guest.run_successfully("/sbin/mke2fs -q -t ext4 -b 4096 /dev/vda");
    guest.run_successfully("mount -t ext4 -o errors=remount-ro /dev/vda /mnt");
    let work = WORK.replace("SECONDS", &seconds.to_string());
    let workers =
        (0..WORKERS).map(|index| format!("({}) &", work.replace("NAME", &format!("w{index}"))));
    let workers: String = workers.collect();
    let output = guest.run_successfully(&format!("{workers} wait"));
    let rounds = output.matches(" round ").count();
    let mounted = guest.answer("grep /mnt /proc/mounts");
    let state = Monitor::connect(&qmp).execute("query-quorum", json!({}));
    let evictions: u64 = (0..3)
        .map(|replica| state["replicas"][replica]["evictions"].as_u64().unwrap())
        .sum();
    println!(
        "figure: an ext4 guest for {seconds} s on flushes of 1.5 s: {rounds} rounds, {evictions} \
         evictions, failures {}, mounted as {mounted:?}",
        state["failures"]
    );
    assert!(!output.contains("failed"), "{output}");
    assert!(rounds > 0, "{output}");
    assert_eq!(evictions, 0, "{state:#}");
    assert_eq!(
        state["failures"],
        json!({ "read": 0, "write": 0, "flush": 0 })
    );
    assert!(mounted.contains(" rw,"), "{mounted}");
    let console = guest.console_log();
    assert!(!console.contains("I/O error"), "{console}");

    guest.run_successfully("umount /mnt && /sbin/e2fsck -fn /dev/vda");
    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert_eq!(events.all_but_jobs(), Vec::<Value>::new());
    assert!(are_identical(&images));
}
