//! The rings and who serves them: the device's guest side, an engine that answers as it is told, and a model of what
//! was taken and not given back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;

use quorum_blk::device::DiskInfo;
use quorum_blk::device::frontend::ConnectionSlot;
use quorum_blk::device::guest::Guest;
use quorum_blk::device::inflight::QueueRegion;
use quorum_blk::engine::{Failed, GuestRequest, Tag};
use quorum_blk::limits::{PIECE_BYTES_MAX, SECTOR_BYTES, ZERO_BYTES_MAX};
use quorum_blk::quorum::SectorRange;
use quorum_blk::replica::buffer::BufferPool;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::QueueT;

use super::super::naive::{Memory, Run, walk};
use super::memory::{Files, Marks};

/// Pieces that the engine works on at a time.
const PIECES_MAX: usize = 24;

/// What every read returns. Whether data is the right data is not asked here.
static DISK: [u8; 1 << 20] = [0xd5; 1 << 20];

const _: () = assert!(DISK.len() as u64 == PIECE_BYTES_MAX);

/// A ring as the frontend has set it up, and how far it has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Position {
    next_avail: u16,
    next_used: u16,
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    served: bool,
}

impl Position {
    fn avail_entry(self, index: u16) -> Run {
        Run {
            address: self.avail.saturating_add(4 + 2 * u64::from(index % self.size)),
            bytes: 2,
        }
    }

    fn used_entry(self, index: u16) -> u64 {
        self.used.saturating_add(4 + 8 * u64::from(index % self.size))
    }

    /// Where the used ring is, its avail_event included.
    fn used_area(self) -> Run {
        Run {
            address: self.used,
            bytes: 6 + 8 * u64::from(self.size),
        }
    }
}

/// Chains of one head that are out.
#[derive(Debug, Default)]
struct Out {
    count: usize,
    /// What the device may write for them.
    writable: Vec<Run>,
    /// Where the status of the last of them goes.
    status: Option<u64>,
    /// Taken by another process; it is not known when it is looked at again.
    resubmitted: bool,
}

/// What is known of a ring.
#[derive(Debug, Default)]
struct Ring {
    out: BTreeMap<u16, Out>,
    /// An upper bound of how many chains are out. Holds also where it is not known which.
    out_count: usize,
    /// Chains are tracked in a region.
    tracked: bool,
    /// Some of what is out was taken by another process.
    resubmitted: bool,
    /// Some of what is out cannot be given back, through no fault of the device.
    lossy: bool,
}

/// How the call of the guest side may change a ring's position.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Call {
    /// Takes chains.
    Take,
    /// Gives chains back, at most.
    Answer,
    /// Gives up what is out of this ring.
    Abandon { ring: usize },
    /// Starts or stops this ring, which is tracked from its next start on or not.
    Refresh { ring: usize, tracked: bool },
}

/// See the module.
pub struct World {
    pub(super) files: Files,
    pub(super) slot: ConnectionSlot,
    pub(super) pending: Vec<(Tag, GuestRequest)>,
    /// How many pieces are answered while a ring drains, before what is left is abandoned.
    pub(super) patience: usize,
    /// Whether a flush that the frontend asks for goes well.
    pub(super) flushes: bool,
    /// The file with the region, where it begins, and the bytes of it for each queue.
    pub(super) region: Option<(File, u64, u64)>,
    info: DiskInfo,
    guest: Guest,
    rings: Vec<Ring>,
    /// Chains of which pieces have failed, as tags name them.
    failed: BTreeSet<u64>,
    /// Which chains are out is known. It is not any more when the device was made to write over rings and descriptors
    /// while it takes chains.
    strict: bool,
}

impl World {
    pub(super) fn new(info: DiskInfo, slot: ConnectionSlot) -> Self {
        let guest = guest(&info, &slot);
        Self {
            files: Files::new(),
            pending: Vec::new(),
            patience: usize::MAX,
            flushes: true,
            region: None,
            guest,
            failed: BTreeSet::new(),
            rings: slot.vrings.iter().map(|_| Ring::default()).collect(),
            info,
            slot,
            strict: true,
        }
    }

    /// The process is killed, and another one begins with what is left: memory, and the region.
    pub(super) fn kill(&mut self, slot: ConnectionSlot) {
        self.guest = guest(&self.info, &slot);
        self.slot = slot;
        self.pending.clear();
        self.failed.clear();
        self.rings.iter_mut().for_each(|ring| *ring = Ring::default());
        self.files.table.clear();
        self.files.log = None;
    }

    /// Asks for up to `count` pieces of work.
    pub(super) fn serve(&mut self, count: usize) -> bool {
        for _ in 0..count {
            if self.pending.len() >= PIECES_MAX {
                return true;
            }
            let Some((tag, request)) = self.call(Call::Take, Guest::next_request) else {
                return false;
            };
            check_piece(&request, &self.info);
            self.pending.push((tag, request));
        }
        true
    }

    /// The engine answers one of its pieces.
    pub(super) fn answer(&mut self, which: usize, fails: bool) {
        if self.pending.is_empty() {
            return;
        }
        let (tag, request) = self.pending.remove(which % self.pending.len());
        let data = match &request {
            GuestRequest::Read(range) => &DISK[..to_usize(range.bytes())],
            _ => &[],
        };
        let result = if fails { Err(Failed) } else { Ok(data) };
        // The name of a chain in the tags of its pieces.
        let chain = |tag: Tag| tag.0 >> 32;
        if fails {
            self.failed.insert(chain(tag));
        }
        let statuses = self.statuses();
        let before = self.positions();
        self.call(Call::Answer, |guest| guest.answered(tag, result));
        let is_out = self.pending.iter().any(|(other, _)| chain(*other) == chain(tag));
        let failed = self.failed.contains(&chain(tag));
        if !is_out {
            self.failed.remove(&chain(tag));
        }
        let both = before.iter().zip(self.positions()).enumerate();
        let given_back = both.filter(|(_, (before, after))| before.next_used != after.next_used);
        for (ring, (before, _)) in given_back {
            assert!(!is_out, "given back before all of it was done");
            let head = self.files.bytes(before.used_entry(before.next_used));
            let head = head.map_or(0, u32::from_le_bytes);
            if let (true, Some(address)) = (self.strict, statuses.get(&(ring, head))) {
                self.check_status(*address, failed);
            }
        }
    }

    /// Where the status of each chain that is out goes, by ring and head.
    fn statuses(&self) -> BTreeMap<(usize, u32), u64> {
        let rings = self.rings.iter().enumerate();
        let known = rings.flat_map(|(index, ring)| {
            let single = ring
                .out
                .iter()
                .filter(|(_, out)| out.count == 1 && !out.resubmitted);
            single.filter_map(move |(head, out)| Some(((index, u32::from(*head)), out.status?)))
        });
        known.collect()
    }

    /// A request of which a piece failed has failed.
    fn check_status(&self, address: u64, failed: bool) {
        let run = Run { address, bytes: 1 };
        let mut used = Marks::none();
        for position in self.positions() {
            used.add(&self.files, position.used_area());
        }
        let status = self
            .files
            .byte(address)
            .filter(|_| !used.overlaps(&self.files, run));
        if let Some(status) = status {
            let known = [VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR].contains(&status.into());
            assert!(
                known && !(failed && u32::from(status) == VIRTIO_BLK_S_OK),
                "status {status}"
            );
        }
    }

    /// What a worker does before it sleeps.
    pub(super) fn sleep(&mut self) {
        self.call(Call::Answer, Guest::signal);
        self.call(Call::Answer, Guest::ask_for_kicks);
    }

    /// Serves rings according to their state, as a worker does: what is stopped drains, or is abandoned.
    pub(super) fn refresh(&mut self, rings: Vec<(u16, Option<QueueRegion>)>) {
        let durable = self.slot.choices.durable_writes();
        let mut draining = Vec::new();
        for (queue, region) in rings {
            let ring = usize::from(queue);
            let tracked = region.is_some();
            self.guest.set_region(ring, region);
            let refresh = |guest: &mut Guest| guest.refresh(ring, durable);
            if !self.call(Call::Refresh { ring, tracked }, refresh) {
                draining.push(ring);
            }
        }
        let mut patience = self.patience;
        loop {
            draining.retain(|ring| !self.guest.is_drained(*ring));
            if draining.is_empty() {
                break;
            }
            self.serve(usize::MAX);
            if patience == 0 {
                draining.iter().for_each(|ring| self.abandon(*ring));
                continue;
            }
            assert!(!self.pending.is_empty(), "nothing is left that could end this");
            patience -= 1;
            self.answer(0, false);
        }
        self.call(Call::Answer, Guest::signal);
    }

    fn abandon(&mut self, ring: usize) {
        self.call(Call::Abandon { ring }, |guest| guest.abandon(ring));
        assert!(self.guest.is_drained(ring));
    }

    /// All rings are stopped, and nothing is left to answer: nothing may be out.
    pub(super) fn finish(&mut self) {
        while !self.pending.is_empty() {
            self.answer(0, false);
        }
        self.call(Call::Answer, Guest::signal);
        assert!(self.guest.is_idle());
        assert!(!self.guest.is_held());
        for ring in 0..self.rings.len() {
            assert!(self.guest.is_drained(ring));
        }
    }

    fn positions(&self) -> Vec<Position> {
        let position = |(ring, vring): (usize, &quorum_blk::device::Vring)| {
            let state = vring.get_ref();
            let queue = state.get_queue();
            Position {
                next_avail: queue.next_avail(),
                next_used: queue.next_used(),
                size: queue.size(),
                table: queue.desc_table(),
                avail: queue.avail_ring(),
                used: queue.used_ring(),
                served: self.guest.is_served(ring),
            }
        };
        self.slot.vrings.iter().enumerate().map(position).collect()
    }

    /// Calls the guest side, and compares what has become of memory and rings with what may have.
    fn call<R>(&mut self, call: Call, action: impl FnOnce(&mut Guest) -> R) -> R {
        let before = self.positions();
        let result = action(&mut self.guest);
        let after = self.positions();
        match call {
            Call::Take => self.note_taken(&before, &after),
            // They stay in flight in the region, and memory is not touched for them any more.
            Call::Abandon { ring } if self.rings[ring].tracked => {
                self.rings[ring].out.clear();
                self.rings[ring].out_count = 0;
            }
            _ => {}
        }
        self.note_losses(&after);
        self.note_overwritten(&before, &after);
        self.check_changes(&before);
        for ring in 0..self.rings.len() {
            let restarted = match call {
                Call::Refresh {
                    ring: refreshed,
                    tracked,
                } if refreshed == ring => self.note_start(ring, tracked, before[ring], after[ring]),
                _ => false,
            };
            if !restarted {
                self.note_given_back(ring, before[ring], after[ring]);
            }
            self.note_drained(ring, after[ring]);
        }
        result
    }

    /// What the available rings had between then and now was taken.
    fn note_taken(&mut self, before: &[Position], after: &[Position]) {
        let mut read = Marks::none();
        let mut written = Vec::new();
        let mut any = false;
        for ((ring, before), after) in self.rings.iter_mut().zip(before).zip(after) {
            let count = after.next_avail.wrapping_sub(before.next_avail);
            // More only if the device was made to write over the index.
            self.strict &= count <= before.size;
            ring.out_count += usize::from(count);
            let taken = (0..count).map(|step| before.avail_entry(before.next_avail.wrapping_add(step)));
            let resubmitted = ring.out.iter().filter(|(_, out)| out.resubmitted);
            let mut heads: Vec<(u16, bool)> = resubmitted.map(|(head, _)| (*head, false)).collect();
            for entry in taken {
                read.add(&self.files, entry);
                let head = self.files.bytes(entry.address).map(u16::from_le_bytes);
                heads.push((head.expect("the entry was read"), true));
            }
            any |= !heads.is_empty();
            for (head, is_new) in heads {
                let walk = walk(&self.files, before.table, before.size, head);
                walk.descriptors
                    .iter()
                    .for_each(|run| read.add(&self.files, *run));
                let out = ring.out.entry(head).or_default();
                out.count += usize::from(is_new);
                out.status = walk.status();
                out.writable.extend(&walk.writable);
                written.extend(walk.writable);
            }
            if before.served {
                written.push(before.used_area());
            }
        }
        if any && written.iter().any(|run| read.overlaps(&self.files, *run)) {
            self.strict = false;
        }
    }

    /// Of several elements that were put on used rings the first may be written over by what came with the others.
    fn note_overwritten(&mut self, before: &[Position], after: &[Position]) {
        let both = before.iter().zip(after);
        let counts = both.map(|(before, after)| u32::from(after.next_used.wrapping_sub(before.next_used)));
        if counts.sum::<u32>() < 2 {
            return;
        }
        let mut used = Marks::none();
        for position in before {
            let area = position.used_area();
            self.strict &= !used.overlaps(&self.files, area);
            used.add(&self.files, area);
        }
        let outs = self.rings.iter().flat_map(|ring| ring.out.values());
        let mut runs = outs.flat_map(|out| &out.writable);
        self.strict &= !runs.any(|run| used.overlaps(&self.files, *run));
    }

    /// A chain cannot be given back if its head is none, or the used ring is not there.
    fn note_losses(&mut self, now: &[Position]) {
        for (ring, now) in self.rings.iter_mut().zip(now) {
            let none = ring.out.keys().any(|head| *head >= now.size);
            let nowhere = !self.files.is_memory(now.used_area());
            let forgotten = ring.resubmitted && !now.served;
            ring.lossy |= (none || nowhere || forgotten) && !ring.out.is_empty();
        }
    }

    /// Memory has changed only where a ring is used, or a chain is out that may be written to.
    fn check_changes(&mut self, before: &[Position]) {
        let changes = self.files.changes();
        if changes.is_empty() {
            return;
        }
        let mut allowed = Marks::none();
        for (ring, before) in self.rings.iter().zip(before) {
            if before.served || ring.out_count > 0 {
                allowed.add(&self.files, before.used_area());
            }
            for run in ring.out.values().flat_map(|out| &out.writable) {
                allowed.add(&self.files, *run);
            }
        }
        for change in changes {
            assert!(
                !self.strict || allowed.contains(change),
                "memory was written to at {change:x?}"
            );
            if let Some(log) = &self.files.log {
                assert!(self.files.is_logged(log, change), "not in the log: {change:x?}");
            }
        }
    }

    /// Returns whether the ring was started from a region: then what is out is what the region says.
    fn note_start(&mut self, index: usize, tracked: bool, before: Position, after: Position) -> bool {
        if before.served || !after.served {
            return false;
        }
        let ring = &mut self.rings[index];
        ring.tracked = tracked;
        if !tracked {
            return false;
        }
        let heads = match &self.region {
            Some((file, offset, queue_bytes)) => {
                in_flight(file, offset + queue_bytes * index as u64, after.size)
            }
            None => Vec::new(),
        };
        ring.out_count = heads.len();
        ring.resubmitted = !heads.is_empty();
        ring.lossy = false;
        let out = |head| {
            let out = Out {
                count: 1,
                writable: Vec::new(),
                status: None,
                resubmitted: true,
            };
            (head, out)
        };
        ring.out = heads.into_iter().map(out).collect();
        true
    }

    /// What the used ring has now and had not then was given back: it was out, and is not any more.
    fn note_given_back(&mut self, index: usize, before: Position, after: Position) {
        let count = after.next_used.wrapping_sub(before.next_used);
        let ring = &mut self.rings[index];
        let left = ring.out_count.checked_sub(usize::from(count));
        ring.out_count = left.expect("no more is given back than was taken");
        if !self.strict {
            return;
        }
        for step in 0..count {
            let entry = before.used_entry(before.next_used.wrapping_add(step));
            let Some(id) = self.files.bytes(entry).map(u32::from_le_bytes) else {
                ring.lossy = true;
                continue;
            };
            let head = u16::try_from(id).expect("a head");
            let out = ring.out.get_mut(&head);
            let out = out.unwrap_or_else(|| panic!("chain {head} was given back twice, or was not taken"));
            out.count -= 1;
            if out.count == 0 {
                ring.out.remove(&head);
            }
        }
        ring.resubmitted &= !ring.out.is_empty();
    }

    /// A ring that is drained has nothing out.
    fn note_drained(&mut self, index: usize, now: Position) {
        if !self.guest.is_drained(index) {
            return;
        }
        let ring = &mut self.rings[index];
        if self.strict && !ring.lossy && !ring.resubmitted {
            assert!(ring.out.is_empty(), "not given back: {:?}", ring.out);
            assert_eq!(ring.out_count, 0);
        }
        if !now.served || !ring.resubmitted {
            *ring = Ring {
                tracked: ring.tracked,
                ..Ring::default()
            };
        }
    }
}

fn guest(info: &DiskInfo, slot: &ConnectionSlot) -> Guest {
    Guest::new(
        info.clone(),
        slot.memory.clone(),
        slot.vrings.clone(),
        BufferPool::default(),
    )
}

/// The heads of a ring of `size` entries that the region has in flight.
fn in_flight(file: &File, queue_offset: u64, size: u16) -> Vec<u16> {
    let is_in_flight = |head: &u16| {
        let mut flag = [0];
        let offset = queue_offset + 16 + 16 * u64::from(*head);
        file.read_exact_at(&mut flag, offset).is_ok() && flag[0] != 0
    };
    (0..size).filter(is_in_flight).collect()
}

/// What the engine may rely on.
fn check_piece(request: &GuestRequest, info: &DiskInfo) {
    let check = |range: SectorRange, bytes_max: u64| {
        let block_sectors = u64::from(info.block_bytes) / SECTOR_BYTES;
        let end = range.start.checked_add(range.count).expect("an end");
        assert!(range.count > 0 && end <= info.capacity_sectors && range.bytes() <= bytes_max);
        assert!(range.start.is_multiple_of(block_sectors) && range.count.is_multiple_of(block_sectors));
    };
    match request {
        GuestRequest::Read(range) => check(*range, PIECE_BYTES_MAX),
        GuestRequest::Write { range, data, .. } => {
            check(*range, PIECE_BYTES_MAX);
            assert_eq!(data.len() as u64, range.bytes());
        }
        GuestRequest::Zero { range, .. } => check(*range, ZERO_BYTES_MAX),
        GuestRequest::Flush => {}
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("a piece is small")
}
