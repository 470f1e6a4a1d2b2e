//! The request parser on raw memory: any bytes as descriptor table, indirect tables and headers.
//!
//! The parsed request is compared with a naive reading of the same bytes. Then it is served in
//! fragments, as the device does, and guest memory is compared byte by byte.

use quorum_blk::device::chain::Chain;
use quorum_blk::device::request::{Kind, OutsideMemory, Request, Status, Zeroed};
use quorum_blk::device::{Capacity, DiskInfo, GuestMemory, View};
use quorum_blk::limits::{
    CHAIN_DESCRIPTORS_MAX, QUEUE_SIZE_MAX, SECTOR_BYTES, ZERO_SECTORS_MAX, ZERO_SEGMENTS_MAX,
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::naive::{Memory, Run, Walk, addresses_of, bytes_of, walk};
use super::script::Script;

/// The regions of guest memory: address and bytes. The last one ends at the last address.
pub const REGIONS: [(u64, usize); 3] = [(0, 0x4000), (0x6000, 0x1000), (u64::MAX - 0xfff, 0xfff)];

/// The addresses of the descriptor table: at the beginning, or at the end of a region.
const TABLES: [u64; 2] = [0, 0x3fc0];

const SERIAL: &str = "quorum 0123";
const CAPACITY_SECTORS: u64 = 64;

/// Guest memory as it was before the device touched it, or should be after.
#[derive(Clone, PartialEq, Eq)]
struct Image(Vec<Vec<u8>>);

impl Image {
    fn of(memory: &GuestMemory) -> Self {
        let read = |&(start, bytes): &(u64, usize)| {
            let mut content = vec![0; bytes];
            memory
                .read_slice(&mut content, GuestAddress(start))
                .expect("a region of ours");
            content
        };
        Self(REGIONS.iter().map(read).collect())
    }

    fn byte_mut(&mut self, address: u64) -> Option<&mut u8> {
        REGIONS
            .iter()
            .zip(&mut self.0)
            .find_map(|((start, _), content)| {
                let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
                content.get_mut(offset)
            })
    }
}

impl Memory for Image {
    fn byte(&self, address: u64) -> Option<u8> {
        REGIONS
            .iter()
            .zip(&self.0)
            .find_map(|((start, _), content)| {
                let offset = usize::try_from(address.checked_sub(*start)?).ok()?;
                content.get(offset).copied()
            })
    }
}

/// One chain, and how the disk answers.
struct Case {
    info: DiskInfo,
    queue: Queue,
    head: u16,
    /// The bytes of a fragment.
    fragment_bytes: usize,
    /// The disk fails.
    fails: bool,
}

impl Case {
    fn read(script: &mut Script<'_>) -> Self {
        let options = script.u8();
        let mut queue = Queue::new(QUEUE_SIZE_MAX).expect("a power of two");
        queue.set_size(1 << (options & 0xf).min(10));
        let info = DiskInfo {
            capacity: Capacity::new(CAPACITY_SECTORS),
            block_bytes: if options & 0x20 == 0 { 512 } else { 4096 },
            physical_block_bytes: 4096,
            read_only: options & 0x10 != 0,
            serial: SERIAL.to_owned(),
            num_queues: 1,
            segments_max: 126,
        };
        let table = TABLES[usize::from(options >> 6 & 1)];
        queue.set_desc_table_address(u32::try_from(table).ok(), Some(0));
        Self {
            info,
            queue,
            head: script.u16(),
            fragment_bytes: 512 * (1 + usize::from(script.u8())),
            fails: options & 0x80 != 0,
        }
    }
}

/// Compares the parsed chain with the expected request.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let case = Case::read(&mut script);
    let regions = REGIONS.map(|(start, bytes)| (GuestAddress(start), bytes));
    let memory = GuestMemory::from_ranges(&regions).expect("regions that do not overlap");
    let content = script.rest();
    let content = &content[..content.len().min(REGIONS[0].1)];
    memory
        .write_slice(content, GuestAddress(0))
        .expect("within the first region");
    let before = Image::of(&memory);

    let chain = Chain::new(View(&memory), &case.queue, case.head);
    let expected = walk(
        &before,
        case.queue.desc_table(),
        case.queue.size(),
        case.head,
    );
    let (mut count, mut bytes) = (0, 0u64);
    for descriptor in chain.clone() {
        count += 1;
        bytes += u64::from(descriptor.len());
    }
    assert_eq!(count, expected.readable.len() + expected.writable.len());
    assert_eq!(
        bytes,
        bytes_of(&expected.readable) + bytes_of(&expected.writable)
    );
    assert!(count <= usize::from(CHAIN_DESCRIPTORS_MAX));

    let request = Request::parse(chain, &case.info);
    assert_eq!(request.head, case.head);
    let expected = Expected::of(expected, &before, &case.info);
    assert_eq!(request.kind, expected.kind);
    assert_eq!(request.zeroes, expected.zeroes);
    assert_zeroes(&request);
    assert!(Image::of(&memory) == before, "parsing writes nothing");
    serve(&case, &request, &expected, &memory, before);
}

/// The expected request.
struct Expected {
    kind: Kind,
    /// The data of a read or a write.
    data: Vec<Run>,
    zeroes: Vec<Zeroed>,
    writable: Vec<Run>,
    status: Option<u64>,
}

impl Expected {
    fn of(walk: Walk, memory: &Image, info: &DiskInfo) -> Self {
        let status = walk.status();
        let header = stretch(memory, &walk.readable, 0, 16);
        let mut expected = Self {
            kind: Kind::Rejected(Status::IoError),
            data: Vec::new(),
            zeroes: Vec::new(),
            writable: walk.writable,
            status,
        };
        let (Some(header), Some(_), true) = (header, status, walk.well_formed) else {
            return expected;
        };
        let request_type = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        let out_bytes = bytes_of(&walk.readable) - 16;
        let in_bytes = bytes_of(&expected.writable) - 1;
        let range = |bytes| info.range_of(sector, bytes);
        let kind = match request_type {
            VIRTIO_BLK_T_IN => range(in_bytes).map(Kind::In),
            VIRTIO_BLK_T_FLUSH => Some(Kind::Flush),
            VIRTIO_BLK_T_GET_ID => Some(Kind::GetId),
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
                if info.read_only =>
            {
                None
            }
            VIRTIO_BLK_T_OUT => range(out_bytes).map(Kind::Out),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let discard = request_type == VIRTIO_BLK_T_DISCARD;
                match zeroes(memory, &walk.readable, info, discard) {
                    Ok(zeroes) => {
                        expected.zeroes = zeroes;
                        Some(Kind::Zero)
                    }
                    Err(status) => Some(Kind::Rejected(status)),
                }
            }
            _ => Some(Kind::Rejected(Status::Unsupported)),
        };
        expected.kind = kind.unwrap_or(Kind::Rejected(Status::IoError));
        expected.data = match expected.kind {
            Kind::Out(_) => walk.readable,
            Kind::In(_) | Kind::GetId => expected.writable.clone(),
            _ => Vec::new(),
        };
        expected
    }

    /// The offset of the data in the runs of `data`.
    fn data_offset(&self) -> usize {
        if matches!(self.kind, Kind::Out(_)) {
            16
        } else {
            0
        }
    }
}

/// Bytes of a sequence of runs, if it is long enough and lies in guest memory.
fn stretch(memory: &Image, runs: &[Run], offset: usize, count: usize) -> Option<Vec<u8>> {
    let addresses = addresses_of(runs).skip(offset).take(count);
    let bytes: Option<Vec<u8>> = addresses.map(|address| memory.byte(address?)).collect();
    bytes.filter(|bytes| bytes.len() == count)
}

fn zeroes(
    memory: &Image,
    runs: &[Run],
    info: &DiskInfo,
    discard: bool,
) -> Result<Vec<Zeroed>, Status> {
    let bytes = bytes_of(runs) - 16;
    if bytes == 0 || !bytes.is_multiple_of(16) {
        return Err(Status::IoError);
    }
    if bytes / 16 > u64::from(ZERO_SEGMENTS_MAX) {
        return Err(Status::Unsupported);
    }
    let allowed_flags = if discard {
        0
    } else {
        VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
    };
    let mut zeroes = Vec::new();
    let mut all_fit = true;
    for index in 1..=usize::try_from(bytes / 16).expect("few") {
        let segment = stretch(memory, runs, 16 * index, 16).ok_or(Status::IoError)?;
        let mut segment = Script::new(&segment);
        let (sector, sectors, flags) = (segment.u64(), segment.u32(), segment.u32());
        if flags & !allowed_flags != 0 {
            return Err(Status::Unsupported);
        }
        let range = info.range_of(sector, u64::from(sectors) * SECTOR_BYTES);
        let unmap = discard || flags != 0;
        match range {
            Some(range) if sectors <= ZERO_SECTORS_MAX => zeroes.push(Zeroed { range, unmap }),
            _ => all_fit = false,
        }
    }
    if all_fit {
        Ok(zeroes)
    } else {
        Err(Status::IoError)
    }
}

/// Asserts that the walk through the ranges to zero ends, within the disk.
fn assert_zeroes(request: &Request) {
    if request.kind != Kind::Zero {
        return;
    }
    let mut begun = 0;
    while let Some(zeroed) = request.zeroed_from(begun) {
        assert!(zeroed.range.count > 0 && zeroed.range.end() <= CAPACITY_SECTORS);
        begun += zeroed.range.count;
    }
    assert_eq!(begun, request.sectors());
}

/// Serves the request as the device does, and compares guest memory with the expected one.
fn serve(case: &Case, request: &Request, expected: &Expected, memory: &GuestMemory, before: Image) {
    let status = match request.kind {
        Kind::Rejected(status) => status,
        Kind::GetId => request.write_id(View(memory), SERIAL),
        Kind::In(_) | Kind::Out(_) => transfer(case, request, expected, memory, &before),
        Kind::Zero | Kind::Flush => status_of(!case.fails),
    };
    let after_data = Image::of(memory);
    let written = request.answer(View(memory), status);
    let after = Image::of(memory);

    let mut wanted = before;
    match (request.kind, status) {
        (Kind::In(range), Status::Ok) => fill(&mut wanted, expected, &disk_content(range.bytes())),
        (Kind::GetId, Status::Ok) => {
            let room = bytes_of(&expected.writable) - 1;
            let mut id = SERIAL.as_bytes().to_vec();
            id.resize(VIRTIO_BLK_ID_BYTES as usize, 0);
            id.truncate(usize::try_from(room).unwrap_or(usize::MAX));
            fill(&mut wanted, expected, &id);
        }
        (Kind::In(_) | Kind::GetId, _) => {
            // A part of the data may have been written, and nothing else.
            assert_within(&wanted, &after_data, expected);
            wanted = after_data.clone();
        }
        _ => {}
    }
    assert!(
        after_data == wanted,
        "data goes where it belongs and nowhere else"
    );
    let answered = expected.status.and_then(|address| wanted.byte_mut(address));
    let room = bytes_of(&expected.writable);
    match answered {
        Some(byte) => {
            *byte = status as u8;
            let filled = match (request.kind, status) {
                (Kind::In(_), Status::Ok) => room - 1,
                (Kind::GetId, Status::Ok) => (room - 1).min(u64::from(VIRTIO_BLK_ID_BYTES)),
                _ => 0,
            };
            let all = u64::from(filled == room - 1);
            assert_eq!(u64::from(written), filled + all);
        }
        None => assert_eq!(written, 0),
    }
    assert!(
        after == wanted,
        "the status goes where it belongs and nowhere else"
    );
}

fn status_of(done: bool) -> Status {
    if done { Status::Ok } else { Status::IoError }
}

/// Moves the data in fragments until one of them fails.
fn transfer(
    case: &Case,
    request: &Request,
    expected: &Expected,
    memory: &GuestMemory,
    before: &Image,
) -> Status {
    let (Kind::In(range) | Kind::Out(range)) = request.kind else {
        unreachable!("only those have data");
    };
    assert!(range.end() <= CAPACITY_SECTORS);
    assert_eq!(request.sectors(), range.count);
    let total = usize::try_from(range.bytes()).expect("a small disk");
    let content = disk_content(range.bytes());
    for start in (0..total).step_by(case.fragment_bytes) {
        let end = total.min(start + case.fragment_bytes);
        let whole = stretch(
            before,
            &expected.data,
            expected.data_offset() + start,
            end - start,
        );
        let done = match request.kind {
            Kind::Out(_) => {
                let mut data = vec![0; end - start];
                let done = request.data.read(View(memory), start, &mut data);
                if let (Ok(()), Some(whole)) = (done, &whole) {
                    assert!(
                        data == *whole,
                        "what is written is what the guest had there"
                    );
                }
                done
            }
            _ => request
                .data
                .write(View(memory), start, &content[start..end]),
        };
        let should = whole.map(drop).ok_or(OutsideMemory);
        assert_eq!(done, should, "all of it is guest memory, or it fails");
        if done.is_err() || case.fails {
            return Status::IoError;
        }
    }
    Status::Ok
}

/// Bytes that depend on their address.
fn disk_content(bytes: u64) -> Vec<u8> {
    (0..bytes)
        .map(|place| (place / 512 * 31 + place).to_le_bytes()[0] | 0x80)
        .collect()
}

/// Writes `content` to the writable runs one after the other.
fn fill(image: &mut Image, expected: &Expected, content: &[u8]) {
    for (address, byte) in addresses_of(&expected.writable).zip(content) {
        let place = address.and_then(|address| image.byte_mut(address));
        *place.expect("guest memory") = *byte;
    }
}

fn assert_within(before: &Image, after: &Image, expected: &Expected) {
    let regions = REGIONS.iter().zip(before.0.iter().zip(&after.0));
    for (&(start, _), (before, after)) in regions {
        let both = before.iter().zip(after).enumerate();
        for (offset, _) in both.filter(|(_, (old, new))| old != new) {
            let address = start + offset as u64;
            let allowed = |run: &Run| {
                address
                    .checked_sub(run.address)
                    .is_some_and(|offset| offset < run.bytes)
            };
            assert!(
                expected.writable.iter().any(allowed),
                "memory at {address:#x} was written to"
            );
        }
    }
}
