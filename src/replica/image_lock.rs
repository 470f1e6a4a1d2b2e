//! Image locking in the way of QEMU's file driver, so that QEMU's tools and this program respect
//! each other.
//!
//! QEMU tells other processes what it does with a raw image by shared locks on single bytes of the
//! file: byte 100 + n says "I use permission n", byte 200 + n says "I do not let others use
//! permission n". Nobody ever takes an exclusive lock; a conflict is found by asking whether an
//! exclusive lock on the opposite byte would be refused. The bytes are only names: the data under
//! them is neither read nor written, and they need not exist.
//!
//! Invariants:
//! - The locks are open file description locks: they belong to the open file, not to the process,
//!   so two opens within one process conflict as two processes do, and closing another descriptor
//!   of the same image does not drop them. They end when the last descriptor of the open file is
//!   closed.
//! - Own bytes are locked before those of others are looked at. Of two that start at once at least
//!   one sees the other; both may refuse, never do both go on.
//! - A refused lock leaves no byte locked.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// First of the bytes that say which permissions are used.
const USED_BASE: libc::off_t = 100;
/// First of the bytes that say which permissions are denied to others.
const UNSHARED_BASE: libc::off_t = 200;

/// What a user of an image may do with it. The discriminant is the offset of its byte from either
/// base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Permission {
    /// Reads see what was written last (QEMU's BLK_PERM_CONSISTENT_READ).
    ConsistentRead = 0,
    /// Change data (BLK_PERM_WRITE).
    Write = 1,
    /// Write back the data that is there already (BLK_PERM_WRITE_UNCHANGED).
    WriteUnchanged = 2,
    /// Change the size (BLK_PERM_RESIZE).
    Resize = 3,
}

impl Permission {
    /// How many bytes there are from each base. QEMU 6.1 and older had a fifth, which no writer of
    /// raw images depends on.
    const COUNT: libc::off_t = 4;

    fn used_byte(self) -> libc::off_t {
        USED_BASE + libc::off_t::from(self as u8)
    }

    fn unshared_byte(self) -> libc::off_t {
        UNSHARED_BASE + libc::off_t::from(self as u8)
    }

    /// The permission as the end of "in use by another process, which has it open for ...".
    fn purpose(self) -> &'static str {
        match self {
            Self::ConsistentRead => "reading",
            Self::Write => "writing",
            Self::WriteUnchanged => "rewriting of unchanged data",
            Self::Resize => "resizing",
        }
    }
}

/// How an image is to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read, beside other readers.
    ReadOnly,
    /// Read and written, by us alone.
    ReadWrite,
}

impl Access {
    fn used(self) -> &'static [Permission] {
        match self {
            Self::ReadOnly => &[Permission::ConsistentRead],
            Self::ReadWrite => &[Permission::ConsistentRead, Permission::Write],
        }
    }

    /// What others must not do meanwhile. These are the bytes QEMU's quorum driver locks on its
    /// children: a foreign write or resize of one replica would make it differ from the others,
    /// even of a disk that is only read.
    fn unshared(self) -> &'static [Permission] {
        &[Permission::Write, Permission::Resize]
    }
}

/// What became of a lock that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Locking {
    /// The image is locked until its file is closed.
    Held,
    /// The file system has no such locks: the image is used without, as QEMU does with
    /// `locking=auto`.
    Unsupported,
}

/// Why an image can not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process uses the image in a way that we exclude.
    #[error("in use by another process, which has it open for {}", .0.purpose())]
    Used(Permission),
    /// Another process excludes what we would do with the image.
    #[error("in use by another process, which does not share it for {}", .0.purpose())]
    NotShared(Permission),
    /// The lock call itself failed.
    #[error("not lockable: {0}")]
    Io(#[source] io::Error),
}

impl LockError {
    /// Whether the image is in use elsewhere, as opposed to a failing lock call.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Used(_) | Self::NotShared(_))
    }
}

/// Locks an open image for `access`, without waiting.
pub fn lock(file: &File, access: Access) -> Result<Locking, LockError> {
    let result = match apply(file, access) {
        Ok(()) => check(file, access),
        Err(error) => Err(error),
    };
    match result {
        Ok(()) => Ok(Locking::Held),
        Err(LockError::Io(error)) if means_unsupported(&error) => Ok(Locking::Unsupported),
        Err(error) => {
            unlock(file);
            Err(error)
        }
    }
}

/// Says what we do: shared locks on our bytes.
fn apply(file: &File, access: Access) -> Result<(), LockError> {
    // Only a program that does not follow QEMU's rules takes one of the bytes exclusively; whatever
    // it means by that, the image is not free.
    for &permission in access.used() {
        lock_byte(
            file,
            permission.used_byte(),
            LockError::NotShared(permission),
        )?;
    }
    for &permission in access.unshared() {
        lock_byte(
            file,
            permission.unshared_byte(),
            LockError::Used(permission),
        )?;
    }
    Ok(())
}

/// Looks whether what others do goes with what we do.
fn check(file: &File, access: Access) -> Result<(), LockError> {
    for &permission in access.used() {
        if is_locked_elsewhere(file, permission.unshared_byte()).map_err(LockError::Io)? {
            return Err(LockError::NotShared(permission));
        }
    }
    for &permission in access.unshared() {
        if is_locked_elsewhere(file, permission.used_byte()).map_err(LockError::Io)? {
            return Err(LockError::Used(permission));
        }
    }
    Ok(())
}

fn lock_byte(file: &File, byte: libc::off_t, refused: LockError) -> Result<(), LockError> {
    let mut region = region(libc::F_RDLCK, byte, 1);
    match lock_call(file, libc::F_OFD_SETLK, &mut region) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(refused)
        }
        Err(error) => Err(LockError::Io(error)),
    }
}

fn is_locked_elsewhere(file: &File, byte: libc::off_t) -> io::Result<bool> {
    let mut region = region(libc::F_WRLCK, byte, 1);
    lock_call(file, libc::F_OFD_GETLK, &mut region)?;
    Ok(libc::c_int::from(region.l_type) != libc::F_UNLCK)
}

/// Gives all bytes back. A failure leaves them to the close of the file, which follows anyway.
pub fn unlock(file: &File) {
    let length = UNSHARED_BASE + Permission::COUNT - USED_BASE;
    let mut region = region(libc::F_UNLCK, USED_BASE, length);
    let _ = lock_call(file, libc::F_OFD_SETLK, &mut region);
}

/// Whether the error says that there are no such locks on this file, not that this one failed.
/// ENOLCK is what a network file system answers that is mounted without its lock service.
fn means_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOLCK)
    )
}

fn region(lock_type: libc::c_int, start: libc::off_t, length: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(lock_type).expect("lock types are 0, 1 and 2"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("SEEK_SET is 0"),
        l_start: start,
        l_len: length,
        // The kernel refuses an open file description lock with a process in it.
        l_pid: 0,
    }
}

fn lock_call(file: &File, command: libc::c_int, region: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open as long as `file` is borrowed, and `region` is a valid
        // flock that the kernel reads and, for F_OFD_GETLK, writes before the call returns.
        let status = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *region) };
        if status == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::path::Path;

    fn open(path: &Path) -> File {
        OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    }

    fn image() -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        image
    }

    #[test]
    fn a_writer_excludes_writers_and_readers_that_want_no_writer() {
        let image = image();
        let (first, second) = (open(image.path()), open(image.path()));
        assert_eq!(lock(&first, Access::ReadWrite).unwrap(), Locking::Held);
        for access in [Access::ReadWrite, Access::ReadOnly] {
            let error = lock(&second, access).unwrap_err();
            assert!(error.is_busy(), "{error}");
        }
        drop(first);
        assert_eq!(lock(&second, Access::ReadWrite).unwrap(), Locking::Held);
    }

    #[test]
    fn readers_share_an_image_and_exclude_a_writer() {
        let image = image();
        let (first, second, third) = (open(image.path()), open(image.path()), open(image.path()));
        assert_eq!(lock(&first, Access::ReadOnly).unwrap(), Locking::Held);
        assert_eq!(lock(&second, Access::ReadOnly).unwrap(), Locking::Held);
        assert!(matches!(
            lock(&third, Access::ReadWrite).unwrap_err(),
            LockError::NotShared(Permission::Write)
        ));
    }

    #[test]
    fn a_refused_lock_leaves_nothing_locked() {
        let image = image();
        let (first, second, third) = (open(image.path()), open(image.path()), open(image.path()));
        assert_eq!(lock(&first, Access::ReadOnly).unwrap(), Locking::Held);
        assert!(lock(&second, Access::ReadWrite).unwrap_err().is_busy());
        assert_eq!(lock(&third, Access::ReadOnly).unwrap(), Locking::Held);
        drop((first, third));
        let fourth = open(image.path());
        assert_eq!(lock(&fourth, Access::ReadWrite).unwrap(), Locking::Held);
    }

    #[test]
    fn the_bytes_are_those_of_qemu() {
        let image = image();
        let (ours, other) = (open(image.path()), open(image.path()));
        assert_eq!(lock(&ours, Access::ReadWrite).unwrap(), Locking::Held);
        let locked: Vec<libc::off_t> = (0..300)
            .filter(|&byte| is_locked_elsewhere(&other, byte).unwrap())
            .collect();
        assert_eq!(locked, [100, 101, 201, 203]);
    }

    #[test]
    fn an_exclusive_lock_of_a_stranger_means_busy() {
        let image = image();
        let (ours, stranger) = (open(image.path()), open(image.path()));
        let mut whole = region(libc::F_WRLCK, 0, 0);
        lock_call(&stranger, libc::F_OFD_SETLK, &mut whole).unwrap();
        assert!(lock(&ours, Access::ReadOnly).unwrap_err().is_busy());
    }

    #[test]
    fn a_file_system_without_locks_is_told_from_a_failing_one() {
        for errno in [libc::ENOSYS, libc::EINVAL, libc::EOPNOTSUPP, libc::ENOLCK] {
            assert!(means_unsupported(&io::Error::from_raw_os_error(errno)));
        }
        assert!(!means_unsupported(&io::Error::from_raw_os_error(libc::EIO)));
    }
}
