//! Descriptors that a process inherits. `rustix` has no call that closes those it has not opened.

#![allow(unsafe_code)]

use std::io;

/// Closes all descriptors but the standard ones.
///
/// # Errors
/// If the system call fails.
///
/// # Safety
/// Nothing in this process may own one of them.
pub(super) unsafe fn close_inherited() -> io::Result<()> {
    let first = libc::c_uint::try_from(libc::STDERR_FILENO + 1).expect("descriptors are positive");
    // SAFETY: the call takes no pointer, and the caller says that nothing owns the descriptors.
    match unsafe { libc::close_range(first, libc::c_uint::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
