//! The life of a request: a state machine that is fed with guest requests, replica replies and the
//! time, and asks for replica operations, completions and reports.
//!
//! Sans-IO: no file descriptor, no clock, no thread in here. Whoever drives an [`Engine`] carries
//! out what it asks for through [`Effects`] and feeds the replies back. One engine serves one
//! worker thread; what the engines of a disk share is [`Shared`].
//!
//! ```text
//! read   asking ─────► answered ─► retired            t' replies agree: the others are only compared
//!           │ replies differ                          (and when all have agreed, that is all)
//!           ▼
//!        waiting for the range lock ─► confirming ─► answered, reported ─► repairing ─► retired
//!
//! write  waiting for the range lock ─► writing ─► answered, retired        discard and write-zeroes too
//! flush  flushing ─► answered, retired
//! ```
//!
//! A replica that does not answer in time leaves the set, and the requests that wait for it go on
//! without it. Its operations are *lent*: their slot stays until the last of them is back. See
//! `time.rs`. One that is removed from the disk leaves in the same way, for good.
//!
//! Invariants: a request is answered exactly once, and before it is retired; a slot is free when
//! its last operation is back; operations that change overlapping sectors run one after another
//! (W2); a replica is accused of wrong bytes only after a read that held the lock (R5).

mod background;
mod confirm;
mod flush;
pub mod mutant;
mod range_locks;
mod read;
mod scrub;
mod shared;
mod time;
mod write;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use slab::Slab;

pub use self::shared::{Counters, ReplicaCounters, Shared, WorkerIndex};

use self::background::Background;
use self::flush::Flush;
use self::mutant::{Mutant, is_broken};
use self::range_locks::LockKey;
use self::read::Read;
use self::shared::Waiter;
use self::time::Clock;
use self::write::{Content, Write};
use crate::common::buffer::{Buffer, BufferPool};
use crate::common::operation::OperationType;
use crate::common::operation::{Operation, Reply, RequestId};
use crate::common::report::{Cause, Report};
use crate::common::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::{JobEvent, Sizes};
use crate::limits::{
    BUFFER_BYTES_MAX, CONFIRMATIONS_MAX, FRAGMENT_BYTES_MAX, LAG_BYTES_MAX, LAG_OPERATIONS_MAX,
    REPLICAS_MAX, REQUESTS_MAX,
};

/// Which replicas a read asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPattern {
    /// All of them, and they vote.
    Quorum,
    /// Only as many as make a quorum when they agree; the others when they do not, or are slow.
    Threshold,
    /// The first in order that answers.
    Fifo,
}

/// How a disk decides.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The vote threshold t; there are never fewer replicas.
    pub threshold: usize,
    /// Which replicas a read asks.
    pub read_pattern: ReadPattern,
    /// Write the winner to the bad sectors of replicas that lost a vote, or failed a `fifo` read.
    pub rewrite_corrupted: bool,
    /// A sector without a winner stops the daemon.
    pub blkverify: bool,
    /// How much jobs do at a time.
    pub job_sizes: Sizes,
    /// The unit in which replicas can be read and written, in sectors. All guest requests are
    /// multiples.
    pub block_sectors: u64,
    /// A replica that leaves an operation unanswered for so long leaves the set.
    pub replica_timeout: Duration,
}

/// The name that the device gave to a request; comes back when the request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(pub u64);

/// What a guest can ask for. Ranges are within the disk, not empty, multiples of
/// [`Policy::block_sectors`] and, where nothing else is said, at most a fragment long; the device
/// has checked that.
#[derive(Debug)]
pub enum GuestRequest {
    /// Read the range.
    Read(SectorRange),
    /// Write the range.
    Write {
        /// The sectors.
        range: SectorRange,
        /// The private copy of the guest's data (W1).
        data: Buffer,
        /// The data must be durable when the request is answered: the guest has no flush.
        durable: bool,
    },
    /// Make the range read as zeroes on every replica: a discard, or write-zeroes. At most
    /// [`ZERO_BYTES_MAX`](crate::limits::ZERO_BYTES_MAX) long.
    Zero {
        /// The sectors.
        range: SectorRange,
        /// The space may be given back.
        unmap: bool,
        /// The zeroes must be durable when the request is answered.
        durable: bool,
    },
    /// Make every write that was answered before durable.
    Flush,
}

impl GuestRequest {
    /// Bytes that are read or written; none where nothing needs a buffer.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read(range) | Self::Write { range, .. } => range.bytes(),
            Self::Zero { .. } | Self::Flush => 0,
        }
    }
}

/// The request failed; the guest gets an I/O error. Why has been reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed;

/// What an engine asks of whoever drives it. None of these may call back into the engine.
pub trait Effects {
    /// Do this on a replica and feed the reply to [`Engine::reply`], once.
    fn submit(&mut self, operation: Operation);
    /// Answer the guest. A read brings its data, other requests an empty slice.
    fn complete(&mut self, tag: Tag, result: Result<&[u8], Failed>);
    /// Tell the operator.
    fn report(&mut self, report: Report);
    /// Sectors of a replica that were wrong have been written with the winner.
    fn repaired(&mut self, replica: ReplicaIndex, range: SectorRange);
    /// Call [`Engine::granted`] with `request` on the engine of another worker.
    fn wake(&mut self, worker: WorkerIndex, request: RequestId);
    /// A replica has left the set or came back, or something has become stale: call
    /// [`Engine::tick`] on every engine soon, also on one that has nothing to do.
    fn health_changed(&mut self);
    /// Tell the operator of a job.
    fn job_changed(&mut self, event: JobEvent);
    /// No engine has anything to do with this removed replica any more: its place is free.
    fn released(&mut self, replica: ReplicaIndex);
    /// The replicas of a `--blkverify` disk differ: stop the daemon.
    fn contents_differ(&mut self, range: SectorRange);
}

/// The state machine of one worker.
#[derive(Debug)]
pub struct Engine {
    slots: Slab<Slot>,
    core: Core,
}

/// A request, and how many of its operations are in flight.
#[derive(Debug)]
struct Slot {
    request: Request,
    operations: usize,
    /// Bytes of buffers that the request may hold at a time.
    bytes: u64,
}

#[derive(Debug)]
enum Request {
    Read(Read),
    Write(Write),
    Flush(Flush),
    /// Retired, but a replica that does not answer still has operations of it.
    Orphaned,
}

/// Whether a request goes on after an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    Retired,
}

/// What every request needs of its engine.
#[derive(Debug)]
struct Core {
    worker: WorkerIndex,
    policy: Policy,
    shared: Arc<Shared>,
    pool: BufferPool,
    clock: Clock,
    background: Background,
    /// Requests of this engine whose lock has been granted.
    granted: VecDeque<RequestId>,
    /// Requests that other requests have begun.
    begun: VecDeque<Read>,
    /// Scratch for [`Core::unlock`].
    waiters: Vec<Waiter>,
    /// Operations submitted since the slot they belong to was last looked at.
    submitted: usize,
    /// What each replica has of this worker.
    outstanding: [Outstanding; REPLICAS_MAX],
    /// Requests that are not retired.
    active: usize,
    /// Reads that are being repeated under a lock.
    confirmations: usize,
    /// Bytes of all requests that are not retired, once for each buffer they may need.
    bytes: u64,
    /// Emptied lists of replies, to be used again.
    spare_replies: Vec<Vec<Option<Buffer>>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Outstanding {
    operations: usize,
    bytes: u64,
}

impl Engine {
    /// The engine of `worker`.
    pub fn new(worker: WorkerIndex, policy: Policy, shared: Arc<Shared>, pool: BufferPool) -> Self {
        let (block_sectors, timeout) = (policy.block_sectors, policy.replica_timeout);
        shared.configure_jobs(block_sectors, policy.job_sizes, timeout);
        Self {
            slots: Slab::new(),
            core: Core {
                worker,
                shared,
                pool,
                clock: Clock::new(),
                background: Background::default(),
                granted: VecDeque::new(),
                begun: VecDeque::new(),
                waiters: Vec::new(),
                submitted: 0,
                outstanding: [Outstanding::default(); REPLICAS_MAX],
                active: 0,
                confirmations: 0,
                bytes: 0,
                spare_replies: Vec::new(),
                policy,
            },
        }
    }

    /// Whether another request may be submitted. At the bound the device takes nothing from the
    /// guest until some are retired.
    pub fn has_room(&self) -> bool {
        let core = &self.core;
        let most = FRAGMENT_BYTES_MAX * (core.shared.in_service().len() as u64 + 1);
        core.active < REQUESTS_MAX
            && core.confirmations < CONFIRMATIONS_MAX
            && core.bytes + most <= BUFFER_BYTES_MAX.max(most)
    }

    /// Whether `request`, which has operations in flight, is a write or a zeroing of the guest.
    #[cfg(feature = "sim")]
    pub fn is_guest_write(&self, request: RequestId) -> bool {
        matches!(self.slots[request.0 as usize].request, Request::Write(_))
    }

    /// Whether every request is retired. Replicas that left the set may still have operations.
    pub fn is_idle(&self) -> bool {
        self.core.active == 0
    }

    /// Takes a guest request in. `tag` comes back with its answer, perhaps before this returns.
    pub fn submit(&mut self, tag: Tag, request: GuestRequest, effects: &mut impl Effects) {
        self.core.count_request();
        let request = match request {
            GuestRequest::Read(range) => Request::Read(Read::new(tag, range)),
            GuestRequest::Write {
                range,
                data,
                durable,
            } => Request::Write(Write::new(
                tag,
                range,
                Content::Data(Rc::new(data)),
                durable,
            )),
            GuestRequest::Zero {
                range,
                unmap,
                durable,
            } => Request::Write(Write::new(tag, range, Content::Zeroes { unmap }, durable)),
            GuestRequest::Flush => Request::Flush(Flush::new(tag)),
        };
        self.begin(request, effects);
        self.run_ready(effects);
    }

    /// Takes the end of an operation in.
    pub fn reply(&mut self, reply: Reply, effects: &mut impl Effects) {
        let id = reply.request;
        self.core.returned(&reply);
        self.slots[id.0 as usize].operations -= 1;
        self.advance(id, effects, |request, core, effects| match request {
            Request::Read(read) => read.reply(id, reply, core, effects),
            Request::Write(write) => write.reply(reply, core, effects),
            Request::Flush(flush) => flush.reply(&reply, core, effects),
            Request::Orphaned => {
                // Nobody waits for it any more, but an error is an error (R4).
                if let Err(errno) = reply.result {
                    let (operation, range) = reply.action.describe();
                    report_error(effects, reply.replica, operation, range, errno);
                }
                Progress::Retired
            }
        });
        self.run_ready(effects);
    }

    /// The range lock that `request` waited for was released by another worker.
    pub fn granted(&mut self, request: RequestId, effects: &mut impl Effects) {
        self.core.granted.push_back(request);
        self.run_ready(effects);
    }

    fn begin(&mut self, request: Request, effects: &mut impl Effects) {
        let bytes = request.bytes(self.core.shared.in_service());
        self.core.active += 1;
        self.core.bytes += bytes;
        let key = self.slots.insert(Slot {
            request,
            operations: 0,
            bytes,
        });
        let id = RequestId(u32::try_from(key).expect("slots are bounded"));
        self.advance(id, effects, |request, core, effects| match request {
            Request::Read(read) => read.begin(id, core, effects),
            Request::Write(write) => write.begin(id, core),
            Request::Flush(flush) => flush.begin(id, core),
            Request::Orphaned => unreachable!("nothing begins as retired"),
        });
    }

    /// Lets a request take an input in, and its slot go when there is no more use for it.
    fn advance<E: Effects>(
        &mut self,
        id: RequestId,
        effects: &mut E,
        input: impl FnOnce(&mut Request, &mut Core, &mut E) -> Progress,
    ) {
        let (slot, core) = (&mut self.slots[id.0 as usize], &mut self.core);
        let progress = input(&mut slot.request, core, effects);
        slot.operations += std::mem::take(&mut core.submitted);
        if progress == Progress::Waiting {
            return;
        }
        let request = std::mem::replace(&mut slot.request, Request::Orphaned);
        if !matches!(request, Request::Orphaned) {
            core.active -= 1;
            core.bytes -= slot.bytes;
        }
        if slot.operations == 0 {
            self.slots.remove(id.0 as usize);
        }
    }

    /// Lets go on who can, until nobody can.
    fn run_ready(&mut self, effects: &mut impl Effects) {
        loop {
            if let Some(id) = self.core.granted.pop_front() {
                self.advance(id, effects, |request, core, effects| match request {
                    Request::Read(read) => read.lock_granted(id, core, effects),
                    Request::Write(write) => write.lock_granted(id, core, effects),
                    Request::Flush(flush) => flush.lock_granted(id, core, effects),
                    Request::Orphaned => unreachable!("waits for no lock"),
                });
            } else if let Some(read) = self.core.begun.pop_front() {
                self.begin(Request::Read(read), effects);
            } else if self.core.background.is_due()
                && let Some(request) = self.next_work(effects)
            {
                self.begin(request, effects);
            } else {
                return;
            }
        }
    }
}

impl Request {
    /// Bytes of buffers that the request may hold at a time.
    fn bytes(&self, in_service: ReplicaSet) -> u64 {
        match self {
            // One buffer for each replica, and one in which the winner may have to be put together.
            Self::Read(read) => read.range().bytes() * (in_service.len() as u64 + 1),
            Self::Write(write) => write.buffer_bytes(),
            Self::Flush(_) | Self::Orphaned => 0,
        }
    }
}

impl Core {
    /// Hands an operation of the request that is being looked at to a replica.
    fn submit(&mut self, operation: Operation, effects: &mut impl Effects) {
        self.submitted += 1;
        let outstanding = &mut self.outstanding[operation.replica.as_usize()];
        outstanding.operations += 1;
        outstanding.bytes += operation.action.bytes();
        effects.submit(operation);
    }

    fn returned(&mut self, reply: &Reply) {
        let outstanding = &mut self.outstanding[reply.replica.as_usize()];
        outstanding.operations -= 1;
        outstanding.bytes -= reply.action.bytes();
    }

    /// The replicas that may vote on all of `range` and are not so far behind that reads do without
    /// them.
    fn voters(&self, range: SectorRange) -> ReplicaSet {
        let fresh = self
            .shared
            .in_service()
            .without(self.shared.stale_in(range));
        let lags = |replica: &ReplicaIndex| {
            let outstanding = self.outstanding[replica.as_usize()];
            outstanding.operations >= LAG_OPERATIONS_MAX || outstanding.bytes >= LAG_BYTES_MAX
        };
        let lagging: ReplicaSet = fresh.iter().filter(lags).collect();
        if lagging.is_empty() || fresh.without(lagging).len() < self.policy.threshold {
            fresh
        } else {
            fresh.without(lagging)
        }
    }

    /// Asks for the lock on `range` for `request`, which goes on in its `lock_granted`: when this
    /// input has been dealt with, if nobody has the range.
    fn lock(&mut self, range: SectorRange, request: RequestId) -> LockKey {
        let worker = self.worker;
        let (lock, granted) = self.shared.lock(range, Waiter { worker, request });
        if granted || is_broken(Mutant::NoRangeLock) {
            self.granted.push_back(request);
        }
        lock
    }

    /// Gives a lock back and sees to it that whoever it is granted to goes on.
    fn unlock(&mut self, key: LockKey, effects: &mut impl Effects) {
        self.shared.unlock(key, &mut self.waiters);
        for waiter in self.waiters.drain(..) {
            if waiter.worker == self.worker {
                self.granted.push_back(waiter.request);
            } else {
                effects.wake(waiter.worker, waiter.request);
            }
        }
    }
}

/// Reports the failure of an operation on one replica (R4).
fn report_error(
    effects: &mut impl Effects,
    replica: ReplicaIndex,
    operation: OperationType,
    range: SectorRange,
    errno: Errno,
) {
    effects.report(Report::Bad {
        replica,
        operation,
        range,
        cause: Cause::Error(errno),
    });
}
