//! Requests in flight when the process is killed, at any store that it makes.

mod region;
mod resubmission;

use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::common::clock::TurnClock;
use crate::device::inflight::{
    BeginError, Begun, Error, Layout, QueueRegion, Region, VirtqueueState,
};
use crate::limits::RESUBMIT_LIMIT;
use crate::untrusted::mapping::Share;

const QUEUE_SIZE: u16 = 16;

/// The panic that stands for SIGKILL.
struct Killed;

thread_local! {
    /// How many more places this thread passes before it is killed.
    static PLACES_LEFT: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Called before and after each store to the region. Stores to the virtqueues lie between two of
/// these.
pub(in crate::device) fn may_be_killed_here() {
    match PLACES_LEFT.get() {
        None => {}
        Some(0) => {
            PLACES_LEFT.set(None);
            resume_unwind(Box::new(Killed));
        }
        Some(left) => PLACES_LEFT.set(Some(left - 1)),
    }
}

/// Runs a part of a process's life. `false` if the process was killed in it.
fn survives(life: impl FnOnce()) -> bool {
    match catch_unwind(AssertUnwindSafe(life)) {
        Ok(()) => true,
        Err(panic) if panic.is::<Killed>() => false,
        Err(panic) => resume_unwind(panic),
    }
}

/// Has room for as many requests as a life makes.
fn small_disk() -> DiskInfo {
    DiskInfo {
        capacity: Capacity::new(128),
        ..disk_info()
    }
}

fn layout() -> Layout {
    Layout::new(1, QUEUE_SIZE, 1).unwrap()
}

/// A region and its file.
fn region() -> (Region, File) {
    let file = layout().create_file().unwrap();
    (map(&file), file)
}

fn map(file: &File) -> Region {
    region_of(
        layout(),
        file.try_clone().unwrap(),
        0,
        layout().bytes() as u64,
    )
    .unwrap()
}

fn state_at(used_idx: u16, available_idx: u16) -> VirtqueueState {
    VirtqueueState {
        size: QUEUE_SIZE,
        used_idx,
        available_idx,
    }
}

/// A driver that frees a head only when it has seen it on the used ring, and a machine that is
/// killed and started again over the same memory.
struct Life {
    machine: Machine,
    file: File,
    start: u16,
    free: Vec<u16>,
    /// Heads and numbers of chains that were offered and are not on the used ring.
    outstanding: Vec<(u16, u64)>,
    offered: u64,
    /// Requests that any process has begun, by number.
    begun: Vec<u64>,
    /// Those of the process that lives, in their order.
    begun_now: Vec<u64>,
    with_engine: Vec<(FragmentId, GuestRequest)>,
}

impl Life {
    fn new(start: u16) -> Self {
        let mut machine = Machine::with(
            small_disk(),
            1,
            QUEUE_SIZE,
            DATA + 512 * u64::from(QUEUE_SIZE),
        );
        machine.put(USED + 2, &start.to_le_bytes());
        machine.put(AVAILABLE + 2, &start.to_le_bytes());
        machine.drivers[0] = Driver {
            next_descriptor: 0,
            available: start,
            used: start,
        };
        Self {
            machine,
            file: layout().create_file().unwrap(),
            start,
            free: (0..QUEUE_SIZE).collect(),
            outstanding: Vec::new(),
            offered: 0,
            begun: Vec::new(),
            begun_now: Vec::new(),
            with_engine: Vec::new(),
        }
    }

    /// Offers a write of its number to the sector of that number.
    fn offer(&mut self, which: usize) {
        if self.free.is_empty() {
            return;
        }
        let head = self.free.swap_remove(which % self.free.len());
        let number = self.offered;
        self.offered += 1;
        let place = u64::from(head);
        let machine = &mut self.machine;
        machine.put(HEADER + 16 * place, &header(OUT, number));
        machine.put(STATUS + place, &[NO_STATUS]);
        machine.put(DATA + 512 * place, &number.to_le_bytes().repeat(64));
        let parts = [
            readable(HEADER + 16 * place, 16),
            readable(DATA + 512 * place, 512),
            writable(STATUS + place, 1),
        ];
        let table = TABLE + 64 * place;
        for (index, part) in (0u16..).zip(parts) {
            let flags = if index < 2 { NEXT } else { 0 };
            machine.put(
                table + 16 * u64::from(index),
                &descriptor(part, flags, index + 1),
            );
        }
        let reference = Part {
            flags: INDIRECT,
            ..readable(table, 48)
        };
        machine.put_descriptor(0, head, &descriptor(reference, 0, 0));
        machine.offer_head(0, head);
        self.outstanding.push((head, number));
    }

    /// The driver looks at the used ring.
    fn collect(&mut self) {
        for (head, len) in self.machine.used(0) {
            let found = self
                .outstanding
                .iter()
                .position(|(offered, _)| *offered == head);
            let found =
                found.unwrap_or_else(|| panic!("head {head} is completed, but was not in flight"));
            let (_, number) = self.outstanding.remove(found);
            assert_eq!(len, 1);
            assert_eq!(self.machine.get(STATUS + u64::from(head), 1), [OK]);
            let sector = usize::try_from(number).unwrap();
            assert_eq!(
                bytes_of(&self.machine.disk, sector, 512),
                number.to_le_bytes().repeat(64)
            );
            self.free.push(head);
        }
    }

    fn submit(&mut self) {
        let Some((tag, request)) = self.machine.guest.next_request() else {
            return;
        };
        let GuestRequest::Write { range, .. } = &request else {
            panic!("{request:?}");
        };
        let number = range.start;
        assert!(
            self.outstanding.iter().any(|(_, out)| *out == number),
            "{number} is done already"
        );
        assert!(
            self.begun_now.last().is_none_or(|last| *last < number),
            "{number} comes too late"
        );
        self.begun_now.push(number);
        if !self.begun.contains(&number) {
            self.begun.push(number);
        }
        self.with_engine.push((tag, request));
    }

    fn answer(&mut self, which: usize) {
        if !self.with_engine.is_empty() {
            let (tag, request) = self.with_engine.swap_remove(which % self.with_engine.len());
            self.machine.answer(tag, request);
        }
    }

    /// Another process takes over. `base` is the vring base that the frontend sends.
    fn begin(&mut self, base: u16) {
        self.with_engine.clear();
        let machine = &mut self.machine;
        let memory = GuestMemoryAtomic::new(machine.memory.clone());
        machine.vrings = queues_over(&memory, 1, QUEUE_SIZE);
        machine.vrings[0].set_queue_next_avail(base);
        machine.guest = Guest::new(
            small_disk(),
            memory,
            machine.vrings.clone(),
            BufferPool::default(),
        );
        machine.guest.set_region(0, map(&self.file).queue(0));
        self.start();
    }

    fn start(&mut self) {
        self.begun_now.clear();
        assert!(self.machine.guest.refresh(0, false));
        self.check_place();
    }

    /// Every request that was begun counts as accepted, and at most the one that was being accepted
    /// besides.
    fn check_place(&self) {
        let next_avail = self.machine.vrings[0].queue_next_avail();
        let accepted = u64::from(next_avail.wrapping_sub(self.start));
        let begun = self.begun.len() as u64;
        assert!(
            (begun..=begun + 1).contains(&accepted),
            "{accepted} accepted, {begun} begun"
        );
    }

    /// Stops the virtqueue while the replicas do not answer, and starts it again.
    fn stop_and_start(&mut self, base: u16) {
        let vring = self.machine.vrings[0].clone();
        vring.set_enabled(false);
        assert!(!self.machine.guest.refresh(0, false));
        self.machine.guest.abandon(0);
        assert!(self.machine.guest.is_drained(0));
        self.check_place();
        vring.set_queue_next_avail(base);
        vring.set_enabled(true);
        self.start();
    }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Offer(usize),
    Collect,
    Submit,
    Answer(usize),
    Kick,
    StopAndStart { base: u16 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<usize>().prop_map(Step::Offer),
        2 => Just(Step::Collect),
        8 => Just(Step::Submit),
        7 => any::<usize>().prop_map(Step::Answer),
        1 => Just(Step::Kick),
        1 => any::<u16>().prop_map(|base| Step::StopAndStart { base }),
    ]
}

proptest! {
    /// Whenever the process is killed, the next one submits every request in flight, in order, and
    /// none that is on the used ring.
    #[test]
    fn a_kill_at_any_store_loses_nothing_and_repeats_nothing(
        start: u16,
        steps in vec(step(), 1..120),
        kills in vec((0..120u32, any::<u16>()), 1..6),
    ) {
        let mut life = Life::new(start);
        let mut kills = kills.into_iter();
        let mut steps = steps.into_iter();
        let mut base = start;
        loop {
            let kill = kills.next();
            PLACES_LEFT.set(kill.map(|(places, _)| places));
            let alive = survives(|| {
                life.begin(base);
                for step in steps.by_ref() {
                    match step {
                        Step::Offer(which) => life.offer(which),
                        Step::Collect => life.collect(),
                        Step::Submit => {
                            life.collect();
                            life.submit();
                        }
                        Step::Answer(which) => life.answer(which),
                        Step::Kick => {
                            life.machine.guest.signal();
                            life.machine.guest.enable_kicks();
                        }
                        Step::StopAndStart { base } => life.stop_and_start(base),
                    }
                }
            });
            PLACES_LEFT.set(None);
            life.collect();
            let is_new = life.file_version() == 0;
            let Some((_, any_base)) = kill else {
                assert!(alive);
                break;
            };
            // With a region that was in use the frontend's base means nothing.
            base = if is_new { start } else { any_base };
        }
        loop {
            let before = life.with_engine.len();
            life.submit();
            if life.with_engine.len() == before {
                break;
            }
        }
        while !life.with_engine.is_empty() {
            life.answer(0);
        }
        life.collect();
        prop_assert_eq!(&life.outstanding, &[]);
        prop_assert!(life.machine.guest.is_drained(0));
        let used_idx = life.machine.get_u16(USED + 2);
        prop_assert_eq!(u64::from(used_idx.wrapping_sub(start)), life.offered);
        prop_assert_eq!(life.machine.vrings[0].queue_next_avail(), used_idx);
    }

    /// Whatever a frontend writes into the region: as many chains come back as the driver has
    /// offered.
    #[test]
    fn a_region_of_any_bytes_answers_no_more_than_was_asked(
        start: u16,
        offered in 0..=usize::from(QUEUE_SIZE),
        accepted in 0..=usize::from(QUEUE_SIZE),
        scribbles in vec(scribble(), 1..40),
    ) {
        let mut life = Life::new(start);
        life.begin(start);
        (0..offered).for_each(|which| life.offer(which * 7));
        (0..accepted).for_each(|_| life.submit());
        (0..accepted / 2).for_each(|which| life.answer(which));
        for (place, bytes) in scribbles {
            life.file.write_all_at(&bytes, place).unwrap();
        }
        let Life { mut machine, file, .. } = life;
        let memory = GuestMemoryAtomic::new(machine.memory.clone());
        machine.vrings = queues_over(&memory, 1, QUEUE_SIZE);
        machine.vrings[0].set_queue_next_avail(machine.get_u16(USED + 2));
        let (vrings, pool) = (machine.vrings.clone(), BufferPool::default());
        machine.guest = Guest::new(small_disk(), memory, vrings, pool);
        machine.guest.set_region(0, map(&file).queue(0));
        let is_served = machine.guest.refresh(0, false);
        prop_assert_eq!(is_served, matches!(version(&file), 0 | 1));
        machine.serve();
        prop_assert!(machine.guest.is_drained(0));
        let used = machine.used(0).len();
        if is_served {
            prop_assert_eq!(used, offered);
        }
    }
}

fn version(file: &File) -> u16 {
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, 8).unwrap();
    u16::from_ne_bytes(bytes)
}

impl Life {
    fn file_version(&self) -> u16 {
        version(&self.file)
    }
}

/// Bytes somewhere in the region: more often where they matter.
fn scribble() -> impl Strategy<Value = (u64, Vec<u8>)> {
    let end = layout().bytes() as u64;
    let head = 0..u64::from(QUEUE_SIZE);
    let small = (0..QUEUE_SIZE).prop_map(|value| value.to_ne_bytes().to_vec());
    let index = prop_oneof![small, vec(any::<u8>(), 2)];
    prop_oneof![
        6 => head.clone().prop_map(|head| (16 + 16 * head, vec![1])),
        4 => (head, index.clone()).prop_map(|(head, next)| (16 + 16 * head + 6, next)),
        4 => (12..15u64, index).prop_map(|(place, value)| (place & !1, value)),
        1 => (8..end - 16, vec(any::<u8>(), 1..16)),
    ]
}

/// The part of the only queue.
fn queue(file: &File) -> QueueRegion {
    map(file).queue(0).unwrap()
}

fn put(file: &File, place: u64, value: u16) {
    file.write_all_at(&value.to_ne_bytes(), place).unwrap();
}

/// Marks a head as in flight.
fn mark(file: &File, head: u16, counter: u64, next: u16) {
    let place = 16 + 16 * u64::from(head);
    file.write_all_at(&[1], place).unwrap();
    put(file, place + 6, next);
    file.write_all_at(&counter.to_ne_bytes(), place + 8)
        .unwrap();
}

/// Maps a region as the frontend does.
fn region_of(layout: Layout, file: File, offset: u64, bytes: u64) -> Result<Region, Error> {
    Region::map(layout, &file, (offset, bytes), &Share::default())
}
