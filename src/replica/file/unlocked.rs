//! An image that may be in use: nothing of it is locked or changed.

#![forbid(unsafe_code)]

use std::path::Path;

use super::error::with_path;
use super::examine::Image;
use super::{ImageStamp, OpenError, OpenOptions};
use crate::replica::image_lock;
use crate::replica::record_file::{Keeper, RecordAccess};

/// An image that was opened, without locks.
#[derive(Debug)]
pub struct Unlocked {
    /// The size of the image.
    pub size_bytes: u64,
    /// Its stamp. `None` for a block device.
    pub stamp: Option<ImageStamp>,
    /// Another process has it open for writing, as far as its locks say.
    pub is_in_use: bool,
    /// The way to its record, which it does not write.
    pub records: RecordAccess,
}

/// Opens the image at `path` for a moment. The calling thread waits as long as the file system does
/// not answer.
///
/// # Errors
/// If it cannot be opened for reading, or is none.
pub fn open_unlocked(path: &Path) -> Result<Unlocked, OpenError> {
    let options = OpenOptions {
        read_only: true,
        direct: false,
        raw_anyway: true,
        block_bytes: 512,
    };
    let Image { file, facts } = with_path(Ok(Image::open(path, options)), path, true)?;
    let keeper = Keeper::new(path, facts.identity, true);
    Ok(Unlocked {
        size_bytes: facts.size_bytes,
        stamp: file
            .metadata()
            .ok()
            .and_then(|found| ImageStamp::of(&found)),
        is_in_use: image_lock::is_in_use(&file),
        records: RecordAccess::new(path.to_owned(), None, keeper),
    })
}
