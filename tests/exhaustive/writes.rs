//! When a flush may succeed after writes and flushes that failed on some replicas (contract W3,
//! W5).

use quorum_blk::common::{ReplicaSet, SectorRange};
use quorum_blk::quorum::health::{Health, WriteEnd};

const SECTORS: SectorRange = SectorRange {
    start: 64,
    count: 8,
};
const OTHERS: SectorRange = SectorRange {
    start: 72,
    count: 8,
};
const CAPACITY_SECTORS: u64 = 1 << 16;

/// An operation, and the replicas that do it.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Write(ReplicaSet),
    Flush(ReplicaSet),
}

fn every_set(replicas: usize) -> impl Iterator<Item = ReplicaSet> + Clone {
    (0..1 << replicas).map(ReplicaSet::from_bits)
}

/// A disk of so many replicas, all of them up to date.
fn disk(replicas: usize, threshold: usize) -> Health {
    Health::new(ReplicaSet::first(replicas), threshold, 1, CAPACITY_SECTORS)
}

/// Whether the guest hears of success.
fn write(health: &mut Health, range: SectorRange, done: ReplicaSet) -> bool {
    let begun = health.write_begins(range);
    let success = done.len() >= health.threshold();
    health.write_ended(&WriteEnd {
        asked: health.members(),
        succeeded: done,
        begun,
        success,
    });
    success
}

fn flush(health: &mut Health, done: ReplicaSet) -> bool {
    let epoch = health.flush_begins();
    for replica in health.members().iter() {
        health.flush_ended(epoch, replica, done.contains(replica));
    }
    health.durability().is_enough()
}

/// What the replicas of a disk have of one sector.
#[derive(Clone, Copy, Debug)]
struct Sector {
    /// They hold the newest version.
    fresh: ReplicaSet,
    /// They have written something since their last good flush.
    unflushed: ReplicaSet,
}

impl Sector {
    /// W3: who has missed a write is stale.
    fn write(&mut self, done: ReplicaSet) {
        self.fresh = done;
        self.unflushed = self.unflushed.or(done);
    }

    /// W5: what a replica wrote since its last good flush is lost if this one fails. The flush
    /// succeeds if t replicas hold the newest version then.
    fn flush(&mut self, done: ReplicaSet, threshold: usize) -> bool {
        self.fresh = self.fresh.without(self.unflushed.without(done));
        self.unflushed = ReplicaSet::EMPTY;
        self.fresh.len() >= threshold
    }
}

/// All histories of up to three writes and flushes, and for up to eight replicas of one of each.
#[test]
fn are_durable_on_enough_replicas_when_a_flush_succeeds() {
    let mut counts = [0_u64; 2];
    for replicas in 1..=8 {
        let length = if replicas <= 4 { 3 } else { 2 };
        for threshold in 1..=replicas {
            let sector = Sector {
                fresh: ReplicaSet::first(replicas),
                unflushed: ReplicaSet::EMPTY,
            };
            extend(
                &mut Vec::new(),
                sector,
                length,
                (replicas, threshold),
                &mut counts,
            );
        }
    }
    let [succeeded, failed] = counts;
    println!("flushes: {succeeded} succeed, {failed} fail");
    assert!(succeeded > 0 && failed > 0);
}

/// Adds each operation to a history that ends like this, and compares each flush. After a write
/// that failed more than one version is legal (W7): such a history ends.
fn extend(
    history: &mut Vec<Operation>,
    sector: Sector,
    left: usize,
    disk_of: (usize, usize),
    counts: &mut [u64; 2],
) {
    let (replicas, threshold) = disk_of;
    for done in every_set(replicas) {
        for operation in [Operation::Write(done), Operation::Flush(done)] {
            let mut sector = sector;
            history.push(operation);
            let goes_on = match operation {
                Operation::Write(done) => {
                    sector.write(done);
                    done.len() >= threshold
                }
                Operation::Flush(done) => {
                    let expected = sector.flush(done, threshold);
                    let (last, health) = replay(history, disk_of);
                    assert_eq!(last, expected, "{history:?}, {threshold} of {replicas}");
                    let stale = health.stale_in(SECTORS);
                    assert_eq!(stale, health.members().without(sector.fresh), "{history:?}");
                    counts[usize::from(!expected)] += 1;
                    true
                }
            };
            if goes_on && left > 1 {
                extend(history, sector, left - 1, disk_of, counts);
            }
            history.pop();
        }
    }
}

/// How the last operation ended, and the disk then.
fn replay(history: &[Operation], (replicas, threshold): (usize, usize)) -> (bool, Health) {
    let mut health = disk(replicas, threshold);
    let mut last = true;
    for operation in history {
        last = match operation {
            Operation::Write(done) => write(&mut health, SECTORS, *done),
            Operation::Flush(done) => flush(&mut health, *done),
        };
    }
    (last, health)
}

/// Two writes of different sectors that different replicas have done, and a flush: it succeeds only
/// if each of them is durable on t replicas.
#[test]
fn of_different_sectors_are_each_durable() {
    for replicas in 1..=4 {
        for threshold in 1..=replicas {
            let enough = move |set: &ReplicaSet| set.len() >= threshold;
            let writes = every_set(replicas).filter(enough);
            for (first, second) in writes
                .clone()
                .flat_map(|a| writes.clone().map(move |b| (a, b)))
            {
                for done in every_set(replicas) {
                    let mut health = disk(replicas, threshold);
                    write(&mut health, SECTORS, first);
                    write(&mut health, OTHERS, second);
                    let expected = enough(&first.and(done)) && enough(&second.and(done));
                    let case = (first, second, done, threshold);
                    assert_eq!(flush(&mut health, done), expected, "{case:?}");
                }
            }
        }
    }
}
