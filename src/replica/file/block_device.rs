//! Settings of a block device that `rustix` has no call for.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::ioctl::{Getter, ioctl, opcode};

use super::ImageIdentity;

/// Whether the block device is set read-only (`BLKROGET`, linux/fs.h).
pub(super) fn is_read_only(file: &File) -> io::Result<bool> {
    const BLKROGET: rustix::ioctl::Opcode = opcode::none(0x12, 94);
    // SAFETY: BLKROGET stores one int at the address that it is given, and nothing else.
    let value = unsafe { ioctl(file, Getter::<BLKROGET, libc::c_int>::new()) }?;
    Ok(value != 0)
}

/// `struct loop_info64` (linux/loop.h).
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    /// Offset, size limit, number, encryption, flags, names, key.
    rest: [u64; 26],
}
const _: () = assert!(size_of::<LoopInfo>() == 232);

/// What a loop device is over (`LOOP_GET_STATUS64`, linux/loop.h), also if that has been deleted.
/// `None` for other devices.
pub(super) fn backing_file(file: &File) -> Option<ImageIdentity> {
    const LOOP_GET_STATUS64: rustix::ioctl::Opcode = 0x4c05;
    // SAFETY: LOOP_GET_STATUS64 stores one `struct loop_info64`; a driver that does not know it
    // stores nothing and returns an error.
    let info = unsafe { ioctl(file, Getter::<LOOP_GET_STATUS64, LoopInfo>::new()) }.ok()?;
    Some(match info.rdevice {
        0 => ImageIdentity::File {
            device: info.device,
            inode: info.inode,
        },
        device => ImageIdentity::BlockDevice { device },
    })
}
