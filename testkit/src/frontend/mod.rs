//! A VMM as small as possible: a vhost-user frontend over the `vhost` crate's, guest memory in a
//! memfd, and the driver's side of split virtqueues.
//!
//! [`Vmm`] sends messages like QEMU or like cloud-hypervisor. Its memory and its virtqueues outlive
//! a connection, as a guest outlives the daemon that serves its disk: the next daemon finds the
//! chains that were added before. Every chain that is returned is checked: it was outstanding, and
//! returns once.

mod calls;
mod memory;
mod plan;
mod queue;
mod request;
mod used;

use crate::HANG_LIMIT;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Error, Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::Epoll;

use self::calls::{wait_for, watch};
pub use self::memory::{memfd, region, regions, virtqueue_data};
pub use self::plan::{Plan, Style};
pub use self::queue::Queue;
use self::queue::small;
pub use self::request::{Completion, Cut, Layout, Range, Request, Segment};

/// Bytes of the configuration space that both VMMs ask for.
const CONFIG_BYTES: u32 = 60;
/// Where guest memory begins; not at zero, so that an offset is never mistaken for an address.
const MEMORY_START: u64 = 1 << 20;

/// A VMM with its guest's memory and queues, connected or not.
pub struct Vmm {
    plan: Plan,
    memory: GuestMemoryMmap<()>,
    /// The driver's queues.
    pub queues: Vec<Queue>,
    frontend: Option<Frontend>,
    /// Feature bits that were offered and accepted.
    pub features: u64,
    /// Protocol features that were offered and accepted.
    pub protocol_features: VhostUserProtocolFeatures,
    /// How many queues the device has.
    pub device_queues: u64,
    /// The configuration space.
    pub config: Vec<u8>,
    inflight: Option<(VhostUserInflight, File)>,
    /// The device was active before: virtqueues may hold chains that are to be completed.
    was_active: bool,
    calls: Epoll,
}

impl Vmm {
    /// A VMM that is not connected.
    pub fn new(plan: &Plan) -> Self {
        let bytes = Queue::bytes(plan) * plan.queues as u64;
        let region = region(MEMORY_START, bytes);
        let memory = GuestMemoryMmap::from_regions(vec![region]).expect("one region");
        let start = |index| MEMORY_START + index as u64 * Queue::bytes(plan);
        let queues = (0..plan.queues).map(|index| Queue::new(memory.clone(), plan, start(index)));
        let queues: Vec<Queue> = queues.collect();
        Self {
            calls: watch(queues.iter().map(|queue| &queue.call)),
            queues,
            plan: plan.clone(),
            memory,
            frontend: None,
            features: 0,
            protocol_features: VhostUserProtocolFeatures::empty(),
            device_queues: 0,
            config: Vec::new(),
            inflight: None,
            was_active: false,
        }
    }

    /// Connects to a daemon and activates the device.
    pub fn start(socket: &Path, plan: &Plan) -> Self {
        let mut vmm = Self::new(plan);
        vmm.connect(socket).expect("connecting");
        vmm.activate().expect("activating the device");
        vmm
    }

    /// Connects and negotiates, as when a device is made. A VMM that was connected forgets that
    /// connection.
    ///
    /// # Errors
    /// If no daemon listens, or the connection is lost meanwhile.
    pub fn connect(&mut self, socket: &Path) -> vhost::Result<()> {
        self.frontend = None;
        let stream = UnixStream::connect(socket).map_err(Error::SocketConnect)?;
        self.connect_over(stream)
    }

    /// The same over a connection.
    ///
    /// # Errors
    /// If the connection is lost meanwhile.
    pub fn connect_over(&mut self, stream: UnixStream) -> vhost::Result<()> {
        // No answer is an error, too.
        stream
            .set_read_timeout(Some(HANG_LIMIT))
            .map_err(Error::SocketError)?;
        let mut frontend = Frontend::from_stream(stream, 1);
        let is_qemu = self.plan.style == Style::Qemu;
        if !is_qemu {
            frontend.set_owner()?;
        }
        let offered = frontend.get_features()?;
        let protocol_features = frontend.get_protocol_features()? & self.plan.protocol_features;
        frontend.set_protocol_features(protocol_features)?;
        if !is_qemu {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let device_queues = frontend.get_queue_num()?;
        if is_qemu {
            frontend.get_max_mem_slots()?;
            frontend.set_owner()?;
            assert_eq!(frontend.get_features()?, offered, "features that change");
        }
        let flags = if is_qemu {
            VhostUserConfigFlags::empty()
        } else {
            VhostUserConfigFlags::WRITABLE
        };
        // The crate checks that offset and size come back as they were.
        let nothing = [0; CONFIG_BYTES as usize];
        let (_, config) = frontend.get_config(0, CONFIG_BYTES, flags, &nothing)?;
        let features = offered & self.plan.features;
        if self.was_active {
            // Neither VMM asks again when it has connected again, so nothing may have changed.
            let before = (self.features, self.protocol_features, self.device_queues);
            assert_eq!((features, protocol_features, device_queues), before);
            assert_eq!(config, self.config);
        }
        self.features = features;
        self.protocol_features = protocol_features;
        self.device_queues = device_queues;
        self.config = config;
        self.frontend = Some(frontend);
        Ok(())
    }

    /// Activates the device: sends memory and virtqueues. Virtqueues in use continue where they
    /// are.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn activate(&mut self) -> vhost::Result<()> {
        let event_idx = self.has_feature(VIRTIO_RING_F_EVENT_IDX);
        for queue in &mut self.queues {
            queue.event_idx = event_idx;
        }
        match self.plan.style {
            Style::Qemu => self.activate_as_qemu()?,
            Style::CloudHypervisor => self.activate_as_cloud_hypervisor()?,
        }
        self.was_active = true;
        Ok(())
    }

    /// Connects to a daemon that was restarted, and continues. Retries until that succeeds or
    /// `is_hopeless`; returns whether it has succeeded.
    pub fn reconnect(&mut self, socket: &Path, mut is_hopeless: impl FnMut() -> bool) -> bool {
        loop {
            if self.connect(socket).and_then(|()| self.activate()).is_ok() {
                return true;
            }
            self.frontend = None;
            if is_hopeless() {
                return false;
            }
            // The VMMs do the same, at longer intervals.
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Passes the inflight region, if there is one. Gets it from the daemon the first time.
    fn set_inflight(&mut self) -> vhost::Result<()> {
        let feature = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        if !self.protocol_features.contains(feature) {
            return Ok(());
        }
        let frontend = self.frontend.as_mut().expect("connected");
        if self.inflight.is_none() {
            self.inflight = Some(get_inflight(frontend, &self.plan)?);
        }
        let (inflight, file) = self.inflight.as_ref().expect("just set");
        frontend.set_inflight_fd(inflight, file.as_raw_fd())?;
        Ok(())
    }

    fn activate_as_qemu(&mut self) -> vhost::Result<()> {
        let frontend = self.frontend.as_mut().expect("connected");
        frontend.set_features(self.features)?;
        self.set_inflight()?;
        let frontend = self.frontend.as_mut().expect("connected");
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_call(index, &queue.call)?;
        }
        frontend.set_features(self.features)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_mem_table(&regions(&self.memory))?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::empty());
        self.activate_virtqueues()?;
        if self.was_active {
            for queue in &self.queues {
                queue.kick();
            }
        }
        Ok(())
    }

    fn activate_as_cloud_hypervisor(&mut self) -> vhost::Result<()> {
        let frontend = self.frontend.as_mut().expect("connected");
        frontend.set_features(self.features)?;
        frontend.set_mem_table(&regions(&self.memory))?;
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_num(index, queue.size)?;
        }
        self.set_inflight()?;
        let frontend = self.frontend.as_mut().expect("connected");
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_addr(index, &virtqueue_data(&self.memory, queue))?;
            frontend.set_vring_base(index, queue.published)?;
            frontend.set_vring_call(index, &queue.call)?;
            frontend.set_vring_kick(index, &queue.kick)?;
        }
        for index in 0..self.queues.len() {
            frontend.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Sends the virtqueues and starts them; the backend has the memory already.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn activate_virtqueues(&mut self) -> vhost::Result<()> {
        let frontend = self.frontend.as_mut().expect("connected");
        for (index, queue) in self.queues.iter().enumerate() {
            frontend.set_vring_num(index, queue.size)?;
            frontend.set_vring_base(index, queue.used_index())?;
            frontend.set_vring_addr(index, &virtqueue_data(&self.memory, queue))?;
            frontend.set_vring_kick(index, &queue.kick)?;
            frontend.set_vring_call(index, &queue.call)?;
        }
        for index in 0..self.queues.len() {
            frontend.set_vring_enable(index, true)?;
        }
        Ok(())
    }

    /// Stops every virtqueue, like a reset of the driver. The device can be activated again on the
    /// same connection. Returns the available index at which each virtqueue stopped.
    ///
    /// # Errors
    /// If the connection is lost.
    pub fn stop_virtqueues(&mut self) -> vhost::Result<Vec<u32>> {
        let count = self.queues.len();
        let frontend = self.frontend();
        for index in 0..count {
            frontend.set_vring_enable(index, false)?;
        }
        (0..count)
            .map(|index| frontend.get_vring_base(index))
            .collect()
    }

    /// The driver sets up its virtqueues from the beginning; the device does not use them then.
    pub fn reset_driver(&mut self) {
        self.inflight = None;
        self.was_active = false;
        for queue in &mut self.queues {
            queue.reset();
        }
    }

    /// Whether the driver has begun to use the device.
    pub fn was_active(&self) -> bool {
        self.was_active
    }

    /// The driver accepts only these features when it activates the device the next time.
    pub fn restrict_features(&mut self, features: u64) {
        self.plan.features &= features;
        self.features &= features;
    }

    /// Whether a feature bit was accepted.
    pub fn has_feature(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    /// The connection, for single messages.
    pub fn frontend(&mut self) -> &mut Frontend {
        self.frontend.as_mut().expect("connected")
    }

    /// Closes the connection.
    pub fn disconnect(&mut self) {
        self.frontend = None;
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Everything in guest memory.
    pub fn memory_content(&self) -> Vec<u8> {
        let bytes = self.memory.iter().map(GuestMemoryRegion::len).sum::<u64>();
        let mut content = vec![0; usize::try_from(bytes).expect("small")];
        self.memory
            .read_slice(&mut content, GuestAddress(MEMORY_START))
            .expect("within guest memory");
        content
    }

    /// A field of the configuration space.
    pub fn config_u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.config[offset..offset + 4].try_into().expect("4 bytes"))
    }

    /// The inflight region, and how it is laid out.
    pub fn inflight(&self) -> Option<&(VhostUserInflight, File)> {
        self.inflight.as_ref()
    }

    /// In-flight chains of all virtqueues according to the inflight region; `None` without a
    /// region. Panics if its used indices differ from the used rings, which agree when nothing is
    /// in flight.
    pub fn inflight_chains(&self) -> Option<usize> {
        let (layout, file) = self.inflight.as_ref()?;
        let stride = layout.mmap_size / u64::from(layout.num_queues);
        let read = |offset: u64| {
            let mut bytes = [0; 2];
            file.read_exact_at(&mut bytes, layout.mmap_offset + offset)
                .expect("reading the inflight region");
            u16::from_le_bytes(bytes)
        };
        let mut chains = 0;
        for (index, queue) in self.queues.iter().enumerate() {
            // vhost-user, "Inflight I/O tracking": a header of 16 bytes, the used index at its end,
            // and 16 bytes for each descriptor, of which the first says whether it is
            // in flight.
            let start = index as u64 * stride;
            assert_eq!(
                read(start + 14),
                queue.used_index(),
                "the used index in the region"
            );
            let in_flight =
                (0..u64::from(queue.size)).filter(|head| read(start + 16 + head * 16) & 0xff != 0);
            chains += in_flight.count();
        }
        Some(chains)
    }

    /// Waits for a call of any virtqueue. Each must ask for one first.
    pub fn wait_for_any(&self, limit: Duration) -> bool {
        wait_for(&self.calls, limit) && self.queues.iter().map(Queue::take_calls).sum::<u64>() > 0
    }
}

/// VIRTIO_RING_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// VIRTIO_RING_F_INDIRECT_DESC.
pub const INDIRECT_DESCRIPTORS: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

fn get_inflight(frontend: &mut Frontend, plan: &Plan) -> vhost::Result<(VhostUserInflight, File)> {
    let wanted = VhostUserInflight::new(0, 0, small(plan.queues), plan.queue_size);
    let (got, file) = frontend.get_inflight_fd(&wanted)?;
    let queues = (got.num_queues, got.queue_size);
    assert_eq!(queues, (wanted.num_queues, wanted.queue_size));
    Ok((got, file))
}
