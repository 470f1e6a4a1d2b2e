//! The messages of a frontend (vhost-user, "Front-end message types"), as the `vhost` crate hands
//! them over.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use log::{debug, info, warn};
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVirtioFeatures,
    VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryRegion};

use super::Frontend;
use super::memory_map::MemoryMap;
use crate::device::descriptor::{check_can_be_waited_for, check_is_no_file};
use crate::device::memory::map_region;
use crate::device::{GuestMemory, Vring, config_space, inflight};
use crate::limits::{DISK_USE_LIMIT, MEMORY_SLOTS_MAX, QUEUE_SIZE_MAX};
use crate::untrusted::signal;

impl Frontend {
    fn vring(&self, index: u32) -> Result<(u16, &Vring)> {
        let queue = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        let vring = self.vrings.get(usize::from(queue));
        Ok((queue, vring.ok_or(Error::InvalidParam)?))
    }

    fn layout(&self, inflight: &VhostUserInflight) -> Result<inflight::Layout> {
        let (num_queues, queue_size) = (inflight.num_queues, inflight.queue_size);
        inflight::Layout::new(num_queues, queue_size, self.info.num_queues)
            .inspect_err(|error| warn!(error:%; "the inflight region is rejected"))
            .map_err(failed)
    }

    /// The layout of a region that this daemon makes. It has room for virtqueues of every size: the
    /// driver chooses the size, and the frontend may not know it yet.
    fn full_layout(&self, inflight: &VhostUserInflight) -> Result<inflight::Layout> {
        self.layout(&VhostUserInflight {
            queue_size: inflight.queue_size.max(QUEUE_SIZE_MAX),
            ..*inflight
        })
    }

    fn guest_address(&self, frontend_address: u64) -> Result<u64> {
        let address = self.memory_map.guest_address(frontend_address);
        address.ok_or(Error::InvalidParam)
    }
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
        // The driver waits for no answer any more, so abandoned requests must not be resubmitted.
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
        debug!(features:% = format_args!("{features:#x}"); "the driver accepted features");
        self.choices.set_features(features);
        // Before the refresh below: after it no worker is in a write that it has begun unlogged.
        self.log
            .set_wanted(features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0);
        for vring in &self.vrings {
            vring.set_queue_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        // Without protocol features there is no message to enable a virtqueue, so all are enabled
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
        let map =
            |(region, file)| map_region(region, file, (&self.log, &self.share)).map_err(failed);
        let mapped = regions.iter().zip(files).map(map);
        let mut mapped = mapped.collect::<Result<Vec<_>>>()?;
        // The frontend may list them in any order.
        mapped.sort_by_key(GuestMemoryRegion::start_addr);
        let memory = GuestMemory::from_regions(mapped).map_err(failed)?;
        self.log.admit(&memory).map_err(failed)?;
        self.memory_map = MemoryMap::new(regions);
        self.change_memory(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (queue, vring) = self.vring(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        let segments = self.info.segments_max;
        if !self.choices.has_indirect_descriptors() && num < segments + 2 {
            warn!(
                queue, descriptors = num, segments;
                "a virtqueue is too small for the requests that its driver may send: the guest may \
                 hang. Allow indirect descriptors in the VMM, or restart the daemon with \
                 --queue-size of this many descriptors"
            );
        }
        // `Queue::set_size` would keep the old size silently when the new one is not a power of two
        // up to its maximum.
        let set = vring.get_mut().get_queue_mut().try_set_size(size);
        set.map_err(|_| {
            warn!(
                queue, descriptors = num;
                "a virtqueue is rejected: its size must be a power of two up to {QUEUE_SIZE_MAX}"
            );
            Error::InvalidParam
        })
    }

    /// The log address is for used rings behind an IOMMU, which the device does not offer. The used
    /// ring is guest memory, and logged as such.
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
        // Frontends repeat the message, with another flag, when logging begins and ends. A
        // virtqueue that runs knows its used index.
        if state.get_queue().ready() {
            return Ok(());
        }
        // SET_VRING_BASE has the available index only; the used index is in the used ring itself.
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
        if !self
            .vrings
            .iter()
            .any(|vring| vring.get_ref().get_queue().ready())
        {
            self.disk_use.end();
        }
        vring.set_kick(None);
        vring.set_call(None);
        // Abandoned chains count as accepted: they are in flight in the region.
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
        if !self.disk_use.begin(DISK_USE_LIMIT) {
            warn!(
                "frontend rejected: another one uses the disk; end its virtual machine, or \
                 restart the daemon with --shared if the guests coordinate their writes"
            );
            return Err(failed(io::Error::other("another frontend uses the disk")));
        }
        // A virtqueue starts when its kick is set (vhost-user, "Ring states"). Chains that are
        // available already are served at once, without waiting for the first kick. Without a
        // descriptor, the virtqueue is polled.
        if file.is_none() {
            info!(queue; "a virtqueue has no kick descriptor and is polled");
        }
        vring.set_queue_ready(true);
        vring.set_kick(file);
        self.refresh(queue);
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (queue, vring) = self.vring(u32::from(index))?;
        // Chains may have been completed while there was no descriptor to signal. This also shows
        // whether it is an eventfd, which is signalled without waiting for its reader (I9).
        if let Some(file) = &file {
            let signalled = signal::signal(file);
            let signalled = signalled.inspect_err(|error| {
                warn!(queue, error:%; "a call descriptor is rejected: it must be an eventfd");
            });
            signalled.map_err(Error::ReqHandlerError)?;
        }
        vring.set_call(file);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (_, vring) = self.vring(u32::from(index))?;
        if let Some(file) = &file {
            check_is_no_file(file).map_err(Error::ReqHandlerError)?;
        }
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
        let reply_ack = VhostUserProtocolFeatures::REPLY_ACK.bits();
        self.has_acknowledgements = features & reply_ack != 0;
        Ok(())
    }

    /// The crate has checked that it is a stream socket, but its wrapper cannot send
    /// BACKEND_CONFIG_CHANGE_MSG.
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
        self.layout(inflight)?;
        let layout = self.full_layout(inflight)?;
        let file = layout.create_file().map_err(Error::ReqHandlerError)?;
        let reply = VhostUserInflight {
            mmap_size: layout.bytes() as u64,
            mmap_offset: 0,
            ..*inflight
        };
        Ok((reply, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (asked, full) = (self.layout(inflight)?, self.full_layout(inflight)?);
        let is_full = inflight.mmap_size == full.bytes() as u64;
        let layout = if is_full { full } else { asked };
        let region = inflight::Region::map(
            layout,
            &file,
            (inflight.mmap_offset, inflight.mmap_size),
            &self.share,
        );
        let region = region.inspect_err(|error| warn!(error:%; "the inflight region is rejected"));
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
        if self.memory_map.len() >= MEMORY_SLOTS_MAX {
            return Err(Error::InvalidParam);
        }
        let added = Arc::new(map_region(region, file, (&self.log, &self.share)).map_err(failed)?);
        let with_it = self.memory.memory().insert_region(added).map_err(failed)?;
        self.log.admit(&with_it).map_err(failed)?;
        self.memory_map.add(region);
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
        self.memory_map.remove(region.guest_phys_addr);
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

    /// The `vhost` crate replies to this message whether or not an acknowledgement was requested,
    /// as LOG_SHMFD demands.
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        self.log
            .set_area(log, file, (&self.share, &self.memory.memory()))
            .map_err(failed)?;
        // As for the features: a write that a worker began before may not be in the log.
        if self.log.is_on() {
            self.refresh_all();
        }
        Ok(())
    }
}
