//! Requests that are held (W9), and what becomes of them when their virtqueue stops.

use std::sync::Arc;

use super::*;
use crate::device::guest::Holder;
use crate::device::hold::{ErrorPolicy, Hold, OnError};
use crate::engine::{Tag, WorkerIndex};

const SECTORS_OF_A_FRAGMENT: usize = 2048;

fn holding_machine() -> (Machine, Arc<Hold>) {
    let hold = Arc::new(Hold::new(ErrorPolicy {
        read: OnError::Stop,
        write: OnError::Stop,
    }));
    let mut machine = Machine::new();
    let holder = Holder::new(Arc::clone(&hold), WorkerIndex(0), 0);
    machine.guest.set_holder(holder);
    (machine, hold)
}

/// A read of this many sectors, from the first on.
fn offer_read(machine: &mut Machine, sectors: usize) -> (u16, Part) {
    machine.put_header(IN, 0);
    let data = writable(DATA, sectors * 512);
    let head = machine.offer(0, &[readable(HEADER, 16), data, writable(STATUS, 1)]);
    (head, data)
}

fn stop(machine: &mut Machine) {
    machine.vrings[0].set_enabled(false);
    assert!(!machine.guest.refresh(0, false));
}

#[test]
fn a_virtqueue_that_stops_is_drained_of_what_is_held() {
    let (mut machine, hold) = holding_machine();
    let (head, _) = offer_read(&mut machine, 1);
    let (tag, _) = machine.guest.next_request().unwrap();
    assert!(machine.guest.answered(tag, Err(FAILED)));
    assert!(hold.is_holding() && machine.used(0).is_empty());
    stop(&mut machine);
    assert!(machine.guest.is_drained(0) && !hold.is_holding());
    assert_eq!(machine.used(0)[0].0, head);
    assert_eq!(machine.status(), IOERR);
    machine.guest.self_check();
}

#[test]
fn what_fails_after_its_virtqueue_has_stopped_is_not_held() {
    let (mut machine, hold) = holding_machine();
    offer_read(&mut machine, 1);
    let (tag, _) = machine.guest.next_request().unwrap();
    stop(&mut machine);
    assert!(!machine.guest.is_drained(0));
    machine.guest.answered(tag, Err(FAILED));
    assert!(machine.guest.is_drained(0) && !hold.is_holding());
    assert_eq!(machine.status(), IOERR);
}

#[test]
fn only_the_fragments_that_failed_are_submitted_again() {
    let (mut machine, hold) = holding_machine();
    let (head, data) = offer_read(&mut machine, SECTORS_OF_A_FRAGMENT + 8);
    let fragments: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
    let [(first, _), (second, request)] = fragments.try_into().unwrap();
    assert!(machine.guest.answered(first, Err(FAILED)));
    machine.answer(second, request);
    assert!(machine.used(0).is_empty());
    hold.continue_all();
    let (ticket, tag) = hold.next(WorkerIndex(0)).unwrap();
    assert!(matches!(tag, Tag::Guest { fragment, .. } if fragment == first));
    let request = machine.guest.held_request(first).unwrap();
    hold.submits(ticket);
    machine.answer(first, request);
    hold.submitted(ticket);
    assert!(hold.next(WorkerIndex(0)).is_none() && !hold.is_holding());
    assert_eq!((machine.used(0)[0].0, machine.status()), (head, OK));
    let bytes = usize::try_from(data.len).unwrap();
    assert_eq!(machine.get(DATA, bytes), machine.disk[..bytes]);
}
