//! Opens replicas: one file or block device each, checked before the disk serves from it.
//!
//! Every problem of an image is found here and reported in one line that names the image and the
//! next step: not an image, in use elsewhere, no direct I/O, a size that does not fit.
//!
//! Invariants:
//! - A [`ReplicaFile`] is locked against other users of the image as long as it is open.
//! - Direct I/O accepts every operation of the disk, or the image is accessed through the page
//!   cache. So what an image needs never decides which block size the guest sees.
//! - [`open_all`] returns different images with different node-names, which fit one disk
//!   ([`disk_size`]): its size is not zero and a multiple of the block size, and each image holds
//!   all of it.
//! - With [`Opening::Apart`], no thread of the daemon waits for a file system that does not answer.

mod alignment;
mod all;
mod block_device;
mod candidate;
mod changes;
mod contents;
mod descriptors;
mod directories;
mod error;
mod examine;
mod first_look;
mod format;
mod location;
mod look;
mod messages;
mod offline;
mod opener;
mod sizes;
mod spawner;
mod stamp;

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, RwLock};

use serde::{Deserialize, Serialize};

pub use self::all::{
    EmptyImages, Opened, Unopenable, checked_size, open_all, open_all_with_records, open_each,
    warn_of_larger,
};
use self::candidate::Candidate;
use self::changes::Seen;
pub use self::changes::{Watched, watch};
pub(super) use self::descriptors::close_range;
pub use self::directories::ImageDirectories;
pub use self::error::OpenError;
pub(super) use self::examine::Kind;
pub use self::first_look::compare_first;
pub use self::format::Format;
use self::location::{Location, Overlap};
pub(super) use self::look::{Look, Seen as Looked, look};
pub use self::offline::{OfflineImage, Sharing, open_offline};
pub(super) use self::opener::{NoAnswer, Opener};
pub use self::opener::{serve as serve_opener, waiting_for};
pub use self::sizes::disk_size;
pub use self::spawner::{Permitted, start_spawner};
pub use self::stamp::ImageStamp;
use super::image_lock;
use super::record_file::{RecordAccess, RecordFile};
use super::ring::RingFile;
use crate::common::NOT_POISONED;
use crate::common::image::ImageChanges;

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
    /// Accept an image that seems to have another format than raw.
    pub raw_anyway: bool,
    /// The block size of the disk: offset and length of each operation are multiples of it.
    pub block_bytes: u32,
}

/// Identifies an image. Two paths with the same identity lead to the same image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
    pub(super) fn of(metadata: &Metadata) -> Self {
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
    /// Its name in events, which may change.
    node_name: RwLock<Arc<str>>,
    /// The open file. It holds the image's lock.
    pub file: File,
    /// Holds the claim of a block device.
    _claim: Option<File>,
    /// Size of the image when it was opened.
    pub size_bytes: u64,
    /// Operations bypass the page cache of the host. Not with `--cache writeback`, and not where
    /// direct I/O needs larger blocks than the disk has.
    pub is_direct: bool,
    /// What it is written in at least: a power of two. Smaller writes cost a read.
    pub physical_block_bytes: u32,
    /// The kernel may wait for the file system before it has taken an operation.
    pub waits_in_submission: bool,
    /// A block device, not a regular file.
    pub is_block_device: bool,
    /// Which image this is.
    pub identity: ImageIdentity,
    /// Its stamp when it was locked. `None` for a block device.
    pub stamp: Option<ImageStamp>,
    /// The image opened once more, to grow it, or why it is not: an errno.
    pub opened_again: Result<File, i32>,
    /// Its record, if it has one that is kept.
    record: OnceLock<RecordFile>,
    location: Location,
    seen: Seen,
}

impl ReplicaFile {
    /// Its name in events.
    pub fn node_name(&self) -> Arc<str> {
        Arc::clone(&self.node_name.read().expect(NOT_POISONED))
    }

    /// The file as a ring uses it, with its record. It must stay open as long as a ring does.
    pub fn ring_file(&self) -> RingFile {
        let file = RingFile::of(&self.file).waiting_in_submission(self.waits_in_submission);
        match self.record() {
            Some(record) => file.with_record(&record.file),
            None => file,
        }
    }

    /// Its record, if that is kept.
    pub fn record(&self) -> Option<&RecordFile> {
        self.record.get()
    }

    /// This is its record from now on. It has none yet.
    pub fn keep_record(&self, record: RecordFile) {
        let kept = self.record.set(record);
        assert!(kept.is_ok(), "an image has one record");
    }

    /// Gives it another name.
    pub fn rename(&self, node_name: &str) {
        *self.node_name.write().expect(NOT_POISONED) = node_name.into();
    }

    /// What other programs have done to the image, as far as [`watch`] has noticed.
    pub fn changes(&self) -> ImageChanges {
        self.seen.changes()
    }
}

impl Drop for ReplicaFile {
    fn drop(&mut self) {
        // An io_uring may keep the file open for a moment longer; the locks must end now.
        image_lock::unlock(&self.file);
    }
}

/// How images are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opening {
    /// By the calling thread, which waits as long as the file system does not answer.
    Here,
    /// By a process for each image, each of whose answers must come within 20 s. The
    /// program must call [`serve_opener`] before anything else, and ignore SIGCHLD.
    Apart,
}

/// Opens and locks one replica.
pub fn open(path: &Path, node_name: &str, options: OpenOptions) -> Result<ReplicaFile, OpenError> {
    let source = ReplicaSource {
        path: path.to_owned(),
        node_name: node_name.to_owned(),
    };
    let mut candidate = Candidate::start(&source, options, Opening::Here, None).open()?;
    candidate.examine()?;
    check_size(candidate.replica(), candidate.replica().size_bytes, options)?;
    candidate.lock()?;
    Ok(candidate.into_replica())
}

/// What may become of the data that an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// It is kept: an image that holds data is refused.
    Never,
    /// The operator does not need it.
    Allowed,
}

/// Opens and locks a replica for a disk of `size_bytes`, beside its `others`, with the way to its
/// record. A resync will overwrite all of it. It is opened without leaving `directory`, if that is
/// given ([`ImageDirectories::of`]).
pub fn open_beside(
    others: &[Arc<ReplicaFile>],
    source: &ReplicaSource,
    (options, opening): (OpenOptions, Opening),
    size_bytes: u64,
    overwrite: Overwrite,
    directory: Option<&Path>,
) -> Result<(ReplicaFile, RecordAccess), OpenError> {
    // Of no importance where everything is overwritten, and where nothing is there.
    let raw_anyway = true;
    let options = OpenOptions {
        raw_anyway,
        ..options
    };
    let how = (options, opening);
    let mut candidate = open_candidate(others, source, how, size_bytes, directory)?;
    // What it holds may change until then.
    if overwrite == Overwrite::Never {
        candidate.check_holds_nothing(size_bytes)?;
    }
    Ok(candidate.into_parts())
}

/// Opens and locks the image of a replica of a disk of `size_bytes`, beside the `others`, which are
/// served without it, with the way to its record. It is opened as at the start, and keeps what it
/// holds. It is opened without leaving `directory`, if that is given.
///
/// # Errors
/// If it cannot be used, or not beside the others.
pub fn open_again(
    others: &[Arc<ReplicaFile>],
    source: &ReplicaSource,
    how: (OpenOptions, Opening),
    size_bytes: u64,
    directory: Option<&Path>,
) -> Result<(ReplicaFile, RecordAccess), OpenError> {
    let candidate = open_candidate(others, source, how, size_bytes, directory);
    candidate.map(Candidate::into_parts)
}

fn open_candidate(
    others: &[Arc<ReplicaFile>],
    source: &ReplicaSource,
    (options, opening): (OpenOptions, Opening),
    size_bytes: u64,
    directory: Option<&Path>,
) -> Result<Candidate, OpenError> {
    let mut candidate = Candidate::start(source, options, opening, directory).open()?;
    check_against(others.iter().map(Arc::as_ref), candidate.replica())?;
    candidate.examine()?;
    check_beside(others, candidate.replica(), size_bytes)?;
    candidate.lock()?;
    Ok(candidate)
}

/// Checks that a replica fits a disk of `size_bytes` with these `others`.
///
/// # Errors
/// If it is one of them, has the name of one of them, or is shorter than the disk.
pub fn check_beside(
    others: &[Arc<ReplicaFile>],
    replica: &ReplicaFile,
    size_bytes: u64,
) -> Result<(), OpenError> {
    check_against(others.iter().map(Arc::as_ref), replica)?;
    if replica.size_bytes < size_bytes {
        return Err(OpenError::ShorterThanDisk {
            path: replica.path.clone(),
            size_bytes: replica.size_bytes,
            disk_bytes: size_bytes,
        });
    }
    Ok(())
}

fn check_against<'a>(
    earlier: impl IntoIterator<Item = &'a ReplicaFile>,
    replica: &ReplicaFile,
) -> Result<(), OpenError> {
    for other in earlier {
        let (first, second) = (other.path.clone(), replica.path.clone());
        match other.location.overlap(&replica.location) {
            None => {}
            Some(Overlap::Same) => return Err(OpenError::SameImage { first, second }),
            Some(Overlap::FirstInSecond) => {
                let (part, whole) = (first, second);
                return Err(OpenError::PartOf { part, whole });
            }
            Some(Overlap::SecondInFirst) => {
                let (part, whole) = (second, first);
                return Err(OpenError::PartOf { part, whole });
            }
        }
        if other.node_name() == replica.node_name() {
            return Err(OpenError::NodeNameTwice {
                first: other.path.clone(),
                second: replica.path.clone(),
                node_name: replica.node_name().to_string(),
            });
        }
    }
    Ok(())
}

/// Checks that a disk can have the size of this image.
fn check_size(
    replica: &ReplicaFile,
    disk_bytes: u64,
    options: OpenOptions,
) -> Result<(), OpenError> {
    let path = || replica.path.clone();
    if disk_bytes == 0 {
        return Err(OpenError::Empty { path: path() });
    }
    let block_bytes = options.block_bytes;
    if !disk_bytes.is_multiple_of(u64::from(block_bytes)) {
        return Err(OpenError::Misaligned {
            path: path(),
            disk_bytes,
            block_bytes,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
