//! What a connection shares with the threads that serve its rings, and what outlives it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vhost_user_backend::VringT;
use vm_memory::GuestMemoryAtomic;

use super::back_channel::BackChannel;
use super::{GuestMemory, Vring, config_space};

/// Whether written data may stay in a cache until it is flushed. Of the disk, not of a connection:
/// it stays until a driver chooses anew. No frontend tells it to the next process, or to the one
/// that a guest is migrated to, and the guest relies on it.
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

/// What the driver has chosen, for the threads that serve the rings.
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

    /// The feature bits that it accepted.
    pub(super) fn features(&self) -> u64 {
        self.features.load(Ordering::Acquire)
    }

    /// It accepted these.
    pub(super) fn set_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }
}

/// What a connection shares with the threads that serve its rings. There are as many as there may
/// be connections; one that is not in use costs next to nothing.
#[derive(Clone)]
pub struct ConnectionSlot {
    /// Guest memory.
    pub memory: GuestMemoryAtomic<GuestMemory>,
    /// The rings.
    pub vrings: Vec<Vring>,
    /// What the driver has chosen.
    pub choices: Arc<DriverChoices>,
    /// How the frontend hears of changes.
    pub back_channel: BackChannel,
}

impl ConnectionSlot {
    /// One with `queue_count` rings of up to `queue_size` entries, on a disk with this cache mode.
    ///
    /// # Errors
    /// If the size is not one that a ring can have.
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
        })
    }
}
