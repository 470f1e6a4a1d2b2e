//! What is repaired unasked: nothing before the images are compared, and up to a limit then.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::disk::{Disk, Plan};
use testkit::images::{are_identical, corrupt_sectors, create_images};
use testkit::process::wait_until;

const DISK_BYTES: u64 = 4 << 20;
const LIMIT: u64 = 256 << 10;

/// Fills an image.
fn fill(image: &Path, byte: u8) {
    let file = OpenOptions::new().write(true).open(image).unwrap();
    let bytes = vec![byte; usize::try_from(DISK_BYTES).unwrap()];
    file.write_all_at(&bytes, 0).unwrap();
}

/// How much of an image does not hold `byte`.
fn changed(image: &Path, byte: u8) -> u64 {
    let bytes = std::fs::read(image).unwrap();
    bytes.iter().filter(|other| **other != byte).count() as u64
}

/// Two images are old clones, and the third has what the guest has written since: nothing of that
/// is overwritten before the operator says so, and the guest need not read for that to be known.
#[test]
fn a_majority_of_old_images_does_not_replace_the_good_one() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, DISK_BYTES);
    for (image, byte) in images.iter().zip([1, 1, 2]) {
        fill(image, byte);
    }
    let disk = Disk::over(&plan(), images.clone());
    disk.state_when(|state| state["repairs"] == "stopped");
    read_all(&disk);
    check_stopped(&disk);
    // Nor does a scrub repair that is not asked to.
    disk.blkctl(&["scrub"]);
    assert_eq!(changed(&images[2], 2), 0);

    // The operator says that the two are right.
    let (code, text) = disk.blkctl(&["scrub", "--repair"]);
    assert_eq!(code, 0, "{text}");
    assert!(wait_until(HANG_LIMIT, || are_identical(&images)));
    assert_eq!(disk.state()["repairs"], "on");
    let (code, text) = disk.blkctl(&["status"]);
    assert_eq!(code, 0, "{text}");
}

#[test]
fn a_replica_that_is_corrupt_everywhere_is_repaired_up_to_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, DISK_BYTES);
    let disk = Disk::over(&plan(), images.clone());
    assert_eq!(disk.state()["repairs"], "on");
    fill(&images[1], 1);
    read_all(&disk);
    let event = disk.wait_for("QUORUM_REPAIR_LIMIT", None);
    assert_eq!(
        event["data"],
        json!({ "reference": "quorum0", "limit": LIMIT })
    );
    let repaired = |image: &Path| changed(image, 1);
    assert!(wait_until(HANG_LIMIT, || repaired(&images[1]) == LIMIT));
    check_stopped(&disk);
    disk.blkctl(&["scrub"]);
    assert_eq!(repaired(&images[1]), LIMIT);
}

/// What the comparison has found is repaired, without a read of the guest.
#[test]
fn a_few_corrupt_sectors_are_repaired_when_the_images_are_compared() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, DISK_BYTES);
    images.iter().for_each(|image| fill(image, 1));
    corrupt_sectors(&images[0], 100..103, 0xff);
    corrupt_sectors(&images[2], 5000..5001, 0xff);
    let disk = Disk::over(&plan(), images.clone());
    assert!(wait_until(HANG_LIMIT, || are_identical(&images)));
    let state = disk.state_when(|state| state["health"] == "healthy");
    assert_eq!(state["repairs"], "on");
}

fn plan() -> Plan {
    Plan {
        size_bytes: DISK_BYTES,
        rewrite_corrupted: true,
        more: vec!["--repair-limit", "256K"],
        ..Plan::default()
    }
}

/// The guest reads the whole disk.
fn read_all(disk: &Disk) {
    let mut client = disk.connect();
    let part = 64 << 10;
    for start in (0..DISK_BYTES).step_by(part) {
        client.read(0, start, part).unwrap();
    }
}

/// The operator sees that repairs have stopped.
fn check_stopped(disk: &Disk) {
    let state = disk.state();
    assert_eq!(
        (&state["health"], &state["conditions"], &state["repairs"]),
        (
            &json!("failing"),
            &json!(["repair-limit"]),
            &json!("stopped")
        )
    );
    assert_eq!(state["repair-limit"], LIMIT);
    let (code, text) = disk.blkctl(&["status"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("repairs have stopped"), "{text}");
    let is_logged = || disk.log().contains("repairs have stopped");
    assert!(wait_until(HANG_LIMIT, is_logged));
}
