//! Private, aligned, pooled buffers for replica I/O.
//!
//! Invariants: a buffer is initialised memory (zeroed when it is made, whatever was read into it later),
//! aligned for O_DIRECT on any file, and returns to the pool of the thread that made it when it is dropped.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

use crate::limits::{BUFFER_BYTES_KEPT, PIECE_BYTES_MAX};

/// Alignment of every buffer: a page, which satisfies O_DIRECT on every block size that Linux has.
pub const BUFFER_ALIGNMENT_BYTES: usize = 4096;

/// Capacities are the powers of two from a page to the longest piece.
const CLASSES: usize = (PIECE_BYTES_MAX / BUFFER_ALIGNMENT_BYTES as u64).ilog2() as usize + 1;

/// A pool of buffers, for one thread. Clones are handles to the same pool.
#[derive(Clone, Debug, Default)]
pub struct BufferPool(Rc<RefCell<Free>>);

#[derive(Debug, Default)]
struct Free {
    by_class: [Vec<NonNull<u8>>; CLASSES],
    bytes: usize,
}

impl BufferPool {
    /// A buffer of `len` bytes, at most [`PIECE_BYTES_MAX`]. Its content is unspecified.
    pub fn take(&self, len: usize) -> Buffer {
        let class = class_of(len);
        let mut free = self.0.borrow_mut();
        let memory = free.by_class[class].pop();
        if memory.is_some() {
            free.bytes -= capacity_of(class);
        }
        Buffer {
            memory: memory.unwrap_or_else(|| allocate(class)),
            class,
            len,
            pool: self.clone(),
        }
    }
}

impl Drop for Free {
    fn drop(&mut self) {
        for (class, list) in self.by_class.iter().enumerate() {
            for memory in list {
                release(*memory, class);
            }
        }
    }
}

fn class_of(len: usize) -> usize {
    let pages = len.div_ceil(BUFFER_ALIGNMENT_BYTES).max(1);
    let class = pages.next_power_of_two().ilog2() as usize;
    assert!(class < CLASSES, "a buffer is at most a piece long");
    class
}

fn capacity_of(class: usize) -> usize {
    BUFFER_ALIGNMENT_BYTES << class
}

fn layout_of(class: usize) -> Layout {
    Layout::from_size_align(capacity_of(class), BUFFER_ALIGNMENT_BYTES).expect("a small power of two")
}

fn allocate(class: usize) -> NonNull<u8> {
    let layout = layout_of(class);
    // SAFETY: the layout's size is not zero.
    let memory = unsafe { alloc_zeroed(layout) };
    NonNull::new(memory).unwrap_or_else(|| handle_alloc_error(layout))
}

fn release(memory: NonNull<u8>, class: usize) {
    // SAFETY: `memory` came from `allocate(class)` with the same layout, and its owner gives it up.
    unsafe { dealloc(memory.as_ptr(), layout_of(class)) }
}

/// An aligned buffer that goes back to its pool when it is dropped.
pub struct Buffer {
    memory: NonNull<u8>,
    class: usize,
    len: usize,
    pool: BufferPool,
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `memory` is an initialised allocation of at least `len` bytes that this value owns.
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
        if free.bytes + capacity <= BUFFER_BYTES_KEPT {
            free.bytes += capacity;
            free.by_class[self.class].push(self.memory);
        } else {
            release(self.memory, self.class);
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
    fn is_aligned_and_as_long_as_asked() {
        let pool = BufferPool::default();
        for len in [0, 1, 512, 4096, 4097, 1 << 20] {
            let buffer = pool.take(len);
            assert_eq!(buffer.len(), len);
            assert_eq!(buffer.as_ptr() as usize % BUFFER_ALIGNMENT_BYTES, 0);
        }
    }

    #[test]
    fn is_reused_last_first() {
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
    fn outlives_the_pool_handle() {
        let pool = BufferPool::default();
        let mut buffer = pool.take(512);
        drop(pool);
        buffer.fill(7);
        assert!(buffer.iter().all(|b| *b == 7));
    }
}
