//! A page of the intent map: its checksum, its number, the size of an extent, then the bits.
//!
//! The checksum also covers the names of the disk and the replica, so that a page of another record
//! does not verify.

use std::ops::Range;

use uuid::Uuid;

use crate::record::layout::PAGE_HEAD_BYTES;
use crate::record::{Extents, PAGE_BYTES, Record};

/// The bytes of one page of the intent map of a replica.
pub fn page(disk: Uuid, replica: Uuid, intent: &Extents, page: u32) -> [u8; PAGE_BYTES] {
    let mut bytes = [0; PAGE_BYTES];
    bytes[4..8].copy_from_slice(&page.to_le_bytes());
    bytes[8..16].copy_from_slice(&intent.layout().extent_sectors().to_le_bytes());
    bytes[PAGE_HEAD_BYTES..].copy_from_slice(&intent.page(page));
    let checksum = checksum(disk, replica, &bytes);
    bytes[..4].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The bytes of consecutive pages, to be written at the offset of the first.
pub fn pages(disk: Uuid, replica: Uuid, intent: &Extents, wanted: Range<u32>) -> Vec<u8> {
    let pages = wanted.flat_map(|number| page(disk, replica, intent, number));
    pages.collect()
}

/// The bits of a page, if it verifies.
pub(super) fn verified_bits<'a>(record: &Record, page: u32, bytes: &'a [u8]) -> Option<&'a [u8]> {
    let (head, bits) = bytes.split_at_checked(PAGE_HEAD_BYTES)?;
    let expected = [
        &checksum(record.disk, record.replica, bytes).to_le_bytes()[..],
        &page.to_le_bytes(),
        &record.layout().extent_sectors().to_le_bytes(),
    ]
    .concat();
    (bytes.len() == PAGE_BYTES && head == expected).then_some(bits)
}

fn checksum(disk: Uuid, replica: Uuid, page: &[u8]) -> u32 {
    let names = crc32c::crc32c_append(crc32c::crc32c(disk.as_bytes()), replica.as_bytes());
    crc32c::crc32c_append(names, &page[4..])
}
