//! Checks of the descriptors that a frontend passes: a worker must never wait for one, or be woken
//! by one without an event.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;

use rustix::event::epoll;

/// Rejects what no event can come through. A file is always readable, so a worker that waits for
/// kicks from one would never sleep. What lies in a socket unread may take long to close.
pub(super) fn check_is_no_file(descriptor: &File) -> io::Result<()> {
    let kind = descriptor.metadata()?.file_type();
    if kind.is_file() || kind.is_dir() || kind.is_block_device() || kind.is_socket() {
        return Err(io::Error::other("a file in place of an eventfd"));
    }
    Ok(())
}

/// Rejects what the system cannot poll.
pub(super) fn check_can_be_waited_for(descriptor: &File) -> io::Result<()> {
    check_is_no_file(descriptor)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let data = epoll::EventData::new_u64(0);
    Ok(epoll::add(
        &epoll,
        descriptor,
        data,
        epoll::EventFlags::empty(),
    )?)
}
