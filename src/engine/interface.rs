//! What an engine takes in and asks for: guest requests, and [`Effects`].

use std::time::Duration;

use super::WorkerIndex;
use crate::common::buffer::Buffer;
use crate::common::operation::{Operation, RequestId};
use crate::common::report::{Fact, Report};
use crate::common::{ReplicaIndex, SectorRange};
use crate::jobs::{JobEvent, Sizes};

/// Which replicas a read asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadPattern {
    /// All replicas, which then vote.
    Quorum,
    /// As many replicas as make a quorum; the others too if these differ or one is slow.
    Threshold,
    /// The first replica in order that succeeds.
    Fifo,
}

/// How a disk decides.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The vote threshold t at the start. [`Shared::threshold`](super::Shared::threshold) is the
    /// present one.
    pub threshold: usize,
    /// Which replicas a read asks.
    pub read_pattern: ReadPattern,
    /// Repair the sectors of replicas that lost a vote or failed a `fifo` read.
    pub rewrite_corrupted: bool,
    /// Of these at most so many, counted for each replica, until the operator decides (O5).
    pub repair_limit_sectors: u64,
    /// An undecided sector stops the daemon.
    pub blkverify: bool,
    /// How much jobs do at a time.
    pub job_sizes: Sizes,
    /// The unit in which replicas can be read and written, in sectors. Every guest request is a
    /// multiple of it.
    pub block_sectors: u64,
    /// The engine evicts a replica that has not answered an operation for this long.
    pub replica_timeout: Duration,
}

/// What made a request; comes back with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tag {
    /// A guest.
    Guest {
        /// The connection slot of the guest.
        connection: u8,
        /// The part of the guest's request.
        fragment: FragmentId,
    },
    /// The worker: a flush that no guest asked for.
    OwnFlush,
}

/// Names a fragment of a request of one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentId {
    /// The key of the request's chain on the device.
    pub chain: u32,
    /// Where in the request the fragment begins.
    pub offset_sectors: u32,
}

/// What a guest can ask for. The device has checked that ranges lie within the disk, are not empty,
/// are multiples of [`Policy::block_sectors`] and, except for [`GuestRequest::Zero`], are at most
/// [`FRAGMENT_BYTES_MAX`](crate::limits::FRAGMENT_BYTES_MAX) long.
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
    /// A write of the range for whose data the system has no memory. It fails.
    WriteWithoutMemory(SectorRange),
    /// Make the range read as zeroes on every replica: a discard, or write-zeroes. At most
    /// [`ZERO_BYTES_MAX`](crate::limits::ZERO_BYTES_MAX) long.
    Zero {
        /// The sectors.
        range: SectorRange,
        /// The replicas may give the space back.
        unmap: bool,
        /// The zeroes must be durable when the request is answered.
        durable: bool,
    },
    /// Make every write that was answered before durable.
    Flush,
}

impl GuestRequest {
    /// Bytes that the request reads or writes; 0 if it needs no buffer.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read(range) | Self::Write { range, .. } => range.bytes(),
            Self::WriteWithoutMemory(_) | Self::Zero { .. } | Self::Flush => 0,
        }
    }
}

/// The request failed. The engine has reported the reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed {
    /// A replica has no space left for it.
    pub no_space: bool,
    /// It is a flush, or a write that the replicas have written and that no flush has made durable.
    pub by_flush: bool,
}

/// A moment between two failures that the driver of an engine has seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark(pub u64);

/// What an engine asks of its driver. No method may call back into the engine.
pub trait Effects {
    /// Start this operation on a replica; pass its end to [`Engine::reply`](super::Engine::reply),
    /// once.
    fn submit(&mut self, operation: Operation);
    /// Answer the guest. A read brings its data, other requests an empty slice.
    fn complete(&mut self, tag: Tag, result: Result<&[u8], Failed>);
    /// A write of the guest has a quorum, and is answered when it is durable. Returns what
    /// [`Self::flushed`] gets back.
    fn written(&mut self, tag: Tag) -> Mark;
    /// Answer the guest: a write is durable that was written at `mark`.
    fn flushed(&mut self, tag: Tag, mark: Mark);
    /// Report an event to the operator.
    fn report(&mut self, report: Report);
    /// Add a fact to the totals that the operator sees. Reports and repairs count by themselves.
    fn count(&mut self, fact: Fact);
    /// Corrupt or unreadable sectors of a replica have been repaired.
    fn repaired(&mut self, replica: ReplicaIndex, range: SectorRange);
    /// Call [`Engine::granted`](super::Engine::granted) with `request` on the engine of another
    /// worker.
    fn wake(&mut self, worker: WorkerIndex, request: RequestId);
    /// A replica was evicted or rejoined, or sectors became stale: call
    /// [`Engine::tick`](super::Engine::tick) soon on every engine, idle ones included.
    fn health_changed(&mut self);
    /// Report a change of a job to the operator.
    fn job_changed(&mut self, event: JobEvent);
    /// No engine uses this removed replica any more: its place is free.
    fn released(&mut self, replica: ReplicaIndex);
    /// The replicas of a `--blkverify` disk differ: stop the daemon.
    fn contents_differ(&mut self, range: SectorRange);
}
