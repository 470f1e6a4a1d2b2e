//! A replica that is evicted again and again rejoins later each time (W6).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::report::Report;
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::limits::{FLAPPING_EVICTIONS, SECTOR_BYTES};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const GOOD: ReplicaIndex = ReplicaIndex(0);
const SLOW: ReplicaIndex = ReplicaIndex(1);
const FLAPPING: ReplicaIndex = ReplicaIndex(2);
const RANGE: SectorRange = SectorRange { start: 8, count: 1 };
const ELSEWHERE: SectorRange = SectorRange { start: 9, count: 1 };
/// Longer than anything here may take.
const END: Duration = Duration::from_secs(3600);

/// Three replicas, in virtual time.
struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    pool: BufferPool,
    clock: TurnClock,
    effects: Collected,
    /// What the replicas that hang have not answered.
    hung: BTreeMap<ReplicaIndex, Vec<Operation>>,
    /// The next write of this replica fails.
    failing: Option<ReplicaIndex>,
    /// For how long [`FLAPPING`] was last said to be kept out.
    kept_out: Option<Duration>,
    requests: u64,
}

impl Disk {
    fn new(threshold: usize) -> Self {
        let shared = Arc::new(Shared::new(3, threshold, 1, 64));
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let policy = policy::plain(threshold);
        let (its_shared, its_clock) = (Arc::clone(&shared), clock.clone());
        Self {
            engine: Engine::new(WorkerIndex(0), policy, its_shared, pool.clone(), its_clock),
            shared,
            pool,
            clock,
            effects: Collected::default(),
            hung: BTreeMap::new(),
            failing: None,
            kept_out: None,
            requests: 0,
        }
    }

    fn write(&mut self, range: SectorRange) {
        self.requests += 1;
        let len = range.count * SECTOR_BYTES;
        let data = self.pool.take(usize::try_from(len).unwrap());
        let write = GuestRequest::Write {
            range,
            data,
            durable: false,
        };
        self.engine
            .submit(tag(self.requests), write, &mut self.effects);
        self.run();
    }

    /// The replicas do what they are asked for, except for those that hang.
    fn run(&mut self) {
        while !self.effects.effects.is_empty() {
            for effect in std::mem::take(&mut self.effects.effects) {
                match effect {
                    Effect::Submit(operation) => self.serve(operation),
                    Effect::Report(Report::KeptOut { replica, time }) => {
                        assert_eq!(replica, FLAPPING);
                        self.kept_out = Some(time);
                    }
                    _ => {}
                }
            }
        }
    }

    fn serve(&mut self, operation: Operation) {
        let replica = operation.replica;
        if let Some(hung) = self.hung.get_mut(&replica) {
            hung.push(operation);
            return;
        }
        let fails =
            matches!(operation.action, Action::Write { .. }) && self.failing == Some(replica);
        let result = if fails { Err(Errno(5)) } else { Ok(()) };
        self.failing = self.failing.filter(|_| !fails);
        self.engine
            .reply(operation.reply(result), &mut self.effects);
    }

    fn hangs(&mut self, replica: ReplicaIndex) {
        self.hung.insert(replica, Vec::new());
    }

    /// It has done what it was asked for, and hangs with what comes next.
    fn catches_up(&mut self, replica: ReplicaIndex) {
        let hung = self.hung.get_mut(&replica).expect("it hangs");
        for operation in std::mem::take(hung) {
            self.engine
                .reply(operation.reply(Ok(())), &mut self.effects);
        }
        self.run();
    }

    fn answers_again(&mut self, replica: ReplicaIndex) {
        self.catches_up(replica);
        self.hung.remove(&replica);
    }

    fn is_in_service(&self, replica: ReplicaIndex) -> bool {
        self.shared.in_service().contains(replica)
    }

    /// Lets time pass until a replica is in service, or is not. Returns how long that took.
    fn wait_until_in_service(&mut self, replica: ReplicaIndex, wanted: bool) -> Duration {
        let began = self.clock.now();
        while self.is_in_service(replica) != wanted {
            let deadline = self.engine.deadline().expect("something is to happen");
            self.clock.set(deadline.max(self.clock.now()));
            assert!(
                self.clock.now() < END,
                "{replica:?} in service: {}",
                !wanted
            );
            self.engine.tick(&mut self.effects);
            self.run();
        }
        self.clock.now() - began
    }

    /// Has the replica evicted, after which it answers at once.
    fn evict(&mut self) {
        self.hangs(FLAPPING);
        self.write(RANGE);
        self.kept_out = None;
        self.wait_until_in_service(FLAPPING, false);
        self.answers_again(FLAPPING);
    }
}

#[test]
fn keeps_a_replica_out_for_longer_and_longer() {
    let mut disk = Disk::new(2);
    let mut out = Vec::new();
    for _ in 0..FLAPPING_EVICTIONS + 3 {
        disk.evict();
        let took = disk.wait_until_in_service(FLAPPING, true);
        let told = disk.kept_out.unwrap_or_default();
        let latest = told + Duration::from_secs(1);
        assert!(
            (told..latest).contains(&took),
            "{took:?} instead of {told:?}"
        );
        out.push(told.as_secs());
    }
    assert_eq!(out, [0, 0, 2, 4, 8, 16]);
}

#[test]
fn keeps_no_replica_out_while_another_is_late_and_needed() {
    let long = Duration::from_secs(60);
    let mut disk = Disk::new(1);
    disk.evict();
    while disk.kept_out.unwrap_or_default() < long {
        disk.wait_until_in_service(FLAPPING, true);
        disk.evict();
    }
    disk.failing = Some(GOOD);
    disk.hangs(SLOW);
    disk.write(ELSEWHERE);
    disk.catches_up(SLOW);
    // Only the slow replica holds this write. It answers no more.
    disk.write(RANGE);
    let took = disk.wait_until_in_service(FLAPPING, true);
    assert!(disk.is_in_service(SLOW), "it is needed");
    assert!(took < long / 2, "it is kept out for {took:?}");
}
