//! The signals of the process.

/// Ignores SIGPIPE, as Rust's runtime does. libFuzzer's `main` does not start that.
pub fn ignore_sigpipe() {
    // SAFETY: no handler is set, so no code runs at an arbitrary point.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}
