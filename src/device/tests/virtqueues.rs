//! Virtqueues: broken, full, stopped, served in turn, and when the driver is notified.

use rustix::event::{EventfdFlags, eventfd};

use super::*;

/// A flush, whose status byte is at `STATUS + tag`.
fn offer_flush(machine: &mut Machine, queue: usize, tag: u64) -> u16 {
    machine.put(HEADER, &header(FLUSH, 0));
    machine.put(STATUS + tag, &[NO_STATUS]);
    machine.offer(queue, &[readable(HEADER, 16), writable(STATUS + tag, 1)])
}

#[test]
fn a_head_outside_of_the_table_breaks_only_its_virtqueue() {
    for head in [64, 65, u16::MAX] {
        let mut machine = Machine::with(disk_info(), 2, 64, MEMORY_BYTES);
        // One in flight, one behind the broken one.
        let in_flight = offer_flush(&mut machine, 0, 0);
        let (tag, _) = machine.guest.next_request().unwrap();
        machine.offer_head(0, head);
        offer_flush(&mut machine, 0, 1);
        let other = offer_flush(&mut machine, 1, 2);
        machine.serve();
        assert_eq!(machine.used(1), [(other, 1)]);
        assert!(machine.used(0).is_empty());
        assert!(!machine.guest.is_drained(0));
        machine.guest.answered(tag, Ok(&[]));
        assert_eq!(
            machine.used(0),
            [(in_flight, 1)],
            "what was in flight is completed"
        );
        assert!(machine.guest.is_drained(0));
        machine.serve();
        assert_eq!(machine.get(STATUS + 1, 1), [NO_STATUS]);
    }
}

#[test]
fn an_available_index_that_jumps_breaks_only_its_virtqueue() {
    let mut machine = Machine::with(disk_info(), 2, 64, MEMORY_BYTES);
    machine.put(AVAILABLE + 2, &65u16.to_le_bytes());
    let other = offer_flush(&mut machine, 1, 0);
    machine.serve();
    assert!(machine.used(0).is_empty());
    assert!(machine.guest.is_drained(0));
    assert!(!machine.guest.enable_kicks(), "no chain is available");
    assert_eq!(machine.used(1), [(other, 1)]);
    // It stays so until the frontend starts it again.
    machine.put(AVAILABLE + 2, &0u16.to_le_bytes());
    let head = offer_flush(&mut machine, 0, 1);
    machine.serve();
    assert!(machine.used(0).is_empty());
    assert!(machine.guest.refresh(0, false));
    machine.serve();
    assert_eq!(machine.used(0), [(head, 1)]);
}

#[test]
fn a_full_virtqueue_and_indices_that_wrap() {
    let mut machine = Machine::with(disk_info(), 1, 16, MEMORY_BYTES);
    machine.vrings[0].set_queue_next_avail(u16::MAX - 3);
    machine.vrings[0].set_queue_next_used(u16::MAX - 3);
    machine.put(USED + 2, &(u16::MAX - 3).to_le_bytes());
    machine.drivers[0] = Driver {
        next_descriptor: 0,
        available: u16::MAX - 3,
        used: u16::MAX - 3,
    };
    for _ in 0..5 {
        // Sixteen chains of one descriptor each.
        machine.put(HEADER, &header(FLUSH, 0));
        let heads: Vec<u16> = (0..16)
            .map(|_| machine.offer(0, &[writable(STATUS, 1)]))
            .collect();
        machine.serve();
        let used: Vec<u16> = machine.used(0).iter().map(|(head, _)| *head).collect();
        assert_eq!(used, heads);
    }
}

#[test]
fn virtqueues_are_served_in_turn() {
    let mut machine = Machine::with(disk_info(), 3, 64, MEMORY_BYTES);
    for index in 0..4u64 {
        for queue in 0..3u64 {
            let place = HEADER + (queue * 4 + index) * 16;
            machine.put(place, &header(IN, queue * 100 + index));
            let parts = [
                readable(place, 16),
                writable(DATA, 512),
                writable(STATUS, 1),
            ];
            machine.offer(usize::try_from(queue).unwrap(), &parts);
        }
    }
    let fragments: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
    let order: Vec<u64> = fragments
        .iter()
        .map(|(_, request)| match request {
            GuestRequest::Read(range) => range.start,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(order, [0, 100, 200, 1, 101, 201, 2, 102, 202, 3, 103, 203]);
    for (tag, fragment) in fragments {
        machine.answer(tag, fragment);
    }
    for queue in 0..3 {
        assert_eq!(machine.used(queue).len(), 4);
    }
}

#[test]
fn a_stopped_virtqueue_is_left_alone() {
    type Change = fn(&Vring, bool);
    let changes: [Change; 2] = [
        |vring, on| vring.set_queue_ready(on),
        |vring, on| vring.set_enabled(on),
    ];
    for change in changes {
        let mut machine = Machine::new();
        let first = offer_flush(&mut machine, 0, 0);
        let (tag, _) = machine.guest.next_request().unwrap();
        let second = offer_flush(&mut machine, 0, 1);
        change(&machine.vrings[0], false);
        assert!(!machine.guest.refresh(0, false));
        assert!(machine.guest.next_request().is_none());
        assert!(!machine.guest.enable_kicks());
        assert!(!machine.guest.is_drained(0));
        machine.guest.answered(tag, Ok(&[]));
        assert!(machine.guest.is_drained(0));
        assert_eq!(machine.used(0), [(first, 1)]);
        let before = machine.all_memory();
        machine.serve();
        machine.guest.signal();
        assert!(
            before == machine.all_memory(),
            "memory of a stopped queue is touched"
        );
        // Started again, it goes on where it was.
        change(&machine.vrings[0], true);
        assert!(machine.guest.refresh(0, false));
        machine.serve();
        assert_eq!(machine.used(0), [(second, 1)]);
    }
}

#[test]
fn a_virtqueue_that_is_not_ready_accepts_nothing_even_before_the_refresh() {
    let mut machine = Machine::new();
    let head = offer_flush(&mut machine, 0, 0);
    for change in [VringT::set_queue_ready, VringT::set_enabled] {
        change(&machine.vrings[0], false);
        assert!(machine.guest.next_request().is_none());
        assert!(machine.guest.is_drained(0));
        change(&machine.vrings[0], true);
    }
    // Nor is it given up.
    machine.serve();
    assert_eq!(machine.used(0), [(head, 1)]);
}

#[test]
fn a_virtqueue_outside_of_memory_is_not_served() {
    let mut machine = Machine::new();
    offer_flush(&mut machine, 0, 0);
    for (table, available, used) in [
        (OUTSIDE, AVAILABLE, USED),
        (0, OUTSIDE, USED),
        (0, AVAILABLE, OUTSIDE),
        (0, AVAILABLE, MEMORY_BYTES - 16),
    ] {
        machine.vrings[0]
            .set_queue_info(table, available, used)
            .unwrap();
        assert!(!machine.guest.refresh(0, false));
        assert!(machine.guest.next_request().is_none());
    }
    machine.vrings[0]
        .set_queue_info(0, AVAILABLE, USED)
        .unwrap();
    assert!(machine.guest.refresh(0, false));
    machine.serve();
    assert_eq!(machine.used(0).len(), 1);
}

/// With event indices the driver chooses the entry after which it is notified, without them it is
/// always notified.
#[test]
fn the_driver_is_signalled_when_it_asks_for_it() {
    let mut machine = Machine::new();
    let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
    let call = event.try_clone().unwrap();
    machine.vrings[0].set_call(Some(File::from(call)));
    machine.vrings[0].set_queue_event_idx(true);
    let used_event = AVAILABLE + 4 + 2 * 64;
    machine.put(used_event, &2u16.to_le_bytes());
    for expected in [false, false, true, false] {
        offer_flush(&mut machine, 0, 0);
        machine.serve();
        machine.guest.signal();
        // A second call has nothing to signal.
        machine.guest.signal();
        let mut count = [0; 8];
        let notified = rustix::io::read(&event, &mut count).is_ok();
        assert_eq!(notified, expected);
        assert_eq!(
            u64::from_ne_bytes(count),
            u64::from(expected),
            "notified once"
        );
    }
}

#[test]
fn kicks_are_enabled_only_when_no_chain_is_available() {
    let mut machine = Machine::new();
    const NO_NOTIFY: u16 = 1;
    assert!(!machine.guest.enable_kicks());
    offer_flush(&mut machine, 0, 0);
    let (tag, _) = machine.guest.next_request().unwrap();
    assert_eq!(machine.get_u16(USED), NO_NOTIFY);
    machine.guest.answered(tag, Ok(&[]));
    // A chain that came in between, without a kick, is not lost.
    offer_flush(&mut machine, 0, 1);
    assert!(machine.guest.enable_kicks());
    assert_eq!(machine.get_u16(USED), 0);
    machine.serve();
    assert!(!machine.guest.enable_kicks());
    assert_eq!(machine.used(0).len(), 2);
}

/// The frontend refreshes a virtqueue that runs, whose driver was asked not to kick.
#[test]
fn a_virtqueue_that_is_refreshed_while_it_runs_enables_kicks_again() {
    let mut machine = Machine::new();
    assert!(!machine.guest.enable_kicks());
    offer_flush(&mut machine, 0, 0);
    machine.serve();
    assert_ne!(machine.get_u16(USED), 0, "no kicks wanted");
    assert!(machine.guest.refresh(0, false));
    assert!(!machine.guest.enable_kicks());
    assert_eq!(machine.get_u16(USED), 0);
}
