//! A model of what was taken off the rings and not given back, and of which memory may change.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use quorum_blk::device::Vring;
use quorum_blk::device::guest::Guest;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::QueueT;

use super::super::naive::{Memory, Run, walk};
use super::memory::{Files, Marks};

/// A ring as the frontend has set it up, and how far it has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    next_avail: u16,
    pub(super) next_used: u16,
    size: u16,
    table: u64,
    avail: u64,
    used: u64,
    served: bool,
    drained: bool,
}

impl Position {
    /// Where a ring stands now.
    pub(super) fn new(vring: &Vring, guest: &Guest, ring: usize) -> Self {
        let state = vring.get_ref();
        let queue = state.get_queue();
        Self {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            size: queue.size(),
            table: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
            served: guest.is_served(ring),
            drained: guest.is_drained(ring),
        }
    }

    fn avail_entry(self, index: u16) -> Run {
        Run {
            address: self
                .avail
                .saturating_add(4 + 2 * u64::from(index % self.size)),
            bytes: 2,
        }
    }

    pub(super) fn used_entry(self, index: u16) -> u64 {
        self.used
            .saturating_add(4 + 8 * u64::from(index % self.size))
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
    /// Where the status goes, if there has been one of them only.
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
    /// In which one: they are counted as they are handed over.
    region: usize,
    /// Some of what is out was taken by another process.
    resubmitted: bool,
    /// Some of what is out cannot be given back, through no fault of the device.
    lossy: bool,
}

/// How the call of the guest side may change a ring's position.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Takes chains.
    Take,
    /// Gives chains back, at most.
    Answer,
    /// Gives up what is out of this ring.
    Abandon { ring: usize },
    /// Starts or stops this ring, which is tracked from its next start on or not.
    Refresh { ring: usize, tracked: bool },
}

/// What the driver has written, what the device may write, and which chains are out.
pub(super) struct Model {
    pub(super) files: Files,
    rings: Vec<Ring>,
    /// The file with the region, where it begins, and the bytes of it for each queue.
    region: Option<(File, u64, u64)>,
    /// How many were handed over.
    regions: usize,
    /// Which chains are out is known. It is not any more when the device was made to write over
    /// rings and descriptors while it takes chains.
    strict: bool,
}

impl Model {
    /// Of a device with so many rings.
    pub(super) fn new(rings: usize) -> Self {
        Self {
            files: Files::new(),
            rings: (0..rings).map(|_| Ring::default()).collect(),
            region: None,
            regions: 0,
            strict: true,
        }
    }

    /// The process is killed.
    pub(super) fn kill(&mut self) {
        let rings = self.rings.iter_mut();
        rings.for_each(|ring| *ring = Ring::default());
        self.files.table.clear();
        self.files.log = None;
    }

    /// A region is handed over.
    pub(super) fn set_region(&mut self, file: File, offset: u64, queue_bytes: u64) {
        self.region = Some((file, offset, queue_bytes));
        self.regions += 1;
    }

    /// A call has led from one position to the other. Compares what has become of memory and rings
    /// with what may have.
    pub(super) fn note_call(&mut self, call: Call, before: &[Position], after: &[Position]) {
        match call {
            Call::Take => self.note_taken(before, after),
            // They stay in flight in the region, and memory is not touched for them any more.
            Call::Abandon { ring } if self.rings[ring].tracked => {
                self.rings[ring].out.clear();
                self.rings[ring].out_count = 0;
            }
            _ => {}
        }
        self.note_losses(after);
        self.note_overwritten(before, after);
        self.check_changes(before);
        for ring in 0..self.rings.len() {
            let restarted = match call {
                Call::Refresh {
                    ring: refreshed,
                    tracked,
                } if refreshed == ring => {
                    self.note_failed_start(ring, tracked, before[ring], after[ring]);
                    self.note_start(ring, tracked, before[ring], after[ring])
                }
                _ => false,
            };
            if !restarted {
                self.note_given_back(ring, before[ring], after[ring]);
            }
            self.note_drained(ring, after[ring]);
        }
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
            let taken =
                (0..count).map(|step| before.avail_entry(before.next_avail.wrapping_add(step)));
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
                // Of two with the same head it is not known which one is given back.
                out.status = walk.status().filter(|_| out.count == 1);
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

    /// Of several elements that were put on used rings the first may be written over by what came
    /// with the others.
    fn note_overwritten(&mut self, before: &[Position], after: &[Position]) {
        let mut total = 0;
        for (before, after) in before.iter().zip(after) {
            let count = after.next_used.wrapping_sub(before.next_used);
            total += u32::from(count);
            // More may be out than the ring has entries, if the driver does not wait.
            self.strict &= count <= before.size;
        }
        if total < 2 {
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
                assert!(
                    self.files.is_logged(log, change),
                    "not in the log: {change:x?}"
                );
            }
        }
    }

    /// A ring that its driver broke, and that does not start again with the region that it has:
    /// what is out stays in flight there.
    fn note_failed_start(
        &mut self,
        index: usize,
        tracked: bool,
        before: Position,
        after: Position,
    ) {
        let ring = &mut self.rings[index];
        let same_region = tracked && ring.tracked && ring.region == self.regions;
        if same_region && !before.served && !after.served && after.drained {
            ring.out.clear();
            ring.out_count = 0;
        }
    }

    /// Returns whether the ring was started from a region: then what is out is what the region
    /// says.
    fn note_start(
        &mut self,
        index: usize,
        tracked: bool,
        before: Position,
        after: Position,
    ) -> bool {
        if before.served || !after.served {
            return false;
        }
        let ring = &mut self.rings[index];
        ring.tracked = tracked;
        ring.region = self.regions;
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
            let out = out
                .unwrap_or_else(|| panic!("chain {head} was given back twice, or was not taken"));
            out.count -= 1;
            if out.count == 0 {
                ring.out.remove(&head);
            }
        }
        ring.resubmitted &= !ring.out.is_empty();
    }

    /// A ring that is drained has nothing out.
    fn note_drained(&mut self, index: usize, now: Position) {
        if !now.drained {
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
                region: ring.region,
                ..Ring::default()
            };
        }
    }

    /// Where the status of each chain that is out goes, by ring and head.
    pub(super) fn statuses(&self) -> BTreeMap<(usize, u32), u64> {
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
    pub(super) fn check_status(&self, address: u64, failed: bool, positions: &[Position]) {
        if !self.strict {
            return;
        }
        let run = Run { address, bytes: 1 };
        let mut used = Marks::none();
        for position in positions {
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
