//! Settings of a block device that `rustix` has no call for.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::ioctl::{Getter, ioctl, opcode};

/// Whether the block device is set read-only (`BLKROGET`, linux/fs.h).
pub(super) fn is_read_only(file: &File) -> io::Result<bool> {
    const BLKROGET: rustix::ioctl::Opcode = opcode::none(0x12, 94);
    // SAFETY: BLKROGET stores one int at the address that it is given, and nothing else.
    let value = unsafe { ioctl(file, Getter::<BLKROGET, libc::c_int>::new()) }?;
    Ok(value != 0)
}
