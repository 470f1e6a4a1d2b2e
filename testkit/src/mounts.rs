//! Mounts that end with a test.

use std::io;

/// From now on the calling thread, and the threads and processes that it starts, have mounts of
/// their own. They end with the last of these: a test that is killed leaves none behind.
///
/// # Panics
/// Without the right to mount (root).
pub fn separate() {
    // SAFETY: the call takes no memory. The thread no longer shares its working directory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(result, 0, "unshare: {}", io::Error::last_os_error());
    let none = std::ptr::null();
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the path is a C string that outlives the call, and the others may be null.
    let result = unsafe { libc::mount(none, c"/".as_ptr(), none, flags, none.cast()) };
    assert_eq!(result, 0, "mount: {}", io::Error::last_os_error());
}
