//! When a resync tries again what it could not copy.

use super::*;
use crate::quorum::health::WriteEnd;

const COPY: ReplicaIndex = ReplicaIndex(2);
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// Longer than the pause after a chunk.
const STEP: Duration = Duration::from_millis(500);

struct Disk {
    jobs: Jobs,
    health: Health,
    now: Duration,
}

impl Disk {
    /// Two replicas, and one that was added to them.
    fn new() -> Self {
        let mut health = Health::new(ReplicaSet::first(2), 1, 1, 64);
        health.add(COPY);
        let mut jobs = Jobs::new(64);
        let sizes = Sizes {
            chunk_sectors: 16,
            ..Sizes::default()
        };
        jobs.configure(1, sizes, RETRY_AFTER);
        Self {
            jobs,
            health,
            now: Duration::ZERO,
        }
    }

    /// The next chunk of the resync, after a moment.
    fn next(&mut self) -> Option<(ChunkId, SectorRange)> {
        self.now += STEP;
        let guest = GuestRequests::default();
        match self.jobs.next(self.now, guest, &self.health) {
            Next::Chunk(Chunk {
                id,
                work: Work::Resync { range, .. },
            }) => Some((id, range)),
            Next::Chunk(other) => panic!("{other:?}"),
            Next::At(_) | Next::Nothing => None,
        }
    }

    /// The next chunk, which copies all but the sectors from `left` on.
    fn copy(&mut self, left: u64) -> Option<SectorRange> {
        let (id, range) = self.next()?;
        let count = left.clamp(range.start, range.end()) - range.start;
        let mut end = ChunkEnd::default();
        if count > 0 {
            let copied = SectorRange::new(range.start, count);
            let epoch = self.health.failure_epoch();
            self.health.repaired(COPY, copied, epoch, false);
            end.on(COPY).written.push(copied);
        }
        let guest = GuestRequests::default();
        self.jobs.ended(self.now, guest, id, &end, &self.health);
        Some(range)
    }

    /// Copies until a chunk ends at the end of the disk.
    fn pass(&mut self, left: u64) {
        while self.copy(left).expect("a pass goes on").end() < 64 {}
    }

    /// The copy fails a write of the guest that the others do.
    fn miss_a_write(&mut self, range: SectorRange) {
        let begun = self.health.write_begins(range);
        self.health.write_failed(begun, COPY);
        self.health.write_ended(&WriteEnd {
            begun,
            asked: self.health.in_service(),
            succeeded: ReplicaSet::first(2),
            success: true,
        });
    }

    fn hang_for_a_moment(&mut self, replica: ReplicaIndex) {
        assert!(self.health.evict(replica));
        assert!(self.health.rejoin(replica, 0));
    }
}

#[test]
fn what_a_resync_could_not_copy_is_tried_again_after_a_while() {
    let mut disk = Disk::new();
    disk.pass(60);
    assert_eq!(disk.copy(64), None);
    disk.now += RETRY_AFTER;
    assert_eq!(disk.copy(64), Some(SectorRange::new(60, 4)));
    assert!(!disk.health.anything_stale() && disk.next().is_none());
}

#[test]
fn a_resync_goes_on_at_once_when_a_replica_arrives() {
    let mut disk = Disk::new();
    disk.pass(60);
    assert_eq!(disk.copy(64), None);
    disk.hang_for_a_moment(ReplicaIndex(1));
    assert_eq!(disk.copy(64), Some(SectorRange::new(60, 4)));
}

#[test]
fn a_resync_that_has_failed_starts_again_when_a_replica_arrives() {
    let mut disk = Disk::new();
    disk.pass(0);
    assert_eq!(disk.copy(64), None);
    assert!(disk.jobs.is_empty(), "it has copied nothing");
    disk.hang_for_a_moment(ReplicaIndex(1));
    assert!(disk.copy(64).is_some());
}

#[test]
fn what_became_stale_behind_a_resync_that_copies_all_is_copied_at_once() {
    let mut disk = Disk::new();
    assert_eq!(disk.copy(64), Some(SectorRange::new(0, 16)));
    disk.miss_a_write(SectorRange::new(0, 1));
    disk.pass(64);
    assert_eq!(disk.copy(64), Some(SectorRange::new(0, 1)));
}
