//! Whether an image holds data: a resync would overwrite it, or images without any would outvote it
//! (O4).

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

/// How long to look before a resync overwrites everything. An image that is in use has data near
/// its start.
const LIMIT: Duration = Duration::from_secs(10);

/// How long to look at each start before it takes samples, and how long these may take. Holes cost
/// nothing.
const GLANCE_LIMIT: Duration = Duration::from_millis(500);
const SAMPLES_LIMIT: Duration = Duration::from_secs(2);

/// In how many places it looks then, evenly spread over the rest and at the end.
const PLACES: u64 = 128;

/// Bytes to read in each place.
const PLACE_BYTES: usize = 4096;

/// What an image holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::replica) enum Contents {
    /// Zeroes and holes.
    Nothing,
    /// Zeroes and holes in all places that were looked at.
    Zeroes,
    /// Something that is not zero, at or soon after this byte.
    Data(u64),
    /// An error, or too much to read: this is the byte up to which there are zeroes.
    Unknown(u64),
}

impl Contents {
    /// Reads the first `size_bytes` bytes, except for holes, until there is data.
    pub(super) fn of(file: &File, size_bytes: u64) -> Self {
        let until = Instant::now() + LIMIT;
        Self::read(file, size_bytes, |at, failed| {
            !failed && (at == 0 || Instant::now() < until)
        })
    }

    /// The same in less time: where there is too much to read, it reads samples of the rest. Goes
    /// on behind what it cannot read.
    pub(super) fn at_a_glance(file: &File, size_bytes: u64) -> Self {
        let (start, mut any_failed) = (Instant::now(), false);
        let contents = Self::read(file, size_bytes, |_, failed| {
            any_failed |= failed;
            start.elapsed() < GLANCE_LIMIT
        });
        match contents {
            Self::Unknown(at) if !any_failed => Self::sampled(file, at, size_bytes),
            known => known,
        }
    }

    /// What the places from `from` on hold, and the last one.
    fn sampled(file: &File, from: u64, size_bytes: u64) -> Self {
        let until = Instant::now() + SAMPLES_LIMIT;
        let mut memory = Vec::new();
        let place = page_aligned(&mut memory, PLACE_BYTES);
        let (first, last) = (
            from / PLACE_BYTES as u64,
            (size_bytes - 1) / PLACE_BYTES as u64,
        );
        for index in 0..=PLACES {
            let at = (first + (last - first) * index / PLACES) * PLACE_BYTES as u64;
            let read = file.read_at(place, at);
            let Some(bytes) = read.ok().filter(|_| Instant::now() < until) else {
                return Self::Unknown(from);
            };
            if !is_zero(&place[..within(bytes, at, size_bytes)]) {
                return Self::Data(at);
            }
        }
        Self::Zeroes
    }

    /// Reads until there is data. `goes_on` is asked after each chunk without any, with where that
    /// was and whether it could not be read.
    fn read(file: &File, size_bytes: u64, mut goes_on: impl FnMut(u64, bool) -> bool) -> Self {
        let mut memory = Vec::new();
        let chunk = page_aligned(&mut memory, CHUNK_BYTES);
        let mut at = 0;
        let mut failed_at = None;
        while at < size_bytes {
            at = match seek(file, SeekFrom::Data(at)) {
                // Direct I/O needs an aligned offset.
                Ok(data) => at.max(data / CHUNK_BYTES as u64 * CHUNK_BYTES as u64),
                // No data behind this.
                Err(Errno::NXIO) => break,
                // A file system, or a device, that knows no holes.
                Err(_) => at,
            };
            if at >= size_bytes {
                break;
            }
            let read = file.read_at(chunk, at).ok().filter(|bytes| *bytes > 0);
            let bytes = read.unwrap_or(CHUNK_BYTES);
            if read.is_some() && !is_zero(&chunk[..within(bytes, at, size_bytes)]) {
                return Self::Data(at);
            }
            if read.is_none() {
                failed_at.get_or_insert(at);
            }
            if !goes_on(at, read.is_none()) {
                return Self::Unknown(failed_at.unwrap_or(at));
            }
            at += bytes as u64;
        }
        failed_at.map_or(Self::Nothing, Self::Unknown)
    }
}

/// How many of `bytes` bytes from `at` on belong to the disk.
fn within(bytes: usize, at: u64, size_bytes: u64) -> usize {
    usize::try_from(size_bytes - at).map_or(bytes, |left| bytes.min(left))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
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
        assert_eq!(Contents::at_a_glance(&file, size - 1), Contents::Nothing);
        assert_eq!(Contents::at_a_glance(&file, size), Contents::Data(99 << 20));
    }

    #[test]
    fn samples_reach_from_the_first_place_to_the_last() {
        let file = tempfile::tempfile().unwrap();
        let size = (100 << 20) + 512;
        file.set_len(size).unwrap();
        let sampled = |from| Contents::sampled(&file, from, size);
        assert_eq!(sampled(10 << 20), Contents::Zeroes);
        file.write_all_at(&[1; 2 << 20], 50 << 20).unwrap();
        assert!(matches!(sampled(10 << 20), Contents::Data(at) if at >> 20 >= 50));
        assert_eq!(sampled(60 << 20), Contents::Zeroes);
        file.write_all_at(&[1], size - 1).unwrap();
        assert_eq!(sampled(60 << 20), Contents::Data(size - 512));
        // Behind the end of the disk.
        assert_eq!(
            Contents::sampled(&file, 60 << 20, size - 1),
            Contents::Zeroes
        );
    }
}
