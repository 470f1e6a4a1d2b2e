//! Guest memory as requests access it, in a way that the compiler can inline.
//!
//! `vm-memory` iterates over the parts of an access through calls that are not inlined. A request
//! makes a dozen accesses of a few bytes each, and the calls took longer than everything else that
//! the device does for it. Nothing else differs: each access is checked, each write is logged.

use std::iter::FusedIterator;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{
    GuestAddress, GuestMemory as Access, GuestMemoryBackend, GuestMemoryRegion,
    MemoryRegionAddress, MmapRegion, Permissions, VolatileSlice,
};

use super::GuestMemory;
use super::memory::LoggedWrites;
use crate::untrusted::mapping::Mapped;

/// Guest memory at one moment.
#[derive(Clone, Copy, Debug)]
pub struct View<'a>(pub &'a GuestMemory);

impl View<'_> {
    /// Whether memory was lost that the frontend shares: what was read before counts only if not.
    #[inline]
    pub(super) fn is_lost(&self) -> bool {
        let first = self.0.iter().next();
        first.is_some_and(|region| MmapRegion::bitmap(region).bitmap().is_lost())
    }
}

impl Access for View<'_> {
    type PhysicalMemory = GuestMemory;
    type Bitmap = Mapped<LoggedWrites>;

    fn check_range(&self, address: GuestAddress, count: usize, _access: Permissions) -> bool {
        GuestMemoryBackend::check_range(self.0, address, count)
    }

    #[inline]
    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        _access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Mapped<LoggedWrites>>>> {
        let (memory, left) = (self.0, count);
        Ok(Slices {
            memory,
            address,
            left,
        })
    }

    fn physical_memory(&self) -> Option<&GuestMemory> {
        Some(self.0)
    }
}

/// The parts of an access: one for each region that it touches.
struct Slices<'a> {
    memory: &'a GuestMemory,
    address: GuestAddress,
    left: usize,
}

impl<'a> Slices<'a> {
    #[inline]
    fn part(&mut self) -> Result<VolatileSlice<'a, BS<'a, Mapped<LoggedWrites>>>> {
        let region = self.memory.find_region(self.address);
        let region = region.ok_or(Error::InvalidGuestAddress(self.address))?;
        let offset = self.address.0 - region.start_addr().0;
        let in_region = usize::try_from(region.len() - offset).unwrap_or(usize::MAX);
        let len = in_region.min(self.left);
        self.left -= len;
        if self.left > 0 {
            let next = self.address.0.checked_add(len as u64);
            self.address = GuestAddress(next.ok_or(Error::GuestAddressOverflow)?);
        }
        region.get_slice(MemoryRegionAddress(offset), len)
    }
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a, BS<'a, Mapped<LoggedWrites>>>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let part = self.part();
        if part.is_err() {
            self.left = 0;
        }
        Some(part)
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, BS<'a, Mapped<LoggedWrites>>> for Slices<'a> {
    #[inline]
    fn stop_on_error(
        mut self,
    ) -> Result<impl Iterator<Item = VolatileSlice<'a, BS<'a, Mapped<LoggedWrites>>>>> {
        let first = self.next().transpose()?;
        Ok(first.into_iter().chain(self.map_while(Result::ok)))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    /// Two regions that touch, and one apart from them.
    fn memory() -> GuestMemory {
        let ranges = [(0, 0x1000), (0x1000, 0x1000), (0x8000, 0x1000)];
        GuestMemory::from_ranges(&ranges.map(|(start, len)| (GuestAddress(start), len))).unwrap()
    }

    #[test]
    fn is_the_memory_it_views() {
        let memory = memory();
        let view = View(&memory);
        for start in [
            0,
            0xffe,
            0xfff,
            0x1000,
            0x1ffd,
            0x1ffe,
            0x2000,
            0x7fff,
            0x8000,
            0x8fff,
            0x9000,
            u64::MAX,
        ] {
            for len in [0, 1, 2, 3, 0x1000, 0x2000] {
                let address = GuestAddress(start);
                let new: Vec<u8> = (0..len)
                    .map(|index| u8::try_from(index % 251).unwrap())
                    .collect();
                let (written, expected) = (
                    view.write_slice(&new, address),
                    memory.write_slice(&new, address),
                );
                assert_eq!(written.is_ok(), expected.is_ok(), "{start:#x} {len}");
                let (mut read, mut expected) = (vec![0; len], vec![0; len]);
                let ok = view.read_slice(&mut read, address).is_ok();
                assert_eq!(
                    ok,
                    memory.read_slice(&mut expected, address).is_ok(),
                    "{start:#x} {len}"
                );
                assert_eq!(read, expected, "{start:#x} {len}");
            }
        }
    }
}
