//! A request in its slot: hands each input to the code for its kind.

use std::rc::Rc;
use std::time::Duration;

use super::buffer_share::{Charge, Purpose};
use super::confirmation::Confirmation;
use super::context::{Context, FollowUp, Progress, Suspicion};
use super::flush::{self, Flush};
use super::flush_queue::{Origin, Waiting};
use super::interface::{Effects, GuestRequest, Policy, Tag};
use super::lateness::{Kind, Out};
use super::read::Read;
use super::remember::Remember;
use super::resync::Resync;
use super::scrub::{Scrub, ScrubOrder};
use super::skip::{Skip, SkipOrder};
use super::write::{Content, Write, WriteOrder};
use crate::common::buffer::footprint_bytes;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::{Chunk, ChunkId, Work};
use crate::quorum::tally::Tally;

/// What is wanted of an engine.
#[derive(Debug)]
pub(super) enum Wanted {
    /// A request of its own.
    Request(Start),
    /// An answer of the next flush.
    Flush(Origin),
}

/// What begins a request.
#[derive(Debug)]
pub(super) enum Start {
    Read(Tag, SectorRange),
    Write(Tag, WriteOrder),
    /// A flush for all that has joined the queue.
    Flush,
    Remember,
    Confirm(Suspicion),
    Resync(ChunkId, ReplicaIndex, SectorRange),
    Scrub(ScrubOrder),
    Skip(SkipOrder),
}

#[derive(Debug)]
pub(super) enum Request {
    Read(Read),
    Write(Write),
    Flush(Flush),
    Remember(Remember),
    Scrub(Scrub),
    Resync(Resync),
    Skip(Skip),
    /// Retired, but an evicted or slow replica still has operations of it, whose buffers belong to
    /// the kernel.
    Orphaned,
}

impl Wanted {
    pub(super) fn by_guest(tag: Tag, request: GuestRequest) -> Self {
        let order = match request {
            GuestRequest::Read(range) => return Self::Request(Start::Read(tag, range)),
            GuestRequest::Flush => return Self::Flush(Origin::Request(tag)),
            GuestRequest::WriteWithoutMemory(_) => unreachable!("it is refused"),
            GuestRequest::Write {
                range,
                data,
                durable,
            } => WriteOrder {
                range,
                content: Content::Data(Rc::new(data)),
                durable,
            },
            GuestRequest::Zero {
                range,
                unmap,
                durable,
            } => WriteOrder {
                range,
                content: Content::Zeroes { unmap },
                durable,
            },
        };
        Self::Request(Start::Write(tag, order))
    }

    pub(super) fn by_job(chunk: Chunk) -> Self {
        let Chunk { id, work } = chunk;
        Self::Request(match work {
            Work::Resync { replica, range } => Start::Resync(id, replica, range),
            Work::Scrub {
                range,
                repair,
                spreads,
                prefers,
            } => Start::Scrub(ScrubOrder {
                chunk: id,
                range,
                repair,
                spreads,
                prefers,
            }),
            Work::Skip { purpose, range } => Start::Skip(SkipOrder {
                chunk: id,
                purpose,
                range,
            }),
            Work::Flush => return Self::Flush(Origin::Job(id)),
        })
    }
}

impl Start {
    /// The buffers that the request may hold at a time.
    pub(super) fn charge(&self, in_service: ReplicaSet) -> Charge {
        let purpose = match self {
            Self::Resync(..) | Self::Scrub(_) | Self::Skip(_) => Purpose::Job,
            _ => Purpose::Guest,
        };
        Charge {
            bytes: self.buffer_bytes(in_service),
            purpose,
        }
    }

    fn buffer_bytes(&self, in_service: ReplicaSet) -> u64 {
        match self {
            Self::Read(_, range)
            | Self::Confirm(Suspicion { range, .. })
            | Self::Resync(_, _, range)
            | Self::Scrub(ScrubOrder { range, .. }) => {
                // One buffer for each replica, and one to put the winner together in.
                footprint_bytes(range.bytes()) * (in_service.len() as u64 + 1)
            }
            Self::Write(_, WriteOrder { content, .. }) => match content {
                Content::Data(data) => footprint_bytes(data.len() as u64),
                Content::Zeroes { .. } => 0,
            },
            Self::Skip(_) | Self::Flush | Self::Remember => 0,
        }
    }

    /// Begins the request. It never retires in its first input.
    pub(super) fn begin(self, context: &mut Context<'_, impl Effects>) -> Request {
        match self {
            Self::Read(tag, range) => Request::Read(Read::begin(tag, range, context)),
            Self::Write(tag, order) => Request::Write(Write::begin(tag, order, context)),
            Self::Flush => Request::Flush(Flush::begin(context)),
            Self::Remember => Request::Remember(Remember::begin(context)),
            Self::Confirm(suspicion) => Request::Read(Read::suspect(suspicion, context)),
            Self::Resync(chunk, replica, range) => {
                Request::Resync(Resync::begin(chunk, replica, range, context))
            }
            Self::Scrub(order) => Request::Scrub(Scrub::begin(order, context)),
            Self::Skip(order) => Request::Skip(Skip::begin(order, context)),
        }
    }
}

impl From<FollowUp> for Start {
    fn from(follow_up: FollowUp) -> Self {
        match follow_up {
            FollowUp::Confirm(suspicion) => Self::Confirm(suspicion),
            FollowUp::Flush => Self::Flush,
            FollowUp::Remember => Self::Remember,
        }
    }
}

impl Request {
    pub(super) fn is_orphaned(&self) -> bool {
        matches!(self, Self::Orphaned)
    }

    pub(super) fn reply(
        &mut self,
        reply: Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        match self {
            Self::Read(read) => read.reply(reply, context),
            Self::Write(write) => write.reply(&reply, context),
            Self::Flush(flush) => flush.reply(&reply, context),
            Self::Remember(remember) => remember.reply(&reply, context),
            Self::Scrub(scrub) => {
                context.shared().loads().yielded(reply.replica);
                scrub.reply(reply, context)
            }
            Self::Resync(resync) => {
                context.shared().loads().yielded(reply.replica);
                resync.reply(reply, context)
            }
            Self::Skip(skip) => {
                context.shared().loads().yielded(reply.replica);
                skip.reply(&reply, context)
            }
            Self::Orphaned => {
                Self::orphaned_reply(&reply, context);
                Progress::Retired
            }
        }
    }

    /// No request waits for it any more.
    #[cold]
    #[inline(never)]
    fn orphaned_reply(reply: &Reply, context: &mut Context<'_, impl Effects>) {
        if matches!(reply.action, Action::FindData { .. }) {
            // The job has given it up, and perhaps others have waited for it.
            context.shared().loads().yielded(reply.replica);
        }
        // An error is an error (R4).
        if let Err(errno) = reply.result {
            let (operation, range) = reply.action.describe();
            context.report_error(reply.replica, operation, range, errno);
        }
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        match self {
            Self::Read(read) => read.lock_granted(context),
            Self::Write(write) => write.lock_granted(context),
            Self::Flush(flush) => flush.lock_granted(context),
            Self::Remember(remember) => remember.lock_granted(context),
            Self::Scrub(scrub) => scrub.lock_granted(context),
            Self::Resync(resync) => resync.lock_granted(context),
            Self::Skip(skip) => skip.lock_granted(context),
            Self::Orphaned => unreachable!("waits for no lock"),
        }
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        match self {
            Self::Read(read) => read.evicted(evicted, context),
            Self::Write(write) => write.evicted(evicted, context),
            Self::Flush(flush) => flush.evicted(evicted, context),
            Self::Remember(remember) => remember.evicted(evicted, context),
            Self::Scrub(scrub) => scrub.evicted(evicted, context),
            Self::Resync(resync) => resync.evicted(evicted, context),
            Self::Skip(skip) => skip.evicted(evicted, context),
            Self::Orphaned => Progress::Retired,
        }
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match self {
            Self::Read(read) => read.stage().waiting_since(limit),
            Self::Write(write) => write.waiting_since(limit),
            Self::Flush(flush) => flush.waiting_since(limit),
            Self::Remember(remember) => remember.waiting_since(limit),
            Self::Scrub(scrub) => scrub.stage().waiting_since(limit),
            Self::Resync(resync) => resync.confirmation().waiting_since(limit),
            Self::Skip(skip) => skip.waiting_since(limit),
            Self::Orphaned => ReplicaSet::EMPTY,
        }
    }

    /// What the request waits for.
    pub(super) fn out(&self, policy: &Policy, threshold: usize) -> Option<Out> {
        match self {
            Self::Read(read) => Some(read.out(policy, threshold)),
            Self::Write(write) => write.out(threshold),
            Self::Flush(flush) => flush.out(threshold),
            Self::Remember(remember) => remember.out(threshold),
            Self::Scrub(scrub) => Some(scrub.stage().out(Kind::Job, threshold)),
            Self::Resync(resync) => Some(resync.confirmation().out(Kind::Job)),
            Self::Skip(skip) => Some(skip.out()),
            Self::Orphaned => None,
        }
    }

    /// How many operations the request waits for.
    pub(super) fn operations_waited_for(&self) -> usize {
        match self.confirmation() {
            Some(confirmation) => confirmation.operations_waited_for(),
            None => self.waiting_since(Duration::MAX).len(),
        }
    }

    /// The replies to the operations that the request waits for.
    pub(super) fn tally(&self) -> Option<&Tally> {
        match self {
            Self::Read(read) => Some(read.stage().tally()),
            Self::Write(write) => write.tally(),
            Self::Flush(flush) => flush.tally(),
            Self::Remember(remember) => remember.tally(),
            Self::Scrub(scrub) => Some(scrub.stage().tally()),
            Self::Resync(resync) => Some(resync.confirmation().tally()),
            Self::Skip(skip) => Some(skip.tally()),
            Self::Orphaned => None,
        }
    }

    /// What a flush is for, once it has begun.
    pub(super) fn origins(&self) -> &[Waiting] {
        match self {
            Self::Flush(flush) => flush.origins(),
            _ => &[],
        }
    }

    /// Whether the request has asked for its lock and does not hold it.
    pub(super) fn waits_for_lock(&self) -> bool {
        match self {
            Self::Write(write) => write.waits_for_lock(),
            Self::Flush(flush) => flush.waits_for_lock(),
            Self::Remember(remember) => remember.waits_for_lock(),
            Self::Read(_) | Self::Scrub(_) | Self::Resync(_) => self
                .confirmation()
                .is_some_and(Confirmation::waits_for_lock),
            Self::Skip(skip) => skip.waits_for_lock(),
            Self::Orphaned => false,
        }
    }

    /// Whether the request holds or waits for a lock under which it reads.
    pub(super) fn is_confirming(&self) -> bool {
        self.confirmation().is_some()
    }

    pub(super) fn confirmation(&self) -> Option<&Confirmation> {
        match self {
            Self::Read(read) => read.stage().confirmation(),
            Self::Scrub(scrub) => scrub.stage().confirmation(),
            Self::Resync(resync) => Some(resync.confirmation()),
            Self::Write(_)
            | Self::Flush(_)
            | Self::Remember(_)
            | Self::Skip(_)
            | Self::Orphaned => None,
        }
    }

    /// The replicas that the request has anything to do with: as long as it has, no other replica
    /// takes their places.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        match self {
            Self::Read(read) => read.stage().refers_to(),
            Self::Write(write) => write.refers_to(),
            Self::Flush(flush) => flush.refers_to(),
            Self::Remember(remember) => remember.refers_to(),
            Self::Scrub(scrub) => scrub.stage().refers_to(),
            Self::Resync(resync) => resync.confirmation().refers_to(),
            Self::Skip(skip) => skip.refers_to(),
            Self::Orphaned => ReplicaSet::EMPTY,
        }
    }

    /// The replicas whose eviction concerns the request: their replies are out, or they may still
    /// be asked or evicted by it.
    pub(super) fn depends_on(&self) -> ReplicaSet {
        let others = match self {
            Self::Read(read) => read.stage().unasked(),
            Self::Remember(remember) => remember.failed(),
            _ => ReplicaSet::EMPTY,
        };
        self.waiting_since(Duration::MAX).or(others)
    }

    /// What the replicas are doing for the request, and where.
    pub(super) fn describe(&self) -> (OperationType, SectorRange) {
        match self {
            Self::Read(read) => (read.stage().operation(), read.range()),
            Self::Write(write) => (OperationType::Write, write.range()),
            Self::Flush(_) | Self::Orphaned => (OperationType::Flush, flush::NO_RANGE),
            Self::Remember(_) => (OperationType::Write, flush::NO_RANGE),
            Self::Scrub(scrub) => (scrub.stage().operation(), scrub.range()),
            Self::Resync(resync) => (resync.confirmation().operation(), resync.range()),
            Self::Skip(skip) => (OperationType::Read, skip.range()),
        }
    }
}
