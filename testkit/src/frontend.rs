//! A VMM as small as possible: a vhost-user frontend over the `vhost` crate's, guest memory in a
//! memfd, and the driver's side of split virtqueues.
//!
//! [`Vmm`] sends messages like QEMU or like cloud-hypervisor. Its memory and its virtqueues outlive
//! a connection, as a guest outlives the daemon that serves its disk: the next daemon finds the
//! chains that were added before. Every chain that is returned is checked: it was outstanding, and
//! returns once.

use crate::HANG_LIMIT;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{
    Error, Frontend, VhostUserFrontend, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT,
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::process::wait_until;

/// Bytes of the configuration space that both VMMs ask for.
const CONFIG_BYTES: u32 = 60;
/// Where guest memory begins; not at zero, so that an offset is never mistaken for an address.
const MEMORY_START: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Descriptors of one indirect table.
const INDIRECT_MAX: usize = 128;
const HEADER_BYTES: u64 = 16;
const DESCRIPTOR_BYTES: u64 = 16;

/// The VMM to imitate: which messages are sent, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// QEMU: gets the inflight region before it sets memory and virtqueues; the vring base is the
    /// used index when the backend was lost; kicks after it has connected again.
    Qemu,
    /// cloud-hypervisor: NEED_REPLY on everything after the protocol features, sizes of all queues
    /// first, the vring base is the guest's available index, no kick after it has connected
    /// again.
    CloudHypervisor,
}

/// The configuration of a VMM.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The VMM to imitate.
    pub style: Style,
    /// How many queues the guest uses.
    pub queues: usize,
    /// Entries of each.
    pub queue_size: u16,
    /// Feature bits that the driver would take.
    pub features: u64,
    /// Protocol features that the VMM would take.
    pub protocol_features: VhostUserProtocolFeatures,
    /// Requests that a queue has memory for.
    pub slots: usize,
    /// Data bytes of a request, at most.
    pub data_bytes: usize,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            style: Style::Qemu,
            queues: 1,
            queue_size: 128,
            features: u64::MAX ^ VhostUserVirtioFeatures::LOG_ALL.bits(),
            protocol_features: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::RESET_DEVICE,
            slots: 32,
            data_bytes: 64 << 10,
        }
    }
}

// ---- Requests

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

    fn header(&self) -> [u8; 16] {
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

// ---- The driver's side of a queue

/// The driver's side of a split virtqueue, and the memory of its requests.
pub struct Queue {
    memory: GuestMemoryMmap<()>,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    slots: u64,
    slot_bytes: u64,
    slot_count: usize,
    free_slots: Vec<usize>,
    free_descriptors: Vec<u16>,
    outstanding: Vec<Option<Outstanding>>,
    /// Where the next chain goes on the available ring. Chains before it may not be published yet.
    next_available: u16,
    published: u16,
    /// The published index at the last kick, or when the device last suppressed one.
    kicked: u16,
    next_used: u16,
    event_idx: bool,
    kick: EventFd,
    call: EventFd,
    epoll: Epoll,
    /// Chains returned so far.
    pub completed: u64,
}

struct Outstanding {
    descriptors: Vec<u16>,
    /// The memory of a request; a chain built by hand has none.
    slot: Option<Slot>,
}

struct Slot {
    index: usize,
    data: u64,
    bytes: usize,
}

impl Queue {
    /// Bytes of guest memory for one virtqueue.
    fn bytes(plan: &Plan) -> u64 {
        Self::virtqueue_bytes(plan.queue_size) + plan.slots as u64 * Self::slot_bytes(plan)
    }

    fn virtqueue_bytes(size: u16) -> u64 {
        (u64::from(size) * (DESCRIPTOR_BYTES + 2 + 8) + 12 + 8).next_multiple_of(PAGE)
    }

    /// A page for the indirect table, its end for the header; data; the status.
    fn slot_bytes(plan: &Plan) -> u64 {
        PAGE + (plan.data_bytes as u64 + 1).next_multiple_of(PAGE)
    }

    fn new(memory: GuestMemoryMmap<()>, plan: &Plan, start: u64) -> Self {
        let size = u64::from(plan.queue_size);
        let available = start + size * DESCRIPTOR_BYTES;
        let used = (available + 6 + 2 * size).next_multiple_of(4);
        let [kick, call] = [(); 2].map(|()| EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd"));
        let epoll = watch([&call]);
        let mut queue = Self {
            memory,
            size: plan.queue_size,
            descriptors: start,
            available,
            used,
            slots: start + Self::virtqueue_bytes(plan.queue_size),
            slot_bytes: Self::slot_bytes(plan),
            slot_count: plan.slots,
            free_slots: Vec::new(),
            free_descriptors: Vec::new(),
            outstanding: Vec::new(),
            next_available: 0,
            published: 0,
            kicked: 0,
            next_used: 0,
            event_idx: false,
            kick,
            call,
            epoll,
            completed: 0,
        };
        queue.reset();
        queue
    }

    /// Empties the virtqueue, like a driver that sets up the device. The device does not use it
    /// then.
    pub fn reset(&mut self) {
        let zeroes = vec![0; usize::try_from(self.slots - self.descriptors).expect("small")];
        self.write(self.descriptors, &zeroes);
        self.free_slots = (0..self.slot_count).collect();
        self.free_descriptors = (0..self.size).collect();
        self.outstanding = (0..self.size).map(|_| None).collect();
        (
            self.next_available,
            self.published,
            self.kicked,
            self.next_used,
        ) = (0, 0, 0, 0);
        // Calls and kicks from before the reset.
        self.take_calls();
        let _ = self.kick.read();
    }

    /// Empties the virtqueue, and begins its indices at `index`, as after that many chains.
    pub fn reset_to(&mut self, index: u16) {
        self.reset();
        (
            self.next_available,
            self.published,
            self.kicked,
            self.next_used,
        ) = (index, index, index, index);
        self.store(self.available + 2, index);
        self.store(self.used + 2, index);
    }

    /// Guest address of the page for the header and the table of a request in slot `index`,
    /// followed by its data; for chains built by hand.
    pub fn slot_page(&self, index: usize) -> u64 {
        self.slots + index as u64 * self.slot_bytes
    }

    /// Guest addresses of descriptor table, available ring and used ring.
    pub fn virtqueue_addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// How many chains the device has.
    pub fn outstanding(&self) -> usize {
        self.outstanding.iter().flatten().count()
    }

    /// Whether there is room for another request.
    pub fn has_room(&self, layout: Layout) -> bool {
        let wanted = match (layout.indirect, layout.cut) {
            (true, _) => 1,
            (false, Cut::Parts(count)) => 2 * count,
            (false, _) => 3,
        };
        !self.free_slots.is_empty() && self.free_descriptors.len() >= wanted
    }

    /// Adds a request to the available ring; it is not published yet. There must be room.
    pub fn add(&mut self, request: &Request, layout: Layout) -> u16 {
        let index = self.free_slots.pop().expect("memory for a request");
        let start = self.slots + index as u64 * self.slot_bytes;
        let data = start + PAGE;
        let written = data + request.out.len() as u64;
        let status = written + request.in_bytes as u64;
        assert!(
            status < start + self.slot_bytes,
            "a request that is too long"
        );
        self.write(data - HEADER_BYTES, &request.header());
        self.write(data, &request.out);
        // No device writes this status.
        self.write(written, &vec![0xee; request.in_bytes + 1]);
        let borders = [data - HEADER_BYTES, data, written, status, status + 1];
        let segments = match layout.cut {
            Cut::Fields => segments(&borders[..3], false)
                .chain(segments(&borders[2..], true))
                .collect(),
            Cut::Joined => segments(&[borders[0], borders[2]], false)
                .chain(segments(&[borders[2], borders[4]], true))
                .collect(),
            Cut::Parts(count) => segments(&cut(borders[0], borders[2], count), false)
                .chain(segments(&cut(borders[2], borders[4], count), true))
                .collect::<Vec<_>>(),
        };
        let head = self.add_segments(&segments, layout.indirect.then_some(start));
        let slot = Slot {
            index,
            data: written,
            bytes: request.in_bytes,
        };
        self.outstanding[usize::from(head)]
            .as_mut()
            .expect("just added")
            .slot = Some(slot);
        head
    }

    /// Adds a chain built by hand, in an indirect table at guest address `indirect` if given.
    pub fn add_segments(&mut self, segments: &[Segment], indirect: Option<u64>) -> u16 {
        let descriptors = if let Some(table) = indirect {
            assert!(segments.len() <= INDIRECT_MAX);
            for (index, segment) in segments.iter().enumerate() {
                let next = (index + 1 < segments.len()).then(|| small(index + 1));
                self.write_descriptor(table, small(index), *segment, next);
            }
            let head = self.free_descriptors.pop().expect("a free descriptor");
            let len = u32::try_from(segments.len() as u64 * DESCRIPTOR_BYTES).expect("short");
            let flags = flag(VRING_DESC_F_INDIRECT);
            let descriptor = Descriptor::new(table, len, flags, 0);
            self.write_raw_descriptor(self.descriptors, head, descriptor);
            vec![head]
        } else {
            let left = self.free_descriptors.len() - segments.len();
            let descriptors = self.free_descriptors.split_off(left);
            for (index, segment) in segments.iter().enumerate() {
                let next = descriptors.get(index + 1).copied();
                self.write_descriptor(self.descriptors, descriptors[index], *segment, next);
            }
            descriptors
        };
        let head = descriptors[0];
        let outstanding = Outstanding {
            descriptors,
            slot: None,
        };
        self.outstanding[usize::from(head)] = Some(outstanding);
        self.add_head(head);
        head
    }

    /// Puts a head on the available ring, valid or not.
    pub fn add_head(&mut self, head: u16) {
        let place = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.store(place, head);
        self.next_available = self.next_available.wrapping_add(1);
    }

    fn write_descriptor(&self, table: u64, index: u16, segment: Segment, next: Option<u16>) {
        let mut flags = 0;
        if segment.writable {
            flags |= flag(VRING_DESC_F_WRITE);
        }
        if next.is_some() {
            flags |= flag(VRING_DESC_F_NEXT);
        }
        let descriptor = Descriptor::new(segment.address, segment.len, flags, next.unwrap_or(0));
        self.write_raw_descriptor(table, index, descriptor);
    }

    /// Writes to a descriptor table.
    pub fn write_raw_descriptor(&self, table: u64, index: u16, descriptor: Descriptor) {
        let address = GuestAddress(table + u64::from(index) * DESCRIPTOR_BYTES);
        self.memory
            .write_obj(descriptor, address)
            .expect("within guest memory");
    }

    /// Publishes the added chains. Returns whether the device wants a kick.
    pub fn publish(&mut self) -> bool {
        self.published = self.next_available;
        self.memory
            .store(
                self.published,
                GuestAddress(self.available + 2),
                Ordering::Release,
            )
            .expect("within guest memory");
        fence(Ordering::SeqCst);
        let (old, new) = (self.kicked, self.published);
        self.kicked = new;
        if self.event_idx {
            let event: u16 = self.load(self.used + 4 + 8 * u64::from(self.size));
            // virtio 1.3, 2.7.10.1
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u32::from(self.load(self.used)) & VRING_USED_F_NO_NOTIFY == 0
        }
    }

    /// Kicks the device, even if it wants no kick.
    pub fn kick(&self) {
        self.kick.write(1).expect("kicking");
    }

    /// Adds, publishes, and kicks if the device wants it.
    pub fn submit(&mut self, request: &Request, layout: Layout) -> u16 {
        let head = self.add(request, layout);
        if self.publish() {
            self.kick();
        }
        head
    }

    /// The used index: chains that the device has returned, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        self.memory
            .load(GuestAddress(self.used + 2), Ordering::Acquire)
            .expect("within guest memory")
    }

    /// Whether the device has returned chains that were not popped.
    pub fn has_used(&self) -> bool {
        self.used_index() != self.next_used
    }

    /// The next chain that the device has returned. Panics if the device did not have it.
    pub fn pop(&mut self) -> Option<Completion> {
        let given_back = self.used_index().wrapping_sub(self.next_used);
        if given_back == 0 {
            return None;
        }
        assert!(
            usize::from(given_back) <= self.outstanding(),
            "{given_back} chains came back, {} were with the device",
            self.outstanding()
        );
        let place = self.used + 4 + 8 * u64::from(self.next_used % self.size);
        let [id, written]: [u32; 2] = [place, place + 4].map(|place| {
            let value = self.memory.read_obj::<u32>(GuestAddress(place));
            u32::from_le(value.expect("within guest memory"))
        });
        let outstanding = usize::try_from(id)
            .ok()
            .and_then(|head| self.outstanding.get_mut(head))
            .and_then(Option::take);
        let outstanding =
            outstanding.unwrap_or_else(|| panic!("chain {id} came back and was not outstanding"));
        self.next_used = self.next_used.wrapping_add(1);
        self.completed += 1;
        self.free_descriptors.extend(outstanding.descriptors);
        let head = u16::try_from(id).expect("a head");
        let Some(slot) = outstanding.slot else {
            return Some(Completion {
                head,
                status: 0,
                written,
                data: Vec::new(),
            });
        };
        let mut data = self.read(slot.data, slot.bytes + 1);
        let status = data.pop().expect("at least the status");
        self.free_slots.push(slot.index);
        Some(Completion {
            head,
            status,
            written,
            data,
        })
    }

    /// Asks for a call when the next chain returns. Returns whether one has returned already: for
    /// it no call comes.
    pub fn ask_for_calls(&self) -> bool {
        self.ask_for_call_after(0)
    }

    /// With EVENT_IDX, asks for a call when one more than `further` chains have returned; without,
    /// for a call for each. Returns whether more than `further` have returned already.
    pub fn ask_for_call_after(&self, further: u16) -> bool {
        let event = self.next_used.wrapping_add(further);
        if self.event_idx {
            self.store(self.used_event(), event);
        } else {
            self.store(self.available, 0);
        }
        fence(Ordering::SeqCst);
        let come = self.used_index().wrapping_sub(self.next_used);
        come > further
    }

    /// Suppresses calls.
    pub fn refuse_calls(&self) {
        if self.event_idx {
            // As far away as possible.
            self.store(self.used_event(), self.next_used.wrapping_add(1 << 15));
        } else {
            self.store(self.available, flag(VRING_AVAIL_F_NO_INTERRUPT));
        }
        fence(Ordering::SeqCst);
    }

    fn used_event(&self) -> u64 {
        self.available + 4 + 2 * u64::from(self.size)
    }

    /// How many calls came since this was last called.
    pub fn take_calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Discards the calls of earlier requests: when another request is served, they have come.
    pub fn run_dry(&mut self) {
        self.submit(&Request::get_id(), Layout::DIRECT);
        assert!(wait_until(HANG_LIMIT, || self.has_used()), "no answer");
        self.pop();
        self.take_calls();
    }

    /// Waits for a call. Returns whether there was one.
    pub fn wait_for_call(&self, limit: Duration) -> bool {
        wait_for(&self.epoll, limit) && self.take_calls() > 0
    }

    /// Waits for the next chain to return, with a call. Panics if none returns, or one without a
    /// call.
    pub fn wait(&mut self) -> Completion {
        loop {
            if let Some(completion) = self.pop() {
                return completion;
            }
            if !self.ask_for_calls() && !self.wait_for_call(HANG_LIMIT) {
                let came = self.has_used();
                panic!("no call within {HANG_LIMIT:?}; has a chain returned: {came}");
            }
        }
    }

    /// Submits a request and waits for it.
    pub fn run(&mut self, request: &Request, layout: Layout) -> Completion {
        let head = self.submit(request, layout);
        let completion = self.wait();
        assert_eq!(completion.head, head, "another chain came back");
        completion
    }

    /// Reads, which must succeed.
    pub fn read_disk(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        let completion = self.run(&Request::read(sector, bytes), Layout::DIRECT);
        assert_eq!(u32::from(completion.status), VIRTIO_BLK_S_OK);
        completion.data
    }

    /// Writes, which must succeed.
    pub fn write_disk(&mut self, sector: u64, data: &[u8]) {
        let completion = self.run(&Request::write(sector, data.to_vec()), Layout::DIRECT);
        assert_eq!(u32::from(completion.status), VIRTIO_BLK_S_OK);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("within guest memory");
    }

    fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .expect("within guest memory");
        data
    }

    fn load(&self, address: u64) -> u16 {
        self.memory
            .load(GuestAddress(address), Ordering::Acquire)
            .expect("within guest memory")
    }

    fn store(&self, address: u64, value: u16) {
        self.memory
            .store(value, GuestAddress(address), Ordering::Relaxed)
            .expect("within guest memory");
    }
}

/// Watches eventfds.
fn watch<'a>(events: impl IntoIterator<Item = &'a EventFd>) -> Epoll {
    let epoll = Epoll::new().expect("an epoll");
    for event in events {
        let readable = EpollEvent::new(EventSet::IN, 0);
        epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), readable)
            .expect("watching an eventfd");
    }
    epoll
}

/// Waits for one of the watched eventfds.
fn wait_for(epoll: &Epoll, limit: Duration) -> bool {
    let timeout = i32::try_from(limit.as_millis()).expect("short");
    let mut events = [EpollEvent::default()];
    loop {
        match epoll.wait(timeout, &mut events) {
            Ok(count) => return count > 0,
            // A debugger, or a signal for another thread.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => panic!("waiting: {error}"),
        }
    }
}

fn segments(borders: &[u64], writable: bool) -> impl Iterator<Item = Segment> {
    let segments = borders.windows(2).map(move |pair| Segment {
        address: pair[0],
        len: u32::try_from(pair[1] - pair[0]).expect("short"),
        writable,
    });
    segments.filter(|segment| segment.len > 0)
}

/// Borders of at most `count` segments, at odd offsets where possible.
fn cut(start: u64, end: u64, count: usize) -> Vec<u64> {
    let count = count as u64;
    let mut borders: Vec<u64> = (1..count)
        .map(|index| start + (((end - start) * index / count) | 1))
        .collect();
    borders.push(start);
    borders.push(end);
    borders.retain(|border| *border <= end);
    borders.sort_unstable();
    borders.dedup();
    borders
}

fn small(number: usize) -> u16 {
    u16::try_from(number).expect("small")
}

fn flag(bits: u32) -> u16 {
    u16::try_from(bits).expect("a flag of 16 bits")
}

// ---- The frontend

/// A VMM with its guest's memory and queues, connected or not.
pub struct Vmm {
    plan: Plan,
    memory: GuestMemoryMmap<()>,
    /// The driver's queues.
    pub queues: Vec<Queue>,
    frontend: Option<Frontend>,
    /// Feature bits that were offered and accepted.
    pub features: u64,
    /// Protocol features that were offered and accepted.
    pub protocol_features: VhostUserProtocolFeatures,
    /// How many queues the device has.
    pub device_queues: u64,
    /// The configuration space.
    pub config: Vec<u8>,
    inflight: Option<(VhostUserInflight, File)>,
    /// The device was active before: virtqueues may hold chains that are to be completed.
    was_active: bool,
    calls: Epoll,
}

impl Vmm {
    /// A VMM that is not connected.
    pub fn new(plan: &Plan) -> Self {
        let bytes = Queue::bytes(plan) * plan.queues as u64;
        let region = region(MEMORY_START, bytes);
        let memory = GuestMemoryMmap::from_regions(vec![region]).expect("one region");
        let start = |index| MEMORY_START + index as u64 * Queue::bytes(plan);
        let queues = (0..plan.queues).map(|index| Queue::new(memory.clone(), plan, start(index)));
        let queues: Vec<Queue> = queues.collect();
        Self {
            calls: watch(queues.iter().map(|queue| &queue.call)),
            queues,
            plan: plan.clone(),
            memory,
            frontend: None,
            features: 0,
            protocol_features: VhostUserProtocolFeatures::empty(),
            device_queues: 0,
            config: Vec::new(),
            inflight: None,
            was_active: false,
        }
    }

    /// Connects to a daemon and activates the device.
    pub fn start(socket: &Path, plan: &Plan) -> Self {
        let mut vmm = Self::new(plan);
        vmm.connect(socket).expect("connecting");
        vmm.activate().expect("activating the device");
        vmm
    }

    /// Connects and negotiates, as when a device is made. A VMM that was connected forgets that
    /// connection.
    ///
    /// # Errors
    /// If no daemon listens, or the connection is lost meanwhile.
    pub fn connect(&mut self, socket: &Path) -> vhost::Result<()> {
        self.frontend = None;
        let stream = UnixStream::connect(socket).map_err(Error::SocketConnect)?;
        self.connect_over(stream)
    }

    /// The same over a connection.
    ///
    /// # Errors
    /// If the connection is lost meanwhile.
    pub fn connect_over(&mut self, stream: UnixStream) -> vhost::Result<()> {
        // No answer is an error, too.
        stream
            .set_read_timeout(Some(HANG_LIMIT))
            .map_err(Error::SocketError)?;
        let mut frontend = Frontend::from_stream(stream, 1);
        let is_qemu = self.plan.style == Style::Qemu;
        if !is_qemu {
            frontend.set_owner()?;
        }
        let offered = frontend.get_features()?;
        let protocol_features = frontend.get_protocol_features()? & self.plan.protocol_features;
        frontend.set_protocol_features(protocol_features)?;
        if !is_qemu {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let device_queues = frontend.get_queue_num()?;
        if is_qemu {
            frontend.get_max_mem_slots()?;
            frontend.set_owner()?;
            assert_eq!(frontend.get_features()?, offered, "features that change");
        }
        let flags = if is_qemu {
            VhostUserConfigFlags::empty()
        } else {
            VhostUserConfigFlags::WRITABLE
        };
        // The crate checks that offset and size come back as they were.
        let nothing = [0; CONFIG_BYTES as usize];
        let (_, config) = frontend.get_config(0, CONFIG_BYTES, flags, &nothing)?;
        let features = offered & self.plan.features;
        if self.was_active {
            // Neither VMM asks again when it has connected again, so nothing may have changed.
            let before = (self.features, self.protocol_features, self.device_queues);
            assert_eq!((features, protocol_features, device_queues), before);
            assert_eq!(config, self.config);
        }
        self.features = features;
        self.protocol_features = protocol_features;
        self.device_queues = device_queues;
        self.config = config;
        self.frontend = Some(frontend);
        Ok(())
    }

    /// Activates the device: sends memory and virtqueues. Virtqueues in use continue where they
    /// are.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn activate(&mut self) -> vhost::Result<()> {
        let event_idx = self.has_feature(VIRTIO_RING_F_EVENT_IDX);
        for queue in &mut self.queues {
            queue.event_idx = event_idx;
        }
        match self.plan.style {
            Style::Qemu => self.activate_as_qemu()?,
            Style::CloudHypervisor => self.activate_as_cloud_hypervisor()?,
        }
        self.was_active = true;
        Ok(())
    }

    /// Connects to a daemon that was restarted, and continues. Retries until that succeeds or
    /// `is_hopeless`; returns whether it has succeeded.
    pub fn reconnect(&mut self, socket: &Path, mut is_hopeless: impl FnMut() -> bool) -> bool {
        loop {
            if self.connect(socket).and_then(|()| self.activate()).is_ok() {
                return true;
            }
            self.frontend = None;
            if is_hopeless() {
                return false;
            }
            // The VMMs do the same, at longer intervals.
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn activate_as_qemu(&mut self) -> vhost::Result<()> {
        let frontend = self.frontend.as_mut().expect("connected");
        frontend.set_features(self.features)?;
        if self
            .protocol_features
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            if self.inflight.is_none() {
                self.inflight = Some(get_inflight(frontend, &self.plan)?);
            }
            let (inflight, file) = self.inflight.as_ref().expect("just set");
            frontend.set_inflight_fd(inflight, file.as_raw_fd())?;
        }
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_call(index, &queue.call)?;
        }
        frontend.set_features(self.features)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_mem_table(&regions(&self.memory))?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        self.activate_virtqueues()?;
        if self.was_active {
            for queue in &self.queues {
                queue.kick();
            }
        }
        Ok(())
    }

    fn activate_as_cloud_hypervisor(&mut self) -> vhost::Result<()> {
        let frontend = self.frontend.as_mut().expect("connected");
        frontend.set_features(self.features)?;
        frontend.set_mem_table(&regions(&self.memory))?;
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_num(index, queue.size)?;
        }
        if self
            .protocol_features
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            if self.inflight.is_none() {
                self.inflight = Some(get_inflight(frontend, &self.plan)?);
            }
            let (inflight, file) = self.inflight.as_ref().expect("just set");
            frontend.set_inflight_fd(inflight, file.as_raw_fd())?;
        }
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_addr(index, &virtqueue_data(&self.memory, queue))?;
            frontend.set_vring_base(index, queue.published)?;
            frontend.set_vring_call(index, &queue.call)?;
            frontend.set_vring_kick(index, &queue.kick)?;
        }
        for index in 0..self.queues.len() {
            frontend.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Sends the virtqueues and starts them; the backend has the memory already.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn activate_virtqueues(&mut self) -> vhost::Result<()> {
        let frontend = self.frontend.as_mut().expect("connected");
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_num(index, queue.size)?;
            frontend.set_vring_base(index, queue.used_index())?;
            frontend.set_vring_addr(index, &virtqueue_data(&self.memory, queue))?;
            frontend.set_vring_kick(index, &queue.kick)?;
            frontend.set_vring_call(index, &queue.call)?;
        }
        for index in 0..self.queues.len() {
            frontend.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Stops every virtqueue, like a reset of the driver. The device can be activated again on the
    /// same connection. Returns the available index at which each virtqueue stopped.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn stop_virtqueues(&mut self) -> vhost::Result<Vec<u32>> {
        let count = self.queues.len();
        let frontend = self.frontend();
        for index in 0..count {
            frontend.set_vring_enable(index, false)?;
        }
        (0..count)
            .map(|index| frontend.get_vring_base(index))
            .collect()
    }

    /// The driver sets up its virtqueues from the beginning; the device does not use them then.
    pub fn reset_driver(&mut self) {
        self.inflight = None;
        self.was_active = false;
        for queue in &mut self.queues {
            queue.reset();
        }
    }

    /// Whether the driver has begun to use the device.
    pub fn was_active(&self) -> bool {
        self.was_active
    }

    /// The driver accepts only these features when it activates the device the next time.
    pub fn restrict_features(&mut self, features: u64) {
        self.plan.features &= features;
        self.features &= features;
    }

    /// Whether a feature bit was accepted.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// The connection, for single messages.
    pub fn frontend(&mut self) -> &mut Frontend {
        self.frontend.as_mut().expect("connected")
    }

    /// Closes the connection.
    pub fn disconnect(&mut self) {
        self.frontend = None;
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Everything in guest memory.
    pub fn memory_content(&self) -> Vec<u8> {
        let bytes = self.memory.iter().map(GuestMemoryRegion::len).sum::<u64>();
        let mut content = vec![0; usize::try_from(bytes).expect("small")];
        self.memory
            .read_slice(&mut content, GuestAddress(MEMORY_START))
            .expect("within guest memory");
        content
    }

    /// A field of the configuration space.
    pub fn config_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.config[offset..offset + 4].try_into().expect("4 bytes"))
    }

    /// The inflight region, and how it is laid out.
    pub fn inflight(&self) -> Option<&(VhostUserInflight, File)> {
        self.inflight.as_ref()
    }

    /// In-flight chains of all virtqueues according to the inflight region; `None` without a
    /// region. Panics if its used indices differ from the used rings, which agree when nothing is
    /// in flight.
    pub fn inflight_chains(&self) -> Option<usize> {
        let (layout, file) = self.inflight.as_ref()?;
        let stride = layout.mmap_size / u64::from(layout.num_queues);
        let read = |offset: u64| {
            let mut bytes = [0; 2];
            file.read_exact_at(&mut bytes, layout.mmap_offset + offset)
                .expect("reading the inflight region");
            u16::from_le_bytes(bytes)
        };
        let mut chains = 0;
        for (index, queue) in self.queues.iter().enumerate() {
            // vhost-user, "Inflight I/O tracking": a header of 16 bytes, the used index at its end,
            // and 16 bytes for each descriptor, of which the first says whether it is
            // in flight.
            let start = index as u64 * stride;
            assert_eq!(
                read(start + 14),
                queue.used_index(),
                "the used index in the region"
            );
            let in_flight =
                (0..u64::from(queue.size)).filter(|head| read(start + 16 + head * 16) & 0xff != 0);
            chains += in_flight.count();
        }
        Some(chains)
    }

    /// Waits for a call of any virtqueue. Each must ask for one first.
    pub fn wait_for_any(&self, limit: Duration) -> bool {
        wait_for(&self.calls, limit) && self.queues.iter().map(Queue::take_calls).sum::<u64>() > 0
    }
}

/// VIRTIO_RING_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const INDIRECT_DESCRIPTORS: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

fn get_inflight(frontend: &mut Frontend, plan: &Plan) -> vhost::Result<(VhostUserInflight, File)> {
    let wanted = VhostUserInflight::new(0, 0, small(plan.queues), plan.queue_size);
    let (got, file) = frontend.get_inflight_fd(&wanted)?;
    let queues = (got.num_queues, got.queue_size);
    assert_eq!(queues, (wanted.num_queues, wanted.queue_size));
    Ok((got, file))
}

/// A region of guest memory that can be shared.
pub fn region(address: u64, bytes: u64) -> GuestRegionMmap<()> {
    let mapping = MmapRegion::from_file(
        FileOffset::new(memfd(bytes), 0),
        usize::try_from(bytes).expect("small"),
    );
    GuestRegionMmap::new(mapping.expect("mapping a memfd"), GuestAddress(address))
        .expect("no overflow")
}

/// A file in memory.
pub fn memfd(bytes: u64) -> File {
    // SAFETY: the name is a C string that outlives the call.
    let descriptor = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC) };
    assert_ne!(
        descriptor,
        -1,
        "memfd_create: {}",
        io::Error::last_os_error()
    );
    // SAFETY: the descriptor is new, and nothing else owns it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(bytes).expect("sizing a memfd");
    file
}

/// The memory as the frontend sends it.
pub fn regions(memory: &GuestMemoryMmap<()>) -> Vec<VhostUserMemoryRegionInfo> {
    let regions = memory
        .iter()
        .map(VhostUserMemoryRegionInfo::from_guest_region);
    regions
        .collect::<vhost::Result<_>>()
        .expect("regions of files")
}

/// A virtqueue as the frontend sends it: addresses of this process.
pub fn virtqueue_data(memory: &GuestMemoryMmap<()>, queue: &Queue) -> VringConfigData {
    let [descriptors, available, used] = queue.virtqueue_addresses().map(|address| {
        let pointer = memory.get_host_address(GuestAddress(address));
        pointer.expect("within guest memory") as u64
    });
    VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: 0,
        desc_table_addr: descriptors,
        used_ring_addr: used,
        avail_ring_addr: available,
        log_addr: None,
    }
}
