//! After an unclean end of the disk the first vote decides, and its answer stays (S5).

use std::sync::Arc;

use quorum_blk::common::buffer::BufferPool;
use quorum_blk::common::clock::TurnClock;
use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::report::{Cause, Report};
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{Engine, GuestRequest, Shared, WorkerIndex};
use quorum_blk::quorum::health::Remembered;
use quorum_blk::sim::effects::{Collected, Effect, tag};
use quorum_blk::sim::policy;

const RANGE: SectorRange = SectorRange { start: 8, count: 1 };

/// Three replicas, each of them one byte for the sector in [`RANGE`], which was being written when
/// the disk ended.
struct Disk {
    shared: Arc<Shared>,
    engine: Engine,
    effects: Collected,
    holds: [u8; 3],
    /// The replicas that fail writes.
    fails: [bool; 3],
    /// The replicas that fail one write.
    fails_once: [bool; 3],
    /// The replicas that fail flushes.
    flush_fails: [bool; 3],
    flushes: usize,
    /// Of these the write comes into the page cache, and ends when this is over.
    slow: Option<ReplicaIndex>,
    waiting: Vec<Operation>,
    /// How often each replica was written to with success.
    written: [usize; 3],
    accusations: usize,
    /// How many replicas were stale when the winner was written, at most.
    stale_most: usize,
}

impl Disk {
    fn new(holds: [u8; 3]) -> Self {
        let shared = Arc::new(Shared::new(3, 2, 1, 64));
        let mut changed = RangeSet::default();
        changed.insert(RANGE);
        let remembered = Remembered {
            members: ReplicaSet::first(3),
            in_service: ReplicaSet::first(3),
            ..Remembered::default()
        };
        shared.restore(&remembered, &changed, |_| ());
        let (pool, clock) = (BufferPool::default(), TurnClock::default());
        let mut engine = Engine::new(
            WorkerIndex(0),
            policy::plain(2),
            Arc::clone(&shared),
            pool,
            clock,
        );
        engine.stop_background();
        Self {
            shared,
            engine,
            effects: Collected::default(),
            holds,
            fails: [false; 3],
            fails_once: [false; 3],
            flush_fails: [false; 3],
            flushes: 0,
            slow: None,
            waiting: Vec::new(),
            written: [0; 3],
            accusations: 0,
            stale_most: 0,
        }
    }

    /// Reads the sector. Returns what the replicas hold when the guest is answered; `None`: the
    /// read fails.
    fn read(&mut self, number: u64) -> Option<[u8; 3]> {
        self.submit(number, GuestRequest::Read(RANGE))
            .expect("every request is answered")
    }

    /// The outer `None`: there is no answer yet.
    fn submit(&mut self, number: u64, request: GuestRequest) -> Option<Option<[u8; 3]>> {
        self.engine.submit(tag(number), request, &mut self.effects);
        self.run()
    }

    fn run(&mut self) -> Option<Option<[u8; 3]>> {
        let mut answered = None;
        while !self.effects.effects.is_empty() {
            match self.effects.effects.remove(0) {
                Effect::Submit(operation) => self.carry_out(operation),
                Effect::Complete(_, result) => answered = Some(result.ok().map(|_| self.holds)),
                Effect::Report(Report::Bad {
                    cause: Cause::Corrupt(_),
                    ..
                }) => self.accusations += 1,
                _ => {}
            }
        }
        answered
    }

    /// The writes of the slow replica end, with an error.
    fn fail_waiting(&mut self) -> Option<Option<[u8; 3]>> {
        self.slow = None;
        for operation in std::mem::take(&mut self.waiting) {
            let reply = operation.reply(Err(Errno(28)));
            self.engine.reply(reply, &mut self.effects);
        }
        self.run()
    }

    fn carry_out(&mut self, mut operation: Operation) {
        let replica = operation.replica.as_usize();
        let mut result = Ok(());
        if matches!(operation.action, Action::Write { .. }) {
            let is_stale = |member: &ReplicaIndex| self.shared.stale_sectors(*member) > 0;
            let stale = self.shared.members().iter().filter(is_stale).count();
            self.stale_most = self.stale_most.max(stale);
        }
        match &mut operation.action {
            Action::Read { into, .. } => into.fill(self.holds[replica]),
            Action::Write {
                data, offset_bytes, ..
            } if self.slow == Some(operation.replica) => {
                self.holds[replica] = data[*offset_bytes];
                self.waiting.push(operation);
                return;
            }
            Action::Flush if self.slow == Some(operation.replica) => result = Err(Errno(28)),
            Action::Flush => {
                self.flushes += 1;
                assert!(self.flushes < 100, "it does not end");
                if self.flush_fails[replica] {
                    result = Err(Errno(5));
                }
            }
            Action::Write { .. } if self.fails[replica] => result = Err(Errno(5)),
            Action::Write { .. } if self.fails_once[replica] => {
                self.fails_once[replica] = false;
                result = Err(Errno(5));
            }
            Action::Write {
                data, offset_bytes, ..
            } => {
                self.holds[replica] = data[*offset_bytes];
                self.written[replica] += 1;
            }
            _ => {}
        }
        self.engine
            .reply(operation.reply(result), &mut self.effects);
    }
}

#[test]
fn is_decided_by_the_first_read_when_enough_replicas_hold_the_winner() {
    let mut disk = Disk::new([1, 2, 3]);
    assert_eq!(disk.shared.unrecovered_sectors(), RANGE.count);
    let holds = disk.read(1).expect("one vote is enough");
    assert_eq!(disk.shared.unrecovered_sectors(), 0);
    let holders = holds.iter().filter(|held| **held == 1).count();
    assert!(holders >= 2, "answered when {holds:?} are held");
    assert_eq!(disk.read(2), Some([1, 1, 1]));
    assert_eq!(disk.accusations, 0);
}

#[test]
fn is_decided_for_what_most_replicas_hold() {
    let mut disk = Disk::new([1, 2, 2]);
    assert!(disk.read(1).is_some());
    assert_eq!((disk.read(2), disk.accusations), (Some([2, 2, 2]), 0));
}

#[test]
fn leaves_no_answer_that_only_one_replica_could_give_again() {
    let mut disk = Disk::new([1, 2, 3]);
    disk.fails = [false, true, true];
    assert_eq!(disk.read(1), None, "no other replica takes the winner");
    assert_eq!(disk.shared.unrecovered_sectors(), RANGE.count);
    disk.fails = [false; 3];
    disk.holds[1..].fill(2);
    assert_eq!(disk.read(2), Some([1, 2, 2]), "any copy is legal still");
    assert_eq!(disk.accusations, 0);
}

/// No flush fails while the winner is being written, nor after a kill.
#[test]
fn leaves_enough_copies_for_a_flush() {
    for replicas in [[1, 2, 3], [1, 2, 2]] {
        let mut disk = Disk::new(replicas);
        assert!(disk.read(1).is_some());
        assert!(disk.stale_most <= 1, "{} are stale", disk.stale_most);
        let copies = disk.shared.remembered().copies;
        let lacking = copies.iter().filter(|copies| {
            let sets = [&copies.stale, &copies.doubtful];
            sets.iter().any(|set| set.overlaps(RANGE))
        });
        assert!(lacking.count() <= 1, "{copies:?}");
    }
}

/// The kernel may drop such a page at any time.
#[test]
fn what_is_in_the_page_cache_after_a_failed_flush_is_written_again() {
    let mut disk = Disk::new([1, 2, 3]);
    assert!(disk.submit(0, GuestRequest::Flush).is_some());
    (disk.slow, disk.fails) = (Some(ReplicaIndex(1)), [false, false, true]);
    assert_eq!(disk.submit(1, GuestRequest::Read(RANGE)), None);
    // The flush fails while the write is out.
    assert!(disk.submit(2, GuestRequest::Flush).is_some());
    let answered = disk.fail_waiting();
    assert_eq!(answered, Some(Some([1, 1, 3])), "by a second vote");
    assert!(disk.written[1] > 0, "it holds nothing durably");
}

/// A read waits until enough replicas hold the winner durably, but not for one that fails again.
#[test]
fn is_not_decided_while_a_replica_that_is_needed_fails_every_flush() {
    let mut disk = Disk::new([1, 2, 3]);
    disk.flush_fails = [true, true, false];
    assert_eq!(disk.read(1), None, "no second replica keeps what it writes");
    assert_eq!(disk.shared.unrecovered_sectors(), RANGE.count);
    disk.flush_fails = [true, false, false];
    assert!(disk.read(2).is_some(), "the two others are enough");
    assert_eq!(
        (disk.shared.unrecovered_sectors(), disk.accusations),
        (0, 0)
    );
}

/// One fails every flush and one the first write, so that the vote is taken three times.
#[test]
fn is_decided_when_enough_others_hold_the_winner_although_one_fails_every_flush() {
    let mut disk = Disk::new([1, 2, 3]);
    disk.flush_fails = [false, true, false];
    disk.fails_once = [false, false, true];
    assert!(disk.read(1).is_some());
    assert_eq!(
        (disk.shared.unrecovered_sectors(), disk.accusations),
        (0, 0)
    );
    assert_eq!((disk.holds[0], disk.holds[2]), (1, 1));
}
