//! A second implementation of virtio 1.3, 2.7.5 and 5.2.6, as simple as possible, to compare the
//! device with.

use quorum_blk::limits::{CHAIN_DESCRIPTORS_MAX, QUEUE_SIZE_MAX};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

/// Bytes of a descriptor.
const DESCRIPTOR_BYTES: u64 = 16;

/// Guest memory to read from.
pub trait Memory {
    /// The byte at an address, if there is one.
    fn byte(&self, address: u64) -> Option<u8>;

    /// `COUNT` bytes from `address` on, if all of them exist.
    fn bytes<const COUNT: usize>(&self, address: u64) -> Option<[u8; COUNT]> {
        let mut bytes = [0; COUNT];
        for (offset, byte) in (0..).zip(&mut bytes) {
            *byte = self.byte(address.checked_add(offset)?)?;
        }
        Some(bytes)
    }
}

/// A run of guest memory, which may lie anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The address of its first byte.
    pub address: u64,
    /// Its length.
    pub bytes: u64,
}

impl Run {
    /// The address of a byte of the run, if that is an address.
    pub fn at(self, offset: u64) -> Option<u64> {
        self.address.checked_add(offset)
    }
}

/// The address of byte `offset` of the sequence of these runs. The inner `None` is an address that
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

/// The addresses of all bytes of that sequence.
pub fn addresses_of(runs: &[Run]) -> impl Iterator<Item = Option<u64>> {
    runs.iter()
        .flat_map(|run| (0..run.bytes).map(|offset| run.at(offset)))
}

/// The length of all runs.
pub fn bytes_of(runs: &[Run]) -> u64 {
    runs.iter().map(|run| run.bytes).sum()
}

/// The descriptors of a chain.
#[derive(Clone, Debug, Default)]
pub struct Walk {
    /// The device-readable runs.
    pub readable: Vec<Run>,
    /// The device-writable runs.
    pub writable: Vec<Run>,
    /// The chain has an end, and its readable runs come first.
    pub well_formed: bool,
    /// Where the descriptors lie.
    pub descriptors: Vec<Run>,
}

impl Walk {
    /// The address of the status byte.
    pub fn status(&self) -> Option<u64> {
        let last = bytes_of(&self.writable).checked_sub(1)?;
        address_of(&self.writable, last)?
    }
}

/// Walks the chain that begins at `head` of a table of `size` descriptors at `table`, to its end or
/// to where it breaks a rule.
pub fn walk(memory: &impl Memory, table: u64, size: u16, head: u16) -> Walk {
    let mut walk = Walk::default();
    let (mut table, mut entries, mut index) = (table, u64::from(size), u64::from(head));
    let (mut in_this_table, mut returned, mut total_bytes, mut writable_bytes) =
        (0u64, 0u64, 0u64, 0u64);
    let mut indirect = false;
    let mut in_order = true;
    loop {
        if index >= entries
            || in_this_table == entries
            || returned == u64::from(CHAIN_DESCRIPTORS_MAX)
        {
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
            walk.well_formed = in_order && returned <= u64::from(QUEUE_SIZE_MAX);
            return walk;
        }
        index = next;
    }
}
