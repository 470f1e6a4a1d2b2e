//! What shows that another program has modified an image: its size and the time of its last change.

#![forbid(unsafe_code)]

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;

use serde::{Deserialize, Serialize};

/// Size and time of the last change of a regular file. A block device has no such time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStamp {
    /// Its size.
    pub bytes: u64,
    /// When it was last changed, in nanoseconds since 1970.
    pub modified_ns: i64,
}

impl ImageStamp {
    pub(super) fn of(metadata: &Metadata) -> Option<Self> {
        const NANOSECONDS: i64 = 1_000_000_000;
        let seconds = metadata.mtime().saturating_mul(NANOSECONDS);
        metadata.is_file().then_some(Self {
            bytes: metadata.len(),
            modified_ns: seconds.saturating_add(metadata.mtime_nsec()),
        })
    }

    /// The stamp of an image to which nothing is written any more, and makes it durable with all
    /// data. A flush alone does not: fdatasync leaves the time of the last change in memory, and
    /// after a power failure an older one would be on the disk, as if another program had
    /// modified the image. Waits as long as the file system does not answer.
    ///
    /// # Errors
    /// If the image cannot be synced or examined.
    pub fn synced(image: &File) -> io::Result<Option<Self>> {
        image.sync_all()?;
        Ok(Self::of(&image.metadata()?))
    }
}
