//! The virtio-blk feature bits and configuration space (virtio 1.3, 5.2.3 and 5.2.4).

use std::mem::offset_of;

use vhost::vhost_user::VhostUserVirtioFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES, virtio_blk_config,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::DiskInfo;
use crate::common::SECTOR_BYTES;
use crate::limits::{FRAGMENT_BYTES_MAX, ZERO_SECTORS_MAX, ZERO_SEGMENTS_MAX};

/// The feature bits that the device offers.
pub fn features(info: &DiskInfo) -> u64 {
    let mut features = 1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_TOPOLOGY
        | 1 << VIRTIO_BLK_F_FLUSH
        | 1 << VIRTIO_BLK_F_CONFIG_WCE
        | 1 << VIRTIO_BLK_F_MQ
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
        | VhostUserVirtioFeatures::LOG_ALL.bits();
    if info.read_only {
        features |= 1 << VIRTIO_BLK_F_RO;
    } else {
        features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    }
    features
}

/// Whether a driver that accepted `features` expects each write to be durable when it is answered:
/// one that cannot flush, or that has set `writeback` of the configuration space to 0 (virtio 1.3,
/// 5.2.5.2 and 5.2.6.2).
pub fn expects_durable_writes(features: u64, writeback: bool) -> bool {
    let has = |bit: u32| features & 1 << bit != 0;
    if has(VIRTIO_BLK_F_CONFIG_WCE) {
        !writeback
    } else {
        !has(VIRTIO_BLK_F_FLUSH)
    }
}

/// The offset of `writeback` in the configuration space, the only field that a driver may write.
pub const WRITEBACK_OFFSET: u32 = 32;
const _: () = assert!(offset_of!(virtio_blk_config, wce) == WRITEBACK_OFFSET as usize);

/// Bytes of the fields up to those of zoned devices.
const CONFIG_BYTES: usize = offset_of!(virtio_blk_config, unused1) + 3;

/// `size` bytes of the configuration space from `offset` on. Bytes behind the known fields read as
/// zero: frontends ask for the structure of their own version.
pub fn read(info: &DiskInfo, writeback: bool, offset: u32, size: u32) -> Vec<u8> {
    let config = config_space(info, writeback);
    let window = config.iter().skip(offset as usize).take(size as usize);
    let mut window: Vec<u8> = window.copied().collect();
    window.resize(size as usize, 0);
    window
}

/// `struct virtio_blk_config`, little-endian.
fn config_space(info: &DiskInfo, writeback: bool) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    macro_rules! set {
        ($field:ident, $value:expr) => {{
            let bytes = $value.to_le_bytes();
            let start = offset_of!(virtio_blk_config, $field);
            config[start..start + bytes.len()].copy_from_slice(&bytes);
        }};
    }
    let physical_blocks = info.physical_block_bytes / info.block_bytes;
    set!(capacity, info.capacity.sectors());
    // Requests are cut into fragments wherever segments end. Drivers make segments no longer.
    set!(size_max, u32::try_from(FRAGMENT_BYTES_MAX).expect("1 MiB"));
    set!(seg_max, info.segments_max);
    set!(blk_size, info.block_bytes);
    let exponent = physical_blocks.ilog2();
    set!(
        physical_block_exp,
        u8::try_from(exponent).expect("at most 31")
    );
    set!(min_io_size, u16::try_from(physical_blocks).unwrap_or(1));
    set!(wce, u8::from(writeback));
    set!(num_queues, info.num_queues);
    let alignment = u64::from(info.physical_block_bytes) / SECTOR_BYTES;
    let alignment = u32::try_from(alignment).expect("fewer than bytes");
    set!(discard_sector_alignment, alignment);
    if !info.read_only {
        set!(max_discard_sectors, ZERO_SECTORS_MAX);
        set!(max_discard_seg, ZERO_SEGMENTS_MAX);
        set!(max_write_zeroes_sectors, ZERO_SECTORS_MAX);
        set!(max_write_zeroes_seg, ZERO_SEGMENTS_MAX);
        set!(write_zeroes_may_unmap, 1u8);
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Capacity;

    fn info() -> DiskInfo {
        DiskInfo {
            capacity: Capacity::new(0x0102_0304_0506),
            block_bytes: 512,
            physical_block_bytes: 4096,
            read_only: false,
            serial: String::new(),
            num_queues: 5,
            segments_max: 62,
        }
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = read(&info(), true, 0, 60);
        assert_eq!(bytes.len(), 60);
        assert_eq!(bytes[0..8], 0x0102_0304_0506u64.to_le_bytes());
        assert_eq!(bytes[8..12], (1u32 << 20).to_le_bytes());
        assert_eq!(bytes[12..16], 62u32.to_le_bytes());
        assert_eq!(bytes[20..24], 512u32.to_le_bytes());
        assert_eq!(
            bytes[24..26],
            [3, 0],
            "physical block exponent, alignment offset"
        );
        assert_eq!(bytes[26..28], 8u16.to_le_bytes());
        assert_eq!(bytes[28..32], [0; 4], "no optimal size");
        assert_eq!(bytes[32], 1, "writeback");
        assert_eq!(bytes[34..36], 5u16.to_le_bytes());
        for (offset, value) in [(36, 1 << 22), (40, 32), (44, 8), (48, 1 << 22), (52, 32)] {
            assert_eq!(
                bytes[offset..offset + 4],
                u32::to_le_bytes(value),
                "at {offset}"
            );
        }
        assert_eq!(bytes[56], 1, "write-zeroes may unmap");
    }

    #[test]
    fn any_window_has_the_size_asked_for() {
        assert_eq!(read(&info(), true, 20, 4), 512u32.to_le_bytes());
        assert_eq!(read(&info(), true, 90, 100), [0; 100]);
        assert_eq!(read(&info(), true, u32::MAX, 8), [0; 8]);
        assert_eq!(read(&info(), false, WRITEBACK_OFFSET, 1), [0]);
    }

    #[test]
    fn read_only_is_offered_as_such() {
        let read_only = DiskInfo {
            read_only: true,
            ..info()
        };
        let differ =
            1 << VIRTIO_BLK_F_RO | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        assert_eq!(features(&read_only) ^ features(&info()), differ);
    }

    #[test]
    fn writes_are_durable_unless_the_driver_says_otherwise_or_flushes() {
        let (flush, wce) = (1 << VIRTIO_BLK_F_FLUSH, 1 << VIRTIO_BLK_F_CONFIG_WCE);
        for (features, writeback, durable) in [
            (0, true, true),
            (flush, false, false),
            (wce, true, false),
            (flush | wce, true, false),
            (flush | wce, false, true),
        ] {
            let expects = expects_durable_writes(features, writeback);
            assert_eq!(expects, durable, "{features:#x}, writeback {writeback}");
        }
    }
}
