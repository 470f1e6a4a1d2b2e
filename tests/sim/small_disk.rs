//! A few replicas of a small disk in virtual time, with one engine. The test says what becomes of
//! each operation.

use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::report::Report;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::record::{
    Creation, Extents, Holder, Keeper, Layout, MemberState, Record, Threshold,
};
use quorum_blk::sim::effects::{Collected, Effect, SECTOR_LEN, tag};
use uuid::Uuid;

/// Shorter than anything that is waited for.
const STEP: Duration = Duration::from_millis(1);

/// What the replicas do.
pub(super) trait Replicas {
    /// How an operation ends. `None`: it waits.
    fn serve(&mut self, operation: &mut Operation, shared: &Shared) -> Option<Result<(), Errno>>;
}

/// One engine and its replicas.
pub(super) struct Disk<R> {
    pub(super) engine: Engine,
    pub(super) shared: Arc<Shared>,
    pub(super) clock: TurnClock,
    pub(super) replicas: R,
    /// Whether the requests that were answered have succeeded, in the order of the answers.
    pub(super) answers: Vec<bool>,
    pub(super) reports: Vec<Report>,
    /// The replicas whose place was said to be free.
    pub(super) released: Vec<ReplicaIndex>,
    waiting: Vec<Operation>,
    pool: BufferPool,
    effects: Collected,
    requests: u64,
}

impl<R: Replicas> Disk<R> {
    pub(super) fn new(shared: Shared, policy: Policy, replicas: R) -> Self {
        let (shared, clock) = (Arc::new(shared), TurnClock::default());
        let pool = BufferPool::default();
        let (its_shared, its_pool) = (Arc::clone(&shared), pool.clone());
        Self {
            engine: Engine::new(WorkerIndex(0), policy, its_shared, its_pool, clock.clone()),
            shared,
            clock,
            replicas,
            answers: Vec::new(),
            reports: Vec::new(),
            released: Vec::new(),
            waiting: Vec::new(),
            pool,
            effects: Collected::default(),
            requests: 0,
        }
    }

    /// Submits a request. Returns whether it succeeds, if it is the next that is answered, and that
    /// at once.
    pub(super) fn submit(&mut self, request: GuestRequest) -> Option<bool> {
        self.requests += 1;
        let answered = self.answers.len();
        let tag = tag(self.requests);
        self.engine.submit(tag, request, &mut self.effects);
        self.run();
        self.answers.get(answered).copied()
    }

    /// Writes this byte everywhere in the range.
    pub(super) fn write(&mut self, range: SectorRange, byte: u8) -> Option<bool> {
        self.write_as(range, byte, false)
    }

    /// The same, for a guest without a write cache.
    pub(super) fn write_durably(&mut self, range: SectorRange, byte: u8) -> Option<bool> {
        self.write_as(range, byte, true)
    }

    fn write_as(&mut self, range: SectorRange, byte: u8, durable: bool) -> Option<bool> {
        let sectors = usize::try_from(range.count).unwrap();
        let mut data = self.pool.take(sectors * SECTOR_LEN);
        data.fill(byte);
        self.submit(GuestRequest::Write {
            range,
            data,
            durable,
        })
    }

    pub(super) fn read(&mut self, range: SectorRange) -> Option<bool> {
        self.submit(GuestRequest::Read(range))
    }

    pub(super) fn tick(&mut self) {
        self.engine.tick(&mut self.effects);
        self.run();
    }

    /// The time of the next deadline comes.
    pub(super) fn tick_at_deadline(&mut self) {
        let deadline = self.engine.deadline().expect("something is to happen");
        self.clock.set(deadline.max(self.clock.now() + STEP));
        self.tick();
    }

    /// Lets so much time pass.
    pub(super) fn wait(&mut self, time: Duration) {
        let end = self.clock.now() + time;
        while self
            .engine
            .deadline()
            .is_some_and(|deadline| deadline < end)
        {
            self.tick_at_deadline();
        }
        self.clock.set(end.max(self.clock.now()));
        self.tick();
    }

    /// The operations that have waited are served again: they may go on waiting.
    pub(super) fn resume(&mut self) {
        for operation in std::mem::take(&mut self.waiting) {
            self.serve(operation);
        }
        self.run();
    }

    /// What has waited on this replica is done.
    pub(super) fn catch_up(&mut self, replica: ReplicaIndex) {
        for operation in self.waiting.extract_if(.., |it| it.replica == replica) {
            self.engine
                .reply(operation.reply(Ok(())), &mut self.effects);
        }
        self.run();
    }

    /// The operations that wait.
    pub(super) fn waiting(&self) -> &[Operation] {
        &self.waiting
    }

    /// The replicas that were evicted, in order.
    pub(super) fn evicted(&self) -> Vec<ReplicaIndex> {
        let evicted = |report: &Report| match report {
            Report::Evicted(replica) => Some(*replica),
            _ => None,
        };
        self.reports.iter().filter_map(evicted).collect()
    }

    /// The replicas that have rejoined, in order.
    pub(super) fn rejoined(&self) -> Vec<ReplicaIndex> {
        let rejoined = |report: &Report| match report {
            Report::Rejoined(replica) => Some(*replica),
            _ => None,
        };
        self.reports.iter().filter_map(rejoined).collect()
    }

    fn run(&mut self) {
        while !self.effects.effects.is_empty() {
            match self.effects.effects.remove(0) {
                Effect::Submit(operation) => self.serve(operation),
                Effect::Complete(_, result) => self.answers.push(result.is_ok()),
                Effect::Report(report) => self.reports.push(report),
                Effect::Released(replica) => self.released.push(replica),
                _ => {}
            }
        }
    }

    fn serve(&mut self, mut operation: Operation) {
        match self.replicas.serve(&mut operation, &self.shared) {
            Some(result) => {
                let reply = operation.reply(result);
                self.engine.reply(reply, &mut self.effects);
            }
            None => self.waiting.push(operation),
        }
    }
}

/// Reads or writes what a replica holds: one byte for each sector, the first for sector `start`. It
/// has no zeroing and knows no holes (EOPNOTSUPP).
pub(super) fn access(action: &mut Action, holds: &mut [u8], start: u64) -> Result<(), Errno> {
    let sectors = |range: &SectorRange| {
        let first = usize::try_from(range.start - start).unwrap();
        first..first + usize::try_from(range.count).unwrap()
    };
    match action {
        Action::Read { range, into } => {
            let held = &holds[sectors(range)];
            for (sector, byte) in into.chunks_exact_mut(SECTOR_LEN).zip(held) {
                sector.fill(*byte);
            }
        }
        Action::Write {
            range,
            data,
            offset_bytes,
        } => {
            let held = &mut holds[sectors(range)];
            let data = data[*offset_bytes..].chunks_exact(SECTOR_LEN);
            for (byte, sector) in held.iter_mut().zip(data) {
                *byte = sector[0];
            }
        }
        Action::Flush | Action::Record { .. } => {}
        Action::Zero { .. } | Action::FindData { .. } => return Err(Errno(libc::EOPNOTSUPP)),
    }
    Ok(())
}

/// The records of a disk with an extent for each sector.
pub(super) struct Records {
    pub(super) replicas: usize,
    pub(super) sectors: u64,
    pub(super) votes: u8,
    /// Not there, and up to date until something changes.
    pub(super) missing: Option<ReplicaIndex>,
    /// What is marked.
    pub(super) marked: Option<SectorRange>,
}

impl Records {
    /// The records, with what is to be written to them at first.
    pub(super) fn keeper(&self) -> Keeper {
        let ids: Vec<_> = (1..=self.replicas as u128).map(Uuid::from_u128).collect();
        let mut record = Record::create(&Creation {
            disk: Uuid::from_u128(100),
            branch: Uuid::from_u128(101),
            run: Uuid::from_u128(102),
            layout: Layout::with_extents(self.sectors, 1),
            threshold: Threshold {
                votes: self.votes,
                follows_majority: false,
            },
            members: ids.iter().map(|id| (*id, id.to_string())).collect(),
        });
        let holds = Some(record.epoch);
        let mut there = ReplicaSet::first(self.replicas);
        if let Some(missing) = self.missing {
            let member = record.member_mut(ids[missing.as_usize()]).unwrap();
            member.state = MemberState::Inactive { holds };
            member.stale_where_changed = true;
            there.remove(missing);
        }
        let holder = |id: &Uuid| Holder {
            member: *id,
            sequence: 1,
        };
        let holders = ids.iter().map(|id| Some(holder(id))).collect();
        let mut marked = Extents::new(record.layout());
        if let Some(range) = self.marked {
            marked.insert(range);
        }
        let mut keeper = Keeper::new(record, holders, marked);
        while keeper.next_round().is_some() {
            keeper.ended(there);
        }
        keeper
    }
}
