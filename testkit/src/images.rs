//! Image files for a voted disk, ways to corrupt them under it, and a seeded source of randomness.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::SeekFrom;

/// Bytes in a sector.
pub const SECTOR_BYTES: u64 = 512;

/// The unit of direct I/O on any file system here.
pub const BLOCK_BYTES: u64 = BLOCK_LENGTH as u64;
const BLOCK_LENGTH: usize = 4096;

/// Sectors in a block.
pub const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;

/// Creates `count` sparse images of `size_bytes` in `directory`: `0.raw`, `1.raw`, ...
pub fn create_images(directory: &Path, count: usize, size_bytes: u64) -> Vec<PathBuf> {
    (0..count)
        .map(|index| {
            let path = directory.join(format!("{index}.raw"));
            let image = File::create_new(&path).expect("creating an image");
            image.set_len(size_bytes).expect("sizing an image");
            path
        })
        .collect()
}

/// Changes every byte of these sectors of an image by xor with `mask`, past the page cache, so that
/// it can be done under a daemon that is using the image. A block (4 KiB) with a sector in the
/// range is read and written as a whole. A write to its other sectors at that moment may be lost.
pub fn corrupt_sectors(image: &Path, sectors: Range<u64>, mask: u8) {
    #[repr(align(4096))]
    struct Block([u8; BLOCK_LENGTH]);

    assert_ne!(mask, 0, "a mask of zero corrupts nothing");
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(image)
    };
    let file = open(libc::O_DIRECT)
        .or_else(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => open(0), /* a file system without direct I/O has no other copy */
            // either
            _ => Err(error),
        })
        .expect("opening an image");
    let mut sector = sectors.start;
    while sector < sectors.end {
        let block = sector - sector % BLOCK_SECTORS;
        let end = sectors.end.min(block + BLOCK_SECTORS);
        let mut bytes = Block([0; BLOCK_LENGTH]);
        file.read_exact_at(&mut bytes.0, block * SECTOR_BYTES)
            .expect("reading an image");
        let from = usize::try_from((sector - block) * SECTOR_BYTES).expect("within a block");
        let to = usize::try_from((end - block) * SECTOR_BYTES).expect("within a block");
        for byte in &mut bytes.0[from..to] {
            *byte ^= mask;
        }
        file.write_all_at(&bytes.0, block * SECTOR_BYTES)
            .expect("writing an image");
        sector = end;
    }
    file.sync_all().expect("syncing an image");
}

/// The first sector in which two images differ, also by one being shorter.
pub fn first_difference(left: &Path, right: &Path) -> io::Result<Option<u64>> {
    const READ_BYTES: usize = 1 << 20;
    let mut left = File::open(left)?;
    let mut right = File::open(right)?;
    let (mut left_bytes, mut right_bytes) = (Vec::new(), Vec::new());
    let mut offset_sectors = 0;
    loop {
        for (file, bytes) in [(&mut left, &mut left_bytes), (&mut right, &mut right_bytes)] {
            bytes.clear();
            file.take(READ_BYTES as u64).read_to_end(bytes)?;
        }
        if left_bytes != right_bytes {
            let same = left_bytes
                .iter()
                .zip(&right_bytes)
                .take_while(|(left, right)| left == right)
                .count();
            return Ok(Some(offset_sectors + same as u64 / SECTOR_BYTES));
        }
        if left_bytes.is_empty() {
            return Ok(None);
        }
        offset_sectors += left_bytes.len() as u64 / SECTOR_BYTES;
    }
}

/// Are all these images byte-identical?
pub fn are_identical(images: &[PathBuf]) -> bool {
    images.windows(2).all(|pair| {
        first_difference(&pair[0], &pair[1])
            .expect("comparing images")
            .is_none()
    })
}

/// The ranges of a sparse file that are not holes, in bytes, in order.
pub fn data_ranges(image: &Path) -> Vec<Range<u64>> {
    let file = File::open(image).expect("opening an image");
    let seek = |to| match rustix::fs::seek(&file, to) {
        Ok(offset) => Some(offset),
        Err(rustix::io::Errno::NXIO) => None, // nothing but a hole from there on
        Err(error) => panic!("looking for holes in {}: {error}", image.display()),
    };
    let mut ranges: Vec<Range<u64>> = Vec::new();
    while let Some(start) = seek(SeekFrom::Data(ranges.last().map_or(0, |last| last.end))) {
        let end = seek(SeekFrom::Hole(start)).expect("a hole at the end");
        ranges.push(start..end);
    }
    ranges
}

/// The space that a sparse file takes in its file system, with the metadata for it.
pub fn allocated_bytes(image: impl AsRef<Path>) -> u64 {
    fs::metadata(image).expect("looking at an image").blocks() * 512
}

/// A small seeded generator of random numbers (SplitMix64).
pub struct Random(u64);

impl Random {
    /// One that is the same each time.
    pub fn from_seed(seed: u64) -> Self {
        Self(seed)
    }

    /// One with the seed of the environment variable `QUORUM_BLK_TEST_SEED`, or else a new one. The
    /// seed is printed, so that a failed run can be repeated.
    pub fn from_environment() -> Self {
        let seed = match env::var("QUORUM_BLK_TEST_SEED") {
            Ok(text) => text.parse().expect("QUORUM_BLK_TEST_SEED is a number"),
            Err(_) => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                u64::from(now.expect("a clock past 1970").subsec_nanos())
            }
        };
        println!("random seed: QUORUM_BLK_TEST_SEED={seed}");
        Self(seed)
    }

    /// Another generator, for another thread.
    pub fn fork(&mut self) -> Self {
        Self(self.number())
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `range`, which is not empty.
    pub fn within(&mut self, range: Range<u64>) -> u64 {
        range.start + self.number() % (range.end - range.start)
    }

    /// A mask for [`corrupt_sectors`]: any byte but zero.
    pub fn mask(&mut self) -> u8 {
        u8::try_from(self.within(1..256)).expect("below 256")
    }
}
