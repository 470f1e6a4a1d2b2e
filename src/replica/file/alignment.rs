//! The block sizes of an image: the physical one, and the alignment that direct I/O needs.

#![forbid(unsafe_code)]

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use rustix::fs::{
    AtFlags, SeekFrom, StatxFlags, fstatfs, ioctl_blkpbszget, ioctl_blksszget, seek, statx,
};
use serde::{Deserialize, Serialize};

use crate::limits::SECTOR_BYTES;

/// The smallest alignment: a sector.
pub(super) const ALIGNMENT_BYTES_MIN: u32 = 512;
const _: () = assert!(ALIGNMENT_BYTES_MIN as u64 == SECTOR_BYTES);

/// The alignment that direct I/O accepts on every disk in use today, and the size of a page.
const ALIGNMENT_BYTES_SAFE: u32 = 4096;

/// The largest alignment that is plausible. No file system or disk asks for more.
const ALIGNMENT_BYTES_MAX: u32 = 1 << 20;

/// The alignment that direct I/O needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Alignment {
    /// Of the offset in the file and of the length.
    pub(super) offset_bytes: u32,
    /// Of the address of the buffer.
    pub(super) memory_bytes: u32,
}

/// The physical block size of a block device, or of the file system of a regular file.
pub(super) fn physical_block_bytes(file: &File, metadata: &Metadata, is_block_device: bool) -> u32 {
    let stated = if is_block_device {
        ioctl_blkpbszget(file).ok()
    } else {
        // Network file systems state their transfer size here, which is no block size.
        u32::try_from(metadata.blksize())
            .ok()
            .map(|bytes| bytes.min(ALIGNMENT_BYTES_SAFE))
    };
    stated
        .and_then(plausible_alignment)
        .unwrap_or(ALIGNMENT_BYTES_MIN)
}

/// The alignment for direct I/O: as the file system states it, else as the block device states it,
/// else as found by trial.
pub(super) fn direct_alignment(file: &File, is_block_device: bool, size_bytes: u64) -> Alignment {
    if let Some(alignment) = stated_alignment(file) {
        return alignment;
    }
    let logical_block_bytes = if is_block_device {
        ioctl_blksszget(file).ok().and_then(plausible_alignment)
    } else {
        takes_any_alignment(file).then_some(ALIGNMENT_BYTES_MIN)
    };
    Alignment {
        offset_bytes: logical_block_bytes.unwrap_or_else(|| probed_alignment(file, size_bytes)),
        memory_bytes: ALIGNMENT_BYTES_SAFE,
    }
}

/// Whether the file system does what is not aligned to its blocks through the page cache by itself.
fn takes_any_alignment(file: &File) -> bool {
    const BTRFS: u64 = 0x9123_683e;
    const TMPFS: u64 = 0x0102_1994;
    fstatfs(file).is_ok_and(|found| matches!(u64::try_from(found.f_type), Ok(BTRFS | TMPFS)))
}

/// The alignment that the file system states: Linux 6.1 and later, not every file system. Zero
/// means that the file system emulates direct I/O, for example with buffers; then only a trial
/// finds the alignment.
fn stated_alignment(file: &File) -> Option<Alignment> {
    let status = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    if status.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return None;
    }
    let memory_bytes = status.stx_dio_mem_align;
    if !memory_bytes.is_power_of_two() || memory_bytes > ALIGNMENT_BYTES_MAX {
        return None;
    }
    Some(Alignment {
        offset_bytes: plausible_alignment(status.stx_dio_offset_align)?,
        memory_bytes,
    })
}

fn plausible_alignment(bytes: u32) -> Option<u32> {
    (bytes.is_power_of_two() && bytes <= ALIGNMENT_BYTES_MAX)
        .then(|| bytes.max(ALIGNMENT_BYTES_MIN))
}

/// Finds the alignment by reading: the smallest length that the kernel does not reject with
/// EINVAL. A read that fails otherwise, for example on an unreadable sector, has a valid alignment.
pub(super) fn probed_alignment(file: &File, size_bytes: u64) -> u32 {
    // A read of a hole does not reach the disk, and some file systems do not check its alignment,
    // so only a read of data is conclusive. An image without any data is assumed to be on a disk
    // with the strictest alignment.
    let data_offset = first_data_offset(file);
    let offset = data_offset.unwrap_or(0);
    let accepts = |length: u32| reads_with_alignment(file, offset, length);
    if accepts(1) {
        let safe = size_bytes.is_multiple_of(u64::from(ALIGNMENT_BYTES_SAFE));
        return if data_offset.is_none() && safe {
            ALIGNMENT_BYTES_SAFE
        } else {
            ALIGNMENT_BYTES_MIN
        };
    }
    [512, 1024, 2048]
        .into_iter()
        .find(|&length| accepts(length))
        .unwrap_or(ALIGNMENT_BYTES_SAFE)
}

pub(super) fn reads_with_alignment(file: &File, offset: u64, length_bytes: u32) -> bool {
    let mut memory = Vec::new();
    match file.read_at(page_aligned(&mut memory, length_bytes as usize), offset) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() != Some(libc::EINVAL),
    }
}

/// A buffer of this length for direct I/O, in `memory`.
pub(super) fn page_aligned(memory: &mut Vec<u8>, length_bytes: usize) -> &mut [u8] {
    let page = ALIGNMENT_BYTES_SAFE as usize;
    memory.resize(length_bytes + page, 0);
    let start = memory.as_ptr().align_offset(page);
    &mut memory[start..start + length_bytes]
}

/// The offset of the first data in the file, or `None` if the file is one hole. A file system that
/// does not track holes reports 0.
fn first_data_offset(file: &File) -> Option<u64> {
    // The call moves the file position, which no operation on a replica depends on.
    seek(file, SeekFrom::Data(0)).ok()
}
