//! A guest write: the same bytes to every replica, in the same order everywhere (W1 to W4).
//!
//! A discard and a write-zeroes are writes of zeroes that need no buffer. A durable write joins the
//! next flush when it has a quorum, and the flush answers it (W5).

use std::rc::Rc;
use std::time::Duration;

use super::context::{Context, Progress};
use super::flush_queue::Origin;
use super::interface::{Effects, Tag};
use super::lateness::{Kind, Out};
use super::range_locks::LockKey;
use crate::common::buffer::Buffer;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::report::Requester;
use crate::common::{ReplicaSet, SectorRange};
use crate::quorum::health::{WriteBegun, WriteEnd};
use crate::quorum::tally::Tally;

#[derive(Debug)]
pub(super) struct Write {
    tag: Tag,
    order: WriteOrder,
    lock: LockKey,
    stage: Stage,
}

/// What the guest asks for.
#[derive(Debug)]
pub(super) struct WriteOrder {
    pub(super) range: SectorRange,
    pub(super) content: Content,
    /// It is answered when it is durable.
    pub(super) durable: bool,
}

/// What the range holds afterwards.
#[derive(Clone, Debug)]
pub(super) enum Content {
    /// The private copy of the guest's data.
    Data(Rc<Buffer>),
    /// Zeroes; `unmap`: the replicas may give the space back.
    Zeroes { unmap: bool },
}

#[derive(Debug)]
enum Stage {
    WaitingForLock,
    Writing(Writing),
}

#[derive(Clone, Copy, Debug)]
struct Writing {
    tally: Tally,
    begun: WriteBegun,
    asked_at: Duration,
}

impl Write {
    pub(super) fn begin(
        tag: Tag,
        order: WriteOrder,
        context: &mut Context<'_, impl Effects>,
    ) -> Self {
        Self {
            tag,
            lock: context.lock(order.range),
            order,
            stage: Stage::WaitingForLock,
        }
    }

    #[cfg(any(test, feature = "sim"))]
    pub(super) fn tag(&self) -> Tag {
        self.tag
    }

    pub(super) fn lock_granted(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        assert!(self.waits_for_lock(), "it has not begun");
        let range = self.order.range;
        if context.core.withheld.take_refused(context.id) {
            self.fail(context);
            context.unlock(self.lock);
            return Progress::Retired;
        }
        let Some((asked, begun, marks_ahead)) = context.shared().write_begins(range) else {
            context.core.wait_for_marks(context.id);
            return Progress::Waiting;
        };
        if marks_ahead {
            context.core.have_remembered();
        }
        self.stage = Stage::Writing(Writing {
            tally: Tally::new(asked),
            begun,
            asked_at: context.now(),
        });
        for replica in asked.iter() {
            context.submit(replica, self.order.action());
        }
        Progress::Waiting
    }

    pub(super) fn reply(
        &mut self,
        reply: &Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        let Stage::Writing(writing) = &mut self.stage else {
            unreachable!("a reply comes to an operation in flight");
        };
        let (replica, range) = (reply.replica, self.order.range);
        if !writing.tally.waiting().contains(replica) {
            return Progress::Waiting;
        }
        writing.tally.record(replica, reply.result.is_ok());
        let (now, kind) = (context.now(), self.order.content.kind());
        let taken = now.saturating_sub(writing.asked_at);
        context.core.lateness.observe(kind, replica, taken, now);
        if let Err(errno) = reply.result {
            context.report_error(replica, OperationType::Write, range, errno);
            let begun = writing.begun;
            context
                .shared()
                .change_health(|health| health.write_failed(begun, replica));
        }
        self.finish_if_complete(context)
    }

    /// Goes on without evicted replicas.
    pub(super) fn evicted(
        &mut self,
        evicted: ReplicaSet,
        context: &mut Context<'_, impl Effects>,
    ) -> Progress {
        match &mut self.stage {
            Stage::Writing(writing) => writing.tally.forget(evicted),
            Stage::WaitingForLock => return Progress::Waiting,
        }
        self.finish_if_complete(context)
    }

    fn finish_if_complete(&mut self, context: &mut Context<'_, impl Effects>) -> Progress {
        let Stage::Writing(writing) = &self.stage else {
            unreachable!("finished while writing");
        };
        if !writing.tally.is_complete() {
            return Progress::Waiting;
        }
        let writing = *writing;
        assert!(
            writing
                .tally
                .succeeded()
                .and(writing.tally.failed())
                .is_empty(),
            "a replica either failed or succeeded"
        );
        // The health knows the stale replicas before the guest gets the answer (W3).
        if self.end(writing, context) {
            self.answer(context);
        } else {
            self.fail(context);
        }
        context.unlock(self.lock);
        Progress::Retired
    }

    /// Records on which replicas the write succeeded. Returns whether it has a quorum.
    fn end(&self, writing: Writing, context: &mut Context<'_, impl Effects>) -> bool {
        let succeeded = writing.tally.succeeded();
        // An evicted replica counts as not asked: its write may still happen, or not.
        let asked = succeeded.or(writing.tally.failed());
        let range = self.order.range;
        let (success, became_stale) = context.shared().write_ends(range, |health| {
            let success = health.has_quorum(writing.begun, succeeded);
            let end = WriteEnd {
                asked,
                succeeded,
                begun: writing.begun,
                success,
            };
            (success, health.write_ended(&end))
        });
        if became_stale {
            context.effects.health_changed();
        }
        success
    }

    /// The write has a quorum.
    fn answer(&self, context: &mut Context<'_, impl Effects>) {
        if self.order.durable {
            let mark = context.effects.written(self.tag);
            let origin = Origin::Write(self.tag, self.order.range, mark);
            context.core.join_flush(origin);
        } else {
            let request = (OperationType::Write, self.order.range);
            context.succeed(self.tag, request, &[]);
        }
    }

    fn fail(&self, context: &mut Context<'_, impl Effects>) {
        let range = self.order.range;
        let failed = context.report_failure(Requester::Guest, OperationType::Write, range);
        context.effects.complete(self.tag, Err(failed));
    }

    pub(super) fn range(&self) -> SectorRange {
        self.order.range
    }

    /// The replicas that the write has been handed to.
    pub(super) fn refers_to(&self) -> ReplicaSet {
        match &self.stage {
            Stage::Writing(writing) => writing.tally.asked(),
            Stage::WaitingForLock => ReplicaSet::EMPTY,
        }
    }

    pub(super) fn tally(&self) -> Option<&Tally> {
        match &self.stage {
            Stage::Writing(writing) => Some(&writing.tally),
            Stage::WaitingForLock => None,
        }
    }

    /// Whether it has not begun: it waits for its lock, or with it until its range is marked.
    pub(super) fn waits_for_lock(&self) -> bool {
        matches!(self.stage, Stage::WaitingForLock)
    }

    /// What the write waits for, once it has its lock.
    pub(super) fn out(&self, threshold: usize) -> Option<Out> {
        let Stage::Writing(writing) = &self.stage else {
            return None;
        };
        Some(Out {
            kind: self.order.content.kind(),
            asked_at: writing.asked_at,
            later: (ReplicaSet::EMPTY, Duration::ZERO),
            waiting: writing.tally.waiting(),
            done: writing.tally.succeeded(),
            needed: threshold,
            waits_for_all: true,
        })
    }

    /// The replicas whose replies are out, if they were asked at `limit` or before.
    pub(super) fn waiting_since(&self, limit: Duration) -> ReplicaSet {
        match &self.stage {
            Stage::Writing(writing) if writing.asked_at <= limit => writing.tally.waiting(),
            Stage::Writing(_) | Stage::WaitingForLock => ReplicaSet::EMPTY,
        }
    }
}

impl Content {
    fn kind(&self) -> Kind {
        match self {
            Self::Data(_) => Kind::Write,
            Self::Zeroes { .. } => Kind::Zero,
        }
    }
}

impl WriteOrder {
    fn action(&self) -> Action {
        let range = self.range;
        match &self.content {
            Content::Data(data) => Action::Write {
                range,
                data: Rc::clone(data),
                offset_bytes: 0,
            },
            Content::Zeroes { unmap } => Action::Zero {
                range,
                unmap: *unmap,
            },
        }
    }
}
