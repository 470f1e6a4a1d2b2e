//! What is in flight.

use crate::disk::{SECTORS_MAX, Version};
use crate::sets::Set;

/// What is withheld until the records say more: how often more was to be said.
pub(crate) type Memory = u8;

/// What a series of record writes is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Goal {
    pub(crate) memory: Memory,
    pub(crate) marks: Set,
}

/// A write of the guest, of one sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Write {
    pub(crate) sector: u8,
    pub(crate) version: Version,
    pub(crate) stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// The sector has to be marked.
    Marking,
    Writing(Copying),
    /// These have done it, and their copies may vote, which is a quorum. The answer waits for the
    /// records.
    Written(Set, Memory),
}

/// Writes of one version to several replicas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Copying {
    /// Whose reply is out.
    pub(crate) waiting: Set,
    /// Who has done it.
    pub(crate) performed: Set,
    /// Who has replied with success.
    pub(crate) done: Set,
    /// Who has replied with an error.
    pub(crate) failed: Set,
    /// Who has failed a flush, or was evicted, since it was asked.
    pub(crate) tainted: Set,
}

/// A flush of all replicas in service. One runs at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Flush {
    /// It is of the settling, and the guest does not hear of it.
    pub(crate) settles: bool,
    pub(crate) waiting: Set,
    pub(crate) done: Set,
    /// By sector, the members that have not flushed what was written there before it began.
    pub(crate) covered: [Set; SECTORS_MAX],
    /// By sector, the members to which something was written since.
    pub(crate) later: [Set; SECTORS_MAX],
    /// By sector, the members that are known not to have made durable what it covers.
    pub(crate) uncovered: [Set; SECTORS_MAX],
    /// What may be left by a power cut after it, by sector.
    pub(crate) acceptable: [Set; SECTORS_MAX],
    /// It has succeeded, and the answer waits for the records.
    pub(crate) ended: Option<Memory>,
}

/// The winner of a sector is made the version of all replicas before it counts (S5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Settling {
    pub(crate) sector: u8,
    pub(crate) winner: Version,
    /// Those that are not known to hold it.
    pub(crate) others: Set,
    pub(crate) writes: Copying,
    /// Some replica has failed since the vote.
    pub(crate) is_outdated: bool,
}
