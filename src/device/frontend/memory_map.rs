//! Where the frontend has guest memory: it names addresses of virtqueues in its own address space.

use vhost::vhost_user::message::VhostUserMemoryRegion;

/// The regions of guest memory, as the frontend listed them.
#[derive(Debug, Default)]
pub(super) struct MemoryMap(Vec<Mapping>);

#[derive(Clone, Copy, Debug)]
struct Mapping {
    frontend_address: u64,
    bytes: u64,
    guest_address: u64,
}

impl MemoryMap {
    pub(super) fn new(regions: &[VhostUserMemoryRegion]) -> Self {
        let mut map = Self::default();
        regions.iter().for_each(|region| map.add(region));
        map
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn add(&mut self, region: &VhostUserMemoryRegion) {
        self.0.push(Mapping {
            frontend_address: region.user_addr,
            bytes: region.memory_size,
            guest_address: region.guest_phys_addr,
        });
    }

    pub(super) fn remove(&mut self, guest_address: u64) {
        self.0
            .retain(|mapping| mapping.guest_address != guest_address);
    }

    /// Translates an address of the frontend, if it lies in guest memory.
    pub(super) fn guest_address(&self, frontend_address: u64) -> Option<u64> {
        self.0.iter().find_map(|mapping| {
            let offset = frontend_address.checked_sub(mapping.frontend_address)?;
            (offset < mapping.bytes).then(|| mapping.guest_address + offset)
        })
    }
}
