//! Guest memory, and the log of what is written to it while the guest is migrated.
//!
//! A VMM that migrates a guest copies its memory while it runs, and copies again what has changed
//! meanwhile. It knows its own writes and the guest's; it learns of ours from a bitmap in memory
//! that it shares with us, with a bit for each page of guest-physical memory (vhost-user,
//! "Migration"). A write that is missing there is data that the guest loses.
//!
//! The bitmap of `vhost-user-backend` can only be made by its own daemon, and cannot be switched
//! off when a migration has failed.
//!
//! Invariants: a page is marked after it was written to, never before; the log covers all of guest
//! memory.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use log::info;
use vhost::vhost_user::message::{VhostUserLog, VhostUserMemoryRegion};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, VolatileMemory,
};

/// Guest memory as the VMM shares it.
pub type GuestMemory = GuestMemoryMmap<LoggedWrites>;

/// A region of guest memory.
pub type Region = GuestRegionMmap<LoggedWrites>;

/// Bytes of guest memory for each bit of the log (`VHOST_LOG_PAGE`), whatever the page size of the
/// host.
const LOG_PAGE_BYTES: u64 = 0x1000;

/// What the VMM shares cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Access to it would be a SIGBUS.
    #[error("the file ends within the part that is shared")]
    BeyondFile,
    /// It ends beyond the address space.
    #[error("addresses that do not exist")]
    Address,
    /// The system does not map it.
    #[error("cannot be mapped: {0}")]
    Map(#[from] MmapRegionError),
    /// Writes to some of guest memory could not be logged.
    #[error("the log of {log_bytes} bytes does not cover guest memory up to {last:#x}")]
    NotCovered {
        /// Size of the log.
        log_bytes: usize,
        /// The last byte of guest memory.
        last: u64,
    },
}

/// Maps a region of guest memory, writes to which are marked in `log`.
///
/// # Errors
/// If it is not part of the file, or cannot be mapped.
pub fn map_region(
    region: &VhostUserMemoryRegion,
    file: File,
    log: &Arc<DirtyLog>,
) -> Result<Region, Error> {
    let writes = LoggedWrites {
        log: Arc::clone(log),
        region_address: region.guest_phys_addr,
    };
    let mapping = map(file, region.mmap_offset, region.memory_size, writes)?;
    Region::new(mapping, GuestAddress(region.guest_phys_addr)).ok_or(Error::Address)
}

/// Maps part of a file that the VMM shares. It can still truncate the file afterwards, at its own
/// loss: the disk goes with us.
fn map<B: Bitmap>(
    file: File,
    offset_bytes: u64,
    bytes: u64,
    bitmap: B,
) -> Result<MmapRegion<B>, Error> {
    let end = offset_bytes.checked_add(bytes).ok_or(Error::BeyondFile)?;
    if file_bytes(&file).is_none_or(|bytes| bytes < end) {
        return Err(Error::BeyondFile);
    }
    let size = usize::try_from(bytes).map_err(|_| Error::Address)?;
    let mapping = MmapRegionBuilder::new_with_bitmap(size, bitmap)
        .with_file_offset(FileOffset::new(file, offset_bytes))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_SHARED);
    Ok(mapping.build()?)
}

/// How much there is of what the VMM shares. Of other things than memory some can be mapped further
/// than they reach, like /dev/zero.
fn file_bytes(file: &File) -> Option<u64> {
    let metadata = file.metadata().ok()?;
    if metadata.is_file() {
        // Also one of huge pages or of tmpfs.
        return Some(metadata.len());
    }
    if !metadata.file_type().is_char_device() {
        return None;
    }
    // Persistent memory (device DAX) says there how large it is.
    let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let bytes = std::fs::read_to_string(format!("/sys/dev/char/{major}:{minor}/size")).ok()?;
    bytes.trim().parse().ok()
}

/// The log of one connection. Off until the VMM has given it an area and the feature
/// VHOST_F_LOG_ALL was accepted, in either order.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// A hint, so that writes cost nothing while it is off; the state decides.
    on: AtomicBool,
    state: RwLock<State>,
}

#[derive(Debug, Default)]
struct State {
    area: Option<Area>,
    wanted: bool,
}

impl DirtyLog {
    /// Whether writes are marked.
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Sets the area in place of the one before (SET_LOG_BASE). Marks that are under way are in
    /// that one when this returns.
    ///
    /// A write on another thread that began before this may go unmarked if it switches the log on:
    /// whoever answers the VMM must first have heard from each thread that writes.
    ///
    /// # Errors
    /// If the area is not part of the file, cannot be mapped, or does not cover `memory`.
    pub fn set_area(
        &self,
        log: &VhostUserLog,
        file: File,
        memory: &GuestMemory,
    ) -> Result<(), Error> {
        let area = Area(map(file, log.mmap_offset, log.mmap_size, ())?);
        area.check(memory)?;
        self.change(|state| state.area = Some(area));
        Ok(())
    }

    /// Whether VHOST_F_LOG_ALL was accepted. The area stays, for a VMM that sets it once only. What
    /// [`Self::set_area`] says of other threads applies here too.
    pub fn set_wanted(&self, wanted: bool) {
        self.change(|state| state.wanted = wanted);
    }

    /// Guest memory is about to become `memory`. While the log is off, an area that does not cover
    /// it is forgotten: it is left over from an earlier migration.
    ///
    /// # Errors
    /// If the log is on and does not cover `memory`.
    pub fn admit(&self, memory: &GuestMemory) -> Result<(), Error> {
        let covered = match &self.read().area {
            Some(area) => area.check(memory),
            None => Ok(()),
        };
        if covered.is_err() && !self.is_on() {
            self.change(|state| state.area = None);
            return Ok(());
        }
        covered
    }

    /// Forgets everything. Nothing is marked any more when this returns.
    pub fn clear(&self) {
        self.change(|state| *state = State::default());
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.write();
        change(&mut state);
        let on = state.wanted && state.area.is_some();
        if self.on.swap(on, Ordering::Relaxed) != on {
            info!(
                "writes to guest memory are {}",
                if on { "logged" } else { "not logged any more" }
            );
        }
    }

    /// Marks the pages of `bytes` bytes of guest memory from `address` on; there is at least one.
    #[cold]
    fn mark(&self, address: u64, bytes: usize) {
        let state = self.read();
        if let (Some(area), true) = (&state.area, state.wanted) {
            area.mark(address, address.saturating_add(bytes as u64 - 1));
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The bitmap: bit `n mod 8` of byte `n / 8` stands for page `n`.
#[derive(Debug)]
struct Area(MmapRegion<()>);

impl Area {
    fn check(&self, memory: &GuestMemory) -> Result<(), Error> {
        let last = memory
            .iter()
            .map(|region| region.last_addr().raw_value())
            .max();
        let log_bytes = self.0.size();
        match last {
            Some(last) if last / LOG_PAGE_BYTES / 8 >= log_bytes as u64 => {
                Err(Error::NotCovered { log_bytes, last })
            }
            _ => Ok(()),
        }
    }

    /// Marks the pages of the bytes `first..=last`.
    fn mark(&self, first: u64, last: u64) {
        let (first, last) = (first / LOG_PAGE_BYTES, last / LOG_PAGE_BYTES);
        for byte in first / 8..=last / 8 {
            let from = if byte == first / 8 { first % 8 } else { 0 };
            let to = if byte == last / 8 { last % 8 } else { 7 };
            let mask = (0xff << from) & (0xff >> (7 - to));
            let place = usize::try_from(byte).ok();
            let Some(bits) = place.and_then(|place| self.0.get_atomic_ref::<AtomicU8>(place).ok())
            else {
                debug_assert!(false, "the log covers all of guest memory");
                return;
            };
            // Also when the bits are set already: the VMM may be taking them at this moment, and
            // must then find in the page what was written before this.
            bits.fetch_or(mask, Ordering::Release);
        }
    }
}

/// Hands writes to one region of guest memory to the log; `vm-memory` calls it after each of them.
#[derive(Clone, Debug, Default)]
pub struct LoggedWrites {
    log: Arc<DirtyLog>,
    region_address: u64,
}

impl<'a> WithBitmapSlice<'a> for LoggedWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for LoggedWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if self.log.is_on() && len > 0 {
            self.log.mark(self.region_address + offset as u64, len);
        }
    }

    /// Never: the bits are the VMM's to read.
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for LoggedWrites {
    /// For a region whose writes are never logged.
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}
