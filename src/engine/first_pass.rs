//! The first pass of a read: ask replicas without a lock, and compare their replies.
//!
//! Writes in flight may make replicas differ for a moment, so a difference here is only a
//! suspicion; [`confirmation`](super::confirmation) repeats the read under the lock of its range.

use std::time::Duration;

use super::context::{Context, Core};
use super::interface::Effects;
use super::lateness::{Kind, Out, first_asked};
use super::replies::Replies;
use crate::common::operation::Reply;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::quorum::health::FailureEpoch;
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) struct FirstPass {
    replies: Replies,
    agreement: Agreement,
    asked_at: Duration,
    /// Voters that were not asked yet.
    unasked: ReplicaSet,
    /// Voters that were asked later, and when.
    later: ReplicaSet,
    later_at: Duration,
    /// A replica that replied has become stale since it was asked. Only the lock can show whether
    /// its reply is the data of before.
    doubtful: bool,
    /// Orders the pass against failed flushes and evictions.
    began: FailureEpoch,
}

/// Which of the replies so far are equal: the first replica of each version, and its votes.
#[derive(Debug, Default)]
struct Agreement {
    first: Option<(ReplicaIndex, usize)>,
    /// Empty as long as all agree; an empty list allocates nothing.
    others: Vec<(ReplicaIndex, usize)>,
}

impl FirstPass {
    /// Asks `asked`, which are part of `voters`.
    pub(super) fn begin(
        range: SectorRange,
        voters: ReplicaSet,
        asked: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Self {
        assert!(asked.without(voters).is_empty(), "only voters are asked");
        let now = context.now();
        let began = context.shared().failure_epoch();
        let mut replies = Replies::new(range, context.core);
        replies.ask(asked, context);
        Self {
            replies,
            agreement: Agreement::default(),
            asked_at: now,
            unasked: voters.without(asked),
            later: ReplicaSet::EMPTY,
            later_at: now,
            doubtful: false,
            began,
        }
    }

    /// Asks more of the voters.
    pub(super) fn ask_more(&mut self, more: ReplicaSet, context: &mut Context<'_, impl Effects>) {
        assert!(more.without(self.unasked).is_empty(), "asked before");
        self.unasked = self.unasked.without(more);
        self.later = self.later.or(more);
        self.later_at = context.now();
        self.replies.ask(more, context);
    }

    /// Takes a reply in. `false` if the pass does not wait for it.
    pub(super) fn reply(&mut self, reply: Reply, context: &mut Context<'_, impl Effects>) -> bool {
        let (replica, success) = (reply.replica, reply.result.is_ok());
        if !self.tally().waiting().contains(replica) {
            return false;
        }
        let asked_at = if self.later.contains(replica) {
            self.later_at
        } else {
            self.asked_at
        };
        self.replies.record(reply, asked_at, context);
        if success {
            self.agreement.count(replica, &self.replies);
        }
        true
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(&mut self, evicted: ReplicaSet) {
        self.replies.forget(evicted);
        self.unasked = self.unasked.without(evicted);
    }

    /// Goes on without unasked voters that are out of service: another worker may have evicted
    /// them.
    pub(super) fn drop_out_of_service(&mut self, core: &Core) {
        self.unasked = self.unasked.and(core.shared.in_service());
    }

    /// Whether a replica has become stale that replied as a voter. Once doubtful, always doubtful.
    pub(super) fn is_doubtful(&mut self, core: &Core) -> bool {
        let stale = core.shared.stale_in(self.replies.range());
        let stale = stale.or(core.shared.failed_since(self.began));
        self.doubtful |= !stale.and(self.tally().succeeded()).is_empty();
        self.doubtful
    }

    /// The version with at least `votes` votes.
    pub(super) fn version_with(&self, votes: usize) -> Option<&[u8]> {
        let Agreement { first, others } = &self.agreement;
        let enough = |(_, count): &&(ReplicaIndex, usize)| *count >= votes;
        let first = first.as_ref().filter(enough);
        let version = first.or_else(|| others.iter().find(enough));
        version.map(|(holder, _)| self.replies.data(*holder))
    }

    pub(super) fn differs(&self) -> bool {
        !self.agreement.others.is_empty()
    }

    /// How many replicas may vote: n of R7. Failed and evicted ones do not.
    pub(super) fn voters(&self) -> usize {
        let tally = self.tally();
        let asked = tally.waiting().or(tally.succeeded());
        asked.or(self.unasked).len()
    }

    pub(super) fn unasked(&self) -> ReplicaSet {
        self.unasked
    }

    pub(super) fn tally(&self) -> &Tally {
        self.replies.tally()
    }

    pub(super) fn replies_mut(&mut self) -> &mut Replies {
        &mut self.replies
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        let first = self.replies.waiting_since(self.asked_at, limit);
        let later = self.replies.waiting_since(self.later_at, limit);
        first.without(self.later).or(later.and(self.later))
    }

    /// When the first of the replicas was asked that have not replied.
    pub(super) fn waits_since(&self) -> Option<Duration> {
        let later = (self.later, self.later_at);
        first_asked(self.tally().waiting(), self.asked_at, later)
    }

    /// What the pass waits for, if it is decided with `needed` replies.
    pub(super) fn out(&self, kind: Kind, needed: usize) -> Out {
        Out {
            kind,
            asked_at: self.asked_at,
            later: (self.later, self.later_at),
            waiting: self.tally().waiting(),
            done: self.tally().succeeded(),
            needed,
            waits_for_all: false,
        }
    }

    /// The replicas that the pass has asked or may still ask.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        self.tally().asked().or(self.unasked)
    }
}

impl Agreement {
    /// Counts the reply of `replica` for its version.
    fn count(&mut self, replica: ReplicaIndex, replies: &Replies) {
        let data = replies.data(replica);
        for (holder, votes) in self.first.iter_mut().chain(&mut self.others) {
            if replies.data(*holder) == data {
                *votes += 1;
                return;
            }
        }
        if self.first.is_none() {
            self.first = Some((replica, 1));
        } else {
            self.others.push((replica, 1));
        }
    }
}
