//! One descriptor chain (virtio 1.3, 2.7.5), walked from its head on.
//!
//! `virtio-queue` walks chains too, but only those at the current index of the available ring. A
//! request that was in flight when another daemon was killed is known by its head alone, so this
//! module walks all chains.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::View;
use crate::limits::CHAIN_DESCRIPTORS_MAX;

const DESCRIPTOR_BYTES: u32 = 16;

/// The descriptors of a chain in order. The descriptors of an indirect table stand in place of the
/// one that refers to it.
///
/// The walk stops where the chain ends, and where it is malformed: at a descriptor outside of its
/// table or of guest memory; at an indirect table of a broken length, within another one, or with a
/// descriptor behind it; after as many descriptors as the table has (a loop), or
/// [`CHAIN_DESCRIPTORS_MAX`]; above 4 GiB. If the chain is malformed, the last descriptor that was
/// returned, if any, has its NEXT flag set.
#[derive(Clone, Debug)]
pub struct Chain<'a> {
    memory: View<'a>,
    head: u16,
    table: GuestAddress,
    /// Entries of the table.
    entries: u16,
    next: u16,
    /// How many descriptors of this table may still be returned.
    left: u16,
    returned: u16,
    bytes: u32,
    indirect: bool,
}

impl<'a> Chain<'a> {
    /// The chain of `queue` that begins at descriptor `head`, which may be anything.
    pub fn new(memory: View<'a>, queue: &Queue, head: u16) -> Self {
        Self {
            memory,
            head,
            table: GuestAddress(queue.desc_table()),
            entries: queue.size(),
            next: head,
            left: queue.size(),
            returned: 0,
            bytes: 0,
            indirect: false,
        }
    }

    /// The index of the first descriptor, which identifies the chain on the used ring.
    pub fn head_index(&self) -> u16 {
        self.head
    }

    /// The memory that the chain lies in.
    pub fn memory(&self) -> View<'a> {
        self.memory
    }

    /// The next descriptor, if it lies within its table and guest memory.
    fn read(&self) -> Option<Descriptor> {
        if self.left == 0 || self.returned == CHAIN_DESCRIPTORS_MAX || self.next >= self.entries {
            return None;
        }
        let offset = u64::from(self.next) * u64::from(DESCRIPTOR_BYTES);
        self.memory.read_obj(self.table.checked_add(offset)?).ok()
    }

    /// Goes on at the beginning of an indirect table (virtio 1.3, 2.7.5.3).
    fn enter(&mut self, reference: &Descriptor) -> Option<()> {
        let whole = reference.len().is_multiple_of(DESCRIPTOR_BYTES);
        if self.indirect || reference.has_next() || !whole {
            return None;
        }
        self.table = reference.addr();
        self.entries = u16::try_from(reference.len() / DESCRIPTOR_BYTES).ok()?;
        self.next = 0;
        self.left = self.entries;
        self.indirect = true;
        Some(())
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            // Descriptors behind the reference are not read. A second reference is rejected.
            self.left = 0;
            self.enter(&descriptor)?;
            return self.next();
        }
        let Some(bytes) = self.bytes.checked_add(descriptor.len()) else {
            self.left = 0;
            return None;
        };
        self.bytes = bytes;
        self.returned += 1;
        if descriptor.has_next() {
            self.next = descriptor.next();
            self.left -= 1;
        } else {
            self.left = 0;
        }
        Some(descriptor)
    }
}
