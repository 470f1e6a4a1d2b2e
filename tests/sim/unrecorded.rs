//! A replica is not evicted if the records could not say that any more (S3, W6).

use std::time::Duration;

use quorum_blk::common::operation::Operation;
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::Shared;
use quorum_blk::sim::policy;

use super::small_disk::{self, Records, Replicas};

const SECTORS: u64 = 16;
const RANGE: SectorRange = SectorRange { start: 5, count: 1 };
const VOTES: u8 = 2;
const RETURNING: ReplicaIndex = ReplicaIndex(3);
const HUNG: [ReplicaIndex; 2] = [ReplicaIndex(0), ReplicaIndex(1)];

/// These answer nothing.
struct Hung(ReplicaSet);

impl Replicas for Hung {
    fn serve(&mut self, operation: &mut Operation, _: &Shared) -> Option<Result<(), Errno>> {
        (!self.0.contains(operation.replica)).then_some(Ok(()))
    }
}

type Disk = small_disk::Disk<Hung>;

/// Four replicas, two of which decide. The records say that the last one is missing, and that
/// [`RANGE`] may be written.
fn disk() -> Disk {
    let shared = Shared::new(4, VOTES.into(), 1, SECTORS);
    shared.leave_out(RETURNING, &RangeSet::default());
    let records = Records {
        replicas: 4,
        sectors: SECTORS,
        votes: VOTES,
        missing: Some(RETURNING),
        marked: Some(RANGE),
    };
    shared.remember(records.keeper());
    Disk::new(shared, policy::plain(VOTES.into()), Hung(ReplicaSet::EMPTY))
}

/// The image of the missing replica is open.
fn find_missing(disk: &mut Disk) {
    disk.shared.record_found(RETURNING, 1);
    assert!(disk.shared.found(RETURNING, &RangeSet::default()));
    disk.tick();
}

/// Two of three replicas hang that the records say are active, while the fourth is there again. The
/// other two could be neither sure that those have not gone on alone, after a power cut, nor write
/// that these are out of service. So one of those that hang is waited for.
#[test]
fn a_replica_is_waited_for_without_which_the_records_cannot_be_changed() {
    let mut disk = disk();
    disk.replicas.0 = HUNG.into_iter().collect();
    find_missing(&mut disk);
    assert_eq!(disk.shared.in_service().len(), 4);
    disk.write(RANGE, 1);
    disk.wait(Duration::from_secs(600));
    assert!(disk.answers.is_empty(), "neither failed nor answered");
    assert_eq!(disk.shared.in_service().len(), 3);
    disk.replicas.0 = ReplicaSet::EMPTY;
    disk.resume();
    disk.wait(Duration::from_secs(600));
    assert_eq!(disk.answers, [true]);
    assert_eq!(disk.shared.in_service().len(), 4);
    assert!(disk.shared.are_records_durable());
}

/// When the records say that one of them is out of service, the other one is not needed.
#[test]
fn a_replica_is_not_waited_for_when_the_records_say_enough_without_it() {
    let mut disk = disk();
    find_missing(&mut disk);
    disk.wait(Duration::from_secs(600));
    assert!(disk.shared.are_records_durable());
    disk.replicas.0 = HUNG.into_iter().collect();
    disk.write(RANGE, 1);
    disk.wait(Duration::from_secs(600));
    assert_eq!(disk.answers, [true]);
    assert_eq!(disk.shared.in_service().len(), 2);
}
