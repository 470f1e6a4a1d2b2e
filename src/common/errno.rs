//! The errors of the kernel.

use std::fmt;

use super::message::Reason;

/// An errno value, positive, as the kernel gave it for an operation on a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// Whether there is no space left, on the device or for the user.
    pub fn is_no_space(self) -> bool {
        matches!(self.0, libc::ENOSPC | libc::EDQUOT)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Reason(&std::io::Error::from_raw_os_error(self.0)).fmt(f)
    }
}
