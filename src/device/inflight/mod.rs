//! Which requests are in flight, in memory that outlives this process (vhost-user, "Inflight I/O
//! tracking").
//!
//! The frontend holds the region. When this daemon is killed, the next one gets the region and
//! finds there which chains were accepted and not completed: it submits those again, in the order
//! in which they were accepted.
//!
//! For each queue, in the byte order of the host (`struct QueueRegionSplit` of the specification):
//!
//! ```text
//!  0  features u64  8  version u16  10  desc_num u16  12  last_batch_head u16  14  used_idx u16
//! 16  for each descriptor:  0  inflight u8, 5 bytes unused   6  next u16   8  counter u64
//! ```
//!
//! and zeroes up to a multiple of 64 bytes. In those of the first queue the daemon keeps the cache
//! mode that the driver has chosen ([`Region::writeback`]), since frontends do not repeat it. What
//! is stored when, so that a kill between any two stores loses no request and repeats none that is
//! on the used ring:
//!
//! | a chain is accepted | a chain is completed |
//! | --- | --- |
//! | its counter | its `next`, then last_batch_head: this chain may be half completed |
//! | its flag | the used ring (`virtio-queue`: the element, then the index) |
//! | | its flag is cleared |
//! | | used_idx: it is completed |
//!
//! A batch of this daemon is one chain; recovery understands longer ones. Only the order of one
//! thread's own stores matters, as only the next process reads them: a kill leaves what was stored
//! up to some instruction.
//!
//! Invariants: the frontend can write all of this at any time, so every value is checked where it
//! is used, and read once; the process never asks the region for what it knows itself.
//!
//! Regions are sealed against truncation, those of other processes too if they can be. One that
//! could not be, and was truncated, ends its connection as lost guest memory does.

mod layout;
mod queue;
mod tracker;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use log::debug;
use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals};
use vm_memory::MmapRegion;

pub use self::layout::Layout;
pub use self::queue::{BeginError, Begun, QueueRegion, VirtqueueState};
pub use self::tracker::Tracker;
use crate::untrusted::mapping::{self, Mapped, Share};

/// Values of the cache mode; 0 if no process has stored one.
const WRITEBACK: u8 = 1;
const WRITETHROUGH: u8 = 2;

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More queues or entries than the device has, or none.
    #[error("the device does not have {num_queues} queues of {queue_size} entries")]
    Layout {
        /// Queues of the region.
        num_queues: u16,
        /// Entries of each.
        queue_size: u16,
    },
    /// The region is too short for its layout, or the file for the region.
    #[error(
        "{needed_bytes} bytes are needed, the region has {region_bytes} at offset {offset_bytes} \
         in a file of {file_bytes}"
    )]
    TooShort {
        /// What the layout needs.
        needed_bytes: usize,
        /// Size of the region as the frontend states it.
        region_bytes: u64,
        /// Where the region begins in the file.
        offset_bytes: u64,
        /// Size of the file.
        file_bytes: u64,
    },
    /// The system cannot make or examine the file.
    #[error(transparent)]
    File(#[from] io::Error),
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] mapping::Error),
}

/// Seals the file against truncation. `false` if it is not a file that can be sealed.
fn seal_size(file: &File) -> bool {
    let sealed = |seals: SealFlags| seals.contains(SealFlags::SHRINK);
    fcntl_get_seals(file).is_ok_and(sealed) || fcntl_add_seals(file, SealFlags::SHRINK).is_ok()
}

/// A mapped region.
#[derive(Debug)]
pub struct Region {
    mapping: Arc<MmapRegion<Mapped<()>>>,
    layout: Layout,
    to_resubmit: Arc<AtomicU64>,
}

impl Region {
    /// Maps the region that the frontend says is at `offset_bytes` of `file`, `region_bytes` long
    /// (VHOST_USER_SET_INFLIGHT_FD).
    ///
    /// # Errors
    /// If the layout does not fit into the region, or the file cannot be mapped.
    pub fn map(
        layout: Layout,
        file: &File,
        (offset_bytes, region_bytes): (u64, u64),
        share: &Share,
    ) -> Result<Self, Error> {
        // First the seal, then the size: the file cannot shrink in between.
        if !seal_size(file) {
            debug!("the file of the inflight region cannot be sealed against truncation");
        }
        let file_bytes = file.metadata()?.len();
        let needed_bytes = layout.bytes();
        let ends_within = |bytes: u64| {
            let end = offset_bytes.checked_add(bytes);
            end.is_some_and(|end| end <= file_bytes)
        };
        if region_bytes < needed_bytes as u64 || !ends_within(region_bytes) {
            return Err(Error::TooShort {
                needed_bytes,
                region_bytes,
                offset_bytes,
                file_bytes,
            });
        }
        let mapping = share.map(file, offset_bytes, needed_bytes, ())?;
        let region = Self {
            mapping: Arc::new(mapping),
            layout,
            to_resubmit: Arc::default(),
        };
        let with_any = region.queues().filter(QueueRegion::has_any_in_flight);
        let to_resubmit = with_any.fold(0, |mask, queue| mask | queue.bit());
        region.to_resubmit.store(to_resubmit, Ordering::Release);
        Ok(region)
    }

    /// The part of a queue; `None` if the region has none for it.
    pub fn queue(&self, queue: u16) -> Option<QueueRegion> {
        let has_it = queue < self.layout.num_queues();
        has_it.then(|| {
            let (mapping, to_resubmit) = (Arc::clone(&self.mapping), Arc::clone(&self.to_resubmit));
            QueueRegion::new(mapping, self.layout, queue, to_resubmit)
        })
    }

    fn queues(&self) -> impl Iterator<Item = QueueRegion> {
        (0..self.layout.num_queues()).filter_map(|queue| self.queue(queue))
    }

    /// Whether the driver's writes may stay in the cache, if the last process has stored that.
    pub fn writeback(&self) -> Option<bool> {
        match self
            .first_queue()
            .load::<u8>(self.layout.cache_mode_offset()?)
        {
            WRITEBACK => Some(true),
            WRITETHROUGH => Some(false),
            _ => None,
        }
    }

    /// Stores the cache mode for the next process.
    pub fn set_writeback(&self, writeback: bool) {
        let mode = if writeback { WRITEBACK } else { WRITETHROUGH };
        if let Some(offset) = self.layout.cache_mode_offset() {
            self.first_queue().store(offset, mode);
        }
    }

    fn first_queue(&self) -> QueueRegion {
        self.queue(0).expect("a region has at least one queue")
    }

    /// Forgets all requests: the region is new again.
    pub fn clear(&self) {
        self.queues().for_each(|queue| queue.clear());
    }
}
