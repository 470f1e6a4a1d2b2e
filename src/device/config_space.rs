//! The virtio-blk feature bits and configuration space (virtio 1.3, 5.2.3 and 5.2.4).

use vhost::vhost_user::VhostUserVirtioFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    virtio_blk_config,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::ByteValued;

use super::DiskInfo;

/// The feature bits that the device offers.
pub fn features(info: &DiskInfo) -> u64 {
    let mut features = 1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_MQ
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if info.read_only {
        features |= 1 << VIRTIO_BLK_F_RO;
    }
    features
}

/// Whether a driver that accepted `features` can flush. One that cannot expects each write to be durable
/// when it is answered (virtio 1.3, 5.2.5.2).
pub fn has_flush(features: u64) -> bool {
    features & 1 << VIRTIO_BLK_F_FLUSH != 0
}

/// `virtio_blk_config` as bytes of guest memory.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
struct ConfigSpace(virtio_blk_config);

// SAFETY: a C structure of integers without padding (60 bytes and the zoned part, checked by the bindings'
// own layout tests), valid for any bit pattern.
unsafe impl ByteValued for ConfigSpace {}

/// `size` bytes of the configuration space from `offset` on. What lies behind the fields we know reads as
/// zero: frontends ask for the structure of their own version.
pub fn read(info: &DiskInfo, offset: u32, size: u32) -> Vec<u8> {
    let config = ConfigSpace(virtio_blk_config {
        capacity: info.capacity_sectors.to_le(),
        seg_max: info.segments_max.to_le(),
        blk_size: info.block_bytes.to_le(),
        num_queues: info.num_queues.to_le(),
        ..Default::default()
    });
    let bytes = config.as_slice();
    let wanted = bytes.iter().skip(offset as usize).take(size as usize).copied();
    let mut wanted: Vec<u8> = wanted.collect();
    wanted.resize(size as usize, 0);
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> DiskInfo {
        DiskInfo {
            capacity_sectors: 0x0102_0304_0506,
            block_bytes: 4096,
            read_only: false,
            serial: String::new(),
            num_queues: 5,
            segments_max: 62,
        }
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = read(&info(), 0, 60);
        assert_eq!(bytes.len(), 60);
        assert_eq!(bytes[0..8], 0x0102_0304_0506u64.to_le_bytes());
        assert_eq!(bytes[12..16], 62u32.to_le_bytes());
        assert_eq!(bytes[20..24], 4096u32.to_le_bytes());
        assert_eq!(bytes[34..36], 5u16.to_le_bytes());
    }

    #[test]
    fn any_window_has_the_size_asked_for() {
        assert_eq!(read(&info(), 20, 4), 4096u32.to_le_bytes());
        assert_eq!(read(&info(), 90, 100), [0; 100]);
        assert_eq!(read(&info(), u32::MAX, 8), [0; 8]);
    }

    #[test]
    fn read_only_is_offered_as_such() {
        let read_only = DiskInfo {
            read_only: true,
            ..info()
        };
        assert_eq!(features(&read_only) ^ features(&info()), 1 << VIRTIO_BLK_F_RO);
    }
}
