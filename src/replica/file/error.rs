//! Why an image cannot be used, in one line for the operator.
//!
//! Invariant: who follows the advice loses nothing. So it never is to create or extend an image
//! with which a disk is started: if the disk has data, the zeroes in the image would vote.

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use super::alignment::ALIGNMENT_BYTES_MIN;
use super::examine::Fault;
use super::format::Format;
use super::opener::NoAnswer;
use crate::common::message::{Quoted, Reason};
use crate::limits::OPEN_LIMIT;
use crate::replica::image_lock::LockError;

/// Why an image cannot be used as a replica. Each displays as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The image does not exist or cannot be opened.
    #[error(
        "cannot open {}: {}{}",
        Quoted(.path),
        Reason(.source),
        open_hint(.source, *.read_only)
    )]
    Open {
        /// The image.
        path: PathBuf,
        /// Whether the disk is read-only.
        read_only: bool,
        /// The error of the system call.
        source: io::Error,
    },
    /// The image is in no directory from which images may be added.
    #[error(
        "{} is outside of the image directories, or a symbolic link there leads out of them; use \
         an image in one of them, or start the daemon with --image-dir for its directory too",
        Quoted(.path)
    )]
    Outside {
        /// The image.
        path: PathBuf,
    },
    /// The file system has not answered within [`OPEN_LIMIT`].
    #[error(
        "{} does not answer: its file system has not opened it within {} s",
        Quoted(.path),
        OPEN_LIMIT.as_secs()
    )]
    Silent {
        /// The image.
        path: PathBuf,
    },
    /// The process that opens the image has failed.
    #[error("cannot open {}: {}", Quoted(.path), Reason(.source))]
    Opener {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Neither a regular file nor a block device.
    #[error("{} is {kind}; a replica must be a regular file or a block device", Quoted(.path))]
    NotAnImage {
        /// The file.
        path: PathBuf,
        /// The kind of file.
        kind: &'static str,
    },
    /// The file system has no direct I/O.
    #[error(
        "the file system of {} does not support O_DIRECT; use --cache writeback",
        Quoted(.path)
    )]
    NoDirectIo {
        /// The image.
        path: PathBuf,
    },
    /// The block device is set read-only.
    #[error(
        "block device {} is read-only; use --read-only, or, if nothing needs it unchanged, allow \
         writing with blockdev --setrw",
        Quoted(.path)
    )]
    ReadOnlyDevice {
        /// The block device.
        path: PathBuf,
    },
    /// A property of the image cannot be read.
    #[error("cannot examine {} ({operation}): {}", Quoted(.path), Reason(.source))]
    Examine {
        /// The image.
        path: PathBuf,
        /// The system call.
        operation: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// The size is zero.
    #[error(
        "{} is empty; {ADD_NEW}",
        Quoted(.path)
    )]
    Empty {
        /// The image.
        path: PathBuf,
    },
    /// The size is not a multiple of the block size.
    #[error(
        "the disk cannot have the size of {}, {disk_bytes} bytes: it is not a multiple of \
         {block_bytes}{}",
        Quoted(.path),
        misaligned_hint(*.block_bytes)
    )]
    Misaligned {
        /// The image.
        path: PathBuf,
        /// The size that the disk would have.
        disk_bytes: u64,
        /// The block size.
        block_bytes: u32,
    },
    /// The image has another format than raw.
    #[error("{} {}", Quoted(.path), not_raw(.path, *.format))]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// The image of a new replica holds data.
    #[error(
        "{} holds data (near byte {at}), which a resync would overwrite; use a new image \
         (quorum-blkctl add --create), or add --force if nothing needs the data",
        Quoted(.path)
    )]
    HoldsData {
        /// The image.
        path: PathBuf,
        /// Where.
        at: u64,
    },
    /// The image of a new replica could not be read, or not in time.
    #[error(
        "{} may hold data, which a resync would overwrite: what is behind byte {at} could not be \
         read in time; use a new image (quorum-blkctl add --create), or add --force if nothing \
         needs the data",
        Quoted(.path)
    )]
    MayHoldData {
        /// The image.
        path: PathBuf,
        /// The end of what was read.
        at: u64,
    },
    /// Some images are empty and others hold data, which their zeroes would outvote.
    #[error(
        "{} {} empty{}, but {} {} data (near byte {at}), which zeroes could outvote; start with {} \
         alone, and add each other one (quorum-blkctl add); or use --empty-anyway if all of them \
         are one disk",
        listed(.empty),
        if .empty.len() == 1 { "is" } else { "are" },
        if *.is_certain { "" } else { " as far as could be read in time" },
        listed(.holding),
        if .holding.len() == 1 { "holds" } else { "hold" },
        listed(.holding)
    )]
    EmptyBesideData {
        /// The images without data.
        empty: Vec<PathBuf>,
        /// They were read to their ends.
        is_certain: bool,
        /// The others that were found to hold data.
        holding: Vec<PathBuf>,
        /// Where the first of these does.
        at: u64,
    },
    /// The images of a new disk hold different data nearly everywhere.
    #[error(
        "{}: they differ nearly everywhere that was compared (first at byte {at}), so they are not \
         one disk; start with those of one disk alone, and add new images (quorum-blkctl add \
         --create), or start with copies of the right one (cp --sparse=always {} NEW)",
        different(.groups),
        Quoted(&.groups[0][0])
    )]
    OtherDisk {
        /// The first one with those that are like it, and the others.
        groups: [Vec<PathBuf>; 2],
        /// Where they differ.
        at: u64,
    },
    /// Another process uses the image, or it cannot be locked.
    #[error("{} is {source}{}", Quoted(.path), lock_hint(.source))]
    Locked {
        /// The image.
        path: PathBuf,
        /// Why.
        source: LockError,
    },
    /// The block device has another exclusive user.
    #[error(
        "block device {} is in use: it or a part of it is mounted, belongs to a volume group or an \
         array, or is open in another process; release it there, or use another one",
        Quoted(.path)
    )]
    Claimed {
        /// The block device.
        path: PathBuf,
    },
    /// Two images share their bytes.
    #[error(
        "{} is part of {}; each replica needs its own storage",
        Quoted(.part),
        Quoted(.whole)
    )]
    PartOf {
        /// The smaller one.
        part: PathBuf,
        /// The one that it is part of.
        whole: PathBuf,
    },
    /// Two paths lead to the same image.
    #[error(
        "{} and {} are the same image; each replica needs its own",
        Quoted(.first),
        Quoted(.second)
    )]
    SameImage {
        /// The one listed first.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// An image is shorter than the disk, or would decide that the disk is.
    #[error(
        "the replicas differ in size: {} has {bytes} bytes, {} has {larger_bytes}; start \
         with those of the right size, and add a new image for each other one \
         (quorum-blkctl add --create)",
        Quoted(.path),
        Quoted(.larger)
    )]
    Shorter {
        /// The shorter image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// A larger one.
        larger: PathBuf,
        /// Its size.
        larger_bytes: u64,
    },
    /// The image is shorter than the disk.
    #[error(
        "{} has {size_bytes} bytes, less than the disk, which has {disk_bytes}; use a new image \
         (quorum-blkctl add --create)",
        Quoted(.path)
    )]
    ShorterThanDisk {
        /// The image.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
        /// The size of the disk.
        disk_bytes: u64,
    },
    /// Two replicas have the same node-name.
    #[error(
        "{} and {} have the same node-name {}; name each with node-name=NAME",
        Quoted(.first),
        Quoted(.second),
        Quoted(.node_name)
    )]
    NodeNameTwice {
        /// The replica listed first.
        first: PathBuf,
        /// The other.
        second: PathBuf,
        /// The name of both.
        node_name: String,
    },
}

impl OpenError {
    pub(in crate::replica) fn of_no_answer(answer: NoAnswer, path: PathBuf) -> Self {
        match answer {
            NoAnswer::Silent => Self::Silent { path },
            NoAnswer::Ended(source) => Self::Opener { path, source },
        }
    }

    /// The error without what to do about an image that is not there: that of a replica that the
    /// disk is served without.
    pub fn of_missing(&self) -> String {
        let line = self.to_string();
        let hint = match self {
            Self::Open {
                read_only, source, ..
            } => open_hint(source, *read_only),
            _ => String::new(),
        };
        line.strip_suffix(&hint).unwrap_or(&line).to_owned()
    }
}

/// The answer about the image at `path`, with the path in each error.
pub(super) fn with_path<T>(
    answer: Result<Result<T, Fault>, NoAnswer>,
    path: &Path,
    read_only: bool,
) -> Result<T, OpenError> {
    let owned = || path.to_owned();
    match answer {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(fault)) => Err(fault.at(owned(), read_only)),
        Err(no_answer) => Err(OpenError::of_no_answer(no_answer, owned())),
    }
}

impl Fault {
    fn at(self, path: PathBuf, read_only: bool) -> OpenError {
        let error = io::Error::from_raw_os_error;
        let locked = |path, source| OpenError::Locked { path, source };
        match self {
            Self::Open(errno) => OpenError::Open {
                path,
                read_only,
                source: error(errno),
            },
            Self::Outside => OpenError::Outside { path },
            Self::NoDirectIo => OpenError::NoDirectIo { path },
            Self::NotAnImage(kind) => OpenError::NotAnImage {
                path,
                kind: kind.name(),
            },
            Self::ReadOnlyDevice => OpenError::ReadOnlyDevice { path },
            Self::Examine(call, errno) => OpenError::Examine {
                path,
                operation: call.name(),
                source: error(errno),
            },
            Self::Used(permission) => locked(path, LockError::Used(permission)),
            Self::NotShared(permission) => locked(path, LockError::NotShared(permission)),
            Self::Claimed => OpenError::Claimed { path },
            Self::Lock(errno) => locked(path, LockError::Io(error(errno))),
        }
    }
}

/// `'a', 'b' and 'c'`.
fn listed(paths: &[PathBuf]) -> String {
    let quoted: Vec<String> = paths.iter().map(|path| Quoted(path).to_string()).collect();
    match quoted.as_slice() {
        [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
        _ => quoted.concat(),
    }
}

/// `'a' and 'b' hold other data than 'c'`.
fn different([first, second]: &[Vec<PathBuf>; 2]) -> String {
    let verb = if first.len() == 1 { "holds" } else { "hold" };
    format!(
        "{} {verb} other data than {}",
        listed(first),
        listed(second)
    )
}

/// What to do about an image that holds nothing, or not all of the disk.
const ADD_NEW: &str = "if the disk has data, start without it, and add a new image \
                       (quorum-blkctl add --create)";

/// What the image is, and the next step.
fn not_raw(path: &Path, format: Format) -> String {
    let name = format.name();
    match format {
        // A guest may have encrypted its whole disk.
        Format::Luks => "begins with a LUKS header; if the guest has encrypted this disk, add \
                         --raw-anyway; if QEMU has, decrypt it into a new raw image (qemu-img \
                         convert)"
            .to_owned(),
        _ => format!(
            "is a {name} image, and a replica must be raw; convert it into a new file: qemu-img \
             convert -f {name} -O raw {} NEW.raw; if a guest has written these bytes to its raw \
             disk, add --raw-anyway",
            Quoted(path)
        ),
    }
}

fn open_hint(error: &io::Error, read_only: bool) -> String {
    let hint = match error.raw_os_error() {
        Some(libc::ENOENT) => ADD_NEW,
        Some(libc::EACCES) if crate::sandbox::is_applied() => {
            "give the image to the user of the daemon, which has no rights beyond that any more \
             (--sandbox, --user)"
        }
        Some(libc::EACCES | libc::EPERM | libc::EROFS) if !read_only => {
            "make it writable for this user, or use --read-only"
        }
        Some(libc::EACCES | libc::EPERM) => "make it readable for this user",
        _ => return String::new(),
    };
    format!("; {hint}")
}

fn lock_hint(error: &LockError) -> &'static str {
    if error.is_busy() {
        "; stop that process first"
    } else {
        "; check the file system that the image is on"
    }
}

fn misaligned_hint(block_bytes: u32) -> String {
    if block_bytes == ALIGNMENT_BYTES_MIN {
        format!(" (the size of a sector); {ADD_NEW}")
    } else {
        ", the block size; use --block-size 512 unless the guest has used the disk with larger \
         blocks"
            .to_owned()
    }
}
