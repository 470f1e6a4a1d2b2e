//! A replica that hangs again and again, as soon as it is asked again.

use std::thread;
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
/// The default of `--replica-timeout`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

#[test]
fn a_replica_that_is_evicted_again_and_again_is_kept_out_longer() {
    let _machine = alone();
    thread::scope(|scope| {
        scope.spawn(|| is_kept_out_longer(Duration::from_millis(300), 4));
        scope.spawn(|| is_kept_out_longer(DEFAULT_TIMEOUT, 3));
    });
}

/// A replica hangs until it is evicted, rejoins, and hangs again as soon as it is asked again, so
/// many times. From the third time on it is kept out: for twice the timeout, then four times.
fn is_kept_out_longer(timeout: Duration, times: usize) {
    let plan = Plan {
        faulty: vec![2],
        replica_timeout: timeout,
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    // Three quarters of the time, from the third eviction on.
    let kept_out = |evictions: usize| timeout * 3 / 2 * (1 << (evictions - 3));
    let mut outside: Vec<Duration> = Vec::new();
    while outside.len() < times {
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
        // The last time the test does not wait until it rejoins.
        let limit = match outside.len() + 1 == times {
            true => kept_out(times),
            false => HANG_LIMIT,
        };
        wait_until(limit, || disk.state()["replicas"][2]["state"] != "evicted");
        outside.push(began.elapsed());
    }
    let (_, text) = disk.blkctl(&["status"]);
    let summary: Vec<_> = text.lines().skip(1).take(2).collect();
    figure(
        &format!("a replica that hangs again and again, for {timeout:?}"),
        &format!("outside for {outside:.1?} after it answers; {summary:?}"),
    );
    for (evictions, time) in (1..).zip(&outside).skip(2) {
        assert!(*time >= kept_out(evictions), "it rejoins: {outside:?}");
    }
    assert!(text.contains("r2 is flapping"), "{text}");
}
