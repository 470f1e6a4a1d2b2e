//! Inputs of `message`, and the messages that begin a connection.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::super::message::{Kind, MEMORY_BYTES, Message, NEGOTIATE, START, USER_ADDRESS, code};
use super::{NEXT, Seed, WRITE, header, put, put_table};

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
    numbers
        .iter()
        .flat_map(|number| number.to_ne_bytes())
        .collect()
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

/// What every frontend begins with.
pub fn negotiation() -> Vec<u8> {
    let features = 1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let protocol_features = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::RESET_DEVICE;
    [
        message(code::SET_OWNER, 0, &[], &[]),
        message(code::GET_FEATURES, 0, &[], &[]),
        message(code::SET_FEATURES, 0, &numbers(&[features]), &[]),
        message(code::GET_PROTOCOL_FEATURES, 0, &[], &[]),
        message(
            code::SET_PROTOCOL_FEATURES,
            0,
            &numbers(&[protocol_features.bits()]),
            &[],
        ),
    ]
    .concat()
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
        messages.extend(message(
            code::SET_VRING_ADDR,
            0,
            &vring_address(ring.into()),
            &[],
        ));
        let payload = numbers(&[ring.into()]);
        messages.extend(message(code::SET_VRING_CALL, 0, &payload, &[Kind::Event]));
        messages.extend(message(code::SET_VRING_KICK, 0, &payload, &[Kind::Event]));
        messages.extend(message(code::SET_VRING_ENABLE, 0, &state(index, 1), &[]));
    }
    messages
}

/// All of them.
pub fn all() -> Vec<Seed> {
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
            "back-channels",
            input(
                NEGOTIATE,
                &[
                    message(code::SET_BACKEND_REQ_FD, ACK, &[], &[Socket]),
                    message(code::SET_BACKEND_REQ_FD, 0, &[], &[Itself]),
                    message(code::GET_QUEUE_NUM, 0, &[], &[]),
                    message(code::SET_BACKEND_REQ_FD, ACK, &[], &[Socket, Socket]),
                ],
            ),
        ),
        (
            "no-back-channel",
            input(
                NEGOTIATE,
                &[message(code::SET_BACKEND_REQ_FD, ACK, &[], &[OtherMemory])],
            ),
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
                    message(
                        code::SET_LOG_BASE,
                        0,
                        &numbers(&[0x1000, 0]),
                        &[OtherMemory],
                    ),
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
            input(
                0,
                &[vec![0xff, 0, 0, 12, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]],
            ),
        ),
        (
            "no-descriptor",
            input(
                started,
                &[message(code::SET_VRING_KICK, ACK, &vring(0x101), &[])],
            ),
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
        let table = message(
            code::SET_MEM_TABLE,
            ACK,
            &memory_table(&regions),
            &[Memory, kind],
        );
        seeds.push((name, input(NEGOTIATE, &[table, start()])));
    }
    for (name, kind, bytes) in [
        ("region", OtherMemory, 0x280),
        ("region-with-room", OtherMemory, MEMORY_BYTES),
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
