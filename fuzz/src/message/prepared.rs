//! Messages that begin a connection, and guest memory for them.

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::super::guest_memory::{NEXT, WRITE, header, put, put_table};
use super::format::{Kind, MEMORY_BYTES, Message, USER_ADDRESS, code};

/// Guest memory with two virtqueues, each with a write, a read and a flush that are available.
pub fn guest_memory() -> Vec<u8> {
    let mut memory = Vec::new();
    for queue in 0..2usize {
        let start = 0x1000 * queue;
        let data = 0x8000 + 0x2000 * queue as u64;
        let header_place = 0x4000 + 0x100 * queue;
        let status = |index: u64| (0x4800 + 16 * queue as u64 + index, 1, WRITE, 0);
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
                &header(kind, 8 * queue as u64),
            );
        }
        let available = [0u16, 3, 0, 3, 6].map(u16::to_le_bytes).concat();
        put(&mut memory, start + 0x400, &available);
    }
    memory
}

/// The bytes of an input for a message.
pub fn message(code: u8, flags: u8, payload: &[u8], kinds: &[Kind]) -> Vec<u8> {
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

/// A payload of numbers.
pub fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers
        .iter()
        .flat_map(|number| number.to_ne_bytes())
        .collect()
}

/// A payload for a virtqueue: its index and a number.
pub fn state(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_ne_bytes).concat()
}

fn vring_address(index: u64) -> Vec<u8> {
    let start = USER_ADDRESS + 0x1000 * index;
    numbers(&[index, start, start + 0x800, start + 0x400, 0])
}

/// The payload of SET_MEM_TABLE: guest address, length, frontend address and offset of each region.
pub fn memory_table(regions: &[[u64; 4]]) -> Vec<u8> {
    let count = regions.len() as u64;
    let fields = regions.iter().flatten().copied();
    numbers(&[count].into_iter().chain(fields).collect::<Vec<_>>())
}

/// The messages that every frontend sends first.
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

/// The messages that set memory and both virtqueues up.
pub fn start() -> Vec<u8> {
    let mut messages = message(
        code::SET_MEM_TABLE,
        0,
        &memory_table(&[[0, MEMORY_BYTES, USER_ADDRESS, 0]]),
        &[Kind::Memory],
    );
    for queue in 0..2u8 {
        let index = u32::from(queue);
        messages.extend(message(code::SET_VRING_NUM, 0, &state(index, 16), &[]));
        messages.extend(message(code::SET_VRING_BASE, 0, &state(index, 0), &[]));
        messages.extend(message(
            code::SET_VRING_ADDR,
            0,
            &vring_address(queue.into()),
            &[],
        ));
        let payload = numbers(&[queue.into()]);
        messages.extend(message(code::SET_VRING_CALL, 0, &payload, &[Kind::Event]));
        messages.extend(message(code::SET_VRING_KICK, 0, &payload, &[Kind::Event]));
        messages.extend(message(code::SET_VRING_ENABLE, 0, &state(index, 1), &[]));
    }
    messages
}
