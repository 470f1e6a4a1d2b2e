//! Memory whose file another process holds too.
//!
//! A process that touches a page behind the end of its file, or one of a hugetlbfs that has none
//! left, gets SIGBUS, which would end the daemon and with it the disk of everyone. The handler here
//! maps zeroes over the whole mapping instead, so that the instruction ends, and shuts down the
//! connection of the frontend that has shared the memory. What was read before counts only if the
//! memory is not lost after that ([`Share::is_lost`]).
//!
//! Invariants: the table has every mapping from before its first access until after its last one,
//! and nothing else; the socket and the share of an entry stay while a handler runs.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Once};

use libc::{c_int, c_void, siginfo_t};
use rustix::fs::{fcntl_get_seals, fstatfs};
use vm_memory::MmapRegion;
use vm_memory::bitmap::{Bitmap, NewBitmap, WithBitmapSlice};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vmm_sys_util::signal::register_signal_handler;

use crate::limits::{CONNECTIONS_MAX, MAPPED_BYTES_MAX, MAPPINGS_MAX};

/// Why memory is not mapped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// One frontend could use up the addresses of the process.
    #[error("a frontend shares more than {} GiB of memory", MAPPED_BYTES_MAX >> 30)]
    TooMuch,
    /// One frontend could use up the mappings of the process.
    #[error("a frontend shares more than {MAPPINGS_MAX} regions of memory")]
    TooMany,
    /// The system does not map it.
    #[error("the file cannot be mapped: {0}")]
    Map(#[from] MmapRegionError),
}

/// The memory that one frontend shares: how much it is, and whether some of it was lost.
#[derive(Clone, Debug, Default)]
pub struct Share(Arc<State>);

#[derive(Debug)]
struct State {
    lost: AtomicBool,
    /// The connection that ends with the memory, or -1.
    connection: AtomicI32,
    bytes: AtomicUsize,
    mappings: AtomicUsize,
}

impl Default for State {
    fn default() -> Self {
        Self {
            lost: AtomicBool::new(false),
            connection: AtomicI32::new(-1),
            bytes: AtomicUsize::new(0),
            mappings: AtomicUsize::new(0),
        }
    }
}

impl Share {
    /// Whether memory was lost. What was read from any of it before this call is right if not.
    #[inline]
    pub fn is_lost(&self) -> bool {
        fence(Ordering::Acquire);
        self.0.lost.load(Ordering::Relaxed)
    }

    /// Shuts this connection down when memory is lost from now on, or none.
    pub fn set_connection(&self, connection: Option<&UnixStream>) {
        let descriptor = connection.map_or(-1, AsRawFd::as_raw_fd);
        self.0.connection.store(descriptor, Ordering::SeqCst);
        await_handlers();
    }

    /// Forgets a loss: nothing of what was lost is mapped any more.
    pub fn clear(&self) {
        self.0.lost.store(false, Ordering::SeqCst);
    }

    /// Maps a part of `file`, which need not stay open.
    ///
    /// # Errors
    /// If the frontend shares too much, or the file cannot be mapped.
    pub fn map<B: Bitmap>(
        &self,
        file: &File,
        offset_bytes: u64,
        bytes: usize,
        bitmap: B,
    ) -> Result<MmapRegion<Mapped<B>>, Error> {
        let mapping = Mapping::new(self, file, offset_bytes, bytes)?;
        let start = mapping.start.as_ptr();
        let bitmap = Mapped {
            bitmap,
            _mapping: Some(mapping),
        };
        let builder = MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE | libc::MAP_SHARED);
        // SAFETY: the region has the mapping, which lasts as long, in its bitmap.
        Ok(unsafe { builder.with_raw_mmap_pointer(start) }.build()?)
    }

    /// Counts a mapping, if there may be one more.
    fn admit(&self, bytes: usize) -> Result<(), Error> {
        let add = |counter: &AtomicUsize, count: usize, most: usize| {
            let sum = |before: usize| before.checked_add(count).filter(|sum| *sum <= most);
            counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, sum)
        };
        let most = usize::try_from(MAPPED_BYTES_MAX).unwrap_or(usize::MAX);
        add(&self.0.bytes, bytes, most).map_err(|_| Error::TooMuch)?;
        if add(&self.0.mappings, 1, MAPPINGS_MAX).is_err() {
            self.0.bytes.fetch_sub(bytes, Ordering::Relaxed);
            return Err(Error::TooMany);
        }
        Ok(())
    }

    fn release(&self, bytes: usize) {
        self.0.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.0.mappings.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The bitmap of a region, and the mapping behind it.
#[derive(Debug, Default)]
pub struct Mapped<B> {
    bitmap: B,
    _mapping: Option<Mapping>,
}

impl<B> Mapped<B> {
    /// The bitmap.
    #[inline]
    pub fn bitmap(&self) -> &B {
        &self.bitmap
    }
}

impl<'a, B: Bitmap> WithBitmapSlice<'a> for Mapped<B> {
    type S = <B as WithBitmapSlice<'a>>::S;
}

impl<B: Bitmap> Bitmap for Mapped<B> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.dirty_at(offset)
    }

    #[inline]
    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        self.bitmap.slice_at(offset)
    }
}

impl<B: NewBitmap> NewBitmap for Mapped<B> {
    fn with_len(len: usize) -> Self {
        Self {
            bitmap: B::with_len(len),
            _mapping: None,
        }
    }
}

/// A mapping in the table.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    /// Whole pages.
    bytes: usize,
    entry: &'static Entry,
    share: Share,
}

// SAFETY: the address is used to unmap the memory only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(share: &Share, file: &File, offset_bytes: u64, bytes: usize) -> Result<Self, Error> {
        static HANDLER: Once = Once::new();
        // Fails only for a signal that does not exist.
        HANDLER.call_once(|| register_signal_handler(libc::SIGBUS, handle).expect("a signal"));
        // The kernel maps whole pages, and replaces only whole ones.
        let bytes = bytes.checked_next_multiple_of(page_bytes(file));
        let bytes = bytes.ok_or(Error::TooMuch)?;
        let offset = libc::off_t::try_from(offset_bytes).map_err(|_| Error::TooMuch)?;
        share.admit(bytes)?;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(
                null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_NORESERVE | libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        let start = match NonNull::new(start.cast::<u8>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => start,
            _ => {
                let error = io::Error::last_os_error();
                share.release(bytes);
                return Err(MmapRegionError::Mmap(error).into());
            }
        };
        let unmap = || {
            // SAFETY: the mapping is new.
            unsafe { libc::munmap(start.as_ptr().cast(), bytes) };
            share.release(bytes);
        };
        let Some(entry) = Entry::take() else {
            unmap();
            return Err(Error::TooMany);
        };
        entry.set(start.as_ptr().addr(), bytes, Arc::as_ptr(&share.0));
        // SAFETY: the mapping is new. What a guest has in memory is not for core dumps.
        unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_DONTDUMP) };
        Ok(Self {
            start,
            bytes,
            entry,
            share: share.clone(),
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.entry.free();
        // SAFETY: it is the only owner of the mapping, and no region uses it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
        self.share.release(self.bytes);
    }
}

/// Bytes of the pages of a file. Only files in memory are asked: their answer never waits.
fn page_bytes(file: &File) -> usize {
    let in_memory = fcntl_get_seals(file).is_ok();
    let stated = in_memory.then(|| fstatfs(file).ok()).flatten();
    let stated = stated.and_then(|stated| usize::try_from(stated.f_bsize).ok());
    stated.map_or(0x1000, |bytes| bytes.max(0x1000))
}

/// A place of the table.
#[derive(Debug)]
struct Entry {
    /// [`FREE`], [`TAKEN`], or where the mapping begins.
    start: AtomicUsize,
    bytes: AtomicUsize,
    share: AtomicPtr<State>,
}

const FREE: usize = 0;
/// No mapping begins there.
const TAKEN: usize = 1;

static TABLE: [Entry; CONNECTIONS_MAX * MAPPINGS_MAX] = [const {
    Entry {
        start: AtomicUsize::new(FREE),
        bytes: AtomicUsize::new(0),
        share: AtomicPtr::new(null_mut()),
    }
}; CONNECTIONS_MAX * MAPPINGS_MAX];

/// Handlers that look at the table.
static HANDLERS: AtomicUsize = AtomicUsize::new(0);

impl Entry {
    fn take() -> Option<&'static Self> {
        TABLE.iter().find(|entry| {
            let (success, failure) = (Ordering::SeqCst, Ordering::Relaxed);
            let taken = entry.start.compare_exchange(FREE, TAKEN, success, failure);
            taken.is_ok()
        })
    }

    fn set(&self, start: usize, bytes: usize, share: *const State) {
        self.bytes.store(bytes, Ordering::SeqCst);
        self.share.store(share.cast_mut(), Ordering::SeqCst);
        self.start.store(start, Ordering::SeqCst);
    }

    /// Returns when no handler uses the entry any more.
    fn free(&self) {
        self.start.store(TAKEN, Ordering::SeqCst);
        await_handlers();
        self.start.store(FREE, Ordering::SeqCst);
    }

    /// The mapping, if `address` is in it.
    fn around(&self, address: usize) -> Option<(usize, usize, *mut State)> {
        let start = self.start.load(Ordering::SeqCst);
        let bytes = self.bytes.load(Ordering::SeqCst);
        let share = self.share.load(Ordering::SeqCst);
        let within = start > TAKEN && address >= start && address - start < bytes;
        within.then_some((start, bytes, share))
    }
}

/// Waits until the handlers that run now have ended. They take some system calls.
fn await_handlers() {
    while HANDLERS.load(Ordering::SeqCst) > 0 {
        std::thread::yield_now();
    }
}

/// Handles SIGBUS. Does nothing that a signal handler may not do.
extern "C" fn handle(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes it. Codes above 0 are faults, which have an address.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr().addr()) };
    // SAFETY: each thread has its own.
    let errno = unsafe { *libc::__errno_location() };
    HANDLERS.fetch_add(1, Ordering::SeqCst);
    let found = TABLE.iter().find_map(|entry| entry.around(address));
    let replaced = code > 0 && found.is_some_and(replace);
    HANDLERS.fetch_sub(1, Ordering::SeqCst);
    if !replaced {
        // SAFETY: a fault of the daemon itself, which ends it as if there were no handler.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// Puts zeroes in place of a mapping, and ends the connection.
fn replace((start, bytes, share): (usize, usize, *mut State)) -> bool {
    // SAFETY: the entry is not freed while a handler runs, and the mapping has the share.
    let share = unsafe { &*share };
    // First this: who reads zeroes finds it.
    share.lost.store(true, Ordering::SeqCst);
    // SAFETY: the mapping is there as long as its entry. Guest memory may change at any time.
    let mapped = unsafe {
        libc::mmap(
            start as *mut c_void,
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    let connection = share.connection.load(Ordering::SeqCst);
    if connection >= 0 {
        // SAFETY: it is not closed before `set_connection` has returned, which awaits this.
        unsafe { libc::shutdown(connection, libc::SHUT_RDWR) };
    }
    mapped != libc::MAP_FAILED
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use rustix::fs::{MemfdFlags, memfd_create};
    use vm_memory::{Bytes, VolatileMemory};

    use super::*;

    fn file(bytes: u64) -> File {
        let file = File::from(memfd_create("shared", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn what_is_cut_reads_as_zeroes_and_ends_its_connection_only() {
        let (cut, kept) = (Share::default(), Share::default());
        let files = [file(0x4000), file(0x4000)];
        let region = cut.map(&files[0], 0, 0x4000, ()).unwrap();
        let other = kept.map(&files[1], 0, 0x4000, ()).unwrap();
        let connections = UnixStream::pair().unwrap();
        cut.set_connection(Some(&connections.0));
        for region in [&region, &other] {
            let slice = region.as_volatile_slice();
            slice.write_slice(&[7; 0x4000], 0).unwrap();
        }
        files[0].set_len(0x1000).unwrap();
        let mut read = [1; 0x4000];
        region.as_volatile_slice().read_slice(&mut read, 0).unwrap();
        assert_eq!(read[0x1000..], [0; 0x3000]);
        assert!(cut.is_lost() && !kept.is_lost());
        let mut connection = &connections.1;
        assert_eq!(connection.read(&mut [0]).unwrap(), 0, "it is shut down");
        region
            .as_volatile_slice()
            .write_slice(&[2], 0x3fff)
            .unwrap();
        other.as_volatile_slice().read_slice(&mut read, 0).unwrap();
        assert_eq!(read, [7; 0x4000]);
    }

    #[test]
    fn memory_is_bounded_for_each_frontend() {
        let share = Share::default();
        let sparse = file(1 << 62);
        let quarter = usize::try_from(MAPPED_BYTES_MAX / 4).unwrap();
        let map = || share.map(&sparse, 0, quarter, ());
        let mut mapped: Vec<_> = (0..4).map(|_| map().unwrap()).collect();
        assert!(matches!(map().unwrap_err(), Error::TooMuch));
        mapped.pop();
        mapped.push(map().unwrap());
        drop(mapped);
        let small: Vec<_> = (0..MAPPINGS_MAX)
            .map(|_| share.map(&sparse, 0, 0x1000, ()).unwrap())
            .collect();
        let error = share.map(&sparse, 0, 0x1000, ()).unwrap_err();
        assert!(matches!(error, Error::TooMany));
        drop(small);
        map().unwrap();
    }

    #[test]
    fn what_is_mapped_is_in_no_core_dump() {
        let region = Share::default().map(&file(0x1000), 0, 0x1000, ()).unwrap();
        let start = format!("{:x}-", region.as_ptr().addr());
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = maps.split_once(&start).unwrap().1;
        let flags = mapping.lines().find(|line| line.starts_with("VmFlags:"));
        assert!(flags.unwrap().split(' ').any(|flag| flag == "dd"));
    }
}
