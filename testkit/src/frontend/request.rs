//! Requests, how they are divided into descriptors, and how they return.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// A virtio-blk request. Its memory is `header, out, in, status`, one after the other.
#[derive(Clone, Debug)]
pub struct Request {
    /// `VIRTIO_BLK_T_*`.
    pub kind: u32,
    /// First sector.
    pub sector: u64,
    /// What the device reads after the header.
    pub out: Vec<u8>,
    /// How many bytes the device may write before the status.
    pub in_bytes: usize,
}

/// A segment of a discard or write-zeroes request (virtio 1.3, 5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// How many.
    pub sectors: u32,
    /// Bit 0: unmap.
    pub flags: u32,
}

impl Request {
    /// VIRTIO_BLK_T_IN.
    pub fn read(sector: u64, bytes: usize) -> Self {
        Self::new(VIRTIO_BLK_T_IN, sector, Vec::new(), bytes)
    }

    /// VIRTIO_BLK_T_OUT.
    pub fn write(sector: u64, data: Vec<u8>) -> Self {
        Self::new(VIRTIO_BLK_T_OUT, sector, data, 0)
    }

    /// VIRTIO_BLK_T_FLUSH.
    pub fn flush() -> Self {
        Self::new(VIRTIO_BLK_T_FLUSH, 0, Vec::new(), 0)
    }

    /// VIRTIO_BLK_T_GET_ID.
    pub fn get_id() -> Self {
        Self::new(VIRTIO_BLK_T_GET_ID, 0, Vec::new(), 20)
    }

    /// VIRTIO_BLK_T_DISCARD.
    pub fn discard(ranges: &[Range]) -> Self {
        Self::new(VIRTIO_BLK_T_DISCARD, 0, bytes_of(ranges), 0)
    }

    /// VIRTIO_BLK_T_WRITE_ZEROES.
    pub fn write_zeroes(ranges: &[Range]) -> Self {
        Self::new(VIRTIO_BLK_T_WRITE_ZEROES, 0, bytes_of(ranges), 0)
    }

    /// Anything.
    pub fn new(kind: u32, sector: u64, out: Vec<u8>, in_bytes: usize) -> Self {
        Self {
            kind,
            sector,
            out,
            in_bytes,
        }
    }

    pub(super) fn header(&self) -> [u8; 16] {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&self.kind.to_le_bytes());
        header[8..].copy_from_slice(&self.sector.to_le_bytes());
        header
    }
}

fn bytes_of(ranges: &[Range]) -> Vec<u8> {
    let bytes = ranges.iter().flat_map(|range| {
        let words = [range.sectors.to_le_bytes(), range.flags.to_le_bytes()];
        range.sector.to_le_bytes().into_iter().chain(words.concat())
    });
    bytes.collect()
}

/// How a request is divided into descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Where the borders are.
    pub cut: Cut,
    /// In an indirect table.
    pub indirect: bool,
}

/// Where descriptors begin and end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Header, data and status have one each, as drivers do it.
    Fields,
    /// All that is read is one, all that is written another.
    Joined,
    /// This many for each of both, of odd lengths.
    Parts(usize),
}

impl Layout {
    /// Like Linux, when the device has indirect descriptors.
    pub const INDIRECT: Self = Self {
        cut: Cut::Fields,
        indirect: true,
    };
    /// Like Linux, when it has none.
    pub const DIRECT: Self = Self {
        cut: Cut::Fields,
        indirect: false,
    };
}

/// A descriptor that is not in a table yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes to it.
    pub writable: bool,
}

/// A completed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The index of the first descriptor.
    pub head: u16,
    /// `VIRTIO_BLK_S_*`.
    pub status: u8,
    /// How many bytes the device says it has written.
    pub written: u32,
    /// Its device-writable bytes, the status excluded.
    pub data: Vec<u8>,
}
