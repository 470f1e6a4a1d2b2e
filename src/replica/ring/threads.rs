//! A kernel without io_uring: threads that make a system call for each submission (`--aio
//! threads`), and an epoll that wakes the worker.
//!
//! Each replica has threads of its own, a bounded number. So one that hangs in the kernel delays
//! nothing but its replica, and since the worker never waits for them, it delays no stop and no
//! removal either.
//!
//! Invariants:
//! - Every submission is completed, once, and a watch for as long as it lasts.
//! - When this is dropped, no thread begins another submission.

#![allow(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use io_uring::{opcode, squeue};
use log::warn;
use rustix::buffer::spare_capacity;
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::io::fcntl_dupfd_cloexec;

use super::aio_thread::AioThread;
use super::kernel::{Kernel, KernelCompletion};
use super::submission::{FIXED_FILE, Submission};
use crate::limits::REPLICA_THREADS_MAX;

/// The data of the epoll's own eventfd. No submission has it as its user data: the serial numbers
/// in these begin at 1.
const ENDED: u64 = 0;

/// Events that one call of epoll_wait returns at most; others stay for the next.
const EVENTS_MAX: usize = 64;

/// Threads and an epoll instead of an io_uring.
pub struct Threads {
    epoll: OwnedFd,
    /// By place in the table of files.
    pools: Vec<Option<Pool>>,
    /// Written to after each submission that a thread has carried out.
    ended: OwnedFd,
    /// By user data. Copies of the descriptors, which last until the watch ends.
    watches: BTreeMap<u64, OwnedFd>,
    /// The pauses of operations, by their end.
    timers: BTreeSet<(Instant, u64)>,
    events: Vec<epoll::Event>,
    completions: VecDeque<KernelCompletion>,
}

impl Threads {
    /// No thread yet: each starts when there is something to do.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        watch(&epoll, event.as_fd(), ENDED)?;
        Ok(Self {
            epoll,
            pools: Vec::new(),
            ended: event,
            watches: BTreeMap::new(),
            timers: BTreeSet::new(),
            events: Vec::with_capacity(EVENTS_MAX),
            completions: VecDeque::new(),
        })
    }

    fn complete(&mut self, user_data: u64, result: i32) {
        self.completions.push_back(KernelCompletion {
            user_data,
            result,
            more: false,
        });
    }

    /// Watches a descriptor.
    fn add_watch(&mut self, submission: &Submission) -> io::Result<()> {
        // SAFETY: the caller of `Ring::watch` has the descriptor open during this call.
        let given = unsafe { BorrowedFd::borrow_raw(submission.fd) };
        let copy = fcntl_dupfd_cloexec(given, 0)?;
        watch(&self.epoll, copy.as_fd(), submission.user_data)?;
        self.watches.insert(submission.user_data, copy);
        Ok(())
    }

    /// Ends a watch.
    fn cancel(&mut self, user_data: u64) {
        if let Some(file) = self.watches.remove(&user_data) {
            // It is in the epoll, so this cannot fail.
            let _ = epoll::delete(&self.epoll, &file);
            self.complete(user_data, -libc::ECANCELED);
        }
    }

    /// Takes what has happened since the last time: ends of operations and of pauses, and events.
    fn harvest(&mut self) {
        for pool in self.pools.iter_mut().flatten() {
            pool.harvest(&mut self.completions);
        }
        let now = Instant::now();
        while let Some((end, user_data)) = self.timers.first().copied()
            && end <= now
        {
            self.timers.pop_first();
            self.complete(user_data, -libc::ETIME);
        }
        for event in self.events.drain(..) {
            let user_data = event.data.u64();
            if self.watches.contains_key(&user_data) {
                self.completions.push_back(KernelCompletion {
                    user_data,
                    result: libc::POLLIN.into(),
                    more: true,
                });
            }
        }
    }
}

/// The threads of a replica.
struct Pool {
    file: RawFd,
    threads: Vec<AioThread>,
    /// Those with a submission, and those without.
    busy: Vec<usize>,
    idle: Vec<usize>,
    /// What no thread has begun.
    waiting: VecDeque<Submission>,
}

impl Pool {
    /// A pool without threads, if there is a file.
    fn of(file: RawFd) -> Option<Self> {
        (file >= 0).then(|| Self {
            file,
            threads: Vec::new(),
            busy: Vec::new(),
            idle: Vec::new(),
            waiting: VecDeque::new(),
        })
    }

    /// Has a thread carry out `submission`, or an errno if there is none.
    fn push(&mut self, submission: Submission, ended: &OwnedFd) -> Result<(), i32> {
        if self.idle.is_empty() && self.threads.len() < REPLICA_THREADS_MAX {
            match AioThread::start(self.file, ended) {
                Ok(thread) => {
                    self.idle.push(self.threads.len());
                    self.threads.push(thread);
                }
                Err(error) if self.threads.is_empty() => {
                    warn!(error:%; "cannot start a thread for the operations of a replica");
                    // The operation is repeated after a pause; a flush fails.
                    return Err(libc::EAGAIN);
                }
                // Another thread does it.
                Err(_) => {}
            }
        }
        match self.idle.pop() {
            Some(thread) => self.give(thread, submission),
            None => self.waiting.push_back(submission),
        }
        Ok(())
    }

    fn give(&mut self, thread: usize, submission: Submission) {
        self.threads[thread].give(submission);
        self.busy.push(thread);
    }

    /// Takes what the threads have done, and gives them what waits.
    fn harvest(&mut self, completions: &mut VecDeque<KernelCompletion>) {
        for place in (0..self.busy.len()).rev() {
            let thread = self.busy[place];
            let Some((user_data, result)) = self.threads[thread].take() else {
                continue;
            };
            completions.push_back(KernelCompletion {
                user_data,
                result,
                more: false,
            });
            self.busy.swap_remove(place);
            match self.waiting.pop_front() {
                Some(submission) => self.give(thread, submission),
                None => self.idle.push(thread),
            }
        }
    }
}

/// Has `epoll` report each write to an eventfd, and that it is readable already.
fn watch(epoll: &OwnedFd, file: BorrowedFd<'_>, user_data: u64) -> io::Result<()> {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
    epoll::add(epoll, file, epoll::EventData::new_u64(user_data), flags)?;
    Ok(())
}

impl Kernel for Threads {
    fn register_files(&mut self, files: &[RawFd]) -> io::Result<()> {
        self.pools = files.iter().map(|file| Pool::of(*file)).collect();
        Ok(())
    }

    fn replace_file(&mut self, place: u32, file: RawFd) -> io::Result<()> {
        // The threads of the earlier file have nothing to do, and end.
        self.pools[place as usize] = Pool::of(file);
        Ok(())
    }

    fn register_memory(&mut self, _start: NonNull<u8>, _len: usize) -> io::Result<()> {
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        let submission = Submission::of(entry);
        let user_data = submission.user_data;
        match submission.opcode {
            opcode::PollAdd::CODE => {
                if let Err(error) = self.add_watch(&submission) {
                    self.complete(user_data, -error.raw_os_error().unwrap_or(libc::EIO));
                }
            }
            opcode::AsyncCancel::CODE => {
                self.cancel(submission.address);
                self.complete(user_data, 0);
            }
            opcode::Timeout::CODE => {
                // SAFETY: the submission points to one of the pauses, which are static. `struct
                // __kernel_timespec` is two integers of 64 bits.
                let [seconds, nanoseconds] =
                    unsafe { (submission.address as *const [u64; 2]).read() };
                let pause = Duration::from_secs(seconds) + Duration::from_nanos(nanoseconds);
                let end = Instant::now() + pause;
                self.timers.insert((end, user_data));
            }
            _ => {
                assert_ne!(submission.flags & FIXED_FILE, 0, "an operation has a file");
                let place = usize::try_from(submission.fd).expect("a place in the table");
                let pushed = match &mut self.pools[place] {
                    Some(pool) => pool.push(submission, &self.ended),
                    None => Err(libc::EBADF),
                };
                if let Err(errno) = pushed {
                    self.complete(user_data, -errno);
                }
            }
        }
        true
    }

    fn enter(&mut self, want: usize, limit: Option<Duration>) -> io::Result<()> {
        let deadline = limit.map(|limit| Instant::now() + limit);
        self.harvest();
        loop {
            let waits = self.completions.len() < want;
            let left = if waits {
                let timer = self.timers.first().map(|(end, _)| *end);
                let end = deadline.into_iter().chain(timer).min();
                end.map(|end| end.saturating_duration_since(Instant::now()))
            } else {
                Some(Duration::ZERO)
            };
            let left = left.map(|left| left.try_into().expect("a wait is bounded"));
            self.events.clear();
            epoll::wait(&self.epoll, spare_capacity(&mut self.events), left.as_ref())?;
            self.harvest();
            if self.completions.len() >= want {
                return Ok(());
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(io::Error::from_raw_os_error(libc::ETIME));
            }
        }
    }

    fn is_quiet(&mut self) -> bool {
        false
    }

    fn next_completion(&mut self) -> Option<KernelCompletion> {
        self.completions.pop_front()
    }
}
