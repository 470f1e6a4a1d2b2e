//! The guest's side: virtio-blk requests and the vhost-user protocol. Knows nothing of replicas.
//!
//! [`frontend`] speaks vhost-user with the VMM and sets rings up; what it shares with the threads
//! that serve them is in [`connection`]. [`guest`] takes requests off the rings and answers them,
//! [`chain`] walks the descriptors of one and [`request`] understands it, [`config_space`] is what
//! the driver sees of the device, [`back_channel`] tells the VMM that it has changed, [`inflight`]
//! remembers for the next process what was taken and not answered.
//!
//! Invariants: every chain taken off a ring is put back on it once, by this process or by the next
//! one; guest memory is written only between those two moments; whatever bytes the guest or the VMM
//! puts in front of us, at most its own requests fail.

pub mod back_channel;
pub mod chain;
pub mod config_space;
pub mod connection;
mod descriptor;
pub mod frontend;
pub mod guest;
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

/// A virtqueue with the descriptors it is kicked and signalled by.
pub type Vring = VringMutex<GuestMemoryAtomic<GuestMemory>>;

/// How large the disk is: one figure for all who serve it. It only grows.
#[derive(Clone, Debug)]
pub struct Capacity(Arc<AtomicU64>);

impl Capacity {
    /// Of a disk of so many sectors.
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

    /// Requests may go as far as that from now on. To be called when every replica can serve them,
    /// and what is known of the replicas covers them.
    pub fn grow(&self, sectors: u64) {
        self.0.fetch_max(sectors, Ordering::AcqRel);
    }
}

/// What the disk is to the guest.
#[derive(Clone, Debug)]
pub struct DiskInfo {
    /// How large it is.
    pub capacity: Capacity,
    /// Logical block size in bytes: requests are multiples of it.
    pub block_bytes: u32,
    /// What the replicas write at a time at least, in bytes: a power of two, not below
    /// `block_bytes`.
    pub physical_block_bytes: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The answer to GET_ID, at most 20 bytes.
    pub serial: String,
    /// How many virtqueues there are.
    pub num_queues: u16,
    /// Data segments that a request may have.
    pub segments_max: u32,
}

impl DiskInfo {
    /// The range of a request for `bytes` bytes from `sector` on, if it is one that this disk can
    /// serve: whole blocks within the capacity. May be empty.
    pub fn range_of(&self, sector: u64, bytes: u64) -> Option<SectorRange> {
        let block_sectors = u64::from(self.block_bytes) / SECTOR_BYTES;
        let whole = bytes.is_multiple_of(u64::from(self.block_bytes))
            && sector.is_multiple_of(block_sectors);
        let range = SectorRange::new(sector, bytes / SECTOR_BYTES);
        let end = sector.checked_add(range.count)?;
        (whole && end <= self.capacity.sectors()).then_some(range)
    }
}
