//! Why a slot does not count, and why a record file cannot be used.

use serde::{Serialize, Serializer};

use crate::common::message::QuotedList;

/// Why a slot of a record does not count.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SlotFault {
    /// It is empty, or zeroes: it was never written.
    #[error("it was never written")]
    Blank,
    /// It does not begin as a record does.
    #[error("it does not begin as a record does")]
    NoRecord,
    /// It is shorter than it says.
    #[error("it ends too early")]
    Short,
    /// The checksum differs: it is torn or was corrupted.
    #[error("its checksum differs")]
    Checksum,
    /// The text cannot be parsed.
    #[error("its text cannot be read: {0}")]
    Text(String),
    /// A later version wrote it.
    #[error("it needs {}, which this version of quorum-blk does not know", QuotedList(.needs))]
    Incompatible {
        /// Which features.
        needs: Vec<String>,
        /// Its sequence number, if the text has one in the usual place.
        sequence: Option<u64>,
    },
    /// The text contradicts itself.
    #[error("it contradicts itself: {0}")]
    Impossible(&'static str),
}

/// Why a record file cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unusable {
    /// No slot was ever written.
    #[error("its record was never written")]
    Blank,
    /// A later version wrote it.
    #[error("its record needs {}, which this version of quorum-blk does not know", QuotedList(.0))]
    Incompatible(Vec<String>),
    /// Neither slot counts.
    #[error("neither slot of its record can be used; the first: {0}; the second: {1}")]
    Both(SlotFault, SlotFault),
    /// The file could not be read.
    #[error("its record cannot be read: {0}")]
    Unread(String),
}

impl Unusable {
    /// Of a file whose slots both do not count.
    pub(super) fn of(first: SlotFault, second: SlotFault) -> Self {
        match (first, second) {
            (SlotFault::Blank, SlotFault::Blank) => Self::Blank,
            (SlotFault::Incompatible { needs, .. }, _)
            | (_, SlotFault::Incompatible { needs, .. }) => Self::Incompatible(needs),
            (first, second) => Self::Both(first, second),
        }
    }
}

/// As its text.
impl Serialize for SlotFault {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// As its text.
impl Serialize for Unusable {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
