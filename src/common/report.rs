//! What the engine reports to the operator: the facts behind QUORUM_FAILURE and QUORUM_REPORT_BAD,
//! evictions and rejoins, and facts that are only counted.

use std::time::Duration;

use super::operation::OperationType;
use super::{Errno, ReplicaIndex, ReplicaSet, SectorRange};

/// A SHA-256 digest.
pub type Digest = [u8; 32];

/// One fact for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// No quorum: a request failed (QUORUM_FAILURE).
    Failure {
        /// The operation.
        operation: OperationType,
        /// Its range.
        range: SectorRange,
        /// Whose request it was.
        requester: Requester,
        /// The first error that a replica returned for the request.
        error: Option<Errno>,
        /// A replica has no space left for it.
        no_space: bool,
    },
    /// A replica returned an error or lost the vote (QUORUM_REPORT_BAD).
    Bad {
        /// The replica.
        replica: ReplicaIndex,
        /// The guest operation.
        operation: OperationType,
        /// Its range.
        range: SectorRange,
        /// Why it is reported.
        cause: Cause,
    },
    /// A replica did not answer in time and was evicted.
    Evicted(ReplicaIndex),
    /// An evicted replica was evicted too often: it is not asked for this long, even if it answers.
    KeptOut {
        /// The replica.
        replica: ReplicaIndex,
        /// For how long.
        time: Duration,
    },
    /// Replicas have more to repair than is repaired unasked: nothing is repaired before the
    /// operator decides (O5).
    RepairLimit {
        /// So much, counted for each replica.
        limit_sectors: u64,
    },
    /// An evicted replica answered and is asked again.
    Rejoined(ReplicaIndex),
}

/// Whose request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Requester {
    /// The guest's: it got an I/O error.
    Guest,
    /// The guest's: it waits until the operator continues.
    Held,
    /// A job's: the guest has not noticed.
    Job,
}

/// A fact that the operator sees only as a total: no event reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fact {
    /// A read is repeated under a lock because the replies differ.
    Confirmation,
    /// The repeated read found no fault: a write was in flight.
    ConfirmationWithoutFault,
    /// A resync has written this many stale sectors.
    SectorsResynced(ReplicaIndex, u64),
    /// A resync has found that a stale replica holds what the others hold, although it was not
    /// written to: holes.
    Equal(ReplicaIndex, SectorRange),
    /// The replica that the operator prefers decides in the last of these sectors, which had no
    /// winner; the blocks before are written (W12). For the simulator.
    PreferenceBegins(ReplicaIndex, SectorRange, SectorRange),
    /// The blocks are written; these replicas hold what the preferred one holds. Whether they are
    /// enough. For the simulator.
    PreferenceEnds(SectorRange, ReplicaSet, bool),
    /// The repair of this many sectors has failed.
    SectorsNotRepaired(ReplicaIndex, u64),
}

/// Why a replica is reported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The operation failed on this replica.
    Error(Errno),
    /// Its bytes lost a confirmed vote.
    Corrupt(Evidence),
}

/// The proof that a replica is corrupt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Evidence {
    /// The runs of sectors that differ from the winner, at most
    /// [`BAD_SECTOR_RUNS_MAX`](crate::limits::BAD_SECTOR_RUNS_MAX).
    pub bad_sectors: Vec<SectorRange>,
    /// Whether there were more runs than are listed.
    pub bad_sectors_cut: bool,
    /// The runs that are not listed: for the map of the disk, not for the event.
    pub unlisted: Vec<SectorRange>,
    /// How many sectors differ, listed or not.
    pub sectors: u64,
    /// SHA-256 of the first corrupt sector as this replica returned it.
    pub digest: Digest,
    /// SHA-256 of the same sector as the winner holds it.
    pub winner_digest: Digest,
}
