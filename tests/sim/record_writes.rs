//! What a write to a record that fails, or never ends, does to its replica (W6, S2).

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::report::Report;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::limits::SECTOR_BYTES;
use quorum_blk::record::{Creation, Extents, Holder, Keeper, Layout, Record, Threshold};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;
use uuid::Uuid;

const SECTORS: u64 = 16;
const HERE: SectorRange = SectorRange { start: 5, count: 1 };
/// In another extent.
const ELSEWHERE: SectorRange = SectorRange { start: 9, count: 1 };
const OTHER: ReplicaIndex = ReplicaIndex(1);
const SLOW: ReplicaIndex = ReplicaIndex(2);

/// What is asked of a replica and waits there.
type Waits = fn(&Operation) -> bool;

fn nothing(_: &Operation) -> bool {
    false
}

fn is_record(operation: &Operation) -> bool {
    matches!(operation.action, Action::Record { .. })
}

/// Three replicas with records, in virtual time.
struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    clock: TurnClock,
    pool: BufferPool,
    effects: Collected,
    waits: Waits,
    waiting: Vec<Operation>,
    /// The writes to the records of these replicas fail.
    failing: ReplicaSet,
    requests: u64,
    answers: Vec<bool>,
    evicted: Vec<ReplicaIndex>,
    rejoined: Vec<ReplicaIndex>,
}

/// The records of three replicas.
fn keeper(votes: u8) -> Keeper {
    let ids = [1, 2, 3].map(Uuid::from_u128);
    let record = Record::create(&Creation {
        disk: Uuid::from_u128(10),
        branch: Uuid::from_u128(11),
        run: Uuid::from_u128(12),
        layout: Layout::with_extents(SECTORS, 1),
        threshold: Threshold {
            votes,
            follows_majority: false,
        },
        members: ids.map(|id| (id, id.to_string())).into(),
    });
    let holders = ids.map(|member| {
        Some(Holder {
            member,
            sequence: 1,
        })
    });
    let unmarked = Extents::new(record.layout());
    let mut keeper = Keeper::new(record, holders.into(), unmarked);
    while keeper.next_round().is_some() {
        keeper.ended(ReplicaSet::first(3));
    }
    keeper
}

impl Disk {
    fn new(threshold: u8) -> Self {
        let votes = usize::from(threshold);
        let shared = Arc::new(Shared::new(3, votes, 1, SECTORS));
        shared.remember(keeper(threshold));
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let (its_pool, its_clock) = (pool.clone(), clock.clone());
        let mut engine = Engine::new(
            WorkerIndex(0),
            policy::plain(votes),
            shared.clone(),
            its_pool,
            its_clock,
        );
        engine.stop_background();
        Self {
            engine,
            shared,
            clock,
            pool,
            effects: Collected::default(),
            waits: nothing,
            waiting: Vec::new(),
            failing: ReplicaSet::EMPTY,
            requests: 0,
            answers: Vec::new(),
            evicted: Vec::new(),
            rejoined: Vec::new(),
        }
    }

    fn write(&mut self, range: SectorRange) {
        self.requests += 1;
        let len = range.count * SECTOR_BYTES;
        let write = GuestRequest::Write {
            range,
            data: self.pool.take(usize::try_from(len).unwrap()),
            durable: false,
        };
        self.engine
            .submit(tag(self.requests), write, &mut self.effects);
        self.run();
    }

    /// What has waited is done, unless it is to wait from now on.
    fn resume(&mut self, waits: Waits) {
        self.waits = waits;
        for operation in std::mem::take(&mut self.waiting) {
            self.serve(operation);
        }
        self.run();
    }

    fn run(&mut self) {
        while !self.effects.effects.is_empty() {
            match self.effects.effects.remove(0) {
                Effect::Submit(operation) => self.serve(operation),
                Effect::Complete(_, result) => self.answers.push(result.is_ok()),
                Effect::Report(Report::Evicted(replica)) => self.evicted.push(replica),
                Effect::Report(Report::Rejoined(replica)) => self.rejoined.push(replica),
                _ => {}
            }
        }
    }

    fn serve(&mut self, operation: Operation) {
        if (self.waits)(&operation) {
            self.waiting.push(operation);
            return;
        }
        let fails = is_record(&operation) && self.failing.contains(operation.replica);
        let result = if fails { Err(Errno(5)) } else { Ok(()) };
        let reply = operation.reply(result);
        self.engine.reply(reply, &mut self.effects);
    }

    fn pass(&mut self, time: Duration) {
        let end = self.clock.now() + time;
        while self.clock.now() < end {
            self.clock.set(self.clock.now() + Duration::from_millis(50));
            self.engine.tick(&mut self.effects);
            self.run();
        }
    }
}

/// Its own record may not say what it misses from now on: those of the others do, before the guest
/// depends on it.
#[test]
fn that_has_failed_evicts_its_replica_before_the_answer() {
    let mut disk = Disk::new(2);
    disk.failing = ReplicaSet::from_iter([SLOW]);
    disk.waits = |operation| is_record(operation) && operation.replica == OTHER;
    disk.write(HERE);
    assert!(disk.answers.is_empty(), "only one record is written");
    disk.resume(nothing);
    assert_eq!(disk.evicted, [SLOW]);
    assert_eq!(disk.answers, [true]);
    let stale_where_changed = |keeper: &Keeper| {
        assert!(keeper.is_durable());
        keeper.record().members[SLOW.as_usize()].stale_where_changed
    };
    assert_eq!(disk.shared.records(stale_where_changed), Some(true));
}

#[test]
fn that_has_failed_on_too_many_replicas_fails_what_needs_it() {
    let mut disk = Disk::new(2);
    disk.failing = ReplicaSet::from_iter([OTHER, SLOW]);
    disk.write(HERE);
    disk.pass(Duration::from_secs(3));
    assert_eq!(disk.answers, [false]);
}

/// The replica is out of service once, and its record is written again when it is back.
#[test]
fn that_has_failed_evicts_no_replica_that_has_rejoined_since() {
    let mut disk = Disk::new(2);
    disk.write(HERE);
    assert_eq!(disk.answers, [true], "marked, and written");
    // The slow one is late with a write of data, and fails that of its record meanwhile. The
    // series of writes to records waits for another one.
    disk.waits = |operation| match is_record(operation) {
        true => operation.replica == OTHER,
        false => operation.replica == SLOW,
    };
    disk.failing = ReplicaSet::from_iter([SLOW]);
    disk.write(HERE);
    disk.write(ELSEWHERE);
    disk.pass(Duration::from_millis(1500));
    assert_eq!(disk.evicted, [SLOW]);
    disk.failing = ReplicaSet::EMPTY;
    disk.resume(|operation| is_record(operation) && operation.replica == OTHER);
    disk.pass(Duration::from_millis(500));
    assert_eq!(disk.rejoined, [SLOW]);
    disk.resume(nothing);
    disk.pass(Duration::from_secs(3));
    assert_eq!(disk.evicted, [SLOW], "once");
    assert_eq!(disk.answers, [true; 3]);
}

/// Also where nothing is written to other records at the same time, as theirs have it already.
#[test]
fn that_never_ends_evicts_its_replica() {
    let mut disk = Disk::new(1);
    disk.write(HERE);
    disk.waits = |operation| !is_record(operation) && operation.replica == SLOW;
    disk.write(HERE);
    disk.pass(Duration::from_millis(1500));
    assert_eq!(disk.evicted, [SLOW]);
    assert_eq!(disk.answers, [true; 2], "the records say so");
    // When it is back, only its own record does not have all.
    disk.resume(|operation| is_record(operation) && operation.replica == SLOW);
    disk.pass(Duration::from_millis(500));
    assert_eq!(disk.rejoined, [SLOW]);
    disk.write(ELSEWHERE);
    assert_eq!(disk.answers, [true; 2], "it is not marked");
    let asked: Vec<ReplicaIndex> = disk.waiting.iter().map(|o| o.replica).collect();
    assert_eq!(asked, [SLOW]);
    disk.pass(Duration::from_secs(12));
    assert_eq!(disk.evicted, [SLOW; 2]);
    assert_eq!(disk.answers, [true; 3]);
}
