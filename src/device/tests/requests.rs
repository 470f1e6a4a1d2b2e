//! Well-formed requests: every legal split of a chain, what each type does, used lengths,
//! fragments.

use super::*;

#[test]
fn a_header_in_any_number_of_fragments() {
    for lengths in [&[16][..], &[8, 8], &[1], &[3, 1, 5]] {
        let mut machine = Machine::new();
        machine.put_header(IN, 3);
        let mut parts = cut(readable(HEADER, 16), lengths);
        parts.extend([writable(DATA, 1024), writable(STATUS, 1)]);
        assert_eq!(machine.serve_chain(&parts), 1025);
        assert_eq!(machine.status(), OK);
        assert_eq!(machine.get(DATA, 1024), bytes_of(&machine.disk, 3, 1024));
        machine.assert_untouched(&[writable(DATA, 1024), writable(STATUS, 1)]);
    }
}

#[test]
fn header_and_data_in_one_descriptor() {
    let mut machine = Machine::new();
    machine.put_header(OUT, 7);
    machine.put(HEADER + 16, &[0x11; 1536]);
    let used = machine.serve_chain(&[readable(HEADER, 16 + 1536), writable(STATUS, 1)]);
    assert_eq!((used, machine.status()), (1, OK));
    assert_eq!(machine.asked, [("write", 7, 3)]);
    assert_eq!(bytes_of(&machine.disk, 7, 1536), [0x11; 1536]);
    machine.assert_untouched(&[writable(STATUS, 1)]);
}

#[test]
fn a_header_that_ends_within_the_data() {
    let mut machine = Machine::new();
    machine.put_header(OUT, 0);
    machine.put(HEADER + 16, &[1; 100]);
    machine.put(DATA, &[2; 412]);
    let parts = [
        readable(HEADER, 10),
        readable(HEADER + 10, 106),
        readable(DATA, 412),
        writable(STATUS, 1),
    ];
    assert_eq!(machine.serve_chain(&parts), 1);
    assert_eq!(machine.disk[..100], [1; 100]);
    assert_eq!(machine.disk[100..512], [2; 412]);
}

#[test]
fn data_and_status_in_one_descriptor() {
    let mut machine = Machine::new();
    machine.put_header(IN, 1);
    let used = machine.serve_chain(&[readable(HEADER, 16), writable(DATA, 513)]);
    assert_eq!(used, 513);
    assert_eq!(machine.get(DATA, 512), bytes_of(&machine.disk, 1, 512));
    assert_eq!(machine.get(DATA + 512, 1), [OK]);
    machine.assert_untouched(&[writable(DATA, 513)]);
}

#[test]
fn data_in_many_odd_fragments_lands_where_it_belongs() {
    const LEN: usize = 7 * 512;
    let mut machine = Machine::with(disk_info(), 1, 256, MEMORY_BYTES);
    for (request_type, flags) in [(IN, WRITE), (OUT, 0)] {
        machine.put_header(request_type, 2);
        // Backwards through memory, with a gap after each part.
        let mut parts = vec![readable(HEADER, 16)];
        let mut len = 0;
        while len < LEN {
            let fragment = (parts.len() * 7 % 31 + 1).min(LEN - len);
            let address = DATA + 0x1_0000 - parts.len() as u64 * 64;
            machine.put(address, &vec![parts.len().to_le_bytes()[0]; fragment]);
            parts.push(Part {
                flags,
                ..readable(address, fragment)
            });
            len += fragment;
        }
        assert!(parts.len() > 200);
        parts.push(writable(STATUS, 1));
        let data = &parts[1..parts.len() - 1];
        let wanted = if request_type == IN {
            bytes_of(&machine.disk, 2, LEN)
        } else {
            gather(&machine, data)
        };
        machine.serve_chain(&parts);
        assert_eq!(machine.status(), OK);
        if request_type == IN {
            assert!(gather(&machine, data) == wanted);
        } else {
            assert!(bytes_of(&machine.disk, 2, LEN) == wanted);
        }
        machine.assert_untouched(&parts);
    }
}

#[test]
fn an_indirect_table() {
    let mut machine = Machine::new();
    for parts in [
        vec![
            readable(HEADER, 16),
            writable(DATA, 512),
            writable(STATUS, 1),
        ],
        [
            cut(readable(HEADER, 16), &[1]),
            cut(writable(DATA, 512), &[5, 3]),
            vec![writable(STATUS, 1)],
        ]
        .concat(),
    ] {
        machine.put_header(IN, 9);
        machine.put(DATA, &[0; 512]);
        let head = machine.offer_indirect(0, TABLE, &parts);
        assert_eq!(machine.serve_head(head), 513);
        assert_eq!(machine.status(), OK);
        assert_eq!(machine.get(DATA, 512), bytes_of(&machine.disk, 9, 512));
    }
}

#[test]
fn an_indirect_table_after_ordinary_descriptors() {
    let mut machine = Machine::new();
    machine.put_header(IN, 9);
    machine.put(TABLE, &descriptor(writable(DATA, 512), NEXT, 1));
    machine.put(TABLE + 16, &descriptor(writable(STATUS, 1), 0, 0));
    let table = Part {
        flags: INDIRECT,
        ..readable(TABLE, 32)
    };
    assert_eq!(machine.serve_chain(&[readable(HEADER, 16), table]), 513);
    assert_eq!(machine.status(), OK);
}

// ---- What is asked for

#[test]
fn flush_and_serial_number() {
    let mut machine = Machine::new();
    machine.put_header(FLUSH, u64::MAX);
    assert_eq!(
        machine.serve_chain(&[readable(HEADER, 16), writable(STATUS, 1)]),
        1
    );
    assert_eq!(
        (machine.status(), &machine.asked[..]),
        (OK, &[("flush", 0, 0)][..])
    );

    let mut id = [0; 20];
    id[..SERIAL.len()].copy_from_slice(SERIAL.as_bytes());
    // Exactly the room, too little, none, and too much; the used length counts what is written
    // without a gap.
    for (room, used) in [(20, 21), (5, 6), (1, 2), (0, 1), (64, 20)] {
        machine.put_header(GET_ID, 0);
        machine.put(DATA, &[0xcc; 64]);
        let parts = [
            readable(HEADER, 16),
            writable(DATA, room),
            writable(STATUS, 1),
        ];
        assert_eq!(machine.serve_chain(&parts), used, "room for {room}");
        assert_eq!(machine.status(), OK);
        let filled = room.min(20);
        assert_eq!(machine.get(DATA, filled), id[..filled]);
        assert_eq!(
            machine.get(DATA + filled as u64, 64 - filled),
            vec![0xcc; 64 - filled]
        );
    }
    assert_eq!(machine.asked.len(), 1, "the engine knows no serial number");
}

#[test]
fn a_serial_number_of_full_length() {
    let info = DiskInfo {
        serial: "12345678901234567890".to_owned(),
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    machine.put_header(GET_ID, 0);
    machine.serve_chain(&[
        readable(HEADER, 16),
        writable(DATA, 20),
        writable(STATUS, 1),
    ]);
    assert_eq!(machine.get(DATA, 20), b"12345678901234567890");
}

#[test]
fn unknown_types_are_not_supported() {
    let mut machine = Machine::new();
    // SCSI and SECURE_ERASE were not offered; the rest does not exist.
    for request_type in [2, 3, 5, 7, 9, 12, 14, 24, 0x100, 0x8000_0000, u32::MAX] {
        machine.put_header(request_type, 0);
        let used = machine.serve_chain(&[readable(HEADER, 528), writable(STATUS, 1)]);
        assert_eq!(
            (machine.status(), used),
            (UNSUPP, 1),
            "type {request_type:#x}"
        );
    }
    assert!(machine.asked.is_empty());
}

/// Serves a request for `bytes` bytes from `sector` on, and returns its status.
fn status_of(machine: &mut Machine, request_type: u32, sector: u64, bytes: usize) -> u8 {
    machine.put_header(request_type, sector);
    let data = match request_type {
        IN => writable(DATA, bytes),
        _ => readable(DATA, bytes),
    };
    let used = machine.serve_chain(&[readable(HEADER, 16), data, writable(STATUS, 1)]);
    let wanted = match (request_type, machine.status()) {
        (IN, OK) => bytes + 1,
        (IN, _) if bytes > 0 => 0,
        _ => 1,
    };
    assert_eq!(used as usize, wanted);
    machine.status()
}

#[test]
fn sectors_beyond_the_disk_are_an_error() {
    let mut machine = Machine::new();
    let end = disk_info().capacity.sectors();
    for request_type in [IN, OUT] {
        for (sector, bytes, status) in [
            (end - 1, 512, OK),
            (end - 1, 1024, IOERR),
            (end, 512, IOERR),
            (end, 0, OK),
            (end + 1, 0, IOERR),
            (u64::MAX, 512, IOERR),
            (u64::MAX, 0, IOERR),
            (u64::MAX - 1, 1024, IOERR),
            (u64::MAX / 512, 512, IOERR),
            (u64::MAX / 512 + 1, 512, IOERR),
            (1 << 55, 512, IOERR),
        ] {
            let got = status_of(&mut machine, request_type, sector, bytes);
            assert_eq!(
                got, status,
                "type {request_type}, {bytes} bytes at {sector}"
            );
        }
    }
    assert_eq!(machine.asked, [("read", end - 1, 1), ("write", end - 1, 1)]);
}

#[test]
fn only_whole_blocks_are_served() {
    let mut machine = Machine::new();
    for (bytes, status) in [(511, IOERR), (513, IOERR), (1, IOERR), (512, OK)] {
        assert_eq!(status_of(&mut machine, IN, 0, bytes), status);
        assert_eq!(status_of(&mut machine, OUT, 0, bytes), status);
    }
    let info = DiskInfo {
        block_bytes: 4096,
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    for (sector, bytes, status) in [
        (8, 4096, OK),
        (0, 8192, OK),
        (0, 512, IOERR),
        (1, 4096, IOERR),
        (4, 4096, IOERR),
        (8, 4096 + 512, IOERR),
        (7, 0, IOERR),
    ] {
        for request_type in [IN, OUT] {
            let got = status_of(&mut machine, request_type, sector, bytes);
            assert_eq!(got, status, "{bytes} bytes at {sector}");
        }
    }
}

#[test]
fn requests_without_data_succeed_without_the_engine() {
    let mut machine = Machine::new();
    for request_type in [IN, OUT] {
        assert_eq!(status_of(&mut machine, request_type, 5, 0), OK);
        machine.put_header(request_type, 5);
        let used = machine.serve_chain(&[readable(HEADER, 16), writable(STATUS, 1)]);
        assert_eq!((machine.status(), used), (OK, 1));
    }
    assert!(machine.asked.is_empty());
}

#[test]
fn a_read_only_disk_is_not_written() {
    let info = DiskInfo {
        read_only: true,
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    assert_eq!(status_of(&mut machine, OUT, 0, 512), IOERR);
    assert_eq!(status_of(&mut machine, OUT, 0, 0), IOERR);
    assert_eq!(status_of(&mut machine, IN, 0, 512), OK);
    assert_eq!(machine.asked, [("read", 0, 1)]);
}

#[test]
fn a_driver_without_flush_gets_durable_writes() {
    let mut machine = Machine::new();
    status_of(&mut machine, OUT, 0, 512);
    assert!(!machine.durable);
    assert!(machine.guest.refresh(0, true));
    status_of(&mut machine, OUT, 0, 512);
    assert!(machine.durable);
}

// ---- Used lengths

#[test]
fn the_used_length_claims_nothing_that_is_not_written() {
    let mut machine = Machine::new();
    // Room that these requests do not use: only the status byte behind it is written.
    for request_type in [OUT, FLUSH, 99] {
        machine.put_header(request_type, 0);
        let parts = [
            readable(HEADER, 16),
            writable(DATA, 100),
            writable(STATUS, 1),
        ];
        assert_eq!(machine.serve_chain(&parts), 0);
        assert_ne!(machine.status(), NO_STATUS);
        machine.assert_untouched(&[writable(STATUS, 1)]);
    }
    // A failed read may have written any part of its data.
    machine.failing_sector = Some(1);
    assert_eq!(status_of(&mut machine, IN, 0, 1024), IOERR);
}

// ---- Fragments

const FRAGMENT_SECTORS: u64 = FRAGMENT_BYTES_MAX / 512;
const TWO_AND_A_BIT: usize = (2 << 20) + 1024;
const _: () = assert!(FRAGMENT_BYTES_MAX == 1 << 20);

#[test]
fn a_long_request_is_served_in_fragments() {
    let mut machine = Machine::new();
    machine.put_header(IN, 10);
    let lengths = [12345, 700_000, 1];
    let data = cut(writable(DATA, TWO_AND_A_BIT), &lengths);
    let parts = [
        vec![readable(HEADER, 16)],
        data.clone(),
        vec![writable(STATUS, 1)],
    ]
    .concat();
    machine.offer(0, &parts);
    // The answers come in another order.
    let mut fragments: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
    fragments.reverse();
    for (tag, fragment) in fragments {
        assert_eq!(machine.status(), NO_STATUS);
        assert!(machine.used(0).is_empty());
        assert!(!machine.guest.is_drained(0));
        machine.answer(tag, fragment);
    }
    let mut asked = machine.asked.clone();
    asked.reverse();
    assert_eq!(
        asked,
        [
            ("read", 10, FRAGMENT_SECTORS),
            ("read", 10 + FRAGMENT_SECTORS, FRAGMENT_SECTORS),
            ("read", 10 + 2 * FRAGMENT_SECTORS, 2),
        ]
    );
    assert_eq!(
        machine.used(0),
        [(0, u32::try_from(TWO_AND_A_BIT + 1).unwrap())]
    );
    assert_eq!(machine.status(), OK);
    assert!(machine.get(DATA, TWO_AND_A_BIT) == bytes_of(&machine.disk, 10, TWO_AND_A_BIT));
    machine.assert_untouched(&[writable(DATA, TWO_AND_A_BIT), writable(STATUS, 1)]);

    // And back, to another place.
    machine.put_header(OUT, 100);
    let readable_data = data.iter().map(|part| Part { flags: 0, ..*part }).collect();
    let parts = [
        vec![readable(HEADER, 16)],
        readable_data,
        vec![writable(STATUS, 1)],
    ]
    .concat();
    let wanted = machine.get(DATA, TWO_AND_A_BIT);
    assert_eq!(machine.serve_chain(&parts), 1);
    assert!(bytes_of(&machine.disk, 100, TWO_AND_A_BIT) == wanted);
}

#[test]
fn the_first_failed_fragment_fails_the_request_and_begins_no_further_one() {
    for request_type in [IN, OUT] {
        for (failing_sector, fragments) in
            [(0, 1), (FRAGMENT_SECTORS, 2), (2 * FRAGMENT_SECTORS, 3)]
        {
            let mut machine = Machine::new();
            machine.failing_sector = Some(failing_sector);
            assert_eq!(
                status_of(&mut machine, request_type, 0, TWO_AND_A_BIT),
                IOERR
            );
            assert_eq!(machine.asked.len(), fragments);
        }
    }
}

#[test]
fn a_failed_request_is_given_back_when_all_its_fragments_are_answered() {
    let mut machine = Machine::new();
    machine.put_header(IN, 0);
    machine.offer(
        0,
        &[
            readable(HEADER, 16),
            writable(DATA, TWO_AND_A_BIT),
            writable(STATUS, 1),
        ],
    );
    let first = machine.guest.next_request().unwrap();
    let second = machine.guest.next_request().unwrap();
    machine.guest.answered(second.0, Err(FAILED));
    assert!(
        machine.guest.next_request().is_none(),
        "the third is not begun"
    );
    assert!(
        machine.used(0).is_empty(),
        "the first may still be written to"
    );
    machine.answer(first.0, first.1);
    assert_eq!(machine.used(0), [(0, 0)]);
    assert_eq!(machine.status(), IOERR);
    assert!(machine.guest.is_drained(0));
}

#[test]
fn a_fragment_whose_data_is_not_in_memory_fails_the_request() {
    for request_type in [IN, OUT] {
        let mut machine = Machine::new();
        let flags = if request_type == IN { WRITE } else { 0 };
        machine.put_header(request_type, 0);
        let data = [
            readable(DATA, 1 << 20),
            readable(OUTSIDE, 1 << 20),
            readable(DATA, 1 << 20),
        ];
        let mut parts = vec![readable(HEADER, 16)];
        parts.extend(data.map(|part| Part { flags, ..part }));
        parts.push(writable(STATUS, 1));
        machine.offer(0, &parts);
        // All fragments that may be in flight are so at the same time.
        let fragments: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
        assert_eq!(fragments.len(), if request_type == IN { 3 } else { 1 });
        for (tag, fragment) in fragments {
            assert!(machine.used(0).is_empty());
            machine.answer(tag, fragment);
        }
        assert_eq!(machine.used(0), [(0, u32::from(request_type == OUT))]);
        assert_eq!(machine.status(), IOERR);
    }
}
