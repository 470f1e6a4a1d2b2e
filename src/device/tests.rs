//! The device on raw ring memory: descriptors written byte by byte, as a driver or an attacker would, and an
//! engine that only does what it is told.

use std::fs::File;
use std::io::Read;
use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH as FLUSH, VIRTIO_BLK_T_GET_ID as GET_ID, VIRTIO_BLK_T_IN as IN,
    VIRTIO_BLK_T_OUT as OUT,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

use super::guest::Guest;
use super::{DiskInfo, GuestMemory, Vring};
use crate::engine::{Failed, GuestRequest, Tag};
use crate::limits::{PIECE_BYTES_MAX, QUEUE_SIZE_MAX};
use crate::quorum::SectorRange;
use crate::replica::buffer::BufferPool;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// What the driver puts into status bytes beforehand.
const NO_STATUS: u8 = 0xff;

/// Bytes of ring memory for each ring: descriptor table, available ring, used ring.
const RING_BYTES: u64 = 0x8000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x6000;

/// Where tests keep the parts of a request.
const HEADER: u64 = 0x2_0000;
const STATUS: u64 = 0x2_1000;
const TABLE: u64 = 0x2_2000;
const DATA: u64 = 0x8_0000;
const MEMORY_BYTES: u64 = 0x40_0000;
/// Far from everything else.
const OUTSIDE: u64 = 0x1000_0000;

const SERIAL: &str = "quorum 0123";

/// One descriptor: a run of guest memory.
#[derive(Clone, Copy, Debug)]
struct Part {
    address: u64,
    len: u32,
    flags: u16,
}

impl Part {
    fn range(&self) -> Range<u64> {
        self.address..self.address.saturating_add(u64::from(self.len))
    }
}

fn readable(address: u64, len: usize) -> Part {
    Part {
        address,
        len: u32::try_from(len).unwrap(),
        flags: 0,
    }
}

fn writable(address: u64, len: usize) -> Part {
    Part {
        flags: WRITE,
        ..readable(address, len)
    }
}

fn descriptor(part: Part, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&part.address.to_le_bytes());
    bytes[8..12].copy_from_slice(&part.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&(part.flags | flags).to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

fn header(request_type: u32, sector: u64) -> [u8; 16] {
    // The reserved field was once a priority; it means nothing.
    let mut bytes = [0xee; 16];
    bytes[..4].copy_from_slice(&request_type.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// The driver's view of a ring.
#[derive(Clone, Copy, Default)]
struct Driver {
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A guest, the device, and an engine with a disk in memory.
struct Machine {
    memory: GuestMemory,
    /// Memory as the driver has written it.
    written: Vec<u8>,
    vrings: Vec<Vring>,
    guest: Guest,
    queue_size: u16,
    drivers: Vec<Driver>,
    disk: Vec<u8>,
    /// The engine fails pieces with this sector in them.
    bad_sector: Option<u64>,
    /// What the engine was asked for: the kind, its first sector and its length in sectors.
    asked: Vec<(&'static str, u64, u64)>,
    /// Whether the last write had to be durable.
    durable: bool,
}

fn disk_info() -> DiskInfo {
    DiskInfo {
        capacity_sectors: 6144,
        block_bytes: 512,
        read_only: false,
        serial: SERIAL.to_owned(),
        num_queues: 1,
        segments_max: 126,
    }
}

impl Machine {
    /// One with one ring of 64 entries.
    fn new() -> Self {
        Self::with(disk_info(), 1, 64, MEMORY_BYTES)
    }

    fn with(info: DiskInfo, rings: usize, queue_size: u16, memory_bytes: u64) -> Self {
        let bytes = usize::try_from(memory_bytes).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        let shared = GuestMemoryAtomic::new(memory.clone());
        let vrings: Vec<Vring> = (0..rings)
            .map(|ring| {
                let vring = Vring::new(shared.clone(), queue_size).unwrap();
                let base = ring as u64 * RING_BYTES;
                vring.set_queue_info(base, base + AVAILABLE, base + USED).unwrap();
                vring.set_queue_ready(true);
                vring.set_enabled(true);
                vring.set_kick(Some(File::open("/dev/null").unwrap()));
                vring
            })
            .collect();
        // Each byte depends on its place, and none of them is a small number.
        let disk = (0..info.capacity_sectors * 512)
            .map(|place| (place / 512 * 31 + place).to_le_bytes()[0] | 0x80)
            .collect();
        let mut guest = Guest::new(info, shared, vrings.clone(), BufferPool::default());
        for ring in 0..rings {
            assert!(guest.refresh(ring, false));
        }
        Self {
            memory,
            written: vec![0; bytes],
            vrings,
            guest,
            queue_size,
            drivers: vec![Driver::default(); rings],
            disk,
            bad_sector: None,
            asked: Vec::new(),
            durable: false,
        }
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
        let start = usize::try_from(address).unwrap();
        self.written[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn get_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.get(address, 2).try_into().unwrap())
    }

    fn get_u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.get(address, 4).try_into().unwrap())
    }

    fn status(&self) -> u8 {
        self.get(STATUS, 1)[0]
    }

    fn all_memory(&self) -> Vec<u8> {
        self.get(0, self.written.len())
    }

    fn put_header(&mut self, request_type: u32, sector: u64) {
        self.put(HEADER, &header(request_type, sector));
        self.put(STATUS, &[NO_STATUS]);
    }

    /// Writes a descriptor into a ring's table.
    fn put_descriptor(&mut self, ring: usize, index: u16, bytes: &[u8; 16]) {
        self.put(ring as u64 * RING_BYTES + u64::from(index) * 16, bytes);
    }

    /// Makes a chain head available.
    fn offer_head(&mut self, ring: usize, head: u16) {
        let base = ring as u64 * RING_BYTES + AVAILABLE;
        let driver = &mut self.drivers[ring];
        let slot = driver.available % self.queue_size;
        driver.available = driver.available.wrapping_add(1);
        let index = driver.available;
        self.put(base + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.put(base + 2, &index.to_le_bytes());
    }

    /// Makes a chain of these parts available; returns its head.
    fn offer(&mut self, ring: usize, parts: &[Part]) -> u16 {
        let head = self.drivers[ring].next_descriptor;
        for (index, &part) in parts.iter().enumerate() {
            let next = (self.drivers[ring].next_descriptor + 1) % self.queue_size;
            let flags = if index + 1 < parts.len() { NEXT } else { 0 };
            let descriptor = descriptor(part, flags, next);
            self.put_descriptor(ring, self.drivers[ring].next_descriptor, &descriptor);
            self.drivers[ring].next_descriptor = next;
        }
        self.offer_head(ring, head);
        head
    }

    /// Makes a chain of these parts available in an indirect table at `table`; returns its head.
    fn offer_indirect(&mut self, ring: usize, table: u64, parts: &[Part]) -> u16 {
        for (index, &part) in parts.iter().enumerate() {
            let next = u16::try_from(index + 1).unwrap();
            let flags = if index + 1 < parts.len() { NEXT } else { 0 };
            self.put(table + 16 * index as u64, &descriptor(part, flags, next));
        }
        let reference = Part {
            address: table,
            len: u32::try_from(16 * parts.len()).unwrap(),
            flags: INDIRECT,
        };
        self.offer(ring, &[reference])
    }

    /// Heads and lengths that were put on a used ring since the last call.
    fn used(&mut self, ring: usize) -> Vec<(u16, u32)> {
        let base = ring as u64 * RING_BYTES + USED;
        let index = self.get_u16(base + 2);
        let mut entries = Vec::new();
        while self.drivers[ring].used != index {
            let slot = u64::from(self.drivers[ring].used % self.queue_size);
            let id = self.get_u32(base + 4 + 8 * slot);
            entries.push((u16::try_from(id).unwrap(), self.get_u32(base + 8 + 8 * slot)));
            self.drivers[ring].used = self.drivers[ring].used.wrapping_add(1);
        }
        entries
    }

    /// Answers a piece as the engine would.
    fn answer(&mut self, tag: Tag, request: GuestRequest) {
        let (name, range) = match &request {
            GuestRequest::Read(range) => ("read", *range),
            GuestRequest::Write { range, .. } => ("write", *range),
            GuestRequest::Flush => ("flush", SectorRange::new(0, 0)),
        };
        self.asked.push((name, range.start, range.count));
        let place = usize::try_from(range.start * 512).unwrap()..usize::try_from(range.end() * 512).unwrap();
        let is_bad = |sector| (range.start..range.end()).contains(&sector);
        let result: Result<&[u8], Failed> = match request {
            _ if self.bad_sector.is_some_and(is_bad) => Err(Failed),
            GuestRequest::Read(_) => Ok(&self.disk[place]),
            GuestRequest::Write { data, durable, .. } => {
                self.disk[place].copy_from_slice(&data);
                self.durable = durable;
                Ok(&[])
            }
            GuestRequest::Flush => Ok(&[]),
        };
        self.guest.answered(tag, result);
    }

    /// Serves until the rings are empty.
    fn serve(&mut self) {
        while let Some((tag, request)) = self.guest.next_request() {
            self.answer(tag, request);
        }
    }

    /// Serves one chain of the first ring; returns the length on the used ring.
    fn serve_chain(&mut self, parts: &[Part]) -> u32 {
        let head = self.offer(0, parts);
        self.serve_head(head)
    }

    fn serve_head(&mut self, head: u16) -> u32 {
        self.serve();
        let used = self.used(0);
        assert_eq!(used.len(), 1, "given back once");
        assert_eq!(used[0].0, head);
        assert!(self.guest.is_drained(0));
        used[0].1
    }

    /// Asserts that guest memory is as the driver has written it, but for the writable ones of these
    /// parts and the used rings.
    fn assert_untouched(&self, except: &[Part]) {
        const CHUNK: usize = 256;
        let rings = (0..self.drivers.len() as u64).map(|ring| ring * RING_BYTES);
        let rings = rings.map(|base| base + USED..base + RING_BYTES);
        let except = except.iter().filter(|part| part.flags & WRITE != 0);
        let allowed: Vec<Range<u64>> = rings.chain(except.map(Part::range)).collect();
        let memory = self.all_memory();
        for (chunk, (now, then)) in memory.chunks(CHUNK).zip(self.written.chunks(CHUNK)).enumerate() {
            if now == then {
                continue;
            }
            for (index, (now, then)) in now.iter().zip(then).enumerate() {
                let place = (chunk * CHUNK + index) as u64;
                let is_allowed = allowed.iter().any(|range| range.contains(&place));
                assert!(now == then || is_allowed, "memory at {place:#x} was written to");
            }
        }
    }
}

fn bytes_of(disk: &[u8], sector: usize, len: usize) -> Vec<u8> {
    disk[sector * 512..sector * 512 + len].to_vec()
}

/// `len` bytes at `address`, in pieces of these lengths over and over.
fn cut(whole: Part, lengths: &[usize]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut done = 0;
    for &len in lengths.iter().cycle() {
        let left = whole.len as usize - done;
        if left == 0 {
            break;
        }
        let len = len.min(left);
        parts.push(Part {
            address: whole.address + done as u64,
            len: u32::try_from(len).unwrap(),
            ..whole
        });
        done += len;
    }
    parts
}

// ---- Every legal split

#[test]
fn a_header_in_any_number_of_pieces() {
    for lengths in [&[16][..], &[8, 8], &[1], &[3, 1, 5]] {
        let mut machine = Machine::new();
        machine.put_header(IN, 3);
        let mut parts = cut(readable(HEADER, 16), lengths);
        parts.extend([writable(DATA, 1024), writable(STATUS, 1)]);
        assert_eq!(machine.serve_chain(&parts), 1025);
        assert_eq!(machine.status(), OK);
        assert_eq!(machine.get(DATA, 1024), bytes_of(&machine.disk, 3, 1024));
        machine.assert_untouched(&[writable(DATA, 1024), writable(STATUS, 1)]);
    }
}

#[test]
fn header_and_data_in_one_descriptor() {
    let mut machine = Machine::new();
    machine.put_header(OUT, 7);
    machine.put(HEADER + 16, &[0x11; 1536]);
    let used = machine.serve_chain(&[readable(HEADER, 16 + 1536), writable(STATUS, 1)]);
    assert_eq!((used, machine.status()), (1, OK));
    assert_eq!(machine.asked, [("write", 7, 3)]);
    assert_eq!(bytes_of(&machine.disk, 7, 1536), [0x11; 1536]);
    machine.assert_untouched(&[writable(STATUS, 1)]);
}

#[test]
fn a_header_that_ends_within_the_data() {
    let mut machine = Machine::new();
    machine.put_header(OUT, 0);
    machine.put(HEADER + 16, &[1; 100]);
    machine.put(DATA, &[2; 412]);
    let parts = [
        readable(HEADER, 10),
        readable(HEADER + 10, 106),
        readable(DATA, 412),
        writable(STATUS, 1),
    ];
    assert_eq!(machine.serve_chain(&parts), 1);
    assert_eq!(machine.disk[..100], [1; 100]);
    assert_eq!(machine.disk[100..512], [2; 412]);
}

#[test]
fn data_and_status_in_one_descriptor() {
    let mut machine = Machine::new();
    machine.put_header(IN, 1);
    let used = machine.serve_chain(&[readable(HEADER, 16), writable(DATA, 513)]);
    assert_eq!(used, 513);
    assert_eq!(machine.get(DATA, 512), bytes_of(&machine.disk, 1, 512));
    assert_eq!(machine.get(DATA + 512, 1), [OK]);
    machine.assert_untouched(&[writable(DATA, 513)]);
}

#[test]
fn data_in_many_odd_pieces_lands_where_it_belongs() {
    const LEN: usize = 7 * 512;
    let mut machine = Machine::with(disk_info(), 1, 256, MEMORY_BYTES);
    for (request_type, flags) in [(IN, WRITE), (OUT, 0)] {
        machine.put_header(request_type, 2);
        // Backwards through memory, with a gap after each piece.
        let mut parts = vec![readable(HEADER, 16)];
        let mut len = 0;
        while len < LEN {
            let piece = (parts.len() * 7 % 31 + 1).min(LEN - len);
            let address = DATA + 0x1_0000 - parts.len() as u64 * 64;
            machine.put(address, &vec![parts.len().to_le_bytes()[0]; piece]);
            parts.push(Part {
                flags,
                ..readable(address, piece)
            });
            len += piece;
        }
        assert!(parts.len() > 200);
        parts.push(writable(STATUS, 1));
        let data = &parts[1..parts.len() - 1];
        let wanted = if request_type == IN {
            bytes_of(&machine.disk, 2, LEN)
        } else {
            gather(&machine, data)
        };
        machine.serve_chain(&parts);
        assert_eq!(machine.status(), OK);
        if request_type == IN {
            assert!(gather(&machine, data) == wanted);
        } else {
            assert!(bytes_of(&machine.disk, 2, LEN) == wanted);
        }
        machine.assert_untouched(&parts);
    }
}

#[test]
fn an_indirect_table() {
    let mut machine = Machine::new();
    for parts in [
        vec![readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)],
        [
            cut(readable(HEADER, 16), &[1]),
            cut(writable(DATA, 512), &[5, 3]),
            vec![writable(STATUS, 1)],
        ]
        .concat(),
    ] {
        machine.put_header(IN, 9);
        machine.put(DATA, &[0; 512]);
        let head = machine.offer_indirect(0, TABLE, &parts);
        assert_eq!(machine.serve_head(head), 513);
        assert_eq!(machine.status(), OK);
        assert_eq!(machine.get(DATA, 512), bytes_of(&machine.disk, 9, 512));
    }
}

#[test]
fn an_indirect_table_after_ordinary_descriptors() {
    let mut machine = Machine::new();
    machine.put_header(IN, 9);
    machine.put(TABLE, &descriptor(writable(DATA, 512), NEXT, 1));
    machine.put(TABLE + 16, &descriptor(writable(STATUS, 1), 0, 0));
    let table = Part {
        flags: INDIRECT,
        ..readable(TABLE, 32)
    };
    assert_eq!(machine.serve_chain(&[readable(HEADER, 16), table]), 513);
    assert_eq!(machine.status(), OK);
}

// ---- What is asked for

#[test]
fn flush_and_serial_number() {
    let mut machine = Machine::new();
    machine.put_header(FLUSH, u64::MAX);
    assert_eq!(
        machine.serve_chain(&[readable(HEADER, 16), writable(STATUS, 1)]),
        1
    );
    assert_eq!(
        (machine.status(), &machine.asked[..]),
        (OK, &[("flush", 0, 0)][..])
    );

    let mut id = [0; 20];
    id[..SERIAL.len()].copy_from_slice(SERIAL.as_bytes());
    // Exactly the room, too little, none, and too much; the used length counts what is written without a gap.
    for (room, used) in [(20, 21), (5, 6), (1, 2), (0, 1), (64, 20)] {
        machine.put_header(GET_ID, 0);
        machine.put(DATA, &[0xcc; 64]);
        let parts = [readable(HEADER, 16), writable(DATA, room), writable(STATUS, 1)];
        assert_eq!(machine.serve_chain(&parts), used, "room for {room}");
        assert_eq!(machine.status(), OK);
        let told = room.min(20);
        assert_eq!(machine.get(DATA, told), id[..told]);
        assert_eq!(machine.get(DATA + told as u64, 64 - told), vec![0xcc; 64 - told]);
    }
    assert_eq!(machine.asked.len(), 1, "the engine knows no serial number");
}

#[test]
fn a_serial_number_of_full_length() {
    let info = DiskInfo {
        serial: "12345678901234567890".to_owned(),
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    machine.put_header(GET_ID, 0);
    machine.serve_chain(&[readable(HEADER, 16), writable(DATA, 20), writable(STATUS, 1)]);
    assert_eq!(machine.get(DATA, 20), b"12345678901234567890");
}

#[test]
fn unknown_types_are_not_supported() {
    let mut machine = Machine::new();
    // SCSI, DISCARD, WRITE_ZEROES and SECURE_ERASE were not offered; the rest does not exist.
    for request_type in [2, 3, 5, 7, 9, 11, 12, 13, 14, 24, 0x100, 0x8000_0000, u32::MAX] {
        machine.put_header(request_type, 0);
        let used = machine.serve_chain(&[readable(HEADER, 528), writable(STATUS, 1)]);
        assert_eq!((machine.status(), used), (UNSUPP, 1), "type {request_type:#x}");
    }
    assert!(machine.asked.is_empty());
}

/// Serves a request for `bytes` bytes from `sector` on, and returns its status.
fn status_of(machine: &mut Machine, request_type: u32, sector: u64, bytes: usize) -> u8 {
    machine.put_header(request_type, sector);
    let data = match request_type {
        IN => writable(DATA, bytes),
        _ => readable(DATA, bytes),
    };
    let used = machine.serve_chain(&[readable(HEADER, 16), data, writable(STATUS, 1)]);
    let wanted = match (request_type, machine.status()) {
        (IN, OK) => bytes + 1,
        (IN, _) if bytes > 0 => 0,
        _ => 1,
    };
    assert_eq!(used as usize, wanted);
    machine.status()
}

#[test]
fn what_lies_beyond_the_disk_is_an_error() {
    let mut machine = Machine::new();
    let end = disk_info().capacity_sectors;
    for request_type in [IN, OUT] {
        for (sector, bytes, status) in [
            (end - 1, 512, OK),
            (end - 1, 1024, IOERR),
            (end, 512, IOERR),
            (end, 0, OK),
            (end + 1, 0, IOERR),
            (u64::MAX, 512, IOERR),
            (u64::MAX, 0, IOERR),
            (u64::MAX - 1, 1024, IOERR),
            (u64::MAX / 512, 512, IOERR),
            (u64::MAX / 512 + 1, 512, IOERR),
            (1 << 55, 512, IOERR),
        ] {
            let got = status_of(&mut machine, request_type, sector, bytes);
            assert_eq!(got, status, "type {request_type}, {bytes} bytes at {sector}");
        }
    }
    assert_eq!(machine.asked, [("read", end - 1, 1), ("write", end - 1, 1)]);
}

#[test]
fn only_whole_blocks_are_served() {
    let mut machine = Machine::new();
    for (bytes, status) in [(511, IOERR), (513, IOERR), (1, IOERR), (512, OK)] {
        assert_eq!(status_of(&mut machine, IN, 0, bytes), status);
        assert_eq!(status_of(&mut machine, OUT, 0, bytes), status);
    }
    let info = DiskInfo {
        block_bytes: 4096,
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    for (sector, bytes, status) in [
        (8, 4096, OK),
        (0, 8192, OK),
        (0, 512, IOERR),
        (1, 4096, IOERR),
        (4, 4096, IOERR),
        (8, 4096 + 512, IOERR),
        (7, 0, IOERR),
    ] {
        for request_type in [IN, OUT] {
            let got = status_of(&mut machine, request_type, sector, bytes);
            assert_eq!(got, status, "{bytes} bytes at {sector}");
        }
    }
}

#[test]
fn requests_without_data_succeed_without_the_engine() {
    let mut machine = Machine::new();
    for request_type in [IN, OUT] {
        assert_eq!(status_of(&mut machine, request_type, 5, 0), OK);
        machine.put_header(request_type, 5);
        let used = machine.serve_chain(&[readable(HEADER, 16), writable(STATUS, 1)]);
        assert_eq!((machine.status(), used), (OK, 1));
    }
    assert!(machine.asked.is_empty());
}

#[test]
fn a_read_only_disk_is_not_written() {
    let info = DiskInfo {
        read_only: true,
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    assert_eq!(status_of(&mut machine, OUT, 0, 512), IOERR);
    assert_eq!(status_of(&mut machine, OUT, 0, 0), IOERR);
    assert_eq!(status_of(&mut machine, IN, 0, 512), OK);
    assert_eq!(machine.asked, [("read", 0, 1)]);
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let mut machine = Machine::new();
    status_of(&mut machine, OUT, 0, 512);
    assert!(!machine.durable);
    assert!(machine.guest.refresh(0, true));
    status_of(&mut machine, OUT, 0, 512);
    assert!(machine.durable);
}

// ---- Used lengths

#[test]
fn the_used_length_claims_nothing_that_is_not_written() {
    let mut machine = Machine::new();
    // Room that these requests have no use for: only the status byte behind it is written.
    for request_type in [OUT, FLUSH, 99] {
        machine.put_header(request_type, 0);
        let parts = [readable(HEADER, 16), writable(DATA, 100), writable(STATUS, 1)];
        assert_eq!(machine.serve_chain(&parts), 0);
        assert_ne!(machine.status(), NO_STATUS);
        machine.assert_untouched(&[writable(STATUS, 1)]);
    }
    // A failed read: how much of its data was written is nobody's business.
    machine.bad_sector = Some(1);
    assert_eq!(status_of(&mut machine, IN, 0, 1024), IOERR);
}

// ---- Pieces

const PIECE_SECTORS: u64 = PIECE_BYTES_MAX / 512;
const TWO_AND_A_BIT: usize = (2 << 20) + 1024;
const _: () = assert!(PIECE_BYTES_MAX == 1 << 20);

#[test]
fn a_long_request_is_served_in_pieces() {
    let mut machine = Machine::new();
    machine.put_header(IN, 10);
    let lengths = [12345, 700_000, 1];
    let data = cut(writable(DATA, TWO_AND_A_BIT), &lengths);
    let parts = [
        vec![readable(HEADER, 16)],
        data.clone(),
        vec![writable(STATUS, 1)],
    ]
    .concat();
    machine.offer(0, &parts);
    // The answers come in another order.
    let mut pieces: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
    pieces.reverse();
    for (tag, piece) in pieces {
        assert_eq!(machine.status(), NO_STATUS);
        assert!(machine.used(0).is_empty());
        assert!(!machine.guest.is_drained(0));
        machine.answer(tag, piece);
    }
    let mut asked = machine.asked.clone();
    asked.reverse();
    assert_eq!(
        asked,
        [
            ("read", 10, PIECE_SECTORS),
            ("read", 10 + PIECE_SECTORS, PIECE_SECTORS),
            ("read", 10 + 2 * PIECE_SECTORS, 2),
        ]
    );
    assert_eq!(machine.used(0), [(0, u32::try_from(TWO_AND_A_BIT + 1).unwrap())]);
    assert_eq!(machine.status(), OK);
    assert!(machine.get(DATA, TWO_AND_A_BIT) == bytes_of(&machine.disk, 10, TWO_AND_A_BIT));
    machine.assert_untouched(&[writable(DATA, TWO_AND_A_BIT), writable(STATUS, 1)]);

    // And back, to another place.
    machine.put_header(OUT, 100);
    let readable_data = data.iter().map(|part| Part { flags: 0, ..*part }).collect();
    let parts = [
        vec![readable(HEADER, 16)],
        readable_data,
        vec![writable(STATUS, 1)],
    ]
    .concat();
    let wanted = machine.get(DATA, TWO_AND_A_BIT);
    assert_eq!(machine.serve_chain(&parts), 1);
    assert!(bytes_of(&machine.disk, 100, TWO_AND_A_BIT) == wanted);
}

#[test]
fn the_first_failed_piece_fails_the_request_and_begins_no_further_one() {
    for request_type in [IN, OUT] {
        for (bad_sector, pieces) in [(0, 1), (PIECE_SECTORS, 2), (2 * PIECE_SECTORS, 3)] {
            let mut machine = Machine::new();
            machine.bad_sector = Some(bad_sector);
            assert_eq!(status_of(&mut machine, request_type, 0, TWO_AND_A_BIT), IOERR);
            assert_eq!(machine.asked.len(), pieces);
        }
    }
}

#[test]
fn a_failed_request_is_given_back_when_all_its_pieces_are_answered() {
    let mut machine = Machine::new();
    machine.put_header(IN, 0);
    machine.offer(
        0,
        &[
            readable(HEADER, 16),
            writable(DATA, TWO_AND_A_BIT),
            writable(STATUS, 1),
        ],
    );
    let first = machine.guest.next_request().unwrap();
    let second = machine.guest.next_request().unwrap();
    machine.guest.answered(second.0, Err(Failed));
    assert!(machine.guest.next_request().is_none(), "the third is not begun");
    assert!(machine.used(0).is_empty(), "the first may still be written to");
    machine.answer(first.0, first.1);
    assert_eq!(machine.used(0), [(0, 0)]);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.guest.is_drained(0));
}

#[test]
fn a_piece_whose_data_is_not_in_memory_fails_the_request() {
    for request_type in [IN, OUT] {
        let mut machine = Machine::new();
        let flags = if request_type == IN { WRITE } else { 0 };
        machine.put_header(request_type, 0);
        let data = [
            readable(DATA, 1 << 20),
            readable(OUTSIDE, 1 << 20),
            readable(DATA, 1 << 20),
        ];
        let mut parts = vec![readable(HEADER, 16)];
        parts.extend(data.map(|part| Part { flags, ..part }));
        parts.push(writable(STATUS, 1));
        machine.offer(0, &parts);
        // All pieces that can be are in flight at the same time.
        let pieces: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
        assert_eq!(pieces.len(), if request_type == IN { 3 } else { 1 });
        for (tag, piece) in pieces {
            assert!(machine.used(0).is_empty());
            machine.answer(tag, piece);
        }
        assert_eq!(machine.used(0), [(0, u32::from(request_type == OUT))]);
        assert_eq!(machine.status(), IOERR);
    }
}

// ---- Malformed chains

#[test]
fn a_chain_without_room_for_a_status_is_given_back_all_the_same() {
    let mut machine = Machine::new();
    machine.put_header(OUT, 0);
    for parts in [
        &[readable(HEADER, 16)][..],
        &[readable(HEADER, 16), readable(DATA, 512)],
        &[readable(HEADER, 16), writable(STATUS, 0)],
        &[readable(HEADER, 0)],
    ] {
        assert_eq!(machine.serve_chain(parts), 0);
    }
    machine.assert_untouched(&[]);
    assert!(machine.asked.is_empty());
}

#[test]
fn a_short_header_is_an_error() {
    for len in [0, 1, 15] {
        let mut machine = Machine::new();
        machine.put_header(FLUSH, 0);
        let used = machine.serve_chain(&[readable(HEADER, len), writable(STATUS, 1)]);
        assert_eq!((machine.status(), used), (IOERR, 1));
        assert!(machine.asked.is_empty());
    }
}

#[test]
fn readable_after_writable_is_an_error() {
    let mut machine = Machine::new();
    for request_type in [IN, OUT] {
        for parts in [
            [readable(HEADER, 16), writable(STATUS, 1), readable(DATA, 512)],
            [writable(STATUS, 1), readable(HEADER, 16), readable(DATA, 512)],
            [readable(HEADER, 8), writable(STATUS, 1), readable(HEADER + 8, 8)],
        ] {
            machine.put_header(request_type, 0);
            assert_eq!(machine.serve_chain(&parts), 1);
            assert_eq!(machine.status(), IOERR);
        }
    }
    assert!(machine.asked.is_empty());
}

#[test]
fn addresses_outside_of_memory() {
    let end = MEMORY_BYTES;
    for outside in [end, OUTSIDE, u64::MAX, u64::MAX - 600] {
        for request_type in [IN, OUT, GET_ID] {
            let data = |address| match request_type {
                OUT => readable(address, 512),
                _ => writable(address, 512),
            };
            let mut machine = Machine::new();
            machine.put_header(request_type, 0);
            let own = &[writable(STATUS, 1), writable(DATA, 512)][..];
            // The header.
            machine.serve_chain(&[readable(outside, 16), data(DATA), writable(STATUS, 1)]);
            assert_eq!(machine.status(), IOERR);
            assert!(machine.asked.is_empty());
            // The data.
            machine.put_header(request_type, 0);
            machine.serve_chain(&[readable(HEADER, 16), data(outside), writable(STATUS, 1)]);
            assert_eq!(machine.status(), IOERR);
            machine.assert_untouched(own);
            // The status: there is no way to tell, but the chain is given back.
            machine.put_header(request_type, 0);
            let parts = [readable(HEADER, 16), data(DATA), writable(outside, 1)];
            assert_eq!(machine.serve_chain(&parts), 0);
            machine.assert_untouched(own);
        }
    }
}

#[test]
fn runs_that_cross_the_end_of_memory() {
    let mut machine = Machine::new();
    let last = MEMORY_BYTES - 256;
    machine.put_header(IN, 0);
    machine.serve_chain(&[readable(HEADER, 16), writable(last, 512), writable(STATUS, 1)]);
    assert_eq!(machine.status(), IOERR);
    machine.put_header(OUT, 0);
    machine.serve_chain(&[readable(HEADER, 16), readable(last, 512), writable(STATUS, 1)]);
    assert_eq!(machine.status(), IOERR);
    assert_eq!(
        machine.asked,
        [("read", 0, 1)],
        "nothing is written that was not read"
    );
    // The status byte is the last byte of memory.
    machine.put_header(IN, 0);
    let data = MEMORY_BYTES - 513;
    assert_eq!(
        machine.serve_chain(&[readable(HEADER, 16), writable(data, 513)]),
        513
    );
    assert_eq!(machine.get(MEMORY_BYTES - 1, 1), [OK]);
}

#[test]
fn runs_that_wrap_around_the_address_space() {
    let mut machine = Machine::new();
    for request_type in [IN, OUT] {
        machine.put_header(request_type, 0);
        let flags = if request_type == IN { WRITE } else { 0 };
        let wrapping = Part {
            flags,
            ..readable(u64::MAX - 255, 512)
        };
        machine.serve_chain(&[readable(HEADER, 16), wrapping, writable(STATUS, 1)]);
        assert_eq!(machine.status(), IOERR);
        machine.assert_untouched(&[writable(STATUS, 1)]);
    }
    // The status byte would be at address 255.
    machine.put_header(IN, 0);
    let parts = [readable(HEADER, 16), writable(u64::MAX - 256, 513)];
    assert_eq!(machine.serve_chain(&parts), 0);
    machine.assert_untouched(&[]);
}

/// Serves a malformed chain that begins with a proper header and has the status byte in it.
fn assert_malformed(machine: &mut Machine, head: u16) {
    machine.put_header(IN, 0);
    machine.offer_head(0, head);
    machine.serve_head(head);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.asked.is_empty());
}

#[test]
fn chains_that_loop_or_leave_their_table() {
    let mut machine = Machine::new();
    let put = |machine: &mut Machine, index, part, next| {
        machine.put_descriptor(0, index, &descriptor(part, NEXT, next));
    };
    // To itself, to the one before, and out of the table.
    for next in [2, 1, 64, u16::MAX] {
        put(&mut machine, 0, readable(HEADER, 16), 1);
        put(&mut machine, 1, writable(DATA, 512), 2);
        put(&mut machine, 2, writable(STATUS, 1), next);
        if next == 1 {
            // The last of 64 must be the one with the status.
            put(&mut machine, 0, readable(HEADER, 16), 3);
            put(&mut machine, 3, writable(DATA, 512), 1);
        }
        assert_malformed(&mut machine, 0);
    }
    // A header without an end.
    put(&mut machine, 0, readable(HEADER, 16), 0);
    machine.offer_head(0, 0);
    assert_eq!(machine.serve_head(0), 0);
    // The last descriptor of an indirect table goes on.
    let mut machine = Machine::new();
    machine.put(TABLE, &descriptor(readable(HEADER, 16), NEXT, 1));
    machine.put(TABLE + 16, &descriptor(writable(STATUS, 1), NEXT, 2));
    let table = Part {
        flags: INDIRECT,
        ..readable(TABLE, 32)
    };
    machine.put_descriptor(0, 0, &descriptor(table, 0, 0));
    assert_malformed(&mut machine, 0);
}

#[test]
fn indirect_tables_that_are_none() {
    let mut machine = Machine::new();
    let indirect = |address, len| Part {
        flags: INDIRECT,
        ..readable(address, len)
    };
    for table in [
        indirect(TABLE, 0),
        indirect(TABLE, 15),
        indirect(TABLE, 40),
        indirect(OUTSIDE, 32),
        indirect(u64::MAX - 15, 32),
        indirect(TABLE, 16 * 0x1_0000),
    ] {
        machine.put(TABLE, &descriptor(writable(STATUS, 1), 0, 0));
        assert_eq!(machine.serve_chain(&[table]), 0);
        // After a request that would be complete without it.
        machine.put_header(FLUSH, 0);
        machine.serve_chain(&[readable(HEADER, 16), writable(STATUS, 1), table]);
        assert_eq!(machine.status(), IOERR);
    }
    // A table in a table.
    machine.put_header(FLUSH, 0);
    machine.put(TABLE, &descriptor(readable(HEADER, 16), NEXT, 1));
    machine.put(TABLE + 16, &descriptor(writable(STATUS, 1), NEXT, 2));
    machine.put(TABLE + 32, &descriptor(indirect(TABLE, 16), 0, 0));
    machine.serve_chain(&[indirect(TABLE, 48)]);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.asked.is_empty());
}

#[test]
fn chains_longer_than_any_queue_are_refused() {
    let info = disk_info();
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    let longest = usize::from(QUEUE_SIZE_MAX);
    for (count, status) in [(longest, OK), (longest + 1, IOERR), (65535, IOERR)] {
        machine.put_header(IN, 0);
        let mut parts = vec![readable(HEADER, 16)];
        parts.resize(count - 1, writable(DATA, 512));
        parts.truncate(1023);
        // Above that the descriptors are empty: it is their number that matters.
        parts.resize(count - 1, writable(DATA, 0));
        // The status byte is where it is found at either place.
        parts.insert(1023, writable(STATUS, 1));
        if count > longest {
            parts.push(writable(STATUS, 1));
            parts.truncate(count);
        }
        let head = machine.offer_indirect(0, DATA + 0x10_0000, &parts);
        machine.serve_head(head);
        assert_eq!(machine.status(), status, "{count} descriptors");
    }
}

#[test]
fn chains_above_4_gib_are_refused() {
    let mut machine = Machine::new();
    machine.put_header(IN, 0);
    let parts = [
        readable(HEADER, 16),
        writable(STATUS, 1),
        writable(DATA, u32::MAX as usize),
        writable(STATUS, 1),
    ];
    machine.serve_chain(&parts);
    assert_eq!(machine.status(), IOERR);
    // As long as can be: too long for the disk, not for the arithmetic.
    machine.put_header(IN, 0);
    machine.serve_chain(&[
        readable(HEADER, 16),
        writable(DATA, u32::MAX as usize - 17),
        writable(STATUS, 1),
    ]);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.asked.is_empty());
}

// ---- Rings

/// A flush, whose status byte is at `STATUS + tag`.
fn offer_flush(machine: &mut Machine, ring: usize, tag: u64) -> u16 {
    machine.put(HEADER, &header(FLUSH, 0));
    machine.put(STATUS + tag, &[NO_STATUS]);
    machine.offer(ring, &[readable(HEADER, 16), writable(STATUS + tag, 1)])
}

#[test]
fn a_head_out_of_the_table_gives_up_the_ring_alone() {
    for head in [64, 65, u16::MAX] {
        let mut machine = Machine::with(disk_info(), 2, 64, MEMORY_BYTES);
        // One in flight, one behind the broken one.
        let in_flight = offer_flush(&mut machine, 0, 0);
        let (tag, _) = machine.guest.next_request().unwrap();
        machine.offer_head(0, head);
        offer_flush(&mut machine, 0, 1);
        let other = offer_flush(&mut machine, 1, 2);
        machine.serve();
        assert_eq!(machine.used(1), [(other, 1)]);
        assert!(machine.used(0).is_empty());
        assert!(!machine.guest.is_drained(0));
        machine.guest.answered(tag, Ok(&[]));
        assert_eq!(
            machine.used(0),
            [(in_flight, 1)],
            "what was in flight is given back"
        );
        assert!(machine.guest.is_drained(0));
        machine.serve();
        assert_eq!(machine.get(STATUS + 1, 1), [NO_STATUS]);
    }
}

#[test]
fn an_available_index_that_jumps_gives_up_the_ring_alone() {
    let mut machine = Machine::with(disk_info(), 2, 64, MEMORY_BYTES);
    machine.put(AVAILABLE + 2, &65u16.to_le_bytes());
    let other = offer_flush(&mut machine, 1, 0);
    machine.serve();
    assert!(machine.used(0).is_empty());
    assert!(machine.guest.is_drained(0));
    assert!(
        !machine.guest.ask_for_kicks(),
        "there is nothing to come back for"
    );
    assert_eq!(machine.used(1), [(other, 1)]);
    // It stays so until it is set up anew.
    machine.put(AVAILABLE + 2, &0u16.to_le_bytes());
    let head = offer_flush(&mut machine, 0, 1);
    machine.serve();
    assert!(machine.used(0).is_empty());
    assert!(machine.guest.refresh(0, false));
    machine.serve();
    assert_eq!(machine.used(0), [(head, 1)]);
}

#[test]
fn a_full_ring_and_indices_that_wrap() {
    let mut machine = Machine::with(disk_info(), 1, 16, MEMORY_BYTES);
    machine.vrings[0].set_queue_next_avail(u16::MAX - 3);
    machine.vrings[0].set_queue_next_used(u16::MAX - 3);
    machine.put(USED + 2, &(u16::MAX - 3).to_le_bytes());
    machine.drivers[0] = Driver {
        next_descriptor: 0,
        available: u16::MAX - 3,
        used: u16::MAX - 3,
    };
    for _ in 0..5 {
        // Sixteen chains of one descriptor each.
        machine.put(HEADER, &header(FLUSH, 0));
        let heads: Vec<u16> = (0..16)
            .map(|_| machine.offer(0, &[writable(STATUS, 1)]))
            .collect();
        machine.serve();
        let used: Vec<u16> = machine.used(0).iter().map(|(head, _)| *head).collect();
        assert_eq!(used, heads);
    }
}

#[test]
fn rings_are_served_in_turn() {
    let mut machine = Machine::with(disk_info(), 3, 64, MEMORY_BYTES);
    for index in 0..4u64 {
        for ring in 0..3u64 {
            let place = HEADER + (ring * 4 + index) * 16;
            machine.put(place, &header(IN, ring * 100 + index));
            let parts = [readable(place, 16), writable(DATA, 512), writable(STATUS, 1)];
            machine.offer(usize::try_from(ring).unwrap(), &parts);
        }
    }
    let pieces: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
    let order: Vec<u64> = pieces
        .iter()
        .map(|(_, request)| match request {
            GuestRequest::Read(range) => range.start,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(order, [0, 100, 200, 1, 101, 201, 2, 102, 202, 3, 103, 203]);
    for (tag, piece) in pieces {
        machine.answer(tag, piece);
    }
    for ring in 0..3 {
        assert_eq!(machine.used(ring).len(), 4);
    }
}

#[test]
fn a_stopped_ring_is_left_alone() {
    type Change = fn(&Vring, bool);
    let changes: [Change; 3] = [
        |vring, on| vring.set_queue_ready(on),
        |vring, on| vring.set_enabled(on),
        |vring, on| vring.set_kick(on.then(|| File::open("/dev/null").unwrap())),
    ];
    for change in changes {
        let mut machine = Machine::new();
        let first = offer_flush(&mut machine, 0, 0);
        let (tag, _) = machine.guest.next_request().unwrap();
        let second = offer_flush(&mut machine, 0, 1);
        change(&machine.vrings[0], false);
        assert!(!machine.guest.refresh(0, false));
        assert!(machine.guest.next_request().is_none());
        assert!(!machine.guest.ask_for_kicks());
        assert!(!machine.guest.is_drained(0));
        machine.guest.answered(tag, Ok(&[]));
        assert!(machine.guest.is_drained(0));
        assert_eq!(machine.used(0), [(first, 1)]);
        let before = machine.all_memory();
        machine.serve();
        machine.guest.signal();
        assert!(
            before == machine.all_memory(),
            "memory of a stopped ring is touched"
        );
        // Started again, it goes on where it was.
        change(&machine.vrings[0], true);
        assert!(machine.guest.refresh(0, false));
        machine.serve();
        assert_eq!(machine.used(0), [(second, 1)]);
    }
}

#[test]
fn a_ring_that_lost_its_readiness_is_not_popped_even_before_the_device_is_told() {
    let mut machine = Machine::new();
    let head = offer_flush(&mut machine, 0, 0);
    for change in [VringT::set_queue_ready, VringT::set_enabled] {
        change(&machine.vrings[0], false);
        assert!(machine.guest.next_request().is_none());
        assert!(machine.guest.is_drained(0));
        change(&machine.vrings[0], true);
    }
    // Nor is it given up.
    machine.serve();
    assert_eq!(machine.used(0), [(head, 1)]);
}

#[test]
fn a_ring_outside_of_memory_is_not_served() {
    let mut machine = Machine::new();
    offer_flush(&mut machine, 0, 0);
    for (table, available, used) in [
        (OUTSIDE, AVAILABLE, USED),
        (0, OUTSIDE, USED),
        (0, AVAILABLE, OUTSIDE),
        (0, AVAILABLE, MEMORY_BYTES - 16),
    ] {
        machine.vrings[0].set_queue_info(table, available, used).unwrap();
        assert!(!machine.guest.refresh(0, false));
        assert!(machine.guest.next_request().is_none());
    }
    machine.vrings[0].set_queue_info(0, AVAILABLE, USED).unwrap();
    assert!(machine.guest.refresh(0, false));
    machine.serve();
    assert_eq!(machine.used(0).len(), 1);
}

/// With event indices the driver says after which entry it wants to be told, without them it is always told.
#[test]
fn the_driver_is_told_when_it_wants_to_be() {
    let mut machine = Machine::new();
    let (mut told, call) = std::io::pipe().unwrap();
    machine.vrings[0].set_call(Some(File::from(std::os::fd::OwnedFd::from(call))));
    machine.vrings[0].set_queue_event_idx(true);
    let used_event = AVAILABLE + 4 + 2 * 64;
    machine.put(used_event, &2u16.to_le_bytes());
    for expected in [false, false, true, false] {
        offer_flush(&mut machine, 0, 0);
        machine.serve();
        machine.guest.signal();
        // A second call has nothing to tell.
        machine.guest.signal();
        assert_eq!(pending(&told), expected);
        if expected {
            told.read_exact(&mut [0; 8]).unwrap();
            assert!(!pending(&told), "told once");
        }
    }
}

fn pending(pipe: &std::io::PipeReader) -> bool {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd {
        fd: pipe.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one initialised pollfd, valid for the call, which does not wait.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 }
}

#[test]
fn kicks_are_asked_for_only_when_there_is_nothing_to_do() {
    let mut machine = Machine::new();
    const NO_NOTIFY: u16 = 1;
    offer_flush(&mut machine, 0, 0);
    let (tag, _) = machine.guest.next_request().unwrap();
    assert_eq!(machine.get_u16(USED), NO_NOTIFY);
    machine.guest.answered(tag, Ok(&[]));
    // What came in between, without a kick, is not lost.
    offer_flush(&mut machine, 0, 1);
    assert!(machine.guest.ask_for_kicks());
    assert_eq!(machine.get_u16(USED), 0);
    machine.serve();
    assert!(!machine.guest.ask_for_kicks());
    assert_eq!(machine.used(0).len(), 2);
}

// ---- Properties

/// Cuts a stretch of bytes at these places (parts of a thousand) and spreads the pieces over memory from
/// `base` on, in either direction. Places may be equal: then a descriptor is empty.
fn spread(len: usize, places: &[u16], base: u64, backwards: bool, flags: u16) -> Vec<Part> {
    let mut cuts: Vec<usize> = places
        .iter()
        .map(|place| len * usize::from(*place) / 1000)
        .collect();
    cuts.extend([0, len]);
    cuts.sort_unstable();
    let lengths: Vec<usize> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let mut addresses: Vec<u64> = Vec::new();
    let mut address = base;
    for len in if backwards {
        lengths.iter().rev().collect::<Vec<_>>()
    } else {
        lengths.iter().collect()
    } {
        addresses.push(address);
        address += *len as u64 + 3;
    }
    if backwards {
        addresses.reverse();
    }
    let parts = addresses.into_iter().zip(lengths);
    parts
        .map(|(address, len)| Part {
            flags,
            ..readable(address, len)
        })
        .collect()
}

fn gather(machine: &Machine, parts: &[Part]) -> Vec<u8> {
    let pieces = parts
        .iter()
        .map(|part| machine.get(part.address, part.len as usize));
    pieces.collect::<Vec<_>>().concat()
}

fn scatter(machine: &mut Machine, parts: &[Part], mut bytes: &[u8]) {
    for part in parts {
        let (piece, rest) = bytes.split_at(part.len as usize);
        machine.put(part.address, piece);
        bytes = rest;
    }
}

fn small_disk() -> DiskInfo {
    DiskInfo {
        capacity_sectors: 32,
        ..disk_info()
    }
}

proptest! {
    /// However a request is cut into descriptors, it is the same request.
    #[test]
    fn any_legal_split_is_the_same_request(
        request_type in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(77)],
        sector in 0..34u64,
        sectors in 0..8usize,
        readable_cuts in vec(0..=1000u16, 0..12),
        writable_cuts in vec(0..=1000u16, 0..12),
        backwards: bool,
        indirect: bool,
    ) {
        let mut machine = Machine::with(small_disk(), 1, 32, 0x3_0000);
        let disk_before = machine.disk.clone();
        let data_bytes = sectors * 512;
        let out_bytes = if request_type == OUT { data_bytes } else { 0 };
        let in_bytes = match request_type {
            IN => data_bytes,
            GET_ID => 20,
            _ => 0,
        };
        let input: Vec<u8> = (0..out_bytes).map(|place| (place * 7).to_le_bytes()[0] & 0x7f).collect();
        let read = spread(16 + out_bytes, &readable_cuts, 0x1_0000, backwards, 0);
        let written = spread(in_bytes + 1, &writable_cuts, 0x2_0000, backwards, WRITE);
        scatter(&mut machine, &read, &[&header(request_type, sector)[..], &input].concat());
        scatter(&mut machine, &written, &vec![NO_STATUS; in_bytes + 1]);
        let parts = [&read[..], &written].concat();
        let head = if indirect {
            machine.offer_indirect(0, 0x8000, &parts)
        } else {
            machine.offer(0, &parts)
        };
        let used = machine.serve_head(head);

        let fits = sector + sectors as u64 <= 32;
        let status = match request_type {
            IN | OUT if !fits => IOERR,
            77 => UNSUPP,
            _ => OK,
        };
        let got = gather(&machine, &written);
        prop_assert_eq!(got[in_bytes], status);
        let full = status == OK || in_bytes == 0;
        prop_assert_eq!(used as usize, if full { in_bytes + 1 } else { 0 });
        let start = usize::try_from(sector).unwrap() * 512;
        let mut disk = disk_before;
        if status == OK {
            match request_type {
                IN => prop_assert!(got[..in_bytes] == disk[start..start + in_bytes]),
                OUT => disk[start..start + out_bytes].copy_from_slice(&input),
                GET_ID => prop_assert!(got.starts_with(SERIAL.as_bytes())),
                _ => {}
            }
        }
        prop_assert!(machine.disk == disk);
        machine.assert_untouched(&written);
    }
}

/// Zones of the soup's memory: rings, indirect tables, and everything else.
const SOUP_TABLES: u64 = 2 * RING_BYTES;
const SOUP_TABLE_ENTRIES: u16 = 64;
const SOUP_DATA: u64 = SOUP_TABLES + 16 * SOUP_TABLE_ENTRIES as u64;
const SOUP_END: u64 = SOUP_DATA + 0x4000;
/// Headers that make sense, at the start of the data.
const SOUP_HEADERS: [(u32, u64); 8] = [
    (IN, 0),
    (IN, 31),
    (OUT, 3),
    (OUT, u64::MAX),
    (FLUSH, 0),
    (GET_ID, 0),
    (IN, 32),
    (1234, 0),
];

#[derive(Clone, Copy, Debug)]
struct SoupDescriptor {
    part: Part,
    flags: u16,
    next: u16,
}

fn soup_descriptor() -> impl Strategy<Value = SoupDescriptor> {
    let address = prop_oneof![
        4 => (0..8u64).prop_map(|index| SOUP_DATA + 16 * index),
        8 => SOUP_DATA..SOUP_END,
        1 => SOUP_END - 20..SOUP_END + 20,
        1 => (0..20u64).prop_map(|back| u64::MAX - back),
        1 => Just(OUTSIDE),
    ];
    let len = prop_oneof![
        4 => Just(16),
        3 => Just(1),
        4 => Just(512),
        1 => Just(513),
        1 => Just(0),
        1 => 0..2000u32,
        1 => Just(u32::MAX),
    ];
    let flags = prop_oneof![
        2 => Just(0),
        6 => Just(NEXT),
        4 => Just(WRITE),
        6 => Just(NEXT | WRITE),
        3 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    let table = (0..SOUP_TABLE_ENTRIES, 0..20u32, 0..15u32);
    (address, len, flags, 0..18u16, table).prop_map(|(address, len, flags, next, table)| {
        let (entry, entries, odd) = table;
        let part = if flags & INDIRECT == 0 {
            Part {
                address,
                len,
                flags: 0,
            }
        } else {
            Part {
                address: SOUP_TABLES + 16 * u64::from(entry),
                len: if odd == 1 { 7 } else { 16 * entries },
                flags: 0,
            }
        };
        SoupDescriptor { part, flags, next }
    })
}

#[derive(Clone, Copy, Debug)]
enum SoupStep {
    Offer { ring: usize, head: u16 },
    Serve,
    Answer { which: usize, fail: bool },
    Kick,
}

fn soup_step() -> impl Strategy<Value = SoupStep> {
    let head = prop_oneof![60 => 0..16u16, 1 => any::<u16>()];
    prop_oneof![
        8 => (0..2usize, head).prop_map(|(ring, head)| SoupStep::Offer { ring, head }),
        4 => Just(SoupStep::Serve),
        4 => (any::<usize>(), prop::bool::weighted(0.2))
            .prop_map(|(which, fail)| SoupStep::Answer { which, fail }),
        1 => Just(SoupStep::Kick),
    ]
}

proptest! {
    /// Whatever a guest puts into its tables and in whatever order answers come: every chain that is taken is
    /// given back once, and nothing is written but what it may be.
    #[test]
    fn any_descriptor_soup_comes_back_once_and_touches_nothing_else(
        tables in vec(vec(soup_descriptor(), 16), 2),
        indirect in vec(soup_descriptor(), usize::from(SOUP_TABLE_ENTRIES)),
        steps in vec(soup_step(), 1..80),
        event_idx: bool,
    ) {
        let mut machine = Machine::with(small_disk(), 2, 16, SOUP_END);
        machine.put(SOUP_DATA, &vec![0xa5; usize::try_from(SOUP_END - SOUP_DATA).unwrap()]);
        for (index, (request_type, sector)) in SOUP_HEADERS.into_iter().enumerate() {
            machine.put(SOUP_DATA + 16 * index as u64, &header(request_type, sector));
        }
        let mut writable: Vec<Part> = Vec::new();
        let places = (0..2u64).flat_map(|ring| (0..16).map(move |index| ring * RING_BYTES + 16 * index));
        let places = places.chain((0..u64::from(SOUP_TABLE_ENTRIES)).map(|index| SOUP_TABLES + 16 * index));
        let soup = tables.iter().flatten().chain(&indirect);
        for (place, SoupDescriptor { part, flags, next }) in places.zip(soup) {
            machine.put(place, &descriptor(*part, *flags, *next));
            if flags & WRITE != 0 && flags & INDIRECT == 0 {
                writable.push(Part { flags: *flags, ..*part });
            }
        }
        for vring in &machine.vrings {
            vring.set_queue_event_idx(event_idx);
        }
        let mut offered = [Vec::new(), Vec::new()];
        let mut given_back = [Vec::new(), Vec::new()];
        let mut in_flight = Vec::new();
        for step in steps.into_iter().chain([SoupStep::Serve]) {
            match step {
                // No more than the ring has room for.
                SoupStep::Offer { ring, head } => {
                    if offered[ring].len() - given_back[ring].len() < 16 {
                        machine.offer_head(ring, head);
                        offered[ring].push(head);
                    }
                }
                SoupStep::Serve => in_flight.extend(std::iter::from_fn(|| machine.guest.next_request())),
                SoupStep::Answer { which, fail } if !in_flight.is_empty() => {
                    let (tag, request) = in_flight.swap_remove(which % in_flight.len());
                    machine.bad_sector = match &request {
                        GuestRequest::Read(range) | GuestRequest::Write { range, .. } if fail => {
                            Some(range.start)
                        }
                        _ => None,
                    };
                    machine.answer(tag, request);
                }
                SoupStep::Answer { .. } => {}
                SoupStep::Kick => {
                    machine.guest.signal();
                    machine.guest.ask_for_kicks();
                }
            }
            for (ring, given_back) in given_back.iter_mut().enumerate() {
                given_back.extend(machine.used(ring).into_iter().map(|(head, _)| head));
            }
        }
        for (tag, request) in in_flight {
            machine.guest.answered(tag, match &request {
                GuestRequest::Read(range) => {
                    let start = usize::try_from(range.start * 512).unwrap();
                    Ok(&machine.disk[start..start + usize::try_from(range.count * 512).unwrap()])
                }
                _ => Ok(&[]),
            });
        }
        for ring in 0..2 {
            prop_assert!(machine.guest.is_drained(ring));
            given_back[ring].extend(machine.used(ring).into_iter().map(|(head, _)| head));
            // A head that is none ends the ring.
            let taken = offered[ring].iter().copied().take_while(|head| *head < 16);
            let mut taken: Vec<u16> = taken.collect();
            taken.sort_unstable();
            given_back[ring].sort_unstable();
            prop_assert_eq!(&given_back[ring], &taken);
        }
        machine.assert_untouched(&writable);
    }
}
