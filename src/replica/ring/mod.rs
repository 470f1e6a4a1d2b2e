//! One ring for one worker thread: operations on replicas, and descriptors that wake it. Behind it
//! is an io_uring, or threads ([`Aio`]).
//!
//! Invariants:
//! - The next [`Ring::enter`] submits everything that is queued, in one system call.
//! - Every operation has exactly one reply.
//! - An operation keeps its buffer until the kernel has completed it. A ring that is dropped before
//!   that leaks the buffers, so the kernel never writes to memory in other use.

mod aio_thread;
#[cfg(test)]
pub(crate) mod fake_kernel;
mod holes;
pub(crate) mod kernel;
mod operation;
mod submission;
mod table;
pub(crate) mod threads;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{opcode, squeue};
use log::debug;
use rustix::fs::{OFlags, fcntl_getfl};
use vmm_sys_util::eventfd::EventFd;

use self::holes::{HoleFile, Questions};
use self::kernel::{Kernel, KernelCompletion, Uring};
use self::operation::{Carrier, Next, PendingOperation, place_of, record_place_of};
use self::table::{PendingWatch, Table, WatchState, Work};
use self::threads::Threads;
use super::zero::Ways;
use crate::common::buffer::BufferPool;
use crate::common::operation::{Action, Operation, Reply};
use crate::common::{Errno, ReplicaIndex, ReplicaSet, pulse};
use crate::limits::REPLICAS_MAX;
use crate::statistics::Since;

/// Writes this long keep a kernel thread busy long enough to be worth another thread.
const LONG_WRITE_BYTES: u64 = 64 << 10;

/// Long writes in flight that may each make the kernel start another thread.
const LONG_WRITES_MAX: usize = 64;

/// The user data of submissions whose completion has no meaning: those that cancel a watch. No
/// entry of the table has it.
const CANCELLATION: u64 = u64::MAX;

/// The watch of the answers to questions for holes.
const ANSWERS: WatchToken = WatchToken(u32::MAX);

/// A result of [`Ring::enter`].
#[derive(Debug)]
pub enum Completion {
    /// An operation has ended that began at the given time.
    Reply(Reply, Since),
    /// A replica has done a part of an operation that takes several submissions.
    Progress(ReplicaIndex),
    /// A watched descriptor was written to.
    Readable(WatchToken),
}

/// Whether [`Ring::enter`] waits for a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It does not wait.
    No,
    /// It waits until there is one.
    Forever,
    /// It waits for at most this long.
    AtMost(Duration),
}

/// The name that the worker gave to a watched descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchToken(pub u32);

/// A watched descriptor. [`Ring::unwatch`] ends the watch.
#[derive(Debug)]
pub struct Watch {
    slot: usize,
}

/// The file of a replica as a ring uses it.
#[derive(Clone, Debug)]
pub struct RingFile {
    fd: RawFd,
    /// Writes go through the page cache.
    cached: bool,
    /// The kernel may wait for the file system before it has taken an operation.
    waits: bool,
    /// The record of the replica, open for durable writes.
    record: Option<RawFd>,
    /// To ask for holes. It does not keep the image locked.
    holes: Option<HoleFile>,
}

impl RingFile {
    /// The same file. `waits`: the kernel may wait for the file system before it has taken an
    /// operation, so another thread than that of the ring must do it.
    pub fn waiting_in_submission(self, waits: bool) -> Self {
        Self { waits, ..self }
    }

    /// No file: the replica in this place is not asked.
    pub fn none() -> Self {
        Self {
            fd: -1,
            cached: false,
            waits: false,
            record: None,
            holes: None,
        }
    }

    /// The same file, with the record of the replica, which is open with O_DSYNC and must stay open
    /// as long as a ring uses it.
    pub fn with_record(self, record: &impl AsFd) -> Self {
        let record = Some(record.as_fd().as_raw_fd());
        Self { record, ..self }
    }

    /// The file behind `file`, which must stay open as long as a ring uses it.
    pub fn of(file: &impl AsFd) -> Self {
        let flags = fcntl_getfl(file);
        let cached = flags.is_ok_and(|flags| !flags.contains(OFlags::DIRECT));
        let file = file.as_fd();
        let copy = file.try_clone_to_owned().ok().map(Arc::new);
        Self {
            fd: file.as_raw_fd(),
            cached,
            waits: false,
            record: None,
            holes: copy.map(|file| HoleFile { file, cached }),
        }
    }
}

/// How the operations on replicas are carried out. The names are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aio {
    /// By io_uring.
    IoUring,
    /// By threads that make a system call for each.
    Threads,
}

/// A ring.
pub struct Ring<K: Kernel = Uring> {
    kernel: K,
    table: Table,
    /// How to zero each replica.
    ways: Ways,
    /// The arena of the buffer pool is registered with the kernel.
    arena_registered: bool,
    /// The replicas that are written through the page cache.
    cached: ReplicaSet,
    /// The replicas whose operations kernel threads carry out from the start: the thread of the
    /// ring would wait for the file system.
    waits: ReplicaSet,
    /// By replica.
    hole_files: Vec<Option<HoleFile>>,
    /// `None` until the first question.
    questions: Option<Questions>,
    completions: VecDeque<Completion>,
}

impl Ring {
    /// A ring over `files`, the replicas in order. They and their records must stay open as long as
    /// the ring.
    ///
    /// # Errors
    /// If io_uring is not available, or there is not enough memory.
    pub fn new(files: &[RingFile]) -> io::Result<Self> {
        Self::with_kernel(Uring::new()?, files)
    }
}

impl Ring<Threads> {
    /// As [`Ring::new`], without io_uring.
    ///
    /// # Errors
    /// If the system has no more descriptors.
    pub fn with_threads(files: &[RingFile]) -> io::Result<Self> {
        Self::with_kernel(Threads::new()?, files)
    }
}

impl<K: Kernel> Ring<K> {
    /// A ring whose submissions `kernel` carries out.
    pub(crate) fn with_kernel(mut kernel: K, files: &[RingFile]) -> io::Result<Self> {
        // Replicas that are added later find a place.
        let mut places = [-1; 2 * REPLICAS_MAX];
        for (file, replica) in files.iter().zip((0..).map(ReplicaIndex)) {
            places[place_of(replica) as usize] = file.fd;
            places[record_place_of(replica) as usize] = file.record.unwrap_or(-1);
        }
        kernel.register_files(&places)?;
        let replicas = ReplicaSet::first(files.len());
        let mut hole_files: Vec<_> = files.iter().map(|file| file.holes.clone()).collect();
        hole_files.resize_with(REPLICAS_MAX, || None);
        Ok(Self {
            kernel,
            table: Table::new(),
            ways: Ways::new(REPLICAS_MAX),
            arena_registered: false,
            cached: replicas
                .iter()
                .filter(|replica| files[replica.as_usize()].cached)
                .collect(),
            waits: replicas
                .iter()
                .filter(|replica| files[replica.as_usize()].waits)
                .collect(),
            hole_files,
            questions: None,
            completions: VecDeque::new(),
        })
    }

    /// Registers the arena of `pool`. All buffers of operations that are in an arena must be in
    /// this one. If the kernel does not allow that much pinned memory, operations are slightly
    /// slower.
    pub fn register_arena(&mut self, pool: &BufferPool) {
        let Some((start, len)) = pool.arena() else {
            return;
        };
        match self.kernel.register_memory(start, len) {
            Ok(()) => self.arena_registered = true,
            Err(error) => {
                debug!(bytes = len, error:%; "cannot register buffers; continue without");
            }
        }
    }

    /// The replicas with operations in flight.
    pub fn busy_replicas(&self) -> ReplicaSet {
        let asked = self.questions.as_ref().map(Questions::replicas);
        self.table.busy_replicas().or(asked.unwrap_or_default())
    }

    /// Whether completions wait for the next [`Self::enter`]: a full completion queue was emptied
    /// to make room for submissions.
    pub fn has_completions(&self) -> bool {
        !self.completions.is_empty()
    }

    /// How many operations are in flight.
    pub fn operations(&self) -> usize {
        self.table.operations() + self.questions.as_ref().map_or(0, Questions::len)
    }

    /// Whether kernel threads are busy with long writes. They need the CPU, and take longer than
    /// polling for their end pays for.
    pub fn is_writing_long(&self) -> bool {
        self.table.long_writes() > 0
    }

    /// Whether `operation` is a long write that a kernel thread should carry out from the start.
    /// Buffered writes end up in these threads anyway, and the threads serialize those of one file.
    /// While one of them is busy the kernel does not start another thread for the next file, unless
    /// a write asks for it.
    fn is_long_write(&self, operation: &Operation) -> bool {
        let Action::Write { range, .. } = &operation.action else {
            return false;
        };
        range.bytes() >= LONG_WRITE_BYTES
            && self.cached.contains(operation.replica)
            && self.table.long_writes() < LONG_WRITES_MAX
    }

    /// Uses `file` for `replica` from now on, with its record, or none. Both must stay open until
    /// they are replaced.
    ///
    /// # Errors
    /// If the kernel refuses the file.
    ///
    /// # Panics
    /// If operations on the replica are in flight: they could reach the wrong file.
    pub fn set_file(&mut self, replica: ReplicaIndex, file: Option<RingFile>) -> io::Result<()> {
        assert!(
            !self.busy_replicas().contains(replica),
            "the file of replica {} is replaced while operations are in flight",
            replica.0
        );
        let fd = file.as_ref().map_or(-1, |file| file.fd);
        let record = file.as_ref().and_then(|file| file.record).unwrap_or(-1);
        self.kernel.replace_file(place_of(replica), fd)?;
        self.kernel.replace_file(record_place_of(replica), record)?;
        for (set, has) in [
            (
                &mut self.cached,
                file.as_ref().is_some_and(|file| file.cached),
            ),
            (
                &mut self.waits,
                file.as_ref().is_some_and(|file| file.waits),
            ),
        ] {
            match has {
                true => set.insert(replica),
                false => set.remove(replica),
            }
        }
        if let Some(questions) = &mut self.questions {
            questions.forget(replica);
        }
        self.hole_files[replica.as_usize()] = file.and_then(|file| file.holes);
        self.ways.forget(replica);
        Ok(())
    }

    /// Queues `operation`. A later [`Self::enter`] returns its reply.
    ///
    /// # Errors
    /// If the ring has become unusable.
    pub fn push(&mut self, operation: Operation, since: Since) -> io::Result<()> {
        if let Action::FindData { .. } = operation.action {
            return self.ask(operation, since);
        }
        let waits = self.waits.contains(operation.replica);
        let carrier = match self.is_long_write(&operation) {
            true => Carrier::LongWrite,
            false if waits || matches!(operation.action, Action::Record { .. }) => Carrier::Thread,
            false => Carrier::Submitter,
        };
        let operation = PendingOperation::new(operation, carrier, since, &self.ways);
        let slot = self.table.insert_operation(operation);
        self.submit_slot(slot)
    }

    /// Has a thread find out what io_uring cannot.
    #[cold]
    fn ask(&mut self, operation: Operation, since: Since) -> io::Result<()> {
        if self.questions.is_none() {
            let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
            // Never unwatched: it lasts as long as the ring.
            self.watch(&*event, ANSWERS)?;
            self.questions = Some(Questions::new(event));
        }
        let file = self.hole_files[operation.replica.as_usize()].as_ref();
        if let Some(questions) = &mut self.questions {
            questions.ask(operation, since, file);
        }
        Ok(())
    }

    /// Takes the answers that have come.
    #[cold]
    fn answered(&mut self) {
        let Some(questions) = &mut self.questions else {
            return;
        };
        let replies = questions
            .take()
            .map(|(operation, since)| Completion::Reply(operation.reply(Ok(())), since));
        self.completions.extend(replies);
    }

    /// Reports each write to `fd`, an eventfd, from now on, and once if it is readable already. The
    /// eventfd need not be read: each write is reported, whatever the count.
    ///
    /// # Errors
    /// If the ring has become unusable.
    pub fn watch(&mut self, fd: &impl AsRawFd, token: WatchToken) -> io::Result<Watch> {
        let slot = self.table.insert_watch(PendingWatch {
            fd: fd.as_raw_fd(),
            token,
            state: WatchState::Armed,
        });
        self.submit_slot(slot)?;
        Ok(Watch { slot })
    }

    /// Ends a watch. The kernel holds the file until then, so the descriptor may be closed before.
    ///
    /// # Errors
    /// If the ring has become unusable.
    pub fn unwatch(&mut self, watch: Watch) -> io::Result<()> {
        let Some(submission) = self.table.submission(watch.slot) else {
            self.table.remove_watch(watch.slot);
            return Ok(());
        };
        self.table.watch(watch.slot).state = WatchState::Ended;
        let cancel = opcode::AsyncCancel::new(submission).build();
        self.push_entry(&cancel.user_data(CANCELLATION))
    }

    /// Submits everything that is queued, waits for a completion as `wait` says, and returns what
    /// has completed. The caller drains the list.
    ///
    /// # Errors
    /// If the ring has become unusable.
    pub fn enter(&mut self, wait: Wait) -> io::Result<&mut VecDeque<Completion>> {
        let want = usize::from(self.completions.is_empty());
        let entered = if matches!(wait, Wait::No) && self.kernel.is_quiet() {
            Ok(())
        } else {
            // The system call may wait for a replica; its thread does not hang then.
            pulse::idle();
            match wait {
                Wait::No => self.kernel.enter(0, None),
                Wait::Forever => self.kernel.enter(want, None),
                Wait::AtMost(limit) => self.kernel.enter(want, Some(limit)),
            }
        };
        pulse::busy();
        match entered {
            Ok(()) => {}
            // EBUSY: the kernel submits more after completions are taken, which follows.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME)
                ) => {}
            Err(error) => return Err(error),
        }
        self.reap()?;
        self.table.assert_consistent();
        Ok(&mut self.completions)
    }

    /// Takes the emptied list of [`Self::enter`] back to reuse its memory.
    pub fn recycle(&mut self, mut emptied: VecDeque<Completion>) {
        if self.completions.is_empty() {
            emptied.clear();
            self.completions = emptied;
        }
    }

    /// Handles all completions that have arrived.
    fn reap(&mut self) -> io::Result<()> {
        while let Some(completion) = self.kernel.next_completion() {
            if completion.user_data != CANCELLATION {
                self.complete(&completion)?;
            }
        }
        Ok(())
    }

    fn complete(&mut self, completion: &KernelCompletion) -> io::Result<()> {
        match self.table.complete(completion) {
            (slot, Work::Operation(operation)) => {
                match operation.completed(completion.result, &mut self.ways) {
                    Next::Submit => self.submit_slot(slot),
                    Next::Progress => {
                        let replica = operation.replica();
                        self.completions.push_back(Completion::Progress(replica));
                        self.submit_slot(slot)
                    }
                    Next::End(result) => {
                        self.end(slot, result);
                        Ok(())
                    }
                }
            }
            (slot, Work::Watch(watch)) => {
                let is_armed = watch.state == WatchState::Armed;
                let token = watch.token;
                let answered = is_armed && token == ANSWERS;
                if is_armed && !answered {
                    self.completions.push_back(Completion::Readable(token));
                }
                let result = match (is_armed, completion.more) {
                    (_, true) => Ok(()),
                    (false, false) => {
                        self.table.remove_watch(slot);
                        Ok(())
                    }
                    // The kernel has ended the multishot poll, for example for want of memory. A
                    // new poll reports a write that came in between.
                    (true, false) if completion.result >= 0 => self.submit_slot(slot),
                    (true, false) => {
                        watch.state = WatchState::Failed;
                        Ok(())
                    }
                };
                if answered {
                    self.answered();
                }
                result
            }
        }
    }

    fn end(&mut self, slot: usize, result: Result<(), Errno>) {
        let operation = self.table.remove_operation(slot);
        let (reply, since) = operation.reply(result);
        self.completions.push_back(Completion::Reply(reply, since));
    }

    /// Queues the submission for what is left of the work in `slot`.
    fn submit_slot(&mut self, slot: usize) -> io::Result<()> {
        let entry = self.table.submit(slot, self.arena_registered);
        self.push_entry(&entry)
    }

    fn push_entry(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        while !self.kernel.push(entry) {
            // The queue is full. Completions that arrive meanwhile stay in their queue.
            match self.kernel.enter(0, None) {
                Ok(()) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                // The completion queue is full.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => self.reap()?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl<K: Kernel> Drop for Ring<K> {
    fn drop(&mut self) {
        let operations = self.table.operations();
        if operations > 0 {
            debug!(
                operations;
                "the io_uring closes with operations in flight; leak their buffers"
            );
            std::mem::forget(std::mem::replace(&mut self.table, Table::new()));
        }
    }
}

#[cfg(test)]
mod fake_tests;
#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod tests;
