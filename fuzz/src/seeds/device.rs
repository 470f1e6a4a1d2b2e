//! Inputs of `device`. A script begins with memory and two virtqueues of 16 entries that are
//! started.

use super::super::device::Step;
use super::Seed;

/// A whole request for `device`: virtqueue, kind (an index of its table), first descriptor, sector,
/// data and its length (an index of the table).
fn whole(queue: u8, kind: u8, indirect: bool, first: u8, place: u16, len: u8) -> Vec<u8> {
    let choice = queue | u8::from(indirect) << 1 | kind << 2;
    let [low, high] = place.to_le_bytes();
    vec![Step::Request as u8, choice, first, first, 0, low, high, len]
}

/// All of them.
pub fn all() -> Vec<Seed> {
    const DATA: u16 = 0x3000;
    const SEGMENT: u16 = 0x2200;
    let read = |queue, first| whole(queue, 0, false, first, DATA, 2);
    let write = |queue, first| whole(queue, 1, false, first, DATA + 0x200, 2);
    let step = |step: Step, operands: &[u8]| [&[step as u8], operands].concat();
    let serve = || step(Step::Serve, &[30]);
    let answer = |which: u8| step(Step::Answer, &[which << 1]);
    let fail = |which: u8| step(Step::Answer, &[which << 1 | 1]);
    let sleep = || step(Step::Sleep, &[]);
    let segment = |index, sector: u8, sectors: u16| {
        let [low, high] = sectors.to_le_bytes();
        step(Step::Segment, &[index, sector, 0, low, high, 0])
    };
    let all = |parts: &[Vec<u8>]| parts.concat();
    let region = || step(Step::Region, &[16 << 1 | 1]);
    vec![
        ("read", all(&[read(0, 0), serve(), answer(0), sleep()])),
        (
            "both-queues-out-of-order",
            all(&[
                read(0, 0),
                write(1, 0),
                read(1, 3),
                write(0, 3),
                serve(),
                answer(3),
                answer(1),
                fail(0),
                answer(0),
                sleep(),
            ]),
        ),
        (
            "every-kind",
            all(&[
                segment(0, 3, 1),
                whole(0, 2, false, 0, DATA, 0),
                whole(0, 3, false, 2, DATA, 0),
                whole(0, 4, false, 5, SEGMENT, 0),
                whole(0, 5, true, 8, SEGMENT, 0),
                whole(0, 7, true, 9, DATA, 2),
                serve(),
                answer(0),
                answer(0),
                answer(0),
                sleep(),
            ]),
        ),
        (
            "discard-in-fragments",
            all(&[
                segment(0, 0, 0x2000),
                whole(0, 4, false, 0, SEGMENT, 0),
                serve(),
                answer(0),
                serve(),
                fail(1),
                answer(0),
                answer(0),
                answer(0),
                serve(),
            ]),
        ),
        (
            "stop-with-requests-out",
            all(&[
                read(0, 0),
                read(0, 3),
                serve(),
                step(Step::Stop, &[0]),
                step(Step::Start, &[0, 1]),
                read(0, 6),
                serve(),
                answer(0),
            ]),
        ),
        (
            "abandon",
            all(&[
                step(Step::Patience, &[1]),
                read(0, 0),
                write(0, 3),
                read(0, 6),
                serve(),
                step(Step::Stop, &[0]),
                answer(0),
                answer(0),
                step(Step::Start, &[0, 1]),
                serve(),
            ]),
        ),
        (
            "region-abandon-and-start-again",
            all(&[
                region(),
                step(Step::Stop, &[0]),
                step(Step::Start, &[0, 1]),
                step(Step::Patience, &[0]),
                write(0, 0),
                read(0, 3),
                serve(),
                step(Step::Stop, &[0]),
                step(Step::Start, &[0, 1]),
                serve(),
                answer(0),
                answer(0),
                answer(0),
                answer(0),
                serve(),
                answer(0),
            ]),
        ),
        (
            "killed",
            all(&[
                region(),
                step(Step::SetUp, &[]),
                step(Step::Stop, &[0]),
                step(Step::Start, &[0, 1]),
                write(0, 0),
                read(0, 3),
                serve(),
                step(Step::Kill, &[]),
                serve(),
                answer(0),
                answer(0),
                serve(),
                step(Step::Stop, &[1]),
            ]),
        ),
        (
            "hostile-region",
            all(&[
                region(),
                step(Step::RegionBytes, &[8, 0, 8, 1, 0, 16, 0, 3, 0, 0, 0]),
                step(Step::RegionBytes, &[0x30, 0, 1, 1]),
                step(Step::RegionBytes, &[0x60, 0, 1, 1]),
                read(0, 0),
                read(0, 3),
                step(Step::Stop, &[0]),
                step(Step::Start, &[0, 1]),
                serve(),
                step(Step::OtherRegion, &[5 << 2 | 1]),
                step(Step::SetUp, &[]),
            ]),
        ),
        (
            "index-jumps",
            all(&[
                read(0, 0),
                step(Step::Index, &[0, 0xff, 0x7f]),
                serve(),
                step(Step::Enable, &[0, 0]),
                step(Step::Enable, &[0, 1]),
                step(Step::Index, &[0, 2, 0]),
                serve(),
            ]),
        ),
        (
            "queues-move",
            all(&[
                read(0, 0),
                serve(),
                step(Step::Addresses, &[0, 2]),
                read(0, 3),
                serve(),
                answer(0),
                step(Step::Size, &[0, 2]),
                read(0, 1),
                serve(),
                step(Step::Base, &[0, 9, 0]),
                serve(),
            ]),
        ),
        (
            "memory-comes-and-goes",
            all(&[
                step(Step::AddMemory, &[2 + 3 * 3]),
                whole(0, 0, false, 0, 0xa000, 2),
                whole(0, 1, false, 3, 0xa000, 2),
                serve(),
                step(Step::RemoveMemory, &[2 + 3 * 3]),
                answer(0),
                answer(0),
                read(0, 6),
                step(Step::RemoveMemory, &[0]),
                serve(),
                step(Step::MemoryTable, &[1, 1, 3]),
                serve(),
            ]),
        ),
        (
            "logged",
            all(&[
                step(Step::Log, &[0]),
                step(Step::Features, &[0b11_1111]),
                read(0, 0),
                serve(),
                answer(0),
                step(Step::Features, &[0b1_1111]),
            ]),
        ),
        (
            "reset-and-disconnect",
            all(&[
                read(0, 0),
                serve(),
                step(Step::Reset, &[]),
                step(Step::SetUp, &[]),
                read(0, 3),
                serve(),
                step(Step::Disconnect, &[]),
                step(Step::SetUp, &[]),
                read(1, 3),
                serve(),
                answer(0),
            ]),
        ),
        (
            "cache-modes",
            all(&[
                write(0, 0),
                serve(),
                step(Step::CacheMode, &[0]),
                write(0, 3),
                serve(),
                step(Step::Patience, &[0xff]),
                step(Step::CacheMode, &[1]),
            ]),
        ),
        (
            "soup",
            all(&[
                step(Step::Header, &[0, 0, 3, 0]),
                step(Step::Descriptor, &[0, 0, 0, 0x20, 0, 1, 1]),
                step(Step::Descriptor, &[0, 1, 0, 0x30, 3, 3, 0]),
                step(Step::Descriptor, &[2, 0, 0, 0x24, 9, 4, 0]),
                step(Step::Descriptor, &[0, 2, 0, 0x24, 9, 4, 0]),
                step(Step::Offer, &[0, 0]),
                step(Step::Offer, &[0, 2]),
                step(Step::Offer, &[0, 0xff]),
                serve(),
                step(Step::Put, &[0, 0x30, 2, 1, 2]),
            ]),
        ),
    ]
}
