//! Guest memory, and the dirty log of a migration.
//!
//! A VMM that migrates a guest copies its memory while it runs, and copies again what has changed
//! meanwhile. It knows its own writes and the guest's. For the writes of this daemon it reads a
//! bitmap in shared memory, with a bit for each page of guest-physical memory (vhost-user,
//! "Migration"). A write that is missing there is data that the guest loses.
//!
//! Only the daemon of `vhost-user-backend` can make that crate's bitmap, which cannot be switched
//! off when a migration has failed. So this is a bitmap of its own.
//!
//! Invariants: a page is marked after it was written to, never before; the log covers all of guest
//! memory.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use log::info;
use rustix::fs::{major, minor};
use vhost::vhost_user::message::{VhostUserLog, VhostUserMemoryRegion};
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion, VolatileMemory,
};

use crate::common::NOT_POISONED;
use crate::untrusted::mapping::{self, Mapped, Share};

/// Guest memory as the VMM shares it.
pub type GuestMemory = GuestMemoryMmap<Mapped<LoggedWrites>>;

/// A region of guest memory.
pub type Region = GuestRegionMmap<Mapped<LoggedWrites>>;

/// Bytes of guest memory for each bit of the log (`VHOST_LOG_PAGE`), whatever the page size of the
/// host.
const LOG_PAGE_BYTES: u64 = 0x1000;

/// Why memory that the VMM shares cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Access behind the end of the file would be a SIGBUS.
    #[error("the file ends within the shared part")]
    BeyondFile,
    /// The region ends beyond the address space.
    #[error("the region ends beyond the address space")]
    Address,
    /// It is too much, or the system does not map it.
    #[error(transparent)]
    Map(#[from] mapping::Error),
    /// Writes to a part of guest memory could not be logged.
    #[error("the log of {log_bytes} bytes does not cover guest memory up to {last:#x}")]
    NotCovered {
        /// Size of the log.
        log_bytes: usize,
        /// The last byte of guest memory.
        last: u64,
    },
}

/// Maps a region of guest memory. Writes to it are marked in `log`.
///
/// # Errors
/// If the region is not part of the file, or cannot be mapped.
pub fn map_region(
    region: &VhostUserMemoryRegion,
    file: File,
    (log, share): (&Arc<DirtyLog>, &Share),
) -> Result<Region, Error> {
    let writes = LoggedWrites {
        log: Arc::clone(log),
        share: share.clone(),
        region_address: region.guest_phys_addr,
    };
    let (offset, bytes) = (region.mmap_offset, region.memory_size);
    let mapping = map(&file, offset, bytes, (share, writes))?;
    Region::new(mapping, GuestAddress(region.guest_phys_addr)).ok_or(Error::Address)
}

/// Maps part of a file that the VMM shares.
fn map<B: Bitmap>(
    file: &File,
    offset_bytes: u64,
    bytes: u64,
    (share, bitmap): (&Share, B),
) -> Result<MmapRegion<Mapped<B>>, Error> {
    let end = offset_bytes.checked_add(bytes).ok_or(Error::BeyondFile)?;
    if file_bytes(file).is_none_or(|bytes| bytes < end) {
        return Err(Error::BeyondFile);
    }
    let size = usize::try_from(bytes).map_err(|_| Error::Address)?;
    Ok(share.map(file, offset_bytes, size, bitmap)?)
}

/// The size of a file that the VMM shares. `None` for files that can be mapped behind their end,
/// like /dev/zero.
fn file_bytes(file: &File) -> Option<u64> {
    let metadata = file.metadata().ok()?;
    if metadata.is_file() {
        // A file of huge pages or of tmpfs too.
        return Some(metadata.len());
    }
    if !metadata.file_type().is_char_device() {
        return None;
    }
    // The size of persistent memory (device DAX) is in sysfs.
    let (major, minor) = (major(metadata.rdev()), minor(metadata.rdev()));
    let bytes = std::fs::read_to_string(format!("/sys/dev/char/{major}:{minor}/size")).ok()?;
    bytes.trim().parse().ok()
}

/// The dirty log of one connection. Off until the VMM has set its area (VHOST_USER_SET_LOG_BASE)
/// and has accepted the feature VHOST_F_LOG_ALL, in either order.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// A hint, so that writes cost nothing while the log is off; the state decides.
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

    /// Sets the area in place of the last one (VHOST_USER_SET_LOG_BASE). Marks that are under way
    /// are in the last one when this returns.
    ///
    /// If this switches the log on, a write that another thread has begun before may go unmarked.
    /// The message must not be answered until each thread that writes has been refreshed.
    ///
    /// # Errors
    /// If the area is not part of the file, cannot be mapped, or does not cover `memory`.
    pub fn set_area(
        &self,
        log: &VhostUserLog,
        file: File,
        (share, memory): (&Share, &GuestMemory),
    ) -> Result<(), Error> {
        let area = Area(map(&file, log.mmap_offset, log.mmap_size, (share, ()))?);
        area.check(memory)?;
        self.change(|state| state.area = Some(area));
        Ok(())
    }

    /// Sets whether VHOST_F_LOG_ALL was accepted. The area stays, as some VMMs set it only once.
    /// For other threads see [`Self::set_area`].
    pub fn set_wanted(&self, wanted: bool) {
        self.change(|state| state.wanted = wanted);
    }

    /// Checks the area before guest memory becomes `memory`. While the log is off, an area that
    /// does not cover it is dropped: it is left over from an earlier migration.
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

    /// Drops the area. Nothing is marked any more when this returns.
    pub fn clear(&self) {
        self.change(|state| *state = State::default());
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.write();
        change(&mut state);
        let on = state.wanted && state.area.is_some();
        if self.on.swap(on, Ordering::Relaxed) != on {
            let state = ["off", "on"][usize::from(on)];
            info!(log = state; "the dirty log of a migration is switched");
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
        self.state.read().expect(NOT_POISONED)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().expect(NOT_POISONED)
    }
}

/// The bitmap: bit `n mod 8` of byte `n / 8` stands for page `n`.
#[derive(Debug)]
struct Area(MmapRegion<Mapped<()>>);

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
            // Also when the bits are set already: the VMM may clear them at this moment, and must
            // then find this write in the page that it copies.
            bits.fetch_or(mask, Ordering::Release);
        }
    }
}

/// Marks writes to one region of guest memory in the log; `vm-memory` calls it after each write.
#[derive(Clone, Debug, Default)]
pub struct LoggedWrites {
    log: Arc<DirtyLog>,
    share: Share,
    region_address: u64,
}

impl LoggedWrites {
    /// Whether memory of the frontend was lost.
    pub fn is_lost(&self) -> bool {
        self.share.is_lost()
    }
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

    /// Not supported: only the VMM reads the bits.
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for LoggedWrites {
    /// The bitmap of a region whose writes are never logged.
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}
