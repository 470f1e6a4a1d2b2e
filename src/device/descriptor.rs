//! Checks of the descriptors that a frontend passes: a worker must never wait for one, or be woken
//! by one for nothing.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

/// Sets O_NONBLOCK. The flag is the file's, so whoever else has it sees it too.
pub(super) fn set_nonblocking(file: &File) -> io::Result<()> {
    let on: libc::c_int = 1;
    // SAFETY: FIONBIO reads one integer, which outlives the call; the descriptor is open.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::FIONBIO, &raw const on) };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Refuses what no event can come through. A file is always readable, so a worker that waits for
/// kicks from one would never sleep; and writing to one can take for ever whatever its flags say,
/// if it is on a network or another process serves it.
pub(super) fn check_is_no_file(descriptor: &File) -> io::Result<()> {
    let kind = descriptor.metadata()?.file_type();
    if kind.is_file() || kind.is_dir() || kind.is_block_device() {
        return Err(io::Error::other("a file in place of an eventfd"));
    }
    Ok(())
}

/// Refuses what the system does not tell of when there is something to read.
pub(super) fn check_can_be_waited_for(descriptor: &File) -> io::Result<()> {
    check_is_no_file(descriptor)?;
    Epoll::new()?.ctl(
        ControlOperation::Add,
        descriptor.as_raw_fd(),
        EpollEvent::default(),
    )
}
