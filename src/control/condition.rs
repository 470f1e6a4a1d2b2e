//! The health of a disk (O1): the conditions that need an operator's attention, and the one word
//! that they add up to. docs/operating.md explains each of them.

use serde::{Serialize, Serializer};

use super::errors::Errors;
use super::state::{ReplicaState, ServiceState};
use crate::common::image::ImageChanges;

/// The health of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// Neither the disk nor a replica has a condition.
    Healthy,
    /// A replica has one, or there are too few; the guest does not notice.
    Degraded,
    /// The disk has one: the guest got an I/O error, or will, or waits; or an operator must decide.
    Failing,
}

/// A condition of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReplicaCondition {
    /// It did not answer in time and is not asked until it does.
    Evicted,
    /// Its image could not be opened at the start.
    Missing,
    /// It was evicted often of late.
    Flapping,
    /// It does not hold the newest data everywhere.
    Stale,
    /// It lost its last vote somewhere.
    Corrupt,
    /// It returned an error that is not cleared.
    Errors,
    /// Another program has cut its image: it ends before the end of the disk.
    Truncated,
    /// Another program has deleted its image.
    Unlinked,
    /// The path of its image names another file or none.
    Moved,
}

/// A condition of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskCondition {
    /// The disk has stopped: requests that failed are held.
    IoError,
    /// Some sectors had no winner when they were last read.
    Undecided,
    /// The guest got an I/O error that is not cleared.
    GuestErrors,
    /// More is corrupt than is repaired unasked: nothing is before the operator decides.
    RepairLimit,
    /// The disk has fewer replicas than it should. The guest does not notice.
    FewerReplicas,
}

/// Serializes a word by its name.
macro_rules! words {
    ($($word:ty { $($variant:ident = $name:literal),+ $(,)? })+) => {$(
        impl $word {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            /// The word.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name),+
                }
            }
        }

        impl Serialize for $word {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }
    )+};
}

words! {
    Health { Healthy = "healthy", Degraded = "degraded", Failing = "failing" }
    ReplicaCondition {
        Evicted = "evicted",
        Missing = "missing",
        Flapping = "flapping",
        Stale = "stale",
        Corrupt = "corrupt",
        Errors = "errors",
        Truncated = "truncated",
        Unlinked = "unlinked",
        Moved = "moved",
    }
    DiskCondition {
        IoError = "io-error",
        Undecided = "undecided",
        GuestErrors = "guest-errors",
        RepairLimit = "repair-limit",
        FewerReplicas = "fewer-replicas",
    }
}

/// The conditions of a replica in this state.
pub fn of_replica(
    state: ServiceState,
    is_flapping: bool,
    stale_bytes: u64,
    corrupt_sectors: u64,
    errors: &Errors,
    image: ImageChanges,
) -> Vec<ReplicaCondition> {
    chosen([
        (state == ServiceState::Evicted, ReplicaCondition::Evicted),
        (state == ServiceState::Missing, ReplicaCondition::Missing),
        (is_flapping, ReplicaCondition::Flapping),
        (stale_bytes > 0, ReplicaCondition::Stale),
        (corrupt_sectors > 0, ReplicaCondition::Corrupt),
        (!errors.is_empty(), ReplicaCondition::Errors),
        (image.truncated, ReplicaCondition::Truncated),
        (image.unlinked, ReplicaCondition::Unlinked),
        (image.moved, ReplicaCondition::Moved),
    ])
}

/// The conditions of a disk.
pub fn of_disk(
    held_requests: u64,
    undecided_sectors: u64,
    errors: &Errors,
    repairs_have_stopped: bool,
    fewer_replicas: bool,
) -> Vec<DiskCondition> {
    chosen([
        (held_requests > 0, DiskCondition::IoError),
        (undecided_sectors > 0, DiskCondition::Undecided),
        (!errors.is_empty(), DiskCondition::GuestErrors),
        (repairs_have_stopped, DiskCondition::RepairLimit),
        (fewer_replicas, DiskCondition::FewerReplicas),
    ])
}

/// The health of a disk with these conditions and replicas.
pub fn health(conditions: &[DiskCondition], replicas: &[ReplicaState]) -> Health {
    let is_warning = |condition: &DiskCondition| *condition == DiskCondition::FewerReplicas;
    let mut replicas = replicas.iter();
    if !conditions.iter().all(is_warning) {
        Health::Failing
    } else if !conditions.is_empty() || replicas.any(|replica| !replica.conditions.is_empty()) {
        Health::Degraded
    } else {
        Health::Healthy
    }
}

fn chosen<T, const N: usize>(all: [(bool, T); N]) -> Vec<T> {
    let holding = all.into_iter().filter(|(holds, _)| *holds);
    holding.map(|(_, condition)| condition).collect()
}
