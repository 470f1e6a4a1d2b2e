//! What an operator prefers is marked in the records before it is written (W12, S4).

use std::sync::Arc;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::quorum::health::Preferable;
use quorum_blk::record::{
    Creation, Extents, Holder, Keeper, Layout, MemberState, Record, Threshold,
};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;
use uuid::Uuid;

const SECTORS: u64 = 16;
const SECTOR: SectorRange = SectorRange { start: 5, count: 1 };

/// Two replicas in service, each of them one byte for [`SECTOR`], and one that is missing. Their
/// records have an extent for each sector.
struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    effects: Collected,
    holds: [u8; 2],
    /// Writes to records fail.
    is_full: bool,
}

/// The records of three replicas, the last of which is missing, and has missed nothing yet.
fn keeper() -> Keeper {
    let ids = [1, 2, 3].map(Uuid::from_u128);
    let mut record = Record::create(&Creation {
        disk: Uuid::from_u128(10),
        branch: Uuid::from_u128(11),
        run: Uuid::from_u128(12),
        layout: Layout::with_extents(SECTORS, 1),
        threshold: Threshold {
            votes: 2,
            follows_majority: false,
        },
        members: ids.map(|id| (id, id.to_string())).into(),
    });
    let holds = Some(record.epoch);
    let missing = record.member_mut(ids[2]).unwrap();
    missing.state = MemberState::Inactive { holds };
    missing.stale_where_changed = true;
    let holders = ids.map(|member| {
        Some(Holder {
            member,
            sequence: 1,
        })
    });
    let unmarked = Extents::new(record.layout());
    let mut keeper = Keeper::new(record, holders.into(), unmarked);
    while keeper.next_round().is_some() {
        keeper.ended(ReplicaSet::first(2));
    }
    keeper
}

impl Disk {
    fn new(holds: [u8; 2]) -> Self {
        let shared = Arc::new(Shared::new(3, 2, 1, SECTORS));
        shared.leave_out(ReplicaIndex(2), &RangeSet::default());
        shared.remember(keeper());
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let shared_too = Arc::clone(&shared);
        Self {
            engine: Engine::new(WorkerIndex(0), policy::plain(2), shared_too, pool, clock),
            shared,
            effects: Collected::default(),
            holds,
            is_full: false,
        }
    }

    fn read(&mut self, number: u64) -> bool {
        let read = GuestRequest::Read(SECTOR);
        self.engine.submit(tag(number), read, &mut self.effects);
        self.carry_out().expect("an answer")
    }

    fn prefer(&mut self, replica: ReplicaIndex) {
        let Preferable { undecided, .. } = self.shared.preferable(replica).unwrap();
        let started = self.shared.jobs(drop, |jobs, health| {
            jobs.prefer(replica, undecided, 0, health)
        });
        started.unwrap();
        self.engine.tick(&mut self.effects);
        self.carry_out();
    }

    /// Whether the request, if there is one, succeeds.
    fn carry_out(&mut self) -> Option<bool> {
        let mut answer = None;
        while !self.effects.effects.is_empty() {
            match self.effects.effects.remove(0) {
                Effect::Submit(operation) => self.operate(operation),
                Effect::Complete(_, result) => answer = Some(result.is_ok()),
                _ => {}
            }
        }
        answer
    }

    fn operate(&mut self, mut operation: Operation) {
        let replica = operation.replica.as_usize();
        let mut result = Ok(());
        match &mut operation.action {
            Action::Read { into, .. } => into.fill(self.holds[replica]),
            Action::Write {
                data, offset_bytes, ..
            } => {
                assert!(self.is_marked(), "it is written before it is marked");
                self.holds[replica] = data[*offset_bytes];
            }
            Action::Record { .. } if self.is_full => result = Err(Errno(28)),
            _ => {}
        }
        let reply = operation.reply(result);
        self.engine.reply(reply, &mut self.effects);
    }

    fn is_marked(&self) -> bool {
        let marked = |keeper: &Keeper| keeper.is_durable() && keeper.intent().contains(SECTOR);
        self.shared.records(marked).unwrap()
    }
}

/// Otherwise the record of the missing replica would not say that it has missed that, and its copy
/// would vote after the next start.
#[test]
fn what_a_missing_replica_has_not_is_marked_before_it_is_written() {
    let mut disk = Disk::new([1, 2]);
    assert!(!disk.read(1) && !disk.is_marked());
    disk.prefer(ReplicaIndex(1));
    assert_eq!(disk.holds, [2, 2]);
    assert!(disk.read(2) && disk.is_marked());
}

#[test]
fn nothing_is_written_that_cannot_be_marked() {
    let mut disk = Disk::new([1, 2]);
    assert!(!disk.read(1));
    disk.is_full = true;
    disk.prefer(ReplicaIndex(1));
    assert_eq!(disk.holds, [1, 2]);
    // What an operator sees of it.
    assert!(disk.shared.record_write_errors(ReplicaIndex(0)) > 0);
    assert_eq!(disk.shared.record_write_errors(ReplicaIndex(2)), 0);
    let before = disk.shared.record_figures();
    assert!(before.rounds > 0);
    disk.is_full = false;
    assert!(!disk.read(2));
    disk.prefer(ReplicaIndex(1));
    assert_eq!(disk.holds, [2, 2]);
    let figures = disk.shared.record_figures();
    assert!(figures.rounds > before.rounds && figures.marked_sectors >= SECTOR.count);
}
