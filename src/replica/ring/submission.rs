//! A submission queue entry, taken apart: for a kernel that is not io_uring.

#![allow(unsafe_code)]

use io_uring::squeue;

/// A submission queue entry, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Submission {
    pub(crate) opcode: u8,
    pub(crate) flags: u8,
    pub(crate) fd: i32,
    pub(crate) offset: u64,
    /// Where the memory of a read or write is, the length of a fallocate, the user data that a
    /// cancellation looks for.
    pub(crate) address: u64,
    /// The length of a read or write, the mode of a fallocate.
    pub(crate) len: u32,
    /// `rw_flags`, `fsync_flags` or the events of a poll.
    pub(crate) operation_flags: u32,
    /// The index of the fixed buffer.
    pub(crate) buffer: u16,
    pub(crate) user_data: u64,
}

/// Bits of [`Submission::flags`] (linux/io_uring.h).
pub(crate) const FIXED_FILE: u8 = 1 << 0;
#[cfg(test)]
pub(crate) const ASYNC: u8 = 1 << 4;

/// The flag for a poll that reports every event, in [`Submission::len`].
#[cfg(test)]
pub(crate) const POLL_ADD_MULTI: u32 = 1;

impl Submission {
    /// Takes an entry apart by the offsets of `struct io_uring_sqe` (linux/io_uring.h).
    pub(crate) fn of(entry: &squeue::Entry) -> Self {
        const { assert!(size_of::<squeue::Entry>() == 64) }
        // SAFETY: the entry is a `repr(C)` struct of 64 bytes of integers, all initialised.
        let bytes = unsafe { std::mem::transmute_copy::<squeue::Entry, [u8; 64]>(entry) };
        let word = |start| u32::from_ne_bytes(part(&bytes, start));
        let long = |start| u64::from_ne_bytes(part(&bytes, start));
        Self {
            opcode: bytes[0],
            flags: bytes[1],
            fd: word(4).cast_signed(),
            offset: long(8),
            address: long(16),
            len: word(24),
            operation_flags: word(28),
            user_data: long(32),
            buffer: u16::from_ne_bytes(part(&bytes, 40)),
        }
    }
}

fn part<const LEN: usize>(bytes: &[u8; 64], start: usize) -> [u8; LEN] {
    std::array::from_fn(|index| bytes[start + index])
}
