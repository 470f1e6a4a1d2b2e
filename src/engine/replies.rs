//! The replies to a read of several replicas: which replicas were asked, and what each returned.

use std::time::Duration;

use super::context::{Context, Core};
use super::interface::Effects;
use super::lateness::Kind;
use super::repair::bytes_of;
use crate::common::buffer::Buffer;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) struct Replies {
    range: SectorRange,
    tally: Tally,
    /// By index: the data of the replicas that succeeded, and buffers of those that failed.
    buffers: Vec<Option<Buffer>>,
}

impl Replies {
    /// No replica has been asked yet.
    pub(super) fn new(range: SectorRange, core: &mut Core) -> Self {
        Self {
            range,
            tally: Tally::default(),
            buffers: core.spare_buffers.pop().unwrap_or_default(),
        }
    }

    /// Begins again: the buffers are free before new ones are taken.
    pub(super) fn restart(&mut self) -> Self {
        let mut buffers = std::mem::take(&mut self.buffers);
        buffers.clear();
        Self {
            range: self.range,
            tally: Tally::default(),
            buffers,
        }
    }

    /// Frees the buffers and keeps their list for another read.
    pub(super) fn recycle(&mut self, core: &mut Core) {
        self.buffers.clear();
        core.spare_buffers.push(std::mem::take(&mut self.buffers));
    }

    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Does not wait for evicted replicas any more.
    pub(super) fn forget(&mut self, evicted: ReplicaSet) {
        self.tally.forget(evicted);
    }

    /// Asks replicas that were not asked before.
    pub(super) fn ask(&mut self, asked: ReplicaSet, context: &mut Context<'_, impl Effects>) {
        self.tally.ask(asked);
        if self.buffers.len() < asked.places() {
            self.buffers.resize_with(asked.places(), || None);
        }
        let len = usize::try_from(self.range.bytes()).expect("a fragment fits memory");
        for replica in asked.iter() {
            let action = Action::Read {
                range: self.range,
                into: context.core.pool.take(len),
            };
            context.submit(replica, action);
        }
    }

    /// Records the reply to what was asked at `asked_at`, and reports its error (R4).
    pub(super) fn record(
        &mut self,
        reply: Reply,
        asked_at: Duration,
        context: &mut Context<'_, impl Effects>,
    ) {
        let replica = reply.replica;
        let now = context.now();
        let taken = now.saturating_sub(asked_at);
        context.core.latencies.observe(replica, taken);
        context
            .core
            .lateness
            .observe(Kind::Read, replica, taken, now);
        self.tally.record(replica, reply.result.is_ok());
        match (reply.result, reply.action) {
            (Ok(()), Action::Read { into, .. }) => self.buffers[replica.as_usize()] = Some(into),
            (Ok(()), action) => panic!("a read is answered by {action:?}"),
            (Err(errno), action) => {
                // Parts of it may be read later.
                if let Action::Read { into, .. } = action {
                    self.buffers[replica.as_usize()] = Some(into);
                }
                context.report_error(replica, OperationType::Read, self.range, errno);
            }
        }
    }

    /// The data of `replica`, which has succeeded, or of which parts were read.
    pub(super) fn data(&self, replica: ReplicaIndex) -> &[u8] {
        let buffer = self.buffers[replica.as_usize()].as_deref();
        buffer.expect("a replica that replied has returned its buffer")
    }

    /// Reads parts of the range on `replica`, which could not read all of it.
    pub(super) fn ask_for_parts(
        &self,
        replica: ReplicaIndex,
        parts: &[SectorRange],
        context: &mut Context<'_, impl Effects>,
    ) {
        for part in parts {
            let len = usize::try_from(part.bytes()).expect("a fragment fits memory");
            let into = context.core.pool.take(len);
            context.submit(replica, Action::Read { range: *part, into });
        }
    }

    /// A part of the range was read on `replica`.
    pub(super) fn record_part(&mut self, replica: ReplicaIndex, part: SectorRange, bytes: &[u8]) {
        let place = bytes_of(part, self.range);
        let buffer = self.buffers[replica.as_usize()].as_deref_mut();
        buffer.expect("a replica that replied has returned its buffer")[place]
            .copy_from_slice(bytes);
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, asked_at: Duration, limit: Duration) -> ReplicaSet {
        if asked_at <= limit {
            self.tally.waiting()
        } else {
            ReplicaSet::EMPTY
        }
    }
}
