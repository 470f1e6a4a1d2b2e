//! Malformed chains: each is completed, and at most that request fails.

use super::*;
use crate::limits::CHAIN_DESCRIPTORS_MAX;

#[test]
fn a_chain_without_room_for_a_status_is_given_back_all_the_same() {
    let mut machine = Machine::new();
    machine.put_header(OUT, 0);
    for parts in [
        &[readable(HEADER, 16)][..],
        &[readable(HEADER, 16), readable(DATA, 512)],
        &[readable(HEADER, 16), writable(STATUS, 0)],
        &[readable(HEADER, 0)],
    ] {
        assert_eq!(machine.serve_chain(parts), 0);
    }
    machine.assert_untouched(&[]);
    assert!(machine.asked.is_empty());
}

#[test]
fn a_short_header_is_an_error() {
    for len in [0, 1, 15] {
        let mut machine = Machine::new();
        machine.put_header(FLUSH, 0);
        let used = machine.serve_chain(&[readable(HEADER, len), writable(STATUS, 1)]);
        assert_eq!((machine.status(), used), (IOERR, 1));
        assert!(machine.asked.is_empty());
    }
}

#[test]
fn readable_after_writable_is_an_error() {
    let mut machine = Machine::new();
    for request_type in [IN, OUT] {
        for parts in [
            [
                readable(HEADER, 16),
                writable(STATUS, 1),
                readable(DATA, 512),
            ],
            [
                writable(STATUS, 1),
                readable(HEADER, 16),
                readable(DATA, 512),
            ],
            [
                readable(HEADER, 8),
                writable(STATUS, 1),
                readable(HEADER + 8, 8),
            ],
        ] {
            machine.put_header(request_type, 0);
            assert_eq!(machine.serve_chain(&parts), 1);
            assert_eq!(machine.status(), IOERR);
        }
    }
    assert!(machine.asked.is_empty());
}

#[test]
fn addresses_outside_of_memory() {
    let end = MEMORY_BYTES;
    for outside in [end, OUTSIDE, u64::MAX, u64::MAX - 600] {
        for request_type in [IN, OUT, GET_ID] {
            let data = |address| match request_type {
                OUT => readable(address, 512),
                _ => writable(address, 512),
            };
            let mut machine = Machine::new();
            machine.put_header(request_type, 0);
            let own = &[writable(STATUS, 1), writable(DATA, 512)][..];
            // The header.
            machine.serve_chain(&[readable(outside, 16), data(DATA), writable(STATUS, 1)]);
            assert_eq!(machine.status(), IOERR);
            assert!(machine.asked.is_empty());
            // The data.
            machine.put_header(request_type, 0);
            machine.serve_chain(&[readable(HEADER, 16), data(outside), writable(STATUS, 1)]);
            assert_eq!(machine.status(), IOERR);
            machine.assert_untouched(own);
            // The status: no way to report the failure, but the chain is completed.
            machine.put_header(request_type, 0);
            let parts = [readable(HEADER, 16), data(DATA), writable(outside, 1)];
            assert_eq!(machine.serve_chain(&parts), 0);
            machine.assert_untouched(own);
        }
    }
}

#[test]
fn runs_that_cross_the_end_of_memory() {
    let mut machine = Machine::new();
    let last = MEMORY_BYTES - 256;
    machine.put_header(IN, 0);
    machine.serve_chain(&[
        readable(HEADER, 16),
        writable(last, 512),
        writable(STATUS, 1),
    ]);
    assert_eq!(machine.status(), IOERR);
    machine.put_header(OUT, 0);
    machine.serve_chain(&[
        readable(HEADER, 16),
        readable(last, 512),
        writable(STATUS, 1),
    ]);
    assert_eq!(machine.status(), IOERR);
    assert_eq!(
        machine.asked,
        [("read", 0, 1)],
        "nothing is written that was not read"
    );
    // The status byte is the last byte of memory.
    machine.put_header(IN, 0);
    let data = MEMORY_BYTES - 513;
    assert_eq!(
        machine.serve_chain(&[readable(HEADER, 16), writable(data, 513)]),
        513
    );
    assert_eq!(machine.get(MEMORY_BYTES - 1, 1), [OK]);
}

#[test]
fn runs_that_wrap_around_the_address_space() {
    let mut machine = Machine::new();
    for request_type in [IN, OUT] {
        machine.put_header(request_type, 0);
        let flags = if request_type == IN { WRITE } else { 0 };
        let wrapping = Part {
            flags,
            ..readable(u64::MAX - 255, 512)
        };
        machine.serve_chain(&[readable(HEADER, 16), wrapping, writable(STATUS, 1)]);
        assert_eq!(machine.status(), IOERR);
        machine.assert_untouched(&[writable(STATUS, 1)]);
    }
    // The status byte would be at address 255.
    machine.put_header(IN, 0);
    let parts = [readable(HEADER, 16), writable(u64::MAX - 256, 513)];
    assert_eq!(machine.serve_chain(&parts), 0);
    machine.assert_untouched(&[]);
}

/// Serves a malformed chain that begins with a proper header and has the status byte in it.
fn assert_malformed(machine: &mut Machine, head: u16) {
    machine.put_header(IN, 0);
    machine.offer_head(0, head);
    machine.serve_head(head);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.asked.is_empty());
}

#[test]
fn chains_that_loop_or_leave_their_table() {
    let mut machine = Machine::new();
    let put = |machine: &mut Machine, index, part, next| {
        machine.put_descriptor(0, index, &descriptor(part, NEXT, next));
    };
    // To itself, to the one before, and out of the table.
    for next in [2, 1, 64, u16::MAX] {
        put(&mut machine, 0, readable(HEADER, 16), 1);
        put(&mut machine, 1, writable(DATA, 512), 2);
        put(&mut machine, 2, writable(STATUS, 1), next);
        if next == 1 {
            // The last of 64 must be the one with the status.
            put(&mut machine, 0, readable(HEADER, 16), 3);
            put(&mut machine, 3, writable(DATA, 512), 1);
        }
        assert_malformed(&mut machine, 0);
    }
    // A header without an end.
    put(&mut machine, 0, readable(HEADER, 16), 0);
    machine.offer_head(0, 0);
    assert_eq!(machine.serve_head(0), 0);
    // The last descriptor of an indirect table goes on.
    let mut machine = Machine::new();
    machine.put(TABLE, &descriptor(readable(HEADER, 16), NEXT, 1));
    machine.put(TABLE + 16, &descriptor(writable(STATUS, 1), NEXT, 2));
    let table = Part {
        flags: INDIRECT,
        ..readable(TABLE, 32)
    };
    machine.put_descriptor(0, 0, &descriptor(table, 0, 0));
    assert_malformed(&mut machine, 0);
}

#[test]
fn indirect_tables_that_are_none() {
    let mut machine = Machine::new();
    let indirect = |address, len| Part {
        flags: INDIRECT,
        ..readable(address, len)
    };
    for table in [
        indirect(TABLE, 0),
        indirect(TABLE, 15),
        indirect(TABLE, 40),
        indirect(OUTSIDE, 32),
        indirect(u64::MAX - 15, 32),
        indirect(TABLE, 16 * 0x1_0000),
    ] {
        machine.put(TABLE, &descriptor(writable(STATUS, 1), 0, 0));
        assert_eq!(machine.serve_chain(&[table]), 0);
        // After a request that would be complete without it.
        machine.put_header(FLUSH, 0);
        machine.serve_chain(&[readable(HEADER, 16), writable(STATUS, 1), table]);
        assert_eq!(machine.status(), IOERR);
    }
    // A table with a descriptor behind it.
    machine.put_header(FLUSH, 0);
    machine.put(TABLE, &descriptor(readable(HEADER, 16), NEXT, 1));
    machine.put(TABLE + 16, &descriptor(writable(STATUS, 1), 0, 0));
    assert_eq!(
        machine.serve_chain(&[indirect(TABLE, 32), writable(DATA, 1)]),
        0
    );
    assert!(machine.asked.is_empty());
    assert_eq!(machine.serve_chain(&[indirect(TABLE, 32)]), 1);
    assert_eq!((machine.status(), machine.asked.len()), (OK, 1));
    machine.asked.clear();
    // A table in a table.
    machine.put_header(FLUSH, 0);
    machine.put(TABLE, &descriptor(readable(HEADER, 16), NEXT, 1));
    machine.put(TABLE + 16, &descriptor(writable(STATUS, 1), NEXT, 2));
    machine.put(TABLE + 32, &descriptor(indirect(TABLE, 16), 0, 0));
    machine.serve_chain(&[indirect(TABLE, 48)]);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.asked.is_empty());
}

#[test]
fn chains_longer_than_any_queue_are_refused() {
    let info = disk_info();
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    let longest = usize::from(QUEUE_SIZE_MAX);
    let looked_at = usize::from(CHAIN_DESCRIPTORS_MAX);
    for (count, status) in [
        (longest, OK),
        (longest + 1, IOERR),
        (1500, IOERR),
        (looked_at, IOERR),
    ] {
        machine.put_header(IN, 0);
        let mut parts = vec![readable(HEADER, 16)];
        parts.resize((count - 1).min(longest - 1), writable(DATA, 512));
        // Above that the descriptors are empty: it is their number that matters.
        parts.resize(count - 1, writable(DATA, 0));
        parts.push(writable(STATUS, 1));
        let head = machine.offer_indirect(0, DATA + 0x10_0000, &parts);
        machine.serve_head(head);
        assert_eq!(machine.status(), status, "{count} descriptors");
    }
}

/// So is the time that one of them takes.
#[test]
fn chains_that_are_far_too_long_are_refused_where_they_are_cut() {
    let mut machine = Machine::with(disk_info(), 1, 64, MEMORY_BYTES);
    let looked_at = usize::from(CHAIN_DESCRIPTORS_MAX);
    for count in [looked_at + 1, 65535] {
        machine.put_header(IN, 0);
        let mut parts = vec![readable(HEADER, 16)];
        parts.resize(looked_at - 1, writable(DATA, 0));
        parts.push(writable(STATUS, 1));
        parts.resize(count, writable(STATUS + 1, 1));
        let head = machine.offer_indirect(0, DATA + 0x10_0000, &parts);
        machine.serve_head(head);
        assert_eq!(machine.status(), IOERR, "{count} descriptors");
    }
}

#[test]
fn chains_above_4_gib_are_refused() {
    let mut machine = Machine::new();
    machine.put_header(IN, 0);
    let parts = [
        readable(HEADER, 16),
        writable(STATUS, 1),
        writable(DATA, u32::MAX as usize),
        writable(STATUS, 1),
    ];
    machine.serve_chain(&parts);
    assert_eq!(machine.status(), IOERR);
    // As long as can be: too long for the disk, not for the arithmetic.
    machine.put_header(IN, 0);
    machine.serve_chain(&[
        readable(HEADER, 16),
        writable(DATA, u32::MAX as usize - 17),
        writable(STATUS, 1),
    ]);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.asked.is_empty());
}
