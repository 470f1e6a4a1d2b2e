//! Inputs of `message`.

use super::super::message::format::{
    Kind, MEMORY_BYTES, NEGOTIATE, PARTS, START, USER_ADDRESS, code,
};
use super::super::message::prepared::{memory_table, message, numbers, start, state};
use super::Seed;

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
    let vring = |queue| numbers(&[queue]);
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
        ("parts", input(started | PARTS, &[])),
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
        ("filled-socket-call", FilledSocket),
        ("network-call", NetworkSocket),
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
        ("filled-socket-memory", FilledSocket),
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
    let whole = [0, 16 << 40, USER_ADDRESS, 0];
    let table = message(
        code::SET_MEM_TABLE,
        ACK,
        &memory_table(&[whole]),
        &[SparseMemory],
    );
    let more = message(code::ADD_MEM_REG, ACK, &single(0x1000), &[OtherMemory]);
    seeds.push(("sparse-memory", input(NEGOTIATE, &[table, start(), more])));
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
