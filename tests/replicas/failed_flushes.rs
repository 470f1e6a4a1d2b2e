//! A flush fails on replicas whose data is right, once: nothing is lost by it, nothing becomes
//! unreadable, no replica is accused, and the next flush succeeds.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use serde_json::Value;
use testkit::client::{Client, Failed};
use testkit::disk::{Disk, Plan, System};
use testkit::frontend::{self, Layout, Request, Vmm};
use testkit::fuse::{Fault, Operation};
use testkit::images::{BLOCK_BYTES, BLOCK_SECTORS, are_identical};
use testkit::load::figure;
use testkit::machine::shared;
use testkit::process::wait_until;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_IOERR;

use crate::faults::{accused, scrub, stale_bytes};

const BLOCK: usize = 4096;
/// Every second block of the disk is written.
const BLOCKS: u64 = 522;
/// Long enough for a resync of a few MiB.
const LOOK: Duration = Duration::from_secs(60);

fn offset(index: u64) -> u64 {
    2 * index * BLOCK_BYTES
}

fn content(index: u64) -> [u8; BLOCK] {
    [u8::try_from(index % 255 + 1).unwrap(); BLOCK]
}

fn serve(replicas: usize, pattern: &'static str) -> Disk {
    let plan = Plan {
        replicas,
        threshold: replicas / 2 + 1,
        faulty: (0..replicas).collect(),
        size_bytes: 8 << 20,
        more: vec!["--read-pattern", pattern],
        ..Plan::default()
    };
    Disk::start(System::Ours, &plan)
}

/// Writes the blocks.
fn written(replicas: usize, pattern: &'static str) -> (Disk, Client) {
    let disk = serve(replicas, pattern);
    let mut client = disk.connect();
    for index in 0..BLOCKS {
        client.write(0, offset(index), &content(index)).unwrap();
    }
    (disk, client)
}

/// One round of flushes fails on all replicas.
fn fail_flushes(disk: &Disk, client: &mut Client, replicas: usize) {
    while_flushes_fail(disk, replicas, || assert!(client.flush(0).is_err()));
}

fn while_flushes_fail(disk: &Disk, replicas: usize, run: impl FnOnce()) {
    for replica in 0..replicas {
        disk.faulty(replica)
            .inject(Operation::Sync, Fault::Fail(libc::ENOSPC));
    }
    run();
    for replica in 0..replicas {
        disk.faulty(replica).clear_faults();
    }
}

/// How many of the blocks cannot be read. The others are right.
fn unreadable(client: &mut Client) -> usize {
    let read = |index| match client.read(0, offset(index), BLOCK) {
        Ok(bytes) => {
            assert_eq!(bytes, content(index), "block {index}");
            false
        }
        Err(Failed(_)) => true,
    };
    (0..BLOCKS).map(read).filter(|failed| *failed).count()
}

fn stale(disk: &Disk) -> u64 {
    let state = disk.state();
    let replicas = state["replicas"].as_array().unwrap().len();
    (0..replicas)
        .map(|replica| stale_bytes(&state, replica))
        .sum()
}

fn is_over_with_reads(replicas: usize, pattern: &'static str) {
    let (disk, mut client) = written(replicas, pattern);
    fail_flushes(&disk, &mut client, replicas);
    let lost = unreadable(&mut client);
    let flushed = client.flush(0).is_ok();
    figure(
        &format!(
            "one round of failed flushes on all of {replicas} replicas, then reads, read-pattern \
             {pattern}"
        ),
        &format!("{lost} of {BLOCKS} blocks unreadable, the next flush succeeds: {flushed}"),
    );
    assert_eq!(lost, 0);
    assert!(flushed, "{:#}", disk.state());
    assert_eq!(unreadable(&mut client), 0);
    assert!(wait_until(LOOK, || stale(&disk) == 0), "{:#}", disk.state());
    client.flush(0).unwrap();
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    assert!(are_identical(&disk.images));
}

fn is_over_by_itself(replicas: usize) {
    let _machine = shared();
    let (disk, mut client) = written(replicas, "quorum");
    fail_flushes(&disk, &mut client, replicas);
    let clean = wait_until(LOOK, || stale(&disk) == 0);
    let flushed = client.flush(0).is_ok();
    figure(
        &format!("one round of failed flushes on all of {replicas} replicas, then no request"),
        &format!(
            "{} bytes stale, the next flush succeeds: {flushed}",
            stale(&disk)
        ),
    );
    assert!(clean && flushed, "{:#}", disk.state());
    let ran = scrub(&disk, false);
    assert!(ran.get("error").is_none(), "{ran}");
    assert_eq!(unreadable(&mut client), 0);
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
}

/// The disks of each read pattern, side by side.
fn is_over_with_every_pattern(replicas: usize) {
    let _machine = shared();
    thread::scope(|scope| {
        for pattern in ["quorum", "threshold", "fifo"] {
            scope.spawn(move || is_over_with_reads(replicas, pattern));
        }
    });
}

#[test]
fn failed_flushes_on_all_replicas_lose_nothing() {
    is_over_with_every_pattern(3);
}

#[test]
fn failed_flushes_on_both_of_two_replicas_lose_nothing() {
    is_over_with_every_pattern(2);
}

#[test]
fn failed_flushes_on_all_of_four_replicas_lose_nothing() {
    is_over_with_every_pattern(4);
}

#[test]
fn a_failed_flush_of_a_single_replica_loses_nothing() {
    let _machine = shared();
    is_over_with_reads(1, "quorum");
}

#[test]
fn failed_flushes_on_all_replicas_are_over_by_themselves() {
    is_over_by_itself(3);
}

#[test]
fn a_failed_flush_of_a_single_replica_is_over_by_itself() {
    is_over_by_itself(1);
}

/// One of them really lost what its flush did not write back.
fn is_restored(replicas: usize) {
    let _machine = shared();
    let (disk, mut client) = written(replicas, "quorum");
    let image = OpenOptions::new().write(true).open(&disk.images[0]);
    let image = image.unwrap();
    for index in 0..BLOCKS {
        image.write_all_at(&[0; BLOCK], offset(index)).unwrap();
    }
    fail_flushes(&disk, &mut client, replicas);
    let lost = unreadable(&mut client);
    let flushed = client.flush(0).is_ok();
    figure(
        &format!("flushes fail on {replicas} replicas, and one loses what was written"),
        &format!("{lost} of {BLOCKS} blocks unreadable, the next flush succeeds: {flushed}"),
    );
    assert_eq!(lost, 0);
    assert!(flushed);
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    assert!(are_identical(&disk.images));
}

#[test]
fn what_one_of_three_replicas_lost_by_a_failed_flush_is_restored() {
    is_restored(3);
}

#[test]
fn what_one_of_four_replicas_lost_by_a_failed_flush_is_restored() {
    is_restored(4);
}

/// A guest without a write cache writes while flushes fail.
fn durable_write_is_old_or_new(replicas: usize) {
    let disk = serve(replicas, "quorum");
    let mut vmm = Vmm::start(disk.socket(), &frontend::Plan::without_write_cache());
    let queue = &mut vmm.queues[0];
    let old = [1; 4 * BLOCK];
    let new = [[2; 2 * BLOCK], [1; 2 * BLOCK]].concat();
    queue.write_disk(0, &old);
    while_flushes_fail(&disk, replicas, || {
        let write = Request::write(0, vec![2; 2 * BLOCK]);
        let ended = queue.run(&write, Layout::DIRECT);
        assert_eq!(u32::from(ended.status), VIRTIO_BLK_S_IOERR);
    });
    let first = queue.read_disk(0, old.len());
    assert!(first == old || first == new, "{replicas} replicas");
    assert!(
        queue.read_disk(0, old.len()) == first,
        "{replicas} replicas"
    );
    queue.write_disk(BLOCK_SECTORS, &[3; BLOCK]);
    assert!(wait_until(LOOK, || stale(&disk) == 0), "{:#}", disk.state());
    assert_eq!(queue.read_disk(BLOCK_SECTORS, BLOCK), [3; BLOCK]);
    drop(vmm);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    assert!(are_identical(&disk.images));
}

#[test]
fn a_durable_write_whose_flushes_all_fail_is_old_or_new() {
    let _machine = shared();
    thread::scope(|scope| {
        for replicas in 1..=4 {
            scope.spawn(move || durable_write_is_old_or_new(replicas));
        }
    });
}
