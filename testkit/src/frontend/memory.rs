//! Guest memory as files that a VMM shares.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
};

use super::queue::Queue;

/// A region of guest memory that can be shared.
pub fn region(address: u64, bytes: u64) -> GuestRegionMmap<()> {
    let mapping = MmapRegion::from_file(
        FileOffset::new(memfd(bytes), 0),
        usize::try_from(bytes).expect("small"),
    );
    GuestRegionMmap::new(mapping.expect("mapping a memfd"), GuestAddress(address))
        .expect("no overflow")
}

/// A file in memory.
pub fn memfd(bytes: u64) -> File {
    // SAFETY: the name is a C string that outlives the call.
    let descriptor = unsafe { libc::memfd_create(c"guest-memory".as_ptr(), libc::MFD_CLOEXEC) };
    assert_ne!(
        descriptor,
        -1,
        "memfd_create: {}",
        io::Error::last_os_error()
    );
    // SAFETY: the descriptor is new, and nothing else owns it.
    let file = unsafe { File::from_raw_fd(descriptor) };
    file.set_len(bytes).expect("sizing a memfd");
    file
}

/// The memory as the frontend sends it.
pub fn regions(memory: &GuestMemoryMmap<()>) -> Vec<VhostUserMemoryRegionInfo> {
    let regions = memory
        .iter()
        .map(VhostUserMemoryRegionInfo::from_guest_region);
    regions
        .collect::<vhost::Result<_>>()
        .expect("regions of files")
}

/// A virtqueue as the frontend sends it: addresses of this process.
pub fn virtqueue_data(memory: &GuestMemoryMmap<()>, queue: &Queue) -> VringConfigData {
    let [descriptors, available, used] = queue.virtqueue_addresses().map(|address| {
        let pointer = memory.get_host_address(GuestAddress(address));
        pointer.expect("within guest memory") as u64
    });
    VringConfigData {
        queue_max_size: queue.size,
        queue_size: queue.size,
        flags: 0,
        desc_table_addr: descriptors,
        used_ring_addr: used,
        avail_ring_addr: available,
        log_addr: None,
    }
}
