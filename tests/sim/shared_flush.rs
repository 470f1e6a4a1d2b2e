//! A write of a guest without a write cache is answered after a flush that began when the replicas
//! had written it. Whatever waits for a flush shares one.

use std::sync::Arc;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{Errno, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, Tag, WorkerIndex};
use quorum_blk::sim::effects::{Collected, Effect, number_of, tag};
use quorum_blk::sim::policy;

/// One replica, and the engines of two workers.
struct Disk {
    engines: [Engine; 2],
    pool: BufferPool,
    effects: Collected,
    /// Requests that succeeded, and requests that failed.
    succeeded: Vec<u64>,
    failed: Vec<u64>,
}

impl Disk {
    fn new() -> Self {
        let policy = policy::plain(1);
        let pool = BufferPool::default();
        let shared = Arc::new(Shared::new(1, 1, 2, 64));
        let engine = |worker| {
            let (policy, shared, pool) = (policy.clone(), Arc::clone(&shared), pool.clone());
            Engine::new(
                WorkerIndex(worker),
                policy,
                shared,
                pool,
                TurnClock::default(),
            )
        };
        Self {
            engines: [engine(0), engine(1)],
            pool: pool.clone(),
            effects: Collected::default(),
            succeeded: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// Carries out the effects but for the operations, which it returns.
    fn operations(&mut self) -> Vec<Operation> {
        let mut operations = Vec::new();
        let mut effects: Vec<Effect> = self.effects.effects.drain(..).collect();
        while !effects.is_empty() {
            match effects.remove(0) {
                Effect::Submit(operation) => operations.push(operation),
                Effect::Complete(Tag::OwnFlush, _) => {}
                Effect::Complete(tag, Ok(_)) => self.succeeded.push(number_of(tag)),
                Effect::Complete(tag, Err(_)) => self.failed.push(number_of(tag)),
                Effect::Wake(worker, request) => {
                    self.engines[usize::from(worker.0)].granted(request, &mut self.effects);
                    effects.append(&mut self.effects.effects);
                }
                _ => {}
            }
        }
        operations
    }

    /// A durable write of one sector. The replica has written it; returns what it is asked next.
    fn write(&mut self, worker: usize, number: u64, sector: u64) -> Vec<Operation> {
        self.write_as(true, worker, number, sector)
    }

    fn write_as(
        &mut self,
        durable: bool,
        worker: usize,
        number: u64,
        sector: u64,
    ) -> Vec<Operation> {
        let write = GuestRequest::Write {
            range: SectorRange::new(sector, 1),
            data: self.pool.take(512),
            durable,
        };
        let mut operations = self.submit(worker, tag(number), write);
        let operation = operations.remove(0);
        assert!(operations.is_empty() && matches!(operation.action, Action::Write { .. }));
        self.reply(worker, operation, true)
    }

    /// Reads a sector. The replica has done all that it is asked for that.
    fn read(&mut self, number: u64, sector: u64) {
        let read = GuestRequest::Read(SectorRange::new(sector, 1));
        let mut operations = self.submit(0, tag(number), read);
        while let Some(operation) = operations.pop() {
            operations.extend(self.reply(0, operation, true));
        }
    }

    fn flush(&mut self, worker: usize, number: u64) -> Vec<Operation> {
        self.submit(worker, tag(number), GuestRequest::Flush)
    }

    fn submit(&mut self, worker: usize, tag: Tag, request: GuestRequest) -> Vec<Operation> {
        self.engines[worker].submit(tag, request, &mut self.effects);
        self.operations()
    }

    fn reply(&mut self, worker: usize, operation: Operation, success: bool) -> Vec<Operation> {
        let errno = if success { Ok(()) } else { Err(Errno(5)) };
        self.engines[worker].reply(operation.reply(errno), &mut self.effects);
        self.engines.iter().for_each(Engine::self_check);
        self.operations()
    }
}

/// The only operation, a flush.
fn one_flush(operations: Vec<Operation>) -> Operation {
    let [flush] = operations.try_into().expect("one operation");
    assert!(matches!(flush.action, Action::Flush));
    flush
}

#[test]
fn answers_a_durable_write() {
    let mut disk = Disk::new();
    let flush = one_flush(disk.write(0, 1, 3));
    assert!(disk.succeeded.is_empty(), "it may be lost");
    assert!(disk.reply(0, flush, true).is_empty());
    assert_eq!(disk.succeeded, [1]);
}

#[test]
fn is_for_all_that_has_waited_for_it() {
    let mut disk = Disk::new();
    let first = one_flush(disk.write(0, 1, 3));
    // They come too late for the flush that runs.
    assert!(disk.write(0, 2, 4).is_empty());
    assert!(disk.flush(0, 3).is_empty());
    assert!(disk.write(0, 4, 5).is_empty());
    let second = one_flush(disk.reply(0, first, true));
    assert_eq!(disk.succeeded, [1]);
    assert!(disk.reply(0, second, true).is_empty());
    assert_eq!(disk.succeeded, [1, 2, 3, 4]);
}

#[test]
fn is_for_what_waits_on_other_workers_too() {
    let mut disk = Disk::new();
    let first = one_flush(disk.write(0, 1, 3));
    assert!(disk.write(1, 2, 4).is_empty());
    assert!(disk.write(0, 3, 5).is_empty());
    // Worker 1 was first to ask for the next flush, which worker 0 needs no more after it.
    let second = one_flush(disk.reply(0, first, true));
    assert!(disk.reply(1, second, true).is_empty());
    assert_eq!(disk.succeeded, [1, 2, 3]);
}

#[test]
fn fails_a_durable_write_only_where_it_may_be_lost() {
    let mut disk = Disk::new();
    let flush = one_flush(disk.write(0, 1, 3));
    assert!(disk.reply(0, flush, false).is_empty());
    assert_eq!(disk.failed, [1]);
    let flush = one_flush(disk.write(0, 2, 4));
    disk.reply(0, flush, true);
    assert_eq!(
        disk.succeeded,
        [2],
        "it is durable, whatever the other sector is"
    );
    let flush = one_flush(disk.flush(0, 3));
    disk.reply(0, flush, true);
    assert_eq!(disk.failed, [1, 3], "a flush is for the whole disk");
}

/// Each flush may be for another program of the guest, which would believe that it succeeded.
#[test]
fn fails_all_who_have_asked_before_the_guest_knows_what_is_undone() {
    let mut disk = Disk::new();
    assert!(disk.write_as(false, 0, 1, 3).is_empty());
    let unheard = one_flush(disk.submit(0, Tag::OwnFlush, GuestRequest::Flush));
    assert!(disk.reply(0, unheard, false).is_empty());
    disk.read(2, 3);
    assert_eq!(disk.succeeded, [1, 2]);
    // Others ask while the first flush runs, before the guest knows that it fails.
    let first = one_flush(disk.flush(0, 3));
    assert!(disk.flush(0, 4).is_empty());
    assert!(disk.flush(0, 5).is_empty());
    assert!(disk.flush(1, 6).is_empty());
    let second = one_flush(disk.reply(0, first, true));
    let third = one_flush(disk.reply(0, second, true));
    assert!(disk.reply(1, third, true).is_empty());
    assert_eq!(disk.failed, [3, 4, 5, 6]);
    let after = one_flush(disk.flush(1, 7));
    assert!(disk.reply(1, after, true).is_empty());
    assert_eq!(disk.succeeded, [1, 2, 7]);
}

#[test]
fn that_no_guest_has_asked_for_does_not_fail_in_place_of_one_of_a_guest() {
    let mut disk = Disk::new();
    for (success, sector) in [(false, 3), (false, 4), (true, 5)] {
        assert!(disk.write_as(false, 0, 1, sector).is_empty());
        let own = one_flush(disk.submit(0, Tag::OwnFlush, GuestRequest::Flush));
        assert!(disk.reply(0, own, success).is_empty());
        (3..=sector).for_each(|sector| disk.read(2, sector));
    }
    for number in [3, 4] {
        let flush = one_flush(disk.flush(0, number));
        assert!(disk.reply(0, flush, true).is_empty());
    }
    assert_eq!(disk.failed, [3], "and not the one after it");
}
