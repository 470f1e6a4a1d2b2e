//! Inputs that make sense, for the fuzzer to begin with. What it has made of them is in `corpus/`.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::device::Step;
use super::message::{Kind, MEMORY_BYTES, Message, NEGOTIATE, START, USER_ADDRESS, code};

/// A name and the bytes of an input.
pub type Seed = (&'static str, Vec<u8>);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn put(memory: &mut Vec<u8>, place: usize, bytes: &[u8]) {
    memory.resize(memory.len().max(place + bytes.len()), 0);
    memory[place..place + bytes.len()].copy_from_slice(bytes);
}

fn put_table(memory: &mut Vec<u8>, place: usize, table: &[(u64, u32, u16, u16)]) {
    for (index, &(address, len, flags, next)) in table.iter().enumerate() {
        let descriptor = Descriptor::new(address, len, flags, next);
        put(memory, place + 16 * index, descriptor.as_slice());
    }
}

fn header(request_type: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&request_type.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&sectors.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}

/// For `request`: tables of 16 entries, the chain begins at the first.
pub fn request() -> Vec<Seed> {
    const HEADER: u64 = 0x140;
    const SEGMENTS: u64 = 0x160;
    const INDIRECT_TABLE: usize = 0x100;
    let input = |table: &[(u64, u32, u16, u16)], request_type, sector| {
        let mut input = vec![4, 0, 0, 0];
        let mut memory = Vec::new();
        put_table(&mut memory, 0, table);
        put(&mut memory, 0x140, &header(request_type, sector));
        put(&mut memory, 0x160, &segment(3, 5, 0));
        put(&mut memory, 0x170, &segment(8, 8, 1));
        input.append(&mut memory);
        input
    };
    let head = (HEADER, 16, NEXT, 1);
    let status = (0x1ff, 1, WRITE, 0);
    let mut seeds = vec![
        (
            "read",
            input(
                &[head, (0x1000, 1024, NEXT | WRITE, 2), status],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "write",
            input(&[head, (0x1000, 1024, NEXT, 2), status], VIRTIO_BLK_T_OUT, 3),
        ),
        ("flush", input(&[head, status], VIRTIO_BLK_T_FLUSH, 0)),
        (
            "get-id",
            input(
                &[head, (0x1000, 20, NEXT | WRITE, 2), status],
                VIRTIO_BLK_T_GET_ID,
                0,
            ),
        ),
        (
            "discard",
            input(&[head, (SEGMENTS, 16, NEXT, 2), status], VIRTIO_BLK_T_DISCARD, 0),
        ),
        (
            "write-zeroes",
            input(
                &[head, (SEGMENTS, 32, NEXT, 2), status],
                VIRTIO_BLK_T_WRITE_ZEROES,
                0,
            ),
        ),
        (
            "joined",
            input(
                &[(HEADER, 16, NEXT, 1), (0x1000, 513, WRITE, 0)],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "loop",
            input(&[head, (0x1000, 512, NEXT | WRITE, 1)], VIRTIO_BLK_T_IN, 3),
        ),
        (
            "out-of-table",
            input(&[head, (0x1000, 512, NEXT | WRITE, 16)], VIRTIO_BLK_T_IN, 3),
        ),
        (
            "outside",
            input(
                &[head, (0x5000, 512, NEXT | WRITE, 2), status],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "across-the-end",
            input(
                &[head, (0x3f00, 512, NEXT | WRITE, 2), status],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "around-the-end",
            input(
                &[head, (u64::MAX - 255, 512, NEXT | WRITE, 2), status],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "4-gib",
            input(
                &[head, (0x1000, u32::MAX, NEXT | WRITE, 2), status],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "empty",
            input(&[head, (0x1000, 0, NEXT | WRITE, 2), status], VIRTIO_BLK_T_IN, 3),
        ),
        (
            "read-only-status",
            input(
                &[head, (0x1000, 512, NEXT | WRITE, 2), (0x1ff, 1, 0, 0)],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        ("no-status", input(&[(HEADER, 16, 0, 0)], VIRTIO_BLK_T_FLUSH, 3)),
        (
            "unknown",
            input(&[head, (0x1000, 512, NEXT | WRITE, 2), status], 77, 3),
        ),
    ];
    for (name, bytes, last) in [
        ("indirect", 48, status),
        ("indirect-nested", 48, (INDIRECT_TABLE as u64, 48, INDIRECT, 0)),
        ("indirect-loop", 16 * 0xffff, (0x1ff, 1, WRITE | NEXT, 2)),
        ("indirect-broken", 47, status),
        ("indirect-too-long", 16 * 0x1_0000, status),
    ] {
        let mut seed = input(&[(INDIRECT_TABLE as u64, bytes, INDIRECT, 0)], VIRTIO_BLK_T_IN, 3);
        let mut memory = seed.split_off(4);
        let table = [head, (0x1000, 512, NEXT | WRITE, 2), last];
        put_table(&mut memory, INDIRECT_TABLE, &table);
        seed.append(&mut memory);
        seeds.push((name, seed));
    }
    seeds
}

/// A whole request for `device`: ring, kind (an index of its table), first descriptor, sector, data and its length
/// (an index of the table).
fn whole(ring: u8, kind: u8, indirect: bool, first: u8, place: u16, len: u8) -> Vec<u8> {
    let choice = ring | u8::from(indirect) << 1 | kind << 2;
    let [low, high] = place.to_le_bytes();
    vec![Step::Request as u8, choice, first, first, 0, low, high, len]
}

/// For `device`: the script begins with memory and two rings of 16 entries that are started.
pub fn device() -> Vec<Seed> {
    const DATA: u16 = 0x3000;
    const SEGMENT: u16 = 0x2200;
    let read = |ring, first| whole(ring, 0, false, first, DATA, 2);
    let write = |ring, first| whole(ring, 1, false, first, DATA + 0x200, 2);
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
            "both-rings-out-of-order",
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
            "discard-in-pieces",
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
            "rings-move",
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

/// Guest memory of `message`: two rings, each with a write, a read and a flush that are available.
pub fn guest_memory() -> Vec<u8> {
    let mut memory = Vec::new();
    for ring in 0..2usize {
        let start = 0x1000 * ring;
        let data = 0x8000 + 0x2000 * ring as u64;
        let header_place = 0x4000 + 0x100 * ring;
        let status = |index: u64| (0x4800 + 16 * ring as u64 + index, 1, WRITE, 0);
        let place = |index: usize| (header_place + 16 * index) as u64;
        let table = [
            (place(0), 16, NEXT, 1),
            (data, 4096, NEXT, 2),
            status(0),
            (place(1), 16, NEXT, 4),
            (data + 0x1000, 4096, NEXT | WRITE, 5),
            status(1),
            (place(2), 16, NEXT, 7),
            status(2),
        ];
        put_table(&mut memory, start, &table);
        let kinds = [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_FLUSH];
        for (index, kind) in kinds.into_iter().enumerate() {
            put(
                &mut memory,
                header_place + 16 * index,
                &header(kind, 8 * ring as u64),
            );
        }
        let available = [0u16, 3, 0, 3, 6].map(u16::to_le_bytes).concat();
        put(&mut memory, start + 0x400, &available);
    }
    memory
}

fn message(code: u8, flags: u8, payload: &[u8], kinds: &[Kind]) -> Vec<u8> {
    let kinds: Vec<u8> = kinds.iter().map(|kind| *kind as u8).collect();
    let message = Message {
        code,
        flags,
        surplus: 0,
        payload,
        kinds: &kinds,
    };
    message.input()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
}

fn state(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_ne_bytes).concat()
}

fn vring_address(index: u64) -> Vec<u8> {
    let start = USER_ADDRESS + 0x1000 * index;
    numbers(&[index, start, start + 0x800, start + 0x400, 0])
}

fn memory_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let count = regions.len() as u64;
    let fields = regions.iter().flatten().copied();
    numbers(&[count].into_iter().chain(fields).collect::<Vec<_>>())
}

/// The messages that set memory and both rings up.
pub fn start() -> Vec<u8> {
    let mut messages = message(
        code::SET_MEM_TABLE,
        0,
        &memory_table(&[[0, MEMORY_BYTES, USER_ADDRESS, 0]]),
        &[Kind::Memory],
    );
    for ring in 0..2u8 {
        let index = u32::from(ring);
        messages.extend(message(code::SET_VRING_NUM, 0, &state(index, 16), &[]));
        messages.extend(message(code::SET_VRING_BASE, 0, &state(index, 0), &[]));
        messages.extend(message(code::SET_VRING_ADDR, 0, &vring_address(ring.into()), &[]));
        let payload = numbers(&[ring.into()]);
        messages.extend(message(code::SET_VRING_CALL, 0, &payload, &[Kind::Event]));
        messages.extend(message(code::SET_VRING_KICK, 0, &payload, &[Kind::Event]));
        messages.extend(message(code::SET_VRING_ENABLE, 0, &state(index, 1), &[]));
    }
    messages
}

/// For `message`.
pub fn message_inputs() -> Vec<Seed> {
    use Kind::*;
    const ACK: u8 = 8;
    let input = |options, messages: &[Vec<u8>]| [vec![options, 0, 0], messages.concat()].concat();
    let started = NEGOTIATE | START;
    let inflight = |bytes, queues: u16, size: u16| {
        let counts = [queues, size, 0, 0].map(u16::to_ne_bytes).concat();
        [numbers(&[bytes, 0]), counts].concat()
    };
    let config = |offset: u32, bytes: u8| {
        let fields = [offset, bytes.into(), 0].map(u32::to_ne_bytes).concat();
        [fields, vec![0; bytes.into()]].concat()
    };
    let single = |bytes| numbers(&[0, 0x1_0000, bytes, USER_ADDRESS + 0x10_0000, 0]);
    let vring = |ring| numbers(&[ring]);
    let mut seeds = vec![
        ("nothing", input(0, &[])),
        ("negotiation", input(NEGOTIATE, &[])),
        (
            "questions",
            input(
                NEGOTIATE,
                &[
                    message(code::GET_QUEUE_NUM, ACK, &[], &[]),
                    message(code::GET_MAX_MEM_SLOTS, 0, &[], &[]),
                    message(code::GET_CONFIG, 0, &config(0, 60), &[]),
                    message(code::GET_INFLIGHT_FD, 0, &inflight(0, 2, 16), &[]),
                    message(code::GET_VRING_BASE, 0, &state(0, 0), &[]),
                ],
            ),
        ),
        ("start", input(started, &[])),
        (
            "stop",
            input(
                started,
                &[
                    message(code::GET_VRING_BASE, 0, &state(0, 0), &[]),
                    message(code::SET_VRING_ENABLE, ACK, &state(1, 0), &[]),
                    message(code::GET_VRING_BASE, 0, &state(1, 0), &[]),
                ],
            ),
        ),
        (
            "reset",
            input(started, &[message(code::RESET_DEVICE, ACK, &[], &[])]),
        ),
        (
            "cache-mode",
            input(
                started,
                &[message(
                    code::SET_CONFIG,
                    ACK,
                    &[&[32, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0][..]].concat(),
                    &[],
                )],
            ),
        ),
        (
            "memory-slots",
            input(
                started,
                &[
                    message(code::ADD_MEM_REG, ACK, &single(0x1000), &[OtherMemory]),
                    message(code::REM_MEM_REG, ACK, &single(0x1000), &[]),
                ],
            ),
        ),
        (
            "log",
            input(
                started,
                &[
                    message(code::SET_LOG_BASE, 0, &numbers(&[0x1000, 0]), &[OtherMemory]),
                    message(
                        code::SET_FEATURES,
                        ACK,
                        &numbers(&[1 << 32 | 1 << 30 | 1 << 26]),
                        &[],
                    ),
                    message(code::SET_VRING_KICK, ACK, &vring(0), &[FullEvent]),
                ],
            ),
        ),
        (
            "wrong-size",
            input(NEGOTIATE, &[vec![code::GET_FEATURES, 0, 5, 0, 0]]),
        ),
        (
            "raw",
            input(0, &[vec![0xff, 0, 0, 12, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]),
        ),
        (
            "no-descriptor",
            input(started, &[message(code::SET_VRING_KICK, ACK, &vring(0x101), &[])]),
        ),
        (
            "too-many-descriptors",
            input(
                NEGOTIATE,
                &[message(code::SET_VRING_KICK, ACK, &vring(0), &[Path; 40])],
            ),
        ),
    ];
    for (name, kind) in [
        ("memory-kick", Memory),
        ("pipe-kick", PipeReader),
        ("directory-kick", Directory),
        ("path-kick", Path),
        ("epoll-kick", Epoll),
        ("itself-kick", Itself),
    ] {
        let again = message(code::SET_VRING_KICK, 0, &vring(1), &[kind]);
        let messages = [
            message(code::SET_VRING_KICK, 0, &vring(0), &[kind]),
            again.clone(),
            again,
        ];
        seeds.push((name, input(started, &messages)));
    }
    for (name, kind) in [
        ("full-call", FullEvent),
        ("pipe-call", PipeWriter),
        ("socket-call", Socket),
        ("directory-call", Directory),
        ("memory-call", Memory),
        ("itself-call", Itself),
    ] {
        let call = message(code::SET_VRING_CALL, 0, &vring(0), &[kind]);
        let err = message(code::SET_VRING_ERR, ACK, &vring(0), &[kind]);
        seeds.push((name, input(started, &[call, err])));
    }
    for (name, kind) in [
        ("zero-memory", Zero),
        ("path-memory", Path),
        ("read-only-memory", ReadOnlyMemory),
        ("sealed-memory", SealedMemory),
        ("empty-memory", EmptyMemory),
        ("timer-memory", Timer),
    ] {
        let regions = [
            [0, MEMORY_BYTES, USER_ADDRESS, 0],
            [0x10_0000, 0x1000, USER_ADDRESS + 0x10_0000, 0],
        ];
        let table = message(code::SET_MEM_TABLE, ACK, &memory_table(&regions), &[Memory, kind]);
        seeds.push((name, input(NEGOTIATE, &[table, start()])));
    }
    for (name, kind, bytes) in [
        ("region", OtherMemory, 0x280),
        ("region-in-guest-memory", Memory, 0x280),
        ("region-too-small", OtherMemory, 0x27f),
        ("region-read-only", ReadOnlyMemory, 0x280),
        ("region-empty", EmptyMemory, 0x280),
    ] {
        let region = message(code::SET_INFLIGHT_FD, ACK, &inflight(bytes, 2, 16), &[kind]);
        seeds.push((name, input(NEGOTIATE, &[region, start()])));
    }
    seeds
}
