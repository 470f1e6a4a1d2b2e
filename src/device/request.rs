//! Parses a descriptor chain as a virtio-blk request (virtio 1.3, 5.2.6).
//!
//! The driver may split header, data and status into descriptors in any way (2.7.4.2): the header
//! is the first 16 device-readable bytes, the status the last device-writable byte, the data lies
//! in between. The descriptors are read once; addresses and lengths are checked when memory is
//! accessed.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress};

use super::chain::Chain;
use super::{DiskInfo, View};
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::limits::{QUEUE_SIZE_MAX, ZERO_SECTORS_MAX, ZERO_SEGMENTS_MAX};
use crate::statistics::RequestKind;

/// Bytes of the request header: type, reserved, sector.
const HEADER_BYTES: usize = 16;

/// Bytes of a segment of a discard or write-zeroes request: sector, number of sectors, flags.
const ZERO_SEGMENT_BYTES: usize = 16;

/// The outcome of a request (`VIRTIO_BLK_S_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Status {
    /// Done.
    Ok = VIRTIO_BLK_S_OK,
    /// Failed.
    IoError = VIRTIO_BLK_S_IOERR,
    /// The device does not support the request.
    Unsupported = VIRTIO_BLK_S_UNSUPP,
}

impl Status {
    fn byte(self) -> u8 {
        let [byte, ..] = (self as u32).to_le_bytes();
        byte
    }
}

/// A run of guest memory, not yet checked against the memory map.
#[derive(Clone, Copy, Debug)]
struct Segment {
    address: GuestAddress,
    len: usize,
}

/// Runs of guest memory that make up one sequence of bytes.
#[derive(Clone, Debug, Default)]
pub struct Segments(Vec<Segment>);

/// The request does not lie within guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutsideMemory;

/// What a chain asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// VIRTIO_BLK_T_IN.
    In(SectorRange),
    /// VIRTIO_BLK_T_OUT.
    Out(SectorRange),
    /// VIRTIO_BLK_T_DISCARD or VIRTIO_BLK_T_WRITE_ZEROES of [`Request::zeroes`].
    Zero,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_GET_ID.
    GetId,
    /// Not a request that can be served: answered with this status at once.
    Rejected(Status),
}

/// A range to be zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroed {
    /// The sectors.
    pub range: SectorRange,
    /// The replicas may deallocate the space.
    pub unmap: bool,
}

/// A parsed chain.
#[derive(Debug)]
pub struct Request {
    /// The index of the chain's first descriptor, which identifies it on the used ring.
    pub head: u16,
    /// What the chain asks for.
    pub kind: Kind,
    /// The data to write, or the place for the data to read.
    pub data: Segments,
    /// The ranges to zero.
    pub zeroes: Vec<Zeroed>,
    /// The address of the status byte; `None` if the driver left no room for one. Then the chain
    /// is completed without a status.
    status: Option<GuestAddress>,
    /// Device-writable bytes before the status byte, whatever the driver wants with them.
    before_status: u64,
}

impl Request {
    /// Parses `chain` as a request to a disk such as `info`.
    pub fn parse(chain: Chain<'_>, info: &DiskInfo) -> Self {
        let head = chain.head_index();
        let memory = chain.memory();
        let (readable, mut writable, well_formed) = split(chain);
        let status = writable.take_last_byte();
        let before_status = writable.bytes();
        let body = if well_formed && status.is_some() {
            Body::parse(readable, writable, memory, info)
        } else {
            Err(Status::IoError)
        };
        let rejected = |status| Body::new(Kind::Rejected(status));
        let Body { kind, data, zeroes } = body.unwrap_or_else(rejected);
        Self {
            head,
            kind,
            data,
            zeroes,
            status,
            before_status,
        }
    }

    /// The kind that it is counted as, if it needs replicas.
    pub fn counts_as(&self) -> Option<RequestKind> {
        match self.kind {
            Kind::In(_) => Some(RequestKind::Read),
            Kind::Out(_) => Some(RequestKind::Write),
            Kind::Zero => Some(RequestKind::Zero),
            Kind::Flush => Some(RequestKind::Flush),
            Kind::GetId | Kind::Rejected(_) => None,
        }
    }

    /// Its sectors as one range. For a request that zeroes, a range of the same length.
    pub fn extent(&self) -> SectorRange {
        match self.kind {
            Kind::In(range) | Kind::Out(range) => range,
            _ => SectorRange::new(0, self.sectors()),
        }
    }

    /// Sectors that the request reads, writes or zeroes.
    pub fn sectors(&self) -> u64 {
        match self.kind {
            Kind::In(range) | Kind::Out(range) => range.count,
            Kind::Zero => self.zeroes.iter().map(|zeroed| zeroed.range.count).sum(),
            Kind::Flush | Kind::GetId | Kind::Rejected(_) => 0,
        }
    }

    /// The part of the range at `offset_sectors` into the request, from there to its end.
    pub fn zeroed_from(&self, offset_sectors: u64) -> Option<Zeroed> {
        let mut skip = offset_sectors;
        self.zeroes.iter().find_map(|&Zeroed { range, unmap }| {
            if skip < range.count {
                let range = SectorRange::new(range.start + skip, range.count - skip);
                return Some(Zeroed { range, unmap });
            }
            skip -= range.count;
            None
        })
    }

    /// Writes the status byte, if the driver left room for it. Returns the length for the used
    /// ring: how many bytes from the start of the device-writable part are written (virtio 1.3,
    /// 2.7.8.2).
    pub fn answer(&self, memory: View<'_>, status: Status) -> u32 {
        let Some(address) = self.status else {
            return 0;
        };
        // A status byte outside of guest memory is the driver's fault. The chain is completed all
        // the same.
        if memory.write_slice(&[status.byte()], address).is_err() {
            return 0;
        }
        let filled = match (self.kind, status) {
            (Kind::In(_), Status::Ok) => self.before_status,
            (Kind::GetId, Status::Ok) => self.before_status.min(u64::from(VIRTIO_BLK_ID_BYTES)),
            _ => 0,
        };
        // The status byte counts only if all bytes before it are written.
        let written = if filled == self.before_status {
            filled + 1
        } else {
            filled
        };
        u32::try_from(written).unwrap_or(u32::MAX)
    }

    /// Serves GET_ID: the serial number, padded with zeroes to 20 bytes (virtio 1.3, 5.2.6).
    pub fn write_id(&self, memory: View<'_>, serial: &str) -> Status {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let len = serial.len().min(id.len());
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let room = usize::try_from(self.data.bytes()).map_or(id.len(), |room| room.min(id.len()));
        match self.data.write(memory, 0, &id[..room]) {
            Ok(()) => Status::Ok,
            Err(OutsideMemory) => Status::IoError,
        }
    }
}

/// What a chain asks for, with its data.
struct Body {
    kind: Kind,
    data: Segments,
    zeroes: Vec<Zeroed>,
}

impl Body {
    fn new(kind: Kind) -> Self {
        Self::with_data(kind, Segments::default())
    }

    fn with_data(kind: Kind, data: Segments) -> Self {
        Self {
            kind,
            data,
            zeroes: Vec::new(),
        }
    }

    /// Parses the device-readable bytes and the device-writable bytes before the status, or returns
    /// the status that rejects them.
    fn parse(
        mut readable: Segments,
        writable: Segments,
        memory: View<'_>,
        info: &DiskInfo,
    ) -> Result<Self, Status> {
        let mut header = [0; HEADER_BYTES];
        let read = readable.read(memory, 0, &mut header);
        read.map_err(|OutsideMemory| Status::IoError)?;
        readable.skip(HEADER_BYTES);
        let request_type = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let range_of = |data: &Segments| {
            let range = info.range_of(sector, data.bytes());
            range.ok_or(Status::IoError)
        };
        let is_write = matches!(
            request_type,
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
        );
        if is_write && info.read_only {
            return Err(Status::IoError);
        }
        Ok(match request_type {
            VIRTIO_BLK_T_IN => Self::with_data(Kind::In(range_of(&writable)?), writable),
            VIRTIO_BLK_T_OUT => Self::with_data(Kind::Out(range_of(&readable)?), readable),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let discard = request_type == VIRTIO_BLK_T_DISCARD;
                Self {
                    zeroes: parse_zeroes(&readable, memory, info, discard)?,
                    ..Self::new(Kind::Zero)
                }
            }
            VIRTIO_BLK_T_FLUSH => Self::new(Kind::Flush),
            VIRTIO_BLK_T_GET_ID => Self::with_data(Kind::GetId, writable),
            _ => return Err(Status::Unsupported),
        })
    }
}

/// The segments of a discard or write-zeroes request (virtio 1.3, 5.2.6), or the status that
/// rejects it.
fn parse_zeroes(
    segments: &Segments,
    memory: View<'_>,
    info: &DiskInfo,
    discard: bool,
) -> Result<Vec<Zeroed>, Status> {
    let count = segments.bytes() / ZERO_SEGMENT_BYTES as u64;
    if count == 0 || !segments.bytes().is_multiple_of(ZERO_SEGMENT_BYTES as u64) {
        return Err(Status::IoError);
    }
    if count > u64::from(ZERO_SEGMENTS_MAX) {
        return Err(Status::Unsupported);
    }
    let mut ranges = Vec::with_capacity(ZERO_SEGMENTS_MAX as usize);
    let mut rejected = None;
    for index in 0..usize::try_from(count).expect("few") {
        let mut bytes = [0; ZERO_SEGMENT_BYTES];
        let read = segments.read(memory, index * ZERO_SEGMENT_BYTES, &mut bytes);
        read.map_err(|OutsideMemory| Status::IoError)?;
        let sector = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let sectors = u32::from_le_bytes(bytes[8..12].try_into().expect("4 bytes"));
        let flags = u32::from_le_bytes(bytes[12..].try_into().expect("4 bytes"));
        // Unknown flags of any segment come before other errors: such a request must not be done in
        // part (5.2.6.2).
        let known = if discard {
            0
        } else {
            VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        };
        if flags & !known != 0 {
            return Err(Status::Unsupported);
        }
        let range = info.range_of(sector, u64::from(sectors) * SECTOR_BYTES);
        match range.filter(|_| sectors <= ZERO_SECTORS_MAX) {
            Some(range) => ranges.push(Zeroed {
                range,
                unmap: discard || flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            }),
            None => rejected = Some(Status::IoError),
        }
    }
    rejected.map_or(Ok(ranges), Err)
}

/// The device-readable and the device-writable bytes of a chain, and whether it is well formed: the
/// readable bytes come first (virtio 1.3, 2.7.4.2), and the chain has an end. Descriptors behind
/// the point where it is malformed are left out, and so are all but the last of those that a chain
/// has too many.
fn split(chain: Chain<'_>) -> (Segments, Segments, bool) {
    let (mut readable, mut writable) = (Segments::default(), Segments::default());
    let mut in_order = true;
    let mut ended = false;
    let mut status_in = None;
    for (index, descriptor) in chain.enumerate() {
        ended = !descriptor.has_next();
        if index >= usize::from(QUEUE_SIZE_MAX) {
            // Too long: of the rest only the status is wanted, and nothing is kept.
            in_order = false;
            if descriptor.is_write_only() && descriptor.len() > 0 {
                status_in = Some(descriptor);
            }
            continue;
        }
        if descriptor.is_write_only() {
            writable.push(&descriptor);
        } else {
            in_order &= writable.0.is_empty();
            readable.push(&descriptor);
        }
    }
    if let Some(descriptor) = status_in {
        writable.push(&descriptor);
    }
    (readable, writable, in_order && ended)
}

impl Segments {
    fn push(&mut self, descriptor: &Descriptor) {
        if descriptor.len() > 0 {
            self.0.push(Segment {
                address: descriptor.addr(),
                len: descriptor.len() as usize,
            });
        }
    }

    /// The length in bytes; below 4 GiB, as [`Chain`] stops there.
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|segment| segment.len as u64).sum()
    }

    /// Copies from guest memory, from byte `offset` of the sequence on.
    ///
    /// # Errors
    /// If a part is not guest memory, or the sequence is too short.
    pub fn read(
        &self,
        memory: View<'_>,
        offset: usize,
        to: &mut [u8],
    ) -> Result<(), OutsideMemory> {
        let mut done = 0;
        for segment in self.window(offset, to.len()) {
            let part = &mut to[done..done + segment.len];
            memory
                .read_slice(part, segment.address)
                .map_err(|_| OutsideMemory)?;
            done += segment.len;
        }
        // What was lost meanwhile reads as zeroes, which must not reach the disk.
        if done == to.len() && !memory.is_lost() {
            Ok(())
        } else {
            Err(OutsideMemory)
        }
    }

    /// Copies to guest memory, from byte `offset` of the sequence on.
    ///
    /// # Errors
    /// If a part is not guest memory, or the sequence is too short.
    pub fn write(&self, memory: View<'_>, offset: usize, from: &[u8]) -> Result<(), OutsideMemory> {
        let mut done = 0;
        for segment in self.window(offset, from.len()) {
            let part = &from[done..done + segment.len];
            memory
                .write_slice(part, segment.address)
                .map_err(|_| OutsideMemory)?;
            done += segment.len;
        }
        if done == from.len() {
            Ok(())
        } else {
            Err(OutsideMemory)
        }
    }

    /// The runs of memory behind the bytes `[offset, offset + len)`; fewer bytes at the end. A run
    /// that wraps around the address space is left out.
    fn window(&self, offset: usize, len: usize) -> impl Iterator<Item = Segment> {
        let (mut skip, mut left) = (offset, len);
        self.0.iter().filter_map(move |segment| {
            let start = skip.min(segment.len);
            skip -= start;
            let take = (segment.len - start).min(left);
            left -= take;
            let address = segment.address.checked_add(start as u64)?;
            (take > 0).then_some(Segment { address, len: take })
        })
    }

    /// Drops the first `bytes` bytes; there are as many.
    fn skip(&mut self, bytes: usize) {
        let rest: Vec<_> = self.window(bytes, usize::MAX).collect();
        self.0 = rest;
    }

    /// Removes the last byte and returns its address.
    fn take_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.0.last_mut()?;
        last.len -= 1;
        let address = last.address.checked_add(last.len as u64);
        if last.len == 0 {
            self.0.pop();
        }
        address
    }
}
