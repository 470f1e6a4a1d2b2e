//! Descriptors that a process inherits. `rustix` has no call that closes those it has not opened.

#![allow(unsafe_code)]

use std::os::fd::RawFd;

/// Descriptors that a process has at most, if the system does not limit them: `fs.nr_open`.
const RAISED_MAX: RawFd = 1 << 20;

/// Closes all descriptors but the standard ones.
///
/// # Safety
/// Nothing in this process may own one of them.
pub(super) unsafe fn close_inherited() {
    // SAFETY: the caller says that nothing owns the descriptors.
    unsafe { close_range(libc::STDERR_FILENO + 1, RawFd::MAX) }
}

/// Closes the descriptors `first..=last`, if there are any. Uses no heap.
///
/// # Safety
/// Nothing in this process, or in a task with files of its own, may use one of them.
pub(in crate::replica) unsafe fn close_range(first: RawFd, last: RawFd) {
    if first > last {
        return;
    }
    // SAFETY: the calls take no pointer, and the caller says that nothing uses the descriptors.
    unsafe {
        if libc::close_range(first.cast_unsigned(), last.cast_unsigned(), 0) == 0 {
            return;
        }
        // Linux before 5.9, or a container that does not know the call.
        let end = libc::sysconf(libc::_SC_OPEN_MAX);
        let end = RawFd::try_from(end).unwrap_or(RAISED_MAX).min(RAISED_MAX);
        for descriptor in first..=last.min(end) {
            libc::close(descriptor);
        }
    }
}
