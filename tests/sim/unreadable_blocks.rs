//! Replicas that cannot read single blocks, or nothing at all: what the guest gets, what is
//! repaired, and how many operations that costs.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::report::{Cause, Report};
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, ReadPattern, Shared, WorkerIndex};
use quorum_blk::jobs::{JobChange, JobFailure, JobInfo, JobKind, Jobs, Sizes};
use quorum_blk::quorum::health::Health;
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const EIO: Errno = Errno(5);
const BLOCK: u64 = 8;
const SECTORS: u64 = 1 << 16;
/// The longest read: 1 MiB.
const RANGE: SectorRange = SectorRange {
    start: 2048,
    count: 2048,
};

/// A disk on which every operation ends at once.
struct Disk {
    engine: Engine,
    shared: Arc<Shared>,
    clock: TurnClock,
    effects: Collected,
    /// Sectors that a replica cannot read.
    unreadable: BTreeSet<(ReplicaIndex, u64)>,
    operations: usize,
    /// What was written, and which errors were reported.
    written: Vec<(ReplicaIndex, SectorRange)>,
    reported: Vec<(ReplicaIndex, SectorRange)>,
    answers: Vec<bool>,
    /// The operations until the last answer.
    operations_until_answer: usize,
    completed: Option<JobInfo>,
}

impl Disk {
    fn new(replicas: usize, threshold: usize, rewrite_corrupted: bool) -> Self {
        Self::with_policy(replicas, |policy| {
            policy.threshold = threshold;
            policy.rewrite_corrupted = rewrite_corrupted;
        })
    }

    fn with_policy(replicas: usize, change: impl FnOnce(&mut Policy)) -> Self {
        let mut policy = Policy {
            job_sizes: Sizes {
                neighbourhood_sectors: 0,
                ..Sizes::default()
            },
            block_sectors: BLOCK,
            ..policy::plain(1)
        };
        change(&mut policy);
        let shared = Arc::new(Shared::new(replicas, policy.threshold, 1, SECTORS));
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
            effects: Collected::default(),
            unreadable: BTreeSet::new(),
            operations: 0,
            written: Vec::new(),
            reported: Vec::new(),
            answers: Vec::new(),
            operations_until_answer: 0,
            completed: None,
        }
    }

    fn lose(&mut self, replica: u8, range: SectorRange) {
        let sectors = range.start..range.end();
        self.unreadable
            .extend(sectors.map(|sector| (ReplicaIndex(replica), sector)));
    }

    /// Reads all of [`RANGE`]. Returns whether that succeeds, and after how many operations the
    /// engine is idle.
    fn read(&mut self) -> (bool, usize) {
        let before = self.operations;
        self.engine
            .submit(tag(1), GuestRequest::Read(RANGE), &mut self.effects);
        self.carry_out_all();
        assert!(self.engine.is_idle(), "operations without an end");
        (
            self.answers.pop().expect("an answer"),
            self.operations - before,
        )
    }

    /// Scrubs the disk without a repair. Returns what the job says in the end.
    fn scrub(&mut self) -> JobInfo {
        let scrub = |jobs: &mut Jobs, health: &Health| jobs.scrub(false, 0, health);
        let begun = self.shared.jobs(|_| (), scrub);
        begun.expect("a scrub begins");
        self.finish_job()
    }

    /// Returns what the job says in the end that runs now.
    fn finish_job(&mut self) -> JobInfo {
        // So long that the guest counts as idle, and a chunk has 1 MiB.
        let turn = Duration::from_millis(300);
        for turns in 1..1000 {
            self.clock.set(turn * turns);
            self.engine.tick(&mut self.effects);
            self.carry_out_all();
            if let Some(job) = self.completed.take() {
                return job;
            }
        }
        panic!("the job does not end");
    }

    fn carry_out_all(&mut self) {
        loop {
            let effects: Vec<Effect> = self.effects.effects.drain(..).collect();
            if effects.is_empty() {
                break;
            }
            for effect in effects {
                self.carry_out(effect);
            }
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::JobChanged(event) if matches!(event.what, JobChange::Completed) => {
                self.completed = Some(event.job);
            }
            Effect::Submit(operation) => self.run(operation),
            Effect::Complete(_, result) => {
                self.answers.push(result.is_ok());
                self.operations_until_answer = self.operations;
            }
            Effect::Report(Report::Bad {
                replica,
                range,
                cause: Cause::Error(_),
                ..
            }) => self.reported.push((replica, range)),
            Effect::ContentsDiffer(range) => panic!("what cannot be read differs: {range:?}"),
            _ => {}
        }
    }

    fn run(&mut self, mut operation: Operation) {
        self.operations += 1;
        let replica = operation.replica;
        let result = match &mut operation.action {
            Action::Read { range, into } => {
                into.fill(7);
                let from = (replica, range.start);
                let to = (replica, range.end());
                match self.unreadable.range(from..to).next() {
                    Some(_) => Err(EIO),
                    None => Ok(()),
                }
            }
            Action::Write { range, .. } => {
                self.written.push((replica, *range));
                for sector in range.start..range.end() {
                    self.unreadable.remove(&(replica, sector));
                }
                Ok(())
            }
            // No holes, and of a job that has repaired something its flush.
            Action::FindData { .. } | Action::Flush => Ok(()),
            action => panic!("{action:?}"),
        };
        let reply = operation.reply(result);
        self.engine.reply(reply, &mut self.effects);
    }
}

fn block(sector: u64) -> SectorRange {
    SectorRange::new(sector - sector % BLOCK, BLOCK)
}

#[test]
fn in_different_places_fail_nothing() {
    let mut disk = Disk::new(3, 2, false);
    disk.lose(0, SectorRange::new(2100, 1));
    disk.lose(1, block(3500));
    let (succeeds, operations) = disk.read();
    assert!(succeeds, "each block has two good copies");
    // Three reads, three under the lock, and some parts.
    assert!(operations <= 6 + 24, "{operations}");
    assert_eq!(disk.written, []);
    let whole = [0, 1, 0, 1].map(|replica| (ReplicaIndex(replica), RANGE));
    assert_eq!(disk.reported[..4], whole);
}

#[test]
fn in_the_same_place_fail_the_read_that_has_it() {
    let mut disk = Disk::new(3, 2, false);
    disk.lose(0, block(3000));
    disk.lose(1, block(3000));
    let (succeeds, operations) = disk.read();
    assert!(!succeeds, "one block has one good copy");
    assert!(operations <= 6 + 2 * 24, "{operations}");
}

/// One block has one good copy. The search for the others would take much longer.
#[test]
fn without_a_winner_fail_the_read_before_all_others_are_found() {
    let mut disk = Disk::new(3, 2, true);
    disk.lose(0, block(2048));
    disk.lose(1, block(2048));
    for sector in (2100..4000).step_by(64) {
        disk.lose(0, block(sector));
        disk.lose(1, block(sector + 32));
    }
    let (succeeds, operations) = disk.read();
    assert!(!succeeds);
    let until_answer = disk.operations_until_answer;
    assert!(
        until_answer <= 6 + 2 * 24 && until_answer * 2 < operations,
        "{until_answer} of {operations}"
    );
}

#[test]
fn are_repaired_and_nothing_else() {
    let mut disk = Disk::new(3, 2, true);
    disk.lose(0, SectorRange::new(2100, 1));
    disk.lose(1, SectorRange::new(3496, 16));
    assert!(disk.read().0);
    let repaired = [
        (ReplicaIndex(0), block(2100)),
        (ReplicaIndex(1), SectorRange::new(3496, 16)),
    ];
    assert_eq!(disk.written, repaired);
    assert_eq!(disk.reported[4..], repaired, "as such, once");
    assert_eq!(disk.read(), (true, 3), "all is well again");
}

/// Where one block is bad others often are.
#[test]
fn that_a_read_finds_have_their_neighbourhood_scrubbed() {
    let mut disk = Disk::with_policy(3, |policy| {
        policy.threshold = 2;
        policy.rewrite_corrupted = true;
        policy.job_sizes.neighbourhood_sectors = 4096;
    });
    disk.lose(0, block(3000));
    let beside = block(RANGE.end() + 512);
    disk.lose(1, beside);
    let far = block(SECTORS / 2);
    disk.lose(1, far);
    assert!(disk.read().0);
    assert!(matches!(
        disk.finish_job().kind,
        JobKind::NeighbourhoodScrub
    ));
    let repaired = [(ReplicaIndex(0), block(3000)), (ReplicaIndex(1), beside)];
    assert_eq!(disk.written, repaired, "not {far:?}");
}

#[test]
fn are_no_difference() {
    let mut disk = Disk::with_policy(2, |policy| {
        policy.threshold = 2;
        policy.blkverify = true;
    });
    disk.lose(1, block(3000));
    assert!(!disk.read().0);
}

#[test]
fn of_all_replicas_fail_no_fifo_read_that_one_of_them_can_do() {
    let mut disk = Disk::with_policy(2, |policy| {
        policy.read_pattern = ReadPattern::Fifo;
        policy.rewrite_corrupted = true;
    });
    disk.lose(0, block(2100));
    disk.lose(1, block(3500));
    assert!(disk.read().0);
    let mut repaired = std::mem::take(&mut disk.written);
    repaired.sort_by_key(|(replica, _)| *replica);
    let expected = [
        (ReplicaIndex(0), block(2100)),
        (ReplicaIndex(1), block(3500)),
    ];
    assert_eq!(repaired, expected);
}

#[test]
fn in_every_64_kib_of_two_replicas_are_all_found_by_a_scrub() {
    let mut disk = Disk::new(3, 2, false);
    for start in (0..SECTORS).step_by(128) {
        disk.lose(0, block(start + 8));
        disk.lose(1, block(start + 64));
    }
    let job = disk.scrub();
    assert_eq!(job.unreadable_sectors_found, SECTORS / 128 * 2 * BLOCK);
    let undecided = matches!(job.error, Some(JobFailure::NoQuorum { .. }));
    assert!(
        !undecided,
        "each block has two good copies: {:?}",
        job.error
    );
}

#[test]
fn that_leave_no_winner_are_not_read_whatever_is_repaired() {
    let mut disk = Disk::new(3, 2, true);
    for replica in [0, 1] {
        disk.lose(replica, block(3000));
    }
    disk.lose(2, block(5000));
    let job = disk.scrub();
    assert_eq!(job.error, Some(JobFailure::NoQuorum { sectors: BLOCK }));
    assert_eq!(job.unread, ReplicaSet::first(2), "the third is repaired");
    assert_eq!(disk.written, [(ReplicaIndex(2), block(5000))]);
    let without_winner = |disk: &Disk| disk.shared.unresolved().iter().collect::<Vec<_>>();
    assert_eq!(without_winner(&disk), [block(3000)]);
    // It was a bad cable.
    disk.unreadable.clear();
    assert!(disk.read().0);
    assert_eq!(without_winner(&disk), []);
}

#[test]
fn everywhere_cost_a_scrub_few_operations() {
    let mut disk = Disk::new(3, 2, false);
    disk.lose(1, SectorRange::new(0, SECTORS));
    assert_eq!(disk.scrub().unreadable_sectors_found, SECTORS);
    let (chunks, long) = (SECTORS / 2048 + 1, 16 + 10);
    let most = chunks * (6 + 24) + long * 80;
    assert!(disk.operations as u64 <= most, "{}", disk.operations);
}

#[test]
fn everywhere_cost_few_operations() {
    // It is needed, and the read fails.
    let mut disk = Disk::new(2, 2, false);
    disk.lose(1, RANGE);
    let (succeeds, operations) = disk.read();
    assert!(!succeeds);
    assert!(operations <= 4 + 4 * 5, "{operations}");
    // It is not needed, and nothing repairs it.
    let mut disk = Disk::new(3, 2, false);
    disk.lose(1, RANGE);
    assert_eq!(disk.read(), (true, 3));
    // It is repaired as a whole.
    let mut disk = Disk::new(3, 2, true);
    disk.lose(1, RANGE);
    let (succeeds, operations) = disk.read();
    assert!(succeeds && operations <= 6 + 24 + 1, "{operations}");
    assert_eq!(disk.written, [(ReplicaIndex(1), RANGE)]);
}
