//! Image locks as QEMU's file driver takes them, so that QEMU's tools and this program respect each
//! other.
//!
//! QEMU announces its use of a raw image by shared locks on single bytes of the file: byte 100 + n
//! says "I use permission n", byte 200 + n says "I do not let others use permission n". All locks
//! are shared; a program finds a conflict by asking whether an exclusive lock on the opposite byte
//! would be refused. The bytes are only names: their data is neither read nor written, and they
//! need not exist.
//!
//! Invariants:
//! - The locks are open file description locks (`ofd_lock.rs`), as QEMU's are.
//! - A program locks its own bytes before it checks those of others. Of two programs that start at
//!   once at least one sees the other: both may refuse, but never do both continue.
//! - A refused lock leaves no byte locked.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use super::ofd_lock::{self, is_locked_elsewhere};
use crate::common::message::Reason;

/// The first of the bytes for permissions in use.
const USED_BASE: libc::off_t = 100;
/// The first of the bytes for permissions denied to others.
const UNSHARED_BASE: libc::off_t = 200;

/// A use of an image. The discriminant is the offset of its byte from either base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum Permission {
    /// Read the data that was written last (QEMU's BLK_PERM_CONSISTENT_READ).
    ConsistentRead = 0,
    /// Change data (BLK_PERM_WRITE).
    Write = 1,
    /// Write the data that is already there (BLK_PERM_WRITE_UNCHANGED).
    WriteUnchanged = 2,
    /// Change the size (BLK_PERM_RESIZE).
    Resize = 3,
}

impl Permission {
    /// The number of bytes from each base. QEMU 6.1 and older had a fifth, which writers of raw
    /// images do not depend on.
    const COUNT: libc::off_t = 4;

    fn used_byte(self) -> libc::off_t {
        USED_BASE + libc::off_t::from(self as u8)
    }

    fn unshared_byte(self) -> libc::off_t {
        UNSHARED_BASE + libc::off_t::from(self as u8)
    }

    /// Completes "in use by another process, which has it open for ...".
    fn purpose(self) -> &'static str {
        match self {
            Self::ConsistentRead => "reading",
            Self::Write => "writing",
            Self::WriteUnchanged => "rewriting of unchanged data",
            Self::Resize => "resizing",
        }
    }
}

/// How this program uses an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only; other readers are allowed.
    ReadOnly,
    /// Read and write; no other process may use the image.
    ReadWrite,
}

impl Access {
    fn used(self) -> &'static [Permission] {
        match self {
            Self::ReadOnly => &[Permission::ConsistentRead],
            Self::ReadWrite => &[Permission::ConsistentRead, Permission::Write],
        }
    }

    /// Uses denied to others. QEMU's quorum driver denies its children the same: a foreign write or
    /// resize of one replica would make it differ from the others, even on a read-only disk.
    fn unshared(self) -> &'static [Permission] {
        &[Permission::Write, Permission::Resize]
    }
}

/// The result of a lock that was not refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[must_use]
pub enum Locking {
    /// The image is locked until its file is closed.
    Held,
    /// The file system has no such locks. The image is used without a lock, as QEMU uses it with
    /// `locking=auto`.
    Unsupported,
}

/// Why an image cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has a use of the image that this program denies.
    #[error("in use by another process, which has it open for {}", .0.purpose())]
    Used(Permission),
    /// Another process denies a use that this program needs.
    #[error("in use by another process, which does not share it for {}", .0.purpose())]
    NotShared(Permission),
    /// The lock call itself failed.
    #[error("not lockable: {}", Reason(.0))]
    Io(#[source] io::Error),
}

impl LockError {
    /// Whether another process uses the image. If not, the lock call itself failed.
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

/// Whether another program has the image open for writing, as far as its locks say.
pub fn is_in_use(file: &File) -> bool {
    is_locked_elsewhere(file, Permission::Write.used_byte()).unwrap_or_default()
}

/// Announces this program's use by shared locks on its bytes.
fn apply(file: &File, access: Access) -> Result<(), LockError> {
    // A program that ignores QEMU's rules may hold an exclusive lock on a byte. The image is in use
    // then, whatever that program means by it.
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

/// Checks that no other program's use conflicts.
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
    match ofd_lock::lock_shared(file, byte) {
        Ok(()) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(refused)
        }
        Err(error) => Err(LockError::Io(error)),
    }
}

/// Releases all bytes. If that fails, closing the file releases them.
pub fn unlock(file: &File) {
    let length = UNSHARED_BASE + Permission::COUNT - USED_BASE;
    let _ = ofd_lock::unlock(file, USED_BASE, length);
}

/// Whether the error means that this file has no such locks at all. ENOLCK comes from a network
/// file system that is mounted without its lock service.
fn means_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOLCK)
    )
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
    fn a_writer_excludes_other_writers_and_readers() {
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
    fn an_image_is_in_use_where_another_program_writes() {
        let image = image();
        let ours = File::open(image.path()).unwrap();
        let other = open(image.path());
        for (access, expected) in [(Access::ReadOnly, false), (Access::ReadWrite, true)] {
            assert_eq!(lock(&other, access).unwrap(), Locking::Held);
            assert_eq!(is_in_use(&ours), expected);
            unlock(&other);
        }
        assert!(!is_in_use(&ours));
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
    fn an_exclusive_lock_of_another_program_means_busy() {
        let image = image();
        let (ours, other) = (open(image.path()), open(image.path()));
        ofd_lock::lock_all(&other).unwrap();
        assert!(lock(&ours, Access::ReadOnly).unwrap_err().is_busy());
    }

    #[test]
    fn a_file_system_without_locks_differs_from_a_failing_one() {
        for errno in [libc::ENOSYS, libc::EINVAL, libc::EOPNOTSUPP, libc::ENOLCK] {
            assert!(means_unsupported(&io::Error::from_raw_os_error(errno)));
        }
        assert!(!means_unsupported(&io::Error::from_raw_os_error(libc::EIO)));
    }
}
