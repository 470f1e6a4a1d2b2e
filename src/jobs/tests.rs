//! When a resync tries again what it could not copy, and how a recovery goes on.

use super::*;
use crate::limits::RECOVERY_PRIORITY;
use crate::quorum::health::{Remembered, WriteEnd};

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

/// Sectors of a disk that no job reads in a minute.
const LARGE: u64 = 1 << 30;

/// A recovery, with a guest that makes this many requests a second, but none beside a chunk.
struct Recovery {
    jobs: Jobs,
    health: Health,
    now: Duration,
    /// How long chunks were in flight.
    busy: Duration,
    rate: f64,
}

impl Recovery {
    /// All of the disk is unrecovered.
    fn new(rate: f64) -> Self {
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, LARGE);
        let mut changed = RangeSet::default();
        changed.insert(SectorRange::new(0, LARGE));
        let members = ReplicaSet::first(3);
        let remembered = Remembered {
            members,
            in_service: members,
            ..Remembered::default()
        };
        health.restore(&remembered, &changed);
        let mut jobs = Jobs::new(LARGE);
        jobs.configure(8, Sizes::default(), RETRY_AFTER);
        jobs.recover(&health).unwrap();
        let now = Duration::ZERO;
        Self {
            jobs,
            health,
            now,
            busy: Duration::ZERO,
            rate,
        }
    }

    /// The next chunk, as soon as there is one.
    fn next(&mut self) -> Option<Chunk> {
        loop {
            match self.jobs.next(self.now, self.guest(), &self.health) {
                Next::Chunk(chunk) => return Some(chunk),
                Next::At(at) => self.now = at,
                Next::Nothing => return None,
            }
        }
    }

    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn guest(&self) -> GuestRequests {
        GuestRequests(((self.now - self.busy).as_secs_f64() * self.rate) as u64)
    }

    /// The chunk ends a millisecond later.
    fn end(&mut self, id: ChunkId, end: &ChunkEnd) {
        let took = Duration::from_millis(1);
        self.now += took;
        self.busy += took;
        let guest = self.guest();
        self.jobs.ended(self.now, guest, id, end, &self.health);
    }
}

#[test]
fn a_recovery_flushes_asks_and_reads_what_is_data() {
    let mut disk = Recovery::new(0.0);
    let flush = disk.next().unwrap();
    assert_eq!(flush.work, Work::Flush);
    assert!(disk.next().is_none(), "no hole counts before");
    let failed = ChunkEnd {
        failed: true,
        ..ChunkEnd::default()
    };
    disk.end(flush.id, &failed);
    let question = disk.next().unwrap();
    let locked = HoleSizes::default().locked;
    let range = SectorRange::new(0, locked);
    let purpose = SkipPurpose::Recover;
    assert_eq!(question.work, Work::Skip { purpose, range });
    let (first, second) = (SectorRange::new(0, 4096), SectorRange::new(4104, 1000));
    let holes = [first, second];
    disk.health.decide(&holes, &[]);
    let answer = ChunkEnd {
        skipped: holes.to_vec(),
        known_until: 6000,
        ..ChunkEnd::default()
    };
    disk.end(question.id, &answer);
    let mut read = Vec::new();
    for _ in 0..2 {
        let Some(Chunk {
            id,
            work: Work::Scrub { range, .. },
        }) = disk.next()
        else {
            panic!("what is data is read");
        };
        disk.health.decide(&[range], &[]);
        disk.end(id, &ChunkEnd::default());
        read.push(range);
    }
    assert_eq!(read[0], SectorRange::new(4096, 8));
    assert_eq!(read[1].start, second.end());
    let list = disk.jobs.list(&disk.health);
    assert_eq!(list[0].error, None, "it flushes again");
}

#[test]
fn a_recovery_takes_half_of_the_time_at_first_and_then_little() {
    let mut disk = Recovery::new(50_000.0);
    let (mut early, mut late) = (0, 0);
    while let Some(chunk) = disk.next() {
        if disk.now > 2 * RECOVERY_PRIORITY {
            break;
        }
        match disk.now < RECOVERY_PRIORITY {
            true => early += 1,
            false => late += 1,
        }
        disk.end(chunk.id, &ChunkEnd::default());
    }
    assert!(early > 5 * late, "{early} and {late}");
}
