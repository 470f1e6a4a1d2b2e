//! A replica that does not say where it has holes keeps neither a job nor the guest waiting (W8).

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::jobs::{HoleSizes, Sizes};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const NEW: ReplicaIndex = ReplicaIndex(2);
const TIMEOUT: Duration = Duration::from_secs(1);

#[test]
fn of_a_resync_holds_the_lock_no_longer_than_the_timeout() {
    let holes = HoleSizes {
        read_min: 8,
        ..HoleSizes::default()
    };
    let policy = Policy {
        replica_timeout: TIMEOUT,
        job_sizes: Sizes {
            holes,
            ..Sizes::default()
        },
        ..policy::plain(2)
    };
    let (shared, clock) = (Arc::new(Shared::new(2, 2, 1, 64)), TurnClock::default());
    let (pool, its_shared) = (BufferPool::default(), Arc::clone(&shared));
    let mut engine = Engine::new(WorkerIndex(0), policy, its_shared, pool, clock.clone());
    let mut effects = Collected::default();
    shared.add(NEW);
    let (mut hung, mut answered) = (Vec::<Operation>::new(), false);
    let mut asked = false;
    // All replicas do all but answer questions.
    for _ in 0..40 {
        clock.set(clock.now() + TIMEOUT / 4);
        engine.tick(&mut effects);
        while !effects.effects.is_empty() {
            for effect in std::mem::take(&mut effects.effects) {
                match effect {
                    Effect::Submit(operation) => match operation.action {
                        Action::FindData { .. } => hung.push(operation),
                        _ => engine.reply(operation.reply(Ok(())), &mut effects),
                    },
                    Effect::Complete(_, result) => answered = result.is_ok(),
                    _ => {}
                }
            }
        }
        if !hung.is_empty() && !asked {
            asked = true;
            let write = GuestRequest::Write {
                range: SectorRange::new(0, 1),
                data: BufferPool::default().take(512),
                durable: false,
            };
            engine.submit(tag(1), write, &mut effects);
        }
    }
    assert!(asked && answered, "the guest waits for the answer");
    assert_eq!(shared.stale_sectors(NEW), 0, "the range is read");
    for question in hung {
        engine.reply(question.reply(Ok(())), &mut effects);
    }
    engine.self_check();
}
