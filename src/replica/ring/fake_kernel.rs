//! A kernel for unit tests: it records every submission and completes it as the test says, with any
//! result and in any order.

#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::ptr::NonNull;
use std::rc::Rc;
use std::time::Duration;

use io_uring::squeue;

use super::kernel::{Kernel, KernelCompletion};
pub(crate) use super::submission::{ASYNC, FIXED_FILE, POLL_ADD_MULTI, Submission};

/// A handle to a recording kernel. The test keeps a clone.
#[derive(Clone)]
pub(crate) struct FakeKernel(Rc<RefCell<State>>);

type Event = Box<dyn FnMut(&FakeKernel)>;

struct State {
    files: Vec<RawFd>,
    /// Whether the kernel accepts memory as a fixed buffer, and the memory.
    pins_memory: bool,
    memory: Option<(NonNull<u8>, usize)>,
    /// The submission queue, and how many entries it holds.
    queue: Vec<Submission>,
    queue_len_max: usize,
    in_flight: Vec<Submission>,
    completions: VecDeque<KernelCompletion>,
    /// Errors of the next calls of [`Kernel::enter`].
    enter_errors: VecDeque<i32>,
    /// Happens in each call of [`Kernel::enter`], after it has taken the queue.
    meanwhile: Option<Event>,
    /// A call of [`Kernel::enter`] has waited in vain.
    is_asleep: bool,
}

impl FakeKernel {
    pub(crate) fn new() -> Self {
        Self(Rc::new(RefCell::new(State {
            files: Vec::new(),
            pins_memory: true,
            memory: None,
            queue: Vec::new(),
            queue_len_max: 64,
            in_flight: Vec::new(),
            completions: VecDeque::new(),
            enter_errors: VecDeque::new(),
            meanwhile: None,
            is_asleep: false,
        })))
    }

    /// Refuses to register memory from now on.
    pub(crate) fn refuse_memory(&self) {
        self.0.borrow_mut().pins_memory = false;
    }

    /// Makes the submission queue this short.
    pub(crate) fn shorten_queue(&self, len: usize) {
        self.0.borrow_mut().queue_len_max = len;
    }

    /// Makes the next call of [`Kernel::enter`] fail.
    pub(crate) fn fail_enter(&self, errno: i32) {
        self.0.borrow_mut().enter_errors.push_back(errno);
    }

    /// Makes `event` happen in each call of [`Kernel::enter`], after it has taken the queue.
    pub(crate) fn meanwhile(&self, event: impl FnMut(&FakeKernel) + 'static) {
        self.0.borrow_mut().meanwhile = Some(Box::new(event));
    }

    /// Whether a call of [`Kernel::enter`] has waited in vain since this was last asked.
    pub(crate) fn was_asleep(&self) -> bool {
        std::mem::take(&mut self.0.borrow_mut().is_asleep)
    }

    /// The submissions that the kernel has and has not completed, in order.
    pub(crate) fn in_flight(&self) -> Vec<Submission> {
        self.0.borrow().in_flight.clone()
    }

    /// The submissions in flight of operations, without polls and cancellations.
    pub(crate) fn operations(&self) -> Vec<Submission> {
        let mut submissions = self.in_flight();
        submissions.retain(|submission| submission.flags & FIXED_FILE != 0);
        submissions
    }

    /// The only submission of an operation in flight.
    pub(crate) fn only(&self) -> Submission {
        let operations = self.operations();
        let [submission] = operations.as_slice() else {
            panic!("not one operation in flight: {operations:?}");
        };
        submission.clone()
    }

    /// Completes a submission for good.
    pub(crate) fn complete(&self, submission: &Submission, result: i32) {
        let mut state = self.0.borrow_mut();
        let place = state.in_flight.iter().position(|other| other == submission);
        state
            .in_flight
            .remove(place.expect("a submission in flight"));
        state.completions.push_back(KernelCompletion {
            user_data: submission.user_data,
            result,
            more: false,
        });
    }

    /// Reports an event of a submission that stays in flight.
    pub(crate) fn report(&self, submission: &Submission, result: i32) {
        self.complete_unasked(submission.user_data, result, true);
    }

    /// Adds a completion, whether or not it belongs to a submission in flight.
    pub(crate) fn complete_unasked(&self, user_data: u64, result: i32, more: bool) {
        self.0.borrow_mut().completions.push_back(KernelCompletion {
            user_data,
            result,
            more,
        });
    }

    /// The file in a place of the table.
    pub(crate) fn file(&self, place: usize) -> RawFd {
        self.0.borrow().files[place]
    }

    /// Whether all memory of a submission is in the registered buffer.
    pub(crate) fn is_registered(&self, submission: &Submission) -> bool {
        let state = self.0.borrow();
        state.memory.is_some_and(|(start, len)| {
            let start = start.addr().get() as u64;
            submission.address >= start
                && submission.address + u64::from(submission.len) <= start + len as u64
        })
    }
}

impl Kernel for FakeKernel {
    fn register_files(&mut self, files: &[RawFd]) -> io::Result<()> {
        self.0.borrow_mut().files = files.to_vec();
        Ok(())
    }

    fn replace_file(&mut self, place: u32, file: RawFd) -> io::Result<()> {
        self.0.borrow_mut().files[place as usize] = file;
        Ok(())
    }

    fn register_memory(&mut self, start: NonNull<u8>, len: usize) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if !state.pins_memory {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        state.memory = Some((start, len));
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        let mut state = self.0.borrow_mut();
        let has_room = state.queue.len() < state.queue_len_max;
        if has_room {
            state.queue.push(Submission::of(entry));
        }
        has_room
    }

    fn enter(&mut self, want: usize, limit: Option<Duration>) -> io::Result<()> {
        let mut state = self.0.borrow_mut();
        if let Some(errno) = state.enter_errors.pop_front() {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let queued = std::mem::take(&mut state.queue);
        state.in_flight.extend(queued);
        if let Some(mut event) = state.meanwhile.take() {
            drop(state);
            event(self);
            state = self.0.borrow_mut();
            state.meanwhile.get_or_insert(event);
        }
        if state.completions.len() >= want {
            return Ok(());
        }
        state.is_asleep = true;
        let errno = limit.map_or(libc::EINTR, |_| libc::ETIME);
        Err(io::Error::from_raw_os_error(errno))
    }

    fn is_quiet(&mut self) -> bool {
        self.0.borrow().queue.is_empty()
    }

    fn next_completion(&mut self) -> Option<KernelCompletion> {
        self.0.borrow_mut().completions.pop_front()
    }
}
