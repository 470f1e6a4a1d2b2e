//! Whether an image holds data that a resync would overwrite.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::alignment::page_aligned;

/// Bytes to read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// How long to look. An image that is in use has data near its start.
const LIMIT: Duration = Duration::from_secs(10);

/// What an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Contents {
    /// Zeroes and holes.
    Nothing,
    /// Something that is not zero, at or soon after this byte.
    Data(u64),
    /// An error, or too much to read: this is the byte up to which there are zeroes.
    Unknown(u64),
}

impl Contents {
    /// Reads the first `size_bytes` bytes, except for holes, until there is data.
    pub(super) fn of(file: &File, size_bytes: u64) -> Self {
        let until = Instant::now() + LIMIT;
        let mut memory = Vec::new();
        let chunk = page_aligned(&mut memory, CHUNK_BYTES);
        let mut at = 0;
        while at < size_bytes {
            at = match seek(file, SeekFrom::Data(at)) {
                // Direct I/O needs an aligned offset.
                Ok(data) => at.max(data / CHUNK_BYTES as u64 * CHUNK_BYTES as u64),
                // No data behind this.
                Err(Errno::NXIO) => return Self::Nothing,
                // A file system, or a device, that knows no holes.
                Err(_) => at,
            };
            if at >= size_bytes {
                break;
            }
            let Ok(bytes) = file.read_at(chunk, at) else {
                return Self::Unknown(at);
            };
            let within = usize::try_from(size_bytes - at).map_or(bytes, |left| bytes.min(left));
            if chunk[..within].iter().any(|byte| *byte != 0) {
                return Self::Data(at);
            }
            if bytes == 0 || Instant::now() >= until {
                return Self::Unknown(at);
            }
            at += bytes as u64;
        }
        Self::Nothing
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_and_holes_are_nothing() {
        let file = tempfile::tempfile().unwrap();
        let size = 100 << 20;
        file.set_len(size).unwrap();
        assert_eq!(Contents::of(&file, size), Contents::Nothing);
        file.write_all_at(&[0; 4096], 50 << 20).unwrap();
        file.write_all_at(&[0; 4096], size - 4096).unwrap();
        assert_eq!(Contents::of(&file, size), Contents::Nothing);
        // The last byte, and one behind the end of the disk.
        file.write_all_at(&[1], size - 1).unwrap();
        assert_eq!(Contents::of(&file, size - 1), Contents::Nothing);
        assert_eq!(Contents::of(&file, size), Contents::Data(99 << 20));
        assert_eq!(Contents::of(&file, size + 1), Contents::Data(99 << 20));
    }
}
