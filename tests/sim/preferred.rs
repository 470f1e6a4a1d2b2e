//! What an operator prefers is marked in the records before it is written (W12, S4).

use quorum_blk::common::operation::{Action, Operation};
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::engine::Shared;
use quorum_blk::quorum::health::Preferable;
use quorum_blk::record::Keeper;
use quorum_blk::sim::policy;

use super::small_disk::{self, Records, Replicas, access};

const SECTORS: u64 = 16;
const SECTOR: SectorRange = SectorRange { start: 5, count: 1 };
const MISSING: ReplicaIndex = ReplicaIndex(2);

/// Two replicas in service, each of them one byte for [`SECTOR`], and one that is missing and has
/// missed nothing yet.
struct Two {
    holds: [u8; 2],
    /// Writes to records fail.
    is_full: bool,
    /// It does not carry out what it says it has written.
    loses_writes: Option<ReplicaIndex>,
    /// Flushes, and writes, wait.
    waits: [bool; 2],
}

impl Replicas for Two {
    fn serve(&mut self, operation: &mut Operation, shared: &Shared) -> Option<Result<(), Errno>> {
        let held = &mut self.holds[operation.replica.as_usize()];
        let [flushes_wait, writes_wait] = self.waits;
        Some(match &mut operation.action {
            Action::Record { .. } if self.is_full => Err(Errno(28)),
            Action::Flush if flushes_wait => return None,
            Action::Write { .. } if writes_wait => return None,
            Action::Write { .. } if self.loses_writes == Some(operation.replica) => Ok(()),
            action => {
                let writes = matches!(action, Action::Write { .. });
                assert!(
                    !writes || is_marked(shared),
                    "it is written before it is marked"
                );
                access(action, std::slice::from_mut(held), SECTOR.start)
            }
        })
    }
}

type Disk = small_disk::Disk<Two>;

fn disk() -> Disk {
    let shared = Shared::new(3, 2, 1, SECTORS);
    shared.leave_out(MISSING, &RangeSet::default());
    let records = Records {
        replicas: 3,
        sectors: SECTORS,
        votes: 2,
        missing: Some(MISSING),
        marked: None,
    };
    shared.remember(records.keeper());
    let replicas = Two {
        holds: [1, 2],
        is_full: false,
        loses_writes: None,
        waits: [false; 2],
    };
    Disk::new(shared, policy::plain(2), replicas)
}

fn prefer(disk: &mut Disk, replica: ReplicaIndex) {
    let Preferable { undecided, .. } = disk.shared.preferable(replica).unwrap();
    let started = disk.shared.jobs(drop, |jobs, health| {
        jobs.prefer(replica, undecided, 0, health)
    });
    started.unwrap();
    disk.tick();
}

fn is_marked(shared: &Shared) -> bool {
    let marked = |keeper: &Keeper| keeper.is_durable() && keeper.intent().contains(SECTOR);
    shared.records(marked).unwrap()
}

/// Otherwise the record of the missing replica would not say that it has missed that, and its copy
/// would vote after the next start.
#[test]
fn what_a_missing_replica_has_not_is_marked_before_it_is_written() {
    let mut disk = disk();
    assert_eq!(disk.read(SECTOR), Some(false));
    assert!(!is_marked(&disk.shared));
    prefer(&mut disk, ReplicaIndex(1));
    assert_eq!(disk.replicas.holds, [2, 2]);
    assert_eq!(disk.read(SECTOR), Some(true));
    assert!(is_marked(&disk.shared));
}

#[test]
fn nothing_is_written_that_cannot_be_marked() {
    let mut disk = disk();
    assert_eq!(disk.read(SECTOR), Some(false));
    disk.replicas.is_full = true;
    prefer(&mut disk, ReplicaIndex(1));
    assert_eq!(disk.replicas.holds, [1, 2]);
    // What an operator sees of it.
    assert!(disk.shared.record_write_errors(ReplicaIndex(0)) > 0);
    assert_eq!(disk.shared.record_write_errors(MISSING), 0);
    let before = disk.shared.record_figures();
    assert!(before.rounds > 0);
    disk.replicas.is_full = false;
    assert_eq!(disk.read(SECTOR), Some(false));
    prefer(&mut disk, ReplicaIndex(1));
    assert_eq!(disk.replicas.holds, [2, 2]);
    let figures = disk.shared.record_figures();
    assert!(figures.rounds > before.rounds && figures.marked_sectors >= SECTOR.count);
}

/// Otherwise the guest would have the answer that it is durable, and the disk goes on with what was
/// there before.
#[test]
fn a_write_that_waits_for_its_flush_fails_where_another_version_is_being_written() {
    let mut disk = disk();
    disk.replicas.holds = [1, 1];
    disk.replicas.loses_writes = Some(ReplicaIndex(0));
    disk.replicas.waits = [true, false];
    assert_eq!(disk.write_durably(SECTOR, 3), None);
    assert_eq!(disk.replicas.holds, [1, 3]);
    assert_eq!(disk.read(SECTOR), Some(false), "no version has a quorum");
    disk.replicas.waits = [true, true];
    prefer(&mut disk, ReplicaIndex(0));
    disk.replicas.waits = [false, true];
    disk.resume();
    assert_eq!(disk.answers, [false, false]);
    disk.replicas.waits = [false, false];
    disk.resume();
    assert_eq!(disk.replicas.holds, [1, 1]);
    assert_eq!(disk.read(SECTOR), Some(true));
}
