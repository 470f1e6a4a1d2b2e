//! A question of a job: how much of a range need not be read, because it is a hole on every replica
//! concerned (contract W8).
//!
//! A scrub asks without a lock, like its reads: a hole is a reply of zeroes. A resync asks under
//! the lock of the range, so that no write can come between the answer and its consequence, that
//! the copy is fresh.
//!
//! Where a writeback has failed, the page cache may hold something else than the hole that the file
//! has. So a hole counts only where nothing was written since the last flush, and a resync believes
//! only a copy that was not written to since it was added.

use std::time::Duration;

use super::context::{Context, Progress};
use super::interface::Effects;
use super::lateness::{Kind, Out};
use super::range_locks::LockKey;
use crate::common::operation::{Action, Reply};
use crate::common::report::Fact;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::{ChunkEnd, ChunkId, SkipPurpose};
use crate::quorum::health::{FailureEpoch, Health};
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) struct Skip {
    order: SkipOrder,
    /// Of a resync.
    lock: Option<LockKey>,
    waits_for_lock: bool,
    tally: Tally,
    asked_at: Duration,
    /// Orders the question against failed flushes and evictions.
    began: FailureEpoch,
    /// The shortest hole at the start of the range, of those that have replied.
    hole_sectors: u64,
}

/// What the job asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct SkipOrder {
    pub(super) chunk: ChunkId,
    pub(super) purpose: SkipPurpose,
    pub(super) range: SectorRange,
}

impl Skip {
    pub(super) fn begin(order: SkipOrder, context: &mut Context<'_, impl Effects>) -> Self {
        let locks = order.purpose != SkipPurpose::Scrub;
        let lock = locks.then(|| context.lock(order.range));
        let mut skip = Self {
            order,
            lock,
            waits_for_lock: lock.is_some(),
            tally: Tally::default(),
            asked_at: context.now(),
            began: context.shared().failure_epoch(),
            hole_sectors: order.range.count,
        };
        if lock.is_none() {
            let in_service = context.shared().in_service();
            skip.ask(in_service, context);
        }
        skip
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        assert!(self.waits_for_lock, "a lock is granted once");
        self.waits_for_lock = false;
        let range = self.order.range;
        self.began = context.shared().failure_epoch();
        let (in_service, sources) = context
            .shared()
            .health(|health| (health.in_service(), fresh_in(health, range)));
        let target = self.order.target();
        if let SkipPurpose::Resync(_) = self.order.purpose
            && (target.and(in_service).is_empty() || !target.and(sources).is_empty())
        {
            return self.finish(0, context);
        }
        if sources.is_empty() {
            return self.finish(0, context);
        }
        self.asked_at = context.now();
        self.ask(sources.or(target), context);
        Progress::Waiting
    }

    fn ask(&mut self, asked: ReplicaSet, context: &mut Context<'_, impl Effects>) {
        self.tally.ask(asked);
        let range = self.order.range;
        for replica in asked.iter() {
            let hole_sectors = 0;
            context.submit(
                replica,
                Action::FindData {
                    range,
                    hole_sectors,
                },
            );
        }
    }

    pub(super) fn reply(
        &mut self,
        reply: &Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        if !self.tally.waiting().contains(reply.replica) {
            return Progress::Waiting;
        }
        self.tally.record(reply.replica, reply.result.is_ok());
        let hole_sectors = match (&reply.action, reply.result) {
            (Action::FindData { hole_sectors, .. }, Ok(())) => *hole_sectors,
            _ => 0,
        };
        self.hole_sectors = self.hole_sectors.min(hole_sectors);
        self.finish_if_complete(context)
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        self.tally.forget(evicted);
        if self.waits_for_lock {
            return Progress::Waiting;
        }
        self.finish_if_complete(context)
    }

    /// The answer has taken so long that the range is rather read: a guest may wait for its lock.
    /// What the replicas answer later changes nothing.
    pub(super) fn give_up(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        self.finish(0, context)
    }

    fn finish_if_complete(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        if !self.tally.is_complete() {
            return Progress::Waiting;
        }
        let block_sectors = context.core.policy.block_sectors;
        let hole_sectors = self.hole_sectors - self.hole_sectors % block_sectors;
        let hole = SectorRange::new(self.order.range.start, hole_sectors);
        let skipped = match self.order.purpose {
            _ if hole.count == 0 => 0,
            SkipPurpose::Scrub if self.is_equal(hole, context) => hole.count,
            SkipPurpose::Scrub => 0,
            SkipPurpose::Resync(replica) => self.freshen(replica, hole, context),
            SkipPurpose::Recover => self.recover(hole, context),
        };
        self.finish(skipped, context)
    }

    /// Whether a scrub that had read `hole` would have found nothing.
    fn is_equal(&self, hole: SectorRange, context: &Context<'_, impl Effects>) -> bool {
        let (succeeded, shared) = (self.tally.succeeded(), context.shared());
        let needed = context.core.threshold();
        succeeded.len() >= needed
            && shared.health(|health| {
                health.in_service().without(succeeded).is_empty()
                    && self.is_certain(health, succeeded, hole)
                    && health.disputed(hole, needed).is_empty()
                    && !health.unresolved().overlaps(hole)
            })
    }

    /// Takes the copy of `replica` for fresh in `hole`, if enough others hold the same. Returns how
    /// many sectors it did.
    fn freshen(
        &self,
        replica: ReplicaIndex,
        hole: SectorRange,
        context: &mut Context<'_, impl Effects>,
    ) -> u64 {
        let (tally, began) = (&self.tally, self.began);
        let equal = context.shared().change_health(|health| {
            let needed = health.threshold();
            let sources = fresh_in(health, hole);
            let asked = tally.succeeded();
            let equal = asked.contains(replica)
                && sources.len() >= needed
                && sources.without(asked).is_empty()
                && self.is_certain(health, asked, hole)
                && health.disputed(hole, needed).is_empty()
                && health.first_blank(replica, hole) == Some(hole);
            if equal {
                health.repaired(replica, hole, began, false);
            }
            equal
        });
        if !equal {
            return 0;
        }
        context.effects.count(Fact::Equal(replica, hole));
        hole.count
    }

    /// Takes `hole` for recovered, if all replicas that vote on all of it have it, and are enough
    /// (S5). Returns how many sectors are.
    fn recover(&self, hole: SectorRange, context: &mut Context<'_, impl Effects>) -> u64 {
        let asked = self.tally.succeeded();
        let is_equal = context.shared().change_health(|health| {
            let sources = fresh_in(health, hole);
            let is_partly_stale = |replica: ReplicaIndex| {
                !sources.contains(replica) && health.stale_parts(replica, hole) != [hole]
            };
            let is_equal = sources.len() >= health.threshold()
                && !health.in_service().iter().any(is_partly_stale)
                && sources.without(asked).is_empty()
                && self.is_certain(health, sources, hole)
                && health.unrecovered().within(hole) == [hole];
            if is_equal {
                // The others have not been asked.
                let others = health.members().without(sources);
                let others: Vec<_> = others.iter().map(|other| (other, vec![hole])).collect();
                health.decide(&[hole], &others);
            }
            is_equal
        });
        if is_equal { hole.count } else { 0 }
    }

    /// Whether a hole of any of `replicas` in `range` reads as zeroes: no writeback can have
    /// failed, and none of them has failed since it was asked.
    fn is_certain(&self, health: &Health, replicas: ReplicaSet, range: SectorRange) -> bool {
        let mut all = replicas.iter();
        all.all(|replica| health.is_confirmed(replica, range))
            && health.failed_since(self.began).and(replicas).is_empty()
    }

    fn finish(&mut self, skipped: u64, context: &mut Context<'_, impl Effects>) -> Progress {
        let unread = if self.order.purpose == SkipPurpose::Scrub && skipped > 0 {
            let hole = SectorRange::new(self.order.range.start, skipped);
            context.core.unread(hole, self.tally.succeeded())
        } else {
            ReplicaSet::EMPTY
        };
        let end = ChunkEnd {
            skipped,
            unread,
            ..ChunkEnd::default()
        };
        context.chunk_ended(self.order.chunk, end);
        if let Some(lock) = self.lock.take() {
            context.unlock(lock);
        }
        Progress::Retired
    }

    pub(super) fn range(&self) -> SectorRange {
        self.order.range
    }

    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    pub(super) fn waits_for_lock(&self) -> bool {
        self.waits_for_lock
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        if self.asked_at <= limit {
            self.tally.waiting()
        } else {
            ReplicaSet::EMPTY
        }
    }

    /// What the question waits for. Without an answer the range is read.
    pub(super) fn out(&self) -> Out {
        Out {
            kind: Kind::Job,
            asked_at: self.asked_at,
            later: (ReplicaSet::EMPTY, Duration::ZERO),
            waiting: self.tally.waiting(),
            done: self.tally.succeeded(),
            needed: 0,
            waits_for_all: false,
        }
    }

    /// The replicas that were asked, or will be.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        self.tally.asked().or(self.order.target())
    }
}

impl SkipOrder {
    /// The replica that a resync copies to.
    fn target(&self) -> ReplicaSet {
        match self.purpose {
            SkipPurpose::Resync(replica) => std::iter::once(replica).collect(),
            SkipPurpose::Scrub | SkipPurpose::Recover => ReplicaSet::EMPTY,
        }
    }
}

/// The replicas in service that vote on all of `range`.
fn fresh_in(health: &Health, range: SectorRange) -> ReplicaSet {
    health.in_service().without(health.stale_in(range))
}
