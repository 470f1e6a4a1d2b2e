//! fio works in a Linux guest and verifies what it has written, over a disk of which one replica is
//! corrupted, is slow, or hangs again and again. The guest reads nothing wrong and gets no error,
//! and in the end all images are equal and the disk is healthy.
//!
//! Beside fio, which works on a partition and on files in ext4, a shell loop (`EXERCISER`) changes
//! one file in many ways and compares it with a model, as fsx does: Debian has no package of fsx,
//! fsstress or xfstests.
//!
//! `QUORUM_BLK_VERIFY_SECONDS` is how long the guest works in each test; else it is short.

use std::collections::VecDeque;
use std::env;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::guest::{Guest, GuestBuilder};
use testkit::images::{
    BLOCK_BYTES, BLOCK_SECTORS, Random, are_identical, corrupt_sectors, create_images,
};
use testkit::monitor::Monitor;
use testkit::process::wait_until;
use testkit::stop::StopOnDrop;

use crate::operator::Operator;

const MIB: u64 = 1 << 20;
const IMAGE_BYTES: u64 = 48 * MIB;

/// The replica at fault.
const VICTIM: usize = 1;

/// Makes two partitions of equal size, and ext4 in the first one.
const PREPARE: &str = "mkdir /programs && mount -t ext4 -o ro /dev/vdb /programs && \
    printf 'n\\np\\n1\\n\\n+24M\\nn\\np\\n2\\n\\n\\nw\\n' | fdisk /dev/vda >/dev/null && \
    /sbin/mke2fs -q -t ext4 -b 4096 /dev/vda1 && \
    mount -t ext4 -o discard,errors=remount-ro /dev/vda1 /mnt && \
    head -c 1048576 /dev/zero >/tmp/zeroes";

/// Changes a file in ext4 and a model of it in memory in the same way, and compares them, again and
/// again: it writes, cuts, extends, makes holes, syncs, and forgets what the guest has cached.
const EXERCISER: &str = "file=/mnt/exercised; model=/tmp/model; : >$file; : >$model; n=0; \
    while [ ! -e /tmp/stop ]; do n=$((n + 1)); \
    at=$((RANDOM * 16)); length=$((RANDOM + 1)); \
    head -c $length /dev/urandom >/tmp/data; \
    for to in $file $model; do case $((n * 7 % 5)) in \
    0|1) dd if=/tmp/data of=$to bs=64k seek=$at oflag=seek_bytes conv=notrunc status=none;; \
    2) truncate -s $at $to;; \
    3) /sbin/fallocate -p -o $at -l $length $to;; \
    4) dd if=/dev/null of=$to conv=notrunc,fsync status=none;; \
    esac; done; \
    if [ $((n % 4)) = 0 ]; then sync; echo 3 >/proc/sys/vm/drop_caches; fi; \
    cmp $file $model || { echo the file differs after step $n; break; }; \
    echo $n >/tmp/steps; done; touch /tmp/exerciser-ended";

/// Ends it, and prints what it said and the number of its steps.
const END_OF_EXERCISER: &str = "touch /tmp/stop; \
    until [ -e /tmp/exerciser-ended ]; do sleep 0.1; done; \
    rm /tmp/exerciser-ended; cat /tmp/exerciser /tmp/steps";

const COLD_CACHE: &str = "sync; echo 3 >/proc/sys/vm/drop_caches";

/// What fio does in each round, side by side. Each block that it writes has a checksum, or the
/// number of the round (PATTERN) and its place, which older data has not.
const JOBS: &[&str] = &[
    "--name=io_uring --filename=/dev/vda2 --offset=0 --size=1M --rw=randwrite --bs=8k \
     --ioengine=io_uring --iodepth=16 --direct=1 --fsync=16 --verify=pattern PATTERN",
    "--name=sectors --filename=/dev/vda2 --offset=2M --size=48k --rw=randwrite --bs=512 \
     --ioengine=psync --direct=1 --verify=pattern PATTERN",
    "--name=mapped --directory=/mnt --size=1M --rw=randwrite --bs=4k \
     --ioengine=mmap --fsync=64 --verify=pattern PATTERN",
    "--name=files --directory=/mnt --nrfiles=4 --size=1M --rw=randwrite --bs=16k \
     --ioengine=psync --fdatasync=8 --verify=pattern PATTERN",
    "--name=libaio --filename=/dev/vda2 --offset=4M --size=2M --rw=randrw --bs=4k \
     --ioengine=libaio --iodepth=8 --direct=1 --verify=crc32c --verify_backlog=64",
    "--name=trimmed --filename=/dev/vda2 --offset=8M --size=1M --rw=trimwrite --bs=16k \
     --ioengine=psync --direct=1 --verify=md5",
    "--name=discarded --filename=/dev/vda2 --offset=12M --size=1M --rw=randtrim --bs=32k \
     --ioengine=psync --direct=1",
];
/// The last one of them leaves zeroes.
const COMPARE_DISCARDED: &str = "dd if=/dev/vda2 bs=1M skip=12 count=1 iflag=direct status=none | \
    cmp - /tmp/zeroes";
/// The first ones of them can be verified once more, from the disk and not from a cache.
const JOBS_VERIFIED_AGAIN: usize = 4;
/// The first ones of them discard nothing.
const JOBS_THAT_DISCARD_NOTHING: usize = 5;

/// What a guest does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// All jobs and the exerciser.
    All,
    /// Jobs that only read, write and flush.
    NoDiscards,
}

#[test]
fn a_guest_that_verifies_all_it_writes_does_not_notice_corruption() {
    // Nothing hangs here; the machine may be slow.
    let arguments = ["--replica-timeout", "60000", "--rewrite-corrupted"];
    let limit = ["--repair-limit", "1T", "--scrub-around", "1"];
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, IMAGE_BYTES);
    let mut disk = Disk::start(directory, &images, &[arguments.as_slice(), &limit].concat());
    let mut random = Random::from_environment();

    let stop = AtomicBool::new(false);
    let (rounds, corrupted) = thread::scope(|scope| {
        let corrupted = scope.spawn(|| corrupt(&images[VICTIM], &stop, &mut random));
        let stopped = StopOnDrop(&stop);
        let rounds = disk.work(Work::All, time(), |_| true);
        drop(stopped);
        (rounds, corrupted.join().expect("no panic"))
    });
    let events = disk.settle(&images);
    let reports = named(&events, "QUORUM_REPORT_BAD");
    println!(
        "figure: {rounds} rounds of fio over a corrupting replica: changed {corrupted} times, {} \
         events",
        reports.len()
    );
    assert!(!reports.is_empty());
    assert_eq!(of_corruption(&events), reports);
    for report in reports {
        assert_eq!(report["data"]["node-name"], node(VICTIM), "{report}");
    }
}

#[test]
fn a_guest_that_verifies_all_it_writes_works_over_a_slow_replica() {
    const TIMEOUT_MS: u64 = 4000;
    let ms = Duration::from_millis;
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, IMAGE_BYTES);
    let slow = FuseImage::serve(&images[VICTIM]);
    let _guard = slow.fault_guard();
    let paths = [images[0].clone(), slow.path(), images[2].clone()];
    let timeout = TIMEOUT_MS.to_string();
    let mut disk = Disk::start(directory, &paths, &["--replica-timeout", &timeout]);

    // It is slower than the others, but no operation takes as long as the limit.
    for operation in [Operation::Read, Operation::Write] {
        slow.inject(operation, Fault::Delay(ms(5), ms(20)));
    }
    slow.inject(Operation::Sync, Fault::Delay(ms(50), ms(150)));
    let mut rounds = disk.work(Work::All, time() / 2, |_| true);
    assert_eq!(disk.evictions(VICTIM), 0, "it was never late");

    // The guest reads one block after another. It does not wait for the slow replica: that one has
    // several reads to do at a time.
    slow.clear_faults();
    slow.inject(Operation::Read, Fault::Delay(ms(1500), ms(1800)));
    let reads_at_first = slow.asked(Operation::Read);
    let began = Instant::now();
    disk.guest.run_successfully(
        "for block in $(seq 0 15); do \
         dd if=/dev/vda2 bs=4k skip=$((block * 16)) count=1 iflag=direct status=none | \
         wc -c; done | sort | uniq -c",
    );
    let asked = slow.asked(Operation::Read);
    let waiting = asked - slow.done(Operation::Read);
    println!(
        "figure: {} of {} reads of the slow replica unanswered when the guest had its data",
        waiting,
        asked - reads_at_first
    );
    // On a busy host the guest itself may need long for each.
    let waits = waiting <= 1 && began.elapsed() >= 16 * ms(1500);
    assert!(!waits, "the guest waited for the slow replica");
    assert_eq!(disk.evictions(VICTIM), 0, "it was never late");

    // Now each read and write takes longer than the limit. Nothing is discarded: a replica that
    // zeroes may take longer.
    for operation in [Operation::Read, Operation::Write] {
        slow.inject(
            operation,
            Fault::Delay(ms(TIMEOUT_MS * 3 / 2), ms(TIMEOUT_MS * 2)),
        );
    }
    rounds += disk.work(Work::NoDiscards, time() / 2, |disk| {
        disk.evictions(VICTIM) > 0
    });
    slow.clear_faults();
    let evictions = disk.evictions(VICTIM);
    println!("figure: {rounds} rounds of fio over a slow replica: {evictions} evictions");
    let events = disk.settle(&images);
    assert_ne!(named(&events, "QUORUM_REPLICA_REJOINED"), [] as [&Value; 0]);
    assert_eq!(of_corruption(&events), [] as [&Value; 0]);
}

#[test]
fn a_guest_that_verifies_all_it_writes_works_over_a_flapping_replica() {
    const TIMEOUT: Duration = Duration::from_millis(500);
    /// In a short run: with a third eviction the disk would not be healthy for ten minutes.
    const FLAPS: u64 = 2;

    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, IMAGE_BYTES);
    let flapping = FuseImage::serve(&images[VICTIM]);
    let _guard = flapping.fault_guard();
    let paths = [images[0].clone(), flapping.path(), images[2].clone()];
    let timeout = TIMEOUT.as_millis().to_string();
    let mut disk = Disk::start(directory, &paths, &["--replica-timeout", &timeout]);

    let is_long = !time().is_zero();
    let stop = AtomicBool::new(false);
    let monitor = disk.operator.monitor.clone();
    let has_flapped = AtomicBool::new(false);
    let rounds = thread::scope(|scope| {
        scope.spawn(|| {
            let mut monitor = Monitor::connect(&monitor);
            let mut flaps = 0;
            while !stop.load(Ordering::Relaxed) && (is_long || flaps < FLAPS) {
                flaps += u64::from(flap(&flapping, &mut monitor, &stop));
                has_flapped.store(flaps >= FLAPS, Ordering::Relaxed);
            }
        });
        let _stopped = StopOnDrop(&stop);
        disk.work(Work::All, time(), |_| has_flapped.load(Ordering::Relaxed))
    });
    let evictions = disk.evictions(VICTIM);
    let events = disk.settle(&images);
    let rejoined = named(&events, "QUORUM_REPLICA_REJOINED").len();
    println!(
        "figure: {rounds} rounds of fio over a flapping replica: {evictions} evictions, \
         rejoined {rejoined} times"
    );
    assert!(evictions >= FLAPS && rejoined > 0, "{events:?}");
    assert_eq!(of_corruption(&events), [] as [&Value; 0]);
}

/// A voted disk, a guest that works on it, and an operator.
struct Disk {
    guest: Guest,
    daemon: Daemon,
    events: EventReader,
    operator: Operator,
    /// Rounds of fio so far.
    round: u16,
    _directory: TempDir,
}

impl Disk {
    fn start(directory: TempDir, paths: &[PathBuf], more: &[&str]) -> Self {
        let mut arguments = replica_arguments(paths);
        for (argument, index) in arguments.iter_mut().skip(1).step_by(2).zip(0..) {
            argument.push(format!(",node-name={}", node(index)));
        }
        let monitor = directory.path().join("qmp-disk.sock");
        arguments.extend(["--qmp".into(), monitor.clone().into()]);
        arguments.extend(more.iter().map(Into::into));
        let daemon = Daemon::start_with_records(directory.path(), arguments);
        let events = EventReader::connect(daemon.events_socket());
        let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
            .programs("fio")
            .cpus(2)
            .start();
        guest.run_successfully(PREPARE);
        Self {
            guest,
            daemon,
            events,
            operator: Operator { monitor },
            round: 0,
            _directory: directory,
        }
    }

    /// The guest works for this long, and until `is_enough`. Returns the number of rounds.
    fn work(&mut self, work: Work, time: Duration, is_enough: impl Fn(&Self) -> bool) -> u16 {
        let end = Instant::now() + time;
        let hang = end + HANG_LIMIT;
        let rounds_before = self.round;
        let jobs = match work {
            Work::All => JOBS,
            Work::NoDiscards => &JOBS[..JOBS_THAT_DISCARD_NOTHING],
        };
        if work == Work::All {
            let exerciser = format!("rm -f /tmp/stop; ({EXERCISER}) >/tmp/exerciser 2>&1 &");
            self.guest.run_successfully(&exerciser);
        }
        loop {
            self.round += 1;
            self.guest.run_successfully(&fio(jobs, self.round, ""));
            self.guest.run_successfully(COLD_CACHE);
            if work == Work::All {
                self.guest.run_successfully(COMPARE_DISCARDED);
            }
            let again = &jobs[..JOBS_VERIFIED_AGAIN];
            self.guest
                .run_successfully(&fio(again, self.round, "--verify_only"));
            if Instant::now() >= end && is_enough(self) {
                break;
            }
            assert!(Instant::now() < hang, "what was waited for did not happen");
        }
        if work == Work::All {
            let steps = self.guest.answer(END_OF_EXERCISER);
            assert!(steps.parse::<u64>().is_ok_and(|steps| steps > 0), "{steps}");
        }
        self.round - rounds_before
    }

    fn evictions(&self, replica: usize) -> u64 {
        let state = Monitor::connect(&self.operator.monitor).execute("query-quorum", json!({}));
        state["replicas"][replica]["evictions"]
            .as_u64()
            .expect("a number")
    }

    /// Ends the work of the guest, has the operator repair what is left to repair, and ends the
    /// daemon. Returns the events.
    fn settle(mut self, images: &[PathBuf]) -> Vec<Value> {
        self.guest
            .run_successfully("umount /mnt && /sbin/e2fsck -fn /dev/vda1");
        let console = self.guest.console_log();
        assert!(!console.contains("I/O error"), "{console}");
        assert!(!console.contains("EXT4-fs error"), "{console}");

        let mut monitor = Monitor::connect(&self.operator.monitor);
        let mut state = Value::Null;
        let is_complete = wait_until(2 * HANG_LIMIT, || {
            state = monitor.execute("query-quorum", json!({}));
            let conditions = state["replicas"].as_array().expect("replicas").iter();
            let mut conditions =
                conditions.flat_map(|replica| replica["conditions"].as_array().expect("an array"));
            !conditions.any(|condition| condition == "evicted" || condition == "stale")
        });
        assert!(is_complete, "{state:#}");
        assert_eq!(self.operator.run(&["scrub", "--repair"]), 0);
        assert_eq!(self.operator.run(&["scrub"]), 0);
        assert_eq!(self.operator.run(&["clear"]), 0);
        let status = self.operator.run(&["status"]);
        let state = monitor.execute("query-quorum", json!({}));
        assert_eq!(
            state["failures"],
            json!({ "read": 0, "write": 0, "flush": 0 })
        );
        // Three evictions make a disk not healthy for ten minutes.
        let replicas = state["replicas"].as_array().expect("replicas").iter();
        let is_flapping = |replica: &Value| replica["conditions"] == json!(["flapping"]);
        let flapping = replicas.clone().filter(|replica| is_flapping(replica));
        let healthy = replicas.filter(|replica| replica["conditions"] == json!([]));
        assert_eq!(healthy.count() + flapping.clone().count(), 3, "{state:#}");
        assert_eq!(status, i32::from(flapping.count() > 0), "{state:#}");

        self.guest.poweroff();
        let daemon = &mut self.daemon;
        assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
        let events = self.events.all_until_closed();
        assert_eq!(named(&events, "QUORUM_FAILURE"), [] as [&Value; 0]);
        assert!(are_identical(images), "the images differ");
        events
    }
}

/// The name of a replica.
fn node(replica: usize) -> String {
    format!("r{replica}")
}

/// How long the guest works in each test: as long as the environment says, or one round.
fn time() -> Duration {
    let seconds = match env::var("QUORUM_BLK_VERIFY_SECONDS") {
        Ok(text) => text.parse().expect("QUORUM_BLK_VERIFY_SECONDS is a number"),
        Err(_) => 0,
    };
    Duration::from_secs(seconds)
}

/// A command for the guest.
fn fio(jobs: &[&str], round: u16, option: &str) -> String {
    let pattern = format!("--verify_pattern=0x{round:04x}%o");
    let jobs = jobs.join(" ").replace("PATTERN", &pattern);
    format!(
        "/programs/fio --output=/tmp/fio --name=global --eta=never --verify_state_save=0 \
         --verify_fatal=1 --allow_file_create=1 --randseed={round} {option} {jobs} || \
         {{ grep -v '^ ' /tmp/fio; false; }}"
    )
}

/// Changes the image until `stop`: inverts bits of sectors, and gives blocks back what they held
/// before. Returns how often it did so.
fn corrupt(image: &Path, stop: &AtomicBool, random: &mut Random) -> u64 {
    const PAUSE: Duration = Duration::from_millis(5);
    /// A block gets its content back after as many others.
    const OLDER: usize = 64;
    let file = OpenOptions::new().read(true).write(true).open(image);
    let file = file.expect("opening an image");
    let mut older: VecDeque<(u64, Vec<u8>)> = VecDeque::new();
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        let block = random.within(0..IMAGE_BYTES / BLOCK_BYTES);
        let mut content = vec![0; usize::try_from(BLOCK_BYTES).expect("small")];
        file.read_exact_at(&mut content, block * BLOCK_BYTES)
            .expect("reading an image");
        older.push_back((block, content));
        if older.len() > OLDER {
            let (block, content) = older.pop_front().expect("not empty");
            file.write_all_at(&content, block * BLOCK_BYTES)
                .and_then(|()| file.sync_data())
                .expect("writing an image");
            count += 1;
        }
        let block = random.within(0..IMAGE_BYTES / BLOCK_BYTES);
        let first = block * BLOCK_SECTORS + random.within(0..BLOCK_SECTORS);
        corrupt_sectors(image, first..first + 1, random.mask());
        count += 1;
        thread::sleep(PAUSE);
    }
    count
}

/// Has the replica hang until it is evicted and has missed some writes, and then answer until it is
/// in service again, and returns whether it was. Another replica may be evicted because the machine
/// is slow, and then this one is needed and stays: it hangs for a limited time.
fn flap(image: &FuseImage, monitor: &mut Monitor, stop: &AtomicBool) -> bool {
    const HANGS_MOST: Duration = Duration::from_secs(20);
    const MISSES_BYTES: u64 = 128 << 10;
    let mut evicted_and_stale = || {
        let state = monitor.execute("query-quorum", json!({}));
        let victim = &state["replicas"][VICTIM];
        let stale_bytes = victim["stale-bytes"].as_u64().expect("a number");
        (victim["state"] == "evicted", stale_bytes)
    };
    for operation in [Operation::Read, Operation::Write, Operation::Sync] {
        image.inject(operation, Fault::Hang);
    }
    wait_until(HANGS_MOST, || {
        let (is_evicted, stale_bytes) = evicted_and_stale();
        is_evicted && stale_bytes >= MISSES_BYTES || stop.load(Ordering::Relaxed)
    });
    let (was_evicted, _) = evicted_and_stale();
    image.clear_faults();
    let is_back = || !evicted_and_stale().0 || stop.load(Ordering::Relaxed);
    was_evicted && wait_until(2 * HANG_LIMIT, is_back)
}

/// The events of this name.
fn named<'a>(events: &'a [Value], name: &str) -> Vec<&'a Value> {
    let named = events.iter().filter(|event| event["event"] == name);
    named.collect()
}

/// The events that report corrupt data, not an error.
fn of_corruption(events: &[Value]) -> Vec<&Value> {
    let mut reports = named(events, "QUORUM_REPORT_BAD");
    reports.retain(|report| report["data"]["ret"] == 0);
    reports
}
