//! The system calls that open and examine an image. Each of them may wait for the file system for
//! ever, so the daemon has a process of its own make them (`opener.rs`).

#![forbid(unsafe_code)]

use std::fs::{File, FileType, Metadata};
use std::io::{self, Seek as _, SeekFrom};
use std::num::NonZeroU64;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use rustix::fs::{Advice, Mode, OFlags, fadvise, fstatfs};
use serde::{Deserialize, Serialize};

use super::alignment::{Alignment, direct_alignment, physical_block_bytes};
use super::directories::{is_outside, open_beneath};
use super::location::Location;
use super::{ImageIdentity, ImageStamp, OpenOptions, block_device};
use crate::limits::{FORGET_BYTES_MIN, FORGET_LIMIT, FORGETS_MAX};
use crate::replica::image_lock::{self, Access, LockError, Locking, Permission};

/// An image that is open.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) file: File,
    pub(super) facts: Facts,
}

/// What the first look at an image finds. It reads no data.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) identity: ImageIdentity,
    pub(super) location: Location,
    pub(super) is_block_device: bool,
    pub(super) size_bytes: u64,
    pub(super) physical_block_bytes: u32,
    pub(super) waits_in_submission: bool,
}

/// What the opener found wrong, in a form that a socket can carry. `error.rs` has the texts.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Fault {
    /// The image cannot be opened: the errno.
    Open(i32),
    /// The file system has no direct I/O.
    NoDirectIo,
    /// The image is not in the directory that it must be in.
    Outside,
    /// Neither a regular file nor a block device.
    NotAnImage(Kind),
    /// The block device is set read-only.
    ReadOnlyDevice,
    /// This system call failed with this errno.
    Examine(Call, i32),
    /// Another process uses the image for this, which the daemon denies.
    Used(Permission),
    /// Another process denies this use.
    NotShared(Permission),
    /// The lock call failed with this errno.
    Lock(i32),
    /// The block device is mounted, or has another exclusive user.
    Claimed,
}

/// A system call that examines an image.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum Call {
    Fstat,
    BlkRoGet,
    Lseek,
}

/// A kind of file that is not an image, or not a record.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(in crate::replica) enum Kind {
    Directory,
    /// Where links are not followed.
    SymbolicLink,
    BlockDevice,
    CharacterDevice,
    Fifo,
    Socket,
    Other,
}

impl Image {
    /// Opens `path`, checks that it is an image, and examines it. Does not leave `directory`, if
    /// that is given.
    pub(super) fn open(
        path: &Path,
        options: OpenOptions,
        directory: Option<&Path>,
    ) -> Result<Self, Fault> {
        let (file, metadata) = open_image(path, options, directory)?;
        let is_block_device = metadata.file_type().is_block_device();
        if is_block_device && !options.read_only {
            let is_read_only = block_device::is_read_only(&file);
            if is_read_only.map_err(failed(Call::BlkRoGet))? {
                return Err(Fault::ReadOnlyDevice);
            }
        }
        // stat reports size 0 for a block device; the end of the file is right for both kinds.
        let end = (&file).seek(SeekFrom::End(0));
        let facts = Facts {
            identity: ImageIdentity::of(&metadata),
            location: Location::of(&file, &metadata),
            is_block_device,
            size_bytes: end.map_err(failed(Call::Lseek))?,
            physical_block_bytes: physical_block_bytes(&file, &metadata, is_block_device),
            waits_in_submission: waits_in_submission(&file),
        };
        Ok(Self { file, facts })
    }
}

/// Whether the kernel may wait for the file system before it has taken an operation, although it is
/// asked not to. FUSE does: every operation waits for its answer where the server has not set
/// `FUSE_ASYNC_DIO`, and else while as many are out as it wants in the background, twelve if it
/// does not say; a write waits while another call that locks the file has no answer (fsync, lseek,
/// fallocate).
fn waits_in_submission(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.f_type == libc::FUSE_SUPER_MAGIC)
}

/// The alignment that direct I/O on an open image needs. May read.
pub(super) fn alignment(file: &File, facts: &Facts) -> Alignment {
    direct_alignment(file, facts.is_block_device, facts.size_bytes)
}

/// Claims a block device, for as long as the file that is returned is open: the kernel allows one
/// claim, and a file system or an array has one too (open(2), O_EXCL). Not for reading only, which
/// several may do.
pub(super) fn claim(file: &File, options: OpenOptions) -> Result<Option<File>, Fault> {
    let metadata = file.metadata().map_err(failed(Call::Fstat))?;
    if options.read_only || !metadata.file_type().is_block_device() {
        return Ok(None);
    }
    // Not by its path, which may name another device by now.
    let same = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    match rustix::io::retry_on_intr(|| rustix::fs::open(&same, flags, Mode::empty())) {
        Ok(claim) => Ok(Some(File::from(claim))),
        Err(rustix::io::Errno::BUSY) => Err(Fault::Claimed),
        Err(error) => Err(Fault::Open(error.raw_os_error())),
    }
}

/// An image that is locked.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Locked {
    pub(super) locking: Locking,
    /// From then on no other process changes the image.
    pub(super) stamp: Option<ImageStamp>,
    /// The page cache holds nothing else of the image than what is to be written back.
    pub(super) cache_forgotten: bool,
}

/// Locks an open image, without waiting for another process.
pub(super) fn lock(file: &File, options: OpenOptions) -> Result<Locked, Fault> {
    let access = if options.read_only {
        Access::ReadOnly
    } else {
        Access::ReadWrite
    };
    let locking = image_lock::lock(file, access).map_err(|error| match error {
        LockError::Used(permission) => Fault::Used(permission),
        LockError::NotShared(permission) => Fault::NotShared(permission),
        LockError::Io(error) => Fault::Lock(errno(&error)),
    })?;
    let cache_forgotten = forget_cached(file);
    let metadata = file.metadata().map_err(failed(Call::Fstat))?;
    let stamp = ImageStamp::of(&metadata);
    Ok(Locked {
        locking,
        stamp,
        cache_forgotten,
    })
}

/// Opens an image once more, through the page cache, unless it is only read. The kernel reports
/// what it could not write back once for each open file (fsync(2)): this one takes no report away
/// from the first. An error is an errno.
pub(super) fn open_again(file: &File, options: OpenOptions) -> Result<File, i32> {
    if options.read_only {
        return Err(libc::EROFS);
    }
    // Not by its path, which may name another file by now.
    let same = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let opened = rustix::io::retry_on_intr(|| rustix::fs::open(&same, flags, Mode::empty()));
    opened.map(File::from).map_err(|errno| errno.raw_os_error())
}

/// Takes out of the page cache what need not be written back any more, so that reads show what the
/// disk holds. The kernel may have failed to write some of it, and have told that to a daemon that
/// was killed: it tells no other one, and the data would be there until it is not (S5).
///
/// The kernel begins to write back the rest first, which takes minutes where much of it is to be
/// written in many places of a slow disk. So this waits only for some time, and returns whether it
/// is done; a thread goes on.
fn forget_cached(file: &File) -> bool {
    // The thread may outlive the use of the image, so it does not share the lock.
    let own = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let Ok(mut own) = own.or_else(|_| file.try_clone()) else {
        return false;
    };
    within(FORGET_LIMIT, move || {
        let end = own.seek(SeekFrom::End(0)).unwrap_or(0);
        let part = (end / FORGETS_MAX)
            .max(1)
            .next_multiple_of(FORGET_BYTES_MIN);
        let mut start = 0;
        // One after the other, so that the process can be killed in between.
        while start < end {
            let _ = fadvise(&own, start, NonZeroU64::new(part), Advice::DontNeed);
            start += part;
        }
        // What reaches over the end of a part stayed. Where it cannot be done there is nothing in
        // the cache, or nothing to be done about it.
        let _ = fadvise(&own, 0, None, Advice::DontNeed);
    })
}

/// Has a thread do the work, and waits for its end, but not longer than this. Returns whether the
/// work is done.
fn within(limit: Duration, work: impl FnOnce() + Send + 'static) -> bool {
    let (working, ended) = channel::<()>();
    let thread = thread::Builder::new().name("forgets".into());
    let started = thread.spawn(move || {
        work();
        drop(working);
    });
    started.is_ok() && ended.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected)
}

impl Fault {
    /// Whether another process uses the image.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self, Self::Used(_) | Self::NotShared(_) | Self::Claimed)
    }
}

/// Opens `path` and checks that it is an image.
fn open_image(
    path: &Path,
    options: OpenOptions,
    directory: Option<&Path>,
) -> Result<(File, Metadata), Fault> {
    let not_open = |error: io::Error| match directory {
        Some(_) if is_outside(&error) => Fault::Outside,
        _ => Fault::Open(errno(&error)),
    };
    let open = |flags| match directory {
        Some(directory) => open_beneath(directory, path, flags),
        None => {
            let open = || rustix::fs::open(path, flags, Mode::empty());
            Ok(File::from(rustix::io::retry_on_intr(open)?))
        }
    };
    // Checked before opening, because opening alone can block (a FIFO) or have effects (a tape).
    let found = match directory {
        Some(_) => open(OFlags::PATH | OFlags::CLOEXEC).and_then(|place| place.metadata()),
        None => std::fs::metadata(path),
    };
    check_kind(&found.map_err(not_open)?)?;
    let file = open_file(open, options).map_err(|error| {
        if options.direct && error.raw_os_error() == Some(libc::EINVAL) {
            Fault::NoDirectIo
        } else {
            not_open(error)
        }
    })?;
    // Checked again, because the path may name another file by now.
    let metadata = file.metadata().map_err(failed(Call::Fstat))?;
    check_kind(&metadata)?;
    Ok((file, metadata))
}

fn open_file(open: impl Fn(OFlags) -> io::Result<File>, options: OpenOptions) -> io::Result<File> {
    let mut flags = OFlags::CLOEXEC;
    flags |= if options.read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    if options.direct {
        flags |= OFlags::DIRECT;
    }
    // Keeping the access time of an image up to date costs every read. Only its owner may turn
    // that off.
    match open(flags | OFlags::NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(flags),
        opened => opened,
    }
}

fn check_kind(metadata: &Metadata) -> Result<(), Fault> {
    let file_type = metadata.file_type();
    if file_type.is_file() || file_type.is_block_device() {
        return Ok(());
    }
    Err(Fault::NotAnImage(Kind::of(file_type)))
}

impl Kind {
    pub(in crate::replica) fn of(file_type: FileType) -> Self {
        if file_type.is_dir() {
            Self::Directory
        } else if file_type.is_symlink() {
            Self::SymbolicLink
        } else if file_type.is_block_device() {
            Self::BlockDevice
        } else if file_type.is_char_device() {
            Self::CharacterDevice
        } else if file_type.is_fifo() {
            Self::Fifo
        } else if file_type.is_socket() {
            Self::Socket
        } else {
            Self::Other
        }
    }

    pub(in crate::replica) fn name(self) -> &'static str {
        match self {
            Self::Directory => "a directory",
            Self::SymbolicLink => "a symbolic link",
            Self::BlockDevice => "a block device",
            Self::CharacterDevice => "a character device",
            Self::Fifo => "a FIFO",
            Self::Socket => "a socket",
            Self::Other => "a special file",
        }
    }
}

impl Call {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fstat => "fstat",
            Self::BlkRoGet => "BLKROGET",
            Self::Lseek => "lseek",
        }
    }
}

fn failed(call: Call) -> impl FnOnce(io::Error) -> Fault {
    move |error| Fault::Examine(call, errno(&error))
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn what_takes_long_to_write_back_is_not_waited_for() {
        assert!(within(Duration::from_secs(60), || ()));
        let (go_on, waits) = channel::<()>();
        let began = Instant::now();
        assert!(!within(Duration::from_millis(10), move || {
            let _ = waits.recv();
        }));
        assert!(began.elapsed() < Duration::from_secs(30));
        drop(go_on);
    }
}
