//! Making an image longer while it is served.
//!
//! What is between its old end and the new one reads as zeroes then, on any image: replicas agree
//! there without having been compared. A file gets a hole. A block device has its size from
//! elsewhere, and must have the new one already; what it holds behind the old end is anybody's
//! guess, so it is written over.
//!
//! The image is opened anew for that. The kernel tells of data that it could not write back once
//! for each open file, and what it has to tell is for the guest's next flush, not for ours.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt as _;

use super::file::ReplicaFile;
use super::zero::{Way, Ways, ZEROES, ZEROES_BYTES};
use crate::common::message::Reason;
use crate::common::{Errno, ReplicaIndex};

/// So much of a block device is zeroed at a time: seconds, on a slow disk.
const ZEROED_BYTES: u64 = 64 << 20;

/// Why an image is not made longer. Each displays as part of a line.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    /// The system refused something.
    #[error("{operation}: {}", Reason(.source))]
    System {
        /// What was asked of it.
        operation: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The size of a file is not that of the disk.
    #[error(
        "it has {bytes} bytes, the disk {disk_bytes}, so something else has changed it; if it may be cut, use truncate --size={disk_bytes}"
    )]
    NotOfTheDisk {
        /// Its size.
        bytes: u64,
        /// That of the disk.
        disk_bytes: u64,
    },
    /// The size of a block device is not the new one.
    #[error(
        "it is a block device of {bytes} bytes; give it the new size, {wanted_bytes} bytes, first"
    )]
    DeviceSize {
        /// Its size.
        bytes: u64,
        /// The new size.
        wanted_bytes: u64,
    },
    /// Nothing has come of it in time.
    #[error("it does not answer")]
    Silent,
}

fn system(operation: &'static str) -> impl FnOnce(io::Error) -> GrowError {
    move |source| GrowError::System { operation, source }
}

/// What is done next, which takes its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Some more zeroes are written.
    Zeroing,
    /// All is being made durable, and with it what the page cache holds of the guest.
    Syncing,
}

/// An image that is being made longer.
#[derive(Debug)]
pub struct Growth {
    file: File,
    is_block_device: bool,
    from_bytes: u64,
    to_bytes: u64,
    is_changed: bool,
}

impl Growth {
    /// To make `replica` longer, from the size of the disk.
    ///
    /// # Errors
    /// If the image cannot be opened once more.
    pub fn new(replica: &ReplicaFile, from_bytes: u64, to_bytes: u64) -> Result<Self, GrowError> {
        // The path may lead elsewhere by now.
        let same = format!("/proc/self/fd/{}", replica.file.as_raw_fd());
        let file = OpenOptions::new().read(true).write(true).open(same);
        Ok(Self {
            file: file.map_err(system("open"))?,
            is_block_device: replica.is_block_device,
            from_bytes,
            to_bytes,
            is_changed: false,
        })
    }

    /// Makes it longer, durably. Tells before what takes its time.
    ///
    /// # Errors
    /// If it cannot be done; then [`Self::undo`] is due.
    pub fn extend(&mut self, mut next: impl FnMut(Step)) -> Result<(), GrowError> {
        let bytes = self.end().map_err(system("lseek"))?;
        if self.is_block_device {
            if bytes != self.to_bytes {
                let wanted_bytes = self.to_bytes;
                return Err(GrowError::DeviceSize {
                    bytes,
                    wanted_bytes,
                });
            }
            self.zero(&mut next).map_err(system("writing zeroes"))?;
        } else {
            if bytes != self.from_bytes {
                let disk_bytes = self.from_bytes;
                return Err(GrowError::NotOfTheDisk { bytes, disk_bytes });
            }
            let grown = self.file.set_len(self.to_bytes);
            self.is_changed = grown.is_ok() || self.end().is_ok_and(|end| end != self.from_bytes);
            grown.map_err(system("truncate"))?;
        }
        next(Step::Syncing);
        self.file.sync_all().map_err(system("fsync"))
    }

    /// Gives the image its old size back.
    ///
    /// # Errors
    /// If that cannot be done.
    pub fn undo(&mut self) -> Result<(), GrowError> {
        if !self.is_changed {
            return Ok(());
        }
        self.file
            .set_len(self.from_bytes)
            .map_err(system("truncate"))?;
        self.is_changed = false;
        self.file.sync_all().map_err(system("fsync"))
    }

    /// For a block device stat says 0; its end says the size of either kind.
    fn end(&self) -> io::Result<u64> {
        (&self.file).seek(SeekFrom::End(0))
    }

    fn zero(&self, next: &mut impl FnMut(Step)) -> io::Result<()> {
        let mut ways = Ways::new(1);
        let mut from = self.from_bytes;
        while from < self.to_bytes {
            let bytes = ZEROED_BYTES.min(self.to_bytes - from);
            next(Step::Zeroing);
            zero_piece(&self.file, from, bytes, &mut ways)?;
            from += bytes;
        }
        Ok(())
    }
}

/// Makes a piece of a file zeroes in the best way that it has.
fn zero_piece(file: &File, from: u64, bytes: u64, ways: &mut Ways) -> io::Result<()> {
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
    let Some(mode) = way.fallocate_mode() else {
        return write_zeroes(file, from, bytes);
    };
    let too_far = |_| io::Error::from_raw_os_error(libc::EFBIG);
    let (offset, len) = (
        libc::off_t::try_from(from).map_err(too_far)?,
        libc::off_t::try_from(bytes).map_err(too_far)?,
    );
    // SAFETY: takes an open descriptor and numbers.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, len) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
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
