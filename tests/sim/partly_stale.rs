//! A block of which only some sectors are stale on a replica: the copies of the others vote when a
//! resync copies the block.

use std::time::Duration;

use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::{Policy, Shared};
use quorum_blk::jobs::Sizes;
use quorum_blk::sim::policy;

use super::small_disk::{Disk, Replicas, access};

const BLOCK: SectorRange = SectorRange { start: 8, count: 8 };
const STALE: ReplicaIndex = ReplicaIndex(2);
const OLD: u8 = 1;
const NEW: u8 = 2;
const CORRUPT: u8 = 3;

/// Three replicas, each of them one byte for each sector of [`BLOCK`].
struct Three {
    holds: [[u8; 8]; 3],
    /// Every write fails. On [`STALE`] it has written the first sector.
    writes_fail: bool,
}

impl Replicas for Three {
    fn serve(&mut self, operation: &mut Operation, _: &Shared) -> Option<Result<(), Errno>> {
        let holds = &mut self.holds[operation.replica.as_usize()];
        if let Action::Read { range, .. } | Action::Write { range, .. } = &operation.action {
            assert_eq!(*range, BLOCK, "blocks are read and written as a whole");
        }
        match &mut operation.action {
            Action::Write { data, .. } if self.writes_fail => {
                if operation.replica == STALE {
                    holds[0] = data[0];
                }
                Some(Err(Errno(28)))
            }
            action => Some(access(action, holds, BLOCK.start)),
        }
    }
}

#[test]
fn a_block_is_resynced_though_it_needs_the_vote_of_its_own_fresh_sectors() {
    let policy = Policy {
        job_sizes: Sizes {
            neighbourhood_sectors: 0,
            ..Sizes::default()
        },
        block_sectors: BLOCK.count,
        ..policy::plain(2)
    };
    let replicas = Three {
        holds: [[OLD; 8]; 3],
        writes_fail: true,
    };
    let mut disk = Disk::new(Shared::new(3, 2, 1, 64), policy, replicas);
    assert_eq!(disk.write(BLOCK, NEW), Some(false));
    // The vote decides for the old version, which cannot be written to the third replica.
    assert_eq!(disk.read(BLOCK), Some(true));
    disk.replicas.writes_fail = false;
    let first = SectorRange::new(BLOCK.start, 1);
    assert!(disk.shared.stale_ranges(STALE).iter().eq([first]));
    // Now that sector 4 is corrupt on another replica, the third has one of its last two copies.
    disk.replicas.holds[0][4] = CORRUPT;
    disk.tick();
    while disk.shared.stale_sectors(STALE) > 0 {
        assert!(
            disk.clock.now() < Duration::from_secs(100),
            "no resync succeeds"
        );
        disk.tick_at_deadline();
    }
    assert_eq!(disk.replicas.holds[1..], [[OLD; 8]; 2]);
}
