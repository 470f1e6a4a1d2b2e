//! A reply that is late does not keep the guest waiting: a read asks other replicas, or goes to the
//! range lock; and which replicas a read of `read-pattern=threshold` asks.

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, ReadPattern, Shared, WorkerIndex};
use quorum_blk::jobs::Sizes;
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

/// Much later than any reply so far, and much sooner than an eviction.
const LATE: Duration = Duration::from_millis(300);

struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    clock: TurnClock,
    effects: Collected,
    requests: u64,
    answers: Vec<bool>,
}

impl Disk {
    fn new(replicas: usize, threshold: usize, read_pattern: ReadPattern) -> Self {
        let policy = Policy {
            read_pattern,
            rewrite_corrupted: true,
            job_sizes: Sizes {
                neighbourhood_sectors: 0,
                ..Sizes::default()
            },
            replica_timeout: Duration::from_secs(10),
            ..policy::plain(threshold)
        };
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let shared = Arc::new(Shared::new(replicas, threshold, 1, 64));
        Self {
            engine: Engine::new(
                WorkerIndex(0),
                policy,
                Arc::clone(&shared),
                pool,
                clock.clone(),
            ),
            shared,
            clock,
            effects: Collected::default(),
            requests: 0,
            answers: Vec::new(),
        }
    }

    /// Begins a read, and returns its operations.
    fn read(&mut self) -> Vec<Operation> {
        self.requests += 1;
        let read = GuestRequest::Read(SectorRange::new(8, 1));
        self.engine
            .submit(tag(self.requests), read, &mut self.effects);
        self.submitted()
    }

    /// Begins a write, and returns its operations.
    fn write(&mut self) -> Vec<Operation> {
        self.requests += 1;
        let write = GuestRequest::Write {
            range: SectorRange::new(8, 1),
            data: BufferPool::default().take(512),
            durable: false,
        };
        self.engine
            .submit(tag(self.requests), write, &mut self.effects);
        self.submitted()
    }

    /// Begins a flush, and returns its operations.
    fn flush(&mut self) -> Vec<Operation> {
        self.requests += 1;
        self.engine
            .submit(tag(self.requests), GuestRequest::Flush, &mut self.effects);
        self.submitted()
    }

    /// The operations that the engine has submitted since the last call.
    fn submitted(&mut self) -> Vec<Operation> {
        let mut operations = Vec::new();
        for effect in self.effects.effects.drain(..) {
            match effect {
                Effect::Submit(operation) => operations.push(operation),
                Effect::Complete(_, result) => self.answers.push(result.is_ok()),
                _ => {}
            }
        }
        operations
    }

    fn reply(&mut self, mut operation: Operation, byte: u8) {
        if let Action::Read { into, .. } = &mut operation.action {
            into.fill(byte);
        }
        self.engine
            .reply(operation.reply(Ok(())), &mut self.effects);
    }

    fn pass(&mut self, time: Duration) {
        self.clock.set(self.clock.now() + time);
        self.engine.tick(&mut self.effects);
    }
}

#[test]
fn makes_a_read_of_a_quorum_ask_the_others() {
    let mut disk = Disk::new(3, 2, ReadPattern::Threshold);
    let mut asked = disk.read();
    assert_eq!(asked.len(), 2);
    let late = asked.pop().unwrap().replica;
    disk.reply(asked.remove(0), 1);
    disk.pass(LATE);
    let mut others = disk.submitted();
    assert_eq!((others.len(), disk.answers.len()), (1, 0));
    assert_ne!(others[0].replica, late);
    disk.reply(others.remove(0), 1);
    assert!(disk.submitted().is_empty());
    assert_eq!(disk.answers, [true]);
}

/// The first replies have seen a write, or not; under the lock they are equal.
#[test]
fn makes_a_read_whose_replies_differ_go_to_the_lock() {
    let mut disk = Disk::new(4, 3, ReadPattern::Quorum);
    let late = ReplicaIndex(3);
    let is_in_time = |operation: &Operation| operation.replica != late;
    for operation in disk.read().into_iter().filter(is_in_time) {
        let byte = u8::from(operation.replica == ReplicaIndex(2));
        disk.reply(operation, byte);
    }
    assert!(disk.submitted().is_empty(), "it waits for the last reply");
    disk.pass(LATE);
    for operation in disk.submitted().into_iter().filter(is_in_time) {
        disk.reply(operation, 1);
    }
    disk.submitted();
    assert_eq!(disk.answers, [true]);
}

#[test]
fn leaves_the_others_to_decide_under_the_lock_if_they_are_enough() {
    let mut disk = Disk::new(3, 1, ReadPattern::Quorum);
    let mut asked = disk.read();
    let _late = asked.pop();
    for operation in asked {
        let byte = operation.replica.0;
        disk.reply(operation, byte);
    }
    disk.pass(LATE);
    let mut asked = disk.submitted();
    assert_eq!(asked.len(), 3);
    disk.reply(asked.remove(0), 0);
    disk.submitted();
    assert!(
        disk.answers.is_empty(),
        "two of three may hold another version"
    );
    disk.reply(asked.remove(0), 1);
    disk.submitted();
    assert!(disk.answers.is_empty(), "the third decides");
    disk.reply(asked.remove(0), 1);
    disk.submitted();
    assert_eq!(disk.answers, [true]);
}

/// What the replica holds that is late must be replaced if it loses, before the guest has read the
/// other version.
#[test]
fn keeps_the_guest_waiting_where_a_failed_write_is_undecided() {
    let mut disk = Disk::new(3, 2, ReadPattern::Quorum);
    for operation in disk.write() {
        let result = match operation.replica {
            ReplicaIndex(0) => Ok(()),
            _ => Err(Errno(28)),
        };
        let reply = operation.reply(result);
        disk.engine.reply(reply, &mut disk.effects);
    }
    disk.submitted();
    assert_eq!(disk.answers, [false]);
    disk.answers.clear();
    let mut asked = disk.read();
    let late = asked.remove(0);
    assert_eq!((late.replica, asked.len()), (ReplicaIndex(0), 2));
    for operation in asked {
        disk.reply(operation, 1);
    }
    disk.pass(LATE);
    assert!(disk.submitted().is_empty());
    assert!(disk.answers.is_empty(), "two of three are equal");
    disk.reply(late, 0);
    let repair = disk.submitted();
    assert!(matches!(&repair[..], [write] if write.replica == ReplicaIndex(0)));
    assert_eq!(disk.answers, [true]);
}

#[test]
fn does_not_keep_a_slow_replica_from_being_checked_now_and_then() {
    let mut disk = Disk::new(3, 2, ReadPattern::Threshold);
    let slow = ReplicaIndex(2);
    let mut asked_slow = 0;
    for number in 0..112 {
        let (late, prompt): (Vec<_>, Vec<_>) = disk
            .read()
            .into_iter()
            .partition(|operation| operation.replica == slow);
        if number >= 16 {
            asked_slow += late.len();
        }
        disk.clock
            .set(disk.clock.now() + Duration::from_micros(100));
        for operation in prompt {
            disk.reply(operation, 1);
        }
        disk.clock.set(disk.clock.now() + Duration::from_millis(1));
        for operation in late {
            disk.reply(operation, 1);
        }
        assert!(disk.submitted().is_empty());
    }
    // Every eighth of 96 reads asks two of three replicas in turn.
    assert_eq!(asked_slow, 8);
    assert_eq!(disk.answers.len(), 112);
}

/// It has written, and the other one is not enough.
#[test]
fn of_a_write_is_not_made_up_for_by_a_replica_that_was_removed() {
    let mut disk = Disk::new(3, 2, ReadPattern::Quorum);
    let mut asked = disk.write();
    let last = asked.remove(0);
    for operation in asked {
        disk.reply(operation, 0);
    }
    let removed = ReplicaIndex(2);
    disk.shared
        .remove(removed, |_| {})
        .expect("it is not needed");
    disk.pass(LATE);
    let reply = last.reply(Err(Errno(28)));
    disk.engine.reply(reply, &mut disk.effects);
    disk.submitted();
    assert_eq!(disk.answers, [false]);
}

/// What it has written before is on stable storage now. But later writes have not waited for it,
/// and what is in flight on it may still end in any order.
#[test]
fn of_an_evicted_replica_makes_nothing_fresh() {
    let mut disk = Disk::new(3, 2, ReadPattern::Quorum);
    let late = ReplicaIndex(2);
    for operation in disk.write() {
        disk.reply(operation, 0);
    }
    let (mut owed, in_time): (Vec<_>, Vec<_>) = disk
        .flush()
        .into_iter()
        .partition(|operation| operation.replica == late);
    for operation in in_time {
        disk.reply(operation, 0);
    }
    disk.pass(Duration::from_secs(101));
    assert!(disk.submitted().is_empty());
    assert_eq!(disk.answers, [true, true]);
    assert!(!disk.shared.in_service().contains(late));
    disk.reply(owed.remove(0), 0);
    assert_eq!(disk.shared.stale_sectors(late), 1);
}

/// At first a write was in flight, and no two replies were equal.
#[test]
fn of_a_repair_keeps_no_guest_waiting() {
    let mut disk = Disk::new(3, 2, ReadPattern::Quorum);
    for operation in disk.read() {
        let byte = operation.replica.0 + 1;
        disk.reply(operation, byte);
    }
    for operation in disk.submitted() {
        let byte = u8::from(operation.replica == ReplicaIndex(0));
        disk.reply(operation, byte);
    }
    let repairs = disk.submitted();
    assert!(matches!(repairs[0].action, Action::Write { .. }));
    assert_eq!((repairs.len(), &disk.answers[..]), (1, &[true][..]));
}
