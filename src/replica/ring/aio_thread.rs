//! A thread that makes one system call at a time for a worker.
//!
//! The kernel keeps a process until every thread of it has left the kernel, and with it its
//! sockets, so a thread of the daemon that hangs there would keep the daemon from ending. Therefore
//! this is a task that shares nothing but the memory with the daemon (`CLONE_VM` without
//! `CLONE_THREAD` and `CLONE_FILES`). If the daemon ends first, the task stays until its system
//! call has ended, with the memory of its buffer, and with the image open, which thus stays locked.
//!
//! Invariant: from its start on, the task uses neither thread-local storage nor the heap, which
//! belong to the worker. It makes system calls by `rustix`, which does not set `errno`.

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use io_uring::opcode;
use rustix::fs::{FallocateFlags, fallocate, fdatasync};
use rustix::io::{pread, pwrite};
use rustix::thread::futex;

use super::submission::Submission;
use crate::replica::file::close_range;

/// The task has nothing to do.
const IDLE: u32 = 0;
/// The task has a submission.
const GIVEN: u32 = 1;
/// The task has carried out its submission.
const DONE: u32 = 2;
/// The task ends.
const ENDED: u32 = 3;
/// The task is not ready, and the worker waits for it.
const STARTING: u32 = 4;

/// Memory for the stack of a task, aligned as it must be.
const STACK_WORDS: usize = (64 << 10) / size_of::<u128>();

/// A task.
pub(super) struct AioThread {
    /// `None` only while it is dropped.
    parts: Option<Parts>,
    id: libc::pid_t,
    user_data: u64,
}

struct Parts {
    slot: Box<Slot>,
    _stack: Box<[u128]>,
}

/// What a task and its worker share.
struct Slot {
    state: AtomicU32,
    /// Belongs to the task while the state is [`GIVEN`], else to the worker.
    submission: UnsafeCell<Option<Submission>>,
    result: AtomicI32,
    file: RawFd,
    /// Written to after each submission.
    event: RawFd,
    parent: libc::pid_t,
}

// SAFETY: see `Slot::submission`; the state says whose it is.
unsafe impl Sync for Slot {}

impl AioThread {
    /// Starts a task for `file`, which writes to the eventfd `event` after each submission. It has
    /// copies of both.
    ///
    /// # Errors
    /// If the system has no more tasks.
    pub(super) fn start(file: RawFd, event: &impl AsRawFd) -> io::Result<Self> {
        let slot = Box::new(Slot {
            state: AtomicU32::new(STARTING),
            submission: UnsafeCell::new(None),
            result: AtomicI32::new(0),
            file,
            event: event.as_raw_fd(),
            parent: std::process::id().cast_signed(),
        });
        let mut stack = vec![0_u128; STACK_WORDS].into_boxed_slice();
        let top = stack.as_mut_ptr_range().end;
        // SAFETY: the stack and the slot stay in place until the task has ended (`drop`).
        let id = unsafe {
            libc::clone(
                run,
                top.cast(),
                libc::CLONE_VM,
                (&raw const *slot).cast_mut().cast(),
            )
        };
        if id < 0 {
            return Err(io::Error::last_os_error());
        }
        // Until then the task uses the thread-local storage of this thread.
        while slot.state.load(Ordering::Acquire) == STARTING {
            let _ = futex::wait(&slot.state, futex::Flags::PRIVATE, STARTING, None);
        }
        let parts = Parts {
            slot,
            _stack: stack,
        };
        Ok(Self {
            parts: Some(parts),
            id,
            user_data: 0,
        })
    }

    fn slot(&self) -> &Slot {
        &self.parts.as_ref().expect("it is not dropped").slot
    }

    /// Has the task carry out `submission`.
    ///
    /// # Panics
    /// If it has another one.
    pub(super) fn give(&mut self, submission: Submission) {
        self.user_data = submission.user_data;
        let slot = self.slot();
        assert_eq!(slot.state.load(Ordering::Acquire), IDLE, "it has another");
        // SAFETY: it belongs to the worker.
        unsafe { *slot.submission.get() = Some(submission) };
        slot.set(GIVEN);
    }

    /// The user data and the result of its submission, if it is done. The task is idle then.
    pub(super) fn take(&mut self) -> Option<(u64, i32)> {
        let slot = self.slot();
        if slot.state.load(Ordering::Acquire) != DONE {
            return None;
        }
        let result = slot.result.load(Ordering::Relaxed);
        slot.state.store(IDLE, Ordering::Release);
        Some((self.user_data, result))
    }
}

impl Drop for AioThread {
    fn drop(&mut self) {
        let parts = self.parts.take().expect("it is dropped once");
        let state = parts.slot.state.swap(ENDED, Ordering::AcqRel);
        if state == GIVEN {
            // It may be in the kernel for as long as it wants.
            std::mem::forget(parts);
            return;
        }
        parts.slot.wake();
        // SAFETY: the status is not asked for.
        unsafe { libc::waitpid(self.id, std::ptr::null_mut(), libc::__WALL) };
    }
}

impl Slot {
    fn set(&self, state: u32) {
        self.state.store(state, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        let _ = futex::wake(&self.state, futex::Flags::PRIVATE, 1);
    }
}

/// The task.
extern "C" fn run(slot: *mut libc::c_void) -> libc::c_int {
    // SAFETY: the worker keeps the slot in place until the task has ended.
    let slot = unsafe { &*slot.cast_const().cast::<Slot>() };
    prepare(slot);
    slot.set(IDLE);
    loop {
        match slot.state.load(Ordering::Acquire) {
            GIVEN => {
                // SAFETY: it belongs to the task.
                let submission = unsafe { &*slot.submission.get() };
                // SAFETY: `Ring` keeps the memory of an operation in place until its completion; if
                // the ring goes first, it leaks that memory. The file is a copy of the task's own.
                let result = unsafe { carry_out(slot.file, submission.as_ref()) };
                slot.result.store(result, Ordering::Relaxed);
                let (given, done) = (Ordering::AcqRel, Ordering::Acquire);
                if slot
                    .state
                    .compare_exchange(GIVEN, DONE, given, done)
                    .is_err()
                {
                    return 0;
                }
                // SAFETY: the task has it open.
                let event = unsafe { BorrowedFd::borrow_raw(slot.event) };
                // The counter is never read; it cannot overflow, since each write adds one.
                let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
            }
            ENDED => return 0,
            state => {
                let _ = futex::wait(&slot.state, futex::Flags::PRIVATE, state, None);
            }
        }
    }
}

/// Closes what the task does not need, such as the sockets of frontends, who would wait for their
/// end, and has it end with the daemon.
fn prepare(slot: &Slot) {
    let (first, second) = (slot.file.min(slot.event), slot.file.max(slot.event));
    let ranges = [
        (0, first - 1),
        (first + 1, second - 1),
        (second + 1, RawFd::MAX),
    ];
    for (from, to) in ranges {
        // SAFETY: nothing of the task uses these, and its table is a copy of the daemon's.
        unsafe { close_range(from, to) };
    }
    // SAFETY: no pointers but to a static string.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"aio".as_ptr());
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::getppid() != slot.parent {
            libc::_exit(0);
        }
    }
}

/// Makes the system call that io_uring would make: the result is a count, or a negative errno.
///
/// # Safety
/// The memory of a read is valid for writes, that of a write for reads; `file` is open.
unsafe fn carry_out(file: RawFd, submission: Option<&Submission>) -> i32 {
    let Some(submission) = submission else {
        return -libc::EINVAL;
    };
    let offset = submission.offset;
    let len = submission.len as usize;
    // Of a fallocate, the address is a length.
    let Ok(address) = usize::try_from(submission.address) else {
        return -libc::EINVAL;
    };
    // SAFETY: by the contract of this function.
    let file = unsafe { BorrowedFd::borrow_raw(file) };
    let result = match submission.opcode {
        opcode::Read::CODE | opcode::ReadFixed::CODE => {
            // SAFETY: by the contract of this function.
            let memory = unsafe { std::slice::from_raw_parts_mut(address as *mut u8, len) };
            pread(file, memory, offset)
        }
        opcode::Write::CODE | opcode::WriteFixed::CODE => {
            // SAFETY: by the contract of this function.
            let memory = unsafe { std::slice::from_raw_parts(address as *const u8, len) };
            pwrite(file, memory, offset)
        }
        opcode::Fsync::CODE => fdatasync(file).map(|()| 0),
        opcode::Fallocate::CODE => {
            let mode = FallocateFlags::from_bits_retain(submission.len);
            fallocate(file, mode, offset, submission.address).map(|()| 0)
        }
        _ => return -libc::EINVAL,
    };
    match result {
        Ok(count) => i32::try_from(count).unwrap_or(-libc::EINVAL),
        Err(errno) => -errno.raw_os_error(),
    }
}
