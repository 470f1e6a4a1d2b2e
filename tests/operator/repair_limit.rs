//! What is repaired unasked ends at a limit.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::disk::{Disk, Plan};
use testkit::images::{are_identical, create_images};
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
fn changed(image: &Path, byte: u8) -> usize {
    let bytes = std::fs::read(image).unwrap();
    bytes.iter().filter(|other| **other != byte).count()
}

/// Two images are old clones, and the third has what the guest has written since.
fn with_old_images(directory: &Path) -> Vec<PathBuf> {
    let images = create_images(directory, 3, DISK_BYTES);
    for (image, byte) in images.iter().zip([1, 1, 2]) {
        fill(image, byte);
    }
    images
}

#[test]
fn a_majority_of_old_images_does_not_replace_the_good_one() {
    let directory = tempfile::tempdir().unwrap();
    let images = with_old_images(directory.path());
    let plan = Plan {
        size_bytes: DISK_BYTES,
        rewrite_corrupted: true,
        more: vec!["--repair-limit", "256K"],
        ..Plan::default()
    };
    let disk = Disk::over(&plan, images.clone());
    let mut client = disk.connect();
    let part = 64 << 10;
    for start in (0..DISK_BYTES).step_by(part) {
        client.read(0, start, part).unwrap();
    }
    let event = disk.wait_for("QUORUM_REPAIR_LIMIT", None);
    assert_eq!(
        event["data"],
        json!({ "reference": "quorum0", "limit": LIMIT })
    );
    assert!(changed(&images[2], 2) as u64 <= LIMIT);
    let state = disk.state();
    assert_eq!(
        (
            &state["health"],
            &state["conditions"],
            &state["repair-limit"]
        ),
        (&json!("failing"), &json!(["repair-limit"]), &json!(LIMIT))
    );
    let (code, text) = disk.blkctl(&["status"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("repairs have stopped"), "{text}");
    assert!(disk.log().contains("repairs have stopped"), "{text}");
    // Nor does a scrub that is not asked to repair.
    disk.blkctl(&["scrub"]);
    assert!(changed(&images[2], 2) as u64 <= LIMIT);

    // The operator says that the two are right.
    let (code, text) = disk.blkctl(&["scrub", "--repair"]);
    assert_eq!(code, 0, "{text}");
    assert!(wait_until(HANG_LIMIT, || are_identical(&images)));
    let (code, text) = disk.blkctl(&["status"]);
    assert_eq!(code, 0, "{text}");
}
