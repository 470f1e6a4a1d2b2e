//! What lies below the daemon: the copies of the sectors, and the records.

use crate::record::Record;
use crate::sets::{self, Set};

/// Replicas of the largest world.
pub(crate) const REPLICAS_MAX: usize = 3;
/// Sectors of the largest world. Each has an extent of the records for itself.
pub(crate) const SECTORS_MAX: usize = 2;

/// A version of a sector: the number of the write that made it. 0 is what the disk held before.
pub(crate) type Version = u8;

/// By replica and sector, what a copy holds.
pub(crate) type Versions = [[Version; SECTORS_MAX]; REPLICAS_MAX];

/// One sector of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Copy {
    /// What a read returns.
    pub(crate) now: Version,
    /// The versions of which a power cut may leave any.
    pub(crate) storage: Set,
    /// A flush has failed, and the kernel takes the page for written back: it may drop it.
    pub(crate) lost: bool,
}

impl Copy {
    pub(crate) fn write(&mut self, version: Version) {
        self.now = version;
        self.storage |= sets::one(version.into());
        self.lost = false;
    }

    pub(crate) fn flush(&mut self, success: bool) {
        if !success {
            self.lost |= self.storage != sets::one(self.now.into());
        } else if !self.lost {
            self.storage = sets::one(self.now.into());
        }
    }

    /// From now on it holds this, which is durable.
    pub(crate) fn becomes(&mut self, version: Version) {
        *self = Self {
            now: version,
            storage: sets::one(version.into()),
            lost: false,
        };
    }
}

impl Default for Copy {
    fn default() -> Self {
        Self {
            now: 0,
            storage: sets::one(0),
            lost: false,
        }
    }
}

/// A replica: its image and its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Replica {
    pub(crate) copies: [Copy; SECTORS_MAX],
    pub(crate) record: Record,
    /// A write of a sector that was in flight when the replica was evicted: it may still happen.
    pub(crate) orphan: Option<(u8, Version)>,
}
