//! Descriptors that frontends cannot use up.
//!
//! The kernel gives each new descriptor the lowest number that is free. So one with a number near
//! the limit says that the others are in use, and what a frontend passes then is refused. The
//! numbers above are left to the operator: to the monitor, the events, the metrics and images.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// The first number that frontends do not get.
static FIRST: AtomicI32 = AtomicI32::new(RawFd::MAX);

/// Reserves the descriptors from `first` on.
pub fn reserve_from(first: RawFd) {
    FIRST.store(first, Ordering::Relaxed);
}

/// Whether a descriptor of a frontend has a number that is reserved: it is to be closed.
pub fn is_reserved(descriptor: &impl AsFd) -> bool {
    descriptor.as_fd().as_raw_fd() >= FIRST.load(Ordering::Relaxed)
}
