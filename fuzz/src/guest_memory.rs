//! Guest memory, written as a driver does.

use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

/// Flags of descriptors.
pub const NEXT: u16 = 1;
/// See [`NEXT`].
pub const WRITE: u16 = 2;
/// See [`NEXT`].
pub const INDIRECT: u16 = 4;

/// Puts bytes at a place.
pub fn put(memory: &mut Vec<u8>, place: usize, bytes: &[u8]) {
    memory.resize(memory.len().max(place + bytes.len()), 0);
    memory[place..place + bytes.len()].copy_from_slice(bytes);
}

/// Puts descriptors at a place: address, length, flags and next of each.
pub fn put_table(memory: &mut Vec<u8>, place: usize, table: &[(u64, u32, u16, u16)]) {
    for (index, &(address, len, flags, next)) in table.iter().enumerate() {
        let descriptor = Descriptor::new(address, len, flags, next);
        put(memory, place + 16 * index, descriptor.as_slice());
    }
}

/// The header of a request.
pub fn header(request_type: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&request_type.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

/// A segment of a discard or write-zeroes request.
pub fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&sectors.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}
