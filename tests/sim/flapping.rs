//! A replica that is evicted again and again rejoins later each time (W6).

use std::time::Duration;

use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::report::Report;
use quorum_blk::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use quorum_blk::engine::Shared;
use quorum_blk::limits::FLAPPING_EVICTIONS;
use quorum_blk::sim::policy;

use super::small_disk::{self, Replicas};

const GOOD: ReplicaIndex = ReplicaIndex(0);
const SLOW: ReplicaIndex = ReplicaIndex(1);
const FLAPPING: ReplicaIndex = ReplicaIndex(2);
const RANGE: SectorRange = SectorRange { start: 8, count: 1 };
const ELSEWHERE: SectorRange = SectorRange { start: 9, count: 1 };
/// Longer than anything here may take.
const END: Duration = Duration::from_secs(3600);

/// Three replicas.
#[derive(Default)]
struct Three {
    /// These answer nothing.
    hang: ReplicaSet,
    /// The next write of this one fails.
    failing: Option<ReplicaIndex>,
}

impl Replicas for Three {
    fn serve(&mut self, operation: &mut Operation, _: &Shared) -> Option<Result<(), Errno>> {
        let replica = operation.replica;
        if self.hang.contains(replica) {
            return None;
        }
        let writes = matches!(operation.action, Action::Write { .. });
        let fails = self
            .failing
            .take_if(|failing| writes && *failing == replica);
        Some(fails.map_or(Ok(()), |_| Err(Errno(5))))
    }
}

type Disk = small_disk::Disk<Three>;

fn disk(threshold: usize) -> Disk {
    let shared = Shared::new(3, threshold, 1, 64);
    Disk::new(shared, policy::plain(threshold), Three::default())
}

fn is_in_service(disk: &Disk, replica: ReplicaIndex) -> bool {
    disk.shared.in_service().contains(replica)
}

/// Lets time pass until a replica is in service, or is not. Returns how long that took.
fn wait_until_in_service(disk: &mut Disk, replica: ReplicaIndex, wanted: bool) -> Duration {
    let began = disk.clock.now();
    while is_in_service(disk, replica) != wanted {
        disk.tick_at_deadline();
        let now = disk.clock.now();
        assert!(now < END, "{replica:?} in service: {}", !wanted);
    }
    disk.clock.now() - began
}

/// Has the replica evicted, after which it answers at once.
fn evict(disk: &mut Disk) {
    disk.replicas.hang.insert(FLAPPING);
    disk.write(RANGE, 1);
    disk.reports.clear();
    wait_until_in_service(disk, FLAPPING, false);
    disk.catch_up(FLAPPING);
    disk.replicas.hang.remove(FLAPPING);
}

/// For how long [`FLAPPING`] is kept out since its last eviction.
fn kept_out(disk: &Disk) -> Duration {
    let time = |report: &Report| match report {
        Report::KeptOut { replica, time } => {
            assert_eq!(*replica, FLAPPING);
            Some(*time)
        }
        _ => None,
    };
    let mut times = disk.reports.iter().rev();
    times.find_map(time).unwrap_or_default()
}

#[test]
fn keeps_a_replica_out_for_longer_and_longer() {
    let mut disk = disk(2);
    let mut out = Vec::new();
    for _ in 0..FLAPPING_EVICTIONS + 3 {
        evict(&mut disk);
        let took = wait_until_in_service(&mut disk, FLAPPING, true);
        let told = kept_out(&disk);
        let latest = told + Duration::from_secs(1);
        assert!(
            (told..latest).contains(&took),
            "{took:?} instead of {told:?}"
        );
        out.push(told.as_secs());
    }
    assert_eq!(out, [0, 0, 2, 4, 8, 16]);
}

#[test]
fn keeps_no_replica_out_while_another_is_late_and_needed() {
    let long = Duration::from_secs(60);
    let mut disk = disk(1);
    evict(&mut disk);
    while kept_out(&disk) < long {
        wait_until_in_service(&mut disk, FLAPPING, true);
        evict(&mut disk);
    }
    disk.replicas.failing = Some(GOOD);
    disk.replicas.hang.insert(SLOW);
    disk.write(ELSEWHERE, 1);
    disk.catch_up(SLOW);
    // Only the slow replica holds this write. It answers no more.
    disk.write(RANGE, 1);
    let took = wait_until_in_service(&mut disk, FLAPPING, true);
    assert!(is_in_service(&disk, SLOW), "it is needed");
    assert!(took < long / 2, "it is kept out for {took:?}");
}
