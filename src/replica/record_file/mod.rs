//! The files in which the records of replicas are kept. What a record says is of no concern here:
//! it is bytes, at most [`RECORD_BYTES_MAX`] of them.
//!
//! Where the record of an image is (`place.rs`):
//! - That of a regular file is beside it, with `.quorum` after its name. If the path of the image
//!   leads through symbolic links, it is beside the file at their end: a record says what *these
//!   bytes* have missed, and must not serve for other bytes that a link leads to later.
//! - That of a block device is in the state directory, under a name of the device that survives a
//!   reboot.
//! - With `--state-dir DIR`, the record of a regular file is in DIR if it cannot be beside the
//!   file: its directory is read-only, for example. It is looked for in both places. Two records of
//!   one image are an error, since one of them does not know what the other one does.
//!
//! Invariants:
//! - A record is there with all its bytes and its whole space, or not at all, at any time and after
//!   a power failure: it gets its name when it is complete and synced. A full file system refuses
//!   it when it is made, not later.
//! - No file is overwritten or deleted to make a record. What was in the place of one that is
//!   replaced stays there under another name.
//! - What [`RecordFile::file`] has written is durable: it is open with O_DSYNC.
//! - With [`Opening::Apart`] no thread of the daemon waits for a file system that does not answer,
//!   except in [`RecordFile::write`].
//!
//! A record has no lock of its own. The image is locked before its record is opened
//! (`image_lock.rs`, and the claim of a block device), and no two images have one record: names
//! beside different files differ, and so do the names of different devices.
//!
//! [`Opening::Apart`]: super::file::Opening::Apart

#![forbid(unsafe_code)]

mod access;
mod device_name;
mod error;
mod keeper;
mod kernel_name;
mod make;
mod memory;
mod place;

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::access::RecordAccess;
pub use self::error::RecordError;
pub(in crate::replica) use self::keeper::{Keeper, RecordAnswer, RecordOrder};
use crate::limits::RECORD_BYTES_MAX;

/// The state directory if no other one is given: that of the packaged service.
const USUAL_STATE_DIRECTORY: &str = "/var/lib/quorum-blk";

/// The directory for records that cannot be beside their images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StateDirectory {
    /// That of `--state-dir`. It must exist: the records are not found in another one.
    Given(#[serde(with = "path_in_hex")] PathBuf),
    /// That of the service manager, else the usual one. It is made if it does not exist and a
    /// block device needs it.
    Usual(#[serde(with = "path_in_hex")] PathBuf),
}

impl StateDirectory {
    /// The directory without `--state-dir`: `of_service` is the variable STATE_DIRECTORY, in which
    /// systemd passes one or several paths.
    pub fn usual(of_service: Option<&OsStr>) -> Self {
        let paths = of_service.map(OsStr::as_bytes).unwrap_or_default();
        let first = paths.split(|&byte| byte == b':').next().unwrap_or_default();
        Self::Usual(match first {
            [] => PathBuf::from(USUAL_STATE_DIRECTORY),
            path => PathBuf::from(OsStr::from_bytes(path)),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Given(path) | Self::Usual(path) => path,
        }
    }
}

/// The open record of an image.
#[derive(Debug)]
pub struct RecordFile {
    /// Where it is, for messages.
    pub path: PathBuf,
    /// The open file. Writes are durable when they return. Not writable for a read-only disk.
    pub file: File,
    /// Its size. It never changes.
    pub size_bytes: u64,
}

impl RecordFile {
    /// Writes, and returns when that is durable. Waits as long as the file system does not answer;
    /// [`RecordAccess::write`] does not.
    ///
    /// # Errors
    /// If the write fails, or would make the file longer.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        check_range(offset, bytes.len(), self.size_bytes)?;
        self.file.write_all_at(bytes, offset)
    }
}

/// What a record holds. Most of it is zeroes, which take no memory.
#[derive(Debug)]
pub struct RecordContent {
    image: PathBuf,
    /// In memory. Blocks that cannot be read are zeroes here.
    file: File,
    /// How many bytes cannot be read.
    pub unreadable_bytes: u64,
}

impl RecordContent {
    /// What it holds from `offset` on, up to its end and at most `length` bytes.
    ///
    /// # Errors
    /// If the process that has read it has sent something invalid.
    pub fn part(&self, offset: u64, length: usize) -> Result<Vec<u8>, RecordError> {
        let part = memory::part_of(&self.file, offset, length);
        part.map_err(|source| {
            let image = self.image.clone();
            RecordError::Opener { image, source }
        })
    }
}

/// Checks that a write of `length` bytes stays within the file.
fn check_range(offset: u64, length: usize, size_bytes: u64) -> io::Result<()> {
    let end = u64::try_from(length).ok();
    let end = end.and_then(|length| offset.checked_add(length));
    if end.is_none_or(|end| end > size_bytes) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(())
}

/// A path in JSON, which has no place for bytes that are not UTF-8.
pub(in crate::replica) mod path_in_hex {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    use std::path::{Path, PathBuf};

    use serde::de::Error;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(in crate::replica) fn serialize<S: Serializer>(
        path: &Path,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let bytes = path.as_os_str().as_bytes();
        let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        to.serialize_str(&digits)
    }

    pub(in crate::replica) fn deserialize<'d, D: Deserializer<'d>>(
        from: D,
    ) -> Result<PathBuf, D::Error> {
        let digits = String::deserialize(from)?;
        let byte = |pair: &[u8]| {
            let pair = std::str::from_utf8(pair).ok()?;
            u8::from_str_radix(pair, 16).ok()
        };
        let bytes: Option<Vec<u8>> = digits.as_bytes().chunks(2).map(byte).collect();
        let bytes = bytes.ok_or_else(|| D::Error::custom("invalid digits"))?;
        Ok(PathBuf::from(OsString::from_vec(bytes)))
    }
}

#[cfg(test)]
mod apart_tests;
#[cfg(test)]
mod tests;
