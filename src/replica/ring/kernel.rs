//! The kernel's side of a ring: a table of files, a submission queue and a completion queue.
//!
//! [`Uring`] is io_uring. Unit tests use a recording kernel instead (`fake_kernel.rs`), which
//! checks the flags, offsets and buffers of each submission and completes it with any result.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, squeue};

use crate::limits::RING_ENTRIES;

/// Kernel threads that may wait for replicas at a time.
const KERNEL_THREADS_MAX: u32 = 1024;

/// A kernel that carries out submissions.
pub trait Kernel {
    /// Sets the table of files that submissions refer to. -1 leaves a place empty.
    fn register_files(&mut self, files: &[RawFd]) -> io::Result<()>;

    /// Replaces one file of the table.
    fn replace_file(&mut self, place: u32, file: RawFd) -> io::Result<()>;

    /// Registers memory so that submissions can use it as a fixed buffer.
    fn register_memory(&mut self, start: NonNull<u8>, len: usize) -> io::Result<()>;

    /// Puts an entry in the submission queue. Returns `false` if the queue is full.
    ///
    /// The memory that the entry points to must stay in place until its completion arrives.
    fn push(&mut self, entry: &squeue::Entry) -> bool;

    /// Submits the queue and waits for `want` completions, for at most `limit`.
    fn enter(&mut self, want: usize, limit: Option<Duration>) -> io::Result<()>;

    /// Whether [`Self::enter`] would have no effect: the queue is empty, and the kernel has not
    /// postponed any work to that call.
    fn is_quiet(&mut self) -> bool;

    /// Takes the next completion out of its queue.
    fn next_completion(&mut self) -> Option<KernelCompletion>;
}

/// A completion as the kernel returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelCompletion {
    /// The user data of the submission.
    pub user_data: u64,
    /// A count of bytes, or a negative errno.
    pub result: i32,
    /// More completions of the same submission follow.
    pub more: bool,
}

/// An io_uring.
pub struct Uring(IoUring);

impl Uring {
    /// Creates an io_uring for the calling thread.
    ///
    /// # Errors
    /// If io_uring is not available, or there is not enough memory.
    pub fn new() -> io::Result<Self> {
        let uring = build()?;
        // A call that would block (fsync, for example) occupies a kernel thread while it waits. The
        // default of four threads per processor would soon wait for a replica that hangs, and the
        // operations of all other replicas would queue behind it.
        uring
            .submitter()
            .register_iowq_max_workers(&mut [KERNEL_THREADS_MAX, 0])?;
        Ok(Self(uring))
    }
}

impl Kernel for Uring {
    fn register_files(&mut self, files: &[RawFd]) -> io::Result<()> {
        self.0.submitter().register_files(files)
    }

    fn replace_file(&mut self, place: u32, file: RawFd) -> io::Result<()> {
        self.0.submitter().register_files_update(place, &[file])?;
        Ok(())
    }

    fn register_memory(&mut self, start: NonNull<u8>, len: usize) -> io::Result<()> {
        let memory = libc::iovec {
            iov_base: start.as_ptr().cast(),
            iov_len: len,
        };
        // SAFETY: the kernel pins the pages, so the memory may be freed before the io_uring. Only
        // submissions access it, and the operation behind each keeps its buffer, and with it this
        // memory, in place.
        unsafe { self.0.submitter().register_buffers(&[memory]) }
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: `Ring` is the only caller. The buffer of the entry belongs to an operation in its
        // table, which keeps the buffer in place until the completion arrives. If the ring goes
        // first, it leaks the table.
        unsafe { self.0.submission().push(entry) }.is_ok()
    }

    fn enter(&mut self, want: usize, limit: Option<Duration>) -> io::Result<()> {
        match limit {
            None => self.0.submit_and_wait(want)?,
            Some(limit) => {
                let limit = Timespec::from(limit);
                let arguments = SubmitArgs::new().timespec(&limit);
                self.0.submitter().submit_with_args(want, &arguments)?
            }
        };
        Ok(())
    }

    fn is_quiet(&mut self) -> bool {
        let queue = self.0.submission();
        queue.is_empty() && !queue.taskrun() && !queue.cq_overflow()
    }

    fn next_completion(&mut self) -> Option<KernelCompletion> {
        let entry = self.0.completion().next()?;
        Some(KernelCompletion {
            user_data: entry.user_data(),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
        })
    }
}

fn build() -> io::Result<IoUring> {
    let basic = || {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(RING_ENTRIES * 4);
        builder
    };
    let deferring = || {
        let mut builder = basic();
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag();
        builder
    };
    // Linux rejects the first before 6.6 and the second before 6.1.
    let mut result = deferring().setup_no_sqarray().build(RING_ENTRIES);
    for builder in [deferring(), basic()] {
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                result = builder.build(RING_ENTRIES)
            }
            other => return other,
        }
    }
    result
}
