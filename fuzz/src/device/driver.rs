//! The driver, which may write any bytes to any address.

use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::QueueT;
use virtio_queue::desc::split::Descriptor;
use vm_memory::ByteValued;

use super::super::naive::Memory;
use super::super::script::Script;
use super::places::{QUEUES, address, queue};
use super::step::Step;
use super::world::with_world;

/// The addresses of request headers, segments and indirect tables.
const HEADERS: u64 = 0x2000;
const SEGMENTS: u64 = 0x2200;
const TABLES: u64 = 0x2400;
/// The address of the status bytes of whole requests.
const STATUSES: u64 = 0x2300;

/// Lengths of descriptors.
const LENGTHS: [u32; 16] = [
    16,
    1,
    512,
    0,
    513,
    1024,
    4096,
    0x2000,
    17,
    48,
    15,
    0x10_0000,
    1 << 30,
    u32::MAX,
    u32::MAX - 15,
    0x200,
];

/// Does a step of the driver: it writes to memory.
pub(super) fn drive(step: Step, script: &mut Script<'_>) {
    match step {
        Step::Offer => {
            let (queue, head) = (queue(script), script.u8());
            let head = if head == u8::MAX {
                u16::MAX
            } else {
                head.into()
            };
            offer(queue, head);
        }
        Step::Descriptor => {
            let (table, index) = (script.u8(), script.u8());
            let (place, len) = (
                address(script),
                LENGTHS[usize::from(script.u8()) % LENGTHS.len()],
            );
            let (flags, next) = (script.u8().into(), script.u8().into());
            let table = if table & 2 == 0 {
                queue_addresses(u16::from(table) % QUEUES).0
            } else {
                TABLES
            };
            put_descriptor(
                table,
                index.into(),
                Descriptor::new(place, len, flags, next),
            );
        }
        Step::Header => {
            let (index, request_type, sector) = (script.u8() & 0x1f, script.u8(), script.u16());
            put_header(index, request_type.into(), sector);
        }
        Step::Segment => {
            let (index, sector, sectors, flags) =
                (script.u8() & 0xf, script.u16(), script.u16(), script.u8());
            let mut segment = u64::from(sector).to_le_bytes().to_vec();
            segment.extend((u32::from(sectors) << 4).to_le_bytes());
            segment.extend(u32::from(flags).to_le_bytes());
            with_world(|world| {
                world
                    .model
                    .files
                    .put(SEGMENTS + 16 * u64::from(index), &segment)
            });
        }
        _ => request(script),
    }
}

/// A request as drivers make them: header, data and status, one after the other in the table or in
/// an indirect one.
fn request(script: &mut Script<'_>) {
    let (choice, first, sector) = (script.u8(), script.u8(), script.u16());
    let (place, len) = (
        address(script),
        LENGTHS[usize::from(script.u8()) % LENGTHS.len()],
    );
    let (queue, indirect) = (u16::from(choice & 1), choice & 2 != 0);
    let kinds = [
        VIRTIO_BLK_T_IN,
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_FLUSH,
        VIRTIO_BLK_T_GET_ID,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
        VIRTIO_BLK_T_IN,
        77,
    ];
    let kind = kinds[usize::from(choice >> 2 & 7)];
    let (table, _, size) = queue_addresses(queue);
    let first = u16::from(first) % size;
    let header = u8::try_from(first % 32).expect("a small number");
    put_header(header, kind, sector);
    let (next, write) = (flag(VRING_DESC_F_NEXT), flag(VRING_DESC_F_WRITE));
    let status = STATUSES + u64::from(first);
    let data_flags = match kind {
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID => next | write,
        _ => next,
    };
    let mut parts = vec![(HEADERS + 16 * u64::from(header), 16, next)];
    if kind != VIRTIO_BLK_T_FLUSH {
        parts.push((place, len, data_flags));
    }
    parts.push((status, 1, write));
    // Tables of four entries.
    let indirect_table = TABLES + 64 * u64::from(first % 16);
    let (into, from) = if indirect {
        (indirect_table, 0)
    } else {
        (table, first)
    };
    for (index, (place, len, flags)) in (0..).zip(&parts) {
        let (this, next) = if indirect {
            (index, index + 1)
        } else {
            ((from + index) % size, (from + index + 1) % size)
        };
        put_descriptor(into, this, Descriptor::new(*place, *len, *flags, next));
    }
    if indirect {
        let bytes = 16 * u32::try_from(parts.len()).expect("three");
        let reference = Descriptor::new(indirect_table, bytes, flag(VRING_DESC_F_INDIRECT), 0);
        put_descriptor(table, first, reference);
    }
    offer(queue, first);
}

fn flag(flag: u32) -> u16 {
    u16::try_from(flag).expect("a flag of a descriptor")
}

fn put_header(index: u8, request_type: u32, sector: u16) {
    let mut header = [0xee; 16];
    header[..4].copy_from_slice(&request_type.to_le_bytes());
    header[8..].copy_from_slice(&u64::from(sector).to_le_bytes());
    with_world(|world| {
        world
            .model
            .files
            .put(HEADERS + 16 * u64::from(index), &header)
    });
}

fn put_descriptor(table: u64, index: u16, descriptor: Descriptor) {
    let place = table.saturating_add(16 * u64::from(index));
    with_world(|world| world.model.files.put(place, descriptor.as_slice()));
}

/// The addresses of the descriptor table and the available ring, and how many entries they have.
fn queue_addresses(queue: u16) -> (u64, u64, u16) {
    with_world(|world| {
        let state = world.slot.vrings[usize::from(queue)].get_ref();
        let queue = state.get_queue();
        (queue.desc_table(), queue.avail_ring(), queue.size())
    })
}

/// Makes a head available.
fn offer(queue: u16, head: u16) {
    let (_, available, size) = queue_addresses(queue);
    let index = with_world(|world| {
        world
            .model
            .files
            .bytes(available.saturating_add(2))
            .map(u16::from_le_bytes)
    });
    let Some(index) = index else {
        return;
    };
    let entry = available.saturating_add(4 + 2 * u64::from(index % size));
    with_world(|world| world.model.files.put(entry, &head.to_le_bytes()));
    set_available_index(queue, index.wrapping_add(1));
}

pub(super) fn set_available_index(queue: u16, index: u16) {
    let (_, available, _) = queue_addresses(queue);
    let place = available.saturating_add(2);
    with_world(|world| world.model.files.put(place, &index.to_le_bytes()));
}
