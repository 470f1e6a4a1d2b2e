//! Reads an image from its beginning to its end, and makes its digest.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc::SyncSender;

use rustix::fs::{Advice, fadvise};
use sha2::{Digest as _, Sha256};

use crate::limits::VERIFY_CHUNK_BYTES;

/// What is read by itself after a read of a chunk has failed.
const BLOCK_BYTES: usize = 4096;
/// Sectors of it.
const BLOCK_SECTORS: usize = BLOCK_BYTES / 512;

/// A part of an image: [`VERIFY_CHUNK_BYTES`], zeroes where nothing could be read.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) bytes: Vec<u8>,
    /// For each block of it, whether it cannot be read or lies behind the end of the image. Empty:
    /// none.
    unreadable: Vec<bool>,
}

impl Chunk {
    /// Whether a sector, by its place in the chunk, could be read.
    pub(super) fn is_readable(&self, sector: usize) -> bool {
        let block = self.unreadable.get(sector / BLOCK_SECTORS);
        !block.copied().unwrap_or_default()
    }

    /// Whether all of it could be read.
    pub(super) fn is_whole(&self) -> bool {
        self.unreadable.is_empty()
    }
}

/// An image that is read.
pub(super) struct Reading<'a> {
    file: &'a File,
    size_bytes: u64,
}

impl<'a> Reading<'a> {
    pub(super) fn new(file: &'a File, size_bytes: u64) -> Self {
        Self { file, size_bytes }
    }

    /// Sends all chunks up to `end`. Returns the digest of the image, if all of it could be read.
    pub(super) fn run(&self, end: u64, chunks: &SyncSender<Chunk>) -> Option<String> {
        let mut digest = Some(Sha256::new());
        let mut at = 0;
        // It is only a hint.
        let _ = fadvise(self.file, 0, None, Advice::Sequential);
        while at < end {
            let chunk = self.chunk(at);
            let used = self
                .size_bytes
                .saturating_sub(at)
                .min(VERIFY_CHUNK_BYTES as u64);
            let used = usize::try_from(used).unwrap_or(VERIFY_CHUNK_BYTES);
            if (0..used.div_ceil(BLOCK_BYTES))
                .any(|block| !chunk.is_readable(block * BLOCK_SECTORS))
            {
                digest = None;
            }
            if let Some(digest) = &mut digest {
                digest.update(&chunk.bytes[..used]);
            }
            // What other programs need must not leave the page cache for this.
            let length = NonZeroU64::new(VERIFY_CHUNK_BYTES as u64);
            let _ = fadvise(self.file, at, length, Advice::DontNeed);
            if chunks.send(chunk).is_err() {
                return None;
            }
            at += VERIFY_CHUNK_BYTES as u64;
        }
        let digest = digest?.finalize();
        Some(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn chunk(&self, at: u64) -> Chunk {
        let mut bytes = vec![0; VERIFY_CHUNK_BYTES];
        if self.read(&mut bytes, at) {
            let unreadable = Vec::new();
            return Chunk { bytes, unreadable };
        }
        let blocks = bytes.chunks_mut(BLOCK_BYTES).zip(0..);
        let unreadable = blocks.map(|(block, number)| {
            let at = at + number * BLOCK_BYTES as u64;
            // The image may end within a block.
            let used = self.size_bytes.saturating_sub(at).min(BLOCK_BYTES as u64);
            let used = usize::try_from(used).unwrap_or_default();
            used == 0 || !self.read(&mut block[..used], at)
        });
        let unreadable = unreadable.collect();
        Chunk { bytes, unreadable }
    }

    /// Reads all of a buffer. If that fails, or the image ends before that, it has zeroes.
    fn read(&self, bytes: &mut [u8], at: u64) -> bool {
        if at + bytes.len() as u64 > self.size_bytes {
            return false;
        }
        let is_read = self.file.read_exact_at(bytes, at).is_ok();
        if !is_read {
            bytes.fill(0);
        }
        is_read
    }
}
