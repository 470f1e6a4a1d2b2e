//! Messages of a frontend that are wrong, and what a right one must find when it is answered.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserSingleMemoryRegion};
use vm_memory::{GuestAddressSpace, GuestMemoryRegion};

use super::*;
use crate::device::connection::{CacheMode, ConnectionSlot};
use crate::device::frontend::{Frontend, VirtqueueServer};
use crate::device::inflight::QueueRegion;

/// A server without virtqueues.
struct Server;

impl VirtqueueServer for Server {
    fn flush(&self) -> bool {
        true
    }

    fn refresh(&self, _queues: Vec<(u16, Option<QueueRegion>)>) {}
}

fn frontend() -> Frontend {
    Frontend::new(
        disk_info(),
        ConnectionSlot::new(1, 64, CacheMode::default()).unwrap(),
        Box::new(Server),
    )
}

#[test]
fn a_call_descriptor_without_room_blocks_no_thread() {
    // There is room for the greatest count but one.
    let event = File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    (&event).write_all(&(u64::MAX - 1).to_ne_bytes()).unwrap();
    let (done, is_done) = sync_channel(1);
    let thread = thread::spawn(move || {
        let mut frontend = frontend();
        frontend.set_vring_call(0, Some(event)).unwrap();
        done.send(()).unwrap();
    });
    is_done
        .recv_timeout(Duration::from_secs(30))
        .expect("the frontend does not wait for room");
    thread.join().unwrap();
}

#[test]
fn files_are_no_kick_and_only_eventfds_are_call_descriptors() {
    let mut frontend = frontend();
    for path in ["/", "/dev/null"] {
        assert!(
            frontend
                .set_vring_kick(0, Some(File::open(path).unwrap()))
                .is_err()
        );
    }
    for file in [File::open("/").unwrap(), tempfile::tempfile().unwrap()] {
        assert!(
            frontend
                .set_vring_kick(0, Some(file.try_clone().unwrap()))
                .is_err()
        );
        assert!(frontend.set_vring_call(0, Some(file)).is_err());
    }
    let (reader, writer) = std::io::pipe().unwrap();
    let writer = File::from(OwnedFd::from(writer));
    assert!(frontend.set_vring_call(0, Some(writer)).is_err());
    let event = File::from(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    for kick in [
        File::from(OwnedFd::from(reader)),
        event.try_clone().unwrap(),
    ] {
        frontend.set_vring_kick(0, Some(kick)).unwrap();
    }
    frontend.set_vring_call(0, Some(event)).unwrap();
}

#[test]
fn regions_of_memory_come_in_any_order() {
    const BYTES: u64 = 0x1000;
    let file = tempfile::tempfile().unwrap();
    file.set_len(2 * BYTES).unwrap();
    let slot = ConnectionSlot::new(1, 64, CacheMode::default()).unwrap();
    let mut frontend = Frontend::new(disk_info(), slot.clone(), Box::new(Server));
    let region = |address, offset| VhostUserMemoryRegion::new(address, BYTES, address, offset);
    let regions = [region(0x10_0000, 0), region(0, BYTES)];
    let files = || vec![file.try_clone().unwrap(), file.try_clone().unwrap()];
    frontend.set_mem_table(&regions, files(), None).unwrap();
    let memory = slot.memory.memory();
    memory.write_slice(&[1], GuestAddress(0x10_0000)).unwrap();
    memory.write_slice(&[2], GuestAddress(0)).unwrap();
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes[..1], 0).unwrap();
    file.read_exact_at(&mut bytes[1..], BYTES).unwrap();
    assert_eq!(bytes, [1, 2]);
    // Overlapping regions are rejected.
    let regions = [region(0x800, 0), region(0, BYTES)];
    assert!(frontend.set_mem_table(&regions, files(), None).is_err());
}

/// It can be mapped at any offset, but has no memory behind the mapping.
#[test]
fn dev_zero_is_rejected_as_memory() {
    for offset in [0, 0x1000] {
        let file = File::options()
            .read(true)
            .write(true)
            .open("/dev/zero")
            .unwrap();
        let region = VhostUserMemoryRegion::new(0, 0x1000, 0, offset);
        assert!(
            frontend()
                .set_mem_table(&[region], vec![file], None)
                .is_err()
        );
    }
}

/// Looks at guest memory the way a worker does: it keeps one map for a whole turn, and looks up the
/// next one when the frontend asks for a refresh.
struct Worker {
    memory: GuestMemoryAtomic<GuestMemory>,
    map: Arc<Mutex<GuestMemory>>,
}

impl Worker {
    fn new(slot: &ConnectionSlot) -> Self {
        Self {
            memory: slot.memory.clone(),
            map: Arc::new(Mutex::new(GuestMemory::clone(&slot.memory.memory()))),
        }
    }
}

impl VirtqueueServer for Worker {
    fn flush(&self) -> bool {
        true
    }

    fn refresh(&self, queues: Vec<(u16, Option<QueueRegion>)>) {
        if !queues.is_empty() {
            *self.map.lock().unwrap() = GuestMemory::clone(&self.memory.memory());
        }
    }
}

/// A chain that the driver makes available after the reply never meets the old map: the file of a
/// removed region has no user left, and an added region is there.
#[test]
fn workers_use_the_new_memory_map_before_the_frontend_is_answered() {
    const BYTES: u64 = 0x1000;
    let slot = ConnectionSlot::new(1, 64, CacheMode::default()).unwrap();
    let worker = Worker::new(&slot);
    let map = Arc::clone(&worker.map);
    let mut frontend = Frontend::new(disk_info(), slot, Box::new(worker));
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        file
    };
    // Its name shows in /proc/self/maps as long as any map has the region.
    let added = "quorum-blk-added-region";
    let is_added_mapped = || {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .contains(added)
    };
    let memfd = File::from(memfd_create(added, MemfdFlags::CLOEXEC).unwrap());
    memfd.set_len(BYTES).unwrap();
    let addresses = || {
        let map = map.lock().unwrap();
        let regions = map.iter().map(|region| region.start_addr().0);
        regions.collect::<Vec<_>>()
    };
    let region = |address| VhostUserMemoryRegion::new(address, BYTES, address, 0);
    let single = |address| VhostUserSingleMemoryRegion::new(address, BYTES, address, 0);

    frontend
        .set_mem_table(&[region(0)], vec![file()], None)
        .unwrap();
    assert_eq!(addresses(), [0]);
    frontend
        .add_mem_region(&single(0x10_0000), memfd, None)
        .unwrap();
    assert_eq!(addresses(), [0, 0x10_0000]);
    assert!(is_added_mapped());
    frontend.remove_mem_region(&single(0x10_0000)).unwrap();
    assert_eq!(addresses(), [0]);
    assert!(!is_added_mapped(), "a removed region is unmapped");
    frontend
        .set_mem_table(&[region(0x20_0000)], vec![file()], None)
        .unwrap();
    assert_eq!(addresses(), [0x20_0000]);
}
