//! The VMM: sends the frontend's messages as calls of the device, and keeps what it has negotiated.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use quorum_blk::device::connection::{CacheMode, ConnectionSlot};
use quorum_blk::device::frontend::Frontend;
use quorum_blk::device::{Capacity, DiskInfo};
use quorum_blk::limits;
use rustix::event::{EventfdFlags, eventfd};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
};
use vhost::vhost_user::{Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::script::Script;
use super::driver::{drive, set_available_index};
use super::memory::{FILE_BYTES, LOG_PAGE_BYTES, Mapping, memory_file};
use super::places::{QUEUES, address, queue};
use super::step::Step;
use super::world::{Server, World, with_world};

/// Entries of a virtqueue, at most.
const QUEUE_SIZE_MAX: u16 = 32;
/// The first address of the virtqueues, and the distance from one to the next, unless a script
/// moves them.
const QUEUE_ADDRESS: u64 = 0x1000;
const QUEUE_STRIDE: u64 = 0x400;
const AVAILABLE: u64 = 0x200;
const USED: u64 = 0x280;
/// The addresses at which guest memory may be.
const SLOTS: [u64; 8] = [
    0,
    0x8000,
    0x4000,
    0xa000,
    0x9000,
    0x1_0000,
    1 << 32,
    u64::MAX - 0x4fff,
];

const LOG_BYTES: u64 = 0x1000;

/// The VMM and the driver.
pub(super) struct Machine {
    frontend: Arc<Mutex<Frontend>>,
    log: File,
    logs: bool,
    /// The size of the log's area, if the frontend has set one.
    log_bytes: Option<u64>,
    region: Option<(VhostUserInflight, File)>,
}

fn disk_info() -> DiskInfo {
    DiskInfo {
        // Large enough for a discard of many fragments.
        capacity: Capacity::new(1 << 17),
        block_bytes: 512,
        physical_block_bytes: 4096,
        read_only: false,
        serial: "quorum 0123".to_owned(),
        num_queues: QUEUES,
        segments_max: 126,
    }
}

fn new_slot() -> ConnectionSlot {
    ConnectionSlot::new(QUEUES, QUEUE_SIZE_MAX, CacheMode::default())
        .expect("a size that a queue can have")
}

fn new_frontend(slot: ConnectionSlot) -> Arc<Mutex<Frontend>> {
    Arc::new(Mutex::new(Frontend::new(
        disk_info(),
        slot,
        Box::new(Server),
    )))
}

fn event() -> File {
    File::from(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd"))
}

impl Machine {
    pub(super) fn new() -> Self {
        let slot = new_slot();
        World::begin(disk_info(), slot.clone());
        Self {
            frontend: new_frontend(slot),
            log: memory_file(LOG_BYTES),
            logs: false,
            log_bytes: None,
            region: None,
        }
    }

    /// Sends a message. An error ends the connection; the next message uses a new one.
    fn send<R>(&mut self, message: impl FnOnce(&mut Frontend) -> Result<R>) -> Option<R> {
        // The message may switch the log off.
        with_world(|world| world.model.files.log = None);
        let result = message(&mut self.frontend.lock().expect("no panic so far"));
        if result.is_err() {
            self.disconnect();
        }
        self.note_log();
        result.ok()
    }

    fn note_log(&self) {
        let log = (self.logs && self.log_bytes.is_some())
            .then(|| self.log.try_clone().expect("a descriptor"));
        with_world(|world| world.model.files.log = log);
    }

    /// Connects and closes at once, which resets the device.
    pub(super) fn disconnect(&mut self) {
        (self.logs, self.log_bytes) = (false, None);
        self.note_log();
        let (_, theirs) = UnixStream::pair().expect("a pair of sockets");
        Frontend::serve(&self.frontend, theirs);
        with_world(|world| world.model.files.table.clear());
        self.region = None;
    }

    /// Sets memory and virtqueues up as a VMM does.
    pub(super) fn set_up(&mut self) {
        self.send(Frontend::get_features);
        self.features(0b1_1111);
        self.memory_table(&[(0, 0), (1, 1)]);
        for queue in 0..QUEUES {
            self.send(|frontend| frontend.set_vring_num(queue.into(), 16));
            self.addresses(queue, standard_addresses(queue));
            let base = with_world(|world| {
                let mut base = [0; 2];
                let place = QUEUE_ADDRESS + QUEUE_STRIDE * u64::from(queue) + USED + 2;
                world.model.files.files[0]
                    .read_exact_at(&mut base, place)
                    .expect("a memory file");
                u16::from_le_bytes(base)
            });
            self.send(|frontend| frontend.set_vring_base(queue.into(), base.into()));
            self.send(|frontend| frontend.set_vring_call(u8_of(queue), Some(event())));
            self.send(|frontend| frontend.set_vring_kick(u8_of(queue), Some(event())));
            self.send(|frontend| frontend.set_vring_enable(queue.into(), true));
        }
    }

    pub(super) fn step(&mut self, step: Step, script: &mut Script<'_>) {
        match step {
            Step::Request | Step::Offer | Step::Descriptor | Step::Header | Step::Segment => {
                drive(step, script);
            }
            Step::Put => {
                let (place, count) = (address(script), usize::from(script.u8() & 0x3f));
                let bytes = script.take(count);
                with_world(|world| world.model.files.put(place, bytes));
            }
            Step::Index => {
                let queue = queue(script);
                set_available_index(queue, script.u16());
            }
            Step::Serve => {
                let count = script.u8().into();
                with_world(|world| world.serve(count));
            }
            Step::Answer => {
                let answer = script.u8();
                with_world(|world| world.answer((answer >> 1).into(), answer & 1 != 0));
            }
            Step::Sleep => with_world(World::sleep),
            Step::Patience => {
                let patience = script.u8();
                with_world(|world| {
                    world.flushes = patience & 0x80 == 0;
                    world.patience = match patience & 0x7f {
                        0x7f => usize::MAX,
                        few => few.into(),
                    };
                });
            }
            Step::Stop | Step::Start | Step::Enable | Step::Size | Step::Addresses | Step::Base => {
                self.set_queue(step, script);
            }
            Step::MemoryTable | Step::AddMemory | Step::RemoveMemory => {
                self.set_memory(step, script)
            }
            Step::Region | Step::RegionBytes | Step::OtherRegion => self.set_region(step, script),
            Step::Features => self.features(script.u8()),
            Step::CacheMode => {
                let writeback = script.u8();
                let flags = VhostUserConfigFlags::empty();
                self.send(|frontend| frontend.set_config(32, &[writeback], flags));
            }
            Step::Log => self.set_log(script),
            Step::Reset => {
                self.logs = false;
                self.send(Frontend::reset_device);
            }
            Step::Disconnect => self.disconnect(),
            Step::Kill => self.kill(),
            Step::SetUp => self.set_up(),
        }
    }

    fn set_queue(&mut self, step: Step, script: &mut Script<'_>) {
        let queue = queue(script);
        let index = u32::from(queue);
        match step {
            Step::Stop => {
                self.send(|frontend| frontend.get_vring_base(index));
            }
            Step::Start => {
                let kick = script.flag().then(event);
                self.send(|frontend| frontend.set_vring_kick(u8_of(queue), kick));
            }
            Step::Enable => {
                let enable = script.flag();
                self.send(|frontend| frontend.set_vring_enable(index, enable));
            }
            Step::Size => {
                let size = script.u8();
                // Powers of two, and other numbers.
                let size = if size < 8 { 1 << size } else { u32::from(size) };
                self.send(|frontend| frontend.set_vring_num(index, size));
            }
            Step::Base => {
                let base = script.u16().into();
                self.send(|frontend| frontend.set_vring_base(index, base));
            }
            _ => {
                let places = match script.u8() {
                    standard @ 0..=3 => standard_addresses(standard.into()),
                    _ => [(); 3].map(|()| address(script)),
                };
                self.addresses(queue, places);
            }
        }
    }

    /// Sets the addresses of a virtqueue, aligned as the `vhost` crate demands.
    fn addresses(&mut self, queue: u16, [descriptor, available, used]: [u64; 3]) {
        let user = |address: u64, alignment: u64| {
            with_world(|world| world.model.files.user_address(address))
                .map(|address| address & !(alignment - 1))
        };
        let places = (user(descriptor, 16), user(available, 2), user(used, 4));
        let (Some(descriptor), Some(available), Some(used)) = places else {
            return;
        };
        let flags = VhostUserVringAddrFlags::empty();
        self.send(|frontend| {
            frontend.set_vring_addr(queue.into(), flags, descriptor, used, available, 0)
        });
    }

    fn features(&mut self, choice: u8) {
        let offered = [
            1 << VIRTIO_RING_F_EVENT_IDX,
            VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            1 << VIRTIO_BLK_F_FLUSH,
            1 << VIRTIO_BLK_F_CONFIG_WCE,
            1 << VIRTIO_F_VERSION_1,
            VhostUserVirtioFeatures::LOG_ALL.bits(),
            0,
            1 << 63,
        ];
        let chosen = (0..).zip(offered).filter(|(bit, _)| choice & 1 << bit != 0);
        let features = chosen.fold(0, |features, (_, feature)| features | feature);
        if self
            .send(|frontend| frontend.set_features(features))
            .is_some()
        {
            self.logs = features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
            self.note_log();
        }
    }

    fn set_memory(&mut self, step: Step, script: &mut Script<'_>) {
        let choice = |script: &mut Script<'_>| {
            let choice = usize::from(script.u8());
            (
                choice % FILE_BYTES.len(),
                choice / FILE_BYTES.len() % SLOTS.len(),
            )
        };
        match step {
            Step::MemoryTable => {
                let count = 1 + script.u8() % 4;
                let choices: Vec<_> = (0..count).map(|_| choice(script)).collect();
                self.memory_table(&choices);
            }
            Step::AddMemory => {
                let mapping = mapping(choice(script));
                let region = VhostUserSingleMemoryRegion::new(
                    mapping.guest_address,
                    mapping.bytes,
                    mapping.user_address,
                    mapping.offset,
                );
                let file = shared_file(mapping.file);
                let mut table = with_world(|world| world.model.files.table.clone());
                table.push(mapping);
                self.change_memory(table, |frontend| {
                    frontend.add_mem_region(&region, file, None).map(drop)
                });
            }
            _ => {
                let mapping = mapping(choice(script));
                let region =
                    VhostUserSingleMemoryRegion::new(mapping.guest_address, mapping.bytes, 0, 0);
                let mut table = with_world(|world| world.model.files.table.clone());
                table.retain(|other| other.guest_address != mapping.guest_address);
                self.change_memory(table, |frontend| frontend.remove_mem_region(&region));
            }
        }
    }

    fn memory_table(&mut self, choices: &[(usize, usize)]) {
        let mappings: Vec<Mapping> = choices.iter().copied().map(mapping).collect();
        let region = |mapping: &Mapping| {
            VhostUserMemoryRegion::new(
                mapping.guest_address,
                mapping.bytes,
                mapping.user_address,
                mapping.offset,
            )
        };
        let regions: Vec<_> = mappings.iter().map(region).collect();
        let files = mappings
            .iter()
            .map(|mapping| shared_file(mapping.file))
            .collect();
        self.change_memory(mappings, |frontend| {
            frontend.set_mem_table(&regions, files, None).map(drop)
        });
    }

    /// Sends a message after which guest memory is `table`, unless it fails. The device replaces
    /// the memory before it refreshes the virtqueues.
    fn change_memory(
        &mut self,
        table: Vec<Mapping>,
        message: impl FnOnce(&mut Frontend) -> Result<()>,
    ) {
        // While it is off, a log that does not cover the new memory is dropped.
        let last = table
            .iter()
            .map(|mapping| mapping.guest_address + (mapping.bytes - 1));
        let last = last.max().unwrap_or(0);
        let covers = |bytes: &u64| last / LOG_PAGE_BYTES / 8 < *bytes;
        let log_bytes = self.log_bytes.filter(|bytes| self.logs || covers(bytes));
        with_world(|world| world.next_table = Some(table));
        let sent = self.send(|frontend| {
            let result = message(frontend);
            let refreshed = with_world(|world| world.next_table.take().is_none());
            assert_eq!(refreshed, result.is_ok(), "the queues know the new memory");
            result
        });
        if sent.is_some() {
            self.log_bytes = log_bytes;
            self.note_log();
        }
    }

    fn set_region(&mut self, step: Step, script: &mut Script<'_>) {
        match step {
            Step::Region => {
                let size = script.u8();
                let asked = VhostUserInflight {
                    mmap_size: 0,
                    mmap_offset: 0,
                    num_queues: 1 + u16::from(size & 1),
                    queue_size: (u16::from(size >> 1)).max(1),
                };
                self.region = self.send(|frontend| frontend.get_inflight_fd(&asked));
            }
            Step::RegionBytes => {
                let (offset, count) = (script.u16(), usize::from(script.u8() & 0x1f));
                let bytes = script.take(count);
                if let Some((region, file)) = &self.region {
                    let offset = u64::from(offset) % region.mmap_size;
                    // The file is sealed, so it does not grow.
                    let _ = file.write_all_at(bytes, offset);
                }
                return;
            }
            // The same file, with another layout.
            _ => {
                let change = script.u8();
                if let Some((region, _)) = &mut self.region {
                    match change & 3 {
                        0 => region.num_queues = (change >> 2).into(),
                        1 => region.queue_size = (change >> 2).into(),
                        2 => region.mmap_size = u64::from(change >> 2) << 6,
                        _ => region.mmap_offset = u64::from(change >> 2) << 6,
                    }
                }
            }
        }
        self.hand_region_over();
    }

    fn hand_region_over(&mut self) {
        let Some((region, file)) = &self.region else {
            return;
        };
        let bytes_for = |entries: u64| (16 + 16 * entries).next_multiple_of(64);
        // A region with room for queues of every size has just so many bytes.
        let full_bytes = bytes_for(limits::QUEUE_SIZE_MAX.max(region.queue_size).into());
        let is_full = region.mmap_size == u64::from(region.num_queues) * full_bytes;
        let queue_bytes = match is_full {
            true => full_bytes,
            false => bytes_for(region.queue_size.into()),
        };
        let (region, offset) = (*region, region.mmap_offset);
        let (file, kept) = (
            file.try_clone().expect("a descriptor"),
            file.try_clone().expect("a descriptor"),
        );
        if self
            .send(|frontend| frontend.set_inflight_fd(&region, file))
            .is_some()
        {
            with_world(|world| {
                world.model.set_region(kept, offset, queue_bytes);
            });
        }
    }

    fn set_log(&mut self, script: &mut Script<'_>) {
        let bytes =
            [LOG_BYTES, 1, 2, 3, 4, 16, LOG_BYTES + 1, u64::MAX][usize::from(script.u8() & 7)];
        let log = VhostUserLog::new(bytes, 0);
        let file = self.log.try_clone().expect("a descriptor");
        if self
            .send(|frontend| frontend.set_log_base(&log, file))
            .is_some()
        {
            self.log_bytes = Some(bytes);
            self.note_log();
        }
    }

    /// Kills the daemon and starts the next one with the same memory, virtqueues and region.
    fn kill(&mut self) {
        let region = self.region.take();
        (self.logs, self.log_bytes) = (false, None);
        let slot = new_slot();
        self.frontend = new_frontend(slot.clone());
        with_world(|world| world.kill(slot));
        self.region = region;
        self.hand_region_over();
        self.set_up();
    }
}

/// A part of a file, at one of the places where guest memory may be.
fn mapping((file, slot): (usize, usize)) -> Mapping {
    Mapping {
        guest_address: SLOTS[slot],
        user_address: 0x7f00_0000_0000 + 0x10_0000 * slot as u64,
        bytes: FILE_BYTES[file],
        file,
        offset: 0,
    }
}

fn shared_file(file: usize) -> File {
    with_world(|world| {
        world.model.files.files[file]
            .try_clone()
            .expect("a descriptor")
    })
}

fn standard_addresses(place: u16) -> [u64; 3] {
    let start = QUEUE_ADDRESS + QUEUE_STRIDE * u64::from(place);
    [start, start + AVAILABLE, start + USED]
}

fn u8_of(queue: u16) -> u8 {
    u8::try_from(queue).expect("few queues")
}
