//! A replica that answers too slowly is left out of reads before it keeps too many of them waiting.

use std::sync::Arc;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::limits::{LAG_BYTES_MAX, LAG_OPERATIONS_MAX};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const SLOW: ReplicaIndex = ReplicaIndex(2);
const SECTORS: u64 = 1 << 20;

/// One engine on three replicas, two of which answer at once.
struct Disk {
    engine: Engine,
    effects: Collected,
    /// What the slow replica has not answered.
    slow: Vec<Operation>,
    answered: usize,
    requests: u64,
}

impl Disk {
    fn new(threshold: usize) -> Self {
        let policy = policy::plain(threshold);
        let shared = Arc::new(Shared::new(3, threshold, 1, SECTORS));
        Self {
            engine: Engine::new(
                WorkerIndex(0),
                policy,
                shared,
                BufferPool::default(),
                TurnClock::default(),
            ),
            effects: Collected::default(),
            slow: Vec::new(),
            answered: 0,
            requests: 0,
        }
    }

    /// Reads, and returns how many replicas were asked.
    fn read(&mut self, range: SectorRange) -> usize {
        self.requests += 1;
        let read = GuestRequest::Read(range);
        self.engine
            .submit(tag(self.requests), read, &mut self.effects);
        let mut asked = 0;
        let mut effects: Vec<Effect> = self.effects.effects.drain(..).collect();
        while let Some(effect) = effects.pop() {
            match effect {
                Effect::Submit(operation) => {
                    asked += 1;
                    if operation.replica == SLOW {
                        self.slow.push(operation);
                        continue;
                    }
                    self.engine
                        .reply(operation.reply(Ok(())), &mut self.effects);
                    effects.append(&mut self.effects.effects);
                }
                Effect::Complete(_, result) => {
                    assert!(result.is_ok());
                    self.answered += 1;
                }
                other => panic!("{other:?}"),
            }
        }
        asked
    }

    fn slow_replica_answers(&mut self) {
        for operation in self.slow.drain(..) {
            assert!(matches!(operation.action, Action::Read { .. }));
            self.engine
                .reply(operation.reply(Ok(())), &mut self.effects);
        }
        self.effects.effects.clear();
    }
}

#[test]
fn is_not_asked_while_it_owes_as_many_replies_as_it_may() {
    let mut disk = Disk::new(2);
    let range = SectorRange::new(8, 8);
    for _ in 0..LAG_OPERATIONS_MAX {
        assert_eq!(disk.read(range), 3);
    }
    for _ in 0..10 {
        assert_eq!(disk.read(range), 2, "the slow replica is asked");
    }
    assert_eq!(disk.slow.len(), LAG_OPERATIONS_MAX);
    assert_eq!(disk.answered, LAG_OPERATIONS_MAX + 10);
    disk.slow_replica_answers();
    assert_eq!(disk.read(range), 3, "it is asked again");
}

#[test]
fn is_not_asked_while_it_holds_as_many_buffers_as_it_may() {
    let mut disk = Disk::new(2);
    let range = SectorRange::new(0, (1 << 20) / 512);
    let most = LAG_BYTES_MAX / range.bytes();
    for _ in 0..most {
        assert_eq!(disk.read(range), 3);
    }
    assert_eq!(disk.read(range), 2, "the slow replica is asked");
    disk.slow_replica_answers();
    assert_eq!(disk.read(range), 3, "it is asked again");
}

#[test]
fn is_asked_however_slow_it_is_if_the_threshold_needs_it() {
    let mut disk = Disk::new(3);
    for _ in 0..LAG_OPERATIONS_MAX + 10 {
        assert_eq!(disk.read(SectorRange::new(8, 8)), 3);
    }
    assert_eq!(disk.answered, 0);
}
