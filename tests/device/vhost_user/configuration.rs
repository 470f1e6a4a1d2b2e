//! The configuration space.

use testkit::frontend::{Layout, Request, Vmm};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::{DISK_SECTORS, OK, Setup, both_styles, status};

#[test]
fn the_config_space_describes_the_disk() {
    let setup = Setup::new(&["--num-queues", "3", "--queue-size", "64"]);
    for plan in both_styles() {
        let mut vmm = Vmm::new(&plan);
        vmm.connect(setup.daemon.socket()).unwrap();
        for bit in [
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_CONFIG_WCE,
            VIRTIO_BLK_F_DISCARD,
            VIRTIO_BLK_F_WRITE_ZEROES,
        ] {
            assert!(vmm.has_feature(bit), "feature {bit}");
        }
        assert_eq!(vmm.config[..8], DISK_SECTORS.to_le_bytes());
        assert_eq!(vmm.config_u32(12), 62, "seg_max");
        let block_bytes = vmm.config_u32(20);
        assert!(block_bytes == 512 || block_bytes == 4096);
        assert_eq!(vmm.config[32], 1, "writeback");
        assert_eq!(vmm.config[34..36], [3, 0], "num_queues");
        // Any window, also behind the end of the known fields.
        let config = vmm.config.clone();
        for (offset, size) in [
            (0, 8),
            (20, 4),
            (32, 1),
            (56, 4),
            (0, 256),
            (60, 196),
            (255, 1),
        ] {
            let nothing = vec![0; size];
            let window = vmm.frontend().get_config(
                offset,
                u32::try_from(size).unwrap(),
                VhostUserConfigFlags::empty(),
                &nothing,
            );
            let window = window.unwrap().1;
            let start = offset as usize;
            for (index, byte) in window
                .iter()
                .enumerate()
                .filter(|(index, _)| start + index < 60)
            {
                assert_eq!(*byte, config[start + index]);
            }
        }
    }
}

/// The driver switches the write cache off and on (virtio 1.3, 5.2.5.2), and only that may be
/// written.
#[test]
fn the_driver_switches_the_write_cache() {
    let mut setup = Setup::new(&[]);
    for plan in both_styles() {
        let mut vmm = setup.start(&plan);
        for writeback in [0, 1, 0, 1] {
            let flags = VhostUserConfigFlags::empty();
            vmm.frontend().set_config(32, flags, &[writeback]).unwrap();
            let (_, now) = vmm.frontend().get_config(32, 1, flags, &[0]).unwrap();
            assert_eq!(now, [writeback]);
            vmm.queues[0].write_disk(0, &[writeback; 4096]);
            let done = vmm.queues[0].run(&Request::flush(), Layout::DIRECT);
            assert_eq!(status(&done), OK);
        }
        // The driver may not write the capacity.
        let _ = vmm
            .frontend()
            .set_config(0, VhostUserConfigFlags::empty(), &[0; 8]);
        drop(vmm);
        setup.assert_serves("an attempt to set the capacity");
        let mut vmm = setup.start(&plan);
        assert_eq!(vmm.config[..8], DISK_SECTORS.to_le_bytes());
        assert_eq!(vmm.config[32], 1, "a new connection is a new device");
        vmm.queues[0].read_disk(DISK_SECTORS - 8, 4096);
    }
    setup.end();
}
