//! Contents of records on their way between the daemon and the process that opens them: files in
//! memory, since a message is shorter.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{MemfdFlags, memfd_create};

use super::RECORD_BYTES_MAX;

/// A file that holds `bytes`.
pub(super) fn file_of(bytes: &[u8]) -> io::Result<File> {
    let file = File::from(memfd_create("record", MemfdFlags::CLOEXEC)?);
    file.write_all_at(bytes, 0)?;
    Ok(file)
}

/// What such a file holds.
pub(super) fn bytes_of(file: &File) -> io::Result<Vec<u8>> {
    let length = file.metadata()?.len();
    if length > RECORD_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let length = usize::try_from(length).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
