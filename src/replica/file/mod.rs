//! Opening replicas: one file or block device each, checked before anything is served from it.
//!
//! Everything that can be wrong with an image is found here, with one line that names the image and
//! what to do about it: not an image at all, in use elsewhere, no direct I/O, a size that does not
//! fit.
//!
//! Invariants:
//! - A [`ReplicaFile`] is locked against other users of the image for as long as it is open.
//! - Its size is not zero and a multiple of its alignment, which is a power of two of at least 512:
//!   whole sectors, and no last piece that direct I/O could not reach.
//! - What [`open_all`] returns are different images of the same size under different node-names.

mod error;

use std::fs::{File, FileType, Metadata};
use std::io::{self, Seek as _, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::error::OpenError;
use super::image_lock::{self, Access, Locking};
use crate::common::message::Quoted;
use crate::limits::SECTOR_BYTES;

/// The least alignment: a sector.
const ALIGNMENT_BYTES_MIN: u32 = 512;
const _: () = assert!(ALIGNMENT_BYTES_MIN as u64 == SECTOR_BYTES);
/// The alignment that direct I/O accepts on every disk in use today, and the size of a page of
/// memory.
const ALIGNMENT_BYTES_SAFE: u32 = 4096;
/// No file system or disk asks for more; a greater figure is not believed.
const ALIGNMENT_BYTES_MAX: u32 = 1 << 20;

/// How long an image in use is waited for. The kernel closes the files of an io_uring some 50 ms
/// after the process that had it is gone, on a busy machine much later: a daemon that was killed
/// can be started again at once all the same.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_TOLD_AFTER: Duration = Duration::from_millis(500);
const BUSY_INTERVAL: Duration = Duration::from_millis(10);

/// Which image to open, and what to call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaSource {
    /// The file or block device.
    pub path: PathBuf,
    /// The replica's name in events.
    pub node_name: String,
}

/// How to open images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenOptions {
    /// Never write to the image.
    pub read_only: bool,
    /// O_DIRECT: past the host's page cache.
    pub direct: bool,
}

/// What makes two paths the same image, whatever links lead there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageIdentity {
    /// A regular file.
    File {
        /// The device of its file system.
        device: u64,
        /// Its inode there.
        inode: u64,
    },
    /// A block device: any number of device nodes may name it.
    BlockDevice {
        /// Its device number.
        device: u64,
    },
}

/// An open and locked replica.
#[derive(Debug)]
pub struct ReplicaFile {
    /// As it was given.
    pub path: PathBuf,
    /// Its name in events.
    pub node_name: String,
    /// The open file. It holds the image's lock.
    pub file: File,
    /// Size of the image when it was opened.
    pub size_bytes: u64,
    /// Offset and length of each operation must be a multiple of this: at least 512, a power of
    /// two.
    pub alignment_bytes: u32,
    /// What it is written in at least: a power of two. Smaller writes cost a read.
    pub physical_block_bytes: u32,
    /// The address of each buffer must be a multiple of this: a power of two, 1 without direct
    /// I/O.
    pub memory_alignment_bytes: u32,
    /// A block device, not a regular file.
    pub is_block_device: bool,
    /// Which image this is.
    pub identity: ImageIdentity,
}

impl Drop for ReplicaFile {
    fn drop(&mut self) {
        // The file may outlive us for a moment in an io_uring, and the locks must not.
        image_lock::unlock(&self.file);
    }
}

/// Opens and locks one replica.
pub fn open(path: &Path, node_name: &str, options: OpenOptions) -> Result<ReplicaFile, OpenError> {
    let replica = open_unlocked([], path, node_name, options)?;
    lock(&replica, options)?;
    Ok(replica)
}

/// Opens and locks all replicas of a disk, in the order given.
pub fn open_all(
    sources: &[ReplicaSource],
    options: OpenOptions,
) -> Result<Vec<ReplicaFile>, OpenError> {
    let mut replicas: Vec<ReplicaFile> = Vec::with_capacity(sources.len());
    for source in sources {
        let replica = open_unlocked(&replicas, &source.path, &source.node_name, options)?;
        check_sizes(&replicas, &replica)?;
        replicas.push(replica);
    }
    // Locked only when all is known to be in order: an image given twice would otherwise be found
    // in use by "another process", which is ourselves.
    for replica in &replicas {
        lock(replica, options)?;
    }
    Ok(replicas)
}

/// Opens and locks a replica beside those that a disk of `size_bytes`, in blocks of `block_bytes`,
/// has open.
pub fn open_beside(
    others: &[Arc<ReplicaFile>],
    source: &ReplicaSource,
    options: OpenOptions,
    size_bytes: u64,
    block_bytes: u32,
) -> Result<ReplicaFile, OpenError> {
    let others = others.iter().map(Arc::as_ref);
    let replica = open_unlocked(others, &source.path, &source.node_name, options)?;
    if replica.size_bytes != size_bytes {
        return Err(OpenError::NotTheSize {
            path: replica.path.clone(),
            size_bytes: replica.size_bytes,
            disk_bytes: size_bytes,
        });
    }
    if replica.alignment_bytes > block_bytes {
        return Err(OpenError::Coarser {
            path: replica.path.clone(),
            alignment_bytes: replica.alignment_bytes,
            block_bytes,
        });
    }
    lock(&replica, options)?;
    Ok(replica)
}

fn check_against<'a>(
    earlier: impl IntoIterator<Item = &'a ReplicaFile>,
    replica: &ReplicaFile,
) -> Result<(), OpenError> {
    for other in earlier {
        if other.identity == replica.identity {
            return Err(OpenError::SameImage {
                first: other.path.clone(),
                second: replica.path.clone(),
            });
        }
        if other.node_name == replica.node_name {
            return Err(OpenError::NodeNameTwice {
                first: other.path.clone(),
                second: replica.path.clone(),
                node_name: replica.node_name.clone(),
            });
        }
    }
    Ok(())
}

fn check_sizes(earlier: &[ReplicaFile], replica: &ReplicaFile) -> Result<(), OpenError> {
    match earlier.first() {
        Some(other) if other.size_bytes != replica.size_bytes => Err(OpenError::SizesDiffer {
            first: other.path.clone(),
            first_bytes: other.size_bytes,
            second: replica.path.clone(),
            second_bytes: replica.size_bytes,
        }),
        _ => Ok(()),
    }
}

/// Opens an image that is to be used beside `earlier` ones.
fn open_unlocked<'a>(
    earlier: impl IntoIterator<Item = &'a ReplicaFile>,
    path: &Path,
    node_name: &str,
    options: OpenOptions,
) -> Result<ReplicaFile, OpenError> {
    let open_error = |source| OpenError::Open {
        path: path.to_owned(),
        read_only: options.read_only,
        source,
    };
    // Asked before opening, because opening alone can block (a FIFO) or act (a tape) ...
    check_kind(path, &std::fs::metadata(path).map_err(open_error)?)?;
    let file = open_file(path, options).map_err(|error| {
        if options.direct && error.raw_os_error() == Some(libc::EINVAL) {
            OpenError::NoDirectIo {
                path: path.to_owned(),
            }
        } else {
            open_error(error)
        }
    })?;
    // ... and again of the open file, because the path may lead elsewhere by now.
    let examine_error = |operation| {
        move |source| OpenError::Examine {
            path: path.to_owned(),
            operation,
            source,
        }
    };
    let metadata = file.metadata().map_err(examine_error("fstat"))?;
    check_kind(path, &metadata)?;

    let is_block_device = metadata.file_type().is_block_device();
    if is_block_device && !options.read_only {
        let read_only = block_device_value(&file, BLKROGET).map_err(examine_error("BLKROGET"))?;
        if read_only != 0 {
            return Err(OpenError::ReadOnlyDevice {
                path: path.to_owned(),
            });
        }
    }
    // For a block device stat says 0; its end says the size of either kind.
    let size_bytes = (&file)
        .seek(SeekFrom::End(0))
        .map_err(examine_error("lseek"))?;
    check_size(path, size_bytes, ALIGNMENT_BYTES_MIN)?;
    let mut replica = ReplicaFile {
        path: path.to_owned(),
        node_name: node_name.to_owned(),
        size_bytes,
        alignment_bytes: ALIGNMENT_BYTES_MIN,
        physical_block_bytes: physical_block_bytes(&file, &metadata, is_block_device),
        memory_alignment_bytes: 1,
        file,
        is_block_device,
        identity: if is_block_device {
            ImageIdentity::BlockDevice {
                device: metadata.rdev(),
            }
        } else {
            ImageIdentity::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        },
    };
    check_against(earlier, &replica)?;
    if options.direct {
        // May read, which does not return from an image that hangs: one of the disk's own, perhaps,
        // that was removed for that.
        let alignment = direct_alignment(&replica.file, is_block_device, size_bytes);
        replica.alignment_bytes = alignment.offset_bytes;
        replica.memory_alignment_bytes = alignment.memory_bytes;
        check_size(path, size_bytes, replica.alignment_bytes)?;
    }
    Ok(replica)
}

fn open_file(path: &Path, options: OpenOptions) -> io::Result<File> {
    let direct = if options.direct { libc::O_DIRECT } else { 0 };
    let open = |flags| {
        // The standard library adds O_CLOEXEC.
        std::fs::OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(direct | flags)
            .open(path)
    };
    // When an image was last read is of no use to anybody, and to note it costs each read. Only its
    // owner may say so.
    match open(libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(0),
        opened => opened,
    }
}

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), OpenError> {
    let file_type = metadata.file_type();
    if file_type.is_file() || file_type.is_block_device() {
        return Ok(());
    }
    Err(OpenError::NotAnImage {
        path: path.to_owned(),
        kind: kind_name(file_type),
    })
}

fn kind_name(file_type: FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_char_device() {
        "a character device"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a special file"
    }
}

fn check_size(path: &Path, size_bytes: u64, alignment_bytes: u32) -> Result<(), OpenError> {
    if size_bytes == 0 {
        return Err(OpenError::Empty {
            path: path.to_owned(),
        });
    }
    if !size_bytes.is_multiple_of(u64::from(alignment_bytes)) {
        return Err(OpenError::Misaligned {
            path: path.to_owned(),
            size_bytes,
            alignment_bytes,
        });
    }
    Ok(())
}

fn lock(replica: &ReplicaFile, options: OpenOptions) -> Result<(), OpenError> {
    let access = if options.read_only {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let since = Instant::now();
    let mut told = false;
    let locking = loop {
        match image_lock::lock(&replica.file, access) {
            Err(error) if error.is_busy() && since.elapsed() < BUSY_LIMIT => {
                std::thread::sleep(BUSY_INTERVAL);
                if !told && since.elapsed() >= BUSY_TOLD_AFTER {
                    told = true;
                    log::info!(
                        "waiting for another process to let go of {}",
                        Quoted(&replica.path)
                    );
                }
            }
            locking => break locking,
        }
    };
    match locking {
        Ok(Locking::Held) => Ok(()),
        Ok(Locking::Unsupported) => {
            log::warn!(
                "the file system of {} has no open file description locks: nothing keeps other processes from using it",
                Quoted(&replica.path)
            );
            Ok(())
        }
        Err(source) => Err(OpenError::Locked {
            path: replica.path.clone(),
            source,
        }),
    }
}

/// The physical block size of a block device; of a file, that of its file system.
fn physical_block_bytes(file: &File, metadata: &Metadata, is_block_device: bool) -> u32 {
    let stated = if is_block_device {
        block_device_value(file, BLKPBSZGET)
            .ok()
            .and_then(|bytes| u32::try_from(bytes).ok())
    } else {
        // Network file systems name their transfer size, which is no block.
        u32::try_from(metadata.blksize())
            .ok()
            .map(|bytes| bytes.min(ALIGNMENT_BYTES_SAFE))
    };
    stated
        .and_then(believable_alignment)
        .unwrap_or(ALIGNMENT_BYTES_MIN)
}

/// What direct I/O asks of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alignment {
    offset_bytes: u32,
    memory_bytes: u32,
}

/// The alignment for direct I/O: what the file says; else what the block device says; else what is
/// tried out.
fn direct_alignment(file: &File, is_block_device: bool, size_bytes: u64) -> Alignment {
    if let Some(alignment) = stated_alignment(file) {
        return alignment;
    }
    let logical_block_bytes = if is_block_device {
        block_device_value(file, libc::BLKSSZGET)
            .ok()
            .and_then(|bytes| u32::try_from(bytes).ok())
            .and_then(believable_alignment)
    } else {
        None
    };
    Alignment {
        offset_bytes: logical_block_bytes.unwrap_or_else(|| probed_alignment(file, size_bytes)),
        memory_bytes: ALIGNMENT_BYTES_SAFE,
    }
}

/// What the file system states (Linux 6.1 and later, not every file system). Zero means that it
/// does direct I/O in its own way, buffered for instance: then only trying tells.
fn stated_alignment(file: &File) -> Option<Alignment> {
    let mut status = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is a NUL-terminated empty string, for which AT_EMPTY_PATH takes the open
    // descriptor itself, and `status` has room for the structure the kernel fills in.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            status.as_mut_ptr(),
        )
    };
    if result != 0 {
        return None;
    }
    // SAFETY: it was zeroed, and all its members are integers, for which zero is a value.
    let status = unsafe { status.assume_init() };
    if status.stx_mask & libc::STATX_DIOALIGN == 0 {
        return None;
    }
    let memory_bytes = status.stx_dio_mem_align;
    if !memory_bytes.is_power_of_two() || memory_bytes > ALIGNMENT_BYTES_MAX {
        return None;
    }
    Some(Alignment {
        offset_bytes: believable_alignment(status.stx_dio_offset_align)?,
        memory_bytes,
    })
}

fn believable_alignment(bytes: u32) -> Option<u32> {
    (bytes.is_power_of_two() && bytes <= ALIGNMENT_BYTES_MAX)
        .then(|| bytes.max(ALIGNMENT_BYTES_MIN))
}

/// Finds the alignment by reading: the smallest length that is not refused with EINVAL. A read that
/// fails in another way, on a bad sector say, was not refused for its alignment.
fn probed_alignment(file: &File, size_bytes: u64) -> u32 {
    // A hole is read without the disk, by some file systems without a look at the alignment, so
    // only a read of data tells. An image without any data is taken for one with the strictest
    // disk underneath.
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

fn reads_with_alignment(file: &File, offset: u64, length_bytes: u32) -> bool {
    let page = ALIGNMENT_BYTES_SAFE as usize;
    let mut memory = vec![0; 2 * page];
    let start = memory.as_ptr().align_offset(page);
    let Some(buffer) = memory.get_mut(start..start + length_bytes as usize) else {
        return false;
    };
    match file.read_at(buffer, offset) {
        Ok(_) => true,
        Err(error) => error.raw_os_error() != Some(libc::EINVAL),
    }
}

/// Where the first data of the file is; `None` if it is one hole. A file system that keeps no
/// account of holes says 0.
fn first_data_offset(file: &File) -> Option<u64> {
    // SAFETY: lseek takes no pointer, and the descriptor is open as long as `file` is borrowed.
    // Nothing depends on the file position it moves: every operation on a replica carries its
    // own offset.
    let offset = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) };
    u64::try_from(offset).ok()
}

/// Linux's `BLKROGET`, linux/fs.h: whether a block device is set read-only.
const BLKROGET: libc::Ioctl = libc::_IO(0x12, 94);

/// Linux's `BLKPBSZGET`, linux/fs.h: the physical block size of a block device.
const BLKPBSZGET: libc::Ioctl = libc::_IO(0x12, 123);

/// Asks a block device for one of the values that are a C int: BLKSSZGET, BLKROGET, BLKPBSZGET.
fn block_device_value(file: &File, request: libc::Ioctl) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    // SAFETY: the requests that come here store one int at the address given, and nothing else.
    let status = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw mut value) };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

#[cfg(test)]
mod tests;
