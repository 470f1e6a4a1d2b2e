//! The policy of the disks of small cases.

use std::time::Duration;

use crate::engine::{Policy, ReadPattern};
use crate::jobs::Sizes;

/// All replicas are asked, none is repaired, and one that does not answer for a second is late.
pub fn plain(threshold: usize) -> Policy {
    Policy {
        threshold,
        read_pattern: ReadPattern::Quorum,
        rewrite_corrupted: false,
        repair_limit_sectors: u64::MAX,
        blkverify: false,
        job_sizes: Sizes::default(),
        block_sectors: 1,
        replica_timeout: Duration::from_secs(1),
    }
}
