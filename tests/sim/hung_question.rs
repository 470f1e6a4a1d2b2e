//! What a job asks about holes keeps neither it nor the guest waiting, and hides no write (W8).

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

/// Two replicas, and room for [`NEW`].
struct Disk {
    shared: Arc<Shared>,
    clock: TurnClock,
    engine: Engine,
    effects: Collected,
    /// Whether a request of the guest was answered.
    answered: bool,
}

impl Disk {
    fn new() -> Self {
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
        Self {
            engine: Engine::new(WorkerIndex(0), policy, its_shared, pool, clock.clone()),
            shared,
            clock,
            effects: Collected::default(),
            answered: false,
        }
    }

    fn tick(&mut self, after: Duration) {
        self.clock.set(self.clock.now() + after);
        self.engine.tick(&mut self.effects);
    }

    fn write(&mut self) {
        let write = GuestRequest::Write {
            range: SectorRange::new(0, 1),
            data: BufferPool::default().take(512),
            durable: false,
        };
        self.engine.submit(tag(1), write, &mut self.effects);
    }

    fn reply(&mut self, operation: Operation) {
        self.engine
            .reply(operation.reply(Ok(())), &mut self.effects);
    }

    /// The operations that the engine has submitted.
    fn operations(&mut self) -> Vec<Operation> {
        let mut operations = Vec::new();
        for effect in std::mem::take(&mut self.effects.effects) {
            match effect {
                Effect::Submit(operation) => operations.push(operation),
                Effect::Complete(_, result) => self.answered = result.is_ok(),
                _ => {}
            }
        }
        operations
    }
}

#[test]
fn of_a_resync_holds_the_lock_no_longer_than_the_timeout() {
    let mut disk = Disk::new();
    disk.shared.add(NEW);
    let (mut hung, mut asked) = (Vec::<Operation>::new(), false);
    // All replicas do all but answer questions.
    for _ in 0..40 {
        disk.tick(TIMEOUT / 4);
        while !disk.effects.effects.is_empty() {
            for operation in disk.operations() {
                match operation.action {
                    Action::FindData { .. } => hung.push(operation),
                    _ => disk.reply(operation),
                }
            }
        }
        if !hung.is_empty() && !asked {
            asked = true;
            disk.write();
        }
    }
    assert!(asked && disk.answered, "the guest waits for the answer");
    assert_eq!(disk.shared.stale_sectors(NEW), 0, "the range is read");
    for question in hung {
        disk.reply(question);
    }
    disk.engine.self_check();
}

/// Without the lock the first replicas answer before the write lands, and the new one after the
/// next flush: nothing shows then that the answers are of different times.
#[test]
fn of_a_resync_waits_for_a_write_that_the_new_replica_has_missed() {
    let mut disk = Disk::new();
    disk.write();
    let mut writes = disk.operations();
    assert_eq!(writes.len(), 2);
    disk.shared.add(NEW);
    let (mut has_data, mut is_copied) = (false, false);
    let mut late = Vec::new();
    for round in 0..30 {
        disk.tick(TIMEOUT / 100);
        if round == 10 {
            has_data = true;
            for write in writes.drain(..) {
                disk.reply(write);
            }
            let flush = GuestRequest::Flush;
            disk.engine.submit(tag(2), flush, &mut disk.effects);
        }
        if round == 20 {
            for question in late.drain(..) {
                disk.reply(question);
            }
        }
        while !disk.effects.effects.is_empty() {
            for mut operation in disk.operations() {
                let is_new = operation.replica == NEW;
                match &mut operation.action {
                    Action::FindData { range, found } => {
                        match has_data && !is_new {
                            true => found.data_until(range.end()),
                            false => found.hole_until(range.end()),
                        }
                        if is_new && round < 20 {
                            late.push(operation);
                            continue;
                        }
                    }
                    Action::Write { range, .. } | Action::Zero { range, .. } => {
                        is_copied |= is_new && range.start == 0;
                    }
                    Action::Read { .. } | Action::Flush | Action::Record { .. } => {}
                }
                disk.reply(operation);
            }
        }
    }
    assert_eq!(disk.shared.stale_sectors(NEW), 0, "the resync has ended");
    assert!(is_copied, "what was written is missing on the new replica");
    disk.engine.self_check();
}
