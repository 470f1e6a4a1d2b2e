//! A replica misses many writes in many places. What it misses is known exactly: nothing that it
//! holds counts as stale, however many places there are and however large the disk is.

use std::ops::Range;

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::client::{Client, Request};
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::BLOCK_BYTES;
use testkit::load::figure;
use testkit::machine::shared;
use testkit::process::wait_until;

use crate::faults::stale_bytes;

const BLOCK: usize = 4096;
/// How many blocks the replica misses, none of them beside another.
const MISSED: u64 = 20_000;
/// How many of them are left to a resync.
const COPIED: u64 = 500;
/// Requests that are sent together.
const BATCH: u64 = 100;

/// A disk of this size whose third replica has missed [`MISSED`] blocks, `apart` bytes from one to
/// the next, and cannot be written.
fn with_missed(size_bytes: u64, apart: u64) -> (Disk, Client) {
    let plan = Plan {
        faulty: vec![0, 1, 2],
        size_bytes,
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    disk.faulty(2)
        .inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    client.memory(0)[..BLOCK].fill(7);
    write(&mut client, 0..MISSED, apart);
    (disk, client)
}

/// Writes these blocks, which are `apart` bytes from one another.
fn write(client: &mut Client, blocks: Range<u64>, apart: u64) {
    for first in blocks.step_by(usize::try_from(BATCH).unwrap()) {
        let write = |index| Request::Write {
            offset: index * apart,
            memory: 0,
            len: BLOCK,
        };
        let writes: Vec<_> = (first..first + BATCH).map(write).collect();
        assert!(client.run(0, &writes).iter().all(Result::is_ok));
    }
}

fn stay_exact(what: &str, size_bytes: u64, apart: u64) {
    let _machine = shared();
    let (disk, mut client) = with_missed(size_bytes, apart);
    let stale = stale_bytes(&disk.state(), 2);

    // One bad block each on the two others, where the third holds what everyone holds.
    let between = [5 * apart + apart / 2, 9 * apart + apart / 2];
    for (replica, offset) in between.into_iter().enumerate() {
        disk.faulty(replica)
            .make_unreadable(offset..offset + BLOCK_BYTES);
    }
    let reads = between.map(|offset| client.read(0, offset, BLOCK).is_ok());

    // All is well again: the guest writes most of it again, the rest is copied.
    disk.faulty(2).clear_faults();
    write(&mut client, 0..MISSED - COPIED, apart);
    let caught_up = wait_until(HANG_LIMIT, || stale_bytes(&disk.state(), 2) == 0);
    let flushed = client.flush(0).is_ok();
    let state = disk.state();
    let copied = state["replicas"][2]["resynced-sectors"].as_u64().unwrap() * 512;
    figure(
        what,
        &format!(
            "{stale} bytes stale of {} missed; reads beside them succeed: {reads:?}; caught up: \
             {caught_up}, {copied} bytes copied; flushed: {flushed}",
            MISSED * BLOCK_BYTES
        ),
    );
    assert_eq!(stale, MISSED * BLOCK_BYTES);
    assert_eq!(reads, [true; 2]);
    assert!(caught_up && flushed);
    assert_eq!(
        state["failures"],
        json!({ "read": 0, "write": 0, "flush": 0 })
    );
}

#[test]
fn twenty_thousand_missed_writes_on_8_gib_are_known_exactly() {
    stay_exact("20,000 blocks missed on 8 GiB", 8 << 30, 256 << 10);
}

#[test]
fn twenty_thousand_missed_writes_on_1_tib_are_known_exactly() {
    stay_exact("20,000 blocks missed on 1 TiB", 1 << 40, 32 << 20);
}
