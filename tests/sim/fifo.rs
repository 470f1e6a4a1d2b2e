//! `read-pattern=fifo`: one replica after the other, and no vote (R8).

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::report::{Cause, Report};
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, ReadPattern, Shared, WorkerIndex};
use quorum_blk::sim::effects::{Collected, Effect, SECTOR_LEN, fill, tag};
use quorum_blk::sim::model::Value;
use quorum_blk::sim::policy;

/// What the engine has asked for.
#[derive(Debug, Default)]
struct Asked {
    operations: Vec<Operation>,
    answers: Vec<bool>,
    /// The replicas whose error was reported.
    reported: Vec<ReplicaIndex>,
}

impl Asked {
    fn take(effects: &mut Collected) -> Self {
        let mut asked = Self::default();
        for effect in effects.effects.drain(..) {
            match effect {
                Effect::Submit(operation) => asked.operations.push(operation),
                Effect::Complete(_, result) => asked.answers.push(result.is_ok()),
                Effect::Report(Report::Bad {
                    replica,
                    cause: Cause::Error(_),
                    ..
                }) => asked.reported.push(replica),
                _ => {}
            }
        }
        asked
    }

    /// The one operation, which is all.
    fn operation(mut self, replica: u8) -> Operation {
        assert!(self.answers.is_empty());
        let operation = self.operations.pop().expect("an operation");
        assert!(self.operations.is_empty(), "{:?}", self.operations);
        assert_eq!(operation.replica, ReplicaIndex(replica));
        operation
    }
}

#[test]
fn asks_one_replica_after_the_other_until_one_succeeds() {
    let policy = Policy {
        read_pattern: ReadPattern::Fifo,
        replica_timeout: Duration::from_secs(10),
        ..policy::plain(2)
    };
    let (pool, clock) = (BufferPool::default(), TurnClock::default());
    let shared = Arc::new(Shared::new(3, 2, 1, 64));
    let mut engine = Engine::new(WorkerIndex(0), policy, shared, pool, clock.clone());
    let mut effects = Collected::default();
    let read = GuestRequest::Read(SectorRange::new(8, 1));
    engine.submit(tag(1), read, &mut effects);
    let first = Asked::take(&mut effects).operation(0);
    clock.set(Duration::from_secs(1));
    engine.tick(&mut effects);
    let asked = Asked::take(&mut effects);
    assert!(asked.operations.is_empty(), "it is slow, and the first");
    engine.reply(first.reply(Err(Errno(5))), &mut effects);
    let asked = Asked::take(&mut effects);
    assert_eq!(asked.reported, [ReplicaIndex(0)]);
    let mut second = asked.operation(1);
    let Action::Read { into, .. } = &mut second.action else {
        panic!("{second:?}");
    };
    fill(&mut into[..SECTOR_LEN], Value(7));
    engine.reply(second.reply(Ok(())), &mut effects);
    assert_eq!(effects.values, [Some(Value(7))]);
    assert_eq!(Asked::take(&mut effects).answers, [true]);
}
