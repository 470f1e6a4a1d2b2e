//! Replicas on disks with bad blocks: reads fail or end early in single blocks of a longer request.
//! Only blocks that too few replicas can read are lost, and what one cannot read is repaired.

use std::fs;
use std::ops::Range;
use std::time::Duration;

use serde_json::Value;
use testkit::client::Client;
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::{Random, are_identical, create_images};
use testkit::load::figure;
use testkit::machine::shared;
use testkit::process::wait_until;
use testkit::small_disk::CheckedDisk;

use crate::faults::{accused, scrub, stale_bytes};

const BLOCK: u64 = 4096;
const KIBIBYTE: u64 = 1 << 10;
const MEBIBYTE: u64 = 1 << 20;
const SIZE_BYTES: u64 = 4 * MEBIBYTE;
/// Long enough for repairs that are under way.
const LOOK: Duration = Duration::from_secs(60);
/// The lengths of the reads.
const READS: [u64; 2] = [128 * KIBIBYTE, MEBIBYTE];

/// Three replicas with faults, full of random data.
fn filled(more: Vec<&'static str>) -> (Disk, Client, Vec<u8>) {
    let plan = Plan {
        faulty: vec![0, 1, 2],
        size_bytes: SIZE_BYTES,
        more,
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    let content = random_content();
    client.write(0, 0, &content).expect("filling the disk");
    client.flush(0).expect("flushing");
    (disk, client, content)
}

fn random_content() -> Vec<u8> {
    let mut random = Random::from_environment();
    let numbers = (0..SIZE_BYTES / 8).flat_map(|_| random.number().to_le_bytes());
    numbers.collect()
}

fn block(index: u64) -> Range<u64> {
    index * BLOCK..(index + 1) * BLOCK
}

/// Reads the whole disk in reads of this length: how many fail. The others return the content.
fn failed_reads(client: &mut Client, content: &[u8], len: u64) -> usize {
    let mut failed = 0;
    for offset in (0..SIZE_BYTES).step_by(usize::try_from(len).unwrap()) {
        match client.read(0, offset, usize::try_from(len).unwrap()) {
            Ok(bytes) => {
                let from = usize::try_from(offset).unwrap();
                assert!(bytes == content[from..from + bytes.len()], "other data");
            }
            Err(_) => failed += 1,
        }
    }
    failed
}

#[test]
fn two_replicas_with_bad_blocks_in_different_places_fail_no_read() {
    let _machine = shared();
    let (disk, mut client, content) = filled(Vec::new());
    // In the same 128 KiB, and in the same MiB only.
    for (replica, index) in [(0, 3), (1, 20), (0, 300), (1, 500)] {
        disk.faulty(replica).make_unreadable(block(index));
    }
    let failed = READS.map(|len| failed_reads(&mut client, &content, len));
    let failures = disk.state()["failures"]["read"].clone();
    figure(
        "two replicas with bad blocks in different places",
        &format!(
            "of {:?} reads of {READS:?} bytes {failed:?} fail, {failures} failures",
            READS.map(|len| SIZE_BYTES / len)
        ),
    );
    assert_eq!(failed, [0, 0]);
    assert_eq!(failures, 0);
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
}

#[test]
fn reads_that_end_early_fail_nothing() {
    let _machine = shared();
    let (disk, mut client, content) = filled(Vec::new());
    // One gives little at a time, one nothing at all from the middle of a MiB on, and the third has
    // a bad block before that.
    disk.faulty(0)
        .inject(Operation::Read, Fault::Short(12 << 10));
    disk.faulty(1)
        .inject(Operation::Read, Fault::EndAt(SIZE_BYTES / 8 * 5));
    disk.faulty(2)
        .make_unreadable(block(SIZE_BYTES / 16 * 9 / BLOCK));
    let failed = READS.map(|len| failed_reads(&mut client, &content, len));
    figure(
        "reads that end early on two replicas, a bad block on the third",
        &format!("of reads of {READS:?} bytes {failed:?} fail"),
    );
    assert_eq!(failed, [0, 0]);
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
}

#[test]
fn a_scrub_counts_no_block_as_undecided_that_two_replicas_can_read() {
    let _machine = shared();
    let (disk, _client, _) = filled(Vec::new());
    for (replica, index) in [(0, 3), (1, 20), (0, 300), (1, 500)] {
        disk.faulty(replica).make_unreadable(block(index));
    }
    let before: u64 = (0..3)
        .map(|replica| disk.faulty(replica).written_bytes())
        .sum();
    let ran = scrub(&disk, false);
    let state = disk.state();
    let found = format!(
        "{ran}, {} undecided sectors, {} failures",
        state["undecided-sectors"], state["failures"]["read"]
    );
    figure(
        "a scrub, two replicas with bad blocks in different places",
        &found,
    );
    assert_eq!(state["undecided-sectors"], 0, "{found}");
    assert_eq!(state["failures"]["read"], 0, "{found}");
    let after: u64 = (0..3)
        .map(|replica| disk.faulty(replica).written_bytes())
        .sum();
    assert_eq!(after, before, "it was not to repair");
}

#[test]
fn a_resync_leaves_no_block_stale_that_two_replicas_can_read() {
    let _machine = shared();
    let plan = Plan {
        replicas: 5,
        threshold: 2,
        faulty: vec![0, 1, 2, 3, 4],
        // A resync that could not write tries again after this time.
        replica_timeout: Duration::from_secs(2),
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    // The last replica misses all of it.
    disk.faulty(4)
        .inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    client.write(0, 0, &vec![7; 4 << 20]).unwrap();
    // Of each 256 KiB every replica lacks another block.
    for index in 0..SIZE_BYTES / (256 * KIBIBYTE) {
        for replica in 0..3 {
            let bad = index * 64 + 2 + 20 * replica as u64;
            disk.faulty(replica).make_unreadable(block(bad));
        }
    }
    disk.faulty(4).clear_faults();
    // A resync starts by itself.
    wait_until(LOOK, || stale_bytes(&disk.state(), 4) == 0);
    let left = stale_bytes(&disk.state(), 4);
    figure(
        "a resync, three sources with bad blocks in different places",
        &format!("{left} bytes stay stale"),
    );
    assert_eq!(left, 0);
    client.flush(0).unwrap();
}

/// Two replicas have bad blocks, and one of these is the same on both.
#[test]
fn a_block_that_two_replicas_cannot_read_is_all_that_is_undecided() {
    let _machine = shared();
    let (disk, mut client, content) = filled(Vec::new());
    let lost = 700;
    for (replica, index) in [(0, 3), (1, 20), (0, 300), (1, 500), (0, lost), (1, lost)] {
        disk.faulty(replica).make_unreadable(block(index));
    }
    for repairs in [false, true] {
        let ran = scrub(&disk, repairs);
        assert!(ran.get("error").is_some(), "{ran}");
        let undecided = &disk.state()["undecided-sectors"];
        assert_eq!(undecided, &(BLOCK / 512), "repairs: {repairs}");
        let left = [0, 1].map(|replica| disk.faulty(replica).unreadable_bytes());
        let blocks = if repairs { 1 } else { 3 };
        assert_eq!(left, [blocks * BLOCK; 2], "repairs: {repairs}");
        let failed = READS.map(|len| failed_reads(&mut client, &content, len));
        assert_eq!(failed, [1, 1], "repairs: {repairs}");
    }
    let bytes = usize::try_from(block(lost).start).unwrap();
    let bytes = &content[bytes..bytes + 4096];
    client.write(0, block(lost).start, bytes).unwrap();
    assert_eq!(failed_reads(&mut client, &content, 128 * KIBIBYTE), 0);
    assert_eq!(disk.state()["undecided-sectors"], 0);
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    assert!(are_identical(&disk.images));
}

/// One replica returns little at a time, one nothing from 2.5 MiB on, and the third has a bad block
/// on either side of that: the second one is left on a single replica.
#[test]
fn a_scrub_of_reads_that_end_early_loses_only_what_too_few_replicas_return() {
    let _machine = shared();
    let (disk, _client, _) = filled(Vec::new());
    disk.faulty(0)
        .inject(Operation::Read, Fault::Short(12 << 10));
    disk.faulty(1)
        .inject(Operation::Read, Fault::EndAt(SIZE_BYTES / 8 * 5));
    for index in [3, 700] {
        disk.faulty(2).make_unreadable(block(index));
    }
    let ran = scrub(&disk, false);
    let undecided = &disk.state()["undecided-sectors"];
    assert_eq!(undecided, &(BLOCK / 512), "{ran}");
}

/// The two replicas that a third one is copied from have bad blocks, and one of them returns less
/// than it is asked for.
#[test]
fn a_resync_leaves_nothing_stale_but_the_blocks_that_a_source_cannot_read() {
    let _machine = shared();
    let plan = Plan {
        replicas: 2,
        faulty: vec![0, 1],
        more: vec!["--image-dir", "/"],
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    let content = random_content();
    client.write(0, 0, &content).unwrap();
    client.flush(0).unwrap();
    disk.faulty(0)
        .inject(Operation::Read, Fault::Short(12 << 10));
    let bad = [(0, 3), (1, 20), (0, 300), (1, 500)];
    for (replica, index) in bad {
        disk.faulty(replica).make_unreadable(block(index));
    }
    let added = disk.images[0].with_file_name("added.raw");
    let file = added.to_str().unwrap();
    let (code, text) = disk.blkctl(&["add", file, "--create", "--detach"]);
    assert_eq!(code, 0, "{text}");
    // It tries the rest again after a minute (`--replica-timeout`).
    disk.state_when(|state| stale_bytes(state, 2) == bad.len() as u64 * BLOCK);
    let copied = fs::read(&added).unwrap();
    for (index, bytes) in (0..).zip(content.chunks_exact(4096)) {
        let expected = match bad.iter().any(|(_, bad)| *bad == index) {
            true => &[0; 4096],
            false => bytes,
        };
        let from = usize::try_from(block(index).start).unwrap();
        assert!(copied[from..from + 4096] == *expected, "block {index}");
    }
    assert_eq!(failed_reads(&mut client, &content, 128 * KIBIBYTE), 3);
    for (_, index) in bad {
        let from = usize::try_from(block(index).start).unwrap();
        let bytes = &content[from..from + 4096];
        client.write(0, block(index).start, bytes).unwrap();
    }
    assert_eq!(failed_reads(&mut client, &content, 128 * KIBIBYTE), 0);
    assert_eq!(stale_bytes(&disk.state(), 2), 0);
    drop(client);
    disk.end();
    assert!(are_identical(&[&disk.images[..], &[added]].concat()));
}

/// Of reads of the guest, whatever the pattern, with `--rewrite-corrupted`.
fn is_repaired_by_reads(pattern: &'static str) {
    let _machine = shared();
    let (disk, mut client, content) =
        filled(vec!["--rewrite-corrupted", "--read-pattern", pattern]);
    let bad = [block(7), block(8), block(700)];
    for range in &bad {
        disk.faulty(1).make_unreadable(range.clone());
    }
    let before = disk.faulty(1).written_bytes();
    let mut failed = 0;
    // With the pattern threshold, two of three replicas are asked, and the fast ones more often.
    let came = wait_until(LOOK, || {
        failed += failed_reads(&mut client, &content, MEBIBYTE);
        disk.faulty(1).unreadable_bytes() == 0
    });
    let left = disk.faulty(1).unreadable_bytes();
    let written = disk.faulty(1).written_bytes() - before;
    let state = disk.state();
    figure(
        &format!("three unreadable blocks, --rewrite-corrupted, read-pattern {pattern}"),
        &format!(
            "{failed} reads fail, {left} bytes stay unreadable, {written} bytes written, {} \
             sectors counted as repaired",
            state["replicas"][1]["repaired-sectors"]
        ),
    );
    assert_eq!(failed, 0);
    assert!(came, "{left} bytes stay unreadable: {state:#}");
    assert_eq!(written, 3 * BLOCK, "more was written than was unreadable");
    // The kernel has written it before the daemon has counted it.
    disk.state_when(|state| state["replicas"][1]["repaired-sectors"] == 3 * BLOCK / 512);
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    assert!(are_identical(&disk.images));
}

#[test]
fn what_a_voted_read_finds_unreadable_is_repaired() {
    is_repaired_by_reads("quorum");
}

#[test]
fn what_a_read_with_the_threshold_pattern_finds_unreadable_is_repaired() {
    is_repaired_by_reads("threshold");
}

#[test]
fn a_scrub_with_repair_writes_no_more_than_is_unreadable() {
    let _machine = shared();
    let (disk, _client, _) = filled(Vec::new());
    for range in [block(7), block(8), block(700)] {
        disk.faulty(1).make_unreadable(range);
    }
    let before = disk.faulty(1).written_bytes();
    let plain = scrub(&disk, false);
    let written_by_plain = disk.faulty(1).written_bytes() - before;
    let repairing = scrub(&disk, true);
    let written = disk.faulty(1).written_bytes() - before;
    let left = disk.faulty(1).unreadable_bytes();
    figure(
        "three unreadable blocks and a scrub",
        &format!(
            "plain: {plain}, {written_by_plain} bytes written; with repair: {repairing}, \
             {written} bytes written, {left} stay unreadable"
        ),
    );
    assert_eq!(written_by_plain, 0);
    assert_eq!((left, written), (0, 3 * BLOCK));
}

/// The same on a file system that checks what it reads, with a block device below it.
#[test]
fn blocks_that_fail_their_check_on_btrfs_fail_no_read_and_are_repaired() {
    let _machine = shared();
    let directory = tempfile::tempdir().unwrap();
    let disks = [0, 1].map(|index: usize| {
        CheckedDisk::make(&directory.path().join(format!("{index}.btrfs")), 256 << 20)
    });
    let mut images = create_images(directory.path(), 3, SIZE_BYTES);
    for (index, disk) in disks.iter().enumerate() {
        images[index] = create_images(&disk.path(), 1, SIZE_BYTES).remove(0);
    }
    let plan = Plan {
        size_bytes: SIZE_BYTES,
        more: vec!["--rewrite-corrupted"],
        ..Plan::default()
    };
    let disk = Disk::over(&plan, images);
    let mut client = disk.connect();
    let content = random_content();
    client.write(0, 0, &content).unwrap();
    client.flush(0).unwrap();
    for (replica, index) in [(0, 300), (1, 500)] {
        let bad = block(index);
        let from = usize::try_from(bad.start).unwrap();
        disks[replica].corrupt(&content[from..from + 4096]);
    }
    let mut failed = 0;
    for _ in 0..3 {
        failed += failed_reads(&mut client, &content, MEBIBYTE);
    }
    drop(client);
    let events = disk.end();
    let errors = events
        .iter()
        .filter(|event| event["data"]["ret"] == -libc::EIO)
        .count();
    let readable = disk.images.iter().all(|image| fs::read(image).is_ok());
    figure(
        "two images on btrfs, a corrupt block in each, in one MiB",
        &format!("{failed} of 12 reads fail, {errors} errors; all can be read then: {readable}"),
    );
    assert!(errors > 0, "nothing was corrupt");
    assert_eq!(failed, 0);
    assert!(readable);
    assert!(are_identical(&disk.images));
    assert_eq!(accused(&events), Vec::<Value>::new());
}

#[test]
fn a_replica_whose_reads_fail_is_not_healthy() {
    let _machine = shared();
    let (disk, mut client, content) = filled(Vec::new());
    disk.faulty(2)
        .inject(Operation::Read, Fault::Fail(libc::EIO));
    assert_eq!(failed_reads(&mut client, &content, 128 * KIBIBYTE), 0);
    let (code, text) = disk.blkctl(&["status"]);
    figure(
        "a replica whose reads all fail",
        &format!("status: exit code {code}, {}", text.lines().next().unwrap()),
    );
    assert_eq!(code, 1, "{text}");
    assert!(text.starts_with("quorum0  degraded"), "{text}");
    assert!(
        text.lines()
            .any(|line| line.contains("r2") && line.contains("error")),
        "{text}"
    );
}
