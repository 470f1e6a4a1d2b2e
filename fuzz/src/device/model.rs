//! A model of the chains in flight, and of the memory that may change.

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

/// A virtqueue as the frontend has set it up, with its indices.
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
    /// The position of a virtqueue now.
    pub(super) fn new(vring: &Vring, guest: &Guest, index: usize) -> Self {
        let state = vring.get_ref();
        let queue = state.get_queue();
        Self {
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
            size: queue.size(),
            table: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
            served: guest.is_served(index),
            drained: guest.is_drained(index),
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

    /// The used ring, its avail_event included.
    fn used_area(self) -> Run {
        Run {
            address: self.used,
            bytes: 6 + 8 * u64::from(self.size),
        }
    }
}

/// Chains in flight with the same head.
#[derive(Debug, Default)]
struct InFlight {
    count: usize,
    /// The memory that the device may write for them.
    writable: Vec<Run>,
    /// The address of the status, if there has been only one of them.
    status: Option<u64>,
    /// Accepted by another process. When this one parses it is not known.
    resubmitted: bool,
}

/// The chains in flight of a virtqueue.
#[derive(Debug, Default)]
struct Queue {
    in_flight: BTreeMap<u16, InFlight>,
    /// An upper bound of the number of chains in flight. Holds even if it is not known which.
    in_flight_count: usize,
    /// Chains are tracked in a region.
    tracked: bool,
    /// The number of that region.
    region: usize,
    /// Another process accepted some of the chains in flight.
    resubmitted: bool,
    /// Some of the chains in flight cannot be completed, through no fault of the device.
    lossy: bool,
}

/// A call of the guest side, by how it may change the position of a virtqueue.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    /// Accepts chains.
    Accept,
    /// Completes chains, or does nothing.
    Answer,
    /// Abandons the chains in flight of this virtqueue.
    Abandon { queue: usize },
    /// Starts or stops this virtqueue, which is tracked from its next start on or not.
    Refresh { queue: usize, tracked: bool },
}

/// The memory that the driver has written and the device may write, and the chains in flight.
pub(super) struct Model {
    pub(super) files: Files,
    queues: Vec<Queue>,
    /// The file of the region, the offset of the region, and its bytes for each queue.
    region: Option<(File, u64, u64)>,
    /// How many regions the frontend has passed.
    regions: usize,
    /// The model knows which chains are in flight. It no longer does when the driver has made the
    /// device write over virtqueues and descriptors while it accepts chains.
    strict: bool,
}

impl Model {
    /// The model of a device with this many virtqueues.
    pub(super) fn new(queues: usize) -> Self {
        Self {
            files: Files::new(),
            queues: (0..queues).map(|_| Queue::default()).collect(),
            region: None,
            regions: 0,
            strict: true,
        }
    }

    /// The process is killed.
    pub(super) fn kill(&mut self) {
        let queues = self.queues.iter_mut();
        queues.for_each(|queue| *queue = Queue::default());
        self.files.table.clear();
        self.files.log = None;
    }

    /// The frontend passes a region.
    pub(super) fn set_region(&mut self, file: File, offset: u64, queue_bytes: u64) {
        self.region = Some((file, offset, queue_bytes));
        self.regions += 1;
    }

    /// Checks the changes of memory and virtqueues that a call has made.
    pub(super) fn note_call(&mut self, call: Call, before: &[Position], after: &[Position]) {
        match call {
            Call::Accept => self.note_accepted(before, after),
            // They stay in flight in the region, and memory is not touched for them any more.
            Call::Abandon { queue } if self.queues[queue].tracked => {
                self.queues[queue].in_flight.clear();
                self.queues[queue].in_flight_count = 0;
            }
            _ => {}
        }
        self.note_losses(after);
        self.note_overwritten(before, after);
        self.check_changes(before);
        for queue in 0..self.queues.len() {
            let restarted = match call {
                Call::Refresh {
                    queue: refreshed,
                    tracked,
                } if refreshed == queue => {
                    self.note_failed_start(queue, tracked, before[queue], after[queue]);
                    self.note_start(queue, tracked, before[queue], after[queue])
                }
                _ => false,
            };
            if !restarted {
                self.note_completed(queue, before[queue], after[queue]);
            }
            self.note_drained(queue, after[queue]);
        }
    }

    /// Notes the chains that were accepted between the two positions.
    fn note_accepted(&mut self, before: &[Position], after: &[Position]) {
        let mut read = Marks::none();
        let mut written = Vec::new();
        let mut any = false;
        for ((queue, before), after) in self.queues.iter_mut().zip(before).zip(after) {
            let count = after.next_avail.wrapping_sub(before.next_avail);
            // More only if the driver made the device write over the index.
            self.strict &= count <= before.size;
            queue.in_flight_count += usize::from(count);
            let accepted =
                (0..count).map(|step| before.avail_entry(before.next_avail.wrapping_add(step)));
            let resubmitted = queue
                .in_flight
                .iter()
                .filter(|(_, in_flight)| in_flight.resubmitted);
            let mut heads: Vec<(u16, bool)> = resubmitted.map(|(head, _)| (*head, false)).collect();
            for entry in accepted {
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
                let in_flight = queue.in_flight.entry(head).or_default();
                in_flight.count += usize::from(is_new);
                // It is not known which of two chains with the same head is completed.
                in_flight.status = walk.status().filter(|_| in_flight.count == 1);
                in_flight.writable.extend(&walk.writable);
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

    /// When several elements were put on used rings, the data of a later chain may have been
    /// written over the first ones.
    fn note_overwritten(&mut self, before: &[Position], after: &[Position]) {
        let mut total = 0;
        for (before, after) in before.iter().zip(after) {
            let count = after.next_used.wrapping_sub(before.next_used);
            total += u32::from(count);
            // A driver that does not wait may have more in flight than the virtqueue has entries.
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
        let all_in_flight = self
            .queues
            .iter()
            .flat_map(|queue| queue.in_flight.values());
        let mut runs = all_in_flight.flat_map(|in_flight| &in_flight.writable);
        self.strict &= !runs.any(|run| used.overlaps(&self.files, *run));
    }

    /// A chain cannot be completed if its head is out of the table, or the used ring is not in
    /// memory.
    fn note_losses(&mut self, now: &[Position]) {
        for (queue, now) in self.queues.iter_mut().zip(now) {
            let none = queue.in_flight.keys().any(|head| *head >= now.size);
            let nowhere = !self.files.is_memory(now.used_area());
            let forgotten = queue.resubmitted && !now.served;
            queue.lossy |= (none || nowhere || forgotten) && !queue.in_flight.is_empty();
        }
    }

    /// Asserts that memory has changed only in used rings and in the writable parts of chains in
    /// flight.
    fn check_changes(&mut self, before: &[Position]) {
        let changes = self.files.changes();
        if changes.is_empty() {
            return;
        }
        let mut allowed = Marks::none();
        for (queue, before) in self.queues.iter().zip(before) {
            if before.served || queue.in_flight_count > 0 {
                allowed.add(&self.files, before.used_area());
            }
            for run in queue
                .in_flight
                .values()
                .flat_map(|in_flight| &in_flight.writable)
            {
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

    /// If a virtqueue that its driver broke fails to start again with the same region, its chains
    /// stay in flight there.
    fn note_failed_start(
        &mut self,
        index: usize,
        tracked: bool,
        before: Position,
        after: Position,
    ) {
        let queue = &mut self.queues[index];
        let same_region = tracked && queue.tracked && queue.region == self.regions;
        if same_region && !before.served && !after.served && after.drained {
            queue.in_flight.clear();
            queue.in_flight_count = 0;
        }
    }

    /// Returns whether the virtqueue was started from a region, which then says what is in flight.
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
        let queue = &mut self.queues[index];
        queue.tracked = tracked;
        queue.region = self.regions;
        if !tracked {
            return false;
        }
        let heads = match &self.region {
            Some((file, offset, queue_bytes)) => {
                heads_in_flight(file, offset + queue_bytes * index as u64, after.size)
            }
            None => Vec::new(),
        };
        queue.in_flight_count = heads.len();
        queue.resubmitted = !heads.is_empty();
        queue.lossy = false;
        let in_flight = |head| {
            let in_flight = InFlight {
                count: 1,
                writable: Vec::new(),
                status: None,
                resubmitted: true,
            };
            (head, in_flight)
        };
        queue.in_flight = heads.into_iter().map(in_flight).collect();
        true
    }

    /// Notes the chains that were put on the used ring between the two positions. They were in
    /// flight.
    fn note_completed(&mut self, index: usize, before: Position, after: Position) {
        let count = after.next_used.wrapping_sub(before.next_used);
        let queue = &mut self.queues[index];
        let left = queue.in_flight_count.checked_sub(usize::from(count));
        queue.in_flight_count = left.expect("no more is given back than was accepted");
        if !self.strict {
            return;
        }
        for step in 0..count {
            let entry = before.used_entry(before.next_used.wrapping_add(step));
            let Some(id) = self.files.bytes(entry).map(u32::from_le_bytes) else {
                queue.lossy = true;
                continue;
            };
            let head = u16::try_from(id).expect("a head");
            let in_flight = queue.in_flight.get_mut(&head);
            let in_flight = in_flight.unwrap_or_else(|| {
                panic!("chain {head} was given back twice, or was not accepted")
            });
            in_flight.count -= 1;
            if in_flight.count == 0 {
                queue.in_flight.remove(&head);
            }
        }
        queue.resubmitted &= !queue.in_flight.is_empty();
    }

    /// Asserts that a drained virtqueue has nothing in flight.
    fn note_drained(&mut self, index: usize, now: Position) {
        if !now.drained {
            return;
        }
        let queue = &mut self.queues[index];
        if self.strict && !queue.lossy && !queue.resubmitted {
            assert!(
                queue.in_flight.is_empty(),
                "not given back: {:?}",
                queue.in_flight
            );
            assert_eq!(queue.in_flight_count, 0);
        }
        if !now.served || !queue.resubmitted {
            *queue = Queue {
                tracked: queue.tracked,
                region: queue.region,
                ..Queue::default()
            };
        }
    }

    /// The address of the status of each chain in flight, by virtqueue and head.
    pub(super) fn statuses(&self) -> BTreeMap<(usize, u32), u64> {
        let queues = self.queues.iter().enumerate();
        let known = queues.flat_map(|(index, queue)| {
            let single = queue
                .in_flight
                .iter()
                .filter(|(_, in_flight)| in_flight.count == 1 && !in_flight.resubmitted);
            single.filter_map(move |(head, in_flight)| {
                Some(((index, u32::from(*head)), in_flight.status?))
            })
        });
        known.collect()
    }

    /// Asserts that a request with a failed fragment has failed.
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

/// The heads of a virtqueue of `size` entries that the region has in flight.
fn heads_in_flight(file: &File, queue_offset: u64, size: u16) -> Vec<u16> {
    let is_in_flight = |head: &u16| {
        let mut flag = [0];
        let offset = queue_offset + 16 + 16 * u64::from(*head);
        file.read_exact_at(&mut flag, offset).is_ok() && flag[0] != 0
    };
    (0..size).filter(is_in_flight).collect()
}
