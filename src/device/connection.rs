//! The state that a connection shares with the workers that serve its virtqueues, and the cache
//! mode, which outlives the connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vhost_user_backend::VringT;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use vm_memory::GuestMemoryAtomic;

use super::back_channel::BackChannel;
use super::disk_use::DiskUse;
use super::{GuestMemory, Vring, config_space};

/// Whether written data may stay in a cache until it is flushed (`writeback`, virtio 1.3, 5.2.5).
/// It belongs to the disk, not to a connection, and stays until a driver changes it: no frontend
/// repeats it to the next process, and the guest relies on it.
#[derive(Clone, Debug)]
pub struct CacheMode(Arc<AtomicBool>);

impl Default for CacheMode {
    fn default() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }
}

impl CacheMode {
    pub(super) fn is_writeback(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(super) fn set_writeback(&self, writeback: bool) {
        self.0.store(writeback, Ordering::Release);
    }
}

/// What the driver has chosen, for the workers that serve the virtqueues.
#[derive(Debug)]
pub struct DriverChoices {
    features: AtomicU64,
    pub(super) cache_mode: CacheMode,
}

impl DriverChoices {
    /// Whether each write must be durable when it is answered.
    pub fn durable_writes(&self) -> bool {
        config_space::expects_durable_writes(self.features(), self.cache_mode.is_writeback())
    }

    /// Whether a request may take a single descriptor of its virtqueue, whatever its length.
    pub(super) fn has_indirect_descriptors(&self) -> bool {
        self.features() & 1 << VIRTIO_RING_F_INDIRECT_DESC != 0
    }

    /// The feature bits that the driver accepted.
    pub(super) fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// Sets the feature bits that the driver accepted.
    pub(super) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }
}

/// The state that a connection shares with the workers that serve its virtqueues. There is a slot
/// for each possible connection; an unused one costs next to nothing.
#[derive(Clone)]
pub struct ConnectionSlot {
    /// Guest memory.
    pub memory: GuestMemoryAtomic<GuestMemory>,
    /// The virtqueues.
    pub vrings: Vec<Vring>,
    /// What the driver has chosen.
    pub choices: Arc<DriverChoices>,
    /// Reports changes of the configuration space to the frontend.
    pub back_channel: BackChannel,
    /// Whether its virtqueues may run.
    pub disk_use: DiskUse,
}

impl ConnectionSlot {
    /// A slot with `queue_count` virtqueues of up to `queue_size` entries, on a disk with this
    /// cache mode.
    ///
    /// # Errors
    /// If no virtqueue can have that size.
    pub fn new(
        queue_count: u16,
        queue_size: u16,
        cache_mode: CacheMode,
    ) -> std::result::Result<Self, virtio_queue::Error> {
        let memory = GuestMemoryAtomic::new(GuestMemory::new());
        let vrings = (0..queue_count).map(|_| Vring::new(memory.clone(), queue_size));
        Ok(Self {
            vrings: vrings.collect::<std::result::Result<_, _>>()?,
            memory,
            choices: Arc::new(DriverChoices {
                features: AtomicU64::new(0),
                cache_mode,
            }),
            back_channel: BackChannel::default(),
            disk_use: DiskUse::default(),
        })
    }
}
