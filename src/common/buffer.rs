//! Private, aligned, pooled buffers for replica I/O.
//!
//! A pool may have an *arena*: one run of memory that is registered with io_uring once, so that the
//! kernel need not look up the pages of its buffers for each operation. Short buffers come from the
//! arena until it is empty; all others are allocated one by one.
//!
//! Invariants: a buffer is initialised memory (zeroed at its allocation; later it holds what was
//! last written or read into it), aligned for O_DIRECT on any file. A dropped buffer returns to the
//! pool of the thread that made it. The arena lives as long as any buffer of the pool. No free
//! buffer is kept above the limit of the pool, which counts those in use too.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

use crate::limits::{ARENA_SHARE_BYTES, BUFFER_BYTES_KEPT, FRAGMENT_BYTES_MAX};

/// Alignment of every buffer: a page, enough for O_DIRECT with any block size that Linux supports.
pub const BUFFER_ALIGNMENT_BYTES: usize = 4096;

/// Capacities are the powers of two from a page to the longest fragment.
const CLASSES: usize = (FRAGMENT_BYTES_MAX / BUFFER_ALIGNMENT_BYTES as u64).ilog2() as usize + 1;

/// How many of the shortest classes an arena has: up to 64 KiB.
const ARENA_CLASSES: usize = 5;

/// Bytes of an arena.
const ARENA_BYTES: usize = (ARENA_CLASSES + 1) * ARENA_SHARE_BYTES;

/// A pool of buffers, for one thread. Clones are handles to the same pool.
#[derive(Clone, Debug, Default)]
pub struct BufferPool(Rc<RefCell<Free>>);

#[derive(Debug)]
struct Free {
    by_class: [Vec<NonNull<u8>>; CLASSES],
    /// Bytes of the free buffers outside the arena.
    bytes: usize,
    /// Bytes of all buffers outside the arena, with what aligns them.
    allocated_bytes: u64,
    /// With more than this, no buffer is kept.
    limit_bytes: u64,
    #[cfg(test)]
    refuses: bool,
    arena: Option<Arena>,
}

/// Alignment of an arena, so that the kernel can map it with huge pages.
const ARENA_ALIGNMENT_BYTES: usize = 2 << 20;

#[derive(Debug)]
struct Arena {
    start: NonNull<u8>,
}

impl Arena {
    fn layout() -> Layout {
        Layout::from_size_align(ARENA_BYTES, ARENA_ALIGNMENT_BYTES).expect("a small power of two")
    }

    fn new() -> Self {
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(Self::layout()) };
        let start = NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(Self::layout()));
        // SAFETY: the range was just allocated. MADV_HUGEPAGE is only a hint: it changes no bytes,
        // and its failure is harmless.
        unsafe { libc::madvise(start.as_ptr().cast(), ARENA_BYTES, libc::MADV_HUGEPAGE) };
        Self { start }
    }

    /// Whether `memory`, the start of a buffer, lies in the arena.
    fn contains(&self, memory: NonNull<u8>) -> bool {
        memory.addr().get().wrapping_sub(self.start.addr().get()) < ARENA_BYTES
    }

    /// Cuts the arena into buffers: a share of the same size for each class, two for the shortest.
    fn cut(&self, by_class: &mut [Vec<NonNull<u8>>; CLASSES]) {
        let mut offset = 0;
        for (class, list) in by_class.iter_mut().enumerate().take(ARENA_CLASSES) {
            let share = if class == 0 {
                2 * ARENA_SHARE_BYTES
            } else {
                ARENA_SHARE_BYTES
            };
            let end = offset + share;
            while offset < end {
                // SAFETY: the shares of all classes together are as long as the arena.
                list.push(unsafe { self.start.add(offset) });
                offset += capacity_of(class);
            }
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: `start` came from `new` with the same layout. Every buffer holds the pool, so the
        // arena is dropped after all of them.
        unsafe { dealloc(self.start.as_ptr(), Self::layout()) }
    }
}

impl BufferPool {
    /// Adds an arena, unless there is one.
    pub fn add_arena(&self) {
        let mut free = self.0.borrow_mut();
        if free.arena.is_none() {
            let arena = Arena::new();
            arena.cut(&mut free.by_class);
            free.arena = Some(arena);
        }
    }

    /// The start of the arena, if there is one, and its length in bytes.
    pub fn arena(&self) -> Option<(NonNull<u8>, usize)> {
        self.0
            .borrow()
            .arena
            .as_ref()
            .map(|arena| (arena.start, ARENA_BYTES))
    }

    /// Keeps free buffers only as long as all that the pool has allocated, with those in use, stays
    /// within `bytes`, counted in [`footprint_bytes`]. The arena does not count.
    pub fn limit(&self, bytes: u64) {
        let mut free = self.0.borrow_mut();
        free.limit_bytes = bytes;
        free.make_room(0, None);
    }

    /// What the pool has allocated, in [`footprint_bytes`], without the arena.
    pub fn allocated_bytes(&self) -> u64 {
        self.0.borrow().allocated_bytes
    }

    /// A buffer of `len` bytes, at most [`FRAGMENT_BYTES_MAX`]. Its content is unspecified.
    ///
    /// Where the system has no memory for it, the process aborts.
    pub fn take(&self, len: usize) -> Buffer {
        let buffer = self.try_take(len);
        buffer.unwrap_or_else(|| handle_alloc_error(layout_of(class_of(len))))
    }

    /// The same. `None` where the system has no memory for it.
    pub fn try_take(&self, len: usize) -> Option<Buffer> {
        let class = class_of(len);
        let mut free = self.0.borrow_mut();
        let memory = free.by_class[class].pop();
        let in_arena = memory.is_some_and(|memory| free.is_in_arena(memory));
        if memory.is_some() && !in_arena {
            free.bytes -= capacity_of(class);
        }
        let memory = match memory {
            Some(memory) => memory,
            None => free.add(class)?,
        };
        Some(Buffer {
            memory,
            class,
            len,
            in_arena,
            pool: self.clone(),
        })
    }

    /// Allocates what is missing of `count` free buffers of `len` bytes, so that [`Self::take`] has
    /// them. Returns whether they are there.
    #[inline]
    pub fn prepare(&self, len: usize, count: usize) -> bool {
        let class = class_of(len);
        self.0.borrow().by_class[class].len() >= count || self.add_missing(class, count)
    }

    #[cold]
    fn add_missing(&self, class: usize, count: usize) -> bool {
        let mut free = self.0.borrow_mut();
        while free.by_class[class].len() < count {
            let Some(memory) = free.add(class) else {
                return false;
            };
            free.bytes += capacity_of(class);
            free.by_class[class].push(memory);
        }
        true
    }

    /// Has the system refuse memory from now on, or not any more. For tests.
    #[cfg(test)]
    pub fn refuse(&self, refuses: bool) {
        self.0.borrow_mut().refuses = refuses;
    }
}

impl Free {
    /// Allocates a buffer, if need be in place of free ones of other lengths. `None` where the
    /// system has no memory for it.
    #[cold]
    fn add(&mut self, class: usize) -> Option<NonNull<u8>> {
        #[cfg(test)]
        if self.refuses {
            return None;
        }
        let bytes = footprint_of(class);
        self.make_room(bytes, Some(class));
        let memory = allocate(class)?;
        self.allocated_bytes += bytes;
        Some(memory)
    }

    /// Releases free buffers until `more` bytes fit the limit, or none is left; the longest first,
    /// and none of the class `spared`.
    fn make_room(&mut self, more: u64, spared: Option<usize>) {
        let mut class = CLASSES;
        while self.allocated_bytes + more > self.limit_bytes && self.bytes > 0 && class > 0 {
            if spared == Some(class - 1) {
                class -= 1;
                continue;
            }
            let is_own = |memory: &NonNull<u8>| !self.is_in_arena(*memory);
            match self.by_class[class - 1].iter().rposition(is_own) {
                Some(place) => {
                    let memory = self.by_class[class - 1].swap_remove(place);
                    self.bytes -= capacity_of(class - 1);
                    self.release(memory, class - 1);
                }
                None => class -= 1,
            }
        }
    }

    /// Gives a buffer outside the arena back to the system.
    fn release(&mut self, memory: NonNull<u8>, class: usize) {
        self.allocated_bytes -= footprint_of(class);
        release(memory, class);
    }

    fn is_in_arena(&self, memory: NonNull<u8>) -> bool {
        self.arena
            .as_ref()
            .is_some_and(|arena| arena.contains(memory))
    }
}

impl Default for Free {
    fn default() -> Self {
        Self {
            by_class: Default::default(),
            bytes: 0,
            allocated_bytes: 0,
            limit_bytes: u64::MAX,
            #[cfg(test)]
            refuses: false,
            arena: None,
        }
    }
}

impl Drop for Free {
    fn drop(&mut self) {
        for (class, list) in self.by_class.iter().enumerate() {
            for memory in list.iter().filter(|memory| !self.is_in_arena(**memory)) {
                release(*memory, class);
            }
        }
    }
}

fn class_of(len: usize) -> usize {
    let pages = len.div_ceil(BUFFER_ALIGNMENT_BYTES).max(1);
    let class = pages.next_power_of_two().ilog2() as usize;
    assert!(class < CLASSES, "a buffer is at most a fragment long");
    class
}

fn capacity_of(class: usize) -> usize {
    BUFFER_ALIGNMENT_BYTES << class
}

/// Bytes of memory that a buffer of `len` bytes takes, at most [`FRAGMENT_BYTES_MAX`]: a power of
/// two, and a page to align it.
#[inline]
pub fn footprint_bytes(len: u64) -> u64 {
    let page = BUFFER_ALIGNMENT_BYTES as u64;
    len.next_power_of_two().max(page) + page
}

fn footprint_of(class: usize) -> u64 {
    footprint_bytes(capacity_of(class) as u64)
}

fn layout_of(class: usize) -> Layout {
    Layout::from_size_align(capacity_of(class), BUFFER_ALIGNMENT_BYTES)
        .expect("a small power of two")
}

fn allocate(class: usize) -> Option<NonNull<u8>> {
    // SAFETY: the layout's size is not zero.
    NonNull::new(unsafe { alloc_zeroed(layout_of(class)) })
}

fn release(memory: NonNull<u8>, class: usize) {
    // SAFETY: `memory` came from `allocate(class)` with the same layout, and the caller, its owner,
    // does not use it again.
    unsafe { dealloc(memory.as_ptr(), layout_of(class)) }
}

/// An aligned buffer that returns to its pool when it is dropped.
pub struct Buffer {
    memory: NonNull<u8>,
    class: usize,
    len: usize,
    in_arena: bool,
    pool: BufferPool,
}

impl Buffer {
    /// Whether the buffer lies in the arena of its pool.
    pub fn is_in_arena(&self) -> bool {
        self.in_arena
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `memory` is an initialised allocation of at least `len` bytes that this value
        // owns.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.memory.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let capacity = capacity_of(self.class);
        let mut free = self.pool.0.borrow_mut();
        if self.in_arena {
            free.by_class[self.class].push(self.memory);
        } else if free.bytes + capacity <= BUFFER_BYTES_KEPT
            && free.allocated_bytes <= free.limit_bytes
        {
            free.bytes += capacity;
            free.by_class[self.class].push(self.memory);
        } else {
            free.release(self.memory, self.class);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_as_long_as_requested() {
        let pool = BufferPool::default();
        for len in [0, 1, 512, 4096, 4097, 1 << 20] {
            let buffer = pool.take(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % BUFFER_ALIGNMENT_BYTES, 0);
        }
    }

    #[test]
    fn reuses_the_last_dropped_buffer_first() {
        let pool = BufferPool::default();
        let first = pool.take(4096);
        let address = first.as_ptr();
        drop(first);
        assert_eq!(pool.take(512).as_ptr(), address);
    }

    #[test]
    fn keeps_a_bounded_number_of_bytes() {
        let pool = BufferPool::default();
        let many: Vec<_> = (0..BUFFER_BYTES_KEPT / (1 << 20) + 3)
            .map(|_| pool.take(1 << 20))
            .collect();
        drop(many);
        assert_eq!(pool.0.borrow().bytes, BUFFER_BYTES_KEPT);
    }

    #[test]
    fn keeps_nothing_above_its_limit() {
        let pool = BufferPool::default();
        let [short, long] = [64 << 10, 1 << 20].map(footprint_bytes);
        pool.limit(2 * long);
        let in_use = pool.take(1 << 20);
        drop([(); 16].map(|()| pool.take(64 << 10)));
        assert!(pool.allocated_bytes() <= 2 * long, "free buffers count");
        assert_eq!((pool.allocated_bytes() - long) % short, 0);
        let second = pool.take(1 << 20);
        assert_eq!(pool.allocated_bytes(), 2 * long, "in place of short ones");
        let third = pool.take(4096);
        assert!(pool.allocated_bytes() > 2 * long, "none in use is refused");
        drop((second, third));
        pool.limit(long);
        assert_eq!(pool.allocated_bytes(), long);
        drop(in_use);
        assert_eq!(pool.allocated_bytes(), long, "it is kept");
        pool.limit(0);
        assert_eq!(pool.allocated_bytes(), 0);
    }

    #[test]
    fn memory_that_the_system_refuses_is_not_taken_for_granted() {
        let pool = BufferPool::default();
        assert!(pool.prepare(1 << 20, 2));
        let prepared = pool.allocated_bytes();
        pool.refuse(true);
        assert!(pool.prepare(1 << 20, 2) && !pool.prepare(1 << 20, 3));
        let both = [pool.take(1 << 20), pool.take(1 << 20)];
        assert!(pool.try_take(1 << 20).is_none());
        assert_eq!(pool.allocated_bytes(), prepared);
        drop(both);
        pool.refuse(false);
        assert!(pool.prepare(1 << 20, 3));
    }

    #[test]
    fn the_limit_does_not_touch_the_arena() {
        let pool = BufferPool::default();
        pool.limit(0);
        pool.add_arena();
        let count = ARENA_SHARE_BYTES / (64 << 10);
        let buffers: Vec<_> = (0..=count).map(|_| pool.take(64 << 10)).collect();
        drop(buffers);
        pool.limit(0);
        assert_eq!(pool.allocated_bytes(), 0);
        let again: Vec<_> = (0..count).map(|_| pool.take(64 << 10)).collect();
        assert!(again.iter().all(Buffer::is_in_arena));
    }

    #[test]
    fn takes_from_the_arena_until_it_is_empty() {
        let pool = BufferPool::default();
        pool.add_arena();
        let (start, len) = pool.arena().unwrap();
        let inside = |buffer: &Buffer| {
            let offset = (buffer.as_ptr() as usize).wrapping_sub(start.as_ptr() as usize);
            offset < len && offset + capacity_of(buffer.class) <= len
        };
        for _ in 0..2 {
            let mut taken = Vec::new();
            for class in 0..CLASSES {
                let count = if class < ARENA_CLASSES {
                    ARENA_SHARE_BYTES / capacity_of(class)
                } else {
                    0
                };
                let count = if class == 0 { 2 * count } else { count };
                let buffers: Vec<_> = (0..count + 3)
                    .map(|_| pool.take(capacity_of(class)))
                    .collect();
                assert_eq!(
                    buffers.iter().filter(|buffer| buffer.is_in_arena()).count(),
                    count
                );
                taken.extend(buffers);
            }
            assert!(
                taken
                    .iter()
                    .all(|buffer| inside(buffer) == buffer.is_in_arena())
            );
            taken
                .iter_mut()
                .enumerate()
                .for_each(|(index, buffer)| buffer.fill(index.to_le_bytes()[0]));
            let is_own = |(index, buffer): (usize, &Buffer)| {
                buffer.iter().all(|byte| *byte == index.to_le_bytes()[0])
            };
            assert!(
                taken.iter().enumerate().all(is_own),
                "two buffers share memory"
            );
        }
    }

    #[test]
    fn a_buffer_outlives_the_pool_handle() {
        let pool = BufferPool::default();
        let mut buffer = pool.take(512);
        drop(pool);
        buffer.fill(7);
        assert!(buffer.iter().all(|b| *b == 7));
    }
}
