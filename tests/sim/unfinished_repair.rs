//! A replica that is evicted while it is being repaired is repaired by a resync once it rejoins.

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::jobs::Sizes;
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const CORRUPT: ReplicaIndex = ReplicaIndex(2);
const RANGE: SectorRange = SectorRange { start: 8, count: 1 };

struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    clock: TurnClock,
    now: Duration,
    effects: Collected,
}

impl Disk {
    fn new() -> Self {
        let policy = Policy {
            rewrite_corrupted: true,
            job_sizes: Sizes {
                neighbourhood_sectors: 0,
                ..Sizes::default()
            },
            ..policy::plain(2)
        };
        let shared = Arc::new(Shared::new(3, 2, 1, 64));
        let clock = TurnClock::default();
        let engine = Engine::new(
            WorkerIndex(0),
            policy,
            Arc::clone(&shared),
            BufferPool::default(),
            clock.clone(),
        );
        Self {
            engine,
            shared,
            clock,
            now: Duration::ZERO,
            effects: Collected::default(),
        }
    }

    /// The operations that the engine has submitted since the last call.
    fn submitted(&mut self) -> Vec<Operation> {
        let effects = self.effects.effects.drain(..);
        let operations = effects.filter_map(|effect| match effect {
            Effect::Submit(operation) => Some(operation),
            _ => None,
        });
        operations.collect()
    }

    fn reply(&mut self, mut operation: Operation, result: Result<(), Errno>) {
        let byte = u8::from(operation.replica == CORRUPT);
        if let Action::Read { into, .. } = &mut operation.action {
            into.fill(byte);
        }
        self.engine
            .reply(operation.reply(result), &mut self.effects);
    }

    fn tick(&mut self, now: Duration) {
        self.now = now;
        self.clock.set(now);
        self.engine.tick(&mut self.effects);
    }

    /// Has a read find the corrupt replica, and evicts that while it is being repaired. Returns the
    /// repairing write, which is in flight.
    fn evict_during_repair(&mut self) -> Operation {
        self.engine
            .submit(tag(1), GuestRequest::Read(RANGE), &mut self.effects);
        // The first pass, then the read under the lock.
        for _ in 0..2 {
            for operation in self.submitted() {
                self.reply(operation, Ok(()));
            }
        }
        let mut repairs = self.submitted();
        assert!(
            matches!(&repairs[..], [repair] if repair.replica == CORRUPT),
            "{repairs:?}"
        );
        self.tick(Duration::from_secs(2));
        assert!(
            !self.shared.in_service().contains(CORRUPT),
            "it is not evicted"
        );
        repairs.remove(0)
    }
}

#[test]
fn is_stale_on_the_replica() {
    let mut disk = Disk::new();
    let _in_flight = disk.evict_during_repair();
    assert!(disk.shared.stale_ranges(CORRUPT).iter().eq([RANGE]));
}

#[test]
fn is_done_by_a_resync_after_the_replica_has_rejoined() {
    for result in [Err(Errno(5)), Ok(())] {
        let mut disk = Disk::new();
        let repair = disk.evict_during_repair();
        disk.reply(repair, result);
        let mut copied = Vec::new();
        // Until the engine has nothing left to do.
        while let Some(deadline) = disk.engine.deadline() {
            assert!(disk.now < Duration::from_secs(100), "the engine never ends");
            disk.tick(deadline.max(disk.now));
            for operation in disk.submitted() {
                if let Action::Write { range, .. } | Action::Zero { range, .. } = operation.action {
                    copied.push((operation.replica, range));
                }
                disk.reply(operation, Ok(()));
            }
        }
        assert!(disk.shared.in_service().contains(CORRUPT), "{result:?}");
        assert_eq!(
            copied,
            [(CORRUPT, RANGE)],
            "the repair ended with {result:?}"
        );
        assert_eq!(disk.shared.stale_sectors(CORRUPT), 0);
    }
}
