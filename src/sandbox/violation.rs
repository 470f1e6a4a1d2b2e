//! A system call that the filter of a thread does not allow ends the process, with one line that
//! names the call.
//!
//! Invariant: the handler of the signal takes no lock and no memory, and makes no call that the
//! filters deny.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

use syscalls::Sysno;

/// The exit status of a process that has made a call that is not allowed, as of one that the signal
/// ends.
const STATUS: libc::c_int = 128 + libc::SIGSYS;

/// The process that handles the signal.
static PROCESS: AtomicI32 = AtomicI32::new(0);

/// The call of a task that shares the memory, but not the standard streams.
static CALL_OF_TASK: AtomicI32 = AtomicI32::new(0);

/// What the kernel says of a SIGSYS that is that of a filter.
const SYS_SECCOMP: libc::c_int = 1;

/// Whether the kernel can trap calls.
pub(super) fn is_trap_available() -> bool {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the call reads a number.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    result == 0
}

/// Handles the signal of a call that is not allowed.
pub(super) fn handle() -> io::Result<()> {
    PROCESS.store(std::process::id().cast_signed(), Ordering::Relaxed);
    // SAFETY: plain data, which is filled in before it is used; the handler is as its type says.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut libc::c_void) = end;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The part of the kernel's `siginfo_t` that describes a SIGSYS.
#[repr(C)]
struct Info {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
    architecture: libc::c_uint,
}

extern "C" fn end(_: libc::c_int, info: *const libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes it to a handler with SA_SIGINFO, and for this signal it is this.
    let info = unsafe { &*info.cast::<Info>() };
    let process = PROCESS.load(Ordering::Relaxed);
    // SAFETY: the calls take no memory.
    unsafe {
        if libc::getpid() != process {
            CALL_OF_TASK.store(info.call, Ordering::SeqCst);
            libc::kill(process, libc::SIGSYS);
            libc::_exit(STATUS)
        }
    }
    let call = match info.code {
        SYS_SECCOMP => info.call,
        _ => CALL_OF_TASK.load(Ordering::SeqCst),
    };
    let mut name = [0_u8; 16];
    // SAFETY: the kernel writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let thread = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    let mut line = Line::new();
    line.push(b"quorum-blkd: the sandbox does not allow the system call ");
    let number = usize::try_from(call).unwrap_or_default();
    line.push(
        Sysno::new(number)
            .map_or("of an unknown name", |call| call.name())
            .as_bytes(),
    );
    line.push(b" (");
    line.push_number(number);
    line.push(b") in the thread ");
    line.push(thread.to_bytes());
    line.push(b": the process ends; report this, and use --sandbox off until it is fixed\n");
    // SAFETY: the memory is initialised; the call ends the process and nothing of it is used later.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(STATUS)
    }
}

/// A line that is put together without the heap.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn new() -> Self {
        Self {
            bytes: [0; 256],
            len: 0,
        }
    }

    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, number: usize) {
        let mut divisor = 1;
        while number / divisor >= 10 {
            divisor *= 10;
        }
        while divisor > 0 {
            let digit = u8::try_from(number / divisor % 10).unwrap_or_default();
            self.push(&[b'0' + digit]);
            divisor /= 10;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_numbers_and_an_end() {
        let mut line = Line::new();
        for number in [0, 7, 10, 425] {
            line.push_number(number);
            line.push(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"0 7 10 425 ");
        line.push(&[b'x'; 300]);
        assert_eq!(line.len, 256);
    }
}
