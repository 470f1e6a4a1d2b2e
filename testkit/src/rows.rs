//! One function for each fault that was found in another voted disk: it provokes the fault in
//! either system, and returns what happened.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::client::{Client, Failed};
use crate::disk::{Disk, Plan, System};
use crate::fuse::{Fault, Operation};
use crate::images::{BLOCK_BYTES, Random, corrupt_sectors};
use crate::load::{
    Kind, Latencies, Model, Outcome, bytes_that_differ, one_by_one, race,
    write_from_changing_memory,
};

const BLOCK: usize = 4096;
/// The part of the disk on which racing requests meet.
const RACE_BYTES: usize = 64 << 10;
/// How long a replica hangs.
pub const HANG: Duration = Duration::from_secs(4);
/// `--replica-timeout` where it matters; the default.
pub const REPLICA_TIMEOUT: Duration = Duration::from_secs(1);

fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// How many events of this name there are, those counted that were folded into others.
pub fn count(events: &[Value], name: &str) -> u64 {
    let of_name = events.iter().filter(|event| event["event"] == name);
    of_name
        .map(|event| 1 + event["data"]["suppressed"].as_u64().unwrap_or(0))
        .sum()
}

/// Reads of 8 KiB of which two replicas have lost one sector each, not the same: how many of them
/// fail.
pub fn bad_in_different_sectors(system: System, reads: u64) -> (u64, Vec<Value>) {
    let mut random = Random::from_environment();
    let disk = Disk::start(system, &Plan::default());
    let mut client = disk.connect();
    let mut failed = 0;
    for read in 0..reads {
        let first = read * 16;
        let (left, right) = (first + random.within(0..8), first + random.within(8..16));
        let replica = usize::try_from(random.within(0..3)).expect("small");
        corrupt_sectors(&disk.images[replica], left..left + 1, random.mask());
        corrupt_sectors(
            &disk.images[(replica + 1) % 3],
            right..right + 1,
            random.mask(),
        );
        match client.read(0, first * 512, 8192) {
            Ok(data) => assert!(
                data.iter().all(|byte| *byte == 0),
                "a read returns other data"
            ),
            Err(Failed(_)) => failed += 1,
        }
    }
    drop(client);
    (failed, disk.end())
}

/// The state of the disk after requests have raced.
pub struct Raced {
    /// What happened to the requests.
    pub outcome: Outcome,
    /// All events.
    pub events: Vec<Value>,
    /// In how many bytes the replicas differ.
    pub differing: usize,
    /// How many sectors of replicas do not hold the newest data.
    pub old: usize,
    /// The sectors that do not, as read through the disk.
    pub old_through: Vec<usize>,
}

impl Raced {
    /// In words.
    pub fn figure(&self) -> String {
        format!(
            "{} requests, {} failed, {} mismatches; {} events; after that {} bytes differ, \
             {} sectors are old",
            self.outcome.requests,
            self.outcome.failed,
            self.outcome.mismatches,
            self.events.len(),
            self.differing,
            self.old
        )
    }
}

/// Random reads and writes that meet on 64 KiB, on several queues.
pub fn race_on(system: System) -> Raced {
    let plan = Plan {
        queues: 4,
        ..Plan::default()
    };
    raced(&Disk::start(system, &plan), &plan)
}

/// The same with `rewrite-corrupted` and two replicas that take their time.
pub fn race_with_rewrites(system: System) -> Raced {
    let plan = Plan {
        queues: 4,
        rewrite_corrupted: true,
        faulty: vec![1, 2],
        ..Plan::default()
    };
    let disk = Disk::start(system, &plan);
    for replica in [1, 2] {
        for operation in [Operation::Read, Operation::Write] {
            let delay = Fault::Delay(ms(0), ms(5));
            disk.faulty(replica).inject(operation, delay);
        }
    }
    raced(&disk, &plan)
}

fn raced(disk: &Disk, plan: &Plan) -> Raced {
    let mut random = Random::from_environment();
    let mut client = disk.connect();
    let mut model = Model::new(RACE_BYTES / 512);
    let outcome = race(&mut client, plan.queues, &mut model, &mut random, ms(2000));
    let through = client.read(0, 0, RACE_BYTES).unwrap_or_default();
    drop(client);
    let events = disk.end();
    let old_on = |image| {
        let content = std::fs::read(image).expect("reading an image");
        model.wrong_at_rest(&content).len()
    };
    Raced {
        outcome,
        events,
        differing: bytes_that_differ(&disk.images),
        old: disk.images.iter().map(old_on).sum(),
        old_through: model.wrong_at_rest(&through),
    }
}

/// Writes from memory that changes while they are in flight: in how many bytes replicas differ
/// then.
pub fn changing_memory(system: System) -> usize {
    let plan = Plan {
        faulty: vec![1, 2],
        ..Plan::default()
    };
    let disk = Disk::start(system, &plan);
    for replica in [1, 2] {
        let delay = Fault::Delay(ms(0), ms(5));
        disk.faulty(replica).inject(Operation::Write, delay);
    }
    let mut client = disk.connect();
    write_from_changing_memory(&mut client, &mut Random::from_environment(), ms(1500));
    drop(client);
    disk.end();
    bytes_that_differ(&disk.images)
}

/// How requests fared, with all replicas healthy and while one of three hung for [`HANG`].
pub struct Hung {
    /// The disk. The faults of replica 2 are cleared.
    pub disk: Disk,
    /// Its client.
    pub client: Client,
    /// How much of the disk was used.
    pub blocks: u64,
    /// Reads, and writes, with all healthy.
    pub healthy: [Latencies; 2],
    /// The first write of all.
    pub first_write: Duration,
    /// Reads, and writes, from then on.
    pub hung: [Latencies; 2],
}

/// Reads and writes one by one while replica 2 hangs.
pub fn hang(system: System) -> Hung {
    let mut random = Random::from_environment();
    let plan = Plan {
        faulty: vec![2],
        replica_timeout: REPLICA_TIMEOUT,
        ..Plan::default()
    };
    let disk = Disk::start(system, &plan);
    let mut client = disk.connect();
    let blocks = plan.size_bytes / BLOCK_BYTES / 2;
    let mut until = |client: &mut Client, end: Instant, kind| {
        one_by_one(client, kind, 0..blocks, &mut random, |_| {
            Instant::now() >= end
        })
    };
    // The reads in both states find written blocks: holes are read without the disk.
    for block in 0..blocks {
        let offset = block * BLOCK_BYTES;
        assert_eq!(
            client.write(0, offset, &[0; BLOCK]),
            Ok(()),
            "filling the disk"
        );
    }
    let began = Instant::now();
    let healthy = [
        until(&mut client, began + ms(700), Kind::Reads),
        until(&mut client, began + ms(1400), Kind::Writes),
    ];
    for operation in [Operation::Read, Operation::Write, Operation::Sync] {
        disk.faulty(2).inject(operation, Fault::Hang);
    }
    let began = Instant::now();
    let fault_guard = disk.faulty(2).fault_guard();
    let clearing = thread::spawn(move || {
        thread::sleep(HANG);
        drop(fault_guard);
    });
    let write = client.write(0, 0, &[1; BLOCK]);
    assert_eq!(write, Ok(()), "the first write");
    let first_write = began.elapsed();
    let hung = [
        until(&mut client, began + HANG * 5 / 8, Kind::Reads),
        until(&mut client, began + HANG, Kind::Writes),
    ];
    clearing.join().expect("clearing the faults");
    Hung {
        disk,
        client,
        blocks,
        healthy,
        first_write,
        hung,
    }
}

/// How long reads take with all healthy, and with replica 1 limited to one read a second.
pub fn limited(system: System, reads: usize, limit: Duration) -> [Duration; 2] {
    let mut random = Random::from_environment();
    let plan = Plan {
        faulty: vec![1],
        replica_timeout: REPLICA_TIMEOUT,
        ..Plan::default()
    };
    let disk = Disk::start(system, &plan);
    let mut client = disk.connect();
    let blocks = plan.size_bytes / BLOCK_BYTES;
    let mut time = || {
        let began = Instant::now();
        let is_enough = |count| count >= reads || began.elapsed() > limit;
        let latencies = one_by_one(&mut client, Kind::Reads, 0..blocks, &mut random, is_enough);
        assert_eq!(latencies.count(), reads, "reads within {limit:?}");
        began.elapsed()
    };
    let healthy = time();
    let slow = Fault::PerSecond(1);
    disk.faulty(1).inject(Operation::Read, slow);
    [healthy, time()]
}

/// How long a flush takes when it takes each of three replicas 300 ms.
pub fn flush_of_300_ms(system: System) -> Duration {
    let plan = Plan {
        faulty: vec![0, 1, 2],
        ..Plan::default()
    };
    let disk = Disk::start(system, &plan);
    let mut client = disk.connect();
    client.write(0, 0, &[1; BLOCK]).expect("writing");
    for replica in 0..3 {
        let delay = Fault::Delay(ms(300), ms(300));
        disk.faulty(replica).inject(Operation::Sync, delay);
    }
    let began = Instant::now();
    client.flush(0).expect("flushing");
    began.elapsed()
}

/// A write that replicas 0 and 1 hold and a flush that 1 and 2 do, so that only 1 is safe: what the
/// flush says, and the disk and its client to go on with.
pub fn flush_without_quorum(system: System) -> (Result<(), Failed>, Disk, Client) {
    let plan = Plan {
        faulty: vec![0, 1, 2],
        ..Plan::default()
    };
    let disk = Disk::start(system, &plan);
    let mut client = disk.connect();
    client.write(0, 0, &[2; BLOCK]).expect("writing");
    client.flush(0).expect("flushing");
    // Writes to it fail on, so that no resync reaches it meanwhile.
    disk.faulty(2)
        .inject(Operation::Write, Fault::Fail(libc::ENOSPC));
    assert_eq!(client.write(0, 0, &[3; BLOCK]), Ok(()));
    disk.faulty(0)
        .inject(Operation::Sync, Fault::Fail(libc::EIO));
    (client.flush(0), disk, client)
}
