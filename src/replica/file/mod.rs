//! Opens replicas: one file or block device each, checked before the disk serves from it.
//!
//! Every problem of an image is found here and reported in one line that names the image and the
//! next step: not an image, in use elsewhere, no direct I/O, a size that does not fit.
//!
//! Invariants:
//! - A [`ReplicaFile`] is locked against other users of the image as long as it is open.
//! - Its size is not zero and a multiple of its alignment, which is a power of two of at least 512.
//!   So the image consists of whole sectors, and direct I/O reaches all of them.
//! - [`open_all`] returns different images of the same size with different node-names.

mod alignment;
mod block_device;
mod error;

use std::fs::{File, FileType, Metadata};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use self::alignment::{ALIGNMENT_BYTES_MIN, direct_alignment, physical_block_bytes};
pub use self::error::OpenError;
use super::image_lock::{self, Access, Locking};

/// How long to wait for an image in use. The kernel closes the files of an io_uring some 50 ms
/// after its process is gone, on a busy machine much later. The wait lets a daemon start
/// immediately after the previous one was killed.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_LOGGED_AFTER: Duration = Duration::from_millis(500);
const BUSY_INTERVAL: Duration = Duration::from_millis(10);

/// An image to open.
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
    /// Open the image for reading only.
    pub read_only: bool,
    /// Use O_DIRECT, which bypasses the host's page cache.
    pub direct: bool,
}

/// Identifies an image. Two paths with the same identity lead to the same image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageIdentity {
    /// A regular file.
    File {
        /// The device of its file system.
        device: u64,
        /// Its inode.
        inode: u64,
    },
    /// A block device, which several device nodes may name.
    BlockDevice {
        /// Its device number.
        device: u64,
    },
}

impl ImageIdentity {
    fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::BlockDevice {
                device: metadata.rdev(),
            }
        } else {
            Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            }
        }
    }
}

/// An open and locked replica.
#[derive(Debug)]
pub struct ReplicaFile {
    /// The path as the operator gave it.
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
        // An io_uring may keep the file open for a moment longer; the locks must end now.
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
    // Locks come after all checks: an image that is given twice would otherwise be reported as in
    // use by another process, which is this one.
    for replica in &replicas {
        lock(replica, options)?;
    }
    Ok(replicas)
}

/// Opens and locks a replica for a disk of `size_bytes` in blocks of `block_bytes`, beside its
/// `others`.
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

/// Opens an image for use beside `earlier` ones.
fn open_unlocked<'a>(
    earlier: impl IntoIterator<Item = &'a ReplicaFile>,
    path: &Path,
    node_name: &str,
    options: OpenOptions,
) -> Result<ReplicaFile, OpenError> {
    let (file, metadata) = open_image(path, options)?;
    let is_block_device = metadata.file_type().is_block_device();
    if is_block_device && !options.read_only {
        let is_read_only = block_device::is_read_only(&file);
        if is_read_only.map_err(examine_error(path, "BLKROGET"))? {
            return Err(OpenError::ReadOnlyDevice {
                path: path.to_owned(),
            });
        }
    }
    // stat reports size 0 for a block device; the end of the file is right for both kinds.
    let size_bytes = (&file)
        .seek(SeekFrom::End(0))
        .map_err(examine_error(path, "lseek"))?;
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
        identity: ImageIdentity::of(&metadata),
    };
    check_against(earlier, &replica)?;
    if options.direct {
        // Last, because it may read, and a read of an image that hangs does not return: perhaps
        // an image that was removed from this disk for that reason.
        let alignment = direct_alignment(&replica.file, is_block_device, size_bytes);
        replica.alignment_bytes = alignment.offset_bytes;
        replica.memory_alignment_bytes = alignment.memory_bytes;
        check_size(path, size_bytes, replica.alignment_bytes)?;
    }
    Ok(replica)
}

/// Opens `path` and checks that it is an image.
fn open_image(path: &Path, options: OpenOptions) -> Result<(File, Metadata), OpenError> {
    let open_error = |source| OpenError::Open {
        path: path.to_owned(),
        read_only: options.read_only,
        source,
    };
    // Checked before opening, because opening alone can block (a FIFO) or have effects (a tape).
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
    // Checked again, because the path may name another file by now.
    let metadata = file.metadata().map_err(examine_error(path, "fstat"))?;
    check_kind(path, &metadata)?;
    Ok((file, metadata))
}

fn examine_error(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> OpenError {
    move |source| OpenError::Examine {
        path: path.to_owned(),
        operation,
        source,
    }
}

fn open_file(path: &Path, options: OpenOptions) -> io::Result<File> {
    let mut flags = OFlags::CLOEXEC;
    flags |= if options.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    let open = |flags| rustix::io::retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty()));
    // Keeping the access time of an image up to date costs every read. Only its owner may turn
    // that off.
    let opened = match open(flags | OFlags::NOATIME) {
        Err(rustix::io::Errno::PERM) => open(flags),
        opened => opened,
    };
    Ok(File::from(opened?))
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
    let mut logged = false;
    let locking = loop {
        match image_lock::lock(&replica.file, access) {
            Err(error) if error.is_busy() && since.elapsed() < BUSY_LIMIT => {
                std::thread::sleep(BUSY_INTERVAL);
                if !logged && since.elapsed() >= BUSY_LOGGED_AFTER {
                    logged = true;
                    log::debug!(
                        replica = replica.node_name, file:% = replica.path.display();
                        "waiting for another process to release the lock of an image"
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
                replica = replica.node_name, file:% = replica.path.display();
                "cannot lock an image: its file system has no open file description locks; make \
                 sure that no other process uses it"
            );
            Ok(())
        }
        Err(source) => Err(OpenError::Locked {
            path: replica.path.clone(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests;
