//! The map of findings for operators: plain values, as `query-quorum-map` returns them, computed
//! from the map and the stale ranges.
//!
//! Invariants: a bucket without findings is not listed; a list of ranges is bounded and holds the
//! longest.

use serde::Serialize;

use super::condition::Health;
use super::map::{Bucket, Row};
use super::queue::EventQueue;
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, SECTOR_BYTES, SectorRange};
use crate::limits::MAP_RANGES_LISTED_MAX;

/// The map of a disk at one moment.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MapState {
    /// The name of the disk.
    pub node_name: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its health.
    pub health: Health,
    /// The size of a bucket.
    pub bucket_bytes: u64,
    /// Failed requests of the guest.
    pub failures: FailuresState,
    /// The replicas, in order.
    pub replicas: Vec<ReplicaMapState>,
}

/// Requests of the guest that failed without a quorum.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FailuresState {
    /// Their number, in each bucket that they touched.
    pub buckets: Vec<FailureBucket>,
    /// Sectors that had no winner when they were last read.
    #[serde(flatten)]
    pub undecided: UndecidedRanges,
}

/// A bucket in which requests failed.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub struct FailureBucket {
    /// Its first byte.
    pub offset: u64,
    /// Requests that failed.
    pub failed: u64,
}

/// The findings of a replica.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ReplicaMapState {
    /// Its name.
    pub node_name: String,
    /// The counts.
    pub buckets: Vec<BucketState>,
    /// Sectors that were corrupt when they were last read.
    #[serde(flatten)]
    pub corrupt: CorruptRanges,
    /// Sectors of which it does not hold the newest data.
    #[serde(flatten)]
    pub stale: StaleRanges,
}

/// The findings in a bucket of a replica.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub struct BucketState {
    /// Its first byte.
    pub offset: u64,
    /// Sectors that were found corrupt, each counted once.
    pub corrupt_sectors_ever: u64,
    /// The same, each counted as often as it was found.
    pub corrupt_sectors_found: u64,
    /// Repaired sectors.
    pub repaired_sectors: u64,
    /// Failed operations.
    pub errors: u64,
    /// Sectors that were corrupt when they were last read.
    pub corrupt_sectors: u64,
    /// Stale sectors.
    pub stale_sectors: u64,
}

macro_rules! ranges {
    ($(#[$doc:meta])* $name:ident, $list:literal, $truncated:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Serialize)]
        pub struct $name {
            /// The longest, in order.
            #[serde(rename = $list)]
            pub ranges: Vec<RangeState>,
            /// There are more ranges.
            #[serde(rename = $truncated, skip_serializing_if = "std::ops::Not::not")]
            pub truncated: bool,
        }

        impl $name {
            fn of(ranges: &[SectorRange]) -> Self {
                Self {
                    ranges: longest(ranges),
                    truncated: ranges.len() > MAP_RANGES_LISTED_MAX,
                }
            }
        }
    };
}

ranges!(
    /// Ranges without a winner.
    UndecidedRanges, "undecided", "undecided-truncated"
);
ranges!(
    /// Ranges that were corrupt when they were last read.
    CorruptRanges, "corrupt", "corrupt-truncated"
);
ranges!(
    /// Stale ranges.
    StaleRanges, "stale", "stale-truncated"
);

/// A run of sectors.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub struct RangeState {
    /// The first sector.
    pub sector_num: u64,
    /// The number of sectors.
    pub sector_count: u64,
}

impl From<&SectorRange> for RangeState {
    fn from(range: &SectorRange) -> Self {
        Self {
            sector_num: range.start,
            sector_count: range.count,
        }
    }
}

/// The properties of the disk that the map does not have.
pub(crate) struct MappedDisk {
    pub(crate) node_name: String,
    pub(crate) size: u64,
    pub(crate) health: Health,
    /// Sectors that had no winner in the last vote on them.
    pub(crate) undecided: RangeSet,
}

/// The properties of a replica that the map does not have.
pub(crate) struct ReplicaPlaces {
    pub(crate) index: ReplicaIndex,
    pub(crate) node_name: String,
    pub(crate) stale: RangeSet,
}

impl MapState {
    /// The map of this disk with these replicas, in at most `buckets_max` buckets.
    pub(crate) fn new(
        reports: &EventQueue,
        disk: MappedDisk,
        buckets_max: usize,
        replicas: impl IntoIterator<Item = ReplicaPlaces>,
    ) -> Self {
        let MappedDisk {
            node_name,
            size,
            health,
            undecided,
        } = disk;
        let capacity_sectors = size / SECTOR_BYTES;
        let base_sectors = reports.map().bucket_sectors(capacity_sectors);
        let together = capacity_sectors
            .div_ceil(base_sectors)
            .div_ceil(buckets_max.max(1) as u64)
            .max(1);
        let cut = Cut {
            capacity_sectors,
            bucket_sectors: base_sectors * together,
            together: usize::try_from(together).unwrap_or(usize::MAX),
        };
        // One row at a time, so that threads which push events do not wait for longer.
        let view = |replica| reports.map().view(replica);
        let replica_map = |places: ReplicaPlaces| {
            cut.replica(places.node_name, view(Some(places.index)), &places.stale)
        };
        Self {
            node_name,
            size,
            health,
            bucket_bytes: cut.bucket_sectors * SECTOR_BYTES,
            failures: cut.failures(view(None), &undecided),
            replicas: replicas.into_iter().map(replica_map).collect(),
        }
    }
}

/// How the buckets of the map are combined into those that are shown.
struct Cut {
    capacity_sectors: u64,
    bucket_sectors: u64,
    /// The number of buckets of the map in one of them.
    together: usize,
}

impl Cut {
    fn counts(&self, row: Option<&Row>) -> Vec<Bucket> {
        let buckets = row.map_or(&[][..], |row| &row.buckets);
        let sums = buckets.chunks(self.together);
        sums.map(|chunk| {
            chunk
                .iter()
                .fold(Bucket::default(), |sum, bucket| sum.plus(*bucket))
        })
        .collect()
    }

    /// Sectors of `ranges` in each bucket.
    fn sectors(&self, ranges: &[SectorRange]) -> Vec<u64> {
        let mut sums = vec![0; self.count()];
        for range in ranges {
            let mut start = range.start;
            while start < range.end() {
                let bucket = start / self.bucket_sectors;
                let end = range.end().min((bucket + 1) * self.bucket_sectors);
                if let Some(sum) = usize::try_from(bucket)
                    .ok()
                    .and_then(|bucket| sums.get_mut(bucket))
                {
                    *sum += end - start;
                }
                start = end;
            }
        }
        sums
    }

    fn count(&self) -> usize {
        usize::try_from(self.capacity_sectors.div_ceil(self.bucket_sectors)).unwrap_or(usize::MAX)
    }

    fn offset(&self, bucket: usize) -> u64 {
        bucket as u64 * self.bucket_sectors * SECTOR_BYTES
    }

    /// Cuts ranges at the end of the disk, which may have grown since that was read.
    fn within(&self, ranges: impl IntoIterator<Item = SectorRange>) -> Vec<SectorRange> {
        let cut = |range: SectorRange| {
            let end = range.end().min(self.capacity_sectors);
            (range.start < end).then(|| SectorRange::new(range.start, end - range.start))
        };
        ranges.into_iter().filter_map(cut).collect()
    }

    fn failures(&self, row: Option<Row>, undecided: &RangeSet) -> FailuresState {
        let undecided = self.within(undecided.iter());
        let counts = self.counts(row.as_ref()).into_iter().enumerate();
        let buckets = counts.filter(|(_, bucket)| bucket.errors > 0);
        FailuresState {
            buckets: buckets
                .map(|(index, bucket)| FailureBucket {
                    offset: self.offset(index),
                    failed: bucket.errors,
                })
                .collect(),
            undecided: UndecidedRanges::of(&undecided),
        }
    }

    fn replica(&self, node_name: String, row: Option<Row>, stale: &RangeSet) -> ReplicaMapState {
        let counts = self.counts(row.as_ref());
        let corrupt = self.within(row.iter().flat_map(|row| row.unresolved.iter()));
        let stale = self.within(stale.iter());
        let ever = self.within(row.iter().flat_map(|row| row.ever.iter()));
        let ever = self.sectors(&ever);
        let (corrupt_sectors, stale_sectors) = (self.sectors(&corrupt), self.sectors(&stale));
        let bucket = |index: usize| {
            let count = counts.get(index).copied().unwrap_or_default();
            BucketState {
                offset: self.offset(index),
                corrupt_sectors_ever: ever[index],
                corrupt_sectors_found: count.corrupt_sectors_found,
                repaired_sectors: count.repaired_sectors,
                errors: count.errors,
                corrupt_sectors: corrupt_sectors[index],
                stale_sectors: stale_sectors[index],
            }
        };
        let has_findings = |bucket: &BucketState| {
            let BucketState {
                offset: _,
                corrupt_sectors_ever: _,
                corrupt_sectors_found,
                repaired_sectors,
                errors,
                corrupt_sectors,
                stale_sectors,
            } = *bucket;
            corrupt_sectors_found + repaired_sectors + errors + corrupt_sectors + stale_sectors > 0
        };
        ReplicaMapState {
            node_name,
            buckets: (0..self.count()).map(bucket).filter(has_findings).collect(),
            corrupt: CorruptRanges::of(&corrupt),
            stale: StaleRanges::of(&stale),
        }
    }
}

/// The longest of `ranges`, which are in order, in order.
fn longest(ranges: &[SectorRange]) -> Vec<RangeState> {
    let mut kept = ranges.to_vec();
    kept.sort_by_key(|range| std::cmp::Reverse(range.count));
    kept.truncate(MAP_RANGES_LISTED_MAX);
    kept.sort_by_key(|range| range.start);
    kept.iter().map(RangeState::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::Errno;
    use crate::common::operation::OperationType;
    use crate::common::report::{Cause, Report};
    use serde_json::json;

    #[test]
    fn a_map_has_at_most_the_requested_buckets() {
        let queue = EventQueue::new().unwrap();
        let error = |sector| Report::Bad {
            replica: ReplicaIndex(0),
            operation: OperationType::Write,
            range: SectorRange::new(sector, 8),
            cause: Cause::Error(Errno(5)),
        };
        // 1 GiB, in buckets of 1 MiB.
        for sector in [0, 2048, 1 << 20] {
            queue.push(error(sector));
        }
        let map = |buckets| {
            let places = ReplicaPlaces {
                index: ReplicaIndex(0),
                node_name: "a".into(),
                stale: {
                    let mut stale = RangeSet::default();
                    stale.insert(SectorRange::new((1 << 21) - 4, 4));
                    stale
                },
            };
            let disk = MappedDisk {
                node_name: "disk".into(),
                size: 1 << 30,
                health: Health::Degraded,
                undecided: RangeSet::default(),
            };
            serde_json::to_value(MapState::new(&queue, disk, buckets, [places])).unwrap()
        };
        let bucket = |offset: u64, errors: u64, stale: u64| {
            json!({
                "offset": offset,
                "corrupt-sectors-ever": 0,
                "corrupt-sectors-found": 0,
                "repaired-sectors": 0,
                "errors": errors,
                "corrupt-sectors": 0,
                "stale-sectors": stale,
            })
        };
        let fine = map(1024);
        assert_eq!(fine["bucket-bytes"], 1 << 20);
        assert_eq!(
            fine["replicas"][0]["buckets"],
            json!([
                bucket(0, 1, 0),
                bucket(1 << 20, 1, 0),
                bucket(1 << 29, 1, 0),
                bucket(1023 << 20, 0, 4)
            ])
        );
        // 1024 of them make 94 of 11 MiB.
        let coarse = map(100);
        assert_eq!(coarse["bucket-bytes"], 11 << 20);
        assert_eq!(
            coarse["replicas"][0]["buckets"],
            json!([
                bucket(0, 2, 0),
                bucket(506 << 20, 1, 0),
                bucket(1023 << 20, 0, 4)
            ])
        );
        assert_eq!(map(1)["replicas"][0]["buckets"], json!([bucket(0, 3, 4)]));
    }

    #[test]
    fn the_longest_ranges_are_listed() {
        let ranges: Vec<_> = (0..100)
            .map(|n| SectorRange::new(n * 1000, n + 1))
            .collect();
        let listed = StaleRanges::of(&ranges);
        assert!(listed.truncated && listed.ranges.len() == MAP_RANGES_LISTED_MAX);
        assert_eq!(listed.ranges[0].sector_count, 37);
        assert!(!StaleRanges::of(&ranges[..64]).truncated);
    }
}
