//! With `--blkverify` a difference ends the daemon. What a replica has missed, or may have lost, is
//! no difference (W7).

use std::time::{Duration, Instant};

use serde_json::Value;
use testkit::HANG_LIMIT;
use testkit::client::{Client, Request};
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::{BLOCK_BYTES, are_identical};
use testkit::load::figure;
use testkit::machine::shared;
use testkit::process::wait_until;

use crate::faults::{evictions, scrub};

const BLOCK: usize = 4096;

/// A disk that compares two replicas, with old data on its first blocks.
fn verified(replica_timeout: Duration) -> (Disk, Client) {
    let plan = Plan {
        replicas: 2,
        faulty: vec![0, 1],
        replica_timeout,
        more: vec!["--blkverify"],
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    client.write(0, 0, &[1; 4 * BLOCK]).unwrap();
    client.flush(0).unwrap();
    (disk, client)
}

/// The daemon is there, has found nothing, and serves the disk as before.
fn goes_on(disk: &Disk, mut client: Client) {
    let ran = scrub(disk, false);
    assert!(!disk.log().contains("differ"), "{}", disk.log());
    client.write(0, 0, &[3; 2 * BLOCK]).unwrap();
    assert_eq!(client.read(0, 0, 2 * BLOCK).unwrap(), [3; 2 * BLOCK]);
    client.flush(0).unwrap();
    drop(client);
    let bad = |event: &Value| event["event"] == "QUORUM_REPORT_BAD" && event["data"]["ret"] == 0;
    assert!(!disk.end().iter().any(bad), "{ran}");
    assert!(are_identical(&disk.images));
}

#[test]
fn a_failed_write_does_not_end_a_verified_disk() {
    let _machine = shared();
    let (disk, mut client) = verified(Plan::default().replica_timeout);
    let full = Fault::Fail(libc::ENOSPC);
    disk.faulty(1).inject(Operation::Write, full);
    client.write(0, 0, &[2; 2 * BLOCK]).unwrap_err();
    disk.faulty(1).clear_faults();
    // Only one replica has written it.
    assert!(!are_identical(&disk.images));
    client.read(0, 0, BLOCK).unwrap_err();
    let read = client.read(0, 2 * BLOCK_BYTES, BLOCK);
    assert_eq!(read.unwrap(), [1; BLOCK]);
    goes_on(&disk, client);
}

/// Both replicas are needed, so that none of them is evicted, however long it hangs.
#[test]
fn a_replica_that_hangs_does_not_end_a_verified_disk() {
    const TIMEOUT: Duration = Duration::from_millis(10);
    let _machine = shared();
    let (disk, mut client) = verified(TIMEOUT);
    for operation in [Operation::Read, Operation::Write, Operation::Sync] {
        disk.faulty(1).inject(operation, Fault::Hang);
    }
    let requests = [
        Request::Write {
            offset: 0,
            memory: 0,
            len: BLOCK,
        },
        Request::Read {
            offset: 2 * BLOCK_BYTES,
            memory: BLOCK,
            len: BLOCK,
        },
        Request::Flush,
    ];
    client.memory(0)[..BLOCK].fill(2);
    client.send(0, &requests);
    let began = Instant::now();
    // Longer than any limit for what is not needed (W6).
    wait_until(HANG_LIMIT, || {
        began.elapsed() > 110 * TIMEOUT || evictions(&disk.state()) > 0
    });
    assert_eq!(evictions(&disk.state()), 0);
    disk.faulty(1).clear_faults();
    let mut answers = Vec::new();
    while answers.len() < requests.len() {
        answers.extend(client.poll(0, 1));
    }
    assert!(
        answers.iter().all(|(_, result)| result.is_ok()),
        "{answers:?}"
    );
    assert_eq!(client.memory(0)[BLOCK..2 * BLOCK], [1; BLOCK]);
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [2; BLOCK]);
    goes_on(&disk, client);
}

/// A replica that failed a flush does not differ from the other.
#[test]
fn a_failed_flush_does_not_end_a_verified_disk() {
    let _machine = shared();
    let (disk, mut client) = verified(Plan::default().replica_timeout);
    client.write(0, 0, &[1; BLOCK]).unwrap();
    disk.faulty(0)
        .inject(Operation::Sync, Fault::Fail(libc::EIO));
    let flushed = client.flush(0);
    disk.faulty(0).clear_faults();
    client.send(
        0,
        &[Request::Read {
            offset: 0,
            memory: BLOCK,
            len: BLOCK,
        }],
    );
    let log = |word| {
        disk.log()
            .lines()
            .filter(|line| line.contains(word))
            .count()
    };
    let mut read = 0;
    wait_until(HANG_LIMIT, || {
        read = disk.faulty(1).done(Operation::Read);
        log("differ") > 0 || read > 0
    });
    figure(
        "--blkverify, one failed flush, then a read",
        &format!(
            "the flush: {flushed:?}; lines about a difference: {}",
            log("differ")
        ),
    );
    assert_eq!(log("differ"), 0, "{}", disk.log());
    assert_eq!(client.poll(0, 1), [(0, Ok(()))]);
    assert_eq!(client.memory(0)[BLOCK..2 * BLOCK], [1; BLOCK]);
    goes_on(&disk, client);
}
