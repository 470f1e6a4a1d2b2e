//! A second reading of virtio 1.3, 2.7.5 and 5.2.6, as simple as can be, to compare the device
//! with.

use quorum_blk::limits::QUEUE_SIZE_MAX;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u64 = 16;

/// Guest memory to read from.
pub trait Memory {
    /// The byte at an address, if there is one.
    fn byte(&self, address: u64) -> Option<u8>;

    /// As many bytes from `address` on, if all of them are there.
    fn bytes<const COUNT: usize>(&self, address: u64) -> Option<[u8; COUNT]> {
        let mut bytes = [0; COUNT];
        for (offset, byte) in (0..).zip(&mut bytes) {
            *byte = self.byte(address.checked_add(offset)?)?;
        }
        Some(bytes)
    }
}

/// A run of guest memory. May be anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where it begins.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

impl Run {
    /// The address of a byte of it, if there is such an address.
    pub fn at(self, offset: u64) -> Option<u64> {
        self.address.checked_add(offset)
    }
}

/// The address of byte `offset` of a stretch that these runs make up; the inner `None` is one that
/// does not exist.
pub fn address_of(runs: &[Run], mut offset: u64) -> Option<Option<u64>> {
    for run in runs {
        if offset < run.bytes {
            return Some(run.at(offset));
        }
        offset -= run.bytes;
    }
    None
}

/// The addresses of all bytes of that stretch.
pub fn addresses_of(runs: &[Run]) -> impl Iterator<Item = Option<u64>> {
    runs.iter()
        .flat_map(|run| (0..run.bytes).map(|offset| run.at(offset)))
}

/// Length of all runs.
pub fn bytes_of(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.bytes).sum()
}

/// The descriptors of a chain.
#[derive(Clone, Debug, Default)]
pub struct Walk {
    /// What the device may read.
    pub readable: Vec<Run>,
    /// What it may write.
    pub writable: Vec<Run>,
    /// It ends where it says so, and what is readable comes first.
    pub well_formed: bool,
    /// The descriptors themselves.
    pub descriptors: Vec<Run>,
}

impl Walk {
    /// Where the status byte is to be written.
    pub fn status(&self) -> Option<u64> {
        let last = bytes_of(&self.writable).checked_sub(1)?;
        address_of(&self.writable, last)?
    }
}

/// Walks the chain that begins at `head` of a table of `size` descriptors at `table`, up to where
/// it ends or breaks a rule.
pub fn walk(memory: &impl Memory, table: u64, size: u16, head: u16) -> Walk {
    let mut walk = Walk::default();
    let (mut table, mut entries, mut index) = (table, u64::from(size), u64::from(head));
    let (mut in_this_table, mut returned, mut total_bytes, mut writable_bytes) =
        (0u64, 0u64, 0u64, 0u64);
    let mut indirect = false;
    let mut in_order = true;
    loop {
        if index >= entries || in_this_table == entries || returned == u64::from(QUEUE_SIZE_MAX) {
            return walk;
        }
        let Some(place) = table.checked_add(index * DESCRIPTOR_BYTES) else {
            return walk;
        };
        walk.descriptors.push(Run {
            address: place,
            bytes: DESCRIPTOR_BYTES,
        });
        let Some(bytes) = memory.bytes::<16>(place) else {
            return walk;
        };
        let field = |range: std::ops::Range<usize>| {
            let bytes = bytes[range].iter().rev();
            bytes.fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let (address, bytes, flags, next) =
            (field(0..8), field(8..12), field(12..14), field(14..16));
        let has = |flag: u32| flags & u64::from(flag) != 0;
        if has(VRING_DESC_F_INDIRECT) {
            if indirect || has(VRING_DESC_F_NEXT) || !bytes.is_multiple_of(DESCRIPTOR_BYTES) {
                return walk;
            }
            let count = bytes / DESCRIPTOR_BYTES;
            if count > u64::from(u16::MAX) {
                return walk;
            }
            (table, entries, index, in_this_table, indirect) = (address, count, 0, 0, true);
            continue;
        }
        total_bytes += bytes;
        if total_bytes > u64::from(u32::MAX) {
            return walk;
        }
        let run = Run { address, bytes };
        if has(VRING_DESC_F_WRITE) {
            writable_bytes += bytes;
            walk.writable.push(run);
        } else {
            in_order &= writable_bytes == 0;
            walk.readable.push(run);
        }
        returned += 1;
        in_this_table += 1;
        if !has(VRING_DESC_F_NEXT) {
            walk.well_formed = in_order;
            return walk;
        }
        index = next;
    }
}
