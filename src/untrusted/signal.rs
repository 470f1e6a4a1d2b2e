//! Signals an eventfd without waiting, whatever its other holders do to it.
//!
//! A write to an eventfd whose counter is full waits unless the open file has O_NONBLOCK, and every
//! process that has the file can fill the one and clear the other, also between a check and the
//! write. Linux has no write to an eventfd that overrides the flag (it refuses RWF_NOWAIT, and
//! io_uring looks at the flag before it writes). When an asynchronous operation ends, however, the
//! kernel itself adds one to the eventfd that is named with it (`io_submit(2)`, IOCB_FLAG_RESFD),
//! and the kernel does not wait. So this reads nothing out of an empty file.

#![allow(unsafe_code)]

use std::cell::{Cell, OnceCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, memfd_create};

/// Operations whose results the kernel keeps until they are taken.
const RESULTS_MAX: u32 = 32;

/// `IOCB_CMD_PREAD`.
const READ: u16 = 0;

/// `IOCB_FLAG_RESFD`.
const SIGNALS: u32 = 1;

/// `struct iocb` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Default)]
struct Operation {
    data: u64,
    #[cfg(target_endian = "little")]
    key: u32,
    flags_of_read: i32,
    #[cfg(target_endian = "big")]
    key: u32,
    code: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    signalled: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct OperationEnd {
    data: u64,
    operation: u64,
    results: [i64; 2],
}

thread_local! {
    static OF_THREAD: OnceCell<Signaller> = const { OnceCell::new() };
}

/// A file with nothing in it, for all threads.
fn empty() -> io::Result<&'static OwnedFd> {
    static EMPTY: OnceLock<OwnedFd> = OnceLock::new();
    if EMPTY.get().is_none() {
        let _ = EMPTY.set(memfd_create("nothing", MemfdFlags::CLOEXEC)?);
    }
    Ok(EMPTY.get().expect("just set"))
}

/// Adds one to the counter of `event`, or leaves it full.
///
/// # Errors
/// `InvalidInput` if it is no eventfd; else if the kernel has no memory, or as [`prepare`].
pub fn signal(event: &impl AsRawFd) -> io::Result<()> {
    prepare()?;
    OF_THREAD.with(|signaller| signaller.get().expect("just prepared").signal(event))
}

/// Prepares this thread for [`signal`], which does it too, but then fails too late.
///
/// # Errors
/// If the kernel has no asynchronous I/O (`CONFIG_AIO`) or a filter forbids it, if its contexts
/// are used up (`fs.aio-max-nr`), or for want of descriptors.
pub fn prepare() -> io::Result<()> {
    OF_THREAD.with(|signaller| {
        if signaller.get().is_none() {
            let _ = signaller.set(Signaller::new()?);
        }
        Ok(())
    })
}

/// Signals the eventfds of one thread.
struct Signaller {
    context: libc::c_ulong,
    /// Operations whose results were not taken.
    ended: Cell<u32>,
}

impl Signaller {
    fn new() -> io::Result<Self> {
        empty()?;
        let mut context: libc::c_ulong = 0;
        // SAFETY: the kernel writes one word.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, RESULTS_MAX, &raw mut context) };
        if result != 0 {
            let error = io::Error::last_os_error();
            let why = format!(
                "the kernel gives no asynchronous I/O, with which guests are notified (see \
                 CONFIG_AIO, the sysctl fs.aio-max-nr, and seccomp filters): {error}"
            );
            return Err(io::Error::new(error.kind(), why));
        }
        Ok(Self {
            context,
            ended: Cell::new(0),
        })
    }

    fn signal(&self, event: &impl AsRawFd) -> io::Result<()> {
        if self.ended.get() == RESULTS_MAX {
            self.take_results();
        }
        let mut operation = Operation {
            code: READ,
            file: empty()?.as_raw_fd().cast_unsigned(),
            flags: SIGNALS,
            signalled: event.as_raw_fd().cast_unsigned(),
            ..Operation::default()
        };
        let mut result = self.submit(&mut operation);
        if result
            .as_ref()
            .is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
        {
            self.take_results();
            result = self.submit(&mut operation);
        }
        self.ended.set(self.ended.get() + u32::from(result.is_ok()));
        result
    }

    fn submit(&self, operation: &mut Operation) -> io::Result<()> {
        let list = [&raw mut *operation];
        // SAFETY: before it returns the kernel copies the list and the operation, and writes to the
        // `key` of that. It reads no bytes into a buffer.
        let count =
            unsafe { libc::syscall(libc::SYS_io_submit, self.context, 1_i64, list.as_ptr()) };
        match count {
            1 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes room for the results of further operations. A read that has nothing to read has ended
    /// when it is submitted.
    fn take_results(&self) {
        const COUNT: usize = RESULTS_MAX as usize;
        let mut ends = [OperationEnd::default(); COUNT];
        let no_time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the array has room for as many.
        unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                0_i64,
                i64::from(RESULTS_MAX),
                ends.as_mut_ptr(),
                &raw const no_time,
            )
        };
        self.ended.set(0);
    }
}

impl Drop for Signaller {
    fn drop(&mut self) {
        // SAFETY: no other code uses the context.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::{ioctl_fionbio, read, write};

    use super::*;

    fn event() -> OwnedFd {
        eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
    }

    fn take_count(event: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        read(event, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn each_signal_adds_one() {
        let event = event();
        for count in [1, 2, 100, 1000] {
            for _ in 0..count {
                signal(&event).unwrap();
            }
            assert_eq!(take_count(&event), count);
        }
    }

    #[test]
    fn a_full_counter_is_not_waited_for() {
        let event = event();
        write(&event, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        // As another process may at any time.
        ioctl_fionbio(&event, false).unwrap();
        for _ in 0..100 {
            signal(&event).unwrap();
        }
        assert!(take_count(&event) >= u64::MAX - 1);
    }

    #[test]
    fn what_is_no_eventfd_is_refused() {
        let (_reader, writer) = io::pipe().unwrap();
        let error = signal(&writer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
