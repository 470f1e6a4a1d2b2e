//! The writes of the winner, until the lock is released (R6).

use std::rc::Rc;

use super::super::context::Context;
use super::super::decision::Decision;
use super::super::flush_queue::Origin;
use super::super::interface::Effects;
use super::super::lateness::Kind;
use super::super::repair::{RepairKind, RepairWrite, Repairs, bytes_of};
use super::super::repair_gate::Permission;
use super::super::survey::Survey;
use super::settling::Postponed;
use super::{Confirmation, Next, Step};
use crate::common::buffer::Buffer;
#[cfg(any(test, feature = "sim"))]
use crate::common::operation::Operation;
use crate::common::operation::{Action, OperationType, Reply};
use crate::common::report::{Fact, Report};
use crate::common::runs;
use crate::common::{ReplicaSet, SectorRange};
use crate::jobs::ChunkEnd;

impl Confirmation {
    /// Writes the winner where it did not win (R6), and over the replicas that are repaired
    /// throughout.
    pub(in crate::engine) fn repair(
        &mut self,
        decision: &Decision,
        context: &mut Context<'_, impl Effects>,
    ) -> Next {
        assert!(matches!(self.step, Step::Decided), "repaired once");
        // Only now: the guest has its answer, and the failure is reported.
        if let Some(differs) = decision.differs
            && context.core.policy.blkverify
        {
            context.effects.contents_differ(differs);
        }
        let shared = context.shared();
        let range = self.replies.range();
        let (in_service, began, throughout) = shared.health(|health| {
            // What a guest has written while this waited for the lock is fresh again.
            let stale = |replica| (replica, health.stale_parts(replica, range));
            let throughout: Vec<_> = self.terms.throughout.iter().map(stale).collect();
            (health.in_service(), health.failure_epoch(), throughout)
        });
        let mut pending = Vec::new();
        let unreadable = |survey: &Survey| {
            let runs = survey.unreadable().into_iter().map(|run| run.range);
            (survey.replica, runs.collect())
        };
        let unreadable: Vec<_> = self.surveys.iter().map(unreadable).collect();
        if let Some(winner) = &decision.winner {
            let preferred = self.preferred();
            let mut repairs = Repairs {
                range,
                verdict: &decision.verdict,
                left_out: &runs::union(&decision.verdict.undecided, &preferred),
                winner,
                losers: self.terms.repairs_losers,
                unreadable: &unreadable,
                settled: &decision.settled,
                throughout: &throughout,
                block_sectors: context.core.policy.block_sectors,
            };
            let mut writes = repairs.writes();
            if !self.may_write(&writes, &decision.verdict.undecided, context) {
                repairs.losers = false;
                writes = repairs.writes();
            }
            writes.retain(|write| in_service.contains(write.replica));
            writes.extend(self.writes_of_preferred(winner, context));
            for write in writes {
                pending.push(write);
                context.submit(write.replica, self.action(&write, winner));
            }
        }
        self.asked_at = context.now();
        self.step = Step::Repairing { began, pending };
        self.finish_if_repaired(context)
    }

    /// O5: whether the limit of what is repaired unasked allows these. If not, losers are not
    /// repaired.
    fn may_write(
        &mut self,
        writes: &[RepairWrite],
        undecided: &[SectorRange],
        context: &mut Context<'_, impl Effects>,
    ) -> bool {
        let of_losers = writes.iter().filter(|write| write.is_of_loser);
        let sectors: u64 = of_losers.map(|write| write.range.count).sum();
        if sectors == 0 || self.terms.is_asked {
            return true;
        }
        let limit_sectors = context.core.policy.repair_limit_sectors;
        match context.shared().may_repair(sectors) {
            Permission::Granted => return true,
            Permission::LimitReached => {
                context
                    .effects
                    .report(Report::RepairLimit { limit_sectors });
            }
            Permission::Refused => {}
        }
        self.terms.repairs_losers = false;
        self.note_unread(undecided, context);
        false
    }

    /// Whether this is one of the writes that are out, and repairs a loser unasked.
    #[cfg(any(test, feature = "sim"))]
    pub(in crate::engine) fn repairs_unasked(&self, operation: &Operation) -> bool {
        let Step::Repairing { pending, .. } = &self.step else {
            return false;
        };
        let (_, range) = operation.action.describe();
        let is_this =
            |write: &&RepairWrite| (write.replica, write.range) == (operation.replica, range);
        let write = pending.iter().find(is_this);
        !self.terms.is_asked && write.is_some_and(|write| write.is_of_loser)
    }

    fn action(&self, write: &RepairWrite, winner: &Rc<Buffer>) -> Action {
        if write.zero {
            Action::Zero {
                range: write.range,
                unmap: true,
            }
        } else {
            Action::Write {
                range: write.range,
                data: Rc::clone(winner),
                offset_bytes: bytes_of(write.range, self.replies.range()).start,
            }
        }
    }

    /// The end of a repairing write.
    pub(super) fn repaired(
        &mut self,
        reply: &Reply,
        context: &mut Context<'_, impl Effects>,
    ) -> Next {
        let Step::Repairing { began, pending } = &mut self.step else {
            unreachable!("a repairing write ends while repairing");
        };
        let (_, range) = reply.action.describe();
        let is_read = matches!(reply.action, Action::Read { .. });
        let is_this = |write: &RepairWrite| {
            (write.replica, write.range) == (reply.replica, range) && !is_read
        };
        let Some(index) = pending.iter().position(is_this) else {
            return Next::Wait;
        };
        let write = pending.remove(index);
        let kind = write.kind;
        let began = *began;
        let was_corrupt = kind == RepairKind::Corrupt;
        let shared = context.shared();
        if kind == RepairKind::Preferred {
            let success = reply.result.is_ok();
            self.preferred_written(reply.replica, range, success, context);
        } else if reply.result.is_ok() {
            shared.change_health(|health| {
                health.repaired(reply.replica, range, began, was_corrupt);
            });
        } else {
            let is_postponed = self.postponed.overlaps(range);
            // One that was evicted meanwhile, which this engine has yet to learn, is repaired when
            // it is back, like one whose reply comes later.
            shared.change_health(|health| {
                if !health.in_service().contains(reply.replica) {
                    health.repair_orphaned(reply.replica, range, was_corrupt);
                } else if is_postponed {
                    health.repair_failed(reply.replica, range, began);
                }
            });
        }
        match reply.result {
            Ok(()) => {
                self.postponed.written(reply.replica, range);
                self.end.on(reply.replica).written.push(range);
                let was_legal = matches!(kind, RepairKind::Settled | RepairKind::Preferred);
                if self.terms.is_resync || was_legal {
                    let fact = Fact::SectorsResynced(reply.replica, range.count);
                    context.effects.count(fact);
                } else {
                    context.effects.repaired(reply.replica, range);
                }
            }
            Err(errno) => {
                not_written(&mut self.end, &write);
                let fact = Fact::SectorsNotRepaired(reply.replica, range.count);
                context.effects.count(fact);
                let now = context.now();
                context.core.read_errors.rest(reply.replica, now);
                context.report_error(reply.replica, OperationType::Write, range, errno);
            }
        }
        let is_zero = matches!(reply.action, Action::Zero { .. });
        let written = if is_zero { Kind::Zero } else { Kind::Write };
        self.observe(written, reply.replica, context);
        self.finish_if_repaired(context)
    }

    pub(super) fn finish_if_repaired(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        if matches!(&self.step, Step::Repairing { pending, .. } if !pending.is_empty()) {
            return Next::Wait;
        }
        self.finish_preferences(context);
        if !self.postponed.is_empty() && self.failed_since_vote(context).is_empty() {
            self.step = Step::Flushing;
            context.core.join_flush(Origin::Winner {
                request: context.id,
                of_guest: self.terms.answers_early,
            });
            return Next::Wait;
        }
        self.finish(context)
    }

    /// A replica that held the winner may have lost a newer version, and said so only now.
    fn failed_since_vote(&self, context: &Context<'_, impl Effects>) -> ReplicaSet {
        let shared = context.shared();
        shared.health(|health| health.members_failed_since(self.voted_at))
    }

    /// Whether enough replicas hold what is to be decided, without these that have failed.
    fn is_held_without(&self, failed: ReplicaSet, context: &Context<'_, impl Effects>) -> bool {
        let Postponed {
            decided, others, ..
        } = &self.postponed;
        let failed = failed.iter().map(|replica| (replica, decided.clone()));
        let others: Vec<_> = others.iter().cloned().chain(failed).collect();
        let range = self.replies.range();
        let few = context.shared().health(|health| {
            let needed = self.needed_now().unwrap_or(health.threshold());
            health.held_by_few((range, decided), &others, needed)
        });
        few.is_empty()
    }

    /// All is written, and durable where it must be.
    pub(super) fn finish(&mut self, context: &mut Context<'_, impl Effects>) -> Next {
        assert!(
            self.replies.tally().is_complete(),
            "finished with all replies"
        );
        let depends = self.withheld.is_some() || !self.postponed.is_empty();
        let failed = match depends {
            true => self.failed_since_vote(context),
            false => ReplicaSet::EMPTY,
        };
        let before = self.terms.failed_before;
        self.terms.failed_before = before.or(failed);
        let is_needed = || self.postponed.is_empty() || !self.is_held_without(failed, context);
        let in_vain = !failed.and(before).is_empty() && is_needed();
        self.outdated = !failed.is_empty() && !in_vain;
        if in_vain {
            for replica in failed.iter() {
                let found = self.end.on(replica);
                found.not_written.extend(&self.postponed.decided);
                found.not_written.extend(&self.voted);
            }
        }
        // If nothing is decided, any copy is legal still.
        let is_decided = failed.is_empty() && self.decide_postponed(context);
        if self.withheld.is_some() {
            let range = self.replies.range();
            let needed = self.needed_now();
            let shared = context.shared();
            let settled =
                || shared.change_health(|health| health.settled(range, &self.voted, needed));
            if !is_decided || !settled() {
                self.withheld = None;
            }
        }
        context.unlock(self.lock);
        context.core.confirmations -= 1;
        self.replies.recycle(context.core);
        Next::Done(std::mem::take(&mut self.end))
    }

    /// The winner of a decision that waited for the repairs, if enough replicas hold it now.
    pub(in crate::engine) fn take_settled(&mut self) -> Option<Rc<Buffer>> {
        self.withheld.take()
    }

    /// The replicas that have failed since the first vote for this was taken.
    pub(in crate::engine) fn failed(&self) -> ReplicaSet {
        self.terms.failed_before
    }

    /// Whether there is no winner because a replica has failed during the repairs, so that the vote
    /// must be taken again.
    pub(in crate::engine) fn is_outdated(&self) -> bool {
        self.outdated
    }
}

/// A write has failed, or its replica was evicted.
pub(super) fn not_written(end: &mut ChunkEnd, write: &RepairWrite) {
    end.on(write.replica).not_written.push(write.range);
    if write.kind == RepairKind::Unreadable {
        end.unread.insert(write.replica);
    }
}
