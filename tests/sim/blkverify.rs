//! A `--blkverify` disk whose replicas differ.

use std::sync::Arc;

use quorum_blk::common::SectorRange;
use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::Action;
use quorum_blk::common::report::Report;
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

#[test]
fn the_read_is_reported_and_answered_before_the_daemon_is_stopped() {
    let policy = Policy {
        blkverify: true,
        ..policy::plain(2)
    };
    let shared = Arc::new(Shared::new(2, 2, 1, 64));
    let (pool, clock) = (BufferPool::default(), TurnClock::default());
    let mut engine = Engine::new(WorkerIndex(0), policy, shared, pool, clock);
    let mut effects = Collected::default();
    let range = SectorRange::new(8, 1);
    engine.submit(tag(1), GuestRequest::Read(range), &mut effects);
    // The first pass, then the read under the lock.
    for _ in 0..2 {
        for effect in std::mem::take(&mut effects.effects) {
            let Effect::Submit(mut operation) = effect else {
                panic!("{effect:?}");
            };
            if let Action::Read { into, .. } = &mut operation.action {
                into.fill(operation.replica.0);
            }
            engine.reply(operation.reply(Ok(())), &mut effects);
        }
    }
    assert!(
        matches!(
            effects.effects[..],
            [
                Effect::Report(Report::Failure { .. }),
                Effect::Complete(_, Err(_)),
                Effect::ContentsDiffer(differs),
            ] if differs == range
        ),
        "{:?}",
        effects.effects
    );
}
