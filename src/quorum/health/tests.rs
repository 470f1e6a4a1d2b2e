//! Which sectors count as fresh and durable, and on which replicas.

use super::*;

pub(super) const A: ReplicaIndex = ReplicaIndex(0);
pub(super) const B: ReplicaIndex = ReplicaIndex(1);
pub(super) const C: ReplicaIndex = ReplicaIndex(2);
pub(super) const D: ReplicaIndex = ReplicaIndex(3);

pub(super) fn set(replicas: &[ReplicaIndex]) -> ReplicaSet {
    replicas.iter().copied().collect()
}

pub(super) fn range(start: u64, count: u64) -> SectorRange {
    SectorRange::new(start, count)
}

fn end(begun: WriteBegun, succeeded: ReplicaSet) -> WriteEnd {
    WriteEnd {
        asked: ReplicaSet::first(3),
        succeeded,
        begun,
        success: succeeded.len() >= 2,
    }
}

pub(super) fn write(health: &mut Health, range: SectorRange, failed: &[ReplicaIndex]) {
    let begun = health.write_begins(range);
    health.write_ended(&end(begun, ReplicaSet::first(3).without(set(failed))));
}

pub(super) fn flush(health: &mut Health, failed: &[ReplicaIndex]) -> bool {
    let epoch = health.flush_begins();
    for replica in ReplicaSet::first(3).iter() {
        health.flush_ended(epoch, replica, !failed.contains(&replica));
    }
    health.durability().is_enough()
}

#[test]
fn a_failed_write_is_stale_until_written_again() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
    write(&mut health, range(8, 8), &[C]);
    assert_eq!(health.stale_in(range(0, 9)), set(&[C]));
    assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
    write(&mut health, range(8, 4), &[]);
    assert_eq!(health.stale_parts(C, range(0, 100)), [range(12, 4)]);
}

/// The case that counting successes gets wrong: a write held by {A,B}, a flush done by {B,C}.
#[test]
fn a_flush_needs_the_replicas_that_hold_the_writes() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
    write(&mut health, range(0, 8), &[C]);
    assert!(!flush(&mut health, &[A]));
    // A later flush with nothing more to do does not make up for the lost copy.
    assert!(!flush(&mut health, &[]));
    write(&mut health, range(0, 8), &[]);
    assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
    assert!(flush(&mut health, &[]));
}

#[test]
fn a_failed_flush_makes_stale_what_was_written_since_the_last_good_one() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
    write(&mut health, range(0, 8), &[]);
    assert!(flush(&mut health, &[]));
    write(&mut health, range(1 << 20, 8), &[]);
    assert!(flush(&mut health, &[B]));
    assert_eq!(health.stale_in(range(0, 8)), ReplicaSet::EMPTY);
    assert_eq!(health.stale_in(range(1 << 20, 8)), set(&[B]));
}

#[test]
fn a_write_that_ran_while_a_flush_failed_does_not_count_on_that_replica() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
    let begun = health.write_begins(range(0, 8));
    let epoch = health.flush_begins();
    health.flush_ended(epoch, A, false);
    assert_eq!(health.stale_in(range(8, 8)), ReplicaSet::EMPTY);
    assert_eq!(
        health.stale_in(range(0, 8)),
        set(&[A]),
        "at once: a read may have seen it"
    );
    health.write_ended(&end(begun, ReplicaSet::first(3)));
    assert_eq!(health.stale_in(range(0, 8)), set(&[A]));
}

#[test]
fn a_read_beside_an_undone_write_is_doubtful_even_after_another_write() {
    let mut health = Health::new(ReplicaSet::first(1), 1, 1, 1 << 22);
    let begun = health.write_begins(range(0, 8));
    let epoch = health.flush_begins();
    health.flush_ended(epoch, A, false);
    let read_began = health.failure_epoch();
    write_one_begun(&mut health, begun);
    write_one(&mut health, range(0, 8));
    assert!(!health.anything_stale());
    assert_eq!(health.failed_since(read_began), set(&[A]));
    assert_eq!(
        health.failed_since(health.failure_epoch()),
        ReplicaSet::EMPTY
    );
}

#[test]
fn a_later_flush_confirms_the_earlier_ones() {
    let mut health = Health::new(ReplicaSet::first(1), 1, 1, 1 << 22);
    write_one(&mut health, range(0, 8));
    let first = health.flush_begins();
    write_one(&mut health, range(1 << 20, 8));
    let second = health.flush_begins();
    health.flush_ended(second, A, true);
    health.flush_ended(first, A, false);
    assert!(
        !health.anything_stale(),
        "all of it was confirmed by the second flush"
    );
}

fn write_one(health: &mut Health, range: SectorRange) {
    let begun = health.write_begins(range);
    write_one_begun(health, begun);
}

fn write_one_begun(health: &mut Health, begun: WriteBegun) {
    let done = WriteEnd {
        asked: set(&[A]),
        succeeded: set(&[A]),
        begun,
        success: true,
    };
    health.write_ended(&done);
}

#[test]
fn an_evicted_replica_rejoins_when_all_its_operations_have_ended() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
    write(&mut health, range(0, 8), &[]);
    assert!(flush(&mut health, &[]));
    write(&mut health, range(1 << 20, 8), &[]);
    assert!(health.evict(C));
    assert!(!health.evict(B), "two are needed");
    assert_eq!(health.in_service(), set(&[A, B]));
    assert_eq!(
        health.stale_in(range(0, 8)),
        ReplicaSet::EMPTY,
        "that was flushed"
    );
    assert_eq!(health.stale_in(range(1 << 20, 8)), set(&[C]));
    let begun = health.write_begins(range(1 << 21, 8));
    let without = WriteEnd {
        asked: set(&[A, B]),
        ..end(begun, set(&[A, B]))
    };
    health.write_ended(&without);
    assert!(!health.rejoin(C, 1));
    assert!(health.rejoin(C, 0));
    assert_eq!(health.in_service(), ReplicaSet::first(3));
    assert_eq!(
        health.next_stale(C, 0).map(|range| range.start),
        Some(1 << 20)
    );
    health.repaired(C, range(0, 1 << 22), health.failure_epoch(), false);
    assert!(!health.anything_stale());
}

#[test]
fn a_repair_while_a_flush_runs_is_not_covered_by_it() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    write(&mut health, range(0, 8), &[C]);
    let epoch = health.flush_begins();
    health.repaired(C, range(0, 8), health.failure_epoch(), false);
    health.flush_ended(epoch, A, false);
    health.flush_ended(epoch, B, true);
    health.flush_ended(epoch, C, true);
    assert!(!health.durability().is_enough(), "only B has it safely");
}

#[test]
fn a_replica_with_one_of_the_last_fresh_copies_is_not_evicted() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    write(&mut health, range(8, 8), &[C]);
    assert!(
        !health.evict(A) && !health.evict(B),
        "only A and B hold the sector"
    );
    assert!(health.evict(C));
    let mut last = Health::new(ReplicaSet::first(3), 2, 1, 16);
    write(&mut last, range(8, 8), &[C]);
    assert!(!last.evict(A), "also at the end of the disk");
}

#[test]
fn the_new_sectors_of_a_grown_disk_are_fresh_on_every_member() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 16);
    write(&mut health, range(8, 8), &[C]);
    health.grow(32);
    assert_eq!(health.stale_in(range(16, 16)), ReplicaSet::EMPTY);
    assert_eq!(health.stale_in(range(0, 16)), set(&[C]));
    write(&mut health, range(24, 8), &[B]);
    assert!(!health.evict(A), "in the new part two are needed too");
    let added = ReplicaIndex(3);
    health.add(added);
    assert_eq!(health.stale_parts(added, range(0, 64)), [range(0, 32)]);
}

#[test]
fn a_replica_evicted_after_its_part_of_a_write_may_hold_a_last_copy() {
    let mut health = Health::new(ReplicaSet::first(3), 3, 1, 16);
    let added = ReplicaIndex(3);
    health.add(added);
    // C does not get this write, and the new replica is evicted after it has done it.
    let begun = health.write_begins(range(0, 8));
    let done = set(&[A, B, added]);
    assert!(health.evict(added));
    let end = WriteEnd {
        asked: ReplicaSet::first(4),
        ..end(begun, done)
    };
    health.write_ended(&end);
    assert_eq!(health.check_removal(added), Err(NotRemoved::LastCopies));
}

#[test]
fn a_write_during_an_eviction_and_rejoin_leaves_the_replica_stale() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    let begun = health.write_begins(range(0, 8));
    assert!(health.evict(C) && health.rejoin(C, 0));
    health.write_ended(&end(begun, ReplicaSet::first(3)));
    assert_eq!(health.stale_in(range(0, 8)), set(&[C]));
}

#[test]
fn sectors_flushed_without_an_evicted_replica_are_stale_there() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    assert!(health.evict(C));
    let begun = health.write_begins(range(0, 8));
    health.write_ended(&WriteEnd {
        asked: set(&[A, B]),
        ..end(begun, set(&[A, B]))
    });
    health.flush_begins();
    assert!(health.rejoin(C, 0));
    assert_eq!(health.stale_in(range(0, 8)), set(&[C]));
}

/// A copy on which C can be evicted; then B, too, misses a write.
#[test]
fn an_eviction_is_decided_again_where_something_has_changed() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    write(&mut health, range(0, 8), &[C]);
    let snapshot = health.snapshot();
    assert!(snapshot.can_evict(C) && !snapshot.can_evict(B));
    write(&mut health, range(1 << 20, 8), &[B]);
    let evicted = health.evict_as_on(&snapshot, &mut snapshot.loss(C));
    assert_eq!(evicted, Some(false), "A and C have the second write");
    write(&mut health, range(1 << 20, 8), &[]);
    assert_eq!(
        health.evict_as_on(&snapshot, &mut snapshot.loss(C)),
        Some(true)
    );
    let again = health.snapshot();
    assert_eq!(
        health.evict_as_on(&again, &mut again.loss(C)),
        Some(false),
        "it is evicted"
    );
}

#[test]
fn what_is_evicted_does_not_replace_what_is_removed() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 16);
    assert!(health.evict(A));
    assert_eq!(health.check_removal(B), Err(NotRemoved::TooFewInService));
    assert_eq!(health.check_removal(A), Ok(()));
}

#[test]
fn a_removal_is_decided_again_where_something_has_changed() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    let snapshot = health.snapshot();
    assert_eq!(snapshot.check_removal(C), Ok(()));
    write(&mut health, range(8, 8), &[B]);
    let removed = health.remove_as_on(&snapshot, C);
    assert_eq!(removed, Err(NotRemoved::LastCopies));
    write(&mut health, range(8, 8), &[]);
    let removed = health.remove_as_on(&snapshot, C);
    assert_eq!(removed, Err(NotRemoved::LastDurableCopies));
    assert!(flush(&mut health, &[]));
    assert_eq!(health.remove_as_on(&health.snapshot(), C), Ok(true));
}

#[test]
fn a_copy_of_unproven_copies_proves_nothing_before_a_flush_has_succeeded() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    let (early, late) = (range(0, 8), range(8, 8));
    write(&mut health, early, &[C]);
    assert!(flush(&mut health, &[C]), "A and B have it");
    let flushed = health.last_flush();
    assert!(health.flush_decided(flushed, set(&[A, B]), true, &mut []));
    write(&mut health, late, &[C]);
    let epoch = health.failure_epoch();
    health.repaired(C, range(0, 16), epoch, false);
    assert!(!flush(&mut health, &[A, B]));
    assert_eq!(health.proven_parts(C, range(0, 16)), [early]);
    let epoch = health.flush_begins();
    for replica in [A, B, C] {
        health.flush_ended(epoch, replica, true);
    }
    assert_eq!(health.proven_parts(C, range(0, 16)), [early]);
    assert!(health.flush_decided(epoch, set(&[A, B, C]), true, &mut []));
    assert_eq!(health.proven_parts(C, range(0, 16)), [range(0, 16)]);
}

/// All lose the same write, and report that one after the other: each becomes stale, and is written
/// from those that have not reported it yet.
#[test]
fn a_write_of_which_only_copies_are_left_may_be_undone() {
    let written = range(0, 8);
    for last_succeeds in [false, true] {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        write(&mut health, written, &[]);
        let epoch = health.flush_begins();
        health.flush_ended(epoch, C, false);
        let since = health.failure_epoch();
        health.repaired(C, written, since, false);
        let epoch = health.flush_begins();
        health.flush_ended(epoch, C, true);
        health.flush_ended(epoch, B, false);
        assert!(!health.owes_failure(), "A may hold it");
        health.flush_ended(epoch, A, last_succeeds);
        assert_eq!(health.owes_failure(), !last_succeeds);
    }
}

/// The guest knows that the write is undone, and writes something else.
#[test]
fn what_the_guest_knows_to_be_undone_fails_no_other_flush_before_one_has_succeeded() {
    for (succeeds, undoes_more) in [(false, false), (true, false), (false, true)] {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        write(&mut health, range(0, 8), &[]);
        let asked = health.flush_asked();
        assert!(!flush(&mut health, &[A, B, C]));
        health.may_be_undone(&[range(0, 8)]);
        assert!(!health.answer_flush(false, asked));
        health.failure_told();
        write(&mut health, range(8, 8), &[]);
        if succeeds {
            assert!(health.answer_flush(true, health.flush_asked()));
        }
        assert!(!flush(&mut health, &[A, B, C]));
        health.may_be_undone(&[range(0, if undoes_more { 16 } else { 8 })]);
        assert_eq!(health.owes_failure(), succeeds || undoes_more);
    }
}

/// A replica fails flush after flush while the guest goes on writing.
#[test]
fn what_is_undone_fails_one_flush_whatever_is_doubtful_later() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    write(&mut health, range(0, 8), &[]);
    assert!(!flush(&mut health, &[A, B, C]));
    health.may_be_undone(&[range(0, 8)]);
    let asked = health.flush_asked();
    write(&mut health, range(8, 8), &[]);
    flush(&mut health, &[A]);
    assert!(!health.answer_flush(true, asked));
    health.failure_told();
    assert!(health.answer_flush(true, health.flush_asked()));
}

/// What the guest writes there is no copy.
#[test]
fn a_write_over_a_copy_is_not_undone() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    write(&mut health, range(0, 8), &[]);
    let epoch = health.flush_begins();
    health.flush_ended(epoch, C, false);
    let since = health.failure_epoch();
    health.repaired(C, range(0, 8), since, false);
    write(&mut health, range(0, 8), &[]);
    let epoch = health.flush_begins();
    for replica in [A, B] {
        health.flush_ended(epoch, replica, false);
    }
    assert!(!health.owes_failure());
}

#[test]
fn a_replica_that_may_vote_on_what_a_failed_write_has_left_is_not_removed() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    let snapshot = health.snapshot();
    let begun = health.write_begins(range(8, 8));
    health.write_ended(&WriteEnd {
        success: false,
        ..end(begun, set(&[A]))
    });
    assert_eq!(health.check_removal(C), Err(NotRemoved::Undecided));
    let removed = health.remove_as_on(&snapshot, C);
    assert_eq!(removed, Err(NotRemoved::Undecided));
    // The vote has decided against it: the others have a quorum without it.
    health.decide(&[range(8, 4)], &[(C, vec![range(8, 4)])]);
    assert_eq!(health.check_removal(C), Err(NotRemoved::Undecided));
    health.decide(&[range(12, 4)], &[(C, vec![range(12, 4)])]);
    assert_eq!(health.check_removal(C), Ok(()));
}

#[test]
fn nothing_is_decided_on_a_copy_that_differs_too_much() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    let snapshot = health.snapshot();
    for index in 0..1000 {
        write(&mut health, range(index * 2000, 8), &[C]);
    }
    assert_eq!(health.evict_as_on(&snapshot, &mut snapshot.loss(C)), None);
    let snapshot = health.snapshot();
    let evicted = health.evict_as_on(&snapshot, &mut snapshot.loss(C));
    assert_eq!(evicted, Some(true));
}

/// A resync of C, and then B fails a flush: B wrote nothing of that.
#[test]
fn a_failed_flush_costs_a_replica_nothing_of_what_another_one_was_resynced_with() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    write(&mut health, range(0, 1 << 20), &[C]);
    assert!(flush(&mut health, &[]));
    health.repaired(C, range(0, 1 << 20), health.failure_epoch(), false);
    write(&mut health, range(1 << 21, 8), &[]);
    assert!(flush(&mut health, &[B]));
    assert_eq!(health.stale_in(range(0, 1 << 20)), ReplicaSet::EMPTY);
    assert_eq!(health.stale_in(range(1 << 21, 8)), set(&[B]));
    health.repaired(C, range(8, 8), health.failure_epoch(), false);
    flush(&mut health, &[C]);
    assert_eq!(health.stale_in(range(0, 1 << 20)), set(&[C]));
    assert_eq!(health.stale_parts(C, range(0, 1 << 20)), [range(8, 8)]);
}

#[test]
fn a_failed_flush_of_a_job_fails_one_of_the_guest() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    let written = range(0, 8);
    write(&mut health, written, &[]);
    // The flush of a job: the guest does not hear of it.
    assert!(!flush(&mut health, &[A, B, C]));
    let disputed = health.disputed(range(0, 16), 2);
    assert_eq!(disputed.lacking, [written]);
    assert_eq!(disputed.witnessed, []);
    assert_eq!(health.doubtful_parts(A, range(0, 16)), [written]);
    health.may_be_undone(&disputed.lacking);
    for replica in [A, B, C] {
        health.repaired(replica, written, health.failure_epoch(), false);
    }
    assert!(health.settled(written, &[written], None));
    let durable = flush(&mut health, &[]);
    assert!(durable);
    let asked = health.flush_asked();
    assert!(!health.answer_flush(durable, asked));
    assert!(!health.answer_flush(durable, asked), "another program");
    // The guest has not heard of the failures.
    let asked = health.flush_asked();
    assert!(!health.answer_flush(durable, asked));
    for _ in 0..3 {
        health.failure_told();
    }
    assert!(health.answer_flush(durable, health.flush_asked()));
}

/// The answer to a write waits for the records, and comes while a flush runs that was asked for
/// before: the guest does not know that the flush covers the write.
#[test]
fn a_write_that_is_answered_during_a_flush_that_fails_fails_a_later_one() {
    for is_late in [true, false] {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        let written = range(0, 8);
        write(&mut health, written, &[]);
        let counted = health.counted_writes();
        let asked = health.flush_asked();
        let epoch = health.flush_begins();
        if is_late {
            health.answered_late(counted);
        }
        for replica in [A, B, C] {
            health.flush_ended(epoch, replica, false);
        }
        assert!(!health.flush_decided(epoch, ReplicaSet::EMPTY, true, &mut []));
        assert!(!health.answer_flush(false, asked));
        health.failure_told();
        health.may_be_undone(&health.disputed(written, 2).lacking);
        assert_eq!(health.owes_failure(), is_late);
    }
}

/// Two members are left. A has failed a flush, and B may have lost the same pages.
#[test]
fn a_fresh_copy_proves_nothing_before_it_is_flushed() {
    let mut health = Health::new(ReplicaSet::first(2), 2, 1, 1 << 22);
    let both = |health: &mut Health, written| {
        let begun = health.write_begins(written);
        let all = ReplicaSet::first(2);
        health.write_ended(&end(begun, all));
    };
    let (covered, later) = (range(8, 8), range(16, 8));
    both(&mut health, covered);
    let epoch = health.flush_begins();
    both(&mut health, later);
    health.flush_ended(epoch, A, false);
    let disputed = health.disputed(range(0, 32), 2);
    assert_eq!(disputed.witnessed, [range(8, 16)]);
    assert_eq!(disputed.proven, []);
    health.flush_ended(epoch, B, true);
    assert_eq!(health.disputed(range(0, 32), 2).proven, [covered]);
    assert_eq!(health.proven_parts(B, range(0, 24)), [range(0, 16)]);
    let epoch = health.flush_begins();
    health.flush_ended(epoch, B, false);
    assert_eq!(health.disputed(range(0, 32), 2).witnessed, [covered]);
}

#[test]
fn a_copy_that_has_missed_a_durable_version_is_not_doubtful() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
    let written = range(0, 8);
    write(&mut health, written, &[C]);
    let epoch = health.flush_begins();
    for replica in [A, B, C] {
        health.flush_ended(epoch, replica, true);
    }
    let is_enough = health.durability().is_enough();
    assert!(health.flush_decided(epoch, ReplicaSet::first(3), is_enough, &mut []));
    write(&mut health, written, &[]);
    assert!(!flush(&mut health, &[A, B, C]));
    assert_eq!(health.doubtful_parts(A, written), [written]);
    assert_eq!(health.doubtful_parts(C, written), []);
}

#[test]
fn a_replica_that_the_running_flush_needs_is_not_evicted() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
    write(&mut health, range(0, 8), &[B]);
    let epoch = health.flush_begins();
    // Fresh again, but this flush does not cover it.
    write(&mut health, range(0, 8), &[]);
    health.flush_ended(epoch, A, true);
    health.flush_ended(epoch, B, true);
    assert!(!health.evict(C), "without C the flush would fail");
    health.flush_ended(epoch, C, true);
    assert!(health.evict(C));
}

#[test]
fn a_replica_that_a_running_write_needs_is_not_evicted() {
    let mut health = Health::new(ReplicaSet::first(3), 2, 2, 1 << 22);
    let begun = health.write_begins(range(0, 8));
    assert!(health.can_evict(A));
    health.write_failed(begun, C);
    assert!(
        !health.evict(A) && !health.evict(B),
        "the write would fail without it"
    );
    assert!(health.evict(C), "the write fails on it in any case");
    health.write_ended(&end(begun, set(&[A, B])));
}

/// What it may lose it cannot vote for: no copy of the write might be left.
#[test]
fn a_write_does_not_count_on_a_replica_that_had_no_vote_and_was_evicted() {
    let written = range(0, 8);
    for (had_no_vote, is_evicted) in [(false, true), (true, false), (true, true)] {
        let mut health = Health::new(ReplicaSet::first(3), 1, 1, 1 << 22);
        if had_no_vote {
            write(&mut health, range(7, 1), &[C]);
        }
        let begun = health.write_begins(written);
        if is_evicted {
            assert!(health.evict(C));
        }
        let counts = health.has_quorum(begun, set(&[C]));
        assert_eq!(counts, !(had_no_vote && is_evicted));
        assert!(health.has_quorum(begun, set(&[B, C])));
        health.write_ended(&end(begun, set(&[B, C])));
    }
}

/// Without `B` the write would fail, although C may do it.
#[test]
fn a_replica_is_needed_for_a_write_that_does_not_count_on_another_one() {
    for had_no_vote in [false, true] {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        if had_no_vote {
            write(&mut health, range(0, 1), &[C]);
        }
        let begun = health.write_begins(range(0, 8));
        health.write_failed(begun, A);
        let epoch = health.flush_begins();
        health.flush_ended(epoch, C, false);
        assert!(!health.can_evict(B));
        assert_eq!(health.can_evict(C), had_no_vote);
        health.write_ended(&end(begun, set(&[B, C])));
    }
}
