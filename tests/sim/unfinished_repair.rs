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
        Self::with_workers(1).0
    }

    /// A disk with the first worker, and the engines of the others.
    fn with_workers(workers: u16) -> (Self, Vec<Engine>) {
        let policy = Policy {
            rewrite_corrupted: true,
            job_sizes: Sizes {
                neighbourhood_sectors: 0,
                ..Sizes::default()
            },
            ..policy::plain(2)
        };
        let shared = Arc::new(Shared::new(3, 2, workers, 64));
        let clock = TurnClock::default();
        let engine = |worker| {
            Engine::new(
                WorkerIndex(worker),
                policy.clone(),
                Arc::clone(&shared),
                BufferPool::default(),
                clock.clone(),
            )
        };
        let disk = Self {
            engine: engine(0),
            shared: Arc::clone(&shared),
            clock: clock.clone(),
            now: Duration::ZERO,
            effects: Collected::default(),
        };
        (disk, (1..workers).map(engine).collect())
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

    /// Has a read find the corrupt replica. Returns the repairing write, which is in flight.
    fn begin_repair(&mut self) -> Operation {
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
        repairs.remove(0)
    }

    fn assert_evicted(&self) {
        let in_service = self.shared.in_service();
        assert!(!in_service.contains(CORRUPT), "it is not evicted");
    }

    /// The same, and evicts the replica.
    fn evict_during_repair(&mut self) -> Operation {
        let repair = self.begin_repair();
        self.tick(Duration::from_secs(2));
        self.assert_evicted();
        repair
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

/// Another worker has evicted the replica, and this one has not seen it yet.
#[test]
fn is_stale_on_a_replica_that_fails_it_after_an_eviction() {
    for result in [Err(Errno(28)), Ok(())] {
        let (mut disk, mut others) = Disk::with_workers(2);
        let repair = disk.begin_repair();
        let (other, mut effects) = (&mut others[0], Collected::default());
        let write = GuestRequest::Write {
            range: SectorRange::new(40, 1),
            data: BufferPool::default().take(512),
            durable: false,
        };
        other.submit(tag(1), write, &mut effects);
        for effect in std::mem::take(&mut effects.effects) {
            if let Effect::Submit(operation) = effect
                && operation.replica != CORRUPT
            {
                other.reply(operation.reply(Ok(())), &mut effects);
            }
        }
        disk.clock.set(Duration::from_secs(2));
        other.tick(&mut effects);
        disk.assert_evicted();
        disk.reply(repair, result);
        let stale = disk.shared.stale_ranges(CORRUPT);
        assert!(stale.iter().any(|range| range == RANGE), "{result:?}");
    }
}
