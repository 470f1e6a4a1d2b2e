//! Chains that are submitted again: when, in which order, and what becomes of those that cannot be.

use super::*;

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
        region_of(layout, file.try_clone().unwrap(), 0, layout.bytes() as u64).unwrap()
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
    let fragment_sectors = usize::try_from(FRAGMENT_BYTES_MAX / 512).unwrap();
    offer(&mut machine, 1, fragment_sectors + 1);
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
    let second_fragment = fragment_sectors as u64;
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
        let region = region_of(layout, file.try_clone().unwrap(), 0, bytes).unwrap();
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
        let region = region_of(layout, file, 0, layout.bytes() as u64).unwrap();
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
        let region = region_of(layout, file, 0, layout.bytes() as u64).unwrap();
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
            GuestRequest::Write { .. } | GuestRequest::WriteWithoutMemory(_) => "write",
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
        region_of(layout, file, 0, layout.bytes() as u64).unwrap()
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
