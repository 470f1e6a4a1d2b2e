//! Inputs of `request`: tables of 16 entries, the chain begins at the first.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::super::guest_memory::{INDIRECT, NEXT, WRITE, header, put, put_table, segment};
use super::Seed;

/// All of them.
pub fn all() -> Vec<Seed> {
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
            input(
                &[head, (0x1000, 1024, NEXT, 2), status],
                VIRTIO_BLK_T_OUT,
                3,
            ),
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
            input(
                &[head, (SEGMENTS, 16, NEXT, 2), status],
                VIRTIO_BLK_T_DISCARD,
                0,
            ),
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
            input(
                &[head, (0x1000, 0, NEXT | WRITE, 2), status],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "read-only-status",
            input(
                &[head, (0x1000, 512, NEXT | WRITE, 2), (0x1ff, 1, 0, 0)],
                VIRTIO_BLK_T_IN,
                3,
            ),
        ),
        (
            "no-status",
            input(&[(HEADER, 16, 0, 0)], VIRTIO_BLK_T_FLUSH, 3),
        ),
        (
            "unknown",
            input(&[head, (0x1000, 512, NEXT | WRITE, 2), status], 77, 3),
        ),
    ];
    for (name, bytes, last) in [
        ("indirect", 48, status),
        (
            "indirect-nested",
            48,
            (INDIRECT_TABLE as u64, 48, INDIRECT, 0),
        ),
        ("indirect-loop", 16 * 0xffff, (0x1ff, 1, WRITE | NEXT, 2)),
        ("indirect-broken", 47, status),
        ("indirect-too-long", 16 * 0x1_0000, status),
    ] {
        let mut seed = input(
            &[(INDIRECT_TABLE as u64, bytes, INDIRECT, 0)],
            VIRTIO_BLK_T_IN,
            3,
        );
        let mut memory = seed.split_off(4);
        let table = [head, (0x1000, 512, NEXT | WRITE, 2), last];
        put_table(&mut memory, INDIRECT_TABLE, &table);
        seed.append(&mut memory);
        seeds.push((name, seed));
    }
    seeds
}
