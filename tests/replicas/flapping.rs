//! A replica that hangs again and again, as soon as it is asked again.

use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;

use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{Fault, Operation};
use testkit::images::BLOCK_BYTES;
use testkit::load::figure;
use testkit::machine::alone;
use testkit::process::wait_until;

use crate::faults::evictions;

const BLOCK: usize = 4096;
const TIMEOUT: Duration = Duration::from_millis(300);
/// Many times as long as it hangs.
const LONG: Duration = Duration::from_secs(3);
/// It does not hang more often than this.
const STALLS_MAX: usize = 8;

/// It hangs for a moment, rejoins, and hangs again as soon as it is asked again.
#[test]
fn a_replica_that_is_evicted_again_and_again_is_kept_out_longer() {
    let _machine = alone();
    let plan = Plan {
        faulty: vec![2],
        replica_timeout: TIMEOUT,
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    let mut outside: Vec<Duration> = Vec::new();
    while outside.len() < STALLS_MAX && outside.last().is_none_or(|last| *last < LONG) {
        for operation in [Operation::Read, Operation::Write, Operation::Sync] {
            disk.faulty(2).inject(operation, Fault::Hang);
        }
        let before = evictions(&disk.state());
        client.write(0, 0, &[1; BLOCK]).unwrap();
        assert!(wait_until(HANG_LIMIT, || {
            let offset = BLOCK_BYTES;
            client.write(0, offset, &[2; BLOCK]).unwrap();
            evictions(&disk.state()) > before
        }));
        disk.faulty(2).clear_faults();
        let began = Instant::now();
        wait_until(LONG, || disk.state()["replicas"][2]["state"] != "evicted");
        outside.push(began.elapsed());
    }
    let (_, text) = disk.blkctl(&["status"]);
    let summary: Vec<_> = text.lines().skip(1).take(2).collect();
    figure(
        "a replica that hangs again and again",
        &format!("outside for {outside:.1?} after it answers; {summary:?}"),
    );
    let last = outside.last().unwrap();
    assert!(*last >= LONG, "it rejoins each time: {outside:?}");
    assert!(text.contains("r2 is flapping"), "{text}");
}
