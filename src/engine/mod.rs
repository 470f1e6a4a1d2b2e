//! The life of a request: a state machine that is fed with guest requests and replica replies, and asks for
//! replica operations, completions and reports.
//!
//! Sans-IO: no file descriptor, no clock, no thread in here. Whoever drives an [`Engine`] carries out what it
//! asks for through [`Effects`] and feeds the replies back. One engine serves one worker thread; what the
//! engines of a disk share is [`Shared`].
//!
//! ```text
//! read   asking ─────► answered ─► retired            t' replies agree: the others are only compared
//!           │ replies differ                          (and when all have agreed, that is all)
//!           ▼
//!        waiting for the range lock ─► confirming ─► answered, reported ─► rewriting ─► retired
//!
//! write  waiting for the range lock ─► writing ─► answered, retired
//! flush  flushing ─► answered, retired
//! ```
//!
//! Invariants: a request is answered exactly once, and before it is retired; it is retired when its last
//! operation is back; operations that change overlapping sectors run one after another (W2); a replica is
//! accused of wrong bytes only after a read that held the lock (R5).

mod flush;
mod range_locks;
mod read;
mod shared;
mod write;

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use slab::Slab;

pub use self::shared::{Counters, Shared, WorkerIndex};

use self::flush::Flush;
use self::range_locks::LockKey;
use self::read::Read;
use self::shared::Waiter;
use self::write::Write;
use crate::limits::{BUFFER_BYTES_MAX, PIECE_BYTES_MAX, REQUESTS_MAX};
use crate::quorum::report::{Cause, OperationType, Report};
use crate::quorum::{Errno, ReplicaIndex, ReplicaSet, SectorRange};
use crate::replica::buffer::{Buffer, BufferPool};
use crate::replica::operation::{Operation, Reply, RequestId};

/// Which replicas a read asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPattern {
    /// All of them, and they vote.
    Quorum,
    /// The first in order that answers.
    Fifo,
}

/// How a disk decides.
#[derive(Clone, Debug)]
pub struct Policy {
    /// How many replicas there are, N.
    pub replicas: usize,
    /// The vote threshold t, 1 ≤ t ≤ N.
    pub threshold: usize,
    /// Which replicas a read asks.
    pub read_pattern: ReadPattern,
    /// Write the winner to the bad sectors of replicas that lost a vote, or failed a `fifo` read.
    pub rewrite_corrupted: bool,
    /// A sector without a winner stops the daemon.
    pub blkverify: bool,
    /// The unit in which replicas can be read and written, in sectors. All guest requests are multiples.
    pub block_sectors: u64,
}

/// The name that the device gave to a request; comes back when the request is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(pub u64);

/// What a guest can ask for. Ranges are within the disk, not empty, at most a piece long and multiples of
/// [`Policy::block_sectors`]; the device has checked that.
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
    /// Make every write that was answered before durable.
    Flush,
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
    /// Call [`Engine::granted`] with `request` on the engine of another worker.
    fn wake(&mut self, worker: WorkerIndex, request: RequestId);
    /// The replicas of a `--blkverify` disk differ: stop the daemon.
    fn contents_differ(&mut self, range: SectorRange);
}

/// The state machine of one worker.
#[derive(Debug)]
pub struct Engine {
    requests: Slab<Request>,
    core: Core,
}

/// What every request needs of its engine.
#[derive(Debug)]
struct Core {
    worker: WorkerIndex,
    policy: Policy,
    shared: Arc<Shared>,
    pool: BufferPool,
    /// Requests of this engine whose lock has been granted.
    granted: VecDeque<RequestId>,
    /// Scratch for [`Core::unlock`].
    waiters: Vec<Waiter>,
    /// Bytes of all requests that are not retired, once for each buffer they may need.
    bytes: u64,
    /// Emptied lists of replies, to be used again.
    spare_replies: Vec<Vec<Option<Buffer>>>,
}

#[derive(Debug)]
enum Request {
    Read(Read),
    Write(Write),
    Flush(Flush),
}

/// Whether a request goes on after an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    Retired,
}

impl Engine {
    /// The engine of `worker`.
    pub fn new(worker: WorkerIndex, policy: Policy, shared: Arc<Shared>, pool: BufferPool) -> Self {
        assert!((1..=policy.replicas).contains(&policy.threshold));
        Self {
            requests: Slab::new(),
            core: Core {
                worker,
                policy,
                shared,
                pool,
                granted: VecDeque::new(),
                waiters: Vec::new(),
                bytes: 0,
                spare_replies: Vec::new(),
            },
        }
    }

    /// Whether another request may be submitted. At the bound the device takes nothing from the guest until
    /// some are retired.
    pub fn has_room(&self) -> bool {
        let most = PIECE_BYTES_MAX * (self.core.policy.replicas as u64 + 1);
        self.requests.len() < REQUESTS_MAX && self.core.bytes + most <= BUFFER_BYTES_MAX.max(most)
    }

    /// Whether every request is retired.
    pub fn is_idle(&self) -> bool {
        self.requests.is_empty()
    }

    /// Takes a guest request in. `tag` comes back with its answer, perhaps before this returns.
    pub fn submit(&mut self, tag: Tag, request: GuestRequest, effects: &mut impl Effects) {
        let core = &mut self.core;
        let request = match request {
            GuestRequest::Read(range) => Request::Read(Read::new(tag, range, core)),
            GuestRequest::Write { range, data, durable } => {
                Request::Write(Write::new(tag, range, Rc::new(data), durable))
            }
            GuestRequest::Flush => Request::Flush(Flush::new(tag)),
        };
        core.bytes += request.bytes(&core.policy);
        let key = self.requests.insert(request);
        let id = RequestId(u32::try_from(key).expect("REQUESTS_MAX fits"));
        self.step(id, effects, |request, core, effects| match request {
            Request::Read(read) => read.begin(id, core, effects),
            Request::Write(write) => write.begin(id, core, effects),
            Request::Flush(flush) => flush.begin(id, core, effects),
        });
    }

    /// Takes the end of an operation in.
    pub fn reply(&mut self, reply: Reply, effects: &mut impl Effects) {
        let id = reply.request;
        self.step(id, effects, |request, core, effects| match request {
            Request::Read(read) => read.reply(id, reply, core, effects),
            Request::Write(write) => write.reply(reply, core, effects),
            Request::Flush(flush) => flush.reply(reply, core, effects),
        });
    }

    /// The range lock that `request` waited for was released by another worker.
    pub fn granted(&mut self, request: RequestId, effects: &mut impl Effects) {
        self.core.granted.push_back(request);
        self.run_granted(effects);
    }

    fn step<E: Effects>(
        &mut self,
        id: RequestId,
        effects: &mut E,
        advance: impl FnOnce(&mut Request, &mut Core, &mut E) -> Progress,
    ) {
        self.advance(id, effects, advance);
        self.run_granted(effects);
    }

    fn advance<E: Effects>(
        &mut self,
        id: RequestId,
        effects: &mut E,
        advance: impl FnOnce(&mut Request, &mut Core, &mut E) -> Progress,
    ) {
        let request = &mut self.requests[id.0 as usize];
        if advance(request, &mut self.core, effects) == Progress::Retired {
            let request = self.requests.remove(id.0 as usize);
            self.core.bytes -= request.bytes(&self.core.policy);
        }
    }

    fn run_granted(&mut self, effects: &mut impl Effects) {
        while let Some(id) = self.core.granted.pop_front() {
            self.advance(id, effects, |request, core, effects| match request {
                Request::Read(read) => read.lock_granted(id, core, effects),
                Request::Write(write) => write.lock_granted(id, core, effects),
                Request::Flush(_) => unreachable!("a flush takes no lock"),
            });
        }
    }
}

impl Request {
    /// Bytes of buffers that the request may hold at a time.
    fn bytes(&self, policy: &Policy) -> u64 {
        match self {
            // One buffer for each replica; the winner is assembled in one of them.
            Self::Read(read) => read.range().bytes() * policy.replicas as u64,
            Self::Write(write) => write.range().bytes(),
            Self::Flush(_) => 0,
        }
    }
}

impl Core {
    fn all_replicas(&self) -> ReplicaSet {
        ReplicaSet::first(self.policy.replicas)
    }

    /// Asks for the lock on `range` for `request`.
    fn lock(&self, range: SectorRange, request: RequestId) -> (LockKey, bool) {
        let worker = self.worker;
        self.shared.lock(range, Waiter { worker, request })
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
