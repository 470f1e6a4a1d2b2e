//! A replica is not evicted if the records could not say that any more (S3, W6).

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::Operation;
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::{ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::limits::SECTOR_BYTES;
use quorum_blk::record::{
    Creation, Extents, Holder, Keeper, Layout, MemberState, Record, Threshold,
};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;
use uuid::Uuid;

const SECTORS: u64 = 16;
const RANGE: SectorRange = SectorRange { start: 5, count: 1 };
const VOTES: u8 = 2;
const RETURNING: ReplicaIndex = ReplicaIndex(3);
const HUNG: [ReplicaIndex; 2] = [ReplicaIndex(0), ReplicaIndex(1)];

/// Four replicas, two of which decide, in virtual time. The records say that the last one is
/// missing, and that [`RANGE`] may be written.
struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    pool: BufferPool,
    clock: TurnClock,
    effects: Collected,
    /// These answer nothing.
    hangs: ReplicaSet,
    /// What they have not answered.
    hung: Vec<Operation>,
    /// The answer to the last write.
    answer: Option<bool>,
    requests: u64,
}

fn keeper() -> Keeper {
    let ids = [1, 2, 3, 4].map(Uuid::from_u128);
    let mut record = Record::create(&Creation {
        disk: Uuid::from_u128(10),
        branch: Uuid::from_u128(11),
        run: Uuid::from_u128(12),
        layout: Layout::with_extents(SECTORS, 1),
        threshold: Threshold {
            votes: VOTES,
            follows_majority: false,
        },
        members: ids.map(|id| (id, id.to_string())).into(),
    });
    let holds = Some(record.epoch);
    let missing = record.member_mut(ids[RETURNING.as_usize()]).unwrap();
    missing.state = MemberState::Inactive { holds };
    missing.stale_where_changed = true;
    let holders = ids.map(|member| {
        Some(Holder {
            member,
            sequence: 1,
        })
    });
    let mut marked = Extents::new(record.layout());
    marked.insert(RANGE);
    let mut keeper = Keeper::new(record, holders.into(), marked);
    while keeper.next_round().is_some() {
        keeper.ended(ReplicaSet::first(3));
    }
    keeper
}

impl Disk {
    fn new() -> Self {
        let shared = Arc::new(Shared::new(4, VOTES.into(), 1, SECTORS));
        shared.leave_out(RETURNING, &RangeSet::default());
        shared.remember(keeper());
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let policy = policy::plain(VOTES.into());
        let (its_shared, its_clock) = (Arc::clone(&shared), clock.clone());
        Self {
            engine: Engine::new(WorkerIndex(0), policy, its_shared, pool.clone(), its_clock),
            shared,
            pool,
            clock,
            effects: Collected::default(),
            hangs: ReplicaSet::EMPTY,
            hung: Vec::new(),
            answer: None,
            requests: 0,
        }
    }

    fn write(&mut self) {
        self.requests += 1;
        self.answer = None;
        let data = self.pool.take(usize::try_from(SECTOR_BYTES).unwrap());
        let write = GuestRequest::Write {
            range: RANGE,
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
                    Effect::Submit(operation) if self.hangs.contains(operation.replica) => {
                        self.hung.push(operation);
                    }
                    Effect::Submit(operation) => self
                        .engine
                        .reply(operation.reply(Ok(())), &mut self.effects),
                    Effect::Complete(_, result) => self.answer = Some(result.is_ok()),
                    _ => {}
                }
            }
        }
    }

    fn wait(&mut self, time: Duration) {
        let end = self.clock.now() + time;
        while let Some(deadline) = self.engine.deadline().filter(|at| *at < end) {
            let next = self.clock.now() + Duration::from_millis(1);
            self.clock.set(deadline.max(next));
            self.engine.tick(&mut self.effects);
            self.run();
        }
        self.clock.set(end);
    }

    fn answer_again(&mut self) {
        self.hangs = ReplicaSet::EMPTY;
        for operation in std::mem::take(&mut self.hung) {
            self.engine
                .reply(operation.reply(Ok(())), &mut self.effects);
        }
        self.run();
    }
}

/// Two of three replicas hang that the records say are active, while the fourth is there again. The
/// other two could be neither sure that those have not gone on alone, after a power cut, nor write
/// that these are out of service. So one of those that hang is waited for.
#[test]
fn a_replica_is_waited_for_without_which_the_records_cannot_be_changed() {
    let mut disk = Disk::new();
    HUNG.iter().for_each(|replica| disk.hangs.insert(*replica));
    disk.shared.record_found(RETURNING, 1);
    assert!(disk.shared.found(RETURNING, &RangeSet::default()));
    disk.engine.tick(&mut disk.effects);
    disk.run();
    assert_eq!(disk.shared.in_service().len(), 4);
    disk.write();
    disk.wait(Duration::from_secs(600));
    assert_eq!(disk.answer, None, "neither failed nor answered");
    assert_eq!(disk.shared.in_service().len(), 3);
    disk.answer_again();
    disk.wait(Duration::from_secs(600));
    assert_eq!(disk.answer, Some(true));
    assert_eq!(disk.shared.in_service().len(), 4);
    assert!(disk.shared.are_records_durable());
}

/// When the records say that one of them is out of service, the other one is not needed.
#[test]
fn a_replica_is_not_waited_for_when_the_records_say_enough_without_it() {
    let mut disk = Disk::new();
    disk.shared.record_found(RETURNING, 1);
    assert!(disk.shared.found(RETURNING, &RangeSet::default()));
    disk.engine.tick(&mut disk.effects);
    disk.run();
    disk.wait(Duration::from_secs(600));
    assert!(disk.shared.are_records_durable());
    HUNG.iter().for_each(|replica| disk.hangs.insert(*replica));
    disk.write();
    disk.wait(Duration::from_secs(600));
    assert_eq!(disk.answer, Some(true));
    assert_eq!(disk.shared.in_service().len(), 2);
}
