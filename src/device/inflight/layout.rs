//! The layout of an inflight region: how many queues of how many entries it has, and where.

use std::fs::File;
use std::io;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::Error;
use crate::limits::{QUEUE_SIZE_MAX, QUEUES_MAX};

const HEADER_BYTES: usize = 16;
const DESCRIPTOR_BYTES: usize = 16;

/// The alignment of each queue's part, as in libvhost-user.
const ALIGNMENT_BYTES: usize = 64;

/// How many queues of how many entries a region has (`struct VhostUserInflight`).
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
    /// If the device has no such queues.
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

    pub(super) fn num_queues(self) -> u16 {
        self.num_queues
    }

    pub(super) fn queue_size(self) -> u16 {
        self.queue_size
    }

    /// Bytes for one queue.
    pub(super) fn queue_bytes(self) -> usize {
        descriptor_offset(self.queue_size).next_multiple_of(ALIGNMENT_BYTES)
    }

    /// Bytes of the region.
    pub fn bytes(self) -> usize {
        self.queue_bytes() * usize::from(self.num_queues)
    }

    /// Where the cache mode is. Every size that a virtqueue can have leaves room for it.
    pub(super) fn cache_mode_offset(self) -> Option<usize> {
        let end = descriptor_offset(self.queue_size);
        (end < self.queue_bytes()).then_some(end)
    }

    /// Makes a new region (VHOST_USER_GET_INFLIGHT_FD): a file in memory, all zeroes, of a size
    /// that is sealed.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn create_file(self) -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("quorum-blk-inflight", flags)?);
        file.set_len(self.bytes() as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    }
}

/// Where the state of a descriptor is in the part of its queue.
pub(super) fn descriptor_offset(head: u16) -> usize {
    HEADER_BYTES + DESCRIPTOR_BYTES * usize::from(head)
}
