//! Properties over random chains and random bytes.

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{QueueOwnedT, QueueT};

use super::super::View;
use super::super::chain::Chain;
use super::*;

/// Cuts a stretch of bytes at these places (parts of a thousand) and spreads the fragments over
/// memory from `base` on, in either direction. Places may be equal: then a descriptor is empty.
fn spread(len: usize, places: &[u16], base: u64, backwards: bool, flags: u16) -> Vec<Part> {
    let mut cuts: Vec<usize> = places
        .iter()
        .map(|place| len * usize::from(*place) / 1000)
        .collect();
    cuts.extend([0, len]);
    cuts.sort_unstable();
    let lengths: Vec<usize> = cuts.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let mut addresses: Vec<u64> = Vec::new();
    let mut address = base;
    for len in if backwards {
        lengths.iter().rev().collect::<Vec<_>>()
    } else {
        lengths.iter().collect()
    } {
        addresses.push(address);
        address += *len as u64 + 3;
    }
    if backwards {
        addresses.reverse();
    }
    let parts = addresses.into_iter().zip(lengths);
    parts
        .map(|(address, len)| Part {
            flags,
            ..readable(address, len)
        })
        .collect()
}

fn scatter(machine: &mut Machine, parts: &[Part], mut bytes: &[u8]) {
    for part in parts {
        let (fragment, rest) = bytes.split_at(part.len as usize);
        machine.put(part.address, fragment);
        bytes = rest;
    }
}

fn small_disk() -> DiskInfo {
    DiskInfo {
        capacity: Capacity::new(32),
        ..disk_info()
    }
}

proptest! {
    /// However a request is cut into descriptors, it is the same request.
    #[test]
    fn any_legal_split_is_the_same_request(
        request_type in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(77)],
        sector in 0..34u64,
        sectors in 0..8usize,
        readable_cuts in vec(0..=1000u16, 0..12),
        writable_cuts in vec(0..=1000u16, 0..12),
        backwards: bool,
        indirect: bool,
    ) {
        let mut machine = Machine::with(small_disk(), 1, 32, 0x3_0000);
        let disk_before = machine.disk.clone();
        let data_bytes = sectors * 512;
        let out_bytes = if request_type == OUT { data_bytes } else { 0 };
        let in_bytes = match request_type {
            IN => data_bytes,
            GET_ID => 20,
            _ => 0,
        };
        let byte = |place: usize| (place * 7).to_le_bytes()[0] & 0x7f;
        let input: Vec<u8> = (0..out_bytes).map(byte).collect();
        let read = spread(16 + out_bytes, &readable_cuts, 0x1_0000, backwards, 0);
        let written = spread(in_bytes + 1, &writable_cuts, 0x2_0000, backwards, WRITE);
        scatter(&mut machine, &read, &[&header(request_type, sector)[..], &input].concat());
        scatter(&mut machine, &written, &vec![NO_STATUS; in_bytes + 1]);
        let parts = [&read[..], &written].concat();
        let head = if indirect {
            machine.offer_indirect(0, 0x8000, &parts)
        } else {
            machine.offer(0, &parts)
        };
        let used = machine.serve_head(head);

        let fits = sector + sectors as u64 <= 32;
        let status = match request_type {
            IN | OUT if !fits => IOERR,
            77 => UNSUPP,
            _ => OK,
        };
        let got = gather(&machine, &written);
        prop_assert_eq!(got[in_bytes], status);
        let full = status == OK || in_bytes == 0;
        prop_assert_eq!(used as usize, if full { in_bytes + 1 } else { 0 });
        let start = usize::try_from(sector).unwrap() * 512;
        let mut disk = disk_before;
        if status == OK {
            match request_type {
                IN => prop_assert!(got[..in_bytes] == disk[start..start + in_bytes]),
                OUT => disk[start..start + out_bytes].copy_from_slice(&input),
                GET_ID => prop_assert!(got.starts_with(SERIAL.as_bytes())),
                _ => {}
            }
        }
        prop_assert!(machine.disk == disk);
        machine.assert_untouched(&written);
    }
}

/// Zones of the soup's memory: virtqueues, indirect tables, and everything else.
const SOUP_TABLES: u64 = 2 * QUEUE_BYTES;
const SOUP_TABLE_ENTRIES: u16 = 64;
const SOUP_DATA: u64 = SOUP_TABLES + 16 * SOUP_TABLE_ENTRIES as u64;
const SOUP_END: u64 = SOUP_DATA + 0x4000;
/// Well-formed headers, at the start of the data.
const SOUP_HEADERS: [(u32, u64); 10] = [
    (IN, 0),
    (IN, 31),
    (OUT, 3),
    (OUT, u64::MAX),
    (FLUSH, 0),
    (GET_ID, 0),
    (IN, 32),
    (1234, 0),
    (DISCARD, 0),
    (WRITE_ZEROES, 0),
];

/// And segments of the last two, one of them beyond the disk: sector, sectors and flags.
const SOUP_SEGMENTS: [(u64, u32, u32); 3] = [(3, 2, 0), (8, 4, 1), (30, 40, 0)];

#[derive(Clone, Copy, Debug)]
struct SoupDescriptor {
    part: Part,
    flags: u16,
    next: u16,
}

fn soup_descriptor() -> impl Strategy<Value = SoupDescriptor> {
    let address = prop_oneof![
        4 => (0..(SOUP_HEADERS.len() + SOUP_SEGMENTS.len()) as u64)
            .prop_map(|index| SOUP_DATA + 16 * index),
        8 => SOUP_DATA..SOUP_END,
        1 => SOUP_END - 20..SOUP_END + 20,
        1 => (0..20u64).prop_map(|back| u64::MAX - back),
        1 => Just(OUTSIDE),
    ];
    let len = prop_oneof![
        4 => Just(16),
        3 => Just(1),
        4 => Just(512),
        1 => Just(513),
        1 => Just(0),
        1 => 0..2000u32,
        1 => Just(u32::MAX),
    ];
    let flags = prop_oneof![
        2 => Just(0),
        6 => Just(NEXT),
        4 => Just(WRITE),
        6 => Just(NEXT | WRITE),
        3 => Just(INDIRECT),
        1 => any::<u16>(),
    ];
    let table = (0..SOUP_TABLE_ENTRIES, 0..20u32, 0..15u32);
    (address, len, flags, 0..18u16, table).prop_map(|(address, len, flags, next, table)| {
        let (entry, entries, odd) = table;
        let part = if flags & INDIRECT == 0 {
            Part {
                address,
                len,
                flags: 0,
            }
        } else {
            Part {
                address: SOUP_TABLES + 16 * u64::from(entry),
                len: if odd == 1 { 7 } else { 16 * entries },
                flags: 0,
            }
        };
        SoupDescriptor { part, flags, next }
    })
}

#[derive(Clone, Copy, Debug)]
enum SoupStep {
    Offer { queue: usize, head: u16 },
    Serve,
    Answer { which: usize, fail: bool },
    Kick,
}

fn soup_step() -> impl Strategy<Value = SoupStep> {
    let head = prop_oneof![60 => 0..16u16, 1 => any::<u16>()];
    prop_oneof![
        8 => (0..2usize, head).prop_map(|(queue, head)| SoupStep::Offer { queue, head }),
        4 => Just(SoupStep::Serve),
        4 => (any::<usize>(), prop::bool::weighted(0.2))
            .prop_map(|(which, fail)| SoupStep::Answer { which, fail }),
        1 => Just(SoupStep::Kick),
    ]
}

proptest! {
    /// Whatever a guest puts into its tables and in whatever order answers come: every accepted
    /// chain is completed once, and only memory that the chains allow is written.
    #[test]
    fn any_descriptor_soup_is_completed_once_and_touches_nothing_else(
        tables in vec(vec(soup_descriptor(), 16), 2),
        indirect in vec(soup_descriptor(), usize::from(SOUP_TABLE_ENTRIES)),
        steps in vec(soup_step(), 1..80),
        event_idx: bool,
    ) {
        let mut machine = Machine::with(small_disk(), 2, 16, SOUP_END);
        machine.put(SOUP_DATA, &vec![0xa5; usize::try_from(SOUP_END - SOUP_DATA).unwrap()]);
        for (index, (request_type, sector)) in SOUP_HEADERS.into_iter().enumerate() {
            machine.put(SOUP_DATA + 16 * index as u64, &header(request_type, sector));
        }
        for (index, (sector, sectors, flags)) in SOUP_SEGMENTS.into_iter().enumerate() {
            let place = SOUP_DATA + 16 * (SOUP_HEADERS.len() + index) as u64;
            machine.put(place, &segment(sector, sectors, flags));
        }
        let mut writable: Vec<Part> = Vec::new();
        let of_queue = |queue| (0..16).map(move |index| queue * QUEUE_BYTES + 16 * index);
        let places = (0..2u64).flat_map(of_queue);
        let of_table = |index| SOUP_TABLES + 16 * index;
        let places = places.chain((0..u64::from(SOUP_TABLE_ENTRIES)).map(of_table));
        let soup = tables.iter().flatten().chain(&indirect);
        for (place, SoupDescriptor { part, flags, next }) in places.zip(soup) {
            machine.put(place, &descriptor(*part, *flags, *next));
            if flags & WRITE != 0 && flags & INDIRECT == 0 {
                writable.push(Part { flags: *flags, ..*part });
            }
        }
        for vring in &machine.vrings {
            vring.set_queue_event_idx(event_idx);
        }
        let mut offered = [Vec::new(), Vec::new()];
        let mut completed = [Vec::new(), Vec::new()];
        let mut in_flight = Vec::new();
        for step in steps.into_iter().chain([SoupStep::Serve]) {
            match step {
                // At most as many as the virtqueue has room for.
                SoupStep::Offer { queue, head } => {
                    if offered[queue].len() - completed[queue].len() < 16 {
                        machine.offer_head(queue, head);
                        offered[queue].push(head);
                    }
                }
                SoupStep::Serve => {
                    in_flight.extend(std::iter::from_fn(|| machine.guest.next_request()));
                }
                SoupStep::Answer { which, fail } if !in_flight.is_empty() => {
                    let (tag, request) = in_flight.swap_remove(which % in_flight.len());
                    machine.failing_sector = match &request {
                        GuestRequest::Read(range) | GuestRequest::Write { range, .. } if fail => {
                            Some(range.start)
                        }
                        _ => None,
                    };
                    machine.answer(tag, request);
                }
                SoupStep::Answer { .. } => {}
                SoupStep::Kick => {
                    machine.guest.signal();
                    machine.guest.enable_kicks();
                }
            }
            for (queue, completed) in completed.iter_mut().enumerate() {
                completed.extend(machine.used(queue).into_iter().map(|(head, _)| head));
            }
        }
        for (tag, request) in in_flight {
            machine.guest.answered(tag, match &request {
                GuestRequest::Read(range) => {
                    let start = usize::try_from(range.start * 512).unwrap();
                    Ok(&machine.disk[start..start + usize::try_from(range.count * 512).unwrap()])
                }
                _ => Ok(&[]),
            });
        }
        for queue in 0..2 {
            prop_assert!(machine.guest.is_drained(queue));
            completed[queue].extend(machine.used(queue).into_iter().map(|(head, _)| head));
            // A head outside of the table breaks the virtqueue.
            let accepted = offered[queue].iter().copied().take_while(|head| *head < 16);
            let mut accepted: Vec<u16> = accepted.collect();
            accepted.sort_unstable();
            completed[queue].sort_unstable();
            prop_assert_eq!(&completed[queue], &accepted);
        }
        machine.assert_untouched(&writable);
    }
}

proptest! {
    /// Another walk of the same chains, `virtio-queue`'s, finds the same descriptors. It differs
    /// where it is laxer: behind a reference to an indirect table, and in longer chains than any
    /// queue has.
    #[test]
    fn chains_are_walked_as_virtio_queue_walks_them(
        table in vec(soup_descriptor(), 16),
        indirect in vec(soup_descriptor(), usize::from(SOUP_TABLE_ENTRIES)),
    ) {
        let mut machine = Machine::with(small_disk(), 1, 16, SOUP_END);
        let places = (0..16u64).map(|index| 16 * index);
        let of_table = |index| SOUP_TABLES + 16 * index;
        let places = places.chain((0..u64::from(SOUP_TABLE_ENTRIES)).map(of_table));
        let descriptors = table.iter().chain(&indirect);
        for (place, SoupDescriptor { part, flags, next }) in places.zip(descriptors) {
            // Two flags that must not come together.
            let flags = if flags & INDIRECT != 0 { flags & !NEXT } else { *flags };
            machine.put(place, &descriptor(*part, flags, *next));
        }
        for head in 0..17u16 {
            machine.offer_head(0, head);
            let mut state = machine.vrings[0].get_mut();
            let fields = |of: Descriptor| (of.addr(), of.len(), of.flags(), of.next());
            let chain = Chain::new(View(&machine.memory), state.get_queue(), head);
            let ours: Vec<_> = chain.map(fields).collect();
            state.get_queue_mut().set_next_avail(head);
            let next = state.get_queue_mut().iter(&machine.memory).unwrap().next();
            let theirs: Vec<_> = next.unwrap().map(fields).collect();
            prop_assert_eq!(&ours, &theirs);
        }
    }
}
