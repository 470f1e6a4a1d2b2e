//! The guest's side: virtio-blk requests and the vhost-user protocol. Knows nothing of replicas.
//!
//! - [`frontend`] speaks vhost-user with the VMM and sets virtqueues up.
//! - [`connection`] is the state that a frontend shares with the workers.
//! - [`guest`] accepts requests from virtqueues, hands fragments to the engine, and answers.
//! - [`chain`] walks the descriptors of a request, [`request`] parses them.
//! - [`config_space`] has the feature bits and the configuration space, [`back_channel`] reports to
//!   the VMM that it has changed.
//! - [`inflight`] tracks accepted chains for the next process.
//! - [`memory`] is guest memory with its dirty log.
//!
//! Invariants: every chain accepted from a virtqueue is completed once, by this process or by the
//! next one; guest memory is written only between those two moments (I6); whatever bytes the guest
//! or the VMM sends, at most its own requests fail (I7).

#![forbid(unsafe_code)]

pub mod back_channel;
pub mod chain;
pub mod config_space;
pub mod connection;
mod descriptor;
pub mod disk_use;
pub mod frontend;
pub mod guest;
pub mod hold;
pub mod inflight;
pub mod memory;
pub mod request;
#[cfg(test)]
mod tests;
mod view;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vhost_user_backend::VringMutex;
use vm_memory::GuestMemoryAtomic;

pub use self::memory::GuestMemory;
pub use self::view::View;

use crate::common::{SECTOR_BYTES, SectorRange};

/// A virtqueue with its kick and call descriptors.
pub type Vring = VringMutex<GuestMemoryAtomic<GuestMemory>>;

/// The size of the disk: one figure for all threads that serve it. It only grows.
#[derive(Clone, Debug)]
pub struct Capacity(Arc<AtomicU64>);

impl Capacity {
    /// The capacity of a disk of this many sectors.
    pub fn new(sectors: u64) -> Self {
        Self(Arc::new(AtomicU64::new(sectors)))
    }

    /// In sectors.
    pub fn sectors(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }

    /// In bytes.
    pub fn bytes(&self) -> u64 {
        self.sectors() * SECTOR_BYTES
    }

    /// Lets requests go up to this sector from now on. To be called when every replica can serve
    /// them, and the replicas' health is tracked that far.
    pub fn grow(&self, sectors: u64) {
        self.0.fetch_max(sectors, Ordering::AcqRel);
    }
}

/// The disk as the guest sees it.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// The size of the disk.
    pub capacity: Capacity,
    /// Logical block size in bytes: requests are multiples of it.
    pub block_bytes: u32,
    /// The smallest unit that the replicas write, in bytes: a power of two, not below
    /// `block_bytes`.
    pub physical_block_bytes: u32,
    /// Whether writes are rejected.
    pub read_only: bool,
    /// The answer to GET_ID, at most 20 bytes.
    pub serial: String,
    /// The number of virtqueues.
    pub num_queues: u16,
    /// Data segments that a request may have.
    pub segments_max: u32,
}

impl DiskInfo {
    /// The range of a request for `bytes` bytes from `sector` on, if it has whole blocks within the
    /// capacity. May be empty.
    pub fn range_of(&self, sector: u64, bytes: u64) -> Option<SectorRange> {
        let block_sectors = u64::from(self.block_bytes) / SECTOR_BYTES;
        let whole = bytes.is_multiple_of(u64::from(self.block_bytes))
            && sector.is_multiple_of(block_sectors);
        // First the check: the guest chooses the sector, and a range asserts that it does not wrap.
        let count = bytes / SECTOR_BYTES;
        let end = sector.checked_add(count)?;
        (whole && end <= self.capacity.sectors()).then(|| SectorRange::new(sector, count))
    }
}
