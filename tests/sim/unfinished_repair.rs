//! A replica that is evicted while it is being repaired is still to be repaired.

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, ReadPattern, Shared, WorkerIndex};
use quorum_blk::jobs::Sizes;
use quorum_blk::sim::effects::{Collected, Effect, tag};

const CORRUPT: ReplicaIndex = ReplicaIndex(2);
const RANGE: SectorRange = SectorRange { start: 8, count: 1 };

fn submitted(effects: &mut Collected) -> Vec<Operation> {
    let effects = effects.effects.drain(..);
    let operations = effects.filter_map(|effect| match effect {
        Effect::Submit(operation) => Some(operation),
        _ => None,
    });
    operations.collect()
}

#[test]
fn is_stale_on_the_replica() {
    let policy = Policy {
        threshold: 2,
        read_pattern: ReadPattern::Quorum,
        rewrite_corrupted: true,
        blkverify: false,
        job_sizes: Sizes {
            neighbourhood_sectors: 0,
            ..Sizes::default()
        },
        block_sectors: 1,
        replica_timeout: Duration::from_secs(1),
    };
    let shared = Arc::new(Shared::new(3, 2, 1, 64));
    let clock = TurnClock::default();
    let mut engine = Engine::new(
        WorkerIndex(0),
        policy,
        Arc::clone(&shared),
        BufferPool::default(),
        clock.clone(),
    );
    let mut effects = Collected::default();
    engine.submit(tag(1), GuestRequest::Read(RANGE), &mut effects);
    // The first pass, then the read under the lock.
    for _ in 0..2 {
        for mut operation in submitted(&mut effects) {
            let byte = u8::from(operation.replica == CORRUPT);
            if let Action::Read { into, .. } = &mut operation.action {
                into.fill(byte);
            }
            engine.reply(operation.reply(Ok(())), &mut effects);
        }
    }
    let repairs = submitted(&mut effects);
    assert!(
        matches!(&repairs[..], [repair] if repair.replica == CORRUPT),
        "{repairs:?}"
    );
    clock.set(Duration::from_secs(2));
    engine.tick(&mut effects);
    assert!(!shared.in_service().contains(CORRUPT), "it is evicted");
    assert_eq!(shared.stale_ranges(CORRUPT), [RANGE]);
}
