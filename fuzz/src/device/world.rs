//! The worker: the device's guest side, and an engine that answers as the script says.

use std::cell::RefCell;
use std::collections::BTreeSet;

use quorum_blk::common::SectorRange;
use quorum_blk::common::buffer::BufferPool;
use quorum_blk::device::DiskInfo;
use quorum_blk::device::connection::ConnectionSlot;
use quorum_blk::device::frontend::VirtqueueServer;
use quorum_blk::device::guest::Guest;
use quorum_blk::device::inflight::QueueRegion;
use quorum_blk::engine::{Failed, FragmentId, GuestRequest};
use quorum_blk::limits::{FRAGMENT_BYTES_MAX, SECTOR_BYTES, ZERO_BYTES_MAX};

use super::super::naive::Memory;
use super::memory::Mapping;
use super::model::{Call, Model, Position};

/// Fragments that the engine works on at a time.
const FRAGMENTS_MAX: usize = 24;

/// The data of every read. This target does not check data.
static DISK: [u8; 1 << 20] = [0xd5; 1 << 20];

const _: () = assert!(DISK.len() as u64 == FRAGMENT_BYTES_MAX);

thread_local! {
    /// Thread-local, as the [`VirtqueueServer`] of a frontend must be `Send`, which a world is not.
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

/// Runs `action` on the world of this thread.
pub(super) fn with_world<R>(action: impl FnOnce(&mut World) -> R) -> R {
    WORLD.with_borrow_mut(|world| action(world.as_mut().expect("there is one while a script runs")))
}

/// Serves the virtqueues of the world of this thread.
pub(super) struct Server;

impl VirtqueueServer for Server {
    fn refresh(&self, queues: Vec<(u16, Option<QueueRegion>)>) {
        with_world(|world| world.refresh(queues));
    }

    fn flush(&self) -> bool {
        with_world(|world| world.flushes)
    }
}

/// The worker and the model of what it may do.
pub struct World {
    pub(super) model: Model,
    /// The memory table that the message in progress sets; it applies from the next refresh on.
    pub(super) next_table: Option<Vec<Mapping>>,
    pub(super) slot: ConnectionSlot,
    pub(super) pending: Vec<(FragmentId, GuestRequest)>,
    /// How many fragments are answered while a virtqueue drains, before the rest is abandoned.
    pub(super) patience: usize,
    /// Whether a flush of the frontend succeeds.
    pub(super) flushes: bool,
    info: DiskInfo,
    guest: Guest,
    /// Chains with failed fragments, as tags name them.
    failed: BTreeSet<u32>,
}

impl World {
    fn new(info: DiskInfo, slot: ConnectionSlot) -> Self {
        let guest = guest(&info, &slot);
        Self {
            model: Model::new(slot.vrings.len()),
            next_table: None,
            pending: Vec::new(),
            patience: usize::MAX,
            flushes: true,
            guest,
            failed: BTreeSet::new(),
            info,
            slot,
        }
    }

    /// Makes a world for this thread.
    pub(super) fn begin(info: DiskInfo, slot: ConnectionSlot) {
        WORLD.set(Some(Self::new(info, slot)));
    }

    /// Drops the world of this thread.
    pub(super) fn end() {
        WORLD.set(None);
    }

    /// The position of each virtqueue.
    fn positions(&self) -> Vec<Position> {
        let vrings = self.slot.vrings.iter().enumerate();
        vrings
            .map(|(queue, vring)| Position::new(vring, &self.guest, queue))
            .collect()
    }

    /// Calls the guest side, and has the model check the changes of memory and virtqueues.
    fn call<R>(&mut self, call: Call, action: impl FnOnce(&mut Guest) -> R) -> R {
        let before = self.positions();
        let result = action(&mut self.guest);
        let after = self.positions();
        self.model.note_call(call, &before, &after);
        result
    }

    /// Kills the process and starts another one with the same memory and region.
    pub(super) fn kill(&mut self, slot: ConnectionSlot) {
        self.guest = guest(&self.info, &slot);
        self.slot = slot;
        self.pending.clear();
        self.failed.clear();
        self.model.kill();
    }

    /// Submits up to `count` fragments to the engine.
    pub(super) fn serve(&mut self, count: usize) -> bool {
        for _ in 0..count {
            if self.pending.len() >= FRAGMENTS_MAX {
                return true;
            }
            let Some((tag, request)) = self.call(Call::Accept, Guest::next_request) else {
                return false;
            };
            check_fragment(&request, &self.info);
            self.pending.push((tag, request));
        }
        true
    }

    /// Answers one of the engine's fragments.
    pub(super) fn answer(&mut self, which: usize, fails: bool) {
        if self.pending.is_empty() {
            return;
        }
        let (tag, request) = self.pending.remove(which % self.pending.len());
        let data = match &request {
            GuestRequest::Read(range) => &DISK[..to_usize(range.bytes())],
            _ => &[],
        };
        let result = if fails {
            Err(Failed {
                no_space: false,
                by_flush: false,
            })
        } else {
            Ok(data)
        };
        let chain = |fragment: FragmentId| fragment.chain;
        if fails {
            self.failed.insert(chain(tag));
        }
        let statuses = self.model.statuses();
        let before = self.positions();
        self.call(Call::Answer, |guest| guest.answered(tag, result));
        let is_in_flight = self
            .pending
            .iter()
            .any(|(other, _)| chain(*other) == chain(tag));
        let failed = self.failed.contains(&chain(tag));
        if !is_in_flight {
            self.failed.remove(&chain(tag));
        }
        let both = before.iter().zip(self.positions()).enumerate();
        let completed = both.filter(|(_, (before, after))| before.next_used != after.next_used);
        for (queue, (before, _)) in completed {
            assert!(!is_in_flight, "given back before all of it was done");
            let head = self.model.files.bytes(before.used_entry(before.next_used));
            let head = head.map_or(0, u32::from_le_bytes);
            if let Some(address) = statuses.get(&(queue, head)) {
                self.model.check_status(*address, failed, &self.positions());
            }
        }
    }

    /// Does what a worker does before it sleeps.
    pub(super) fn sleep(&mut self) {
        self.call(Call::Answer, Guest::signal);
        self.call(Call::Answer, Guest::enable_kicks);
    }

    /// Serves virtqueues according to their state, as a worker does: those that are stopped drain,
    /// or are abandoned.
    pub(super) fn refresh(&mut self, queues: Vec<(u16, Option<QueueRegion>)>) {
        if let Some(table) = self.next_table.take() {
            self.model.files.table = table;
        }
        let durable = self.slot.choices.durable_writes();
        let mut draining = Vec::new();
        for (queue, region) in queues {
            let queue = usize::from(queue);
            let tracked = region.is_some();
            self.guest.set_region(queue, region);
            let refresh = |guest: &mut Guest| guest.refresh(queue, durable);
            if !self.call(Call::Refresh { queue, tracked }, refresh) {
                draining.push(queue);
            }
        }
        let mut patience = self.patience;
        loop {
            draining.retain(|queue| !self.guest.is_drained(*queue));
            if draining.is_empty() {
                break;
            }
            self.serve(usize::MAX);
            if patience == 0 {
                draining.iter().for_each(|queue| self.abandon(*queue));
                continue;
            }
            assert!(
                !self.pending.is_empty(),
                "nothing is left that could end this"
            );
            patience -= 1;
            self.answer(0, false);
        }
        self.call(Call::Answer, Guest::signal);
    }

    fn abandon(&mut self, queue: usize) {
        self.call(Call::Abandon { queue }, |guest| guest.abandon(queue));
        assert!(self.guest.is_drained(queue));
    }

    /// Asserts that no chain is in flight once all virtqueues are stopped and all fragments
    /// answered.
    pub(super) fn finish(&mut self) {
        while !self.pending.is_empty() {
            self.answer(0, false);
        }
        self.call(Call::Answer, Guest::signal);
        assert!(self.guest.is_idle());
        assert!(!self.guest.awaits_resubmission());
        for queue in 0..self.slot.vrings.len() {
            assert!(self.guest.is_drained(queue));
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

/// Asserts what the engine relies on.
fn check_fragment(request: &GuestRequest, info: &DiskInfo) {
    let check = |range: SectorRange, bytes_max: u64| {
        let block_sectors = u64::from(info.block_bytes) / SECTOR_BYTES;
        let end = range.start.checked_add(range.count).expect("an end");
        assert!(range.count > 0 && end <= info.capacity.sectors() && range.bytes() <= bytes_max);
        assert!(
            range.start.is_multiple_of(block_sectors) && range.count.is_multiple_of(block_sectors)
        );
    };
    match request {
        GuestRequest::Read(range) | GuestRequest::WriteWithoutMemory(range) => {
            check(*range, FRAGMENT_BYTES_MAX);
        }
        GuestRequest::Write { range, data, .. } => {
            check(*range, FRAGMENT_BYTES_MAX);
            assert_eq!(data.len() as u64, range.bytes());
        }
        GuestRequest::Zero { range, .. } => check(*range, ZERO_BYTES_MAX),
        GuestRequest::Flush => {}
    }
}

fn to_usize(number: u64) -> usize {
    usize::try_from(number).expect("a fragment is small")
}
