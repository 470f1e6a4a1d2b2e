//! A member whose image is missing at the start is not asked, and rejoins when it is open (W13).

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::report::Report;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::jobs::{HoleSizes, Sizes};
use quorum_blk::quorum::health::{NotRemoved, Wanted};
use quorum_blk::sim::effects::{Collected, Effect, SECTOR_LEN, tag};
use quorum_blk::sim::policy;

const SECTORS: usize = 16;
const MISSING: ReplicaIndex = ReplicaIndex(2);
const OLD: u8 = 1;
const NEW: u8 = 2;
/// What no other replica holds.
const OWN: u8 = 3;

/// Three replicas, each of them one byte for each sector. The third is missing at the start, and
/// stale in the sectors 0 to 7.
struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    clock: TurnClock,
    pool: BufferPool,
    effects: Collected,
    holds: [[u8; SECTORS]; 3],
    rejoined: Vec<ReplicaIndex>,
    released: Vec<ReplicaIndex>,
    requests: u64,
}

impl Disk {
    fn new() -> Self {
        let policy = Policy {
            job_sizes: Sizes {
                neighbourhood_sectors: 0,
                holes: HoleSizes::default(),
                ..Sizes::default()
            },
            block_sectors: 1,
            ..policy::plain(2)
        };
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let shared = Arc::new(Shared::new(3, 2, 1, SECTORS as u64));
        let mut stale = RangeSet::default();
        stale.insert(SectorRange::new(0, 8));
        shared.leave_out(MISSING, &stale);
        let mut holds = [[OLD; SECTORS]; 3];
        holds[2] = [OWN; SECTORS];
        holds[2][8..].fill(OLD);
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
            holds,
            rejoined: Vec::new(),
            released: Vec::new(),
            requests: 0,
        }
    }

    /// Carries the request out. Returns whether it succeeds, if it is answered.
    fn run(&mut self, request: GuestRequest) -> Option<bool> {
        self.requests += 1;
        let tag = tag(self.requests);
        self.engine.submit(tag, request, &mut self.effects);
        self.carry_out()
    }

    fn write(&mut self, sector: u64) {
        let mut data = self.pool.take(SECTOR_LEN);
        data.fill(NEW);
        let write = GuestRequest::Write {
            range: SectorRange::new(sector, 1),
            data,
            durable: false,
        };
        assert_eq!(self.run(write), Some(true));
    }

    fn carry_out(&mut self) -> Option<bool> {
        let mut answer = None;
        while !self.effects.effects.is_empty() {
            match self.effects.effects.remove(0) {
                Effect::Submit(operation) => self.operate(operation),
                Effect::Complete(_, result) => answer = Some(result.is_ok()),
                Effect::Report(Report::Rejoined(replica)) => self.rejoined.push(replica),
                Effect::Released(replica) => self.released.push(replica),
                _ => {}
            }
        }
        answer
    }

    fn operate(&mut self, mut operation: Operation) {
        let replica = operation.replica;
        assert!(
            !self.shared.missing().contains(replica),
            "asked without an image: {operation:?}"
        );
        let holds = &mut self.holds[replica.as_usize()];
        let sectors = |range: &SectorRange| {
            let start = usize::try_from(range.start).unwrap();
            start..start + usize::try_from(range.count).unwrap()
        };
        let mut result = Ok(());
        match &mut operation.action {
            Action::Read { range, into } => {
                let bytes = &holds[sectors(range)];
                for (sector, byte) in into.chunks_exact_mut(SECTOR_LEN).zip(bytes) {
                    sector.fill(*byte);
                }
            }
            Action::Write { range, data, .. } => {
                let bytes = &mut holds[sectors(range)];
                for (byte, sector) in bytes.iter_mut().zip(data.chunks_exact(SECTOR_LEN)) {
                    *byte = sector[0];
                }
            }
            Action::Flush => {}
            // It does not know of any.
            _ => result = Err(Errno(95)),
        }
        self.engine
            .reply(operation.reply(result), &mut self.effects);
    }

    /// Lets so much time pass.
    fn wait(&mut self, time: Duration) {
        let end = self.clock.now() + time;
        while let Some(deadline) = self.engine.deadline().filter(|deadline| *deadline <= end) {
            self.clock.set(deadline.max(self.clock.now()));
            self.engine.tick(&mut self.effects);
            self.carry_out();
        }
        self.clock.set(end);
        self.tick();
    }

    fn tick(&mut self) {
        self.engine.tick(&mut self.effects);
        self.carry_out();
    }
}

#[test]
fn it_is_not_asked_and_rejoins_when_its_image_is_open() {
    let mut disk = Disk::new();
    disk.write(9);
    assert_eq!(disk.run(GuestRequest::Flush), Some(true));
    disk.wait(Duration::from_secs(100));
    assert_eq!(disk.engine.deadline(), None, "nothing is to be done");
    let all = SectorRange::new(0, SECTORS as u64);
    assert_eq!(disk.run(GuestRequest::Read(all)), Some(true));
    assert_eq!(disk.shared.stale_sectors(MISSING), 9);
    assert!(disk.rejoined.is_empty());

    assert!(disk.shared.found(MISSING, &RangeSet::default()));
    disk.tick();
    assert_eq!(disk.rejoined, [MISSING]);
    assert_eq!(disk.shared.in_service(), ReplicaSet::first(3));
    disk.wait(Duration::from_secs(100));
    assert_eq!(disk.shared.stale_sectors(MISSING), 0);
    assert_eq!(disk.holds[2], disk.holds[0]);
}

/// With two versions on the others there is no quorum.
#[test]
fn it_does_not_vote_where_it_is_stale() {
    let mut disk = Disk::new();
    disk.holds[1][0] = OWN;
    assert!(disk.shared.found(MISSING, &RangeSet::default()));
    disk.tick();
    assert_eq!(disk.rejoined, [MISSING]);
    for sector in [0, 8] {
        let read = disk.run(GuestRequest::Read(SectorRange::new(sector, 1)));
        assert_eq!(read, Some(sector == 8), "sector {sector}");
    }
}

#[test]
fn it_can_be_removed_and_its_place_is_free_at_once() {
    let mut disk = Disk::new();
    let tell = |_| {};
    let others = disk.shared.remove(ReplicaIndex(0), tell);
    assert_eq!(others, Err(NotRemoved::TooFewInService));
    disk.shared.remove(MISSING, tell).unwrap();
    disk.tick();
    assert_eq!(disk.released, [MISSING]);
    assert!(
        !disk.shared.found(MISSING, &RangeSet::default()),
        "it is no member any more"
    );
    disk.shared.add(MISSING);
    disk.tick();
    disk.wait(Duration::from_secs(100));
    assert_eq!(disk.holds[2], disk.holds[0]);
}

#[test]
fn it_can_be_given_up() {
    let mut disk = Disk::new();
    let loss = disk.shared.fail(MISSING, |_| {}).unwrap();
    assert_eq!(loss.lost.sectors(), 0);
    disk.tick();
    assert_eq!(disk.released, [MISSING]);
}

/// A threshold of all is one that the disk can have some day.
#[test]
fn it_counts_as_a_replica() {
    let disk = Disk::new();
    disk.shared.want_threshold(Wanted::Given(3)).unwrap();
    assert_eq!(disk.shared.thresholds(), (2, 3, false));
    disk.shared.want_threshold(Wanted::Majority).unwrap();
    assert_eq!(disk.shared.thresholds(), (2, 2, true));
}
