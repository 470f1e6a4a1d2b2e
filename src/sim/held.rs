//! Requests that failed and are held (W9): the production code decides, the operator continues.

use super::Violation;
use super::effects::{SECTOR_LEN, fill, number_of};
use super::flight::Flight;
use super::model::Value;
use super::pending::{NoSpace, Pending, PendingKind};
use super::plan::{PLACES, bits};
use super::state::{Checked, World, show, trace};
use super::threshold::Thresholds;
use crate::common::SectorRange;
use crate::common::operation::OperationType;
use crate::device::hold::{Fragment, OnError, Ticket};
use crate::engine::{Failed, GuestRequest, Tag, WorkerIndex};

/// How often the operator continues before he stops a virtqueue, on average.
const CONTINUED_BEFORE_STOP: u64 = 4;

/// How often the operator does something about what is held. After that all of it fails: what no
/// replica can read is held again and again.
const PATIENCE: u32 = 32;

/// A request that no engine has.
#[derive(Debug)]
pub(super) struct HeldRequest {
    ticket: Ticket,
    pub(super) pending: Pending,
}

impl World {
    /// An engine has done a request. Returns whether the guest gets the answer.
    pub(super) fn is_answered_done(&mut self, tag: Tag) -> Result<bool, Violation> {
        let Some((fragment, ticket)) = self.fragment(tag) else {
            return Ok(true);
        };
        let pending = self.pending.iter().find(|pending| pending.tag == tag);
        let written = pending.and_then(|pending| pending.written);
        match self.hold.succeeded(fragment, written, ticket) {
            Some(ticket) => self.keep(tag, ticket, true).map(|()| false),
            None => {
                self.check_not_overtaken(fragment, ticket)?;
                Ok(true)
            }
        }
    }

    /// An engine has failed a request. Returns whether the guest gets the answer.
    pub(super) fn is_answered_failed(
        &mut self,
        tag: Tag,
        failed: Failed,
    ) -> Result<bool, Violation> {
        let Some((fragment, ticket)) = self.fragment(tag) else {
            return Ok(true);
        };
        if self.faults_ended {
            // The virtual machine stops, and nothing is held any more.
            if let Some(ticket) = ticket {
                self.hold.give_up(ticket);
            }
            return Ok(true);
        }
        let ticket = self.hold.failed(fragment, failed, ticket);
        self.check_held(tag, ticket.is_some())?;
        match ticket {
            Some(ticket) => self.keep(tag, ticket, false).map(|()| false),
            None => Ok(true),
        }
    }

    /// W9: a request that failed is held if the options say so, and only then.
    fn check_held(&self, tag: Tag, is_held: bool) -> Checked {
        let Some(pending) = self.pending.iter().find(|pending| pending.tag == tag) else {
            return Ok(());
        };
        let (on_error, no_space) = match &pending.kind {
            PendingKind::Read => (self.plan.on_error.read, NoSpace::No),
            PendingKind::Write(write) if !write.ended || (pending.withheld && !write.durable) => {
                (self.plan.on_error.write, write.no_space)
            }
            // A flush has failed, and what it covers may be lost.
            PendingKind::Write(_) | PendingKind::Flush => (OnError::Report, NoSpace::No),
        };
        let for_its_record = pending.withheld || self.fails_for_a_record(&pending.kind);
        let no_space = match no_space {
            NoSpace::No if for_its_record => NoSpace::Perhaps,
            no_space => no_space,
        };
        let is_right = match (on_error, no_space) {
            (OnError::Stop, _) | (OnError::NoSpace, NoSpace::Yes) => is_held,
            (OnError::Report, _) | (OnError::NoSpace, NoSpace::No) => !is_held,
            (OnError::NoSpace, NoSpace::Perhaps) => true,
        };
        if is_right {
            return Ok(());
        }
        let number = number_of(tag);
        let text = format!("{number} has failed, and that it is held is {is_held}");
        Err(Violation::new("W9", text).at(self.plan.mask(pending.range)))
    }

    /// W9: nothing keeps the disk stopped but what is held.
    pub(super) fn check_nothing_held(&self) -> Checked {
        if self.hold.is_holding() {
            return Err(Violation::new(
                "W9",
                "the disk is stopped, and nothing is held",
            ));
        }
        Ok(())
    }

    /// What the device knows of a request in flight.
    fn fragment(&self, tag: Tag) -> Option<(Fragment, Option<Ticket>)> {
        let pending = self.pending.iter().find(|pending| pending.tag == tag)?;
        let fragment = Fragment {
            worker: WorkerIndex(u16::try_from(pending.worker).expect("few")),
            tag,
            operation: match pending.kind {
                PendingKind::Read => OperationType::Read,
                PendingKind::Write(_) => OperationType::Write,
                PendingKind::Flush => OperationType::Flush,
            },
            range: pending.range,
        };
        Some((fragment, pending.ticket))
    }

    /// A durable write has a quorum, and waits for a flush.
    pub(super) fn note_mark(&mut self, tag: Tag) {
        let mark = self.hold.mark();
        for pending in self.pending.iter_mut().filter(|pending| pending.tag == tag) {
            self.now += 1;
            (pending.written, pending.ended) = (Some(mark), self.now);
        }
    }

    /// W9: a write is not answered that an older one will replace.
    fn check_not_overtaken(&self, fragment: Fragment, ticket: Option<Ticket>) -> Checked {
        if fragment.operation != OperationType::Write {
            return Ok(());
        }
        let this = self.pending.iter().find(|this| this.tag == fragment.tag);
        let is_before = |other: &Pending| {
            this.is_none_or(|this| this.written.is_none() || other.ended < this.ended)
        };
        let waiting = self.held.iter().map(|held| (&held.pending, held.ticket));
        let again = self.pending.iter();
        let again = again.filter_map(|pending| Some((pending, pending.ticket?)));
        let replaces = |(other, of): &(&Pending, Ticket)| {
            matches!(other.kind, PendingKind::Write(_))
                && other.range.overlaps(fragment.range)
                && ticket.is_none_or(|ticket| *of < ticket)
                && is_before(other)
        };
        match waiting.chain(again).find(replaces) {
            Some((other, _)) => {
                let (this, other) = (number_of(fragment.tag), number_of(other.tag));
                let text = format!("{this} is answered, and {other} is held and will replace it");
                Err(Violation::new("W9", text).at(self.plan.mask(fragment.range)))
            }
            None => Ok(()),
        }
    }

    /// The request is held: what it has done is checked like that of any other.
    fn keep(&mut self, tag: Tag, ticket: Ticket, success: bool) -> Checked {
        self.now += 1;
        let index = self.pending.iter().position(|pending| pending.tag == tag);
        let index = index.expect("it was in flight just now");
        let mut pending = self.pending.swap_remove(index);
        if pending.written.is_none() {
            pending.ended = self.now;
        }
        trace!(
            self,
            at self.plan.mask(pending.range),
            "device: {} is held, done {success}",
            number_of(tag)
        );
        self.statistics.held += 1;
        match &pending.kind {
            PendingKind::Read if pending.withheld || self.fails_for_a_record(&pending.kind) => {
                self.check_refusal()?;
            }
            PendingKind::Read => self.check_failed_read(&pending)?,
            PendingKind::Write(write)
                if !success && (pending.withheld || self.fails_for_a_record(&pending.kind)) =>
            {
                self.check_refusal()?;
                self.note_refused_write(&pending, write);
            }
            PendingKind::Write(write) => self.check_attempt(&pending, write, success)?,
            PendingKind::Flush => unreachable!("no flush is held"),
        }
        if let PendingKind::Write(write) = &mut pending.kind {
            let of_this = |flight: &&mut Flight| flight.write == Some(write.number);
            for flight in self.flights.iter_mut().filter(of_this) {
                flight.outdated = true;
            }
            write.ended = false;
            pending.withheld = false;
            (write.submitted_to, write.succeeded, write.failed) = (0, 0, 0);
            write.no_space = NoSpace::No;
            write.failures = [0; PLACES];
        }
        self.held.push(HeldRequest { ticket, pending });
        Ok(())
    }

    /// The operator does something about what is held.
    pub(super) fn end_holding(&mut self) -> Checked {
        self.cared += u32::from(!self.held.is_empty());
        let is_over = self.cared > PATIENCE;
        if is_over || (!self.faults_ended && self.random.below(CONTINUED_BEFORE_STOP) == 0) {
            let worker = self.random.index(self.plan.workers);
            let starts_again = !is_over && self.random.below(2) == 0;
            return self.stop_virtqueue(worker, starts_again);
        }
        self.continue_held();
        Ok(())
    }

    /// The operator continues.
    pub(super) fn continue_held(&mut self) {
        let count = self.hold.continue_all();
        trace!(self, "operator: continue, {count} held requests");
    }

    /// The virtqueue of a worker is stopped: what it holds fails, or is left to the next start.
    fn stop_virtqueue(&mut self, worker: usize, starts_again: bool) -> Checked {
        let of_worker = |held: &mut HeldRequest| held.pending.worker == worker;
        let given_up: Vec<HeldRequest> = self.held.extract_if(.., of_worker).collect();
        for HeldRequest { ticket, .. } in &given_up {
            self.hold.give_up(*ticket);
        }
        for HeldRequest { mut pending, .. } in given_up {
            pending.ticket = None;
            if starts_again && self.engines[worker].has_room() {
                trace!(
                    self,
                    at self.plan.mask(pending.range),
                    "device: {} is left to the next start",
                    number_of(pending.tag)
                );
                self.submit_again(pending)?;
            } else {
                self.given_up(&pending);
            }
        }
        Ok(())
    }

    /// The guest gets an error for a request that no engine has.
    fn given_up(&mut self, pending: &Pending) {
        self.now += 1;
        let sectors = self.plan.mask(pending.range);
        trace!(self, at sectors, "guest: {} is given up", number_of(pending.tag));
        if let PendingKind::Write(write) = &pending.kind {
            for sector in bits(sectors) {
                let value = Value::written(write.number, sector);
                self.model
                    .write_ended(sector, value, self.now, false, write.durable);
            }
        }
        let oldest = self.oldest();
        self.model.forget(oldest);
    }

    /// Whether a worker may submit a held request now.
    pub(super) fn next_held(&mut self) -> Option<usize> {
        let mut workers = 0..self.plan.workers;
        workers.find(|worker| {
            let index = WorkerIndex(u16::try_from(*worker).expect("few"));
            self.engines[*worker].has_room() && self.hold.next(index).is_some()
        })
    }

    /// The worker submits its next held request.
    pub(super) fn submit_held(&mut self, worker: usize) -> Checked {
        let index = WorkerIndex(u16::try_from(worker).expect("few"));
        let Some((ticket, tag)) = self.hold.next(index) else {
            return Ok(());
        };
        let place = self.held.iter().position(|held| held.ticket == ticket);
        let place = place.expect("what is due is held");
        let HeldRequest { mut pending, .. } = self.held.swap_remove(place);
        pending.ticket = Some(ticket);
        trace!(
            self,
            at self.plan.mask(pending.range),
            "device: {} is submitted again on worker {worker}: {}",
            number_of(tag),
            show(pending.range)
        );
        self.hold.submits(ticket);
        self.submit_again(pending)?;
        self.hold.submitted(ticket);
        Ok(())
    }

    fn submit_again(&mut self, mut pending: Pending) -> Checked {
        self.now += 1;
        (pending.seen, pending.written) = (self.ledger.seen(), None);
        pending.thresholds = Thresholds::only(self.threshold);
        let (worker, tag) = (pending.worker, pending.tag);
        let request = self.request_again(&pending);
        if let PendingKind::Write(_) = &pending.kind {
            for sector in bits(self.plan.mask(pending.range)) {
                self.changed_at[sector] = self.now;
                self.model.write_again(sector);
            }
        }
        // It waits anew.
        (pending.rounds, pending.round) = (self.rounds_at_begin(), self.rounds);
        self.pending.push(pending);
        self.submit(worker, tag, request)
    }

    fn request_again(&mut self, pending: &Pending) -> GuestRequest {
        let range: SectorRange = pending.range;
        match &pending.kind {
            PendingKind::Read => GuestRequest::Read(range),
            PendingKind::Flush => GuestRequest::Flush,
            PendingKind::Write(write) if write.zeroes => GuestRequest::Zero {
                range,
                unmap: self.random.below(2) == 0,
                durable: write.durable,
            },
            PendingKind::Write(write) => {
                let bytes = usize::try_from(range.bytes()).expect("few");
                let mut data = self.pools[pending.worker].take(bytes);
                let sectors = bits(self.plan.mask(range));
                for (sector, bytes) in sectors.zip(data.chunks_exact_mut(SECTOR_LEN)) {
                    fill(bytes, Value::written(write.number, sector));
                }
                GuestRequest::Write {
                    range,
                    data,
                    durable: write.durable,
                }
            }
        }
    }
}
