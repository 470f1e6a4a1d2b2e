//! Replicas that are slow: together, in turn, for some kinds of operations, or again and again. A
//! replica is late only against its peers, an eviction fails no request, and what the daemon does
//! in the background evicts nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;

use serde_json::Value;
use testkit::client::{Client, Request};
use testkit::disk::{Disk, Plan, System};
use testkit::frontend::{self, Layout, Vmm};
use testkit::fuse::{Fault, Operation};
use testkit::images::{BLOCK_BYTES, BLOCK_SECTORS, Random, corrupt_sectors};
use testkit::load::figure;
use testkit::machine::shared;
use testkit::process::wait_until;
use testkit::stop::StopOnDrop;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

use crate::faults::{evictions, stale_bytes};

const BLOCK: usize = 4096;
const MEBIBYTE: usize = 1 << 20;
/// `--replica-timeout` here.
const TIMEOUT: Duration = Duration::from_millis(300);
/// More than that: what 1.2 to 1.5 s are to the default of 1 s.
const SLOW: Fault = Fault::Delay(Duration::from_millis(360), Duration::from_millis(450));

/// Replicas that all can be made slow.
fn serve(replicas: usize) -> Disk {
    let plan = Plan {
        replicas,
        threshold: replicas / 2 + 1,
        faulty: (0..replicas).collect(),
        size_bytes: 16 << 20,
        replica_timeout: TIMEOUT,
        ..Plan::default()
    };
    Disk::start(System::Ours, &plan)
}

/// How many of the requests of each kind failed.
#[derive(Debug, Default)]
struct Failed {
    requests: [usize; 3],
    writes: usize,
    reads: usize,
    flushes: usize,
}

/// Rounds of writes in a batch, reads of what was written, and a flush.
fn work(client: &mut Client, rounds: usize, write: usize) -> Failed {
    let mut random = Random::from_environment();
    let mut failed = Failed::default();
    for round in 0..rounds {
        let slots = (16 << 20) / write as u64;
        let content = u8::try_from(round % 255 + 1).unwrap();
        client.memory(0)[..write].fill(content);
        let offsets: Vec<u64> = (0..8)
            .map(|_| random.within(0..slots) * write as u64)
            .collect();
        let writes: Vec<_> = offsets
            .iter()
            .map(|&offset| Request::Write {
                offset,
                memory: 0,
                len: write,
            })
            .collect();
        let results = client.run(0, &writes);
        failed.writes += results.iter().filter(|result| result.is_err()).count();
        for (offset, written) in offsets.iter().zip(results) {
            match client.read(0, *offset, write) {
                Ok(bytes) if written.is_ok() => assert!(bytes == vec![content; write]),
                Ok(_) => {}
                Err(_) => failed.reads += 1,
            }
        }
        failed.flushes += usize::from(client.flush(0).is_err());
        for (count, number) in failed.requests.iter_mut().zip([8, 8, 1]) {
            *count += number;
        }
    }
    failed
}

/// With these faults on all replicas no request fails and no replica is evicted.
fn slow_together(what: &str, faults: &[(Operation, Fault)]) {
    let _machine = shared();
    let disk = serve(3);
    let mut client = disk.connect();
    for replica in 0..3 {
        for &(operation, fault) in faults {
            disk.faulty(replica).inject(operation, fault);
        }
    }
    let write = if matches!(faults[0].1, Fault::BytesPerSecond(_)) {
        MEBIBYTE
    } else {
        4 * BLOCK
    };
    let failed = work(&mut client, 6, write);
    let state = disk.state();
    figure(
        what,
        &format!(
            "of {:?} writes, reads, flushes {}, {}, {} fail; {} evictions",
            failed.requests,
            failed.writes,
            failed.reads,
            failed.flushes,
            evictions(&state)
        ),
    );
    assert_eq!((failed.writes, failed.reads, failed.flushes), (0, 0, 0));
    assert_eq!(evictions(&state), 0, "{state:#}");
}

#[test]
fn replicas_whose_flushes_all_take_longer_than_the_limit_are_not_late() {
    slow_together(
        "every flush takes longer than the limit",
        &[(Operation::Sync, SLOW)],
    );
}

#[test]
fn replicas_whose_writes_all_take_longer_than_the_limit_are_not_late() {
    slow_together(
        "every write takes longer than the limit",
        &[(Operation::Write, SLOW)],
    );
}

#[test]
fn replicas_whose_operations_all_take_longer_than_the_limit_are_not_late() {
    slow_together(
        "every operation takes longer than the limit",
        &[
            (Operation::Read, SLOW),
            (Operation::Write, SLOW),
            (Operation::Sync, SLOW),
        ],
    );
}

#[test]
fn replicas_with_little_bandwidth_are_not_late() {
    let rate = Fault::BytesPerSecond(8 << 20);
    slow_together(
        "every replica transfers 8 MiB a second",
        &[(Operation::Read, rate), (Operation::Write, rate)],
    );
}

/// A guest without a write cache waits for a flush after each write. One replica takes longer for
/// that than the limit of a write, and longer than the others.
#[test]
fn a_guest_without_write_cache_works_on_slow_flushes() {
    const WRITES: u64 = 8;
    let _machine = shared();
    let disk = serve(3);
    let slower = Fault::Delay(TIMEOUT * 3, TIMEOUT * 3);
    for (replica, delay) in [SLOW, slower, SLOW].into_iter().enumerate() {
        disk.faulty(replica).inject(Operation::Sync, delay);
    }
    let mut vmm = Vmm::start(disk.socket(), &frontend::Plan::without_write_cache());
    let queue = &mut vmm.queues[0];
    for block in 0..WRITES {
        let write = frontend::Request::write(block * BLOCK_SECTORS, vec![1; BLOCK]);
        queue.submit(&write, Layout::DIRECT);
    }
    for _ in 0..WRITES {
        assert_eq!(u32::from(queue.wait().status), VIRTIO_BLK_S_OK);
    }
    for replica in 0..3 {
        let flushes = disk.faulty(replica).asked(Operation::Sync);
        assert!(flushes > 0, "the write cache is on");
    }
    let evicted = evictions(&disk.state());
    figure(
        "every flush takes longer than the limit, the guest writes durably",
        &format!("{evicted} evictions"),
    );
    assert_eq!(evicted, 0);
}

/// The slow replica is another one in each round.
#[test]
fn replicas_whose_flushes_are_slow_in_turn_fail_no_flush() {
    let _machine = shared();
    let disk = serve(3);
    let mut client = disk.connect();
    let mut failed = 0;
    for round in 0..9 {
        for replica in 0..3 {
            let image = disk.faulty(replica);
            image.clear_faults();
            if replica == round % 3 {
                image.inject(Operation::Sync, SLOW);
            }
        }
        for block in 0..8 {
            let offset = block * BLOCK_BYTES;
            failed += usize::from(client.write(0, offset, &[1; BLOCK]).is_err());
        }
        failed += usize::from(client.flush(0).is_err());
    }
    let state = disk.state();
    figure(
        "flushes slow on one replica after the other",
        &format!("{failed} requests fail, {} evictions", evictions(&state)),
    );
    assert_eq!(failed, 0);
    assert_eq!(evictions(&state), 0, "{state:#}");
}

/// Two replicas hold what was written, and one of them takes very long to flush it. The third gets
/// a copy meanwhile, which the flush that runs does not cover: it needs both others.
#[test]
fn a_replica_that_a_running_flush_needs_is_waited_for() {
    let _machine = shared();
    let disk = serve(3);
    let mut client = disk.connect();
    disk.faulty(2)
        .inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    client.write(0, 0, &[1; BLOCK]).unwrap();
    disk.faulty(0).inject(Operation::Sync, Fault::Hang);
    client.send(0, &[Request::Flush]);
    assert!(wait_until(HANG_LIMIT, || {
        disk.faulty(0).asked(Operation::Sync) > 0
    }));
    disk.faulty(2).clear_faults();
    // Many times as long as any limit for a flush.
    let began = Instant::now();
    wait_until(HANG_LIMIT, || {
        began.elapsed() > 20 * TIMEOUT || evictions(&disk.state()) > 0
    });
    let evicted = evictions(&disk.state());
    disk.faulty(0).clear_faults();
    let results = client.poll(0, 1);
    figure(
        "one of the two replicas with a write takes long to flush it",
        &format!("{evicted} evictions, the flush: {:?}", results[0].1),
    );
    assert_eq!(results, [(0, Ok(()))]);
    assert_eq!(evicted, 0);
}

/// Writes and reads here and there until `stop`, a request at a time.
fn guest(client: &mut Client, blocks: Range<u64>, stop: &AtomicBool) -> [usize; 2] {
    let mut random = Random::from_environment();
    let [mut requests, mut failed] = [0; 2];
    while !stop.load(Ordering::Relaxed) {
        let offset = random.within(blocks.clone()) * BLOCK_BYTES;
        let result = if random.within(0..2) == 0 {
            client.write(0, offset, &[3; BLOCK])
        } else {
            client.read(0, offset, BLOCK).map(drop)
        };
        requests += 1;
        failed += usize::from(result.is_err());
    }
    [requests, failed]
}

/// Each replica does ten reads and ten writes in a second, and one of five has to be copied.
#[test]
fn a_resync_on_slow_replicas_evicts_no_replica() {
    let _machine = shared();
    let disk = serve(5);
    let mut client = disk.connect();
    disk.faulty(4)
        .inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    let stale = 6 * MEBIBYTE;
    for offset in (0..stale).step_by(MEBIBYTE) {
        client.write(0, offset as u64, &vec![1; MEBIBYTE]).unwrap();
    }
    for replica in 0..5 {
        for operation in [Operation::Read, Operation::Write] {
            disk.faulty(replica).inject(operation, Fault::PerSecond(10));
        }
    }
    let stop = AtomicBool::new(false);
    let mut most = 0;
    let [requests, failed] = thread::scope(|scope| {
        let blocks = 2048..4096;
        let running = StopOnDrop(&stop);
        let guest = scope.spawn(|| guest(&mut client, blocks, &stop));
        let end = wait_until(HANG_LIMIT, || {
            let state = disk.state();
            let stale: u64 = (0..5).map(|replica| stale_bytes(&state, replica)).sum();
            most = most.max(stale);
            stale == 0 || evictions(&state) > 0
        });
        drop(running);
        assert!(end, "the resync does not end");
        guest.join().expect("the guest")
    });
    let state = disk.state();
    figure(
        "a resync of 6 MiB on replicas of ten operations a second",
        &format!(
            "{} evictions, {} bytes stale at most, {failed} of {requests} requests of the guest \
             fail",
            evictions(&state),
            most
        ),
    );
    assert_eq!(evictions(&state), 0, "{state:#}");
    assert_eq!(failed, 0);
}

/// A scrub reads all of a disk whose replicas are slow, while the guest works.
#[test]
fn a_scrub_on_slow_replicas_evicts_no_replica() {
    let _machine = shared();
    let disk = serve(3);
    let mut client = disk.connect();
    for replica in 0..3 {
        for operation in [Operation::Read, Operation::Write] {
            disk.faulty(replica).inject(operation, Fault::PerSecond(10));
        }
    }
    let stop = AtomicBool::new(false);
    let ([requests, failed], end) = thread::scope(|scope| {
        let running = StopOnDrop(&stop);
        let guest = scope.spawn(|| guest(&mut client, 0..4096, &stop));
        let end: Value = crate::faults::scrub(&disk, false);
        drop(running);
        (guest.join().expect("the guest"), end)
    });
    let state = disk.state();
    figure(
        "a scrub on replicas of ten operations a second",
        &format!(
            "{} evictions, {failed} of {requests} requests of the guest fail, {end}",
            evictions(&state)
        ),
    );
    assert_eq!(evictions(&state), 0, "{state:#}");
    assert_eq!(failed, 0);
    assert!(end.get("error").is_none(), "{end}");
}

/// A job has written, and flushes. All replicas take longer for that than the limit of a write, and
/// one takes much longer than the others. The guest is idle.
#[test]
fn a_job_that_flushes_slow_replicas_evicts_none() {
    let _machine = shared();
    thread::scope(|scope| {
        scope.spawn(|| {
            let disk = with_slow_flushes();
            let added = disk.images[0].with_file_name("added.raw");
            let (code, text) = disk.blkctl(&["add", added.to_str().unwrap(), "--create"]);
            assert_eq!(code, 0, "{text}");
            has_flushed("a resync", &disk);
        });
        scope.spawn(|| {
            let disk = with_slow_flushes();
            corrupt_sectors(&disk.images[2], 8..16, 0xff);
            let ran: Value = crate::faults::scrub(&disk, true);
            assert_eq!(ran["sectors-written"], 8, "{ran}");
            has_flushed("a scrub with repair", &disk);
        });
    });
}

/// A disk that was flushed once, and whose flushes are slow from now on.
fn with_slow_flushes() -> Disk {
    let plan = Plan {
        faulty: vec![0, 1, 2],
        more: vec!["--image-dir", "/"],
        replica_timeout: Duration::from_millis(200),
        ..Plan::default()
    };
    let disk = Disk::start(System::Ours, &plan);
    let mut client = disk.connect();
    client.write(0, 0, &[1; BLOCK]).unwrap();
    client.flush(0).unwrap();
    for (replica, timeouts) in [7, 12, 7].into_iter().enumerate() {
        let delay = timeouts * plan.replica_timeout;
        let delay = Fault::Delay(delay, delay);
        disk.faulty(replica).inject(Operation::Sync, delay);
    }
    disk
}

/// The job has flushed all replicas, and has evicted none.
fn has_flushed(job: &str, disk: &Disk) {
    let state = disk.state();
    let evicted = evictions(&state);
    figure(
        &format!("{job} on slow flushes"),
        &format!("{evicted} evictions"),
    );
    assert_eq!(evicted, 0, "{job}: {state:#}");
    for replica in 0..3 {
        let flushes = disk.faulty(replica).done(Operation::Sync);
        assert!(flushes >= 2, "{job}: r{replica} was not flushed");
    }
}
