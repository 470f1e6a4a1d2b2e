//! The kernel's side of a ring: a table of files, a submission queue and a completion queue.
//!
//! [`Uring`] is io_uring. Unit tests use a recording kernel instead (`fake_kernel.rs`), which
//! checks the flags, offsets and buffers of each submission and completes it with any result.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use crate::limits::RING_ENTRIES;
use crate::sandbox;

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
    /// Creates an io_uring for the calling thread. In a process that has given up what it does not
    /// need, the kernel refuses operations that a ring never makes.
    ///
    /// # Errors
    /// If io_uring is not available, or there is not enough memory.
    pub fn new() -> io::Result<Self> {
        Self::with(sandbox::is_restricted())
    }

    fn with(is_restricted: bool) -> io::Result<Self> {
        let uring = build(is_restricted)?;
        // A call that would block (fsync, for example) occupies a kernel thread while it waits. The
        // default of four threads per processor would soon wait for a replica that hangs, and the
        // operations of all other replicas would queue behind it.
        uring
            .submitter()
            .register_iowq_max_workers(&mut [KERNEL_THREADS_MAX, 0])?;
        if is_restricted {
            restrict(&uring)?;
        }
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

/// What is registered with a ring that works: files, and the memory of a pool. The crate has no
/// names for these (io_uring_register(2)).
const REGISTER_BUFFERS: u8 = 0;
const REGISTER_FILES: u8 = 2;
const REGISTER_FILES_UPDATE: u8 = 6;

/// The operations of a ring.
const OPERATIONS: [u8; 9] = [
    opcode::Read::CODE,
    opcode::ReadFixed::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::Timeout::CODE,
    opcode::AsyncCancel::CODE,
];

/// Has the kernel refuse everything else from now on, and starts the ring for the calling thread. A
/// filter of system calls does not see what an io_uring does (I10).
fn restrict(uring: &IoUring) -> io::Result<()> {
    let flags = squeue::Flags::FIXED_FILE | squeue::Flags::ASYNC;
    let registered = [REGISTER_BUFFERS, REGISTER_FILES, REGISTER_FILES_UPDATE];
    let mut restrictions: Vec<Restriction> = OPERATIONS.map(Restriction::sqe_op).into();
    restrictions.extend(registered.map(Restriction::register_op));
    restrictions.push(Restriction::sqe_flags_allowed(flags.bits()));
    let submitter = uring.submitter();
    submitter.register_restrictions(&mut restrictions)?;
    submitter.register_enable_rings()
}

fn build(is_restricted: bool) -> io::Result<IoUring> {
    let basic = || {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(RING_ENTRIES * 4);
        if is_restricted {
            builder.setup_r_disabled();
        }
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use io_uring::types::{Fd, Fixed};

    use super::*;

    /// The result of one submission.
    fn result_of(uring: &mut Uring, entry: &squeue::Entry) -> i32 {
        assert!(uring.push(entry));
        uring.enter(1, None).unwrap();
        uring.next_completion().expect("it is complete").result
    }

    #[test]
    fn a_restricted_ring_makes_its_own_operations_only() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mut memory = [1_u8; 512];
        let read = opcode::Read::new(Fixed(0), memory.as_mut_ptr(), 512).build();
        let path = c"/dev/null".as_ptr();
        let open = opcode::OpenAt::new(Fd(libc::AT_FDCWD), path).build();
        let linked = opcode::Timeout::new(&Timespec::new().nsec(1)).build();
        let linked = linked.flags(squeue::Flags::IO_DRAIN);
        for is_restricted in [true, false] {
            let mut uring = Uring::with(is_restricted).unwrap();
            uring.register_files(&[-1]).unwrap();
            uring.replace_file(0, file.as_raw_fd()).unwrap();
            assert_eq!(result_of(&mut uring, &read), 512);
            let refused = [&open, &linked].map(|entry| result_of(&mut uring, entry));
            let is_refused = refused.map(|result| result == -libc::EACCES);
            assert_eq!(is_refused, [is_restricted; 2], "{refused:?}");
            let eventfd = uring.0.submitter().register_eventfd(file.as_raw_fd());
            let error = eventfd.expect_err("not an eventfd").raw_os_error();
            assert_eq!(error == Some(libc::EACCES), is_restricted, "{error:?}");
        }
        assert_eq!(memory, [0; 512]);
    }
}
