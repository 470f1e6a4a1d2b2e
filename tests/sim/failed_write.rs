//! A write or a flush that failed: which version the disk holds is decided by a vote, and no
//! replica is at fault.

use std::sync::Arc;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{Errno, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Policy, Shared, WorkerIndex};
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const RANGE: SectorRange = SectorRange { start: 8, count: 1 };
const OLD: u8 = 1;
const NEW: u8 = 2;

/// Replicas, each of them one byte for the sector in [`RANGE`].
struct Disk {
    engine: Engine,
    pool: BufferPool,
    effects: Collected,
    holds: Vec<u8>,
    /// The replicas that fail writes.
    fails: [bool; 4],
    /// The replicas that fail flushes.
    flush_fails: [bool; 4],
    /// The replicas that fail reads.
    read_fails: [bool; 4],
    accusations: usize,
    /// Times that `--blkverify` was to end the daemon.
    differences: usize,
}

impl Disk {
    fn new() -> Self {
        Self::of(3, 2, false)
    }

    fn of(replicas: usize, threshold: usize, blkverify: bool) -> Self {
        Self::with(
            replicas,
            Policy {
                blkverify,
                ..policy::plain(threshold)
            },
        )
    }

    fn with(replicas: usize, policy: Policy) -> Self {
        let threshold = policy.threshold;
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let shared = Arc::new(Shared::new(replicas, threshold, 1, 64));
        Self {
            engine: Engine::new(WorkerIndex(0), policy, shared, pool.clone(), clock),
            pool,
            effects: Collected::default(),
            holds: vec![OLD; replicas],
            fails: [false; 4],
            flush_fails: [false; 4],
            read_fails: [false; 4],
            accusations: 0,
            differences: 0,
        }
    }

    /// Carries the request out. Returns whether it succeeded.
    fn run(&mut self, number: u64, request: GuestRequest) -> bool {
        self.engine.submit(tag(number), request, &mut self.effects);
        let mut success = None;
        while let Some(effect) =
            (!self.effects.effects.is_empty()).then(|| self.effects.effects.remove(0))
        {
            match effect {
                Effect::Submit(operation) => self.carry_out(operation),
                Effect::Complete(_, result) => success = Some(result.is_ok()),
                Effect::Report(report) => {
                    self.accusations += usize::from(format!("{report:?}").contains("Corrupt"));
                }
                Effect::ContentsDiffer(_) => self.differences += 1,
                _ => {}
            }
        }
        success.expect("every request is answered")
    }

    fn carry_out(&mut self, mut operation: Operation) {
        let replica = operation.replica.as_usize();
        let mut result = Ok(());
        match &mut operation.action {
            Action::Read { .. } if self.read_fails[replica] => result = Err(Errno(5)),
            Action::Read { into, .. } => into.fill(self.holds[replica]),
            Action::Write { .. } if self.fails[replica] => result = Err(Errno(28)),
            Action::Write { data, .. } => self.holds[replica] = data[0],
            Action::Flush if self.flush_fails[replica] => result = Err(Errno(28)),
            Action::Flush => {}
            action => panic!("{action:?}"),
        }
        self.engine
            .reply(operation.reply(result), &mut self.effects);
    }

    fn write(&mut self, number: u64, byte: u8) -> bool {
        let mut data = self.pool.take(512);
        data.fill(byte);
        let (range, durable) = (RANGE, false);
        self.run(
            number,
            GuestRequest::Write {
                range,
                data,
                durable,
            },
        )
    }
}

#[test]
fn is_decided_by_the_next_read_without_an_accusation() {
    let mut disk = Disk::new();
    disk.fails = [false, true, true, false];
    assert!(!disk.write(1, NEW));
    assert_eq!(disk.holds, [NEW, OLD, OLD]);
    disk.fails = [false; 4];
    assert!(disk.run(2, GuestRequest::Read(RANGE)));
    assert_eq!(disk.holds, [OLD; 3], "the winner is written to all");
    assert_eq!(disk.accusations, 0);
    disk.holds = vec![OLD, NEW, OLD];
    assert!(disk.run(3, GuestRequest::Read(RANGE)));
    assert_eq!(disk.accusations, 1, "what differs later is corrupt");
}

#[test]
fn is_decided_for_good_even_if_the_other_version_cannot_be_replaced() {
    let mut disk = Disk::new();
    disk.fails = [true, true, false, false];
    assert!(!disk.write(1, NEW));
    disk.fails = [false, false, true, false];
    assert!(disk.run(2, GuestRequest::Read(RANGE)));
    assert_eq!(disk.holds, [OLD, OLD, NEW]);
    disk.holds = vec![OLD, NEW, NEW];
    let wins = disk.run(3, GuestRequest::Read(RANGE));
    assert!(!wins, "replica 2 is stale");
}

#[test]
fn of_a_flush_on_all_replicas_leaves_everything_readable() {
    let mut disk = Disk::new();
    assert!(disk.write(1, NEW));
    disk.flush_fails = [true; 4];
    assert!(!disk.run(2, GuestRequest::Flush));
    disk.flush_fails = [false; 4];
    disk.holds[0] = OLD;
    assert!(disk.run(3, GuestRequest::Read(RANGE)));
    assert_eq!(disk.holds, [NEW; 3], "the winner is written to all");
    assert_eq!(disk.accusations, 0);
    assert!(disk.run(4, GuestRequest::Flush), "the next flush covers it");
}

/// What is below a repair that was lost cannot be read, or is no older than elsewhere.
#[test]
fn of_a_flush_leaves_repairs_of_unreadable_blocks_readable() {
    let mut disk = Disk::with(
        3,
        Policy {
            rewrite_corrupted: true,
            ..policy::plain(2)
        },
    );
    assert!(disk.write(1, NEW));
    for replica in 1..3 {
        disk.read_fails[replica] = true;
        assert!(disk.run(2, GuestRequest::Read(RANGE)));
        disk.read_fails[replica] = false;
    }
    disk.flush_fails = [true; 4];
    assert!(!disk.run(3, GuestRequest::Flush));
    assert!(disk.run(4, GuestRequest::Read(RANGE)), "all hold the same");
}

/// What the guest has read must not be lost by the next failure.
#[test]
fn of_a_flush_leaves_nothing_to_read_that_cannot_be_written_again() {
    let mut disk = Disk::new();
    assert!(disk.write(1, NEW));
    disk.flush_fails = [true; 4];
    assert!(!disk.run(2, GuestRequest::Flush));
    disk.holds[0] = OLD;
    disk.fails = [false, true, true, false];
    assert!(!disk.run(3, GuestRequest::Read(RANGE)), "on one replica");
    disk.fails = [false; 4];
    assert!(disk.run(4, GuestRequest::Read(RANGE)));
    assert_eq!(disk.holds, [NEW; 3]);
}

#[test]
fn of_a_flush_leaves_copies_that_do_not_win_against_a_fresh_one() {
    let mut disk = Disk::new();
    assert!(disk.write(1, NEW));
    disk.flush_fails = [false, true, true, false];
    assert!(!disk.run(2, GuestRequest::Flush));
    disk.holds = vec![NEW, OLD, OLD];
    assert!(!disk.run(3, GuestRequest::Read(RANGE)));
    disk.holds = vec![NEW, NEW, OLD];
    assert!(disk.run(4, GuestRequest::Read(RANGE)));
    assert_eq!(disk.holds, [NEW; 3]);
}

#[test]
fn of_a_flush_leaves_copies_that_do_not_win_while_a_fresh_one_cannot_be_read() {
    let mut disk = Disk::of(4, 3, false);
    assert!(disk.write(1, NEW));
    disk.flush_fails = [false, false, true, true];
    assert!(!disk.run(2, GuestRequest::Flush));
    // Replica 0 is corrupt, and the others may have lost the write.
    disk.holds = vec![OLD, NEW, OLD, OLD];
    disk.read_fails[1] = true;
    assert!(!disk.run(3, GuestRequest::Read(RANGE)));
    disk.read_fails[1] = false;
    assert!(!disk.run(4, GuestRequest::Read(RANGE)));
    disk.holds[0] = NEW;
    disk.holds[3] = NEW;
    assert!(disk.run(5, GuestRequest::Read(RANGE)));
    assert_eq!(disk.holds, [NEW; 4]);
}

#[test]
fn of_a_flush_is_no_difference_to_blkverify() {
    let mut disk = Disk::of(2, 2, true);
    assert!(disk.write(1, NEW));
    disk.flush_fails[0] = true;
    assert!(!disk.run(2, GuestRequest::Flush));
    let lost = std::mem::replace(&mut disk.holds[0], OLD);
    assert!(!disk.run(3, GuestRequest::Read(RANGE)));
    disk.holds[0] = lost;
    assert!(disk.run(4, GuestRequest::Read(RANGE)));
    assert_eq!(disk.differences, 0);
    disk.holds[0] = OLD;
    assert!(!disk.run(5, GuestRequest::Read(RANGE)));
    assert_eq!(disk.differences, 1);
}
