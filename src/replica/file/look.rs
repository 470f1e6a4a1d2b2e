//! A rough look at an image: samples, so that images of different disks are noticed (S8).
//!
//! It reads a bounded number of blocks, whatever the size of the image, and none any more when its
//! time is over.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, seek};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::alignment::page_aligned;
use super::contents::Contents;

/// Bytes of a sample. The last one of a disk may be shorter.
pub(super) const SAMPLE_BYTES: u64 = 4096;

/// Bytes at the start and at the end of a disk of which all blocks are samples: partition tables
/// with their copies, and the superblocks of file systems are there.
const ENDS_BYTES: u64 = 1 << 20;

/// How long an image is read for its samples.
const LIMIT: Duration = Duration::from_millis(500);

/// What to look at. Sizes and places are in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::replica) enum Look {
    /// Whether the first `size_bytes` hold data.
    Contents { size_bytes: u64 },
    /// Where there is data at or behind these places.
    Data { size_bytes: u64, from: Vec<u64> },
    /// The samples at both ends, and in these places.
    Samples { size_bytes: u64, places: Vec<u64> },
}

/// What was seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::replica) enum Seen {
    Contents(Contents),
    /// Places of samples.
    Data(Vec<u64>),
    /// Both ends first, then the places.
    Samples(Vec<Sample>),
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::replica) enum Sample {
    Zeroes,
    /// Its digest.
    Data(u64),
    /// It cannot be read, or not in time.
    Unknown,
}

/// Looks. Waits as long as the file system does not answer.
pub(in crate::replica) fn look(file: &File, at: Look) -> Seen {
    match at {
        Look::Contents { size_bytes } => Seen::Contents(Contents::at_a_glance(file, size_bytes)),
        Look::Data { size_bytes, from } => Seen::Data(data(file, size_bytes, &from)),
        Look::Samples { size_bytes, places } => Seen::Samples(samples(file, size_bytes, &places)),
    }
}

/// Where the samples at both ends begin.
pub(super) fn ends(size_bytes: u64) -> impl Iterator<Item = u64> {
    let blocks = size_bytes.div_ceil(SAMPLE_BYTES);
    let of_end = ENDS_BYTES / SAMPLE_BYTES;
    let last = blocks.saturating_sub(of_end).max(of_end.min(blocks));
    let blocks = (0..of_end.min(blocks)).chain(last..blocks);
    blocks.map(|block| block * SAMPLE_BYTES)
}

fn data(file: &File, size_bytes: u64, from: &[u64]) -> Vec<u64> {
    let found = from.iter().filter_map(|place| {
        // A file system that knows no holes has data everywhere.
        let data = match seek(file, SeekFrom::Data(*place)) {
            Err(rustix::io::Errno::NXIO) => return None,
            found => found.unwrap_or(*place),
        };
        let place = data / SAMPLE_BYTES * SAMPLE_BYTES;
        (place < size_bytes).then_some(place)
    });
    found.collect()
}

fn samples(file: &File, size_bytes: u64, places: &[u64]) -> Vec<Sample> {
    let until = Instant::now() + LIMIT;
    let mut memory = Vec::new();
    let block = page_aligned(&mut memory, usize::try_from(SAMPLE_BYTES).expect("small"));
    let places = ends(size_bytes).chain(places.iter().copied());
    let mut sample = |place: u64| {
        let left = size_bytes.checked_sub(place).filter(|left| *left > 0)?;
        let length = usize::try_from(left.min(SAMPLE_BYTES)).expect("small");
        let late = Instant::now() > until;
        // The bytes behind the end of the disk, if there are any, do not count.
        let read = (!late).then(|| file.read_at(block, place).ok()).flatten();
        let bytes = &block[..read.filter(|read| *read >= length).map(|_| length)?];
        Some(match bytes.iter().all(|byte| *byte == 0) {
            true => Sample::Zeroes,
            false => Sample::Data(digest(bytes)),
        })
    };
    places
        .map(|place| sample(place).unwrap_or(Sample::Unknown))
        .collect()
}

fn digest(bytes: &[u8]) -> u64 {
    let digest = Sha256::digest(bytes);
    let first = digest.first_chunk().expect("a digest is longer");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = (100 << 20) + 512;

    #[test]
    fn the_ends_are_two_megabytes_at_most() {
        let ends: Vec<u64> = ends(SIZE).collect();
        assert_eq!(ends.len(), 512);
        assert_eq!((ends[0], ends[255]), (0, (1 << 20) - 4096));
        assert_eq!(ends[511], 100 << 20, "the last one is short");
        for size in [512, 4096, 4608, 1 << 20, (1 << 20) + 512, 2 << 20] {
            let ends: Vec<u64> = super::ends(size).collect();
            let blocks: Vec<u64> = (0..size.div_ceil(4096)).map(|block| block * 4096).collect();
            assert_eq!(ends, blocks, "{size}");
        }
    }

    #[test]
    fn samples_show_what_is_on_the_disk_and_nothing_behind_it() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE + 4096).unwrap();
        file.write_all_at(&[1; 512], 4096).unwrap();
        file.write_all_at(&[2; 4096], 50 << 20).unwrap();
        file.write_all_at(&[3; 512], SIZE).unwrap();
        let places = vec![50 << 20, 60 << 20, SIZE, SIZE + 4096];
        let samples = samples(&file, SIZE, &places);
        assert_eq!(samples.len(), 512 + 4);
        let is_data = |sample: &Sample| matches!(sample, Sample::Data(_));
        let data: Vec<usize> = (0..samples.len())
            .filter(|index| is_data(&samples[*index]))
            .collect();
        assert_eq!(data, [1, 512]);
        assert_ne!(samples[1], samples[512]);
        assert_eq!(samples[514..], [Sample::Unknown; 2]);
    }

    #[test]
    fn data_is_found_behind_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        let from = [0, 30 << 20, 60 << 20];
        let found = data(&file, SIZE, &from);
        // A file system without holes has data everywhere.
        assert!(found.is_empty() || found == from);
        file.write_all_at(&[2; 4096], 50 << 20).unwrap();
        let found = data(&file, SIZE, &from);
        assert!(found == [50 << 20, 50 << 20] || found == from, "{found:?}");
        assert_eq!(
            data(&file, 50 << 20, &[40 << 20])
                .first()
                .copied()
                .filter(|p| *p > 45 << 20),
            None
        );
    }
}
