//! A read that was in flight while its replica failed a flush is not trusted, even if what the
//! replica may have lost has been written again by the time the reply comes.

use std::sync::Arc;

use quorum_blk::common::SectorRange;
use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{Errno, ReplicaSet};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::sim::effects::{Collected, Effect, number_of, tag};
use quorum_blk::sim::policy;

const RANGE: SectorRange = SectorRange { start: 0, count: 1 };

/// What an input has brought about.
#[derive(Debug, Default)]
struct Result {
    operations: Vec<Operation>,
    answered: Vec<u64>,
}

struct Disk {
    engine: Engine,
    pool: BufferPool,
    effects: Collected,
}

impl Disk {
    fn new() -> Self {
        let policy = policy::plain(1);
        let pool = BufferPool::default();
        let shared = Arc::new(Shared::with_members(ReplicaSet::first(1), 1, 1, 8));
        Self {
            engine: Engine::new(
                WorkerIndex(0),
                policy,
                shared,
                pool.clone(),
                TurnClock::default(),
            ),
            pool,
            effects: Collected::default(),
        }
    }

    fn result(&mut self) -> Result {
        let mut result = Result::default();
        for effect in self.effects.effects.drain(..) {
            match effect {
                Effect::Submit(operation) => result.operations.push(operation),
                Effect::Complete(tag, _) => result.answered.push(number_of(tag)),
                _ => {}
            }
        }
        result
    }

    /// Makes a request, which takes one operation.
    fn submit(&mut self, number: u64, request: GuestRequest) -> Operation {
        self.engine.submit(tag(number), request, &mut self.effects);
        let mut result = self.result();
        assert_eq!(result.operations.len(), 1);
        result.operations.remove(0)
    }

    fn reply(&mut self, operation: Operation, success: bool) -> Result {
        let errno = if success { Ok(()) } else { Err(Errno(5)) };
        self.engine.reply(operation.reply(errno), &mut self.effects);
        self.result()
    }

    /// A read whose winner is doubtful, since a flush has failed. Returns the write of the winner.
    fn read_after_failed_flush(&mut self, number: u64) -> Operation {
        let flush = self.submit(number - 1, GuestRequest::Flush);
        self.reply(flush, false);
        let read = self.submit(number, GuestRequest::Read(RANGE));
        let mut result = self.reply(read, true);
        assert!(result.answered.is_empty(), "the winner is not written yet");
        let repair = result.operations.remove(0);
        assert!(matches!(repair.action, Action::Write { .. }));
        repair
    }

    fn write(&mut self, number: u64) {
        let data = self.pool.take(512);
        let (range, durable) = (RANGE, false);
        let write = GuestRequest::Write {
            range,
            data,
            durable,
        };
        let operation = self.submit(number, write);
        assert_eq!(self.reply(operation, true).answered, [number]);
    }
}

#[test]
fn makes_a_read_in_flight_ask_again() {
    let mut disk = Disk::new();
    disk.write(1);
    let read = disk.submit(2, GuestRequest::Read(RANGE));
    let flush = disk.submit(3, GuestRequest::Flush);
    assert_eq!(disk.reply(flush, false).answered, [3]);
    disk.write(4);
    let result = disk.reply(read, true);
    assert!(result.answered.is_empty(), "the old reply is trusted");
    let [again] = &result.operations[..] else {
        panic!("the replica is not asked again: {result:?}");
    };
    assert!(matches!(again.action, Action::Read { .. }));
}

/// The winner of the vote may be what a write has replaced that the flush reports as lost.
#[test]
fn makes_a_read_ask_again_whose_winner_is_being_written() {
    let mut disk = Disk::new();
    disk.write(1);
    let repair = disk.read_after_failed_flush(3);
    let flush = disk.submit(4, GuestRequest::Flush);
    assert_eq!(disk.reply(flush, false).answered, [4]);
    let result = disk.reply(repair, true);
    assert!(result.answered.is_empty(), "the old vote is trusted");
    let [again] = &result.operations[..] else {
        panic!("the replica is not asked again: {result:?}");
    };
    assert!(matches!(again.action, Action::Read { .. }));
}

/// A vote that is taken again decides the same, and the guest would wait for ever.
#[test]
fn fails_a_read_whose_winner_cannot_be_written() {
    let mut disk = Disk::new();
    disk.write(1);
    let repair = disk.read_after_failed_flush(3);
    let result = disk.reply(repair, false);
    assert_eq!(result.answered, [3], "{result:?}");
}

#[test]
fn before_a_read_does_not_matter() {
    let mut disk = Disk::new();
    disk.write(1);
    let flush = disk.submit(2, GuestRequest::Flush);
    disk.reply(flush, false);
    disk.write(3);
    let read = disk.submit(4, GuestRequest::Read(RANGE));
    assert_eq!(disk.reply(read, true).answered, [4]);
}
