//! A chunk of a resync: a read under the lock whose winner is written to a stale replica.

use super::confirmation::{Confirmation, Next, Terms};
use super::context::{Context, Progress};
use super::interface::Effects;
use super::replies::Replies;
use crate::common::operation::Reply;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::ChunkId;
use crate::quorum::vote::Rule;

#[derive(Debug)]
pub(super) struct Resync {
    chunk: ChunkId,
    #[cfg(any(test, feature = "sim"))]
    replica: ReplicaIndex,
    range: SectorRange,
    confirmation: Box<Confirmation>,
}

impl Resync {
    pub(super) fn begin(
        chunk: ChunkId,
        replica: ReplicaIndex,
        range: SectorRange,
        context: &mut Context<'_, impl Effects>,
    ) -> Self {
        let terms = Terms {
            // Also with fifo: what one replica holds may be corrupt.
            rule: Rule::Threshold(context.core.threshold()),
            throughout: std::iter::once(replica).collect(),
            repairs_losers: context.core.policy.rewrite_corrupted,
            is_asked: false,
            locates: context.core.all_if(context.core.policy.rewrite_corrupted),
            spreads: true,
            answers_early: false,
            is_resync: true,
            prefers: None,
            searches_long: true,
            failed_before: ReplicaSet::EMPTY,
        };
        let replies = Replies::new(range, context.core);
        Self {
            chunk,
            #[cfg(any(test, feature = "sim"))]
            replica,
            range,
            confirmation: Box::new(Confirmation::begin(replies, terms, context)),
        }
    }

    pub(super) fn reply(
        &mut self,
        reply: Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        let next = self.confirmation.reply(reply, context);
        self.go_on(next, context)
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let next = self.confirmation.lock_granted(context);
        self.go_on(next, context)
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        let next = self.confirmation.evicted(evicted, context);
        self.go_on(next, context)
    }

    /// Does what the confirmation says.
    fn go_on(&mut self, next: Next, context: &mut Context<'_, impl Effects>) -> Progress {
        match next {
            Next::Wait => Progress::Waiting,
            Next::Answer(_) | Next::Fail => unreachable!("nothing waits for an early answer"),
            Next::Decided(decision) => {
                let next = self.confirmation.repair(&decision, context);
                self.go_on(next, context)
            }
            Next::Done(end) => {
                context.chunk_ended(self.chunk, end);
                Progress::Retired
            }
        }
    }

    #[cfg(any(test, feature = "sim"))]
    pub(super) fn replica(&self) -> ReplicaIndex {
        self.replica
    }

    pub(super) fn range(&self) -> SectorRange {
        self.range
    }

    pub(super) fn confirmation(&self) -> &Confirmation {
        &self.confirmation
    }
}
