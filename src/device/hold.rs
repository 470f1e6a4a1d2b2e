//! Requests that failed and are held until the operator continues (W9).
//!
//! A fragment that failed gets a *ticket*. While there are tickets, workers take nothing new from
//! the guest. When the operator continues, the fragments are submitted again, one after another in
//! the order of their tickets, whichever worker they belong to. The engine does overlapping writes
//! in the order in which they were submitted, so a held write replaces nothing newer. A write that
//! succeeds while an older one is held on some of its sectors gets a ticket too, if it came after
//! that one: it is done again behind it, and answered then. [`Mark`]s show which one came first:
//! the engine does overlapping writes one after another, and the end of each gets a mark at once. A
//! durable write is answered later, and keeps its mark until then.
//!
//! Invariants: a ticket is given up once, when its fragment is answered or left to the next start;
//! [`Hold::is_holding`] says whether there are tickets. As long as nothing has failed, that flag is
//! all that is read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crate::common::operation::OperationType;
use crate::common::{NOT_POISONED, SectorRange};
use crate::engine::{Failed, Mark, Tag, WorkerIndex};

/// What happens to a request of the guest that failed; QEMU's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The guest gets an I/O error.
    #[default]
    Report,
    /// It is held.
    Stop,
    /// It is held if a replica has no space left, else the guest gets an I/O error.
    NoSpace,
}

/// What happens to requests that failed.
#[derive(Clone, Copy, Debug, Default)]
pub struct ErrorPolicy {
    /// To reads.
    pub read: OnError,
    /// To writes, discards and write-zeroes.
    pub write: OnError,
}

impl ErrorPolicy {
    /// Whether a request of this type that failed is held. What a flush has not made durable may be
    /// lost, and another flush would not bring it back: the guest must know.
    pub fn holds(self, operation: OperationType, failed: Failed) -> bool {
        let on_error = match operation {
            _ if failed.by_flush => OnError::Report,
            OperationType::Read => self.read,
            OperationType::Write | OperationType::Flush => self.write,
        };
        match on_error {
            OnError::Report => false,
            OnError::Stop => true,
            OnError::NoSpace => failed.no_space,
        }
    }
}

/// Names a held fragment. Those that are to be done first are lower.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket(u64);

/// A fragment of a request of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// The worker that has it.
    pub worker: WorkerIndex,
    /// Its name there.
    pub tag: Tag,
    /// What it does; discards and write-zeroes are writes.
    pub operation: OperationType,
    /// Where; of no length for a flush.
    pub range: SectorRange,
}

/// The held requests of a disk, shared by its workers.
#[derive(Debug, Default)]
pub struct Hold {
    policy: ErrorPolicy,
    is_holding: AtomicBool,
    /// The last mark.
    last_mark: AtomicU64,
    /// Workers are to be woken.
    wake: AtomicBool,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    entries: BTreeMap<Ticket, Entry>,
    /// Those to be submitted again.
    due: BTreeSet<Ticket>,
    next: u64,
}

#[derive(Debug)]
struct Entry {
    fragment: Fragment,
    stage: Stage,
    /// When it has failed, or was written.
    ended: Mark,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Until the operator continues.
    Waiting,
    /// The operator has continued: it is to be submitted again.
    Due,
    /// An engine has it.
    Submitted,
}

impl Hold {
    /// Holds what `policy` says.
    pub fn new(policy: ErrorPolicy) -> Self {
        Self {
            policy,
            ..Self::default()
        }
    }

    /// Whether anything is held, and so nothing new may be taken from the guest.
    #[inline]
    pub fn is_holding(&self) -> bool {
        self.is_holding.load(Ordering::Acquire)
    }

    /// How many fragments are held.
    pub fn count(&self) -> usize {
        self.held().entries.len()
    }

    /// The present moment.
    pub fn mark(&self) -> Mark {
        Mark(self.last_mark.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Takes in that a fragment has failed, `ticket` being the one that it has from before. Returns
    /// the ticket if it is held.
    pub fn failed(
        &self,
        fragment: Fragment,
        failed: Failed,
        ticket: Option<Ticket>,
    ) -> Option<Ticket> {
        if !self.policy.holds(fragment.operation, failed) {
            if let Some(ticket) = ticket {
                self.give_up(ticket);
            }
            return None;
        }
        let (mut held, now) = (self.held(), self.mark());
        let ticket = ticket.unwrap_or_else(|| held.add(fragment));
        held.set(ticket, Stage::Waiting, now);
        self.changed(&held);
        Some(ticket)
    }

    /// Takes in that a fragment has succeeded, which was `written` some time ago if it has waited
    /// for a flush since. Returns its ticket if it has to be done again: an older write that is
    /// held changes some of its sectors.
    #[inline]
    pub fn succeeded(
        &self,
        fragment: Fragment,
        written: Option<Mark>,
        ticket: Option<Ticket>,
    ) -> Option<Ticket> {
        if ticket.is_none() && !self.is_holding() {
            return None;
        }
        self.succeeded_while_holding(fragment, written, ticket)
    }

    #[cold]
    fn succeeded_while_holding(
        &self,
        fragment: Fragment,
        written: Option<Mark>,
        ticket: Option<Ticket>,
    ) -> Option<Ticket> {
        let mut held = self.held();
        let ended = written.unwrap_or_else(|| self.mark());
        let again = match fragment.operation {
            OperationType::Write => held.stage_behind_older(fragment.range, ended, ticket),
            OperationType::Read | OperationType::Flush => None,
        };
        let ticket = match (again, ticket) {
            (None, None) => return None,
            (None, Some(ticket)) => {
                held.remove(ticket);
                None
            }
            (Some(stage), ticket) => {
                let ticket = ticket.unwrap_or_else(|| held.add(fragment));
                held.set(ticket, stage, ended);
                Some(ticket)
            }
        };
        if let (Some(Stage::Due), Some(ticket)) = (again, ticket) {
            held.due.insert(ticket);
        }
        self.changed(&held);
        ticket
    }

    /// A held fragment is answered with an error, or left to the next start of its virtqueue.
    pub fn give_up(&self, ticket: Ticket) {
        let mut held = self.held();
        held.remove(ticket);
        self.changed(&held);
    }

    /// The operator continues: everything that is held is to be submitted again. Returns how much
    /// that is. Wake all workers.
    pub fn continue_all(&self) -> usize {
        let mut held = self.held();
        let Held { entries, due, .. } = &mut *held;
        let waiting = entries.iter_mut();
        let waiting = waiting.filter(|(_, entry)| entry.stage == Stage::Waiting);
        let mut count = 0;
        for (ticket, entry) in waiting {
            entry.stage = Stage::Due;
            due.insert(*ticket);
            count += 1;
        }
        count
    }

    /// The fragment to be submitted next, if it is one of this worker.
    pub fn next(&self, worker: WorkerIndex) -> Option<(Ticket, Tag)> {
        let held = self.held();
        let ticket = *held.due.first()?;
        let Fragment {
            worker: of, tag, ..
        } = held.entries.get(&ticket)?.fragment;
        (of == worker).then_some((ticket, tag))
    }

    /// The fragment that [`Self::next`] named is about to be submitted. When the engine has it,
    /// call [`Self::submitted`].
    pub fn submits(&self, ticket: Ticket) {
        self.held().entry(ticket).stage = Stage::Submitted;
    }

    /// The engine has the fragment, or has answered it already: the next one may follow.
    pub fn submitted(&self, ticket: Ticket) {
        let mut held = self.held();
        // If it has succeeded already, its ticket is gone; if that has to be done again, it is due.
        let entry = held.entries.get(&ticket);
        if entry.is_none_or(|entry| entry.stage != Stage::Due) {
            held.due.remove(&ticket);
        }
        self.changed(&held);
    }

    /// Whether the other workers are to be woken: nothing is held any more, or it may be their turn
    /// to submit.
    #[inline]
    pub fn take_wake(&self) -> bool {
        self.wake.load(Ordering::Relaxed) && self.wake.swap(false, Ordering::AcqRel)
    }

    fn changed(&self, held: &Held) {
        let holds = !held.entries.is_empty();
        let is_over = self.is_holding.swap(holds, Ordering::AcqRel) && !holds;
        if is_over || !held.due.is_empty() {
            self.wake.store(true, Ordering::Release);
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().expect(NOT_POISONED)
    }
}

impl Held {
    fn add(&mut self, fragment: Fragment) -> Ticket {
        let ticket = Ticket(self.next);
        self.next += 1;
        let entry = Entry {
            fragment,
            stage: Stage::Waiting,
            ended: Mark::default(),
        };
        self.entries.insert(ticket, entry);
        ticket
    }

    fn set(&mut self, ticket: Ticket, stage: Stage, ended: Mark) {
        let entry = self.entry(ticket);
        (entry.stage, entry.ended) = (stage, ended);
    }

    fn entry(&mut self, ticket: Ticket) -> &mut Entry {
        let entry = self.entries.get_mut(&ticket);
        entry.expect("a ticket is given up once")
    }

    fn remove(&mut self, ticket: Ticket) {
        let entry = self.entries.remove(&ticket);
        assert!(entry.is_some(), "a ticket is given up once");
        self.due.remove(&ticket);
    }

    /// How a write of `range` goes on that has succeeded, if an older one is held on some of its
    /// sectors: it is done again, together with the older ones.
    fn stage_behind_older(
        &self,
        range: SectorRange,
        ended: Mark,
        ticket: Option<Ticket>,
    ) -> Option<Stage> {
        let is_older = |other: &Ticket| ticket.is_none_or(|ticket| *other < ticket);
        let mut older = self
            .entries
            .iter()
            .filter(|(other, entry)| {
                let fragment = &entry.fragment;
                let is_write = fragment.operation == OperationType::Write;
                let is_before = is_older(other) && entry.ended < ended;
                is_write && is_before && fragment.range.overlaps(range)
            })
            .peekable();
        older.peek()?;
        let waits = older.any(|(_, entry)| entry.stage == Stage::Waiting);
        Some(if waits { Stage::Waiting } else { Stage::Due })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::FragmentId;

    const FAILED: Failed = Failed {
        no_space: false,
        by_flush: false,
    };

    fn hold() -> Hold {
        Hold::new(ErrorPolicy {
            read: OnError::Stop,
            write: OnError::Stop,
        })
    }

    fn fragment(chain: u32, worker: u16, operation: OperationType, start: u64) -> Fragment {
        Fragment {
            worker: WorkerIndex(worker),
            tag: Tag::Guest {
                connection: 0,
                fragment: FragmentId {
                    chain,
                    offset_sectors: 0,
                },
            },
            operation,
            range: SectorRange::new(start, 8),
        }
    }

    /// Submits what is next, which is `fragment`.
    fn submit(hold: &Hold, fragment: Fragment) -> Ticket {
        let (ticket, tag) = hold.next(fragment.worker).expect("its turn");
        assert_eq!(tag, fragment.tag);
        hold.submits(ticket);
        hold.submitted(ticket);
        ticket
    }

    #[test]
    fn a_policy_holds_what_it_names() {
        let holds = |write, operation, no_space| {
            let read = OnError::Report;
            let failed = Failed { no_space, ..FAILED };
            let by_flush = Failed {
                by_flush: true,
                ..failed
            };
            let policy = ErrorPolicy { read, write };
            assert!(!policy.holds(operation, by_flush), "it may be lost");
            policy.holds(operation, failed)
        };
        let write = OperationType::Write;
        assert!(!holds(OnError::Report, write, true));
        assert!(holds(OnError::Stop, write, false));
        assert!(holds(OnError::NoSpace, write, true));
        assert!(!holds(OnError::NoSpace, write, false));
        assert!(!holds(OnError::Stop, OperationType::Read, true));
    }

    #[test]
    fn what_failed_is_submitted_again_in_its_order_when_the_operator_continues() {
        let hold = hold();
        let first = fragment(1, 0, OperationType::Write, 0);
        let second = fragment(2, 1, OperationType::Read, 0);
        assert!(hold.failed(first, FAILED, None).is_some());
        assert!(hold.failed(second, FAILED, None).is_some());
        assert!(hold.is_holding() && hold.next(WorkerIndex(0)).is_none());
        assert_eq!(hold.continue_all(), 2);
        assert!(hold.next(WorkerIndex(1)).is_none(), "not its turn");
        let one = submit(&hold, first);
        assert!(hold.take_wake(), "the turn of another worker");
        let two = submit(&hold, second);
        assert_eq!(hold.failed(first, FAILED, Some(one)), Some(one));
        assert_eq!(hold.succeeded(second, None, Some(two)), None);
        assert!(hold.is_holding() && hold.next(WorkerIndex(0)).is_none());
        assert_eq!(hold.continue_all(), 1);
        let one = submit(&hold, first);
        assert_eq!(hold.succeeded(first, None, Some(one)), None);
        assert!(!hold.is_holding() && hold.take_wake());
    }

    #[test]
    fn a_write_over_a_held_one_is_done_again_after_it() {
        let hold = hold();
        let older = fragment(1, 0, OperationType::Write, 0);
        let newer = fragment(2, 0, OperationType::Write, 4);
        let beside = fragment(3, 0, OperationType::Write, 8);
        let ticket = hold.failed(older, FAILED, None).unwrap();
        assert_eq!(hold.succeeded(beside, None, None), None);
        let again = hold.succeeded(newer, None, None).expect("not answered");
        assert!(ticket < again);
        hold.continue_all();
        assert_eq!(submit(&hold, older), ticket);
        assert_eq!(submit(&hold, newer), again);
        // The older one fails once more, and so the newer one has to wait for it again.
        hold.failed(older, FAILED, Some(ticket));
        assert_eq!(hold.succeeded(newer, None, Some(again)), Some(again));
        hold.continue_all();
        submit(&hold, older);
        submit(&hold, newer);
        assert_eq!(hold.succeeded(older, None, Some(ticket)), None);
        assert_eq!(hold.succeeded(newer, None, Some(again)), None);
        assert!(!hold.is_holding());
    }

    #[test]
    fn a_write_before_which_a_held_one_is_submitted_again_follows_it() {
        let hold = hold();
        let older = fragment(1, 0, OperationType::Write, 0);
        let newer = fragment(2, 1, OperationType::Write, 4);
        let ticket = hold.failed(older, FAILED, None).unwrap();
        hold.continue_all();
        submit(&hold, older);
        // The engine had it before.
        let again = hold.succeeded(newer, None, None).expect("not answered");
        assert_eq!(submit(&hold, newer), again, "without another command");
        assert_eq!(hold.succeeded(older, None, Some(ticket)), None);
        assert_eq!(hold.succeeded(newer, None, Some(again)), None);
    }

    #[test]
    fn a_durable_write_is_done_again_only_after_one_that_it_replaced() {
        let hold = hold();
        let failed = fragment(1, 0, OperationType::Write, 0);
        let durable = fragment(2, 1, OperationType::Write, 4);
        let before = hold.mark();
        hold.failed(failed, FAILED, None).unwrap();
        let after = hold.mark();
        assert_eq!(hold.succeeded(durable, Some(before), None), None);
        assert!(hold.succeeded(durable, Some(after), None).is_some());
    }

    #[test]
    fn what_is_given_up_is_not_submitted_again() {
        let hold = hold();
        let ticket = hold.failed(fragment(1, 0, OperationType::Read, 0), FAILED, None);
        hold.continue_all();
        hold.give_up(ticket.unwrap());
        assert!(hold.next(WorkerIndex(0)).is_none() && !hold.is_holding());
    }
}
