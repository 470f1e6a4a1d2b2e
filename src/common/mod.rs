//! The vocabulary of all rooms: sectors and ranges of them, replicas and sets of replicas, errors
//! of the kernel, operations on a replica and their buffers, parts of messages.
//!
//! Plain values: this room depends on no other one. Only the buffers need unsafe code.

pub mod buffer;
#[forbid(unsafe_code)]
pub mod clock;
#[forbid(unsafe_code)]
mod errno;
#[forbid(unsafe_code)]
mod found_data;
#[forbid(unsafe_code)]
pub mod image;
#[forbid(unsafe_code)]
pub(crate) mod message;
#[forbid(unsafe_code)]
pub mod operation;
#[forbid(unsafe_code)]
pub mod pulse;
#[forbid(unsafe_code)]
pub mod ranges;
#[forbid(unsafe_code)]
mod replica_set;
#[forbid(unsafe_code)]
pub mod report;
#[forbid(unsafe_code)]
pub mod runs;
#[forbid(unsafe_code)]
mod sector;
#[forbid(unsafe_code)]
pub mod time_span;

pub use self::errno::Errno;
pub use self::found_data::FoundData;
pub use self::replica_set::{ReplicaIndex, ReplicaSet};
pub use self::sector::{SECTOR_BYTES, SectorRange};

/// Why no lock is poisoned: a thread that panics ends the process.
pub(crate) const NOT_POISONED: &str = "a panic ends the process";
