//! Contents of records on their way between the daemon and the process that opens them: files in
//! memory, since a message is shorter. What is zero takes none.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, memfd_create};

use super::RECORD_BYTES_MAX;

/// A block of zeroes is a hole.
const BLOCK_BYTES: usize = 4096;

/// A file of `length` zeroes.
pub(super) fn zeroes(length: u64) -> io::Result<File> {
    let file = File::from(memfd_create("record", MemfdFlags::CLOEXEC)?);
    file.set_len(length)?;
    Ok(file)
}

/// A file that holds `bytes`.
pub(super) fn file_of(bytes: &[u8]) -> io::Result<File> {
    let file = zeroes(bytes.len() as u64)?;
    put(&file, bytes, 0)?;
    Ok(file)
}

/// Writes `bytes` where there are only zeroes.
pub(super) fn put(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    for (block, at) in bytes
        .chunks(BLOCK_BYTES)
        .zip((offset..).step_by(BLOCK_BYTES))
    {
        if block.iter().any(|byte| *byte != 0) {
            file.write_all_at(block, at)?;
        }
    }
    Ok(())
}

/// What such a file holds.
pub(super) fn bytes_of(file: &File) -> io::Result<Vec<u8>> {
    part_of(file, 0, usize::MAX)
}

/// The same, from `offset` on and at most `length` bytes.
pub(super) fn part_of(file: &File, offset: u64, length: usize) -> io::Result<Vec<u8>> {
    let size = file.metadata()?.len();
    if size > RECORD_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let left = usize::try_from(size.saturating_sub(offset)).map_err(io::Error::other)?;
    let mut bytes = vec![0; left.min(length)];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn zeroes_take_no_memory() {
        let mut bytes = vec![0; 1 << 20];
        bytes[5000] = 1;
        bytes[(1 << 20) - 1] = 2;
        let file = file_of(&bytes).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, 2 * 4096);
        assert!(bytes_of(&file).unwrap() == bytes);
        assert_eq!(part_of(&file, 4999, 3).unwrap(), [0, 1, 0]);
        assert_eq!(part_of(&file, (1 << 20) - 2, 9).unwrap(), [0, 2]);
        assert!(part_of(&file, 2 << 20, 9).unwrap().is_empty());
    }
}
