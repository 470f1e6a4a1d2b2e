//! A replica that goes on with a long operation step by step is not late with it (W6).

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::limits::LATE_LONG_LIMIT;
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const SLOW: ReplicaIndex = ReplicaIndex(2);
const TIMEOUT: Duration = Duration::from_secs(1);

#[test]
fn with_a_zeroing_keeps_a_replica_in_service_until_it_ends() {
    let policy = Policy {
        replica_timeout: TIMEOUT,
        ..policy::plain(2)
    };
    let (shared, clock) = (Arc::new(Shared::new(3, 2, 1, 64)), TurnClock::default());
    let mut engine = Engine::new(
        WorkerIndex(0),
        policy,
        Arc::clone(&shared),
        BufferPool::default(),
        clock.clone(),
    );
    let mut effects = Collected::default();
    let zero = GuestRequest::Zero {
        range: SectorRange::new(0, 64),
        unmap: true,
        durable: false,
    };
    engine.submit(tag(1), zero, &mut effects);
    let mut operations: Vec<Operation> = Vec::new();
    for effect in std::mem::take(&mut effects.effects) {
        match effect {
            Effect::Submit(operation) if operation.replica == SLOW => operations.push(operation),
            Effect::Submit(operation) => engine.reply(operation.reply(Ok(())), &mut effects),
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(operations[0].action, Action::Zero { .. }));
    let mut in_service_at = |seconds: u64| {
        let mut now = clock.now();
        while now < Duration::from_secs(seconds) {
            now += TIMEOUT / 4;
            clock.set(now);
            engine.tick(&mut effects);
        }
        engine.progressed(SLOW);
        shared.in_service().contains(SLOW)
    };
    let limit = u64::from(LATE_LONG_LIMIT);
    let mut now = 0;
    for step in 1..=8 {
        now += limit - 2;
        assert!(in_service_at(now), "evicted in step {step}");
    }
    assert!(in_service_at(now + limit - 1));
    assert!(!in_service_at(now + 3 * limit), "without a step it is late");
}
