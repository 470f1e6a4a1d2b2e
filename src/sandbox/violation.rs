//! A system call that the filter of a thread does not allow ends the process, with one line that
//! names the call. It is the last one on stderr, or a message to the daemon from a process that the
//! daemon has started.
//!
//! Invariants: the handler of the signal takes no lock and no memory, and makes no call that the
//! filters deny. It waits for nothing without a limit, and changes nothing of what other processes
//! share, such as the O_NONBLOCK of stderr.

#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use syscalls::Sysno;

use crate::limits::LOG_FLUSH_LIMIT;

/// How the line begins, which no other message to the daemon does.
const BEGINNING: &str = "quorum-blkd: the sandbox does not allow the system call ";

/// The exit status of a process that has made a call that is not allowed, as of one that the signal
/// ends.
const STATUS: libc::c_int = 128 + libc::SIGSYS;

/// The process that handles the signal.
static PROCESS: AtomicI32 = AtomicI32::new(0);

/// The call of a task that shares the memory, but not the standard streams.
static CALL_OF_TASK: AtomicI32 = AtomicI32::new(0);

/// The socket that leads to the daemon, in a process that it has started.
static SOCKET: AtomicI32 = AtomicI32::new(-1);

/// A thread still has lines to write to stderr.
static IS_LOG_PENDING: AtomicBool = AtomicBool::new(false);

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

/// The line of this process is a message to the daemon, through a socket that stays open.
pub(super) fn report_to(socket: &impl AsRawFd) {
    SOCKET.store(socket.as_raw_fd(), Ordering::Relaxed);
}

/// Says whether a thread has lines to write to stderr, which the last line is to follow.
pub fn set_log_pending(is_pending: bool) {
    IS_LOG_PENDING.store(is_pending, Ordering::Relaxed);
}

/// The last message of a process that has made a call that is not allowed, if `message` is that.
pub fn violation(message: &[u8]) -> Option<String> {
    let line = std::str::from_utf8(message).ok()?;
    line.starts_with(BEGINNING).then(|| {
        let text = line.trim_end();
        text.trim_start_matches("quorum-blkd: ").to_owned()
    })
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
    line.push(BEGINNING.as_bytes());
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
    print(&line.bytes[..line.len]);
    // SAFETY: the call ends the process, and nothing of it is used later.
    unsafe { libc::_exit(STATUS) }
}

/// Sends the line to the daemon, or writes it to stderr, unless that waits for its reader.
fn print(line: &[u8]) {
    let socket: RawFd = SOCKET.load(Ordering::Relaxed);
    if socket >= 0 {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: the memory is initialised.
        unsafe { libc::send(socket, line.as_ptr().cast(), line.len(), flags) };
        return;
    }
    let tick = libc::timespec {
        tv_sec: 0,
        tv_nsec: 1_000_000,
    };
    let ticks = i32::try_from(LOG_FLUSH_LIMIT.as_millis()).unwrap_or(0);
    // The thread that writes the log goes on meanwhile, unless it is this one.
    for _ in 0..ticks {
        if !IS_LOG_PENDING.load(Ordering::Relaxed) {
            break;
        }
        // SAFETY: the time is valid, and what is left of it is not asked for.
        unsafe { libc::nanosleep(&raw const tick, std::ptr::null_mut()) };
    }
    let mut stderr = libc::pollfd {
        fd: libc::STDERR_FILENO,
        events: libc::POLLOUT,
        revents: 0,
    };
    // A pipe or a socket that is ready takes a line of less than PIPE_BUF at once.
    // SAFETY: the memory is valid for both calls.
    unsafe {
        if libc::poll(&raw mut stderr, 1, ticks) == 1 {
            libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), line.len());
        }
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

    #[test]
    fn only_a_line_of_a_violation_is_taken_for_one() {
        let line = format!("{BEGINNING}ptrace (101) in the thread x: the process ends\n");
        let text = "the sandbox does not allow the system call ptrace (101) in the thread x: the \
                    process ends";
        assert_eq!(violation(line.as_bytes()).as_deref(), Some(text));
        for other in [&b""[..], b"{}", b"\xff", b"quorum-blkd: "] {
            assert_eq!(violation(other), None);
        }
    }
}
