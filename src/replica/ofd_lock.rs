//! Open file description locks on single bytes of a file (fcntl(2), F_OFD_SETLK).
//!
//! They belong to the open file, not to the process: two opens within one process conflict as two
//! processes do, and closing another descriptor of the same image does not drop them. They end
//! when the last descriptor of the open file is closed. `rustix` has process locks only, so this
//! file makes the system call itself.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes a shared lock on one byte, without waiting.
///
/// # Errors
/// EAGAIN or EACCES if another open file holds an exclusive lock there.
pub(super) fn lock_shared(file: &File, byte: libc::off_t) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, &mut region(libc::F_RDLCK, byte, 1))
}

/// Whether an exclusive lock on the byte would be refused.
pub(super) fn is_locked_elsewhere(file: &File, byte: libc::off_t) -> io::Result<bool> {
    let mut region = region(libc::F_WRLCK, byte, 1);
    call(file, libc::F_OFD_GETLK, &mut region)?;
    Ok(libc::c_int::from(region.l_type) != libc::F_UNLCK)
}

/// Releases all locks of this open file from `start` on.
pub(super) fn unlock(file: &File, start: libc::off_t, length: libc::off_t) -> io::Result<()> {
    call(
        file,
        libc::F_OFD_SETLK,
        &mut region(libc::F_UNLCK, start, length),
    )
}

fn region(lock_type: libc::c_int, start: libc::off_t, length: libc::off_t) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(lock_type).expect("lock types are 0, 1 and 2"),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).expect("SEEK_SET is 0"),
        l_start: start,
        l_len: length,
        // The kernel refuses an open file description lock that names a process.
        l_pid: 0,
    }
}

fn call(file: &File, command: libc::c_int, region: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open as long as `file` is borrowed, and `region` is a valid
        // flock that the kernel reads and, for F_OFD_GETLK, writes before the call returns.
        let status = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *region) };
        if status == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Takes an exclusive lock on the whole file, as a program does that ignores QEMU's rules.
#[cfg(test)]
pub(super) fn lock_all(file: &File) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, &mut region(libc::F_WRLCK, 0, 0))
}
