//! Grows an image while the disk serves from it.
//!
//! The new part of every image reads as zeroes, so replicas agree there without a comparison. What
//! an image already has behind the old end is unknown, so it is zeroed: a block device, which must
//! have the new size, and a file that is larger than the disk. A file gets a hole for the rest.
//!
//! The image is open once more for this. Linux reports a writeback error once per open file
//! description, and an error of the guest's data must reach the guest's next flush, not this sync.
//! This sync may report one that a flush has reported before: then growing fails, and succeeds when
//! it is tried again.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;

use rustix::fs::fallocate;

use super::file::ReplicaFile;
use super::zero::{Way, Ways, ZEROES, ZEROES_BYTES};
use crate::common::message::Reason;
use crate::common::{Errno, ReplicaIndex};

/// Bytes of a block device that are zeroed at a time: seconds on a slow disk.
const ZEROED_BYTES: u64 = 64 << 20;

/// Why an image does not grow. Each displays as part of a line.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// A system call failed.
    #[error("{operation}: {}", Reason(.source))]
    System {
        /// The system call.
        operation: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// A file is shorter than the disk.
    #[error(
        "it has {bytes} bytes, the disk {disk_bytes}: another program has cut it; replace it by a \
         new image first"
    )]
    Cut {
        /// The size of the file.
        bytes: u64,
        /// The size of the disk.
        disk_bytes: u64,
    },
    /// A block device does not have the new size.
    #[error(
        "it is a block device of {bytes} bytes; give it the new size, {wanted_bytes} bytes, first"
    )]
    DeviceSize {
        /// The size of the device.
        bytes: u64,
        /// The new size of the disk.
        wanted_bytes: u64,
    },
    /// The image did not answer in time.
    #[error("it does not answer")]
    Silent,
}

fn system(operation: &'static str) -> impl FnOnce(io::Error) -> GrowError {
    move |source| GrowError::System { operation, source }
}

/// A step that may take long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Zeroing the next part.
    Zeroing,
    /// Making everything durable, which includes the guest's data in the page cache.
    Syncing,
}

/// An image that grows.
#[derive(Debug)]
pub struct Growth {
    file: File,
    is_block_device: bool,
    from_bytes: u64,
    to_bytes: u64,
    /// The size of the file before, if that has changed.
    before_bytes: Option<u64>,
}

impl Growth {
    /// Prepares to grow `replica` from the size of the disk, `from_bytes`.
    ///
    /// # Errors
    /// If the image could not be opened once more, or there is no descriptor for it.
    pub fn new(replica: &ReplicaFile, from_bytes: u64, to_bytes: u64) -> Result<Self, GrowError> {
        let file = match &replica.opened_again {
            Ok(file) => file.try_clone(),
            Err(errno) => Err(io::Error::from_raw_os_error(*errno)),
        };
        Ok(Self {
            file: file.map_err(system("open"))?,
            is_block_device: replica.is_block_device,
            from_bytes,
            to_bytes,
            before_bytes: None,
        })
    }

    /// Grows the image durably. Calls `begins` before each step that may take long.
    ///
    /// # Errors
    /// If that fails; call [`Self::undo`] then.
    pub fn extend(&mut self, mut begins: impl FnMut(Step)) -> Result<(), GrowError> {
        let bytes = self.end().map_err(system("lseek"))?;
        if self.is_block_device {
            if bytes < self.to_bytes {
                let wanted_bytes = self.to_bytes;
                return Err(GrowError::DeviceSize {
                    bytes,
                    wanted_bytes,
                });
            }
        } else if bytes < self.from_bytes {
            let disk_bytes = self.from_bytes;
            return Err(GrowError::Cut { bytes, disk_bytes });
        }
        self.zero(bytes.min(self.to_bytes), &mut begins)
            .map_err(system("writing zeroes"))?;
        if bytes < self.to_bytes {
            let grown = self.file.set_len(self.to_bytes);
            let is_changed = grown.is_ok() || self.end().is_ok_and(|end| end != bytes);
            self.before_bytes = is_changed.then_some(bytes);
            grown.map_err(system("truncate"))?;
        }
        begins(Step::Syncing);
        self.file.sync_all().map_err(system("fsync"))
    }

    /// Restores the old size of the image.
    ///
    /// # Errors
    /// If that fails.
    pub fn undo(&mut self) -> Result<(), GrowError> {
        let Some(before_bytes) = self.before_bytes else {
            return Ok(());
        };
        self.file
            .set_len(before_bytes)
            .map_err(system("truncate"))?;
        self.before_bytes = None;
        self.file.sync_all().map_err(system("fsync"))
    }

    /// The size. stat reports 0 for a block device; the end of the file is right for both kinds.
    fn end(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    /// Zeroes from the old end of the disk to `end`.
    fn zero(&self, end: u64, begins: &mut impl FnMut(Step)) -> io::Result<()> {
        let mut ways = Ways::new(1);
        let mut from = self.from_bytes;
        while from < end {
            let bytes = ZEROED_BYTES.min(end - from);
            begins(Step::Zeroing);
            zero_range(&self.file, from, bytes, &mut ways)?;
            from += bytes;
        }
        Ok(())
    }
}

/// Zeroes a range of a file in the best way that it supports.
fn zero_range(file: &File, from: u64, bytes: u64, ways: &mut Ways) -> io::Result<()> {
    let (this, unmap) = (ReplicaIndex(0), true);
    let mut way = ways.best(this, unmap);
    loop {
        let error = match zero_by(file, from, bytes, way) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let errno = Errno(error.raw_os_error().unwrap_or(libc::EIO));
        way = ways.after(this, unmap, way, errno).ok_or(error)?;
    }
}

fn zero_by(file: &File, from: u64, bytes: u64, way: Way) -> io::Result<()> {
    match way.fallocate_flags() {
        Some(flags) => Ok(fallocate(file, flags, from, bytes)?),
        None => write_zeroes(file, from, bytes),
    }
}

fn write_zeroes(file: &File, from: u64, bytes: u64) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        let count =
            usize::try_from(bytes - done).map_or(ZEROES_BYTES, |left| left.min(ZEROES_BYTES));
        file.write_all_at(&ZEROES.0[..count], from + done)?;
        done += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_leaves_zeroes_and_nothing_else_changed() {
        for way in [Way::PunchHole, Way::ZeroRange, Way::Write] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&[7; 3 << 20], 0).unwrap();
            match zero_by(&file, 4096, 2 << 20, way) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => continue,
                done => done.unwrap(),
            }
            let mut bytes = vec![0; 3 << 20];
            file.read_exact_at(&mut bytes, 0).unwrap();
            let (zeroed, after) = bytes[4096..].split_at(2 << 20);
            assert!(zeroed.iter().all(|byte| *byte == 0), "{way:?}");
            assert!(
                bytes[..4096].iter().chain(after).all(|byte| *byte == 7),
                "{way:?}"
            );
        }
    }
}
