//! A write fails on too many replicas: the guest gets an error, old and new data are both right
//! from then on, and no replica is accused of either.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::client::Client;
use testkit::disk::{Disk, Plan, System, node_name};
use testkit::fuse::{Fault, Operation};
use testkit::images::{BLOCK_BYTES, are_identical};
use testkit::load::figure;
use testkit::machine::shared;
use testkit::process::wait_until;

use crate::faults::{accused, scrub};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 16;
/// Long enough for what is under way.
const LOOK: Duration = Duration::from_secs(20);

/// Old data on all blocks, made durable.
fn write_old_data(client: &mut Client) {
    for block in 0..BLOCKS {
        let offset = block * BLOCK_BYTES;
        client.write(0, offset, &[1; BLOCK]).unwrap();
    }
    client.flush(0).unwrap();
}

/// Old data on all blocks, and a write of new data that failed on all replicas but one.
fn after_failed_writes(more: &[&'static str]) -> (Disk, Client) {
    let plan = Plan {
        faulty: vec![0, 1, 2],
        more: more.to_vec(),
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    write_old_data(&mut client);
    for block in 0..BLOCKS {
        let written = usize::try_from(block % 3).unwrap();
        for replica in 0..3 {
            let image = disk.faulty(replica);
            image.clear_faults();
            if replica != written {
                image.inject(Operation::Write, Fault::Fail(libc::ENOSPC));
            }
        }
        let offset = block * BLOCK_BYTES;
        client.write(0, offset, &[2; BLOCK]).unwrap_err();
    }
    for replica in 0..3 {
        disk.faulty(replica).clear_faults();
    }
    (disk, client)
}

/// Nothing says that a replica was corrupt, and all are equal in the end.
fn accuse_nothing(what: &str, disk: &Disk) {
    let equal = wait_until(LOOK, || are_identical(&disk.images));
    let state = disk.state();
    let found: u64 = (0..3)
        .map(|replica| {
            let found = &state["replicas"][replica]["corrupt-sectors-found"];
            found.as_u64().unwrap()
        })
        .sum();
    let events = accused(&disk.end());
    figure(
        what,
        &format!(
            "{} events accuse a replica, {found} sectors found corrupt, images are equal then: \
             {equal}",
            events.len()
        ),
    );
    assert_eq!(events, Vec::<Value>::new());
    assert_eq!(found, 0);
    assert!(equal);
}

fn with_reads(pattern: &'static str) {
    let _machine = shared();
    let (disk, mut client) = after_failed_writes(&["--read-pattern", pattern]);
    let mut first = Vec::new();
    for round in 0..6 {
        for block in 0..BLOCKS {
            let offset = block * BLOCK_BYTES;
            let bytes = client.read(0, offset, BLOCK).expect("a read");
            assert!(bytes == [1; BLOCK] || bytes == [2; BLOCK], "other data");
            if round == 0 {
                first.push(bytes[0]);
            }
            let before = first[usize::try_from(block).unwrap()];
            assert_eq!(bytes[0], before, "what was read once stays");
        }
    }
    let what = format!("writes that failed on two of three, then reads, read-pattern {pattern}");
    accuse_nothing(&what, &disk);
}

#[test]
fn a_failed_write_accuses_no_replica() {
    with_reads("quorum");
}

#[test]
fn a_failed_write_accuses_no_replica_with_the_threshold_pattern() {
    with_reads("threshold");
}

#[test]
fn a_scrub_after_failed_writes_accuses_no_replica() {
    let _machine = shared();
    let (disk, _client) = after_failed_writes(&[]);
    let ran = scrub(&disk, false);
    let what = format!("writes that failed on two of three, then a scrub: {ran}");
    accuse_nothing(&what, &disk);
}

/// Two replicas are full before the end of a write of eight blocks, one after two and one after
/// five of them, and losers are repaired unasked: what has most votes is what all hold then.
fn is_decided_block_by_block(pattern: &'static str) {
    const SPAN: usize = 8 * BLOCK;
    let plan = Plan {
        faulty: vec![0, 1, 2],
        more: vec!["--rewrite-corrupted", "--read-pattern", pattern],
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    let span = |round: usize| (round * SPAN) as u64;
    client.write(0, 0, &[1; 3 * SPAN]).unwrap();
    client.flush(0).unwrap();
    for round in 0..3 {
        for (shift, blocks) in [(1, 2), (2, 5)] {
            let full = Fault::FullFrom(span(round) + blocks * BLOCK_BYTES);
            let replica = disk.faulty((round + shift) % 3);
            replica.inject(Operation::Write, full);
        }
        client.write(0, span(round), &[2; SPAN]).unwrap_err();
        (0..3).for_each(|replica| disk.faulty(replica).clear_faults());
    }
    assert!(!are_identical(&disk.images));
    let expected = [[2; 5 * BLOCK].as_slice(), &[1; 3 * BLOCK]].concat();
    for round in [0, 1, 2, 0, 1, 2] {
        let read = client.read(0, span(round), SPAN).unwrap();
        assert!(read == expected, "{pattern}, round {round}");
    }
    let what = format!("writes that failed midway on two of three, read-pattern {pattern}");
    accuse_nothing(&what, &disk);
    let image = fs::read(&disk.images[0]).unwrap();
    assert!(image[..3 * SPAN] == expected.repeat(3), "{pattern}");
}

#[test]
fn a_write_that_failed_midway_is_decided_block_by_block_and_accuses_no_replica() {
    let _machine = shared();
    is_decided_block_by_block("quorum");
    is_decided_block_by_block("threshold");
}

/// One of two replicas is full: neither old nor new data has two votes, and the full replica
/// cannot be removed. With a threshold of 1 the replica that is listed first decides.
#[test]
fn a_tie_of_two_replicas_is_decided_with_a_threshold_of_1() {
    let _machine = shared();
    let (disk, mut client) = after_a_tie();
    let mut monitor = disk.monitor();
    let remove = json!({ "parent": "quorum0", "child": node_name(1) });
    let removal = monitor.try_execute("x-blockdev-change", remove.clone());
    removal.expect_err("two must agree");
    monitor.execute("quorum-set-threshold", json!({ "vote-threshold": 1 }));
    for _ in 0..2 {
        assert_eq!(client.read(0, 0, BLOCK).unwrap(), [2; BLOCK]);
    }
    client.write(0, BLOCK_BYTES, &[3; BLOCK]).unwrap();
    monitor.execute("x-blockdev-change", remove);
    client.flush(0).unwrap();
    for (block, byte) in [(0, 2), (1, 3), (2, 1)] {
        let bytes = client.read(0, block * BLOCK_BYTES, BLOCK).unwrap();
        assert_eq!(bytes, [byte; BLOCK]);
    }
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
}

/// Two replicas, the second of which is full: a write has failed that the first one has done.
fn after_a_tie() -> (Disk, Client) {
    let plan = Plan {
        replicas: 2,
        faulty: vec![1],
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    write_old_data(&mut client);
    let full = Fault::Fail(libc::ENOSPC);
    disk.faulty(1).inject(Operation::Write, full);
    client.write(0, 0, &[2; BLOCK]).unwrap_err();
    client.read(0, 0, BLOCK).unwrap_err();
    (disk, client)
}

#[test]
fn a_tie_of_two_replicas_ends_when_the_operator_gives_one_up() {
    let _machine = shared();
    for (failed, kept) in [(1, 2), (0, 1)] {
        let (disk, mut client) = after_a_tie();
        let name = node_name(failed);
        let (code, text) = disk.blkctl(&["fail", &name, "--force"]);
        assert_eq!(code, 3, "the threshold was given: {text}");
        let (code, text) = disk.blkctl(&["threshold", "majority"]);
        assert_eq!(code, 0, "{text}");
        let (code, text) = disk.blkctl(&["fail", &name]);
        assert_eq!(code, 3, "{text}");
        let lines = [
            format!("this would be lost with {name}:"),
            format!("4 KiB have old or new data since a failed write, and {name} votes no more"),
            format!("quorum-blkctl fail {name} --force"),
        ];
        for line in &lines {
            assert!(text.contains(line), "{text}");
        }
        client.read(0, 0, BLOCK).unwrap_err();
        let (code, text) = disk.blkctl(&["fail", &name, "--force"]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("this is lost with it:"), "{text}");
        for _ in 0..2 {
            assert_eq!(client.read(0, 0, BLOCK).unwrap(), [kept; BLOCK]);
        }
        if failed == 0 {
            disk.faulty(1).clear_faults();
        }
        client.write(0, BLOCK_BYTES, &[3; BLOCK]).unwrap();
        client.flush(0).unwrap();
        for (block, byte) in [(0, kept), (1, 3), (2, 1)] {
            let bytes = client.read(0, block * BLOCK_BYTES, BLOCK).unwrap();
            assert_eq!(bytes, [byte; BLOCK]);
        }
        let (code, text) = disk.blkctl(&["fail", &node_name(1 - failed), "--force"]);
        assert_eq!(code, 3, "{text}");
        assert!(
            text.contains("fewer replicas than the vote threshold"),
            "{text}"
        );
        drop(client);
        assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    }
}

#[test]
fn what_is_given_up_with_a_replica_fails_reads_and_no_flush() {
    let _machine = shared();
    let plan = Plan {
        faulty: vec![0],
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    write_old_data(&mut client);
    let full = Fault::Fail(libc::ENOSPC);
    disk.faulty(0).inject(Operation::Write, full);
    client.write(0, 0, &[2; BLOCK]).unwrap();
    client.flush(0).unwrap();
    let mut monitor = disk.monitor();
    let nothing = json!({ "node-name": node_name(0) });
    let (code, text) = disk.blkctl(&["fail", &node_name(0)]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("nothing would be lost with"), "{text}");
    let loss = monitor.execute("quorum-fail", nothing);
    assert_eq!(loss["lost-sectors"], 0);
    let lost = json!({
        "removed": false, "lost-sectors": 8, "doubtful-sectors": 0, "not-durable-sectors": 0,
        "undecided-sectors": 0,
    });
    let mut fail = json!({ "node-name": node_name(1) });
    assert_eq!(monitor.execute("quorum-fail", fail.clone()), lost);
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [2; BLOCK]);
    fail["force"] = json!(true);
    let loss = monitor.execute("quorum-fail", fail);
    assert_eq!(
        (&loss["removed"], &loss["lost-sectors"]),
        (&json!(true), &json!(8))
    );
    disk.faulty(0).clear_faults();
    client.read(0, 0, BLOCK).unwrap_err();
    client.flush(0).unwrap();
    assert_eq!(client.read(0, BLOCK_BYTES, BLOCK).unwrap(), [1; BLOCK]);
    client.write(0, 0, &[3; BLOCK]).unwrap();
    client.flush(0).unwrap();
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [3; BLOCK]);
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
}
