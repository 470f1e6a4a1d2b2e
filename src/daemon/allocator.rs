//! The memory allocator of the C library.

#![allow(unsafe_code)]

/// Has all threads allocate from one arena. With one for each, as the GNU C library has it, what
/// one worker has freed stays its own, and the process grows to the sum of what its workers have
/// ever used (O10). Workers keep free buffers, so that they rarely wait for each other here.
pub(super) fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes two numbers; this thread is the only one.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
