//! One io_uring for one worker thread: replica operations, and the file descriptors the worker
//! waits on.
//!
//! Invariants: everything queued goes to the kernel with the next [`Ring::enter`], in one system
//! call; every operation has exactly one reply; an operation keeps its buffer until the kernel is
//! done with it, and if the ring must go before that, the buffers are leaked rather than reused.

mod in_flight;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use log::debug;
use slab::Slab;

use self::in_flight::{InFlight, Outcome, Step, WatchState};
use super::zero::Ways;
use crate::common::buffer::BufferPool;
use crate::common::operation::{Action, Operation, Reply};
use crate::common::{Errno, ReplicaIndex, ReplicaSet};
use crate::limits::{REPLICAS_MAX, RING_ENTRIES};
use crate::statistics::Since;

/// How often an operation that the kernel interrupted is tried again before that counts as an
/// error.
const RETRIES_MAX: u32 = 16;

/// Kernel threads that may wait for replicas at a time.
const KERNEL_WORKERS_MAX: u32 = 1024;

/// Writes that keep a kernel thread busy for so long that another one is worth its while.
const LONG_WRITE_BYTES: u64 = 64 << 10;

/// Long writes at a time that may each have the kernel make another thread.
const LONG_WRITES_MAX: usize = 64;

/// User data of what completes without meaning: cancellations.
const MEANINGLESS: u64 = u64::MAX;

/// What [`Ring::enter`] brings back.
#[derive(Debug)]
pub enum Completion {
    /// An operation has ended, which was queued then.
    Reply(Reply, Since),
    /// A watched descriptor became readable.
    Readable(WatchToken),
}

/// Whether [`Ring::enter`] waits for something to complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// No.
    No,
    /// Yes, however long it takes.
    Forever,
    /// For so long.
    AtMost(Duration),
}

/// The name that the worker gave to a watched descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchToken(pub u32);

/// An armed watch, to be given back to [`Ring::unwatch`].
#[derive(Debug)]
pub struct Watch {
    slot: usize,
}

/// The ring.
pub struct Ring {
    uring: IoUring,
    in_flight: Slab<InFlight>,
    /// How each replica is best made to hold zeroes.
    ways: Ways,
    /// The arena of the buffer pool is registered.
    arena_registered: bool,
    /// The replicas that are written through the page cache.
    cached: ReplicaSet,
    /// Operations in flight, watches not counted.
    operations: usize,
    /// Those of them that were given to kernel threads at once.
    long_writes: usize,
    completions: VecDeque<Completion>,
}

impl Ring {
    /// A ring over `files`, the replicas in order; they must stay open as long as the ring.
    ///
    /// # Errors
    /// If the kernel has no io_uring for us, or no memory.
    pub fn new(files: &[RawFd]) -> io::Result<Self> {
        let uring = build()?;
        // With places for those that may be added.
        let mut table = [-1; REPLICAS_MAX];
        table[..files.len()].copy_from_slice(files);
        uring.submitter().register_files(&table)?;
        // What the kernel can not do without waiting (fsync, for one) takes one of its workers for
        // as long as it waits. By default there are four for each processor, and a replica
        // that hangs would soon have them all, with the other replicas waiting behind it.
        uring
            .submitter()
            .register_iowq_max_workers(&mut [KERNEL_WORKERS_MAX, 0])?;
        Ok(Self {
            uring,
            in_flight: Slab::new(),
            ways: Ways::new(REPLICAS_MAX),
            arena_registered: false,
            cached: ReplicaSet::first(files.len())
                .iter()
                .filter(|replica| is_cached(files[replica.as_usize()]))
                .collect(),
            operations: 0,
            long_writes: 0,
            completions: VecDeque::new(),
        })
    }

    /// Registers the arena of `pool`, from which all buffers of operations must come that lie in
    /// any arena. Where the kernel does not let us pin as much memory, operations are a little
    /// slower.
    pub fn register_arena(&mut self, pool: &BufferPool) {
        let Some((start, len)) = pool.arena() else {
            return;
        };
        let arena = libc::iovec {
            iov_base: start.as_ptr().cast(),
            iov_len: len,
        };
        // SAFETY: the kernel holds the pages by itself from now on, so the arena may go before the
        // ring; what it uses them for are operations, whose buffers keep the arena in
        // place.
        match unsafe { self.uring.submitter().register_buffers(&[arena]) } {
            Ok(()) => self.arena_registered = true,
            Err(error) => {
                debug!(
                    "{len} bytes of buffers cannot be registered ({error}); they are used as they are"
                )
            }
        }
    }

    /// Whether kernel threads are busy with long writes. They need the processor, and take longer
    /// than is worth looking for their end.
    pub fn is_writing_long(&self) -> bool {
        self.long_writes > 0
    }

    /// Whether `operation` is better given to a kernel thread than tried at once. Buffered writes
    /// end up with these threads in any case, which do those of one file one after the other.
    /// While one of them is busy the kernel makes no other one for the next file, unless it is
    /// told like this.
    fn is_for_thread(&self, operation: &Operation) -> bool {
        matches!(&operation.action, Action::Write { range, .. } if range.bytes() >= LONG_WRITE_BYTES)
            && self.cached.contains(operation.replica)
            && self.long_writes < LONG_WRITES_MAX
    }

    /// From now on `file` is what operations on `replica`, of which none is in flight, are done on.
    /// It must stay open until it is replaced.
    pub fn set_file(&mut self, replica: ReplicaIndex, file: Option<RawFd>) -> io::Result<()> {
        let place = u32::from(replica.0);
        let submitter = self.uring.submitter();
        submitter.register_files_update(place, &[file.unwrap_or(-1)])?;
        if file.is_some_and(is_cached) {
            self.cached.insert(replica);
        } else {
            self.cached.remove(replica);
        }
        self.ways.forget(replica);
        Ok(())
    }

    /// Queues `operation`; its reply comes out of a later [`Self::enter`].
    pub fn push(&mut self, operation: Operation, since: Since) -> io::Result<()> {
        self.operations += 1;
        let step = match &operation.action {
            Action::Zero { unmap, .. } => Step::Zeroing(self.ways.best(operation.replica, *unmap)),
            Action::Read { .. } | Action::Write { .. } | Action::Flush => Step::Itself,
        };
        let in_thread = self.is_for_thread(&operation);
        self.long_writes += usize::from(in_thread);
        let slot = self.in_flight.insert(InFlight::Operation {
            operation,
            step,
            done_bytes: 0,
            retries: 0,
            in_thread,
            since,
        });
        self.queue_slot(slot)
    }

    /// From now on tells whenever `fd`, an eventfd, is written to; also if it is readable already.
    /// The eventfd need not be read: each write is told once, whatever its count.
    pub fn watch(&mut self, fd: &impl AsRawFd, token: WatchToken) -> io::Result<Watch> {
        let fd = fd.as_raw_fd();
        let slot = self.in_flight.insert(InFlight::Watch {
            fd,
            token,
            state: WatchState::Armed,
        });
        self.queue_slot(slot)?;
        Ok(Watch { slot })
    }

    /// Ends a watch. The kernel holds the file until then, so the descriptor may be closed before.
    pub fn unwatch(&mut self, watch: &Watch) -> io::Result<()> {
        let Some(InFlight::Watch { state, .. }) = self.in_flight.get_mut(watch.slot) else {
            return Ok(());
        };
        if *state == WatchState::Failed {
            self.in_flight.remove(watch.slot);
            return Ok(());
        }
        *state = WatchState::GivenBack;
        let cancel = opcode::AsyncCancel::new(watch.slot as u64).build();
        self.queue_entry(&cancel.user_data(MEANINGLESS))
    }

    /// Hands everything queued to the kernel, waits for a completion as `wait` says, and returns
    /// what has completed; to be drained by the caller.
    ///
    /// # Errors
    /// Only what leaves the ring unusable.
    pub fn enter(&mut self, wait: Wait) -> io::Result<&mut VecDeque<Completion>> {
        let want = usize::from(self.completions.is_empty());
        let entered = match wait {
            Wait::No if self.has_nothing_to_do() => Ok(0),
            Wait::No => self.uring.submit_and_wait(0),
            Wait::Forever => self.uring.submit_and_wait(want),
            Wait::AtMost(limit) => {
                let limit = Timespec::from(limit);
                self.uring
                    .submitter()
                    .submit_with_args(want, &SubmitArgs::new().timespec(&limit))
            }
        };
        match entered {
            Ok(_) => {}
            // EBUSY: completions must be taken before more can be submitted; that happens next.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::EINTR | libc::EBUSY | libc::EAGAIN | libc::ETIME)
                ) => {}
            Err(error) => return Err(error),
        }
        self.reap()?;
        Ok(&mut self.completions)
    }

    /// Whether a system call would bring nothing: nothing is queued, and the kernel has set nothing
    /// aside for it.
    fn has_nothing_to_do(&mut self) -> bool {
        let queue = self.uring.submission();
        queue.is_empty() && !queue.taskrun() && !queue.cq_overflow()
    }

    /// Gives the emptied list of [`Self::enter`] back, to be used again.
    pub fn recycle(&mut self, mut emptied: VecDeque<Completion>) {
        if self.completions.is_empty() {
            emptied.clear();
            self.completions = emptied;
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        loop {
            let next = self.uring.completion().next();
            match next {
                Some(entry) => self.complete(&entry)?,
                None => return Ok(()),
            }
        }
    }

    fn complete(&mut self, entry: &cqueue::Entry) -> io::Result<()> {
        if entry.user_data() == MEANINGLESS {
            return Ok(());
        }
        let slot = usize::try_from(entry.user_data()).expect("a slot of ours");
        match &mut self.in_flight[slot] {
            InFlight::Watch { token, state, .. } => {
                let wanted = *state == WatchState::Armed;
                if wanted {
                    self.completions.push_back(Completion::Readable(*token));
                }
                if cqueue::more(entry.flags()) {
                    return Ok(());
                }
                if !wanted {
                    self.in_flight.remove(slot);
                } else if entry.result() >= 0 {
                    // The kernel gave the multishot up, for instance for want of room; ask again.
                    return self.queue_slot(slot);
                } else {
                    // The slot stays taken, so that giving it back later does not hit another
                    // watch.
                    *state = WatchState::Failed;
                }
            }
            InFlight::Operation {
                operation,
                step,
                done_bytes,
                retries,
                ..
            } => {
                let result =
                    match Outcome::of(&operation.action, *step, *done_bytes, entry.result()) {
                        Outcome::Again { done } if *retries < RETRIES_MAX || done > 0 => {
                            *done_bytes += done;
                            *retries = if done > 0 { 0 } else { *retries + 1 };
                            return self.queue_slot(slot);
                        }
                        Outcome::Again { .. } => Err(Errno(libc::EINTR)),
                        Outcome::Done => Ok(()),
                        Outcome::Failed(errno) => Err(errno),
                    };
                if let (Step::Zeroing(way), Action::Zero { unmap, durable, .. }) =
                    (*step, &operation.action)
                {
                    let next = match result {
                        Ok(()) => durable.then_some(Step::Persisting),
                        Err(errno) => {
                            let other = self.ways.after(operation.replica, *unmap, way, errno);
                            other.map(Step::Zeroing)
                        }
                    };
                    if let Some(next) = next {
                        (*step, *done_bytes, *retries) = (next, 0, 0);
                        return self.queue_slot(slot);
                    }
                }
                self.operations -= 1;
                if let InFlight::Operation {
                    operation,
                    in_thread,
                    since,
                    ..
                } = self.in_flight.remove(slot)
                {
                    self.long_writes -= usize::from(in_thread);
                    self.completions
                        .push_back(Completion::Reply(operation.reply(result), since));
                }
            }
        }
        Ok(())
    }

    /// Queues what is in `slot`, or what is left of it.
    fn queue_slot(&mut self, slot: usize) -> io::Result<()> {
        let entry = self.in_flight[slot]
            .entry(self.arena_registered)
            .user_data(slot as u64);
        self.queue_entry(&entry)
    }

    fn queue_entry(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the buffer that the entry points to belongs to an operation in `in_flight`,
            // which keeps it in place until the completion arrives, and `Drop` leaks it
            // if that never happens.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            // Full: more than one submission for this batch. What completes meanwhile stays in the
            // ring.
            match self.uring.submit() {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => {}
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    // The completion queue overflowed; make room.
                    self.reap()?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.operations > 0 {
            debug!(
                "{} operations are still in flight; their buffers are left to the kernel",
                self.operations
            );
            std::mem::forget(std::mem::take(&mut self.in_flight));
        }
    }
}

/// Whether what is written to this descriptor goes through the page cache.
fn is_cached(file: RawFd) -> bool {
    // SAFETY: only asks for the flags of the descriptor; one that is none is an error.
    let flags = unsafe { libc::fcntl(file, libc::F_GETFL) };
    flags >= 0 && flags & libc::O_DIRECT == 0
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
    // Linux before 6.6 does not know the first, before 6.1 the second.
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
mod tests;
