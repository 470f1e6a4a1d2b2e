//! A Linux guest works on a voted disk while a replica is corrupted: the guest does not notice, and
//! the events report the corrupt sectors and no others. Where three replicas differ, it gets an I/O
//! error.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;
use testkit::HANG_LIMIT;

use serde_json::Value;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::guest::{Guest, GuestBuilder};
use testkit::images::{
    BLOCK_SECTORS, Random, SECTOR_BYTES, are_identical, corrupt_sectors, create_images,
};
use testkit::process::wait_until;

const IMAGE_BYTES: u64 = 64 << 20;
const IMAGE_BLOCKS: u64 = IMAGE_BYTES / SECTOR_BYTES / BLOCK_SECTORS;

/// The replica that is corrupted, and its node name.
const VICTIM: usize = 1;
const VICTIM_NAME: &str = "1.raw";

/// Rounds of reading with a cold cache, and runs of sectors corrupted in each.
const ROUNDS: usize = 4;
const RUNS_PER_ROUND: usize = 40;

/// The guest's files: this many of this size. They lie at the start of the disk.
const FILES: u64 = 6;
const FILE_MIB: u64 = 4;

const COLD_CACHE: &str = "sync; echo 3 >/proc/sys/vm/drop_caches";
const READ_WHOLE_DISK: &str =
    "sync; echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=1M";

#[test]
fn a_guest_does_not_notice_a_corrupt_replica() {
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, IMAGE_BYTES);
    let mut arguments = replica_arguments(&images);
    // Every sector is to be found by the guest.
    arguments.extend(
        [
            "--scrub-around",
            "0",
            "--rewrite-corrupted",
            "--num-queues",
            "2",
        ]
        .map(Into::into),
    );
    // Nothing hangs here; the machine may be slow, and a replica that is late would be reported.
    arguments.extend(["--replica-timeout", "30000"].map(Into::into));
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
        .queues(2)
        .cpus(2)
        .start();
    let mut random = Random::from_environment();

    guest.run_successfully("ls /sys/block/vda/mq | wc -l");
    // 4096 fits any logical block size that the disk may have.
    guest.run_successfully("mke2fs -b 4096 /dev/vda && mount -o noatime /dev/vda /mnt");
    guest.run_successfully(&format!(
        "cd /mnt && rmdir lost+found && for file in $(seq {FILES}); do \
         dd if=/dev/urandom of=$file bs=1M count={FILE_MIB}; done"
    ));
    guest.run_successfully("cd /mnt && sha256sum * >/tmp/checksums && cat /tmp/checksums");
    guest.run_successfully("umount /mnt && mount -o ro /dev/vda /mnt");
    assert_eq!(
        without_jobs(&events),
        [] as [Value; 0],
        "nothing was corrupted so far"
    );
    assert!(
        are_identical(&images),
        "all replicas hold what the guest wrote"
    );

    a_reading_guest(&mut guest, &images, &events, &mut random);
    a_writing_guest(&mut guest, &images, &events, &mut random);

    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    assert!(are_identical(&images), "a stop does not change that");
}

/// The guest only reads, so every corrupted sector has to be found, reported and repaired.
fn a_reading_guest(
    guest: &mut Guest,
    images: &[PathBuf],
    events: &EventReader,
    random: &mut Random,
) {
    let mut used_blocks = BTreeSet::new();
    let mut corrupted = BTreeSet::new();
    for _ in 0..ROUNDS {
        // One half before the guest reads, one while it does. A block is corrupted once, so that no
        // repair undoes a corruption before it was read.
        let runs: Vec<_> = (0..RUNS_PER_ROUND)
            .map(|_| fresh_run(random, &mut used_blocks))
            .collect();
        corrupted.extend(runs.iter().flat_map(|(run, _)| run.clone()));
        let (before, meanwhile) = runs.split_at(RUNS_PER_ROUND / 2);
        corrupt(&images[VICTIM], before, Duration::ZERO);
        thread::scope(|scope| {
            scope.spawn(|| corrupt(&images[VICTIM], meanwhile, Duration::from_millis(20)));
            guest.run_successfully(COLD_CACHE);
            guest.run_successfully("cd /mnt && sha256sum -c /tmp/checksums");
        });
    }
    guest.run_successfully("umount /mnt");
    guest.run_successfully(READ_WHOLE_DISK);

    let is_complete = wait_until(HANG_LIMIT, || {
        reported_sectors(&without_jobs(events), &corrupted).is_superset(&corrupted)
    });
    let events = without_jobs(events);
    let reported = reported_sectors(&events, &corrupted);
    let unreported: Vec<_> = corrupted.difference(&reported).collect();
    assert!(
        is_complete,
        "corrupted but not reported: sectors {unreported:?}"
    );
    println!(
        "{} sectors corrupted, all reported, by {} events",
        corrupted.len(),
        events.len()
    );
    expect_identical(images);
}

/// The guest writes as well. It may overwrite a corruption before it was read, so
/// not all has to be reported; still nothing else may be, and nothing may stay different.
fn a_writing_guest(
    guest: &mut Guest,
    images: &[PathBuf],
    events: &EventReader,
    random: &mut Random,
) {
    let events_before = without_jobs(events).len();
    guest.run_successfully("mount -o noatime /dev/vda /mnt");
    let runs: Vec<_> = (0..RUNS_PER_ROUND)
        .map(|_| fresh_run(random, &mut BTreeSet::new()))
        .collect();
    // The corruption reads and writes whole blocks: in each of them a guest's write can get lost.
    let touched: BTreeSet<u64> = runs
        .iter()
        .flat_map(|(run, _)| {
            let block = run.start - run.start % BLOCK_SECTORS;
            block..block + BLOCK_SECTORS
        })
        .collect();
    thread::scope(|scope| {
        scope.spawn(|| corrupt(&images[VICTIM], &runs, Duration::from_millis(50)));
        guest.run_successfully(
            "cd /mnt && for file in 1 3 5 new; do \
             dd if=/dev/urandom of=$file bs=64k count=64 conv=fsync; done",
        );
        guest.run_successfully("cd /mnt && sha256sum * >/tmp/checksums");
        for _ in 0..2 {
            guest.run_successfully(COLD_CACHE);
            guest.run_successfully("cd /mnt && sha256sum -c /tmp/checksums");
        }
    });
    guest.run_successfully("umount /mnt");
    guest.run_successfully(READ_WHOLE_DISK);
    expect_identical(images);
    let events = &without_jobs(events)[events_before..];
    let reported = reported_sectors(events, &touched);
    println!(
        "{} sectors reported, by {} events",
        reported.len(),
        events.len()
    );
}

#[test]
fn a_guest_gets_an_error_where_all_replicas_differ() {
    const SECTOR: u64 = 4321;
    // The guest's page cache reads and writes whole blocks.
    const BLOCK: u64 = SECTOR / BLOCK_SECTORS;

    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, IMAGE_BYTES);
    let mut arguments = replica_arguments(&images);
    arguments.extend(["--replica-timeout", "30000"].map(Into::into));
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket()).start();
    let read = |block| format!("dd if=/dev/vda of=/dev/null bs=4096 skip={block} count=1");

    guest.run_successfully("dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync");
    for (image, mask) in images.iter().zip([0x11, 0x22, 0x33]) {
        corrupt_sectors(image, SECTOR..SECTOR + 1, mask);
    }
    guest.run_successfully(COLD_CACHE);

    let failed_read = guest.run(&read(BLOCK));
    assert_ne!(failed_read.status, 0);
    assert!(
        failed_read.output.contains("Input/output error"),
        "{failed_read:?}"
    );
    let failure = events
        .wait_for(|event| event["event"] == "QUORUM_FAILURE", HANG_LIMIT)
        .expect("an event QUORUM_FAILURE");
    println!("{failure}");

    // One request has failed, not the disk.
    assert!(daemon.is_alive());
    for neighbour in [BLOCK - 1, BLOCK + 1] {
        guest.run_successfully(&read(neighbour));
    }
    // New data has all replicas agree again.
    guest.run_successfully(&format!(
        "dd if=/dev/urandom of=/dev/vda bs=4096 seek={BLOCK} count=1 conv=notrunc,fsync"
    ));
    guest.run_successfully(READ_WHOLE_DISK);
    expect_identical(&images);

    // The guest tried more than once, also by reading ahead. No version won: no replica is
    // reported.
    for event in without_jobs(&events) {
        let data = &event["data"];
        assert_eq!(event["event"], "QUORUM_FAILURE", "{event}");
        assert_eq!(data["reference"], "quorum0", "{event}");
        assert!(
            sector_range(data, "sector-count").contains(&SECTOR),
            "{event}"
        );
        assert_eq!(data["sector-count"], data["sectors-count"], "{event}");
        assert!(number(&event["timestamp"], "seconds") > 0, "{event}");
    }

    // The daemon stops under the running guest.
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());
    guest.run_successfully("echo the guest lives on");
}

/// One to eight sectors within a block that is not in `used_blocks`, and the mask to corrupt them
/// with. Two of three lie where the guest's files are.
fn fresh_run(random: &mut Random, used_blocks: &mut BTreeSet<u64>) -> (Range<u64>, u8) {
    const FILES_BLOCKS: u64 = FILES * FILE_MIB * (1 << 20) / SECTOR_BYTES / BLOCK_SECTORS;
    let last_block = match random.within(0..3) {
        0 => IMAGE_BLOCKS,
        _ => FILES_BLOCKS,
    };
    loop {
        let block = random.within(0..last_block);
        if used_blocks.insert(block) {
            let from = random.within(0..BLOCK_SECTORS);
            let to = random.within(from..BLOCK_SECTORS) + 1;
            let first = block * BLOCK_SECTORS;
            return (first + from..first + to, random.mask());
        }
    }
}

/// Corrupts these runs of sectors one after another, with a pause after each.
fn corrupt(image: &Path, runs: &[(Range<u64>, u8)], pause: Duration) {
    for (run, mask) in runs {
        corrupt_sectors(image, run.clone(), *mask);
        thread::sleep(pause);
    }
}

fn expect_identical(images: &[PathBuf]) {
    let are_identical = wait_until(HANG_LIMIT, || are_identical(images));
    assert!(
        are_identical,
        "the replicas still differ after {HANG_LIMIT:?}"
    );
}

/// The events so far, without those of the scrub that compares the replicas first.
fn without_jobs(events: &EventReader) -> Vec<Value> {
    let mut events = events.all();
    events.retain(|event| {
        let name = event["event"].as_str().expect("a name");
        name.starts_with("QUORUM_")
    });
    events
}

/// The sectors that these events name, each of which has to be a QUORUM_REPORT_BAD against the
/// victim for corrupt data in some of the `corrupted` sectors and no others. Where an event had to
/// cut its list short, all corrupted sectors of its range count as named.
fn reported_sectors(events: &[Value], corrupted: &BTreeSet<u64>) -> BTreeSet<u64> {
    let mut reported = BTreeSet::new();
    for event in events {
        let data = &event["data"];
        assert_eq!(event["event"], "QUORUM_REPORT_BAD", "{event}");
        assert_eq!(data["node-name"], VICTIM_NAME, "{event}");
        assert_eq!(data["ret"], 0, "{event}");
        assert!(number(&event["timestamp"], "seconds") > 0, "{event}");

        let range = sector_range(data, "sectors-count");
        assert_eq!(data["sector-count"], data["sectors-count"], "{event}");
        let runs = data["bad-sectors"].as_array();
        let runs = runs.unwrap_or_else(|| panic!("no array bad-sectors: {event}"));
        assert!(!runs.is_empty(), "{event}");
        for sector in runs
            .iter()
            .flat_map(|run| sector_range(run, "sector-count"))
        {
            assert!(
                range.contains(&sector),
                "sector {sector} is out of range: {event}"
            );
            assert!(
                corrupted.contains(&sector),
                "sector {sector} was not corrupted: {event}"
            );
            reported.insert(sector);
        }
        if data["bad-sectors-truncated"] == true {
            reported.extend(corrupted.range(range));
        }
    }
    reported
}

/// The range from `sector-num` on with as many sectors as the member `count` says.
fn sector_range(object: &Value, count: &str) -> Range<u64> {
    let start = number(object, "sector-num");
    start..start + number(object, count)
}

fn number(object: &Value, member: &str) -> u64 {
    let value = object[member].as_u64();
    value.unwrap_or_else(|| panic!("no number {member}: {object}"))
}
