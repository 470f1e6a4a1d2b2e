//! The words that all rooms share: sectors and ranges of them, replicas and sets of replicas,
//! errors of the kernel, operations on a replica and their buffers, parts of messages.
//!
//! Plain values below every other room: nothing here knows what they are used for.

pub mod buffer;
pub mod clock;
mod errno;
pub(crate) mod message;
pub mod operation;
pub mod ranges;
mod replica_set;
pub mod report;
mod sector;

pub use self::errno::Errno;
pub use self::replica_set::{ReplicaIndex, ReplicaSet};
pub use self::sector::{SECTOR_BYTES, SectorRange};

/// Why no lock is poisoned: a thread that panics ends the process.
pub(crate) const NOT_POISONED: &str = "a panic ends the process";
