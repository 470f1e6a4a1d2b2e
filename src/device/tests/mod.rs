//! The device on raw virtqueue memory: descriptors written byte by byte, as a driver or an attacker
//! would, and an engine that each test answers for.

mod chains;
mod frontend;
mod held;
pub(super) mod inflight;
mod logging;
mod properties;
mod protocol;
mod requests;
mod virtqueues;
mod zeroes;

use std::fs::File;
use std::ops::Range;

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD as DISCARD, VIRTIO_BLK_T_FLUSH as FLUSH, VIRTIO_BLK_T_GET_ID as GET_ID,
    VIRTIO_BLK_T_IN as IN, VIRTIO_BLK_T_OUT as OUT, VIRTIO_BLK_T_WRITE_ZEROES as WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryBackend};

use super::guest::Guest;
use super::{Capacity, DiskInfo, GuestMemory, Vring};
use crate::common::SectorRange;
use crate::common::buffer::BufferPool;
use crate::engine::{Failed, FragmentId, GuestRequest};
use crate::limits::{FRAGMENT_BYTES_MAX, QUEUE_SIZE_MAX};

const FAILED: Failed = Failed {
    no_space: false,
    by_flush: false,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// The status byte before the device answers.
const NO_STATUS: u8 = 0xff;

/// Bytes of memory for each virtqueue: descriptor table, available ring, used ring.
const QUEUE_BYTES: u64 = 0x8000;
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
    // The device ignores the reserved field, which was once a priority.
    let mut bytes = [0xee; 16];
    bytes[..4].copy_from_slice(&request_type.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// A segment of a discard or write-zeroes request.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// The driver's view of a virtqueue.
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
    /// The engine fails fragments with this sector.
    failing_sector: Option<u64>,
    /// The fragments that the engine got: kind, first sector and length in sectors.
    asked: Vec<(&'static str, u64, u64)>,
    /// The last write had to be durable.
    durable: bool,
}

fn disk_info() -> DiskInfo {
    DiskInfo {
        capacity: Capacity::new(6144),
        block_bytes: 512,
        physical_block_bytes: 512,
        read_only: false,
        serial: SERIAL.to_owned(),
        num_queues: 1,
        segments_max: 126,
    }
}

/// Virtqueues as the frontend sets them up: at their places in memory, and started.
fn queues_over(
    memory: &GuestMemoryAtomic<GuestMemory>,
    count: usize,
    queue_size: u16,
) -> Vec<Vring> {
    let set_up = |queue| {
        let vring = Vring::new(memory.clone(), queue_size).unwrap();
        let base = queue as u64 * QUEUE_BYTES;
        vring
            .set_queue_info(base, base + AVAILABLE, base + USED)
            .unwrap();
        vring.set_queue_next_used(vring.queue_used_idx().unwrap());
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        vring.set_kick(Some(File::open("/dev/null").unwrap()));
        vring
    };
    (0..count).map(set_up).collect()
}

impl Machine {
    /// One with one virtqueue of 64 entries.
    fn new() -> Self {
        Self::with(disk_info(), 1, 64, MEMORY_BYTES)
    }

    fn with(info: DiskInfo, queues: usize, queue_size: u16, memory_bytes: u64) -> Self {
        let bytes = usize::try_from(memory_bytes).unwrap();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        let shared = GuestMemoryAtomic::new(memory.clone());
        let vrings = (0..queues).map(|_| Vring::new(shared.clone(), queue_size).unwrap());
        Self::on(info, memory, shared.clone(), vrings.collect(), queue_size)
    }

    /// One whose driver and device see the same memory, from address 0 on, each in its own way.
    fn on(
        info: DiskInfo,
        memory: GuestMemory,
        shared: GuestMemoryAtomic<GuestMemory>,
        vrings: Vec<Vring>,
        queue_size: u16,
    ) -> Self {
        let queues = vrings.len();
        for (base, vring) in (0..)
            .step_by(usize::try_from(QUEUE_BYTES).unwrap())
            .zip(&vrings)
        {
            vring
                .set_queue_info(base, base + AVAILABLE, base + USED)
                .unwrap();
            vring.set_queue_ready(true);
            vring.set_enabled(true);
            vring.set_kick(Some(File::open("/dev/null").unwrap()));
        }
        // Each byte depends on its place, and none of them is a small number. Tests of larger disks
        // use their first part only.
        let disk = (0..info.capacity.sectors().min(1 << 16) * 512)
            .map(|place| (place / 512 * 31 + place).to_le_bytes()[0] | 0x80)
            .collect();
        let mut guest = Guest::new(info, shared, vrings.clone(), BufferPool::default());
        for queue in 0..queues {
            assert!(guest.refresh(queue, false));
        }
        let bytes = usize::try_from(memory.last_addr().0 + 1).unwrap();
        Self {
            memory,
            written: vec![0; bytes],
            vrings,
            guest,
            queue_size,
            drivers: vec![Driver::default(); queues],
            disk,
            failing_sector: None,
            asked: Vec::new(),
            durable: false,
        }
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
        let start = usize::try_from(address).unwrap();
        self.written[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
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

    /// Writes a descriptor into a virtqueue's table.
    fn put_descriptor(&mut self, queue: usize, index: u16, bytes: &[u8; 16]) {
        self.put(queue as u64 * QUEUE_BYTES + u64::from(index) * 16, bytes);
    }

    /// Makes a chain head available.
    fn offer_head(&mut self, queue: usize, head: u16) {
        let base = queue as u64 * QUEUE_BYTES + AVAILABLE;
        let driver = &mut self.drivers[queue];
        let slot = driver.available % self.queue_size;
        driver.available = driver.available.wrapping_add(1);
        let index = driver.available;
        self.put(base + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.put(base + 2, &index.to_le_bytes());
    }

    /// Makes a chain of these parts available; returns its head.
    fn offer(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let head = self.drivers[queue].next_descriptor;
        for (index, &part) in parts.iter().enumerate() {
            let next = (self.drivers[queue].next_descriptor + 1) % self.queue_size;
            let flags = if index + 1 < parts.len() { NEXT } else { 0 };
            let descriptor = descriptor(part, flags, next);
            self.put_descriptor(queue, self.drivers[queue].next_descriptor, &descriptor);
            self.drivers[queue].next_descriptor = next;
        }
        self.offer_head(queue, head);
        head
    }

    /// Makes a chain of these parts available in an indirect table at `table`; returns its head.
    fn offer_indirect(&mut self, queue: usize, table: u64, parts: &[Part]) -> u16 {
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
        self.offer(queue, &[reference])
    }

    /// Heads and lengths that were put on a used ring since the last call.
    fn used(&mut self, queue: usize) -> Vec<(u16, u32)> {
        let base = queue as u64 * QUEUE_BYTES + USED;
        let index = self.get_u16(base + 2);
        let mut entries = Vec::new();
        while self.drivers[queue].used != index {
            let slot = u64::from(self.drivers[queue].used % self.queue_size);
            let id = self.get_u32(base + 4 + 8 * slot);
            entries.push((
                u16::try_from(id).unwrap(),
                self.get_u32(base + 8 + 8 * slot),
            ));
            self.drivers[queue].used = self.drivers[queue].used.wrapping_add(1);
        }
        entries
    }

    /// Answers a fragment as the engine would.
    fn answer(&mut self, tag: FragmentId, request: GuestRequest) {
        let (name, range) = match &request {
            GuestRequest::Read(range) => ("read", *range),
            GuestRequest::Write { range, .. } | GuestRequest::WriteWithoutMemory(range) => {
                ("write", *range)
            }
            GuestRequest::Zero { range, unmap, .. } => {
                (if *unmap { "unmap" } else { "zero" }, *range)
            }
            GuestRequest::Flush => ("flush", SectorRange::new(0, 0)),
        };
        self.asked.push((name, range.start, range.count));
        let place = usize::try_from(range.start * 512).unwrap()
            ..usize::try_from(range.end() * 512).unwrap();
        let is_bad = |sector| (range.start..range.end()).contains(&sector);
        let result: Result<&[u8], Failed> = match request {
            _ if self.failing_sector.is_some_and(is_bad) => Err(FAILED),
            GuestRequest::WriteWithoutMemory(_) => Err(FAILED),
            GuestRequest::Read(_) => Ok(&self.disk[place]),
            GuestRequest::Write { data, durable, .. } => {
                self.disk[place].copy_from_slice(&data);
                self.durable = durable;
                Ok(&[])
            }
            GuestRequest::Zero { durable, .. } => {
                self.disk[place].fill(0);
                self.durable = durable;
                Ok(&[])
            }
            GuestRequest::Flush => Ok(&[]),
        };
        self.guest.answered(tag, result);
        self.guest.self_check();
    }

    /// Serves until the virtqueues are empty.
    fn serve(&mut self) {
        while let Some((tag, request)) = self.guest.next_request() {
            self.answer(tag, request);
        }
    }

    /// Serves one chain of the first virtqueue; returns the length on the used ring.
    fn serve_chain(&mut self, parts: &[Part]) -> u32 {
        let head = self.offer(0, parts);
        self.serve_head(head)
    }

    fn serve_head(&mut self, head: u16) -> u32 {
        self.serve();
        let used = self.used(0);
        assert_eq!(used.len(), 1, "completed once");
        assert_eq!(used[0].0, head);
        assert!(self.guest.is_drained(0));
        used[0].1
    }

    /// Asserts that guest memory is as the driver has written it, but for the writable ones of
    /// these parts and the used rings.
    fn assert_untouched(&self, except: &[Part]) {
        const CHUNK: usize = 256;
        let queues = (0..self.drivers.len() as u64).map(|queue| queue * QUEUE_BYTES);
        let queues = queues.map(|base| base + USED..base + QUEUE_BYTES);
        let except = except.iter().filter(|part| part.flags & WRITE != 0);
        let allowed: Vec<Range<u64>> = queues.chain(except.map(Part::range)).collect();
        let memory = self.all_memory();
        for (chunk, (now, then)) in memory
            .chunks(CHUNK)
            .zip(self.written.chunks(CHUNK))
            .enumerate()
        {
            if now == then {
                continue;
            }
            for (index, (now, then)) in now.iter().zip(then).enumerate() {
                let place = (chunk * CHUNK + index) as u64;
                let is_allowed = allowed.iter().any(|range| range.contains(&place));
                assert!(
                    now == then || is_allowed,
                    "memory at {place:#x} was written to"
                );
            }
        }
    }
}

fn bytes_of(disk: &[u8], sector: usize, len: usize) -> Vec<u8> {
    disk[sector * 512..sector * 512 + len].to_vec()
}

/// `len` bytes at `address`, in parts of these lengths over and over.
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

fn gather(machine: &Machine, parts: &[Part]) -> Vec<u8> {
    let contents = parts
        .iter()
        .map(|part| machine.get(part.address, part.len as usize));
    contents.collect::<Vec<_>>().concat()
}
