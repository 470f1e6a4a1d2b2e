//! An image outside of a disk that is served: for a look at it while it may be in use, or locked.

#![forbid(unsafe_code)]

use std::fs::File;
use std::path::{Path, PathBuf};

use super::error::with_path;
use super::examine::{self, Image};
use super::{ImageIdentity, ImageStamp, OpenError, OpenOptions};
use crate::replica::image_lock;
use crate::replica::record_file::{Keeper, RecordAccess};

/// An image that was opened for reading. It is not locked yet.
#[derive(Debug)]
pub struct OfflineImage {
    /// The size of the image.
    pub size_bytes: u64,
    /// Its stamp. `None` for a block device.
    pub stamp: Option<ImageStamp>,
    /// Another process has it open for writing, as far as its locks say.
    pub is_in_use: bool,
    /// The open file.
    pub file: File,
    path: PathBuf,
    identity: ImageIdentity,
    /// Holds the claim of a block device.
    claim: Option<File>,
}

/// What other processes may do with an image that is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Read it.
    Readers,
    /// Nothing.
    None,
}

/// Opens the image at `path` for reading. The calling thread waits as long as the file system does
/// not answer.
///
/// # Errors
/// If it cannot be opened, or is none.
pub fn open_offline(path: &Path) -> Result<OfflineImage, OpenError> {
    let Image { file, facts } = with_path(Ok(Image::open(path, options(true), None)), path, true)?;
    let metadata = file.metadata().ok();
    Ok(OfflineImage {
        size_bytes: facts.size_bytes,
        stamp: metadata.and_then(|found| ImageStamp::of(&found)),
        is_in_use: image_lock::is_in_use(&file),
        file,
        path: path.to_owned(),
        identity: facts.identity,
        claim: None,
    })
}

impl OfflineImage {
    /// Locks it as long as it is open, without waiting for another process.
    ///
    /// # Errors
    /// If another process uses it.
    pub fn lock(&mut self, sharing: Sharing) -> Result<(), OpenError> {
        let read_only = sharing == Sharing::Readers;
        let claimed = examine::claim(&self.file, options(read_only));
        self.claim = with_path(Ok(claimed), &self.path, read_only)?;
        let locked = examine::lock(&self.file, options(read_only));
        // From now on no other process changes it.
        self.stamp = with_path(Ok(locked), &self.path, read_only)?.stamp;
        Ok(())
    }

    /// The way to its record, which is not written.
    pub fn record(&self) -> RecordAccess {
        let keeper = Keeper::new(&self.path, self.identity, true);
        RecordAccess::new(self.path.clone(), None, keeper)
    }
}

fn options(read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        direct: false,
        raw_anyway: true,
        block_bytes: 512,
    }
}
