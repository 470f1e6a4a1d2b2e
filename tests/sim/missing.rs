//! A member whose image is missing at the start is not asked, and rejoins when it is open (W13).

use std::time::Duration;

use quorum_blk::common::operation::Operation;
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::{GuestRequest, Policy, Shared};
use quorum_blk::jobs::{HoleSizes, Sizes};
use quorum_blk::quorum::health::{NotRemoved, Wanted};
use quorum_blk::sim::policy;

use super::small_disk::{self, Replicas, access};

const SECTORS: usize = 16;
const MISSING: ReplicaIndex = ReplicaIndex(2);
const OLD: u8 = 1;
const NEW: u8 = 2;
/// What no other replica holds.
const OWN: u8 = 3;

/// Three replicas, each of them one byte for each sector.
struct Three([[u8; SECTORS]; 3]);

impl Replicas for Three {
    fn serve(&mut self, operation: &mut Operation, shared: &Shared) -> Option<Result<(), Errno>> {
        let replica = operation.replica;
        assert!(
            !shared.missing().contains(replica),
            "asked without an image: {operation:?}"
        );
        let holds = &mut self.0[replica.as_usize()];
        Some(access(&mut operation.action, holds, 0))
    }
}

type Disk = small_disk::Disk<Three>;

/// The third replica is missing at the start, and stale in the sectors 0 to 7.
fn disk() -> Disk {
    let policy = Policy {
        job_sizes: Sizes {
            neighbourhood_sectors: 0,
            holes: HoleSizes::default(),
            ..Sizes::default()
        },
        ..policy::plain(2)
    };
    let shared = Shared::new(3, 2, 1, SECTORS as u64);
    let mut stale = RangeSet::default();
    stale.insert(SectorRange::new(0, 8));
    shared.leave_out(MISSING, &stale);
    let mut holds = [[OLD; SECTORS]; 3];
    holds[2][..8].fill(OWN);
    Disk::new(shared, policy, Three(holds))
}

#[test]
fn it_is_not_asked_and_rejoins_when_its_image_is_open() {
    let mut disk = disk();
    assert_eq!(disk.write(SectorRange::new(9, 1), NEW), Some(true));
    assert_eq!(disk.submit(GuestRequest::Flush), Some(true));
    disk.wait(Duration::from_secs(100));
    assert_eq!(disk.engine.deadline(), None, "nothing is to be done");
    let all = SectorRange::new(0, SECTORS as u64);
    assert_eq!(disk.read(all), Some(true));
    assert_eq!(disk.shared.stale_sectors(MISSING), 9);
    assert!(disk.rejoined().is_empty());

    assert!(disk.shared.found(MISSING, &RangeSet::default()));
    disk.tick();
    assert_eq!(disk.rejoined(), [MISSING]);
    assert_eq!(disk.shared.in_service(), ReplicaSet::first(3));
    disk.wait(Duration::from_secs(100));
    assert_eq!(disk.shared.stale_sectors(MISSING), 0);
    assert_eq!(disk.replicas.0[2], disk.replicas.0[0]);
}

/// With two versions on the others there is no quorum.
#[test]
fn it_does_not_vote_where_it_is_stale() {
    let mut disk = disk();
    disk.replicas.0[1][0] = OWN;
    assert!(disk.shared.found(MISSING, &RangeSet::default()));
    disk.tick();
    assert_eq!(disk.rejoined(), [MISSING]);
    for sector in [0, 8] {
        let read = disk.read(SectorRange::new(sector, 1));
        assert_eq!(read, Some(sector == 8), "sector {sector}");
    }
}

#[test]
fn it_can_be_removed_and_its_place_is_free_at_once() {
    let mut disk = disk();
    let tell = |_| {};
    let others = disk.shared.remove(ReplicaIndex(0), tell);
    assert_eq!(others, Err(NotRemoved::TooFewInService));
    disk.shared.remove(MISSING, tell).unwrap();
    disk.tick();
    assert_eq!(disk.released, [MISSING]);
    assert!(
        !disk.shared.found(MISSING, &RangeSet::default()),
        "it is no member any more"
    );
    disk.shared.add(MISSING);
    disk.tick();
    disk.wait(Duration::from_secs(100));
    assert_eq!(disk.replicas.0[2], disk.replicas.0[0]);
}

#[test]
fn it_can_be_given_up() {
    let mut disk = disk();
    let loss = disk.shared.fail(MISSING, |_| {}).unwrap();
    assert_eq!(loss.lost.sectors(), 0);
    disk.tick();
    assert_eq!(disk.released, [MISSING]);
}

/// A threshold of all is one that the disk can have some day.
#[test]
fn it_counts_as_a_replica() {
    let disk = disk();
    disk.shared.want_threshold(Wanted::Given(3)).unwrap();
    assert_eq!(disk.shared.thresholds(), (2, 3, false));
    disk.shared.want_threshold(Wanted::Majority).unwrap();
    assert_eq!(disk.shared.thresholds(), (2, 2, true));
}
