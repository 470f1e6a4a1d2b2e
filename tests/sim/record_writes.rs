//! What a write to a record that fails, or never ends, does to its replica (W6, S2).

use std::time::Duration;

use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::report::Report;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{GuestRequest, Shared};
use quorum_blk::record::Keeper;
use quorum_blk::sim::policy;

use super::small_disk::{self, Records, Replicas};

const SECTORS: u64 = 16;
const HERE: SectorRange = SectorRange { start: 5, count: 1 };
/// In another extent.
const ELSEWHERE: SectorRange = SectorRange { start: 9, count: 1 };
const OTHER: ReplicaIndex = ReplicaIndex(1);
const SLOW: ReplicaIndex = ReplicaIndex(2);

/// What is asked of a replica and waits there.
type Waits = fn(&Operation) -> bool;

fn nothing(_: &Operation) -> bool {
    false
}

fn is_record(operation: &Operation) -> bool {
    matches!(operation.action, Action::Record { .. })
}

/// Three replicas with records.
struct Three {
    waits: Waits,
    /// The writes to the records of these replicas fail.
    failing: ReplicaSet,
    /// There is no space for the data of these.
    full: ReplicaSet,
    /// These fail a flush.
    unflushed: ReplicaSet,
    reads: usize,
}

impl Replicas for Three {
    fn serve(&mut self, operation: &mut Operation, _: &Shared) -> Option<Result<(), Errno>> {
        if (self.waits)(operation) {
            return None;
        }
        let replica = operation.replica;
        self.reads += usize::from(matches!(operation.action, Action::Read { .. }));
        let writes = matches!(operation.action, Action::Write { .. });
        let failing = match operation.action {
            Action::Record { .. } => self.failing,
            Action::Flush => self.unflushed,
            _ => ReplicaSet::EMPTY,
        };
        Some(if failing.contains(replica) {
            Err(Errno(libc::EIO))
        } else if writes && self.full.contains(replica) {
            Err(Errno(libc::ENOSPC))
        } else {
            Ok(())
        })
    }
}

type Disk = small_disk::Disk<Three>;

fn disk(threshold: u8) -> Disk {
    let votes = usize::from(threshold);
    let shared = Shared::new(3, votes, 1, SECTORS);
    let records = Records {
        replicas: 3,
        sectors: SECTORS,
        votes: threshold,
        missing: None,
        marked: None,
    };
    shared.remember(records.keeper());
    let replicas = Three {
        waits: nothing,
        failing: ReplicaSet::EMPTY,
        full: ReplicaSet::EMPTY,
        unflushed: ReplicaSet::EMPTY,
        reads: 0,
    };
    let mut disk = Disk::new(shared, policy::plain(votes), replicas);
    disk.engine.stop_background();
    disk
}

/// What has waited is done, unless it is to wait from now on.
fn resume(disk: &mut Disk, waits: Waits) {
    disk.replicas.waits = waits;
    disk.resume();
}

/// A replica has missed a write: after a power cut it must not vote there.
#[test]
fn that_has_to_say_what_a_replica_has_missed_comes_before_the_answer() {
    let mut disk = disk(2);
    disk.write(HERE, 1);
    disk.replicas.full = ReplicaSet::from_iter([SLOW]);
    disk.replicas.waits = is_record;
    disk.write(HERE, 2);
    assert_eq!(disk.answers, [true], "the first one");
    resume(&mut disk, nothing);
    assert_eq!(disk.answers, [true; 2]);
}

/// What was read is lost by then, and another version has won a vote.
#[test]
fn that_a_read_has_waited_for_is_followed_by_another_vote_if_another_version_has_won() {
    for is_lost in [false, true] {
        let mut disk = disk(2);
        disk.write(ELSEWHERE, 1);
        disk.write(HERE, 1);
        disk.replicas.full = ReplicaSet::from_iter([SLOW]);
        disk.replicas.waits = is_record;
        disk.write(HERE, 2);
        disk.read(ELSEWHERE);
        assert_eq!(disk.answers, [true; 2], "the first two");
        let failing = if is_lost {
            ReplicaSet::first(3)
        } else {
            ReplicaSet::from_iter([OTHER])
        };
        disk.replicas.unflushed = failing;
        disk.submit(GuestRequest::Flush);
        // Where all have failed it takes a vote of what each of them may have lost.
        disk.read(ELSEWHERE);
        let reads = disk.replicas.reads;
        resume(&mut disk, nothing);
        assert_eq!(disk.answers.len(), 6);
        assert_eq!(disk.replicas.reads > reads, is_lost);
    }
}

/// Its own record may not say what it misses from now on: those of the others do, before the guest
/// depends on it.
#[test]
fn that_has_failed_evicts_its_replica_before_the_answer() {
    let mut disk = disk(2);
    disk.replicas.failing = ReplicaSet::from_iter([SLOW]);
    disk.replicas.waits = |operation| is_record(operation) && operation.replica == OTHER;
    disk.write(HERE, 1);
    assert!(disk.answers.is_empty(), "only one record is written");
    resume(&mut disk, nothing);
    assert_eq!(disk.evicted(), [SLOW]);
    assert_eq!(disk.answers, [true]);
    let stale_where_changed = |keeper: &Keeper| {
        assert!(keeper.is_durable());
        keeper.record().members[SLOW.as_usize()].stale_where_changed
    };
    assert_eq!(disk.shared.records(stale_where_changed), Some(true));
}

#[test]
fn that_has_failed_on_too_many_replicas_fails_what_needs_it() {
    let mut disk = disk(2);
    disk.replicas.failing = ReplicaSet::from_iter([OTHER, SLOW]);
    disk.write(HERE, 1);
    disk.wait(Duration::from_secs(3));
    assert_eq!(disk.answers, [false]);
}

/// Such a request is held with `--werror enospc`, also if it is for another reason that it fails.
#[test]
fn that_has_failed_does_not_hide_that_there_was_no_space_for_the_data() {
    for full in [ReplicaSet::EMPTY, ReplicaSet::from_iter([SLOW])] {
        let mut disk = disk(2);
        disk.write(HERE, 1);
        disk.replicas.full = full;
        disk.replicas.failing = ReplicaSet::from_iter([OTHER, SLOW]);
        disk.write(if full.is_empty() { ELSEWHERE } else { HERE }, 1);
        disk.wait(Duration::from_secs(3));
        assert_eq!(disk.answers, [true, false]);
        let no_space = disk.reports.iter().find_map(|report| match report {
            Report::Failure { no_space, .. } => Some(*no_space),
            _ => None,
        });
        assert_eq!(no_space, Some(!full.is_empty()));
    }
}

/// The replica is out of service once, and its record is written again when it is back.
#[test]
fn that_has_failed_evicts_no_replica_that_has_rejoined_since() {
    let mut disk = disk(2);
    disk.write(HERE, 1);
    assert_eq!(disk.answers, [true], "marked, and written");
    // The slow one is late with a write of data, and fails that of its record meanwhile. The
    // series of writes to records waits for another one.
    disk.replicas.waits = |operation| match is_record(operation) {
        true => operation.replica == OTHER,
        false => operation.replica == SLOW,
    };
    disk.replicas.failing = ReplicaSet::from_iter([SLOW]);
    disk.write(HERE, 1);
    disk.write(ELSEWHERE, 1);
    disk.wait(Duration::from_millis(1500));
    assert_eq!(disk.evicted(), [SLOW]);
    disk.replicas.failing = ReplicaSet::EMPTY;
    resume(&mut disk, |operation| {
        is_record(operation) && operation.replica == OTHER
    });
    disk.wait(Duration::from_millis(500));
    assert_eq!(disk.rejoined(), [SLOW]);
    resume(&mut disk, nothing);
    disk.wait(Duration::from_secs(3));
    assert_eq!(disk.evicted(), [SLOW], "once");
    assert_eq!(disk.answers, [true; 3]);
}

/// Also where nothing is written to other records at the same time, as theirs have it already.
#[test]
fn that_never_ends_evicts_its_replica() {
    let mut disk = disk(1);
    disk.write(HERE, 1);
    disk.replicas.waits = |operation| !is_record(operation) && operation.replica == SLOW;
    disk.write(HERE, 1);
    disk.wait(Duration::from_millis(1500));
    assert_eq!(disk.evicted(), [SLOW]);
    assert_eq!(disk.answers, [true; 2], "the records say so");
    // When it is back, only its own record does not have all.
    resume(&mut disk, |operation| {
        is_record(operation) && operation.replica == SLOW
    });
    disk.wait(Duration::from_millis(500));
    assert_eq!(disk.rejoined(), [SLOW]);
    disk.write(ELSEWHERE, 1);
    assert_eq!(disk.answers, [true; 2], "it is not marked");
    let asked: Vec<ReplicaIndex> = disk.waiting().iter().map(|o| o.replica).collect();
    assert_eq!(asked, [SLOW]);
    disk.wait(Duration::from_secs(12));
    assert_eq!(disk.evicted(), [SLOW; 2]);
    assert_eq!(disk.answers, [true; 3]);
}
