//! The promises of the vote, with the daemon as a process, real files that hang, fail and return
//! corrupt data, and `blkio` as the client: one test for each fault found in another voted disk.

use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;

use serde_json::{Value, json};
use testkit::client::{Failed, Request};
use testkit::disk::{Disk, Plan, System};
use testkit::fuse::{END_LIMIT, Fault, Operation};
use testkit::images::{BLOCK_BYTES, Random, are_identical};
use testkit::load::{Kind, figure, one_by_one};
use testkit::machine::{alone, measure, shared};
use testkit::oracle::text_of_errno;
use testkit::process::wait_until;
use testkit::rows::{self, Raced, count};

const EIO: i32 = libc::EIO;
const ENOSPC: i32 = libc::ENOSPC;
const BLOCK: usize = 4096;

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Our daemon on three replicas, these of which can be made to fail.
fn with_faulty(faulty: Vec<usize>) -> Disk {
    let plan = Plan {
        faulty,
        ..Plan::default()
    };
    Disk::start(System::Ours, &plan)
}

#[test]
fn two_replicas_corrupt_in_different_sectors_fail_no_read() {
    let _machine = shared();
    let reads = 100;
    let (failed, events) = rows::bad_in_different_sectors(System::Ours, reads);
    figure(
        "two replicas bad in different sectors",
        &format!("{failed} of {reads} reads fail"),
    );
    assert_eq!(failed, 0);
    assert_eq!(count(&events, "QUORUM_FAILURE"), 0);
    assert_eq!(count(&events, "QUORUM_REPORT_BAD"), 2 * reads);
}

fn check_raced(row: &str, raced: &Raced) {
    figure(row, &raced.figure());
    assert_eq!(raced.events, Vec::<Value>::new());
    assert_eq!((raced.outcome.failed, raced.outcome.mismatches), (0, 0));
    assert_eq!(raced.old_through, Vec::<usize>::new());
    assert_eq!((raced.differing, raced.old), (0, 0));
}

#[test]
fn racing_requests_report_no_replica() {
    let _machine = shared();
    check_raced("racing on 64 KiB", &rows::race_on(System::Ours));
}

#[test]
fn repairs_do_not_undo_racing_writes() {
    let _machine = shared();
    let raced = rows::race_with_rewrites(System::Ours);
    check_raced("racing with rewrites, two replicas delayed", &raced);
}

#[test]
fn memory_that_changes_in_flight_does_not_make_replicas_diverge() {
    let _machine = shared();
    let differing = rows::changing_memory(System::Ours);
    figure(
        "memory that changes in flight",
        &format!("replicas differ in {differing} bytes"),
    );
    assert_eq!(differing, 0);
}

/// Whether 99 % of reads and of writes took at most twice as long as with all replicas healthy, and
/// the write that detected the hang no longer than it may; or what did not.
fn is_evicted_in_time(hung: &mut rows::Hung) -> Result<(), String> {
    let pairs = hung.healthy.iter_mut().zip(&mut hung.hung);
    for (kind, (healthy, hung)) in ["reads", "writes"].iter().zip(pairs) {
        let (before, after) = (healthy.percentile(99), hung.percentile(99));
        let figures = format!(
            "99 % of {} within {after:.1?} (healthy {before:.1?}), the longest {:.1?}",
            hung.count(),
            hung.max()
        );
        figure(&format!("one of three hangs for 4 s, {kind}"), &figures);
        if after > 2 * before || hung.max() >= rows::HANG / 2 {
            return Err(format!("{kind}: {figures}"));
        }
    }
    let first_write = hung.first_write;
    figure(
        "one of three hangs for 4 s, the write that detects it",
        &format!("{first_write:.1?}"),
    );
    assert!(
        first_write >= rows::REPLICA_TIMEOUT * 9 / 10,
        "{first_write:?}"
    );
    if first_write >= rows::REPLICA_TIMEOUT * 5 / 2 {
        return Err(format!("the write that detects it takes {first_write:.1?}"));
    }
    Ok(())
}

#[test]
fn a_hung_replica_is_evicted_rejoins_and_is_resynced() {
    let _machine = alone();
    let hung = measure(|| {
        let mut hung = rows::hang(System::Ours);
        is_evicted_in_time(&mut hung).map(|()| hung)
    });
    let (disk, mut client) = (hung.disk, hung.client);
    let gone = disk.wait_for("QUORUM_REPORT_BAD", Some(2));
    assert_eq!(gone["data"]["ret"], -libc::ETIMEDOUT);

    // It catches up with what it missed, while other blocks are written.
    let others = hung.blocks..2 * hung.blocks;
    let missed = usize::try_from(hung.blocks * BLOCK_BYTES).unwrap();
    let began = Instant::now();
    let mut looked = began;
    let mut random = Random::from_environment();
    one_by_one(&mut client, Kind::Writes, others, &mut random, |_| {
        if looked.elapsed() < ms(20) {
            return false;
        }
        looked = Instant::now();
        let contents = [0, 2].map(|replica| std::fs::read(&disk.images[replica]).unwrap());
        contents[0][..missed] == contents[1][..missed] || began.elapsed() > HANG_LIMIT
    });
    let took = began.elapsed();
    figure(
        "one of three hung for 4 s, back in step",
        &format!("{took:.1?} after"),
    );
    client.flush(0).unwrap();
    drop(client);
    // Of the other blocks it has missed some, too.
    let mut monitor = disk.monitor();
    let caught_up = wait_until(HANG_LIMIT, || {
        let state = monitor.execute("query-quorum", json!({}));
        state["replicas"][2]["stale-bytes"] == 0
    });
    assert!(caught_up, "it is stale still");
    let events = disk.end();
    assert!(are_identical(&disk.images), "the replica did not catch up");
    assert_eq!(count(&events, "QUORUM_FAILURE"), 0);
    assert!(
        events
            .iter()
            .all(|event| event["data"]["node-name"] == "r2"),
        "a healthy replica is accused: {events:?}"
    );
}

/// There are more flushes than the kernel has workers, and all wait for the replica that hangs.
#[test]
fn flushes_that_hang_on_one_replica_delay_nothing_else() {
    let _machine = alone();
    measure(|| {
        let plan = Plan {
            faulty: vec![2],
            direct: false,
            // A flush may take ten times as long.
            replica_timeout: rows::REPLICA_TIMEOUT / 10,
            ..Plan::default()
        };
        let disk = Disk::start(System::Ours, &plan);
        let mut client = disk.connect();
        client.write(0, 0, &[1; BLOCK]).unwrap();
        disk.faulty(2).inject(Operation::Sync, Fault::Hang);
        let flushes = [Request::Flush; 64];
        let began = Instant::now();
        assert!(client.run(0, &flushes).iter().all(Result::is_ok));
        let flushed = began.elapsed();
        let blocks = 0..plan.size_bytes / BLOCK_BYTES;
        let mut random = Random::from_environment();
        let mut slowest = Duration::ZERO;
        for _ in 0..10 {
            let kind = Kind::Writes;
            let mut writes = one_by_one(&mut client, kind, blocks.clone(), &mut random, |count| {
                count >= 50
            });
            client.flush(0).unwrap();
            slowest = slowest.max(writes.percentile(90));
        }
        let after = began.elapsed() - flushed;
        let figures = format!(
            "answered after {flushed:.1?}, then 500 writes (90 % within {slowest:.1?}) and 10 \
             flushes in {after:.1?}"
        );
        figure("64 flushes, one of three replicas hangs", &figures);
        let is_in_time = flushed < ms(3000) && slowest < ms(100) && after < ms(3000);
        if is_in_time { Ok(()) } else { Err(figures) }
    });
}

#[test]
fn a_slow_replica_delays_no_read() {
    let _machine = alone();
    let reads = 5000;
    measure(|| {
        let [healthy, slow] = rows::limited(System::Ours, reads, HANG_LIMIT);
        let figures = format!("{reads} voted reads take {slow:.1?}, all healthy {healthy:.1?}");
        figure("one replica limited to 1 read a second", &figures);
        let is_in_time = slow <= (2 * healthy).max(ms(1000));
        if is_in_time { Ok(()) } else { Err(figures) }
    });
}

#[test]
fn a_flush_goes_to_all_replicas_at_once() {
    let _machine = alone();
    measure(|| {
        let took = rows::flush_of_300_ms(System::Ours);
        figure("flush, each replica takes 300 ms", &format!("{took:.0?}"));
        assert!(took >= ms(300), "not every replica was flushed: {took:?}");
        let is_parallel = took < ms(600);
        if is_parallel {
            Ok(())
        } else {
            Err(format!("one after another: {took:?}"))
        }
    });
}

#[test]
fn a_flush_fails_unless_enough_replicas_hold_what_was_written() {
    let _machine = shared();
    let (flushed, disk, mut client) = rows::flush_without_quorum(System::Ours);
    figure(
        "a write held by {A,B}, a flush done by {B,C}",
        if flushed.is_ok() {
            "the flush succeeds"
        } else {
            "the flush fails"
        },
    );
    assert_eq!(flushed, Err(Failed(EIO)));
    assert_eq!(
        disk.wait_for("QUORUM_FAILURE", None)["data"]["type"],
        "flush"
    );
    // Writing it again repairs it.
    for replica in [0, 2] {
        disk.faulty(replica).clear_faults();
    }
    client.write(0, 0, &[4; BLOCK]).unwrap();
    assert_eq!(client.flush(0), Ok(()));
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [4; BLOCK]);
}

#[test]
fn a_flush_that_fails_on_one_replica_succeeds() {
    let _machine = shared();
    let disk = with_faulty(vec![0]);
    let mut client = disk.connect();
    client.write(0, 0, &[1; BLOCK]).unwrap();
    disk.faulty(0).inject(Operation::Sync, Fault::Fail(EIO));
    assert_eq!(client.flush(0), Ok(()), "two of three are durable");
    let event = disk.wait_for("QUORUM_REPORT_BAD", Some(0));
    assert_eq!(
        (&event["data"]["type"], &event["data"]["ret"]),
        (&"flush".into(), &(-EIO).into())
    );
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [1; BLOCK]);
}

#[test]
fn an_io_error_is_reported_with_its_errno() {
    let _machine = shared();
    let disk = with_faulty(vec![1]);
    let mut client = disk.connect();
    client.write(0, 0, &[1; BLOCK]).unwrap();
    disk.faulty(1).inject(Operation::Read, Fault::Fail(EIO));
    disk.faulty(1).inject(Operation::Write, Fault::Fail(ENOSPC));
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [1; BLOCK]);
    client.write(0, 8192, &[2; BLOCK]).unwrap();
    assert_eq!(client.read(0, 8192, BLOCK).unwrap(), [2; BLOCK]);
    client.flush(0).unwrap();
    disk.faulty(1).clear_faults();
    drop(client);
    let events = disk.end();
    for (index, (operation, errno, sector)) in [("read", EIO, 0), ("write", ENOSPC, 16)]
        .into_iter()
        .enumerate()
    {
        let data = &events[index]["data"];
        assert_eq!(events[index]["event"], "QUORUM_REPORT_BAD");
        assert_eq!(
            (&data["node-name"], &data["type"]),
            (&"r1".into(), &operation.into())
        );
        assert_eq!(
            (&data["ret"], &data["error"]),
            (&(-errno).into(), &text_of_errno(errno).into())
        );
        assert_eq!(
            (&data["sector-num"], &data["sector-count"]),
            (&sector.into(), &8.into())
        );
    }
    let others = &events[2..];
    assert!(
        others
            .iter()
            .all(|event| event["data"]["node-name"] == "r1" && event["data"]["ret"] != 0),
        "{events:?}"
    );
}

/// A replica whose reads lie, while its file is right.
#[test]
fn a_replica_that_reads_corrupt_data_is_outvoted_and_reported() {
    let _machine = shared();
    let disk = with_faulty(vec![0]);
    let mut client = disk.connect();
    client.write(0, 0, &[1; BLOCK]).unwrap();
    disk.faulty(0).inject(Operation::Read, Fault::Corrupt(0x10));
    for _ in 0..10 {
        assert_eq!(client.read(0, 0, BLOCK).unwrap(), [1; BLOCK]);
    }
    // A late reply is compared after the guest has its answer.
    assert!(wait_until(HANG_LIMIT, || count(
        &disk.events(),
        "QUORUM_REPORT_BAD"
    ) == 10));
    drop(client);
    let events = disk.end();
    assert_eq!(count(&events, "QUORUM_REPORT_BAD"), 10);
    assert!(
        events
            .iter()
            .all(|event| event["data"]["node-name"] == "r0"),
        "{events:?}"
    );
}

/// Dropping a disk ends its users and its mounts, also if its images still hang.
#[test]
fn a_hung_image_can_be_dropped() {
    let _machine = shared();
    let disk = with_faulty(vec![0, 1, 2]);
    let mut client = disk.connect();
    for replica in 0..3 {
        disk.faulty(replica).inject(Operation::Read, Fault::Hang);
    }
    client.send(
        0,
        &[Request::Read {
            offset: 0,
            memory: 0,
            len: BLOCK,
        }],
    );
    let asked = || (0..3).all(|replica| disk.faulty(replica).asked(Operation::Read) > 0);
    assert!(wait_until(HANG_LIMIT, asked));
    drop(client);
    let began = Instant::now();
    drop(disk);
    // Each image that is still open takes this long.
    assert!(began.elapsed() < END_LIMIT, "{:?}", began.elapsed());
    // Other tests mount images, too, for a moment.
    let nothing_is_mounted = wait_until(HANG_LIMIT, || {
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        !mounts.contains("quorum-blk-test")
    });
    assert!(nothing_is_mounted, "a mount is left behind");
}

/// What was never written is not lost by a flush that fails.
#[test]
fn a_failed_flush_costs_only_what_was_written() {
    let _machine = shared();
    let disk = with_faulty(vec![0, 1]);
    let mut client = disk.connect();
    client.write(0, 0, &[1; BLOCK]).unwrap();
    for replica in [0, 1] {
        disk.faulty(replica)
            .inject(Operation::Sync, Fault::Fail(EIO));
    }
    assert_eq!(client.flush(0), Err(Failed(EIO)));
    assert_eq!(
        client.read(0, 100 * BLOCK_BYTES, BLOCK).unwrap(),
        [0; BLOCK]
    );
}

/// The kernel would have the thread wait that asks for an operation, and no replica would be asked
/// or evicted meanwhile.
#[test]
fn a_fuse_server_that_sets_no_option_and_hangs_holds_no_worker() {
    const DEPTH: usize = 32;
    let _machine = shared();
    for operation in [Operation::Read, Operation::Write, Operation::Sync] {
        let plan = Plan {
            faulty: vec![2],
            plain_fuse: true,
            replica_timeout: Duration::from_secs(1),
            ..Plan::default()
        };
        let disk = Disk::start(System::Ours, &plan);
        let mut client = disk.connect();
        disk.faulty(2).inject(operation, Fault::Hang);
        let mut requests = Request::writes(DEPTH, BLOCK);
        requests.insert(0, Request::Flush);
        requests.extend((0..DEPTH).map(|index| Request::Read {
            offset: (DEPTH + index) as u64 * BLOCK_BYTES,
            memory: (DEPTH + index) * BLOCK,
            len: BLOCK,
        }));
        client.send(0, &requests);
        let mut done = Vec::new();
        wait_until(HANG_LIMIT, || {
            done.extend(client.poll(0, 0));
            done.len() == requests.len()
        });
        let state = disk.state();
        assert_eq!(done.len(), requests.len(), "{operation:?}: {state:#}");
        assert!(
            done.iter().all(|(_, result)| result.is_ok()),
            "{operation:?}"
        );
    }
}
