//! Discard and write-zeroes: segments, flags and limits (virtio 1.3, 5.2.6).

use super::*;
use crate::limits::{
    ZERO_BYTES_MAX, ZERO_FRAGMENTS_IN_FLIGHT_MAX, ZERO_SECTORS_MAX, ZERO_SEGMENTS_MAX,
};

const UNMAP: u32 = 1;

/// Serves a request with these bytes for segments and returns its status.
fn status_of(machine: &mut Machine, request_type: u32, segments: &[u8]) -> u8 {
    machine.put_header(request_type, 0);
    machine.put(DATA, segments);
    machine.put(STATUS, &[NO_STATUS]);
    let data = cut(readable(DATA, segments.len()), &[7, 16, 40]);
    let parts = [vec![readable(HEADER, 16)], data, vec![writable(STATUS, 1)]].concat();
    let used = machine.serve_chain(&parts);
    assert_eq!(used, 1);
    machine.assert_untouched(&parts);
    machine.status()
}

#[test]
fn every_segment_is_zeroed_as_it_says() {
    let mut machine = Machine::new();
    let segments = [segment(3, 2, 0), segment(9, 0, 0), segment(100, 7, UNMAP)].concat();
    assert_eq!(status_of(&mut machine, WRITE_ZEROES, &segments), OK);
    assert_eq!(machine.asked, [("zero", 3, 2), ("unmap", 100, 7)]);
    let zeroes = |sectors: Range<usize>| {
        machine.disk[sectors.start * 512..sectors.end * 512]
            .iter()
            .all(|b| *b == 0)
    };
    assert!(zeroes(3..5) && zeroes(100..107));
    assert!(!zeroes(2..3) && !zeroes(5..6) && !zeroes(107..108));
    machine.asked.clear();
    assert_eq!(status_of(&mut machine, DISCARD, &segment(3, 2, 0)), OK);
    assert_eq!(machine.asked, [("unmap", 3, 2)]);
}

#[test]
fn flags_that_are_reserved_are_unsupported_and_nothing_is_done() {
    let mut machine = Machine::new();
    let good = segment(0, 1, 0);
    for (request_type, flags) in [
        (DISCARD, UNMAP),
        (DISCARD, 2),
        (WRITE_ZEROES, 2),
        (WRITE_ZEROES, 1 << 31 | 1),
    ] {
        let bad = [good.clone(), segment(8, 1, flags)].concat();
        assert_eq!(status_of(&mut machine, request_type, &bad), UNSUPP);
    }
    // The flag is looked at before the range.
    let end = disk_info().capacity.sectors();
    assert_eq!(
        status_of(
            &mut machine,
            DISCARD,
            &[segment(end, 1, 0), segment(0, 1, 2)].concat()
        ),
        UNSUPP
    );
    assert!(machine.asked.is_empty());
}

#[test]
fn limits_are_those_of_the_config_space() {
    let info = DiskInfo {
        capacity: Capacity::new(1 << 40),
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    let most = usize::try_from(ZERO_SEGMENTS_MAX).unwrap();
    for request_type in [DISCARD, WRITE_ZEROES] {
        assert_eq!(
            status_of(&mut machine, request_type, &segment(0, 0, 0).repeat(most)),
            OK
        );
        assert_eq!(
            status_of(
                &mut machine,
                request_type,
                &segment(0, 0, 0).repeat(most + 1)
            ),
            UNSUPP
        );
        assert_eq!(
            status_of(
                &mut machine,
                request_type,
                &segment(0, ZERO_SECTORS_MAX + 1, 0)
            ),
            IOERR
        );
        assert_eq!(
            status_of(&mut machine, request_type, &segment((1 << 40) - 1, 2, 0)),
            IOERR
        );
        assert_eq!(
            status_of(&mut machine, request_type, &segment(u64::MAX, 1, 0)),
            IOERR
        );
        assert_eq!(
            status_of(&mut machine, request_type, &segment(0, 1, 0)[..15]),
            IOERR
        );
        assert_eq!(status_of(&mut machine, request_type, &[]), IOERR);
    }
    assert!(machine.asked.is_empty());
}

#[test]
fn a_read_only_disk_is_not_zeroed() {
    let info = DiskInfo {
        read_only: true,
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    for request_type in [DISCARD, WRITE_ZEROES] {
        assert_eq!(
            status_of(&mut machine, request_type, &segment(0, 1, 0)),
            IOERR
        );
    }
    assert!(machine.asked.is_empty());
}

#[test]
fn a_large_range_has_few_fragments_in_flight_and_does_not_hold_up_others() {
    let fragments = 3 * ZERO_FRAGMENTS_IN_FLIGHT_MAX as u64;
    let fragment_sectors = ZERO_BYTES_MAX / 512;
    let info = DiskInfo {
        capacity: Capacity::new(fragments * fragment_sectors),
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    machine.put_header(DISCARD, 0);
    let sectors = u32::try_from(fragments * fragment_sectors - 1).unwrap();
    machine.put(DATA, &segment(1, sectors, 0));
    let large = [
        readable(HEADER, 16),
        readable(DATA, 16),
        writable(STATUS, 1),
    ];
    let large = machine.offer(0, &large);
    machine.put(HEADER + 64, &header(IN, 0));
    let small = [
        readable(HEADER + 64, 16),
        writable(DATA + 512, 512),
        writable(STATUS + 1, 1),
    ];
    machine.offer(0, &small);

    let mut zeroed = Vec::new();
    let mut in_flight: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
    assert_eq!(in_flight.len(), ZERO_FRAGMENTS_IN_FLIGHT_MAX + 1);
    assert!(matches!(in_flight.last(), Some((_, GuestRequest::Read(_)))));
    while let Some((tag, request)) = in_flight.pop() {
        match request {
            GuestRequest::Zero {
                range, unmap: true, ..
            } => zeroed.push(range),
            GuestRequest::Read(_) => {}
            other => panic!("{other:?}"),
        }
        let data = [7; 512];
        machine.guest.answered(
            tag,
            Ok(if matches!(request, GuestRequest::Read(_)) {
                &data
            } else {
                &[]
            }),
        );
        in_flight.extend(std::iter::from_fn(|| machine.guest.next_request()));
        assert!(in_flight.len() <= ZERO_FRAGMENTS_IN_FLIGHT_MAX);
    }
    zeroed.sort_unstable_by_key(|range| range.start);
    assert_eq!(zeroed.first().map(|range| range.start), Some(1));
    assert!(zeroed.windows(2).all(|pair| pair[0].end() == pair[1].start));
    assert_eq!(
        zeroed.iter().map(|range| range.count).sum::<u64>(),
        u64::from(sectors)
    );
    assert!(zeroed.iter().all(|range| range.count <= fragment_sectors));
    let given_back: Vec<u16> = machine.used(0).into_iter().map(|(head, _)| head).collect();
    assert_eq!(given_back.len(), 2);
    assert_eq!(given_back[1], large);
    assert_eq!(machine.get(STATUS, 2), [OK, OK]);
}

#[test]
fn a_fragment_that_fails_ends_the_request_once() {
    let info = DiskInfo {
        capacity: Capacity::new(1 << 30),
        ..disk_info()
    };
    let mut machine = Machine::with(info, 1, 64, MEMORY_BYTES);
    machine.put_header(WRITE_ZEROES, 0);
    machine.put(DATA, &segment(0, ZERO_SECTORS_MAX, 0));
    machine.offer(
        0,
        &[
            readable(HEADER, 16),
            readable(DATA, 16),
            writable(STATUS, 1),
        ],
    );
    let in_flight: Vec<_> = std::iter::from_fn(|| machine.guest.next_request()).collect();
    for (index, (tag, _)) in in_flight.into_iter().enumerate() {
        assert!(machine.used(0).is_empty());
        machine
            .guest
            .answered(tag, if index == 1 { Err(FAILED) } else { Ok(&[]) });
        if index > 0 {
            assert!(machine.guest.next_request().is_none());
        } else {
            // A place was free before the failure.
            let (tag, _) = machine.guest.next_request().expect("the next fragment");
            machine.guest.answered(tag, Ok(&[]));
            let (tag, _) = machine.guest.next_request().expect("the next fragment");
            machine.guest.answered(tag, Ok(&[]));
        }
    }
    assert_eq!(machine.used(0).len(), 1);
    assert_eq!(machine.status(), IOERR);
}
