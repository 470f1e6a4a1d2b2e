//! An operator uses `quorum-blkctl` on a disk while a guest works on it: one replica is replaced by
//! an empty file, another one is corrupted in a thousand places and repaired, and the disk grows.
//! All data that the guest reads is right, and in the end all files are equal.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::Value;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::guest::GuestBuilder;
use testkit::guest_load::{expect_end, expect_progress};
use testkit::images::{Random, are_identical, corrupt_sectors, create_images};

use crate::operator::Operator;

const MIB: u64 = 1 << 20;
const IMAGE_BYTES: u64 = 256 * MIB;
const GROWN_BYTES: u64 = 320 * MIB;

/// The writer has this many places of this size, which begin at `/tmp/base` places, and writes a
/// text to them in turn.
const PLACES: u64 = 256;
const PLACE_BYTES: u64 = 16 << 10;

/// The range that the reader reads again and again. It is filled before the guest boots.
const READ_FROM: u64 = 64 * MIB;
const READ_BYTES: u64 = 16 * MIB;

/// Data that the guest never reads.
const UNREAD_FROM: u64 = 128 * MIB;
const UNREAD_BYTES: u64 = 16 * MIB;

/// Places that are corrupted in each of: data that is written, data that is read, data that is not
/// read, and space that was never written.
const CORRUPT_IN_EACH: u64 = 250;

/// Writes past the guest's page cache, reads back all that it wrote in the last turn, compares.
const WRITER: &str = "n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
    place=$((n % 256 + $(cat /tmp/base))); \
    seq $n $((n + 16384)) | head -c 16384 >/tmp/text; \
    dd if=/tmp/text of=/dev/vda bs=16k seek=$place oflag=direct conv=notrunc,fsync status=none && \
    dd if=/dev/vda bs=16k skip=$place count=1 iflag=direct status=none | \
    cmp - /tmp/text || echo write $n; \
    echo $n >/tmp/written; mv /tmp/written /tmp/writes; done; touch /tmp/writer-ended";

/// Reads from the disk, not from the guest's page cache, and checks the sum.
const READER: &str = "n=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
    dd if=/dev/vda bs=1M skip=64 count=16 iflag=direct status=none | sha512sum | \
    cmp - /tmp/sum || echo read $n; \
    echo $n >/tmp/read; mv /tmp/read /tmp/reads; done; touch /tmp/reader-ended";

#[test]
fn a_disk_is_repaired_and_grown_under_a_guest() {
    let directory = tempfile::tempdir().expect("creating a directory");
    let images = create_images(directory.path(), 3, IMAGE_BYTES);
    let mut random = Random::from_environment();
    for (from, bytes) in [(READ_FROM, READ_BYTES), (UNREAD_FROM, UNREAD_BYTES)] {
        fill(&images, from, bytes, &mut random);
    }
    let monitor = directory.path().join("qmp.sock");
    let mut arguments = replica_arguments(&images);
    arguments.extend(["--qmp".into(), monitor.clone().into()]);
    // No replica is slow here, but the machine may be.
    arguments.extend(["--num-queues", "2", "--replica-timeout", "60000"].map(Into::into));
    let mut daemon = Daemon::start_with_records(directory.path(), arguments);
    let events = EventReader::connect(daemon.events_socket());
    let mut guest = GuestBuilder::new(directory.path(), daemon.socket())
        .queues(2)
        .cpus(2)
        .start();
    let operator = Operator { monitor };

    let sum =
        "dd if=/dev/vda bs=1M skip=64 count=16 iflag=direct status=none | sha512sum >/tmp/sum";
    guest.run_successfully(&format!("echo 0 >/tmp/base; {sum}"));
    guest.run_successfully(&format!("({WRITER}) >/tmp/writer 2>&1 &"));
    guest.run_successfully(&format!("({READER}) >/tmp/reader 2>&1 &"));
    expect_progress(&mut guest);
    assert_eq!(operator.run(&["status"]), 0);

    // One replica is replaced by an empty one, another is corrupted meanwhile.
    let fresh = directory.path().join("fresh.raw");
    std::thread::scope(|scope| {
        let replace = scope.spawn(|| {
            operator.run(&[
                "replace",
                "0.raw",
                fresh.to_str().expect("a path in UTF-8"),
                "--create",
            ])
        });
        corrupt(&images[2], &mut random);
        assert_eq!(replace.join().expect("no panic"), 0);
    });
    let images = [fresh, images[1].clone(), images[2].clone()];
    expect_progress(&mut guest);
    assert_eq!(
        operator.run(&["status"]),
        1,
        "the guest has read corrupt data"
    );

    // So far nothing is repaired, and the corruption that the guest does not read is not found.
    assert_eq!(operator.run(&["scrub"]), 1);
    operator.run(&["map"]);
    assert_eq!(operator.run(&["scrub", "--repair"]), 0);
    assert_eq!(operator.run(&["scrub"]), 0);
    operator.run(&["map"]);
    expect_progress(&mut guest);

    // The writer's places lie on both sides of the old end.
    assert_eq!(
        guest.answer("cat /sys/block/vda/size"),
        (IMAGE_BYTES / 512).to_string()
    );
    assert_eq!(
        operator.run(&[
            "resize",
            &format!("+{}M", (GROWN_BYTES - IMAGE_BYTES) / MIB)
        ]),
        0
    );
    let grown = GROWN_BYTES / 512;
    guest.run_successfully(&format!(
        "until [ $(cat /sys/block/vda/size) = {grown} ]; do sleep 0.1; done"
    ));
    let base = IMAGE_BYTES / PLACE_BYTES - PLACES / 2;
    guest.run_successfully(&format!("echo {base} >/tmp/base_; mv /tmp/base_ /tmp/base"));
    expect_progress(&mut guest);
    guest.run_successfully(
        "n=$(cat /tmp/writes); until [ $(cat /tmp/writes) -ge $((n + 256)) ]; do \
         sleep 2; cat /tmp/writes; done",
    );
    assert_eq!(operator.run(&["scrub"]), 0);

    expect_end(&mut guest);
    operator.run(&["status"]);
    guest.run_successfully("sync");
    assert!(
        !guest.console_log().contains("I/O error"),
        "the kernel complained"
    );
    guest.poweroff();
    assert_eq!(daemon.terminate().code(), Some(0), "{}", daemon.log());

    let found = events.all();
    let names = |name: &str| {
        found
            .iter()
            .filter(|event| event["event"] == name)
            .cloned()
            .collect::<Vec<Value>>()
    };
    assert_eq!(names("QUORUM_FAILURE"), [] as [Value; 0]);
    let reports = names("QUORUM_REPORT_BAD");
    assert!(!reports.is_empty());
    assert!(
        reports
            .iter()
            .all(|report| report["data"]["node-name"] == "2.raw"),
        "{reports:?}"
    );
    for image in &images {
        assert_eq!(
            fs::metadata(image).expect("looking at an image").len(),
            GROWN_BYTES
        );
    }
    assert!(are_identical(&images));
}

/// Writes random data to all images.
fn fill(images: &[PathBuf], from: u64, bytes: u64, random: &mut Random) {
    let data: Vec<u8> = (0..bytes / 8)
        .flat_map(|_| random.number().to_le_bytes())
        .collect();
    for image in images {
        let image = fs::OpenOptions::new().write(true).open(image);
        let image = image.expect("opening an image");
        image
            .write_all_at(&data, from)
            .expect("writing to an image");
    }
}

/// Corrupts an image behind the daemon's back.
fn corrupt(image: &Path, random: &mut Random) {
    let areas = [
        (0, PLACES * PLACE_BYTES),
        (READ_FROM, READ_BYTES),
        (UNREAD_FROM, UNREAD_BYTES),
        (UNREAD_FROM + UNREAD_BYTES, MIB),
    ];
    for _ in 0..CORRUPT_IN_EACH {
        for (from, bytes) in areas {
            let sector = from / 512 + random.within(0..bytes / 512);
            corrupt_sectors(image, sector..sector + 1, random.mask());
        }
    }
}
