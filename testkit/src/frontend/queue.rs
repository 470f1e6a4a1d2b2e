//! The driver's side of a split virtqueue: its memory, and the chains that it makes available.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

use super::calls::watch;
use super::plan::Plan;
use super::request::{Cut, Layout, Request, Segment};

const PAGE: u64 = 4096;
/// Descriptors of one indirect table.
const INDIRECT_MAX: usize = 128;
const HEADER_BYTES: u64 = 16;
const DESCRIPTOR_BYTES: u64 = 16;

/// The driver's side of a split virtqueue, and the memory of its requests.
pub struct Queue {
    pub(super) memory: GuestMemoryMmap<()>,
    pub(super) size: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    pub(super) slots: u64,
    pub(super) slot_bytes: u64,
    pub(super) slot_count: usize,
    pub(super) free_slots: Vec<usize>,
    pub(super) free_descriptors: Vec<u16>,
    pub(super) outstanding: Vec<Option<Outstanding>>,
    /// Where the next chain goes on the available ring. Chains before it may not be published yet.
    pub(super) next_available: u16,
    pub(super) published: u16,
    /// The published index at the last kick, or when the device last suppressed one.
    pub(super) kicked: u16,
    pub(super) next_used: u16,
    pub(super) event_idx: bool,
    pub(super) kick: EventFd,
    /// How the device notifies the driver.
    pub call: EventFd,
    pub(super) epoll: Epoll,
    /// Chains returned so far.
    pub completed: u64,
}

pub(super) struct Outstanding {
    pub(super) descriptors: Vec<u16>,
    /// The memory of a request; a chain built by hand has none.
    pub(super) slot: Option<Slot>,
}

pub(super) struct Slot {
    pub(super) index: usize,
    pub(super) data: u64,
    pub(super) bytes: usize,
}

impl Queue {
    /// Bytes of guest memory for one virtqueue.
    pub(super) fn bytes(plan: &Plan) -> u64 {
        Self::virtqueue_bytes(plan.queue_size) + plan.slots as u64 * Self::slot_bytes(plan)
    }

    pub(super) fn virtqueue_bytes(size: u16) -> u64 {
        (u64::from(size) * (DESCRIPTOR_BYTES + 2 + 8) + 12 + 8).next_multiple_of(PAGE)
    }

    /// A page for the indirect table, its end for the header; data; the status.
    pub(super) fn slot_bytes(plan: &Plan) -> u64 {
        PAGE + (plan.data_bytes as u64 + 1).next_multiple_of(PAGE)
    }

    pub(super) fn new(memory: GuestMemoryMmap<()>, plan: &Plan, start: u64) -> Self {
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

    pub(super) fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        segment: Segment,
        next: Option<u16>,
    ) {
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

    pub(super) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("within guest memory");
    }

    pub(super) fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.memory
            .read_slice(&mut data, GuestAddress(address))
            .expect("within guest memory");
        data
    }

    pub(super) fn load(&self, address: u64) -> u16 {
        self.memory
            .load(GuestAddress(address), Ordering::Acquire)
            .expect("within guest memory")
    }

    pub(super) fn store(&self, address: u64, value: u16) {
        self.memory
            .store(value, GuestAddress(address), Ordering::Relaxed)
            .expect("within guest memory");
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

pub(super) fn small(number: usize) -> u16 {
    u16::try_from(number).expect("small")
}

pub(super) fn flag(bits: u32) -> u16 {
    u16::try_from(bits).expect("a flag of 16 bits")
}
