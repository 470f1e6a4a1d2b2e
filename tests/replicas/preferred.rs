//! No vote has a winner: the operator says which replica is right there, and nothing else changes.

use std::path::Path;

use serde_json::{Value, json};
use testkit::client::Client;
use testkit::disk::{Disk, Plan, System, node_name};
use testkit::fuse::{Fault, Operation};
use testkit::images::{BLOCK_BYTES, are_identical, corrupt_sectors};
use testkit::machine::shared;

use crate::faults::accused;

const BLOCK: usize = 4096;
const BLOCKS: u64 = 16;

/// A disk whose blocks all hold 1.
fn disk(plan: &Plan) -> (Disk, Client) {
    let disk = Disk::start(System::Ours, plan);
    let mut client = disk.connect();
    for block in 0..BLOCKS {
        client.write(0, block * BLOCK_BYTES, &[1; BLOCK]).unwrap();
    }
    client.flush(0).unwrap();
    (disk, client)
}

/// Makes the bytes of a block, which are 1, others, behind the back of the daemon.
fn corrupt(image: &Path, block: u64, byte: u8) {
    corrupt_sectors(image, block * 8..(block + 1) * 8, 1 ^ byte);
}

#[test]
fn one_of_three_versions_is_written_to_all_and_nothing_else_is() {
    let _machine = shared();
    let (disk, mut client) = disk(&Plan::default());
    corrupt(&disk.images[1], 2, 7);
    corrupt(&disk.images[2], 2, 8);
    // A vote decides this one, and no one has asked for its repair.
    corrupt(&disk.images[2], 5, 9);
    client.read(0, 2 * BLOCK_BYTES, BLOCK).unwrap_err();
    let third = node_name(2);
    let (code, text) = disk.blkctl(&["prefer", &third]);
    assert_eq!(code, 3, "{text}");
    let told = format!("in 8 of 8 sectors without a winner, '{third}' would decide");
    assert!(text.contains(&told), "{text}");
    client.read(0, 2 * BLOCK_BYTES, BLOCK).unwrap_err();
    let (code, text) = disk.blkctl(&["prefer", &third, "--force"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("16 sectors written"), "{text}");
    for _ in 0..2 {
        assert_eq!(client.read(0, 2 * BLOCK_BYTES, BLOCK).unwrap(), [8; BLOCK]);
    }
    let state = disk.state();
    assert_eq!(state["undecided-sectors"], 0);
    let end = disk.wait_for("BLOCK_JOB_COMPLETED", None);
    assert_eq!(
        (&end["data"]["type"], &end["data"]["sectors-written"]),
        (&json!("quorum-prefer"), &json!(16))
    );
    let (code, text) = disk.blkctl(&["prefer", &third, "--force"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("every sector had a winner"), "{text}");
    client.flush(0).unwrap();
    drop(client);
    assert_eq!(accused(&disk.end()), Vec::<Value>::new());
    let block = |replica: usize, block: usize| {
        let image = std::fs::read(&disk.images[replica]).unwrap();
        image[block * BLOCK]
    };
    assert_eq!([0, 1, 2].map(|replica| block(replica, 2)), [8; 3]);
    assert_eq!([0, 1, 2].map(|replica| block(replica, 5)), [1, 1, 9]);
}

/// One of two replicas was full for some time, and both are right by a failed write.
#[test]
fn a_tie_of_two_replicas_ends_as_the_operator_says() {
    let _machine = shared();
    for (preferred, byte) in [(0, 2), (1, 1)] {
        let plan = Plan {
            replicas: 2,
            faulty: vec![1],
            ..Plan::default()
        };
        let (disk, mut client) = disk(&plan);
        let full = Fault::Fail(libc::ENOSPC);
        disk.faulty(1).inject(Operation::Write, full);
        client.write(0, 0, &[2; BLOCK]).unwrap_err();
        client.read(0, 0, BLOCK).unwrap_err();
        let name = node_name(preferred);
        if preferred == 0 {
            let (code, text) = disk.blkctl(&["prefer", &name, "--force"]);
            assert_eq!(code, 1, "the other one is full: {text}");
            assert!(text.contains("no quorum for 8 sectors"), "{text}");
            client.read(0, 0, BLOCK).unwrap_err();
            client.flush(0).unwrap();
        }
        disk.faulty(1).clear_faults();
        let (code, text) = disk.blkctl(&["prefer", &name, "--force"]);
        assert_eq!(code, 0, "{text}");
        for _ in 0..2 {
            assert_eq!(client.read(0, 0, BLOCK).unwrap(), [byte; BLOCK]);
        }
        client.flush(0).unwrap();
        drop(client);
        assert_eq!(accused(&disk.end()), Vec::<Value>::new());
        assert!(are_identical(&disk.images));
    }
}

#[test]
fn what_the_last_copy_holds_is_saved_with_it() {
    let _machine = shared();
    let plan = Plan {
        faulty: vec![0],
        ..Plan::default()
    };
    let (disk, mut client) = disk(&plan);
    let full = Fault::Fail(libc::ENOSPC);
    disk.faulty(0).inject(Operation::Write, full);
    client.write(0, 0, &[2; BLOCK]).unwrap();
    let (code, text) = disk.blkctl(&["fail", &node_name(1), "--force"]);
    assert_eq!(code, 0, "{text}");
    disk.faulty(0).clear_faults();
    client.read(0, 0, BLOCK).unwrap_err();
    let (code, text) = disk.blkctl(&["prefer", &node_name(0), "--force"]);
    assert_eq!(code, 3, "it has missed the write: {text}");
    assert!(text.contains("itself not up to date"), "{text}");
    let (code, text) = disk.blkctl(&["prefer", &node_name(2), "--force"]);
    assert_eq!(code, 0, "{text}");
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [2; BLOCK]);
    client.flush(0).unwrap();
    drop(client);
    disk.end();
    let images = [disk.images[0].clone(), disk.images[2].clone()];
    assert!(are_identical(&images));
}

#[test]
fn an_evicted_replica_is_not_preferred() {
    let _machine = shared();
    let (disk, _client) = Disk::with_evicted_replica(std::time::Duration::from_millis(100));
    let state = disk.state();
    let replicas = state["replicas"].as_array().unwrap();
    let evicted = replicas.iter().find(|r| r["state"] == "evicted").unwrap();
    let name = evicted["node-name"].as_str().unwrap();
    let (code, text) = disk.blkctl(&["prefer", name, "--force"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("it is evicted"), "{text}");
}
