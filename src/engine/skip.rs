//! A question of a job: which parts of a range need not be read, because they are holes on every
//! replica concerned (contract W8).
//!
//! A scrub asks without a lock, like its reads: a hole is a reply of zeroes. A resync and a
//! recovery ask under the lock of the range, so that no write can come between the answer and its
//! consequence, that the copy is fresh or the copies are equal.
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
use crate::common::{FoundData, ReplicaIndex, ReplicaSet, SectorRange, runs};
use crate::jobs::{ChunkEnd, ChunkId, SkipPurpose};
use crate::quorum::health::{FailureEpoch, Health};
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) struct Skip {
    order: SkipOrder,
    /// Of a resync or a recovery.
    lock: Option<LockKey>,
    waits_for_lock: bool,
    tally: Tally,
    asked_at: Duration,
    /// Orders the question against failed flushes and evictions.
    began: FailureEpoch,
    /// Where those that have replied have data, in order.
    data: Vec<SectorRange>,
    /// How far all of them have looked.
    until: u64,
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
            data: Vec::new(),
            until: order.range.end(),
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
            return self.finish(Vec::new(), context);
        }
        if sources.is_empty() {
            return self.finish(Vec::new(), context);
        }
        self.asked_at = context.now();
        self.ask(sources.or(target), context);
        Progress::Waiting
    }

    fn ask(&mut self, asked: ReplicaSet, context: &mut Context<'_, impl Effects>) {
        self.tally.ask(asked);
        let range = self.order.range;
        for replica in asked.iter() {
            let found = FoundData::from(range.start);
            context.submit(replica, Action::FindData { range, found });
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
        match (&reply.action, reply.result) {
            (Action::FindData { found, .. }, Ok(())) => {
                self.data = runs::union(&self.data, found.runs());
                self.until = self.until.min(found.until());
            }
            _ => self.data = vec![self.order.range],
        }
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
        self.finish(Vec::new(), context)
    }

    fn finish_if_complete(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        if !self.tally.is_complete() {
            return Progress::Waiting;
        }
        let holes = self.holes(context.core.policy.block_sectors);
        let skipped = match self.order.purpose {
            _ if holes.is_empty() => holes,
            SkipPurpose::Scrub => self.equal(holes, context),
            SkipPurpose::Resync(replica) => self.freshen(replica, holes, context),
            SkipPurpose::Recover => self.recover(&holes, context),
        };
        self.finish(skipped, context)
    }

    /// What is a hole on each replica that was asked, as far as all of them have looked: in order,
    /// and in whole blocks.
    fn holes(&self, block_sectors: u64) -> Vec<SectorRange> {
        let start = self.order.range.start;
        let until = self.until - self.until % block_sectors;
        let looked_at = SectorRange::new(start, until.saturating_sub(start));
        runs::without(&[looked_at], &runs::widened(&self.data, block_sectors))
    }

    /// Those of the `holes` in which a scrub that had read them would have found nothing.
    fn equal(
        &self,
        mut holes: Vec<SectorRange>,
        context: &Context<'_, impl Effects>,
    ) -> Vec<SectorRange> {
        let (succeeded, shared) = (self.tally.succeeded(), context.shared());
        let needed = context.core.threshold();
        if succeeded.len() < needed {
            return Vec::new();
        }
        shared.health(|health| {
            let all_asked = health.in_service().without(succeeded).is_empty();
            holes.retain(|hole| {
                all_asked
                    && self.is_certain(health, succeeded, *hole)
                    && health.disputed(*hole, needed).is_empty()
                    && !health.unresolved().overlaps(*hole)
            });
        });
        holes
    }

    /// Takes the copy of `replica` for fresh in those of the `holes` where enough others hold the
    /// same. Returns where it did.
    fn freshen(
        &self,
        replica: ReplicaIndex,
        mut holes: Vec<SectorRange>,
        context: &mut Context<'_, impl Effects>,
    ) -> Vec<SectorRange> {
        let (asked, began) = (self.tally.succeeded(), self.began);
        if !asked.contains(replica) {
            return Vec::new();
        }
        context.shared().change_health(|health| {
            let needed = health.threshold();
            holes.retain(|hole| {
                let sources = fresh_in(health, *hole);
                let equal = sources.len() >= needed
                    && sources.without(asked).is_empty()
                    && self.is_certain(health, asked, *hole)
                    && health.disputed(*hole, needed).is_empty()
                    && health.first_blank(replica, *hole) == Some(*hole);
                if equal {
                    health.repaired(replica, *hole, began, false);
                }
                equal
            });
        });
        for hole in &holes {
            context.effects.count(Fact::Equal(replica, *hole));
        }
        holes
    }

    /// Takes what is unrecovered in `holes` for recovered, where all replicas that vote on all of a
    /// hole have it, and are enough (S5). Returns what is recovered now.
    fn recover(
        &self,
        holes: &[SectorRange],
        context: &mut Context<'_, impl Effects>,
    ) -> Vec<SectorRange> {
        let asked = self.tally.succeeded();
        context.shared().change_health(|health| {
            let mut recovered = Vec::new();
            for hole in holes {
                let sources = fresh_in(health, *hole);
                let is_partly_stale = |replica: ReplicaIndex| {
                    !sources.contains(replica) && health.stale_parts(replica, *hole) != [*hole]
                };
                let is_equal = sources.len() >= health.threshold()
                    && !health.in_service().iter().any(is_partly_stale)
                    && sources.without(asked).is_empty()
                    && self.is_certain(health, sources, *hole);
                if is_equal {
                    let parts = health.unrecovered().within(*hole);
                    // The others have not been asked.
                    let others = health.members().without(sources).iter();
                    let others: Vec<_> = others.map(|other| (other, parts.clone())).collect();
                    health.decide(&parts, &others);
                    recovered.extend(parts);
                }
            }
            recovered
        })
    }

    /// Whether a hole of any of `replicas` in `range` reads as zeroes: no writeback can have
    /// failed, and none of them has failed since it was asked.
    fn is_certain(&self, health: &Health, replicas: ReplicaSet, range: SectorRange) -> bool {
        let mut all = replicas.iter();
        all.all(|replica| health.is_confirmed(replica, range))
            && health.failed_since(self.began).and(replicas).is_empty()
    }

    fn finish(
        &mut self,
        skipped: Vec<SectorRange>,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        let succeeded = self.tally.succeeded();
        let mut unread = ReplicaSet::EMPTY;
        if self.order.purpose == SkipPurpose::Scrub {
            for hole in &skipped {
                unread = unread.or(context.core.unread(*hole, succeeded));
            }
        }
        let end = ChunkEnd {
            skipped,
            known_until: self.until,
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
