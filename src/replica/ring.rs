//! One io_uring for one worker thread: replica operations, and the file descriptors the worker waits on.
//!
//! Invariants: everything queued goes to the kernel with the next [`Ring::enter`], in one system call; every
//! operation has exactly one reply; an operation keeps its buffer until the kernel is done with it, and if
//! the ring must go before that, the buffers are leaked rather than reused.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::Duration;

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use log::debug;
use slab::Slab;

use super::buffer::BufferPool;
use super::operation::{Action, Operation, Reply};
use super::zero::{Way, Ways, ZEROES, ZEROES_BYTES};
use crate::limits::{REPLICAS_MAX, RING_ENTRIES};
use crate::quorum::{Errno, ReplicaIndex, SECTOR_BYTES, SectorRange};
use crate::statistics::Since;

/// How often an operation that the kernel interrupted is tried again before that counts as an error.
const RETRIES_MAX: u32 = 16;

/// Kernel threads that may wait for replicas at a time.
const KERNEL_WORKERS_MAX: u32 = 1024;

/// The index by which the kernel knows the arena.
const ARENA: u16 = 0;

/// Bytes of long writes after which kernel threads are called for anew. Idle, they are gone after five seconds.
const CALL_BYTES: u64 = 256 << 10;

/// Writes that keep a kernel thread busy for so long that another one is worth its while.
const LONG_WRITE_BYTES: u64 = 64 << 10;

/// User data of what completes without meaning: cancellations, and calls for kernel threads.
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
    /// Operations in flight, watches not counted.
    operations: usize,
    completions: VecDeque<Completion>,
    /// Kernel threads that are of use to writes.
    writers: usize,
    /// Bytes of long writes that were queued since they were called for.
    uncalled_bytes: u64,
}

enum InFlight {
    Operation {
        operation: Operation,
        step: Step,
        done_bytes: usize,
        retries: u32,
        since: Since,
    },
    Watch {
        fd: RawFd,
        token: WatchToken,
        state: WatchState,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WatchState {
    /// The kernel tells when the descriptor is written to.
    Armed,
    /// The kernel does not watch it, and will not: it is none that can be. Whoever has the watch does not know.
    Failed,
    /// It was given back: what still arrives is ignored.
    GivenBack,
}

/// What the kernel is doing for an operation. Most take one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// What it says.
    Itself,
    /// Zeroing in this way.
    Zeroing(Way),
    /// The zeroes are there; they are made durable.
    Persisting,
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
        // What the kernel can not do without waiting (fsync, for one) takes one of its workers for as long as
        // it waits. By default there are four for each processor, and a replica that hangs would soon have
        // them all, with the other replicas waiting behind it.
        uring
            .submitter()
            .register_iowq_max_workers(&mut [KERNEL_WORKERS_MAX, 0])?;
        Ok(Self {
            uring,
            in_flight: Slab::new(),
            ways: Ways::new(REPLICAS_MAX),
            arena_registered: false,
            operations: 0,
            completions: VecDeque::new(),
            writers: thread::available_parallelism()
                .map_or(1, usize::from)
                .min(files.len()),
            uncalled_bytes: 0,
        })
    }

    /// Registers the arena of `pool`, from which all buffers of operations must come that lie in any arena. Where the
    /// kernel does not let us pin as much memory, operations are a little slower.
    pub fn register_arena(&mut self, pool: &BufferPool) {
        let Some((start, len)) = pool.arena() else {
            return;
        };
        let arena = libc::iovec {
            iov_base: start.as_ptr().cast(),
            iov_len: len,
        };
        // SAFETY: the kernel holds the pages by itself from now on, so the arena may go before the ring; what it uses
        // them for are operations, whose buffers keep the arena in place.
        match unsafe { self.uring.submitter().register_buffers(&[arena]) } {
            Ok(()) => self.arena_registered = true,
            Err(error) => {
                debug!("{len} bytes of buffers cannot be registered ({error}); they are used as they are")
            }
        }
    }

    /// Sees to it that the kernel has threads enough for long writes. What goes through the page cache one of its threads
    /// does, file by file one after the other; for the second file it makes no other thread as long as the first is
    /// busy, but uses one that is there. Anything that is not a write gets a thread of its own, if it wants one.
    fn call_writers(&mut self) -> io::Result<()> {
        if self.uncalled_bytes < CALL_BYTES {
            return Ok(());
        }
        self.uncalled_bytes = 0;
        let call = opcode::Nop::new().build().flags(squeue::Flags::ASYNC);
        let call = call.user_data(MEANINGLESS);
        (0..self.writers).try_for_each(|_| self.queue_entry(&call))
    }

    /// From now on `file` is what operations on `replica`, of which none is in flight, are done on. It must stay
    /// open until it is replaced.
    pub fn set_file(&mut self, replica: ReplicaIndex, file: Option<RawFd>) -> io::Result<()> {
        let place = u32::from(replica.0);
        let submitter = self.uring.submitter();
        submitter.register_files_update(place, &[file.unwrap_or(-1)])?;
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
        if let Action::Write { range, .. } = &operation.action
            && range.bytes() >= LONG_WRITE_BYTES
        {
            self.uncalled_bytes += range.bytes();
        }
        let slot = self.in_flight.insert(InFlight::Operation {
            operation,
            step,
            done_bytes: 0,
            retries: 0,
            since,
        });
        self.queue_slot(slot)
    }

    /// From now on tells whenever `fd`, an eventfd, is written to; also if it is readable already. The
    /// eventfd need not be read: each write is told once, whatever its count.
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

    /// Hands everything queued to the kernel, waits for a completion as `wait` says, and returns what has
    /// completed; to be drained by the caller.
    ///
    /// # Errors
    /// Only what leaves the ring unusable.
    pub fn enter(&mut self, wait: Wait) -> io::Result<&mut VecDeque<Completion>> {
        self.call_writers()?;
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

    /// Whether a system call would bring nothing: nothing is queued, and the kernel has set nothing aside for it.
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
                    // The slot stays taken, so that giving it back later does not hit another watch.
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
                let result = match Outcome::of(&operation.action, *step, *done_bytes, entry.result()) {
                    Outcome::Again { done } if *retries < RETRIES_MAX || done > 0 => {
                        *done_bytes += done;
                        *retries = if done > 0 { 0 } else { *retries + 1 };
                        return self.queue_slot(slot);
                    }
                    Outcome::Again { .. } => Err(Errno(libc::EINTR)),
                    Outcome::Done => Ok(()),
                    Outcome::Failed(errno) => Err(errno),
                };
                if let (Step::Zeroing(way), Action::Zero { unmap, durable, .. }) = (*step, &operation.action)
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
                if let InFlight::Operation { operation, since, .. } = self.in_flight.remove(slot) {
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
            // SAFETY: the buffer that the entry points to belongs to an operation in `in_flight`, which
            // keeps it in place until the completion arrives, and `Drop` leaks it if that never happens.
            if unsafe { self.uring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            // Full: more than one submission for this batch. What completes meanwhile stays in the ring.
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

enum Outcome {
    Done,
    /// Partly done, or interrupted.
    Again {
        done: usize,
    },
    Failed(Errno),
}

impl Outcome {
    fn of(action: &Action, step: Step, done_bytes: usize, result: i32) -> Self {
        match usize::try_from(result) {
            Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => Self::Again { done: 0 },
            Err(_) => Self::Failed(Errno(-result)),
            Ok(done) => {
                let left = match (action, step) {
                    (Action::Read { range, .. } | Action::Write { range, .. }, _)
                    | (Action::Zero { range, .. }, Step::Zeroing(Way::Write)) => {
                        len_of(range.bytes()) - done_bytes
                    }
                    (Action::Flush | Action::Zero { .. }, _) => return Self::Done,
                };
                match done {
                    done if done == left => Self::Done,
                    // The end of the file: it was cut while we had it open.
                    0 => Self::Failed(Errno(libc::EIO)),
                    done => Self::Again { done },
                }
            }
        }
    }
}

impl InFlight {
    fn entry(&mut self, arena_registered: bool) -> squeue::Entry {
        match self {
            Self::Watch { fd, .. } => opcode::PollAdd::new(Fd(*fd), POLLIN).multi(true).build(),
            Self::Operation {
                operation,
                step,
                done_bytes,
                ..
            } => {
                let file = Fixed(u32::from(operation.replica.0));
                let skip = *done_bytes;
                match &mut operation.action {
                    Action::Read { range, into } => {
                        let registered = arena_registered && into.is_in_arena();
                        let offset = range.start * SECTOR_BYTES + skip as u64;
                        let rest = &mut into[skip..];
                        let (memory, len) = (rest.as_mut_ptr(), u32_of(rest.len()));
                        if registered {
                            opcode::ReadFixed::new(file, memory, len, ARENA)
                                .offset(offset)
                                .build()
                        } else {
                            opcode::Read::new(file, memory, len).offset(offset).build()
                        }
                    }
                    Action::Write {
                        range,
                        data,
                        offset_bytes,
                        durable,
                    } => {
                        let from = *offset_bytes + skip;
                        let rest = &data[from..*offset_bytes + len_of(range.bytes())];
                        let (memory, len) = (rest.as_ptr(), u32_of(rest.len()));
                        let offset = range.start * SECTOR_BYTES + skip as u64;
                        let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                        if arena_registered && data.is_in_arena() {
                            let write = opcode::WriteFixed::new(file, memory, len, ARENA);
                            write.offset(offset).rw_flags(flags).build()
                        } else {
                            let write = opcode::Write::new(file, memory, len);
                            write.offset(offset).rw_flags(flags).build()
                        }
                    }
                    Action::Zero { range, .. } => match step {
                        Step::Zeroing(way) => zeroing(file, *way, *range, skip),
                        Step::Itself | Step::Persisting => persisting(file),
                    },
                    Action::Flush => persisting(file),
                }
            }
        }
    }
}

fn persisting(file: Fixed) -> squeue::Entry {
    opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build()
}

fn zeroing(file: Fixed, way: Way, range: SectorRange, skip: usize) -> squeue::Entry {
    let start = range.start * SECTOR_BYTES;
    match way.fallocate_mode() {
        Some(mode) => opcode::Fallocate::new(file, range.bytes())
            .offset(start)
            .mode(mode)
            .build(),
        None => {
            let len = (len_of(range.bytes()) - skip).min(ZEROES_BYTES);
            opcode::Write::new(file, ZEROES.0.as_ptr(), u32_of(len))
                .offset(start + skip as u64)
                .build()
        }
    }
}

const POLLIN: u32 = libc::POLLIN.cast_unsigned() as u32;

fn len_of(bytes: u64) -> usize {
    usize::try_from(bytes).expect("a piece fits memory")
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("a piece is at most 1 MiB")
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
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => result = builder.build(RING_ENTRIES),
            other => return other,
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    use std::rc::Rc;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::replica::operation::RequestId;
    use crate::statistics::Recorder;

    fn operation(action: Action) -> Operation {
        Operation {
            request: RequestId(7),
            replica: ReplicaIndex(0),
            action,
        }
    }

    fn push(ring: &mut Ring, operation: Operation) -> io::Result<()> {
        ring.push(operation, Recorder::nobodys().now())
    }

    fn reply_of(ring: &mut Ring) -> Reply {
        loop {
            if let Some(Completion::Reply(reply, _)) = ring.enter(Wait::Forever).unwrap().pop_front() {
                return reply;
            }
        }
    }

    #[test]
    fn writes_reads_and_flushes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut ring = Ring::new(&[file.as_raw_fd()]).unwrap();
        let pool = BufferPool::default();
        let mut data = pool.take(4096);
        data.fill(0xa5);
        push(
            &mut ring,
            operation(Action::Write {
                range: SectorRange::new(9, 2),
                data: Rc::new(data),
                offset_bytes: 512,
                durable: true,
            }),
        )
        .unwrap();
        assert_eq!(reply_of(&mut ring).result, Ok(()));
        let mut bytes = [0; 4 * 512];
        file.read_exact_at(&mut bytes, 8 * 512).unwrap();
        assert!(bytes[512..1536].iter().all(|b| *b == 0xa5));
        assert!(bytes[..512].iter().chain(&bytes[1536..]).all(|b| *b == 0));

        let into = pool.take(512);
        push(
            &mut ring,
            operation(Action::Read {
                range: SectorRange::new(10, 1),
                into,
            }),
        )
        .unwrap();
        let reply = reply_of(&mut ring);
        assert_eq!((reply.request, reply.result), (RequestId(7), Ok(())));
        assert!(matches!(reply.action, Action::Read { into, .. } if into.iter().all(|b| *b == 0xa5)));

        push(&mut ring, operation(Action::Flush)).unwrap();
        assert_eq!(reply_of(&mut ring).result, Ok(()));
        assert_eq!(ring.operations, 0);
    }

    fn zero(ring: &mut Ring, range: SectorRange, unmap: bool) -> Result<(), Errno> {
        push(
            ring,
            operation(Action::Zero {
                range,
                unmap,
                durable: true,
            }),
        )
        .unwrap();
        reply_of(ring).result
    }

    #[test]
    fn zeroes_in_every_way_and_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        let len = 3 * ZEROES_BYTES;
        let lacks_nothing = |_: &mut Ways| {};
        let lacks_holes = |ways: &mut Ways| {
            ways.after(ReplicaIndex(0), true, Way::PunchHole, Errno(libc::EOPNOTSUPP));
        };
        let lacks_both = |ways: &mut Ways| {
            for way in [Way::PunchHole, Way::ZeroRange] {
                ways.after(ReplicaIndex(0), true, way, Errno(libc::EOPNOTSUPP));
            }
        };
        let kinds: [&dyn Fn(&mut Ways); 3] = [&lacks_nothing, &lacks_holes, &lacks_both];
        for (lacks, unmap) in kinds
            .into_iter()
            .flat_map(|lacks| [(lacks, true), (lacks, false)])
        {
            file.write_all_at(&vec![7; len], 0).unwrap();
            let mut ring = Ring::new(&[file.as_raw_fd()]).unwrap();
            lacks(&mut ring.ways);
            // Neither end is that of a page.
            let range = SectorRange::new(3, 2 * ZEROES_BYTES as u64 / SECTOR_BYTES + 77);
            assert_eq!(zero(&mut ring, range, unmap), Ok(()));
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, 0).unwrap();
            let start = len_of(range.start * SECTOR_BYTES);
            let (before, rest) = bytes.split_at(start);
            let (zeroed, after) = rest.split_at(len_of(range.bytes()));
            assert!(
                before.iter().chain(after).all(|byte| *byte == 7),
                "unmap: {unmap}"
            );
            assert!(zeroed.iter().all(|byte| *byte == 0), "unmap: {unmap}");
            assert_eq!(ring.operations, 0);
        }
    }

    #[test]
    fn unmapping_gives_the_space_back() {
        use std::os::unix::fs::MetadataExt;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; 1 << 20], 0).unwrap();
        let mut ring = Ring::new(&[file.as_raw_fd()]).unwrap();
        assert_eq!(zero(&mut ring, SectorRange::new(0, 2048), true), Ok(()));
        assert_eq!(file.metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn a_read_beyond_the_end_of_a_cut_file_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(768).unwrap();
        let mut ring = Ring::new(&[file.as_raw_fd()]).unwrap();
        let into = BufferPool::default().take(1024);
        push(
            &mut ring,
            operation(Action::Read {
                range: SectorRange::new(0, 2),
                into,
            }),
        )
        .unwrap();
        assert_eq!(reply_of(&mut ring).result, Err(Errno(libc::EIO)));
    }

    #[test]
    fn takes_more_operations_than_the_queue_has_entries() {
        let file = tempfile::tempfile().unwrap();
        let mut ring = Ring::new(&[file.as_raw_fd()]).unwrap();
        let count = RING_ENTRIES as usize * 3 + 1;
        for _ in 0..count {
            push(&mut ring, operation(Action::Flush)).unwrap();
        }
        for _ in 0..count {
            assert_eq!(reply_of(&mut ring).result, Ok(()));
        }
    }

    #[test]
    fn a_file_is_taken_and_let_go_while_others_are_in_use() {
        let (first, second) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        second.write_all_at(&[9; 512], 0).unwrap();
        let mut ring = Ring::new(&[first.as_raw_fd()]).unwrap();
        let read = |ring: &mut Ring| {
            let into = BufferPool::default().take(512);
            let range = SectorRange::new(0, 1);
            let read = Operation {
                replica: ReplicaIndex(7),
                ..operation(Action::Read { range, into })
            };
            push(ring, read).unwrap();
            reply_of(ring)
        };
        assert_eq!(read(&mut ring).result, Err(Errno(libc::EBADF)));
        ring.set_file(ReplicaIndex(7), Some(second.as_raw_fd())).unwrap();
        let reply = read(&mut ring);
        assert_eq!(reply.result, Ok(()));
        assert!(matches!(reply.action, Action::Read { into, .. } if into.iter().all(|byte| *byte == 9)));
        ring.set_file(ReplicaIndex(7), None).unwrap();
        assert_eq!(read(&mut ring).result, Err(Errno(libc::EBADF)));
    }

    #[test]
    fn tells_every_write_to_a_watched_eventfd_until_it_is_unwatched() {
        let mut ring = Ring::new(&[tempfile::tempfile().unwrap().as_raw_fd()]).unwrap();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let watch = ring.watch(&event, WatchToken(3)).unwrap();
        for _ in 0..3 {
            event.write(1).unwrap();
            let completion = ring.enter(Wait::Forever).unwrap().pop_front();
            assert!(matches!(completion, Some(Completion::Readable(WatchToken(3)))));
        }
        ring.unwatch(&watch).unwrap();
        event.write(1).unwrap();
        while !ring.in_flight.is_empty() {
            assert!(ring.enter(Wait::Forever).unwrap().is_empty());
        }
    }
    #[test]
    fn what_cannot_be_watched_takes_no_other_watch_with_it() {
        let mut ring = Ring::new(&[tempfile::tempfile().unwrap().as_raw_fd()]).unwrap();
        // Names a file, and cannot be used.
        let path = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open("/")
            .unwrap();
        let hopeless = ring.watch(&path, WatchToken(1)).unwrap();
        ring.enter(Wait::Forever).unwrap().clear();
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let _watch = ring.watch(&event, WatchToken(2)).unwrap();
        ring.unwatch(&hopeless).unwrap();
        ring.enter(Wait::AtMost(Duration::from_millis(1)))
            .unwrap()
            .clear();
        event.write(1).unwrap();
        let completion = ring
            .enter(Wait::AtMost(Duration::from_secs(20)))
            .unwrap()
            .pop_front();
        assert!(
            matches!(completion, Some(Completion::Readable(WatchToken(2)))),
            "{completion:?}"
        );
    }
}
