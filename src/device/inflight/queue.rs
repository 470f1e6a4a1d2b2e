//! The part of an inflight region for one queue: what is stored where, and what a start finds.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use vm_memory::{AtomicAccess, Bytes, MmapRegion, VolatileMemory};

use crate::untrusted::mapping::Mapped;

use super::layout::descriptor_offset;
use super::{Layout, Tracker};
#[cfg(test)]
use crate::device::tests::inflight::may_be_killed_here;
use crate::limits::QUEUES_MAX;

/// The only version there is. 0 means that the region is new.
const VERSION: u16 = 1;

const VERSION_OFFSET: usize = 8;
const DESC_NUM_OFFSET: usize = 10;
const LAST_BATCH_HEAD_OFFSET: usize = 12;
const USED_IDX_OFFSET: usize = 14;

/// In the state of a descriptor.
const INFLIGHT_OFFSET: usize = 0;
const NEXT_OFFSET: usize = 6;
const COUNTER_OFFSET: usize = 8;

/// Why a virtqueue cannot begin with its part of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BeginError {
    /// Another format.
    #[error("version {0} of the inflight region is not known")]
    Version(u16),
    /// Some descriptors of the virtqueue have no place in the region.
    #[error("the inflight region has {entries} entries for a virtqueue of {size}")]
    TooSmall {
        /// Entries of the region.
        entries: u16,
        /// Entries of the virtqueue.
        size: u16,
    },
}

/// The part of a region for one queue.
#[derive(Clone, Debug)]
pub struct QueueRegion {
    mapping: Arc<MmapRegion<Mapped<()>>>,
    start: usize,
    entries: u16,
    /// Names the queue in `to_resubmit`.
    bit: u64,
    /// The queues of which another process has left chains in flight that were not submitted again
    /// yet.
    to_resubmit: Arc<AtomicU64>,
}

const _: () = assert!(QUEUES_MAX as u32 <= u64::BITS);

/// A virtqueue as it stands when it starts.
#[derive(Clone, Copy, Debug)]
pub struct VirtqueueState {
    /// Its entries.
    pub size: u16,
    /// The index of the used ring.
    pub used_idx: u16,
    /// The index of the available ring.
    pub available_idx: u16,
}

/// Where a virtqueue starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The region is new: the virtqueue starts where the frontend says.
    New,
    /// The heads that were in flight, in the order in which they were accepted. The virtqueue goes
    /// on at its used index and as many entries: these were accepted.
    Resumed(Vec<u16>),
}

impl QueueRegion {
    pub(super) fn new(
        mapping: Arc<MmapRegion<Mapped<()>>>,
        layout: Layout,
        queue: u16,
        to_resubmit: Arc<AtomicU64>,
    ) -> Self {
        Self {
            mapping,
            start: layout.queue_bytes() * usize::from(queue),
            entries: layout.queue_size(),
            bit: 1 << queue,
            to_resubmit,
        }
    }

    pub(super) fn bit(&self) -> u64 {
        self.bit
    }

    pub(super) fn is_same_mapping(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// Begins to track a virtqueue of which nothing is in flight in this process.
    ///
    /// # Errors
    /// If the region does not fit this virtqueue.
    pub fn begin(self, virtqueue: VirtqueueState) -> Result<(Tracker, Begun), BeginError> {
        if self.entries < virtqueue.size {
            return Err(BeginError::TooSmall {
                entries: self.entries,
                size: virtqueue.size,
            });
        }
        let mut in_flight = match self.load(VERSION_OFFSET) {
            0 => {
                self.initialise(virtqueue.used_idx);
                return Ok((Tracker::new(self, 0), Begun::New));
            }
            VERSION => self.recover(virtqueue),
            version => return Err(BeginError::Version(version)),
        };
        in_flight.sort_unstable();
        let last = in_flight.last();
        let counter = last.map_or(0, |(counter, _)| counter.wrapping_add(1));
        let heads = in_flight.into_iter().map(|(_, head)| head).collect();
        Ok((Tracker::new(self, counter), Begun::Resumed(heads)))
    }

    /// This virtqueue has submitted again what it had in flight.
    pub fn resubmitted(&self) {
        self.to_resubmit.fetch_and(!self.bit, Ordering::AcqRel);
    }

    /// Whether all virtqueues of the region have done so.
    pub fn is_all_resubmitted(&self) -> bool {
        self.to_resubmit.load(Ordering::Acquire) == 0
    }

    pub(super) fn has_any_in_flight(&self) -> bool {
        self.load::<u16>(VERSION_OFFSET) != 0
            && (0..self.entries).any(|head| self.is_in_flight(head))
    }

    /// Forgets all requests: the region is new again.
    pub(super) fn clear(&self) {
        self.store(VERSION_OFFSET, 0u16);
    }

    /// Makes a new region that of a virtqueue of which nothing is in flight. The version comes
    /// last: before that the region is still new.
    fn initialise(&self, used_idx: u16) {
        self.store(DESC_NUM_OFFSET, self.entries);
        self.clear_flags();
        self.store(USED_IDX_OFFSET, used_idx);
        self.store(VERSION_OFFSET, VERSION);
    }

    /// Forgets chains of another virtqueue. After a kill in between, the next process finds a batch
    /// of impossible length, and comes here again.
    fn forget(&self, used_idx: u16) {
        self.store(USED_IDX_OFFSET, used_idx.wrapping_sub(self.entries + 1));
        self.clear_flags();
        self.store(USED_IDX_OFFSET, used_idx);
    }

    fn clear_flags(&self) {
        for head in 0..self.entries {
            self.set_in_flight(head, false);
        }
    }

    /// The counters and heads of the chains in flight.
    fn recover(&self, virtqueue: VirtqueueState) -> Vec<(u64, u16)> {
        let tracked_idx: u16 = self.load(USED_IDX_OFFSET);
        let batch = virtqueue.used_idx.wrapping_sub(tracked_idx);
        if batch > self.entries {
            // No batch is that long: the driver has set up the virtqueue anew since. It does not
            // wait for the chains of before, whose descriptors may belong to other requests now.
            self.forget(virtqueue.used_idx);
            return Vec::new();
        }
        if batch > 0 {
            self.complete_batch(batch, virtqueue.used_idx);
        }
        let in_flight: Vec<_> = (0..virtqueue.size)
            .filter(|head| self.is_in_flight(*head))
            .map(|head| (self.load(descriptor_offset(head) + COUNTER_OFFSET), head))
            .collect();
        let outstanding = virtqueue.available_idx.wrapping_sub(virtqueue.used_idx);
        if in_flight.len() > usize::from(outstanding) {
            // More than the driver has made available: these are not of this virtqueue either.
            self.forget(virtqueue.used_idx);
            return Vec::new();
        }
        in_flight
    }

    /// The process was killed after it had stored the used index: the last batch is completed,
    /// whatever its flags say.
    fn complete_batch(&self, batch: u16, used_idx: u16) {
        let mut head = self.load(LAST_BATCH_HEAD_OFFSET);
        for _ in 0..batch {
            if !self.has(head) {
                break;
            }
            self.set_in_flight(head, false);
            head = self.load(descriptor_offset(head) + NEXT_OFFSET);
        }
        self.store(USED_IDX_OFFSET, used_idx);
    }

    /// Whether the region has a place for this head.
    pub(super) fn has(&self, head: u16) -> bool {
        head < self.entries
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.load::<u8>(descriptor_offset(head) + INFLIGHT_OFFSET) != 0
    }

    fn set_in_flight(&self, head: u16, in_flight: bool) {
        self.store(
            descriptor_offset(head) + INFLIGHT_OFFSET,
            u8::from(in_flight),
        );
    }

    pub(super) fn set_counter(&self, head: u16, counter: u64) {
        self.store(descriptor_offset(head) + COUNTER_OFFSET, counter);
    }

    pub(super) fn set_accepted(&self, head: u16) {
        self.set_in_flight(head, true);
        // The effects of the chain stay behind the flag.
        compiler_fence(Ordering::SeqCst);
    }

    /// The batch that may be half completed is this chain.
    pub(super) fn set_last_batch(&self, head: u16) {
        let last_batch_head: u16 = self.load(LAST_BATCH_HEAD_OFFSET);
        self.store(descriptor_offset(head) + NEXT_OFFSET, last_batch_head);
        self.store(LAST_BATCH_HEAD_OFFSET, head);
    }

    pub(super) fn set_completed(&self, head: u16, used_idx: u16) {
        self.set_in_flight(head, false);
        self.store(USED_IDX_OFFSET, used_idx);
    }

    pub(super) fn load<T: AtomicAccess>(&self, offset: usize) -> T {
        let slice = self.mapping.as_volatile_slice();
        slice
            .load(self.start + offset, Ordering::Acquire)
            .expect("an aligned field within the mapping")
    }

    /// Stores after everything that this thread stored before.
    pub(super) fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
        may_be_killed_here();
        let slice = self.mapping.as_volatile_slice();
        slice
            .store(value, self.start + offset, Ordering::Release)
            .expect("an aligned field within the mapping");
        may_be_killed_here();
    }
}

/// Only in tests a store can be the last one.
#[cfg(not(test))]
fn may_be_killed_here() {}
