//! What a VMM is like, and what its guest takes.

use vhost::vhost_user::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};

/// The VMM to imitate: which messages are sent, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// QEMU: gets the inflight region before it sets memory and virtqueues; the vring base is the
    /// used index when the backend was lost; kicks after it has connected again.
    Qemu,
    /// cloud-hypervisor: NEED_REPLY on everything after the protocol features, sizes of all queues
    /// first, the vring base is the guest's available index, no kick after it has connected
    /// again.
    CloudHypervisor,
}

/// The configuration of a VMM.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The VMM to imitate.
    pub style: Style,
    /// How many queues the guest uses.
    pub queues: usize,
    /// Entries of each.
    pub queue_size: u16,
    /// Feature bits that the driver would take.
    pub features: u64,
    /// Protocol features that the VMM would take.
    pub protocol_features: VhostUserProtocolFeatures,
    /// Requests that a queue has memory for.
    pub slots: usize,
    /// Data bytes of a request, at most.
    pub data_bytes: usize,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            style: Style::Qemu,
            queues: 1,
            queue_size: 128,
            features: u64::MAX ^ VhostUserVirtioFeatures::LOG_ALL.bits(),
            protocol_features: VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD
                | VhostUserProtocolFeatures::RESET_DEVICE,
            slots: 32,
            data_bytes: 64 << 10,
        }
    }
}

impl Plan {
    /// The default, with a guest that has no write cache: each of its writes is to be durable.
    pub fn without_write_cache() -> Self {
        let default = Self::default();
        let cache = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        Self {
            features: default.features & !cache,
            ..default
        }
    }
}
