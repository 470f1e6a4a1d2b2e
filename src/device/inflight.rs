//! Which requests are in flight, in memory that outlives this process (vhost-user, "Inflight I/O
//! tracking").
//!
//! The frontend holds the region. When this daemon is killed, the next one gets it and finds there
//! which requests were taken off a ring and not given back: those it does again, in the order in
//! which they were taken.
//!
//! For each queue, in the byte order of the host:
//!
//! ```text
//!   0  features u64            8  version u16       10  desc_num u16    12  last_batch_head u16    14  used_idx u16
//!  16  for each descriptor:    0  inflight u8  +5   6  next u16         8  counter u64
//! ```
//!
//! and zeroes up to a multiple of 64 bytes. In those of the first queue we keep the cache mode that
//! the driver has chosen ([`Region::writeback`]): frontends do not tell it again. What is stored
//! when, so that a kill between any two stores loses no request and repeats none that is on the
//! used ring:
//!
//! | a chain is taken | a chain is given back |
//! | --- | --- |
//! | its counter | its `next`, then last_batch_head: this is the chain that may be half given back |
//! | its flag | the used ring (`virtio-queue`: the element, then the index) |
//! | | its flag is cleared |
//! | | used_idx: it is given back |
//!
//! A batch of ours is one chain; recovery understands longer ones. Only the order of this thread's
//! own stores matters, as nobody but the next process reads them: a kill leaves what was stored up
//! to some instruction.
//!
//! Invariants: the frontend can write all of this at any time, so whatever is read is checked where
//! it is used, and read once; nothing in here is trusted to find out what the process itself knows.
//!
//! A file that is cut while it is mapped kills whoever touches the mapping. Regions are sealed
//! against that, those of others too if they can be. A region that is not a memory file cannot be
//! sealed: whoever has that file can end this daemon by cutting it, as can who cuts the file behind
//! guest memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use log::warn;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::limits::{QUEUE_SIZE_MAX, QUEUES_MAX};

#[cfg(test)]
use super::tests::inflight::may_be_killed_here;

/// The only version there is. 0 means that the region is new.
const VERSION: u16 = 1;

const HEADER_BYTES: usize = 16;
const VERSION_OFFSET: usize = 8;
const DESC_NUM_OFFSET: usize = 10;
const LAST_BATCH_HEAD_OFFSET: usize = 12;
const USED_IDX_OFFSET: usize = 14;

const DESCRIPTOR_BYTES: usize = 16;
const INFLIGHT_OFFSET: usize = 0;
const NEXT_OFFSET: usize = 6;
const COUNTER_OFFSET: usize = 8;

/// The cache mode, 0 if nobody has said anything.
const WRITEBACK: u8 = 1;
const WRITETHROUGH: u8 = 2;

/// What the part of a queue is a multiple of, as in libvhost-user.
const ALIGNMENT_BYTES: usize = 64;

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More queues or entries than there are, or none.
    #[error("{num_queues} queues of {queue_size} entries are not what this device has")]
    Layout {
        /// Queues of the region.
        num_queues: u16,
        /// Entries of each.
        queue_size: u16,
    },
    /// The region does not hold what it must, or the file does not hold the region.
    #[error(
        "{needed_bytes} bytes are needed, the region has {region_bytes} at {offset_bytes} in a file of {file_bytes}"
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
    /// The system refused to make or to examine the file.
    #[error(transparent)]
    File(#[from] io::Error),
    /// The file cannot be mapped.
    #[error("cannot be mapped: {0}")]
    Map(#[from] MmapRegionError),
}

/// Why a ring cannot be begun with its part of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BeginError {
    /// Somebody else's format.
    #[error("version {0} of the inflight region is not known")]
    Version(u16),
    /// Some of the ring's descriptors have no place in it.
    #[error("the inflight region has {entries} entries for a ring of {size}")]
    TooSmall {
        /// Entries of the region.
        entries: u16,
        /// Entries of the ring.
        size: u16,
    },
}

/// How many queues of how many entries a region has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    num_queues: u16,
    queue_size: u16,
}

impl Layout {
    /// The layout for `num_queues` queues of `queue_size` entries on a device with `queues_max`
    /// queues.
    ///
    /// # Errors
    /// If that is not a region for this device.
    pub fn new(num_queues: u16, queue_size: u16, queues_max: u16) -> Result<Self, Error> {
        let queues = 1..=queues_max.min(QUEUES_MAX);
        if queues.contains(&num_queues) && (1..=QUEUE_SIZE_MAX).contains(&queue_size) {
            Ok(Self {
                num_queues,
                queue_size,
            })
        } else {
            Err(Error::Layout {
                num_queues,
                queue_size,
            })
        }
    }

    /// Bytes for one queue.
    fn queue_bytes(self) -> usize {
        let bytes = HEADER_BYTES + DESCRIPTOR_BYTES * usize::from(self.queue_size);
        bytes.next_multiple_of(ALIGNMENT_BYTES)
    }

    /// Bytes of the region.
    pub fn bytes(self) -> usize {
        self.queue_bytes() * usize::from(self.num_queues)
    }

    /// Makes a new region: a file in memory, all zeroes, of a size that nobody can change any more.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn create_file(self) -> io::Result<File> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a NUL-terminated string.
        let fd = unsafe { libc::memfd_create(c"quorum-blk-inflight".as_ptr(), flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was made just now and belongs to nobody else.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        file.set_len(self.bytes() as u64)?;
        add_seals(
            &file,
            libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL,
        )?;
        Ok(file)
    }
}

fn add_seals(file: &File, seals: libc::c_int) -> io::Result<()> {
    // SAFETY: a system call on an open descriptor; it touches no memory.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sees to it that the file cannot be cut, if it is one for which that can be done.
fn is_safe_from_cuts(file: &File) -> bool {
    // SAFETY: a system call on an open descriptor; it touches no memory.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    seals >= 0 && (seals & libc::F_SEAL_SHRINK != 0 || add_seals(file, libc::F_SEAL_SHRINK).is_ok())
}

/// A mapped region.
#[derive(Debug)]
pub struct Region {
    mapping: Arc<MmapRegion<()>>,
    layout: Layout,
    to_resubmit: Arc<AtomicU64>,
}

impl Region {
    /// Maps the region that the frontend says is at `offset_bytes` of `file`, `region_bytes` long.
    ///
    /// # Errors
    /// If the layout does not fit in there, or the file cannot be mapped.
    pub fn map(
        layout: Layout,
        file: File,
        offset_bytes: u64,
        region_bytes: u64,
    ) -> Result<Self, Error> {
        // First the seal, then the size: it cannot become less in between.
        if !is_safe_from_cuts(&file) {
            warn!(
                "the inflight region is in a file that cannot be sealed: who cuts it ends this daemon"
            );
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
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset_bytes), needed_bytes)?;
        let region = Self {
            mapping: Arc::new(mapping),
            layout,
            to_resubmit: Arc::default(),
        };
        let queues = (0..layout.num_queues).filter_map(|queue| region.queue(queue));
        let to_resubmit = queues.filter(QueueRegion::has_any_in_flight);
        let to_resubmit = to_resubmit.fold(0, |mask, queue| mask | queue.bit);
        region.to_resubmit.store(to_resubmit, Ordering::Release);
        Ok(region)
    }

    /// The part of a queue; `None` if the region has none for it.
    pub fn queue(&self, queue: u16) -> Option<QueueRegion> {
        (queue < self.layout.num_queues).then(|| QueueRegion {
            mapping: Arc::clone(&self.mapping),
            start: self.layout.queue_bytes() * usize::from(queue),
            entries: self.layout.queue_size,
            bit: 1 << queue,
            to_resubmit: Arc::clone(&self.to_resubmit),
        })
    }

    /// Whether the driver's writes may stay in the cache, if the last process has left a word on
    /// that.
    pub fn writeback(&self) -> Option<bool> {
        match self.first_queue().load::<u8>(self.cache_mode_offset()?) {
            WRITEBACK => Some(true),
            WRITETHROUGH => Some(false),
            _ => None,
        }
    }

    /// Leaves word for the next process.
    pub fn set_writeback(&self, writeback: bool) {
        let mode = if writeback { WRITEBACK } else { WRITETHROUGH };
        if let Some(offset) = self.cache_mode_offset() {
            self.first_queue().store(offset, mode);
        }
    }

    /// Where the cache mode is. Every queue that a ring can have leaves room for it.
    fn cache_mode_offset(&self) -> Option<usize> {
        let end = HEADER_BYTES + DESCRIPTOR_BYTES * usize::from(self.layout.queue_size);
        (end < self.layout.queue_bytes()).then_some(end)
    }

    fn first_queue(&self) -> QueueRegion {
        self.queue(0).expect("a region has at least one queue")
    }

    /// Forgets all requests: the region is new again.
    pub fn clear(&self) {
        for queue in (0..self.layout.num_queues).filter_map(|queue| self.queue(queue)) {
            queue.store(VERSION_OFFSET, 0u16);
        }
    }
}

/// The part of a region for one queue.
#[derive(Clone, Debug)]
pub struct QueueRegion {
    mapping: Arc<MmapRegion<()>>,
    start: usize,
    entries: u16,
    /// Names the queue in `to_resubmit`.
    bit: u64,
    /// The queues of which another process has left something in flight that nobody has begun
    /// again yet.
    to_resubmit: Arc<AtomicU64>,
}

const _: () = assert!(QUEUES_MAX as u32 <= u64::BITS);

/// A ring as it stands when it is begun.
#[derive(Clone, Copy, Debug)]
pub struct RingState {
    /// Its entries.
    pub size: u16,
    /// The index of the used ring.
    pub used_idx: u16,
    /// The index of the available ring.
    pub available_idx: u16,
}

/// What is to be done before a ring is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The region is new: the ring begins where the frontend says.
    New,
    /// The heads that were in flight, in the order in which they were taken. The ring goes on at
    /// its used index and as many entries: these were taken.
    Resumed(Vec<u16>),
}

impl QueueRegion {
    /// Begins to track a ring of which nothing is in flight in this process.
    ///
    /// # Errors
    /// If the region is not one for this ring.
    pub fn begin(self, ring: RingState) -> Result<(Tracker, Begun), BeginError> {
        if self.entries < ring.size {
            return Err(BeginError::TooSmall {
                entries: self.entries,
                size: ring.size,
            });
        }
        let in_flight = match self.load(VERSION_OFFSET) {
            0 => {
                self.initialise(ring.used_idx);
                None
            }
            VERSION => Some(self.recover(ring)),
            version => return Err(BeginError::Version(version)),
        };
        let counter = in_flight
            .iter()
            .flatten()
            .map(|(counter, _)| *counter)
            .max();
        let tracker = Tracker {
            region: self,
            counter: counter.map_or(0, |counter| counter.wrapping_add(1)),
        };
        let begun = match in_flight {
            None => Begun::New,
            Some(mut in_flight) => {
                in_flight.sort_unstable();
                Begun::Resumed(in_flight.into_iter().map(|(_, head)| head).collect())
            }
        };
        Ok((tracker, begun))
    }

    /// What this ring had in flight is begun again.
    pub fn resubmitted(&self) {
        self.to_resubmit.fetch_and(!self.bit, Ordering::AcqRel);
    }

    /// Whether that is so of all rings of the region.
    pub fn is_all_resubmitted(&self) -> bool {
        self.to_resubmit.load(Ordering::Acquire) == 0
    }

    fn has_any_in_flight(&self) -> bool {
        self.load::<u16>(VERSION_OFFSET) != 0
            && (0..self.entries).any(|head| self.is_in_flight(head))
    }

    fn is_in_flight(&self, head: u16) -> bool {
        self.load::<u8>(self.descriptor(head) + INFLIGHT_OFFSET) != 0
    }

    /// Makes a new region that of a ring of which nothing is in flight. The version comes last:
    /// before that it is still a new one.
    fn initialise(&self, used_idx: u16) {
        self.store(DESC_NUM_OFFSET, self.entries);
        self.clear_flags();
        self.store(USED_IDX_OFFSET, used_idx);
        self.store(VERSION_OFFSET, VERSION);
    }

    /// Lets go of what is not of this ring. Killed meanwhile, the next one finds a batch that
    /// cannot be, and comes here again.
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

    /// The counters and heads of what is in flight.
    fn recover(&self, ring: RingState) -> Vec<(u64, u16)> {
        let tracked_idx: u16 = self.load(USED_IDX_OFFSET);
        let batch = ring.used_idx.wrapping_sub(tracked_idx);
        if batch > self.entries {
            // No batch is that long: the driver has set the ring up anew since. What was in flight
            // before is not its business any more, and its descriptors may be those of
            // other requests by now.
            self.forget(ring.used_idx);
            return Vec::new();
        }
        if batch > 0 {
            // Killed after the used index was stored: the last batch is given back, whatever its
            // flags say.
            let mut head = self.load(LAST_BATCH_HEAD_OFFSET);
            for _ in 0..batch {
                if head >= self.entries {
                    break;
                }
                self.set_in_flight(head, false);
                head = self.load(self.descriptor(head) + NEXT_OFFSET);
            }
            self.store(USED_IDX_OFFSET, ring.used_idx);
        }
        let in_flight: Vec<_> = (0..ring.size)
            .filter(|head| self.is_in_flight(*head))
            .map(|head| (self.load(self.descriptor(head) + COUNTER_OFFSET), head))
            .collect();
        let outstanding = ring.available_idx.wrapping_sub(ring.used_idx);
        if in_flight.len() > usize::from(outstanding) {
            // More than the driver has asked for: these are not of this ring either.
            self.forget(ring.used_idx);
            return Vec::new();
        }
        in_flight
    }

    /// Where the state of a descriptor is; `head` is below `entries`.
    fn descriptor(&self, head: u16) -> usize {
        HEADER_BYTES + DESCRIPTOR_BYTES * usize::from(head)
    }

    fn set_in_flight(&self, head: u16, in_flight: bool) {
        self.store(self.descriptor(head) + INFLIGHT_OFFSET, u8::from(in_flight));
    }

    fn load<T: AtomicAccess>(&self, offset: usize) -> T {
        let slice = self.mapping.as_volatile_slice();
        slice
            .load(self.start + offset, Ordering::Acquire)
            .expect("an aligned field within the mapping")
    }

    /// Stores after everything that this thread stored before.
    fn store<T: AtomicAccess>(&self, offset: usize, value: T) {
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

/// Keeps the region of a ring up to date. Heads that are not of the ring are ignored.
#[derive(Debug)]
pub struct Tracker {
    region: QueueRegion,
    /// Of the next chain.
    counter: u64,
}

impl Tracker {
    /// Whether it tracks chains there, as mapped at this time.
    pub fn is_of(&self, region: &QueueRegion) -> bool {
        Arc::ptr_eq(&self.region.mapping, &region.mapping)
    }

    /// A chain was taken off the available ring; to be called before anything comes of it.
    pub fn taken(&mut self, head: u16) {
        if head >= self.region.entries {
            return;
        }
        let counter_offset = self.region.descriptor(head) + COUNTER_OFFSET;
        self.region.store(counter_offset, self.counter);
        self.counter = self.counter.wrapping_add(1);
        self.region.set_in_flight(head, true);
        // What comes of it stays behind the flag.
        compiler_fence(Ordering::SeqCst);
    }

    /// A chain is put on the used ring next.
    pub fn giving_back(&self, head: u16) {
        if head >= self.region.entries {
            return;
        }
        let last_batch_head: u16 = self.region.load(LAST_BATCH_HEAD_OFFSET);
        self.region
            .store(self.region.descriptor(head) + NEXT_OFFSET, last_batch_head);
        self.region.store(LAST_BATCH_HEAD_OFFSET, head);
    }

    /// It is on the used ring, whose index is `used_idx` now.
    pub fn given_back(&self, head: u16, used_idx: u16) {
        if head >= self.region.entries {
            return;
        }
        self.region.set_in_flight(head, false);
        self.region.store(USED_IDX_OFFSET, used_idx);
    }
}
