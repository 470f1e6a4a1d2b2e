//! The vhost-user protocol: what the VMM tells us about memory and rings.
//!
//! One [`Frontend`] serves one connection at a time. The `vhost` crate reads messages and checks
//! their form; this file gives them their meaning. The daemon of `vhost-user-backend` is not used,
//! since its worker loop cannot wait for io_uring completions (ARCHITECTURE.md); its vrings are.
//!
//! Invariants: a ring that is stopped, disabled or lost with its connection is drained before the
//! frontend is answered, so guest memory is not touched afterwards. That takes no longer than
//! [`drain_limit`](crate::limits::drain_limit): then what is in flight is abandoned.
//! A message that changes guest memory is answered when no worker uses the old map any more.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use log::{debug, info, warn};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use vhost_user_backend::VringT;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryRegion};

use super::back_channel::{self, BackChannel};
use super::connection::{ConnectionSlot, DriverChoices};
use super::descriptor::{check_can_be_waited_for, check_is_no_file, set_nonblocking};
use super::inflight::{self, QueueRegion};
use super::memory::{DirtyLog, Region, map_region};
use super::{DiskInfo, GuestMemory, Vring, config_space};
use crate::limits::MEMORY_SLOTS_MAX;

/// Who serves the rings.
pub trait VirtqueueServer: Send {
    /// The state of these rings has changed, or where their requests are tracked from their next
    /// start on. Returns when each is served according to it: one that is not running any more
    /// is drained, or what is still in flight is abandoned (see
    /// [`Guest::abandon`](super::guest::Guest::abandon)).
    fn refresh(&self, queues: Vec<(u16, Option<QueueRegion>)>);

    /// Makes everything written so far durable. Returns when that has been done, has failed or
    /// takes too long.
    fn flush(&self) -> bool;
}

/// The device as the VMM sees it.
pub struct Frontend {
    info: DiskInfo,
    memory: GuestMemoryAtomic<GuestMemory>,
    vrings: Vec<Vring>,
    server: Box<dyn VirtqueueServer>,
    choices: Arc<DriverChoices>,
    /// What is written to guest memory while the guest is migrated.
    log: Arc<DirtyLog>,
    /// Where the VMM has the memory regions, to translate ring addresses.
    mappings: Vec<Mapping>,
    /// Where requests in flight are remembered.
    inflight: Option<inflight::Region>,
    back_channel: BackChannel,
    /// What comes with a message that passes a back channel.
    passed: Option<OwnedFd>,
    owned: bool,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    frontend_address: u64,
    bytes: u64,
    guest_address: u64,
}

impl Frontend {
    /// The device on the rings of `slot`, which `server` serves.
    pub fn new(info: DiskInfo, slot: ConnectionSlot, server: Box<dyn VirtqueueServer>) -> Self {
        let ConnectionSlot {
            memory,
            vrings,
            choices,
            back_channel,
        } = slot;
        Self {
            info,
            memory,
            vrings,
            server,
            choices,
            log: Arc::default(),
            mappings: Vec::new(),
            inflight: None,
            back_channel,
            passed: None,
            owned: false,
        }
    }

    /// Serves one connection until it ends, and leaves the device ready for the next one.
    pub fn serve(this: &Arc<Mutex<Self>>, connection: UnixStream) {
        info!("a frontend has connected");
        let mut handler = BackendReqHandler::from_stream(connection, Arc::clone(this));
        let end = loop {
            if let Some(passed) = back_channel::passed(handler.as_raw_fd()) {
                this.lock().unwrap_or_else(PoisonError::into_inner).passed = Some(passed);
            }
            if let Err(error) = handler.handle_request() {
                break error;
            }
        };
        match end {
            Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage => {
                info!("the frontend has disconnected");
            }
            error => warn!("the connection to the frontend is closed: {error}"),
        }
        this.lock().unwrap_or_else(PoisonError::into_inner).reset();
    }

    /// Takes no more requests, and answers those in flight. To be called before the connection is
    /// closed: a frontend that finds it closed looks how far the used ring has got, and must
    /// find it at its end.
    pub fn stop_virtqueues(&self) {
        for vring in &self.vrings {
            vring.set_enabled(false);
        }
        self.refresh_all();
    }

    /// Stops all rings and forgets what the connection told.
    fn reset(&mut self) {
        self.reset_virtqueues();
        self.replace_memory(GuestMemory::new());
        self.mappings.clear();
        self.log.clear();
        self.back_channel.clear();
        self.passed = None;
        self.owned = false;
    }

    /// Stops all rings, and leaves them and what the driver accepted as they were in the beginning.
    /// Returns the inflight region there was.
    fn reset_virtqueues(&mut self) -> Option<inflight::Region> {
        for vring in &self.vrings {
            vring.set_enabled(false);
            vring.set_queue_ready(false);
        }
        // What is in flight is still tracked where it was begun.
        let region = self.inflight.take();
        self.refresh_all();
        for vring in &self.vrings {
            vring.set_kick(None);
            vring.set_call(None);
            vring.set_err(None);
            vring.get_mut().get_queue_mut().reset();
        }
        self.choices.set_features(0);
        self.log.set_wanted(false);
        region
    }

    /// Has a ring served as it is now.
    fn refresh(&self, queue: u16) {
        self.server.refresh(vec![(queue, self.region(queue))]);
    }

    /// Has all rings served as they are now. Those that are stopped drain at the same time.
    fn refresh_all(&self) {
        let rings = (0..self.info.num_queues).map(|queue| (queue, self.region(queue)));
        self.server.refresh(rings.collect());
    }

    fn region(&self, queue: u16) -> Option<QueueRegion> {
        self.inflight
            .as_ref()
            .and_then(|region| region.queue(queue))
    }

    fn replace_memory(&self, memory: GuestMemory) {
        match self.memory.lock() {
            Ok(guard) => guard.replace(memory),
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
    }

    /// Replaces guest memory and waits until every worker serves its virtqueues from the new map.
    ///
    /// A worker looks up the map before it looks for a new chain. Without the wait, a chain that
    /// the driver makes available after the reply could meet the old map: it would fail in a region
    /// that was just added, or reach one that the frontend has unmapped.
    fn change_memory(&self, memory: GuestMemory) {
        self.replace_memory(memory);
        self.refresh_all();
    }

    /// Switches between writes that are durable when they are answered and those that a flush makes
    /// so. No request is in flight meanwhile, so that each is of the one kind or of the other.
    fn set_writeback(&self, writeback: bool) -> Result<()> {
        let was_enabled: Vec<bool> = self
            .vrings
            .iter()
            .map(|vring| vring.get_ref().is_enabled())
            .collect();
        self.stop_virtqueues();
        self.choices.cache_mode.set_writeback(writeback);
        if let Some(region) = &self.inflight {
            region.set_writeback(writeback);
        }
        // From now on the driver does not flush, so what it has not flushed yet is up to us.
        let durable = writeback || self.server.flush();
        for (vring, enabled) in self.vrings.iter().zip(was_enabled) {
            vring.set_enabled(enabled);
        }
        self.refresh_all();
        info!(
            "the driver has switched to {}",
            if writeback {
                "writeback"
            } else {
                "writethrough"
            }
        );
        if durable {
            Ok(())
        } else {
            Err(Error::ReqHandlerError(io::Error::other("the flush failed")))
        }
    }

    fn vring(&self, index: u32) -> Result<(u16, &Vring)> {
        let queue = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let vring = self
            .vrings
            .get(usize::from(queue))
            .ok_or(Error::InvalidParam)?;
        Ok((queue, vring))
    }

    fn layout(&self, inflight: &VhostUserInflight) -> Result<inflight::Layout> {
        let (num_queues, queue_size) = (inflight.num_queues, inflight.queue_size);
        inflight::Layout::new(num_queues, queue_size, self.info.num_queues)
            .inspect_err(|error| warn!("the inflight region: {error}"))
            .map_err(failed)
    }

    fn guest_address(&self, frontend_address: u64) -> Result<u64> {
        self.mappings
            .iter()
            .find_map(|mapping| {
                let offset = frontend_address.checked_sub(mapping.frontend_address)?;
                (offset < mapping.bytes).then(|| mapping.guest_address + offset)
            })
            .ok_or(Error::InvalidParam)
    }
}

/// Maps a region of guest memory.
fn map(
    region: &VhostUserMemoryRegion,
    file: File,
    log: &Arc<DirtyLog>,
) -> Result<(Region, Mapping)> {
    let memory = map_region(region, file, log).map_err(failed)?;
    let mapping = Mapping {
        frontend_address: region.user_addr,
        bytes: region.memory_size,
        guest_address: region.guest_phys_addr,
    };
    Ok((memory, mapping))
}

fn not_offered<T>(message: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(message))
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl VhostUserBackendReqHandlerMut for Frontend {
    fn set_owner(&mut self) -> Result<()> {
        if self.owned {
            return Err(Error::InvalidOperation("already claimed"));
        }
        self.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.log.clear();
        self.owned = false;
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        // The driver waits for no answer any more. What was abandoned must not be done again in its
        // name.
        if let Some(region) = self.reset_virtqueues() {
            region.clear();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config_space::features(&self.info))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !config_space::features(&self.info) != 0 {
            return Err(Error::InvalidParam);
        }
        debug!("the driver accepted features {features:#x}");
        self.choices.set_features(features);
        // Before the refreshes below: after them no worker is in a write that it has begun
        // unlogged.
        self.log
            .set_wanted(features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        for vring in &self.vrings {
            vring.set_queue_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        // Without protocol features there is no message to enable a ring, so they all are
        // (vhost-user, "Ring states").
        let enable_all = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        if enable_all {
            for vring in &self.vrings {
                vring.set_enabled(true);
            }
        }
        self.refresh_all();
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let regions = regions.iter().zip(files);
        let regions = regions.map(|(region, file)| map(region, file, &self.log));
        let (mut mapped, mappings) = regions.collect::<Result<(Vec<_>, Vec<_>)>>()?;
        // In which order the frontend lists them is up to it.
        mapped.sort_by_key(GuestMemoryRegion::start_addr);
        let memory = GuestMemory::from_regions(mapped).map_err(failed)?;
        self.log.admit(&memory).map_err(failed)?;
        self.mappings = mappings;
        self.change_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (_, vring) = self.vring(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        // `Queue` checks the size (a power of two up to its maximum) but keeps the old one
        // silently.
        vring
            .get_mut()
            .get_queue_mut()
            .try_set_size(size)
            .map_err(|_| Error::InvalidParam)
    }

    /// The log address is for used rings that are not in guest memory as the log knows it, behind
    /// an IOMMU. We offer none: the used ring is guest memory as everything else, and logged
    /// with it.
    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (_, vring) = self.vring(index)?;
        let descriptor = self.guest_address(descriptor)?;
        let available = self.guest_address(available)?;
        let used = self.guest_address(used)?;
        let mut state = vring.get_mut();
        state
            .set_queue_info(descriptor, available, used)
            .map_err(|_| Error::InvalidParam)?;
        // Frontends say it again, with another flag, when logging begins and ends. A ring that runs
        // knows where it stands.
        if state.get_queue().ready() {
            return Ok(());
        }
        // The message that sets the base has the available index only; where the used ring stands
        // is in the ring itself.
        let used_index = state
            .get_queue()
            .used_idx(&*self.memory.memory(), Ordering::Acquire)
            .map_err(|_| Error::InvalidParam)?;
        state.get_queue_mut().set_next_used(used_index.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (_, vring) = self.vring(index)?;
        vring.set_queue_next_avail(u16::try_from(base).map_err(|_| Error::InvalidParam)?);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (queue, vring) = self.vring(index)?;
        vring.set_queue_ready(false);
        self.refresh(queue);
        vring.set_kick(None);
        vring.set_call(None);
        // What was abandoned counts as taken: it is in flight in the region.
        Ok(VhostUserVringState::new(
            index,
            u32::from(vring.queue_next_avail()),
        ))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (queue, vring) = self.vring(u32::from(index))?;
        if let Some(file) = &file {
            check_can_be_waited_for(file).map_err(Error::ReqHandlerError)?;
        }
        // A ring starts when it has a kick (vhost-user, "Ring states"). We do not wait for the
        // first one: what is on the ring already is served at once.
        vring.set_queue_ready(file.is_some());
        vring.set_kick(file);
        self.refresh(queue);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (_, vring) = self.vring(u32::from(index))?;
        // A worker that tells the driver must not wait until there is room for that.
        if let Some(file) = &file {
            check_is_no_file(file).map_err(Error::ReqHandlerError)?;
            set_nonblocking(file).map_err(Error::ReqHandlerError)?;
        }
        vring.set_call(file);
        // What was completed while there was nobody to tell must not stay untold.
        let _ = vring.signal_used_queue();
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (_, vring) = self.vring(u32::from(index))?;
        vring.set_err(file);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let has_config = features & VhostUserProtocolFeatures::CONFIG.bits() != 0;
        self.back_channel.set_has_config(has_config);
        Ok(())
    }

    /// The crate has found it to be a stream socket, but its own end of it cannot send what we have
    /// to tell.
    fn set_backend_req_fd(&mut self, _backend: Backend) {
        self.back_channel.set(self.passed.take());
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.info.num_queues))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (queue, vring) = self.vring(index)?;
        vring.set_enabled(enable);
        self.refresh(queue);
        Ok(())
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let writeback = self.choices.cache_mode.is_writeback();
        Ok(config_space::read(&self.info, writeback, offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let writeback = match (offset, buf) {
            (config_space::WRITEBACK_OFFSET, [0]) => false,
            (config_space::WRITEBACK_OFFSET, [1]) => true,
            _ => return Err(Error::InvalidParam),
        };
        self.set_writeback(writeback)
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        not_offered("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered("GET_SHARED_OBJECT")
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let layout = self.layout(inflight)?;
        let file = layout.create_file().map_err(Error::ReqHandlerError)?;
        let reply = VhostUserInflight {
            mmap_size: layout.bytes() as u64,
            mmap_offset: 0,
            ..*inflight
        };
        Ok((reply, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let layout = self.layout(inflight)?;
        let region = inflight::Region::map(layout, file, inflight.mmap_offset, inflight.mmap_size);
        let region = region.inspect_err(|error| warn!("the inflight region: {error}"));
        let region = region.map_err(failed)?;
        match region.writeback() {
            Some(writeback) => self.choices.cache_mode.set_writeback(writeback),
            None => region.set_writeback(self.choices.cache_mode.is_writeback()),
        }
        self.inflight = Some(region);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEMORY_SLOTS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.mappings.len() >= MEMORY_SLOTS_MAX {
            return Err(Error::InvalidParam);
        }
        let (memory, mapping) = map(region, file, &self.log)?;
        let with_it = self
            .memory
            .memory()
            .insert_region(Arc::new(memory))
            .map_err(failed)?;
        self.log.admit(&with_it).map_err(failed)?;
        self.mappings.push(mapping);
        self.change_memory(with_it);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let address = GuestAddress(region.guest_phys_addr);
        let removed = self
            .memory
            .memory()
            .remove_region(address, region.memory_size);
        let (without_it, _) = removed.map_err(failed)?;
        self.mappings
            .retain(|mapping| mapping.guest_address != region.guest_phys_addr);
        self.change_memory(without_it);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        not_offered("SET_DEVICE_STATE_FD")
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered("CHECK_DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered("GET_SHMEM_CONFIG")
    }

    /// The `vhost` crate answers this message whether or not an acknowledgement was asked for, as
    /// it must be where LOG_SHMFD was negotiated.
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.log
            .set_area(log, file, &self.memory.memory())
            .map_err(failed)?;
        // As for the features: what a worker has begun to write before may not be in the log.
        for queue in (0..self.info.num_queues).filter(|_| self.log.is_on()) {
            self.refresh(queue);
        }
        Ok(())
    }
}
