//! Requests in flight when the process is killed, at any store that it makes.

use std::cell::Cell;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};

use super::super::inflight::{
    BeginError, Begun, Error, Layout, QueueRegion, Region, VirtqueueState,
};
use super::*;
use crate::common::clock::TurnClock;
use crate::limits::RESUBMIT_LIMIT;

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
    Region::map(
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
        taken in 0..=usize::from(QUEUE_SIZE),
        scribbles in vec(scribble(), 1..40),
    ) {
        let mut life = Life::new(start);
        life.begin(start);
        (0..offered).for_each(|which| life.offer(which * 7));
        (0..taken).for_each(|_| life.submit());
        (0..taken / 2).for_each(|which| life.answer(which));
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

#[test]
fn the_region_has_the_size_and_the_fields_of_the_specification() {
    // As libvhost-user reckons it: ALIGN_UP(16 * entries + 2, 64).
    for (entries, bytes) in [
        (1, 64),
        (2, 64),
        (4, 128),
        (128, 2112),
        (256, 4160),
        (1024, 16448),
    ] {
        assert_eq!(Layout::new(1, entries, 1).unwrap().bytes(), bytes);
        assert_eq!(Layout::new(3, entries, 4).unwrap().bytes(), 3 * bytes);
    }
    let (_, file) = region();
    let (mut tracker, begun) = queue(&file).begin(state_at(7, 7)).unwrap();
    assert_eq!(begun, Begun::New);
    tracker.accepted(3);
    tracker.accepted(5);
    tracker.completing(3);
    tracker.completed(3, 8);
    tracker.completing(5);
    let mut bytes = vec![0; 16 + 16 * 6];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let field = |place: usize| u16::from_ne_bytes([bytes[place], bytes[place + 1]]);
    assert_eq!(bytes[..8], [0; 8], "features");
    assert_eq!([8, 10, 12, 14].map(field), [1, QUEUE_SIZE, 5, 8]);
    let state = |head: usize| &bytes[16 + 16 * head..][..16];
    assert_eq!((state(3)[0], state(5)[0]), (0, 1));
    assert_eq!(state(5)[6..8], 3u16.to_ne_bytes(), "what was last before");
    assert_eq!(state(3)[8..], 0u64.to_ne_bytes());
    assert_eq!(state(5)[8..], 1u64.to_ne_bytes());
}

#[test]
fn a_new_region_cannot_be_cut() {
    let (_, file) = region();
    assert!(file.set_len(64).is_err());
    assert!(file.set_len(1 << 20).is_err());
}

#[test]
fn what_is_not_a_region_for_this_device_is_refused() {
    for (num_queues, queue_size) in [
        (0, 16),
        (5, 16),
        (1, 0),
        (1, QUEUE_SIZE_MAX + 1),
        (u16::MAX, u16::MAX),
    ] {
        let refused = Layout::new(num_queues, queue_size, 4);
        assert!(matches!(refused, Err(Error::Layout { .. })));
    }
    let bytes = layout().bytes() as u64;
    let file = layout().create_file().unwrap();
    for (offset, len) in [
        (0, bytes - 1),
        (1 << 12, bytes),
        (0, bytes + 1),
        (u64::MAX - 4095, bytes),
        (0, u64::MAX),
    ] {
        let refused = Region::map(layout(), file.try_clone().unwrap(), offset, len);
        assert!(
            matches!(refused, Err(Error::TooShort { .. })),
            "{offset} {len}"
        );
    }
    // Not on a page.
    let file = Layout::new(1, 1024, 1).unwrap().create_file().unwrap();
    assert!(matches!(
        Region::map(layout(), file, 64, bytes),
        Err(Error::Map(_))
    ));
    // No file at all.
    let pipe = std::io::pipe().unwrap().0;
    assert!(
        Region::map(
            layout(),
            File::from(std::os::fd::OwnedFd::from(pipe)),
            0,
            bytes
        )
        .is_err()
    );
}

/// A file that is no memory file cannot be sealed, but used.
#[test]
fn a_region_may_be_an_ordinary_file_and_begin_anywhere_in_it() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 16).unwrap();
    let map = || {
        Region::map(
            layout(),
            file.try_clone().unwrap(),
            1 << 12,
            layout().bytes() as u64,
        )
        .unwrap()
    };
    let (mut tracker, _) = map().queue(0).unwrap().begin(state_at(0, 0)).unwrap();
    tracker.accepted(9);
    let (_, begun) = map().queue(0).unwrap().begin(state_at(0, 1)).unwrap();
    assert_eq!(begun, Begun::Resumed(vec![9]));
    let mut flag = [0];
    file.read_exact_at(&mut flag, (1 << 12) + 16 + 16 * 9)
        .unwrap();
    assert_eq!(flag, [1]);
    assert!(map().queue(1).is_none());
}

/// A memory file that is not sealed yet is sealed when it is mapped.
#[test]
fn regions_of_other_processes_are_sealed() {
    let file = File::from(memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(1 << 12).unwrap();
    map(&file);
    assert!(file.set_len(64).is_err());
}

#[test]
fn batches_of_any_length_are_understood() {
    // Five were accepted, and the last batch was 4, 2 and 9.
    for batch in 0..=3u16 {
        let (_, file) = region();
        queue(&file).begin(state_at(100, 100)).unwrap();
        for (head, counter, next) in [(1, 14, 0), (9, 13, 0), (2, 12, 9), (4, 11, 2), (7, 10, 0)] {
            mark(&file, head, counter, next);
        }
        put(&file, 12, 4);
        let (_, begun) = queue(&file).begin(state_at(100 + batch, 105)).unwrap();
        let all = [7, 4, 2, 9, 1].into_iter();
        let given_back = &[4, 2, 9][..usize::from(batch)];
        let left: Vec<u16> = all.filter(|head| !given_back.contains(head)).collect();
        assert_eq!(begun, Begun::Resumed(left.clone()));
        // That is settled now.
        let (_, begun) = queue(&file).begin(state_at(100 + batch, 105)).unwrap();
        assert_eq!(begun, Begun::Resumed(left));
    }
}

#[test]
fn a_list_that_leads_nowhere_is_followed_no_further() {
    for (last, next) in [(QUEUE_SIZE, 0), (u16::MAX, 0), (3, u16::MAX), (3, 3)] {
        let (_, file) = region();
        queue(&file).begin(state_at(0, 0)).unwrap();
        mark(&file, 3, 0, next);
        mark(&file, 5, u64::MAX, 0);
        put(&file, 12, last);
        let (mut tracker, begun) = queue(&file).begin(state_at(10, 14)).unwrap();
        let expected = if last == 3 { vec![5] } else { vec![3, 5] };
        assert_eq!(begun, Begun::Resumed(expected));
        // After the greatest counter comes the least; nothing breaks.
        tracker.accepted(6);
    }
}

/// The driver was reset, and the frontend has given the same region.
#[test]
fn a_virtqueue_that_was_set_up_again_begins_empty() {
    // With nothing in flight, and with something that an earlier life has left.
    for left_over in [0, 3] {
        let (_, file) = region();
        queue(&file).begin(state_at(5000, 5000)).unwrap();
        for head in 0..left_over {
            mark(&file, head, 0, 0);
        }
        let (_, begun) = queue(&file).begin(state_at(0, 4)).unwrap();
        assert_eq!(begun, Begun::Resumed(vec![]));
        assert_eq!(
            queue(&file).begin(state_at(0, 4)).unwrap().1,
            Begun::Resumed(vec![])
        );
    }
    // More than the driver has asked for.
    let (_, file) = region();
    queue(&file).begin(state_at(0, 0)).unwrap();
    (0..3).for_each(|head| mark(&file, head, 0, 0));
    assert_eq!(
        queue(&file).begin(state_at(0, 2)).unwrap().1,
        Begun::Resumed(vec![])
    );
}

#[test]
fn regions_that_do_not_fit_the_virtqueue_are_rejected() {
    let (_, file) = region();
    put(&file, 8, 2);
    assert_eq!(
        queue(&file).begin(state_at(0, 0)).unwrap_err(),
        BeginError::Version(2)
    );
    let larger = VirtqueueState {
        size: 32,
        ..state_at(0, 0)
    };
    let refused = queue(&file).begin(larger).unwrap_err();
    assert_eq!(
        refused,
        BeginError::TooSmall {
            entries: 16,
            size: 32
        }
    );
    // A smaller virtqueue uses a part of it.
    put(&file, 8, 1);
    mark(&file, 9, 0, 0);
    mark(&file, 7, 0, 0);
    let smaller = VirtqueueState {
        size: 8,
        ..state_at(0, 8)
    };
    assert_eq!(
        queue(&file).begin(smaller).unwrap().1,
        Begun::Resumed(vec![7])
    );
}

#[test]
fn a_cleared_region_is_new() {
    let (region, file) = region();
    queue(&file).begin(state_at(0, 0)).unwrap();
    mark(&file, 3, 0, 0);
    region.clear();
    assert_eq!(queue(&file).begin(state_at(0, 1)).unwrap().1, Begun::New);
    assert_eq!(
        queue(&file).begin(state_at(0, 1)).unwrap().1,
        Begun::Resumed(vec![])
    );
}

/// The driver changes its descriptors while no process serves it: chains in flight are completed
/// all the same.
#[test]
fn a_chain_that_became_malformed_is_completed() {
    let mut life = Life::new(9);
    life.begin(9);
    (0..4).for_each(|which| life.offer(which));
    (0..4).for_each(|_| life.submit());
    let mut out: Vec<u16> = life.outstanding.iter().map(|(head, _)| *head).collect();
    for head in &out[..2] {
        life.machine.put_descriptor(0, *head, &[0xff; 16]);
    }
    life.machine.guest.abandon(0);
    life.with_engine.clear();
    life.machine.vrings[0].set_enabled(false);
    assert!(!life.machine.guest.refresh(0, false));
    life.machine.vrings[0].set_enabled(true);
    assert!(life.machine.guest.refresh(0, false));
    life.machine.serve();
    let mut heads: Vec<u16> = life.machine.used(0).iter().map(|(head, _)| *head).collect();
    heads.sort_unstable();
    out.sort_unstable();
    assert_eq!(heads, out);
}

#[test]
fn resubmitted_writes_come_before_new_chains_of_any_virtqueue() {
    let mut machine = Machine::with(disk_info(), 2, 64, MEMORY_BYTES);
    let file = Layout::new(2, 64, 2).unwrap().create_file().unwrap();
    let map = || {
        let layout = Layout::new(2, 64, 2).unwrap();
        Region::map(layout, file.try_clone().unwrap(), 0, layout.bytes() as u64).unwrap()
    };
    let begin = |machine: &mut Machine| {
        let memory = GuestMemoryAtomic::new(machine.memory.clone());
        machine.vrings = queues_over(&memory, 2, 64);
        machine.guest = Guest::new(
            disk_info(),
            memory,
            machine.vrings.clone(),
            BufferPool::default(),
        );
        let region = map();
        for queue in 0..2 {
            let part = region.queue(u16::try_from(queue).unwrap());
            machine.guest.set_region(queue, part);
            assert!(machine.guest.refresh(queue, false));
        }
    };
    begin(&mut machine);
    let mut number = 0;
    let mut offer = |machine: &mut Machine, queue, sectors: usize| {
        let place = HEADER + 16 * number;
        machine.put(place, &header(OUT, number));
        number += 1;
        machine.offer(
            queue,
            &[
                readable(place, 16),
                readable(DATA, sectors * 512),
                writable(STATUS, 1),
            ],
        );
    };
    // The first is longer than a fragment; all of its fragments come first, too.
    let piece_sectors = usize::try_from(FRAGMENT_BYTES_MAX / 512).unwrap();
    offer(&mut machine, 1, piece_sectors + 1);
    offer(&mut machine, 1, 1);
    while machine.guest.next_request().is_some() {}
    offer(&mut machine, 0, 1);
    offer(&mut machine, 1, 1);
    begin(&mut machine);
    let order: Vec<u64> = std::iter::from_fn(|| machine.guest.next_request())
        .map(|(_, request)| match request {
            GuestRequest::Write { range, .. } => range.start,
            other => panic!("{other:?}"),
        })
        .collect();
    let second_fragment = piece_sectors as u64;
    assert_eq!(order[..3], [0, second_fragment, 1]);
    assert_eq!(order.len(), 5);
}

/// Without a region a request that cannot be answered fails, and the late answer is dropped.
#[test]
fn an_abandoned_chain_without_a_region_fails_at_once() {
    let mut machine = Machine::new();
    machine.put_header(IN, 0);
    let parts = [
        readable(HEADER, 16),
        writable(DATA, 512),
        writable(STATUS, 1),
    ];
    let first = machine.offer(0, &parts);
    let (old_tag, old_request) = machine.guest.next_request().unwrap();
    // One that the engine has not even seen.
    machine.vrings[0].set_queue_ready(false);
    assert!(!machine.guest.refresh(0, false));
    machine.guest.abandon(0);
    assert!(machine.guest.is_drained(0));
    assert_eq!(machine.used(0), [(first, 0)]);
    assert_eq!(machine.status(), IOERR);
    // Its name is not given to another one before it is answered.
    machine.vrings[0].set_queue_ready(true);
    assert!(machine.guest.refresh(0, false));
    machine.put_header(IN, 1);
    let second = machine.offer(0, &parts);
    let (tag, request) = machine.guest.next_request().unwrap();
    assert_ne!(tag, old_tag);
    let before = machine.all_memory();
    machine.answer(old_tag, old_request);
    assert!(
        before == machine.all_memory(),
        "an abandoned chain's answer touches memory"
    );
    machine.answer(tag, request);
    assert_eq!(machine.used(0), [(second, 513)]);
    assert_eq!(machine.get(DATA, 512), bytes_of(&machine.disk, 1, 512));
    assert!(machine.guest.is_drained(0));
}

/// Some fragments of a long request may not be submitted, others not answered.
#[test]
fn a_request_in_fragments_is_abandoned_as_a_whole() {
    let mut machine = Machine::new();
    machine.put_header(IN, 0);
    let len = usize::try_from(3 * FRAGMENT_BYTES_MAX).unwrap();
    machine.offer(
        0,
        &[
            readable(HEADER, 16),
            writable(DATA, len),
            writable(STATUS, 1),
        ],
    );
    let fragments: Vec<_> = (0..2)
        .map(|_| machine.guest.next_request().unwrap())
        .collect();
    machine.vrings[0].set_enabled(false);
    assert!(!machine.guest.refresh(0, false));
    machine.guest.abandon(0);
    assert!(machine.guest.next_request().is_none());
    assert_eq!(machine.used(0).len(), 1);
    let before = machine.all_memory();
    for (tag, request) in fragments {
        machine.answer(tag, request);
    }
    assert!(before == machine.all_memory());
    assert!(machine.guest.is_drained(0));
}

/// Whether this process maps the file.
fn is_mapped(file: &File) -> bool {
    use std::os::unix::fs::MetadataExt;

    let inode = file.metadata().unwrap().ino().to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mut names = maps
        .lines()
        .filter(|line| line.contains("quorum-blk-inflight"));
    names.any(|line| line.split_whitespace().nth(4) == Some(&inode))
}

#[test]
fn a_drained_virtqueue_unmaps_its_region() {
    for in_flight in [false, true] {
        let layout = Layout::new(1, 64, 1).unwrap();
        let file = layout.create_file().unwrap();
        let bytes = layout.bytes() as u64;
        let region = Region::map(layout, file.try_clone().unwrap(), 0, bytes).unwrap();
        let mut machine = Machine::new();
        machine.vrings[0].set_queue_ready(false);
        assert!(!machine.guest.refresh(0, false));
        machine.guest.set_region(0, region.queue(0));
        machine.vrings[0].set_queue_ready(true);
        assert!(machine.guest.refresh(0, false));
        drop(region);
        machine.put_header(FLUSH, 0);
        let head = machine.offer(0, &[readable(HEADER, 16), writable(STATUS, 1)]);
        let (tag, _) = machine.guest.next_request().unwrap();
        if !in_flight {
            machine.guest.answered(tag, Ok(&[]));
        }
        // The frontend is gone.
        machine.vrings[0].set_queue_ready(false);
        machine.guest.set_region(0, None);
        assert!(!machine.guest.refresh(0, false));
        assert_eq!(is_mapped(&file), in_flight);
        if in_flight {
            machine.guest.answered(tag, Ok(&[]));
        }
        assert_eq!(machine.used(0), [(head, 1)]);
        assert!(!is_mapped(&file));
    }
}

/// The virtqueues of two workers after a restart. The first one had chains in flight; the second
/// one has a new chain, starts first, and has to wait.
fn waiting() -> [Guest; 2] {
    let layout = Layout::new(2, 64, 2).unwrap();
    let file = layout.create_file().unwrap();
    let mut machine = Machine::with(disk_info(), 2, 64, MEMORY_BYTES);
    let workers = |machine: &Machine| -> [Guest; 2] {
        let file = file.try_clone().unwrap();
        let region = Region::map(layout, file, 0, layout.bytes() as u64).unwrap();
        let memory = GuestMemoryAtomic::new(machine.memory.clone());
        let queues = queues_over(&memory, 2, 64);
        [0, 1].map(|index| {
            let queue = queues[usize::from(index)].clone();
            let mut guest = Guest::new(
                disk_info(),
                memory.clone(),
                vec![queue],
                BufferPool::default(),
            );
            guest.set_region(0, region.queue(index));
            guest
        })
    };
    let parts = [
        readable(HEADER, 16),
        readable(DATA, 512),
        writable(STATUS, 1),
    ];
    machine.put_header(OUT, 0);
    machine.offer(0, &parts);
    let mut before = workers(&machine);
    assert!(before[0].refresh(0, false));
    assert!(before[0].next_request().is_some());
    machine.offer(1, &parts);
    let mut after = workers(&machine);
    assert!(after[1].refresh(0, false));
    assert!(after[1].next_request().is_none());
    assert!(after[1].awaits_resubmission());
    assert!(!after[1].enable_kicks(), "there is nothing to spin for");
    after
}

#[test]
fn a_virtqueue_waits_for_resubmissions_on_other_workers() {
    let [mut first, mut second] = waiting();
    assert!(first.refresh(0, false));
    assert!(second.next_request().is_none());
    assert!(first.next_request().is_some());
    // Only now the engine is known to have it.
    assert!(second.next_request().is_none());
    assert!(first.next_request().is_none());
    assert!(second.next_request().is_some());
    assert!(!first.awaits_resubmission() && !second.awaits_resubmission());
}

/// A read that was in flight could meet a half done write, of this virtqueue or of another.
#[test]
fn reads_that_were_in_flight_come_after_the_writes() {
    let mut machine = Machine::with(disk_info(), 1, 64, MEMORY_BYTES);
    let layout = Layout::new(1, 64, 1).unwrap();
    let file = layout.create_file().unwrap();
    let begin = |machine: &mut Machine| {
        let memory = GuestMemoryAtomic::new(machine.memory.clone());
        machine.vrings = queues_over(&memory, 1, 64);
        machine.guest = Guest::new(
            disk_info(),
            memory,
            machine.vrings.clone(),
            BufferPool::default(),
        );
        let file = file.try_clone().unwrap();
        let region = Region::map(layout, file, 0, layout.bytes() as u64).unwrap();
        machine.guest.set_region(0, region.queue(0));
        assert!(machine.guest.refresh(0, false));
    };
    begin(&mut machine);
    for (number, request_type) in (0..).zip([IN, FLUSH, OUT, IN]) {
        let place = HEADER + 16 * number;
        machine.put(place, &header(request_type, number));
        let data = match request_type {
            OUT => readable(DATA, 512),
            _ => writable(DATA, 512),
        };
        machine.offer(0, &[readable(place, 16), data, writable(STATUS, 1)]);
    }
    while machine.guest.next_request().is_some() {}
    begin(&mut machine);
    // It is parsed once more when the engine is known to have the writes.
    let mut next = || machine.guest.next_request();
    let again = std::iter::from_fn(|| next().or_else(&mut next));
    let kinds: Vec<&str> = again
        .map(|(_, request)| match request {
            GuestRequest::Read(_) => "read",
            GuestRequest::Write { .. } => "write",
            GuestRequest::Flush => "flush",
            GuestRequest::Zero { .. } => "zero",
        })
        .collect();
    assert_eq!(kinds, ["write", "read", "flush", "read"]);
}

#[test]
fn a_virtqueue_that_is_never_started_again_delays_others_up_to_the_limit() {
    let [_, mut second] = waiting();
    let clock = TurnClock::default();
    second.set_clock(clock.clone());
    clock.set(RESUBMIT_LIMIT - Duration::from_nanos(1));
    assert!(second.next_request().is_none());
    clock.set(RESUBMIT_LIMIT);
    assert!(second.next_request().is_some());
    assert!(!second.awaits_resubmission());
}

/// A virtqueue that its driver broke does not wait, and others wait for it up to the limit.
#[test]
fn a_virtqueue_that_breaks_while_it_resubmits_stays_broken() {
    let mut life = Life::new(0);
    life.begin(0);
    (0..2).for_each(|which| life.offer(which));
    (0..2).for_each(|_| life.submit());
    life.begin(0);
    assert!(life.machine.guest.awaits_resubmission());
    // The first answer finds no room on the used ring: it is not in memory any more.
    let (tag, request) = life.machine.guest.next_request().unwrap();
    life.machine.vrings[0]
        .set_queue_info(0, AVAILABLE, OUTSIDE)
        .unwrap();
    life.machine.answer(tag, request);
    assert!(!life.machine.guest.awaits_resubmission());
    assert!(life.machine.guest.next_request().is_none());
}

/// Chains that one region tracks are not in the next one. The frontend may not change it while
/// chains are in flight, but the driver must not wait for these for ever.
#[test]
fn chains_of_a_broken_virtqueue_fail_when_the_region_changes() {
    let mut machine = Machine::new();
    let (first, second) = (
        Layout::new(1, 64, 1).unwrap(),
        Layout::new(1, 64, 1).unwrap(),
    );
    let regions = [first, second].map(|layout| {
        let file = layout.create_file().unwrap();
        Region::map(layout, file, 0, layout.bytes() as u64).unwrap()
    });
    machine.vrings[0].set_enabled(false);
    assert!(!machine.guest.refresh(0, false));
    machine.guest.set_region(0, regions[0].queue(0));
    machine.vrings[0].set_enabled(true);
    assert!(machine.guest.refresh(0, false));
    machine.put_header(IN, 0);
    let parts = [
        readable(HEADER, 16),
        writable(DATA, 512),
        writable(STATUS, 1),
    ];
    let head = machine.offer(0, &parts);
    let (tag, request) = machine.guest.next_request().unwrap();
    // No virtqueue has that many chains available.
    machine.put(AVAILABLE + 2, &1000u16.to_le_bytes());
    assert!(machine.guest.next_request().is_none());
    assert!(!machine.guest.is_served(0));
    machine.put(AVAILABLE + 2, &1u16.to_le_bytes());
    machine.guest.set_region(0, regions[1].queue(0));
    assert!(machine.guest.refresh(0, false));
    assert_eq!(machine.used(0), [(head, 0)]);
    assert_eq!(machine.status(), IOERR);
    machine.answer(tag, request);
    assert!(machine.used(0).is_empty());
    assert!(machine.guest.next_request().is_none());
}
