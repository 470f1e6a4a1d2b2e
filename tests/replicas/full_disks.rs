//! The file systems of all images become full: the guest's writes fail, and the operator is shown
//! why.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use serde_json::{Value, json};
use testkit::HANG_LIMIT;
use testkit::client::{Client, Request};
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::{BLOCK_BYTES, are_identical, create_images};
use testkit::load::figure;
use testkit::machine::shared;
use testkit::process::wait_until;
use testkit::small_disk::SmallDisk;

use crate::faults::{accused, scrub};

const BLOCK: usize = 4096;
const MEBIBYTE: u64 = 1 << 20;

#[test]
fn full_images_are_shown_as_such_and_work_again_when_there_is_space() {
    let _machine = shared();
    let small = SmallDisk::mount(24 * MEBIBYTE);
    let plan = Plan {
        size_bytes: 16 * MEBIBYTE,
        direct: false,
        ..Plan::default()
    };
    let images = create_images(&small.path(), 3, plan.size_bytes);
    let ballast = small.path().join("ballast");
    let file = File::create_new(&ballast).unwrap();
    file.write_all_at(&vec![1; 18 << 20], 0).unwrap();
    let disk = Disk::over(&plan, images);
    let mut client = disk.connect();
    let blocks = 4 * MEBIBYTE / BLOCK_BYTES;
    let offset = |block: u64| block * BLOCK_BYTES;
    let mut failed = Vec::new();
    for block in 0..blocks {
        if client.write(0, offset(block), &[3; BLOCK]).is_err() {
            failed.push(block);
        }
    }
    let (code, text) = disk.blkctl(&["status"]);
    let told = |text: &str| text.to_lowercase().contains("no space left");
    figure(
        "all images are full",
        &format!(
            "{} of {blocks} writes fail; status: exit code {code}, {:?}, space is mentioned: {}",
            failed.len(),
            text.lines().next().unwrap(),
            told(&text)
        ),
    );
    assert!(!failed.is_empty(), "the disk was not full");
    assert_ne!(code, 0, "{text}");
    assert!(!text.contains("healthy"), "{text}");
    assert!(told(&text), "{text}");

    // What was written before is there, and there is space again.
    let first = client.read(0, 0, BLOCK).unwrap();
    assert_eq!(first, [3; BLOCK]);
    drop(file);
    fs::remove_file(&ballast).unwrap();
    // A child that another test has just forked has the file open until it executes its program.
    let works = |client: &mut Client| client.write(0, offset(failed[0]), &[3; BLOCK]).is_ok();
    assert!(wait_until(HANG_LIMIT, || works(&mut client)));
    for &block in &failed {
        client.write(0, offset(block), &[3; BLOCK]).unwrap();
    }
    client.flush(0).unwrap();
    for block in 0..blocks {
        assert_eq!(client.read(0, offset(block), BLOCK).unwrap(), [3; BLOCK]);
    }
    let ran = scrub(&disk, false);
    assert!(ran.get("error").is_none(), "{ran}");
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    assert!(are_identical(&disk.images));
}

/// The quota of the user is used up (EDQUOT): that is no space, as when the file system is full.
#[test]
fn a_write_beyond_the_quota_waits_until_there_is_space() {
    let _machine = shared();
    let plan = Plan {
        faulty: vec![0, 1, 2],
        more: vec!["--werror", "enospc"],
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    for replica in 0..3 {
        disk.faulty(replica)
            .inject(Operation::Write, Fault::Fail(libc::EDQUOT));
    }
    client.send(0, &Request::writes(1, BLOCK));
    let mut answers = Vec::new();
    wait_until(HANG_LIMIT, || {
        answers = client.poll(0, 0);
        !answers.is_empty() || disk.state()["held-requests"] == 1
    });
    assert_eq!(answers, []);
    let event = disk.wait_for("BLOCK_IO_ERROR", None);
    assert_eq!(event["data"]["action"], "stop", "{event}");
    assert_eq!(event["data"]["nospace"], true, "{event}");
    let (code, text) = disk.blkctl(&["status"]);
    figure(
        "the quota is used up",
        &format!("status: exit code {code}, {text}"),
    );
    for told in ["Disk quota exceeded", "make room for /proc"] {
        assert!(text.contains(told), "{text}");
    }
    for replica in 0..3 {
        disk.faulty(replica).clear_faults();
    }
    disk.monitor().execute("cont", json!({}));
    assert_eq!(client.poll(0, 1), [(0, Ok(()))]);
}
