//! An eventfd, by which other threads wake a thread that waits for several descriptors.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{EventfdFlags, eventfd};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// Makes the eventfd readable.
    pub(crate) fn signal(&self) {
        // Fails only if the counter would overflow, and then it is readable already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    /// Makes the eventfd unreadable until the next signal. Returns the signals since the last time.
    pub(crate) fn clear(&self) -> u64 {
        let mut count = [0; 8];
        // Fails if there was no signal.
        let _ = rustix::io::read(&self.0, &mut count);
        u64::from_ne_bytes(count)
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Wake {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
