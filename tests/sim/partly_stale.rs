//! A block of which only some sectors are stale on a replica: the copies of the others vote when a
//! resync copies the block.

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::jobs::Sizes;
use quorum_blk::sim::effects::{Collected, Effect, SECTOR_LEN, tag};
use quorum_blk::sim::policy;

const BLOCK: SectorRange = SectorRange { start: 8, count: 8 };
const STALE: ReplicaIndex = ReplicaIndex(2);
const OLD: u8 = 1;
const NEW: u8 = 2;
const CORRUPT: u8 = 3;

/// Three replicas, each of them one byte for each sector of [`BLOCK`].
struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    clock: TurnClock,
    pool: BufferPool,
    effects: Collected,
    holds: [[u8; 8]; 3],
    /// Every write fails. On [`STALE`] it has written the first sector.
    writes_fail: bool,
}

impl Disk {
    fn new() -> Self {
        let policy = Policy {
            job_sizes: Sizes {
                neighbourhood_sectors: 0,
                ..Sizes::default()
            },
            block_sectors: BLOCK.count,
            ..policy::plain(2)
        };
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let shared = Arc::new(Shared::new(3, 2, 1, 64));
        Self {
            engine: Engine::new(
                WorkerIndex(0),
                policy,
                Arc::clone(&shared),
                pool.clone(),
                clock.clone(),
            ),
            shared,
            clock,
            pool,
            effects: Collected::default(),
            holds: [[OLD; 8]; 3],
            writes_fail: false,
        }
    }

    /// Carries the request out. Returns whether it succeeds.
    fn run(&mut self, number: u64, request: GuestRequest) -> bool {
        self.engine.submit(tag(number), request, &mut self.effects);
        self.carry_out().expect("an answer")
    }

    /// Carries out what the engine asks for. Returns whether a request has succeeded.
    fn carry_out(&mut self) -> Option<bool> {
        let mut success = None;
        while !self.effects.effects.is_empty() {
            match self.effects.effects.remove(0) {
                Effect::Submit(operation) => self.operate(operation),
                Effect::Complete(_, result) => success = Some(result.is_ok()),
                _ => {}
            }
        }
        success
    }

    fn operate(&mut self, mut operation: Operation) {
        let index = operation.replica.as_usize();
        let holds = &mut self.holds[index];
        let mut result = Ok(());
        match &mut operation.action {
            Action::Read { range, into } => {
                assert_eq!(*range, BLOCK, "blocks are read as a whole");
                for (sector, byte) in into.chunks_exact_mut(SECTOR_LEN).zip(holds) {
                    sector.fill(*byte);
                }
            }
            Action::Write { data, .. } if self.writes_fail => {
                if operation.replica == STALE {
                    holds[0] = data[0];
                }
                result = Err(Errno(28));
            }
            Action::Write { range, data, .. } => {
                assert_eq!(*range, BLOCK, "blocks are written as a whole");
                for (byte, sector) in holds.iter_mut().zip(data.chunks_exact(SECTOR_LEN)) {
                    *byte = sector[0];
                }
            }
            Action::Flush => {}
            action => panic!("{action:?}"),
        }
        self.engine
            .reply(operation.reply(result), &mut self.effects);
    }
}

#[test]
fn a_block_is_resynced_though_it_needs_the_vote_of_its_own_fresh_sectors() {
    let mut disk = Disk::new();
    let mut data = disk.pool.take(8 * SECTOR_LEN);
    data.fill(NEW);
    let write = GuestRequest::Write {
        range: BLOCK,
        data,
        durable: false,
    };
    disk.writes_fail = true;
    assert!(!disk.run(1, write));
    // The vote decides for the old version, which cannot be written to the third replica.
    assert!(disk.run(2, GuestRequest::Read(BLOCK)));
    disk.writes_fail = false;
    let first = SectorRange::new(BLOCK.start, 1);
    assert!(disk.shared.stale_ranges(STALE).iter().eq([first]));
    // Now that sector 4 is corrupt on another replica, the third has one of its last two copies.
    disk.holds[0][4] = CORRUPT;
    let mut now = Duration::ZERO;
    while disk.shared.stale_sectors(STALE) > 0 {
        assert!(now < Duration::from_secs(100), "no resync succeeds");
        disk.clock.set(now);
        disk.engine.tick(&mut disk.effects);
        disk.carry_out();
        now = disk
            .engine
            .deadline()
            .map_or(now, |deadline| deadline.max(now));
    }
    assert_eq!(disk.holds[1..], [[OLD; 8]; 2]);
}
