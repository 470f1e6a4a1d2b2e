//! Operations on a replica, and their replies.
//!
//! An operation owns its buffer until the reply brings it back, so memory that the kernel may still
//! touch is never reused, however long a replica takes.

use std::rc::Rc;
use std::sync::Arc;

use super::buffer::Buffer;
use super::{Errno, FoundData, ReplicaIndex, SectorRange};

/// The kind of guest operation a report is about; QEMU's `QuorumOpType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationType {
    /// A read, or the repeated read that confirms a suspicion.
    Read,
    /// A write, or the rewrite of a corrupted sector.
    Write,
    /// A flush; its range is empty.
    Flush,
}

/// Names the request that an operation serves; comes back in the reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u32);

/// A read, write, zeroing or flush of one replica, a question about it, or a write to its record.
#[derive(Debug)]
pub struct Operation {
    /// The request it serves.
    pub request: RequestId,
    /// The replica.
    pub replica: ReplicaIndex,
    /// What it does.
    pub action: Action,
}

/// What an operation does.
#[derive(Debug)]
pub enum Action {
    /// Fill the buffer, all of it, from the range.
    Read {
        /// The sectors.
        range: SectorRange,
        /// A private buffer as long as the range.
        into: Buffer,
    },
    /// Write the range.
    Write {
        /// The sectors.
        range: SectorRange,
        /// A private copy of the data, shared by the operations that write it to the other
        /// replicas.
        data: Rc<Buffer>,
        /// Where in `data` the bytes of the range begin.
        offset_bytes: usize,
    },
    /// Make the range read as zeroes, in any way that ensures it (W4).
    Zero {
        /// The sectors.
        range: SectorRange,
        /// Give the space back where the replica can.
        unmap: bool,
    },
    /// Find out where in the range, from its start on, there is data. Never fails: what is not
    /// known to be a hole is data.
    FindData {
        /// The sectors.
        range: SectorRange,
        /// The answer. Nothing is known until the reply.
        found: FoundData,
    },
    /// Bring every write that has ended to stable storage.
    Flush,
    /// Write to the record of the replica. It is durable when it ends.
    Record {
        /// Where in the record.
        offset_bytes: u64,
        /// What is written there.
        bytes: Arc<[u8]>,
    },
}

impl Operation {
    /// The end of this operation.
    pub fn reply(self, result: Result<(), Errno>) -> Reply {
        let Self {
            request,
            replica,
            action,
        } = self;
        Reply {
            request,
            replica,
            action,
            result,
        }
    }
}

impl Action {
    /// The kind and the range that reports name. The range of a flush is empty, and so is that of a
    /// write to the record.
    pub fn describe(&self) -> (OperationType, SectorRange) {
        match self {
            Self::Read { range, .. } | Self::FindData { range, .. } => {
                (OperationType::Read, *range)
            }
            Self::Write { range, .. } | Self::Zero { range, .. } => (OperationType::Write, *range),
            Self::Flush => (OperationType::Flush, SectorRange::new(0, 0)),
            Self::Record { .. } => (OperationType::Write, SectorRange::new(0, 0)),
        }
    }

    /// Whether it may take much longer than a read or a write.
    pub fn is_long(&self) -> bool {
        matches!(self, Self::Zero { .. } | Self::Flush | Self::Record { .. })
    }

    /// Bytes of the buffer pool that the operation keeps in use.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Read { range, .. } | Self::Write { range, .. } => range.bytes(),
            Self::Zero { .. } | Self::FindData { .. } | Self::Flush | Self::Record { .. } => 0,
        }
    }
}

/// The end of an operation. Every operation has exactly one.
#[derive(Debug)]
pub struct Reply {
    /// The request it served.
    pub request: RequestId,
    /// The replica.
    pub replica: ReplicaIndex,
    /// The operation, with its buffer.
    pub action: Action,
    /// Whether the replica did all of it.
    pub result: Result<(), Errno>,
}
