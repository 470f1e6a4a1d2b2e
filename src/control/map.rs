//! Where on the disk each replica had errors or corrupt sectors: a map, made from all reports
//! before floods are folded. Pure.
//!
//! The disk is divided into at most [`MAP_BUCKETS`] buckets, with counts for each. The map also
//! records, to the sector, which sectors of a replica are *unresolved*: they lost their last vote,
//! and have not been repaired since. A guest may have overwritten them, or a disk may have misread
//! them once, so the next scrub, which reads everything, decides: when it ends, unresolved sectors
//! that it did not find again are forgotten.
//!
//! Invariants:
//! - A row uses memory from its first finding on: its buckets, and three sets of sectors.
//! - All buckets have one size. It doubles when a finding is beyond the last bucket: the disk
//!   grows.
//! - The counts of all buckets add up to what was reported, except for flushes, which have no
//!   place, and for errors, which count in each bucket that their operation touched.

use crate::common::ranges::RangeSet;
use crate::common::report::{Cause, Report};
use crate::common::{ReplicaIndex, SectorRange};
use crate::jobs::JobEvent;
use crate::limits::{MAP_BUCKETS, REPLICAS_MAX};

use super::events::Notice;
use super::scrub_watch::{ScrubStep, ScrubWatch};

/// The first size of a bucket: 4 KiB.
const BUCKET_SECTORS_MIN: u64 = 8;

/// The row of the disk itself comes after those of the replicas.
const DISK: usize = REPLICAS_MAX;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct DiskMap {
    bucket_sectors: u64,
    rows: [Option<Box<Row>>; REPLICAS_MAX + 1],
    scrub: ScrubWatch,
}

/// The findings in a bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Corrupt sectors, as often as they were found.
    pub(super) corrupt_sectors_found: u64,
    /// Repaired sectors.
    pub(super) repaired_sectors: u64,
    /// Operations that failed; for the disk: requests.
    pub(super) errors: u64,
}

/// The findings of a replica, or of the disk.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) buckets: Box<[Bucket]>,
    /// Corrupt when it was last read.
    pub(super) unresolved: RangeSet,
    /// The part of `unresolved` that was found, or found again, since the running scrub started.
    found_again: RangeSet,
    /// Found corrupt at any time: a sector that was found again is in it once.
    pub(super) ever: RangeSet,
}

impl Default for Row {
    fn default() -> Self {
        Self {
            buckets: vec![Bucket::default(); MAP_BUCKETS].into(),
            unresolved: RangeSet::default(),
            found_again: RangeSet::default(),
            ever: RangeSet::default(),
        }
    }
}

impl Row {
    fn mark_unresolved(&mut self, range: SectorRange) {
        self.unresolved.insert(range);
        self.found_again.insert(range);
    }

    fn halve(&mut self) {
        let half = self.buckets.len() / 2;
        for index in 0..half {
            self.buckets[index] = self.buckets[2 * index].plus(self.buckets[2 * index + 1]);
        }
        self.buckets[half..].fill(Bucket::default());
    }
}

impl Bucket {
    /// The sum.
    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            corrupt_sectors_found: self.corrupt_sectors_found + other.corrupt_sectors_found,
            repaired_sectors: self.repaired_sectors + other.repaired_sectors,
            errors: self.errors + other.errors,
        }
    }
}

impl DiskMap {
    pub(super) fn new() -> Self {
        Self {
            bucket_sectors: BUCKET_SECTORS_MIN,
            rows: [const { None }; REPLICAS_MAX + 1],
            scrub: ScrubWatch::default(),
        }
    }

    /// Records an event.
    pub(super) fn record(&mut self, notice: &Notice) {
        match notice {
            Notice::Job(event) => self.job_changed(event),
            Notice::Report(Report::Failure { range, .. }) => {
                self.count(DISK, *range, |bucket, _| bucket.errors += 1);
            }
            Notice::Report(Report::Bad {
                replica,
                range,
                cause,
                ..
            }) => match cause {
                Cause::Error(_) => {
                    self.count(replica.as_usize(), *range, |bucket, _| bucket.errors += 1)
                }
                Cause::Corrupt(evidence) => {
                    for run in evidence.bad_sectors.iter().chain(&evidence.unlisted) {
                        self.count(replica.as_usize(), *run, |bucket, count| {
                            bucket.corrupt_sectors_found += count;
                        });
                        let row = self.row(replica.as_usize());
                        row.mark_unresolved(*run);
                        row.ever.insert(*run);
                    }
                }
            },
            Notice::Report(
                Report::Evicted(_)
                | Report::KeptOut { .. }
                | Report::RepairLimit { .. }
                | Report::Rejoined(_),
            )
            | Notice::Image(..)
            | Notice::Missing { .. } => {}
        }
    }

    /// Records that sectors of a replica were repaired.
    pub(super) fn repaired(&mut self, replica: ReplicaIndex, range: SectorRange) {
        self.count(replica.as_usize(), range, |bucket, count| {
            bucket.repaired_sectors += count;
        });
        let row = self.row(replica.as_usize());
        row.unresolved.remove(range);
        row.found_again.remove(range);
    }

    /// Clears the row of a replica: a new replica has this index.
    pub(super) fn forget(&mut self, replica: ReplicaIndex) {
        self.rows[replica.as_usize()] = None;
    }

    /// Sectors of a replica that were corrupt when they were last read.
    pub(super) fn corrupt_sectors(&self, replica: ReplicaIndex) -> u64 {
        sectors(self.rows[replica.as_usize()].as_deref())
    }

    /// The sectors of a bucket, for a disk of `capacity_sectors`.
    pub(super) fn bucket_sectors(&mut self, capacity_sectors: u64) -> u64 {
        self.cover(capacity_sectors);
        self.bucket_sectors
    }

    /// The row of a replica, or with `None` of the disk. `None` if there are no findings.
    pub(super) fn view(&self, replica: Option<ReplicaIndex>) -> Option<Row> {
        let index = replica.map_or(DISK, ReplicaIndex::as_usize);
        self.rows[index].as_deref().cloned()
    }

    fn job_changed(&mut self, event: &JobEvent) {
        let step = self.scrub.see(event);
        for row in self.rows.iter_mut().flatten() {
            match step {
                Some(ScrubStep::Started) => row.found_again = RangeSet::default(),
                Some(ScrubStep::ReadAll) => row.unresolved.clone_from(&row.found_again),
                None => {}
            }
        }
    }

    fn row(&mut self, index: usize) -> &mut Row {
        self.rows[index].get_or_insert_default()
    }

    /// Calls `with` for each bucket that overlaps `range`, with the number of its sectors in it.
    fn count(&mut self, row: usize, range: SectorRange, with: impl Fn(&mut Bucket, u64)) {
        self.cover(range.end());
        let size = self.bucket_sectors;
        let row = self.row(row);
        let mut start = range.start;
        while start < range.end() {
            let index = usize::try_from(start / size).unwrap_or(MAP_BUCKETS - 1);
            let end = range.end().min((start / size + 1) * size);
            with(&mut row.buckets[index], end - start);
            start = end;
        }
    }

    /// Doubles the size of the buckets until they cover a disk of `capacity_sectors`.
    fn cover(&mut self, capacity_sectors: u64) {
        while self.bucket_sectors * (MAP_BUCKETS as u64) < capacity_sectors {
            self.bucket_sectors *= 2;
            self.rows.iter_mut().flatten().for_each(|row| row.halve());
        }
    }
}

fn sectors(row: Option<&Row>) -> u64 {
    row.map_or(0, |row| row.unresolved.sectors())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::common::operation::OperationType;
    use crate::common::report::{Evidence, Requester};
    use crate::common::{Errno, ReplicaSet};
    use crate::jobs::{
        FindingsByReplica, JobChange, JobFailure, JobInfo, JobKind, JobStatus, Places,
    };
    use proptest::prelude::*;

    const REPLICA: ReplicaIndex = ReplicaIndex(1);

    fn range(start: u64, count: u64) -> SectorRange {
        SectorRange::new(start, count)
    }

    fn bad(range: SectorRange, cause: Cause) -> Notice {
        Notice::Report(Report::Bad {
            replica: REPLICA,
            operation: OperationType::Read,
            range,
            cause,
        })
    }

    fn corrupt(runs: &[SectorRange]) -> Notice {
        let (listed, unlisted) = runs.split_at(runs.len().min(2));
        let evidence = Evidence {
            bad_sectors: listed.to_vec(),
            bad_sectors_cut: !unlisted.is_empty(),
            unlisted: unlisted.to_vec(),
            sectors: runs.iter().map(|run| run.count).sum(),
            digest: [0; 32],
            winner_digest: [1; 32],
        };
        bad(range(0, 1 << 20), Cause::Corrupt(evidence))
    }

    /// An event of a scrub of 1 GiB.
    pub(in crate::control) fn scrub(
        id: &str,
        what: JobChange,
        status: JobStatus,
        error: Option<JobFailure>,
    ) -> Notice {
        Notice::Job(JobEvent {
            job: JobInfo {
                id: id.parse().unwrap(),
                kind: JobKind::Scrub { repair: false },
                status,
                current_bytes: 0,
                total_bytes: 1 << 30,
                speed_bytes: 0,
                corrupt_sectors_found: 0,
                unreadable_sectors_found: 0,
                sectors_written: 0,
                findings: FindingsByReplica::new(),
                undecided: Places::default(),
                unread: match error {
                    Some(JobFailure::NotRead { replicas }) => replicas,
                    _ => ReplicaSet::EMPTY,
                },
                error,
            },
            what,
        })
    }

    fn buckets(map: &DiskMap, replica: Option<ReplicaIndex>) -> Vec<(usize, Bucket)> {
        let row = map.view(replica).unwrap_or_default();
        let all = row.buckets.iter().copied().enumerate();
        all.filter(|(_, bucket)| *bucket != Bucket::default())
            .collect()
    }

    #[test]
    fn findings_count_in_their_buckets() {
        let mut map = DiskMap::new();
        assert_eq!(map.bucket_sectors(2048 * 1024), 2048);
        map.record(&corrupt(&[range(2047, 2), range(8192, 1), range(9000, 10)]));
        map.record(&bad(range(2040, 16), Cause::Error(Errno(5))));
        // A flush has no place.
        map.record(&bad(range(0, 0), Cause::Error(Errno(5))));
        map.repaired(REPLICA, range(2048, 8));
        let bucket = |corrupt_sectors_found, repaired_sectors, errors| Bucket {
            corrupt_sectors_found,
            repaired_sectors,
            errors,
        };
        assert_eq!(
            buckets(&map, Some(REPLICA)),
            [
                (0, bucket(1, 0, 1)),
                (1, bucket(1, 8, 1)),
                (4, bucket(11, 0, 0))
            ]
        );
        assert_eq!(map.corrupt_sectors(REPLICA), 12, "one is repaired");
        assert_eq!(map.view(Some(REPLICA)).unwrap().ever.sectors(), 13);
        assert!(map.view(None).is_none() && map.view(Some(ReplicaIndex(0))).is_none());
        map.forget(REPLICA);
        assert_eq!(map.corrupt_sectors(REPLICA), 0);
    }

    #[test]
    fn failed_reads_are_in_the_row_of_the_disk() {
        let mut map = DiskMap::new();
        for operation in [OperationType::Read, OperationType::Write] {
            let range = range(8, 8);
            map.record(&Notice::Report(Report::Failure {
                operation,
                range,
                requester: Requester::Guest,
                error: None,
                no_space: false,
            }));
        }
        assert_eq!(buckets(&map, None)[0].1.errors, 2);
    }

    #[test]
    fn a_scrub_settles_what_is_unresolved() {
        let mut map = DiskMap::new();
        let corrupt_at = |sector| corrupt(&[range(sector, 1)]);
        map.record(&corrupt_at(1));
        map.record(&corrupt_at(5));
        map.record(&scrub("job1", JobChange::Status, JobStatus::Created, None));
        map.record(&corrupt_at(5));
        map.record(&corrupt_at(9));
        // The second scrub has not read everything since the start of the first.
        map.record(&scrub("job2", JobChange::Status, JobStatus::Created, None));
        map.record(&scrub(
            "job2",
            JobChange::Completed,
            JobStatus::Concluded,
            None,
        ));
        assert_eq!(map.corrupt_sectors(REPLICA), 3);
        map.record(&scrub("job1", JobChange::Status, JobStatus::Running, None));
        map.repaired(REPLICA, range(9, 1));
        map.record(&scrub(
            "job1",
            JobChange::Completed,
            JobStatus::Concluded,
            None,
        ));
        assert_eq!(map.corrupt_sectors(REPLICA), 1, "sector 5");
        for (what, error) in [
            (JobChange::Cancelled, None),
            (
                JobChange::Completed,
                Some(JobFailure::NotRead {
                    replicas: std::iter::once(REPLICA).collect(),
                }),
            ),
        ] {
            map.record(&scrub("job3", JobChange::Status, JobStatus::Created, None));
            map.record(&scrub("job3", what, JobStatus::Concluded, error));
            assert_eq!(
                map.corrupt_sectors(REPLICA),
                1,
                "it has not read everything"
            );
        }
        map.record(&scrub("job5", JobChange::Status, JobStatus::Created, None));
        map.record(&scrub(
            "job5",
            JobChange::Completed,
            JobStatus::Concluded,
            None,
        ));
        assert_eq!(map.corrupt_sectors(REPLICA), 0);
    }

    #[test]
    fn a_scrub_that_fails_for_another_reason_has_not_read_everything_either() {
        for (unread, left) in [(vec![REPLICA], 1), (Vec::new(), 0)] {
            let mut map = DiskMap::new();
            map.record(&corrupt(&[range(1, 1)]));
            map.record(&scrub("job1", JobChange::Status, JobStatus::Created, None));
            let no_quorum = Some(JobFailure::NoQuorum { sectors: 8 });
            let status = JobStatus::Aborting;
            let mut end = scrub("job1", JobChange::Completed, status, no_quorum);
            if let Notice::Job(event) = &mut end {
                event.job.unread = unread.into_iter().collect();
            }
            map.record(&end);
            assert_eq!(map.corrupt_sectors(REPLICA), left);
        }
    }

    #[test]
    fn a_sector_that_is_found_again_is_one_corrupt_sector() {
        let mut map = DiskMap::new();
        for _ in 0..4 {
            map.record(&corrupt(&[range(0, 40), range(100, 30), range(200, 10)]));
        }
        let row = map.view(Some(REPLICA)).unwrap();
        assert_eq!((map.corrupt_sectors(REPLICA), row.ever.sectors()), (80, 80));
        let found = row
            .buckets
            .iter()
            .map(|bucket| bucket.corrupt_sectors_found);
        assert_eq!(found.sum::<u64>(), 320, "detections");
        map.repaired(REPLICA, range(0, 40));
        let row = map.view(Some(REPLICA)).unwrap();
        assert_eq!((map.corrupt_sectors(REPLICA), row.ever.sectors()), (40, 80));
    }

    proptest! {
        #[test]
        fn buckets_grow_with_the_disk_and_lose_nothing(
            found in prop::collection::vec((0_u64..1 << 40, 1_u64..4096), 1..50),
            capacity in 1_u64..1 << 42,
        ) {
            let mut map = DiskMap::new();
            for (start, count) in &found {
                map.record(&corrupt(&[range(*start, *count)]));
            }
            let size = map.bucket_sectors(capacity);
            prop_assert!(size * MAP_BUCKETS as u64 >= capacity);
            let mut expected = vec![0; MAP_BUCKETS];
            for sector in found.iter().flat_map(|(start, count)| *start..start + count) {
                expected[usize::try_from(sector / size).unwrap()] += 1;
            }
            let row = map.view(Some(REPLICA)).unwrap();
            let buckets = row.buckets.iter();
            let counted: Vec<u64> = buckets.map(|bucket| bucket.corrupt_sectors_found).collect();
            prop_assert_eq!(counted, expected);
        }
    }
}
