//! What becomes of an operation on a simulated replica.
//!
//! Its fate is drawn when it is submitted. Then, in steps between which anything else may happen:
//! it takes effect, sector by sector or all at once; it is done; its reply arrives.

use std::time::Duration;

use super::Violation;
use super::checks::ToldError;
use super::effects::{SECTOR_LEN, fill, parse};
use super::model::Value;
use super::plan::bits;
use super::world::{Checked, Pending, PendingKind, PendingWrite, World, show, trace};
use crate::common::operation::{Action, Operation};
use crate::common::{Errno, SectorRange};
use crate::engine::ReadPattern;
use crate::engine::mutant::{self, Mutant};

/// What every injected error is.
const EIO: Errno = Errno(5);

/// An operation on its way.
#[derive(Debug)]
pub(super) struct Flight {
    operation: Operation,
    worker: usize,
    fate: Fate,
    /// The sectors on which it has still to take effect.
    sectors: u64,
    /// The guest's write that it is part of.
    write: Option<u64>,
    submitted_at: Duration,
    /// The failures of the replica when it was submitted.
    failures: u32,
    /// How often it had left the set by then.
    departures: u32,
    /// It is done, and this is the reply; for a failed flush, the losses that it tells of.
    done: Option<(Result<(), Errno>, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    /// An error; a write has taken effect on some sectors.
    Fails,
    /// Reported done, without effect on some sectors.
    Lies,
    /// A write that lands so many sectors further on.
    Misdirected(usize),
}

impl Flight {
    pub(super) fn replica(&self) -> usize {
        self.operation.replica.as_usize()
    }

    /// Since when the replica owes the reply.
    pub(super) fn submitted_at(&self) -> Duration {
        self.submitted_at
    }

    fn name(&self) -> &'static str {
        match (&self.operation.action, self.write) {
            (Action::Read { .. }, _) => "read",
            (Action::Write { .. }, Some(_)) => "write",
            (Action::Write { .. }, None) => "rewrite",
            (Action::Zero { .. }, _) => "zero",
            (Action::Flush, _) => "flush",
        }
    }

    fn range(&self) -> Option<SectorRange> {
        match &self.operation.action {
            Action::Read { range, .. }
            | Action::Write { range, .. }
            | Action::Zero { range, .. } => Some(*range),
            Action::Flush => None,
        }
    }
}

impl World {
    /// An engine has submitted an operation.
    pub(super) fn take_off(&mut self, operation: Operation) -> Checked {
        let replica = operation.replica.as_usize();
        if self.is_out(replica) || self.members >> replica & 1 == 0 {
            let text = format!("replica {replica} is asked although it has left the set");
            return Err(Violation::new("W6", text));
        }
        let disk = self.plan.disk();
        let (sectors, write) = match &operation.action {
            Action::Flush => (self.replicas[replica].dirty(), None),
            Action::Read { range, .. }
            | Action::Write { range, .. }
            | Action::Zero { range, .. } => {
                if range.count == 0 || range.start < disk.start || range.end() > disk.end() {
                    return Err(Violation::new(
                        "range",
                        format!("{operation:?} is not on the disk"),
                    ));
                }
                let write = match &operation.action {
                    Action::Write {
                        data, offset_bytes, ..
                    } => self.guest_write(replica, *range, &data[*offset_bytes..])?,
                    Action::Zero { .. } => {
                        let asker = operation.request;
                        let of_guest = self.engines[self.input_from].is_guest_write(asker);
                        of_guest
                            .then(|| self.guest_zero(replica, *range))
                            .transpose()?
                    }
                    Action::Read { .. } | Action::Flush => None,
                };
                (self.plan.mask(*range), write)
            }
        };
        if write.is_none() && matches!(operation.action, Action::Write { .. } | Action::Zero { .. })
        {
            self.rewrites += 1;
            self.doubt_mend(sectors);
        }
        let mut flight = Flight {
            worker: self.input_from,
            operation,
            fate: Fate::Done,
            sectors,
            write,
            submitted_at: self.clock,
            failures: self.ledger.failures[replica],
            departures: self.ledger.departures[replica],
            done: None,
        };
        self.draw_fate(&mut flight);
        self.flights.push(flight);
        Ok(())
    }

    /// The guest's write that data belongs to, which is one in flight that this replica was not
    /// handed yet; otherwise the data is that of a rewrite.
    fn guest_write(
        &mut self,
        replica: usize,
        range: SectorRange,
        data: &[u8],
    ) -> Result<Option<u64>, Violation> {
        let Some(number) = parse(&data[..SECTOR_LEN]).and_then(Value::write) else {
            return Ok(None);
        };
        let is_this = |pending: &Pending, write: &PendingWrite| {
            write.number == number && pending.range == range
        };
        let failures = self.ledger.failures;
        let write = self.pending_write(is_this);
        write
            .map(|write| write.hand_to(replica, failures))
            .transpose()
    }

    /// The guest's zeroing that an operation belongs to. Zeroes do not tell who wrote them, but of
    /// those of one range and one worker the first one that this replica was not handed is
    /// meant: they run in order.
    fn guest_zero(&mut self, replica: usize, range: SectorRange) -> Result<u64, Violation> {
        let worker = self.input_from;
        let is_this = |pending: &Pending, write: &PendingWrite| {
            let here = pending.worker == worker && pending.range == range;
            here && write.zeroes && write.handed_to & (1 << replica) == 0
        };
        let failures = self.ledger.failures;
        match self.pending_write(is_this) {
            Some(write) => write.hand_to(replica, failures),
            None => Err(Violation::new("W4", "zeroes that nobody asked for")),
        }
    }

    /// The first of the guest's writes that is meant.
    fn pending_write(
        &mut self,
        is_meant: impl Fn(&Pending, &PendingWrite) -> bool,
    ) -> Option<&mut PendingWrite> {
        let meant = self
            .pending
            .iter_mut()
            .filter(|pending| match &pending.kind {
                PendingKind::Write(write) => is_meant(pending, write),
                PendingKind::Read | PendingKind::Flush => false,
            });
        let first = meant.min_by_key(|pending| pending.tag.0)?;
        match &mut first.kind {
            PendingKind::Write(write) => Some(write),
            PendingKind::Read | PendingKind::Flush => None,
        }
    }

    /// A replica is about to be mended: if enough replicas lie to win a vote, right bytes may be
    /// replaced.
    fn doubt_mend(&mut self, sectors: u64) {
        let fifo = self.plan.read_pattern == ReadPattern::Fifo;
        let enough = if fifo { 1 } else { self.plan.threshold };
        let seen = self.ledger.seen();
        for sector in bits(sectors).filter(|sector| seen.wrong_at(*sector) >= enough) {
            self.mark_mixed(1 << sector);
        }
    }

    fn draw_fate(&mut self, flight: &mut Flight) {
        if self.calm || !self.plan.is_faulty(flight.replica()) {
            return;
        }
        let (faults, random) = (self.plan.faults, &mut self.random);
        match &flight.operation.action {
            Action::Read { .. } if random.chance(faults.read_error) => {
                flight.fate = Fate::Fails;
                flight.sectors = 0;
            }
            Action::Write { .. } | Action::Zero { .. } if random.chance(faults.write_error) => {
                flight.fate = Fate::Fails;
                flight.sectors &= random.bits();
            }
            Action::Write { .. } | Action::Zero { .. } if random.chance(faults.lost) => {
                flight.fate = Fate::Lies;
                flight.sectors &= random.bits() & random.bits();
            }
            Action::Write { .. } | Action::Zero { .. }
                if self.plan.sectors > 1 && random.chance(faults.misdirected) =>
            {
                let shift = 1 + random.below(self.plan.sectors - 1);
                flight.fate = Fate::Misdirected(usize::try_from(shift).expect("few"));
            }
            Action::Flush if random.chance(faults.flush_error) => flight.fate = Fate::Fails,
            Action::Flush if random.chance(faults.lying_flush) => flight.fate = Fate::Lies,
            _ => return,
        }
        self.ledger.any = true;
        trace!(
            self,
            "replica {}: the next {} {:?}",
            flight.replica(),
            flight.name(),
            flight.fate
        );
    }

    /// The operation makes its next step.
    pub(super) fn advance(&mut self, index: usize) -> Checked {
        let flight = &self.flights[index];
        if flight.done.is_some() {
            return self.arrive(index);
        }
        let flushes_nothing = flight.fate != Fate::Done && flight.range().is_none();
        if flight.sectors == 0 || flushes_nothing {
            self.finish(index);
            return Ok(());
        }
        let mut now = flight.sectors;
        if self.random.chance(self.plan.tear) {
            now = 1 << self.random.bit(now);
        }
        self.take_effect(index, now);
        if self.flights[index].sectors == 0 && self.random.below(2) == 0 {
            self.finish(index);
        }
        Ok(())
    }

    /// The operation takes effect on these sectors.
    pub(super) fn take_effect(&mut self, index: usize, now: u64) {
        // Out of its place for a moment, so that the rest of the world can be changed.
        let mut flight = self.flights.swap_remove(index);
        flight.sectors &= !now;
        let replica = flight.replica();
        let bytes_of = |sector: usize, range: &SectorRange| {
            (sector - usize::try_from(range.start).expect("few")) * SECTOR_LEN
        };
        match &mut flight.operation.action {
            Action::Flush => self.write_back(replica, now),
            Action::Read { range, into } => {
                for sector in bits(now) {
                    let start = bytes_of(sector, range);
                    fill(
                        &mut into[start..start + SECTOR_LEN],
                        self.replicas[replica].value(sector),
                    );
                }
            }
            Action::Write {
                range,
                data,
                offset_bytes,
                ..
            } => {
                for sector in bits(now) {
                    let start = *offset_bytes + bytes_of(sector, range);
                    let value = parse(&data[start..start + SECTOR_LEN]).unwrap_or(Value::rotten(0));
                    let value = self.changed_by_guest(value, flight.write.is_some());
                    let guest = flight.write.is_some();
                    self.write_sector(replica, sector, value, flight.fate, guest);
                }
            }
            Action::Zero { unmap, .. } => {
                // Zeroes of a job have no colour: they are what the disk held in the beginning.
                let (guest, number) = (flight.write.is_some(), flight.write.unwrap_or(0));
                for sector in bits(now) {
                    let value = self.discarded(Value::written(number, sector), *unmap && guest);
                    self.write_sector(replica, sector, value, flight.fate, guest);
                }
            }
        }
        trace!(
            self,
            "replica {replica}: {} {}",
            flight.name(),
            bits(now)
                .map(|s| format!("{s}:{}", self.replicas[replica].value(s)))
                .collect::<Vec<_>>()
                .join(" ")
        );
        self.flights.push(flight);
        let last = self.flights.len() - 1;
        self.flights.swap(index, last);
    }

    /// The host crashes: the operation takes effect on these sectors only.
    pub(super) fn crash_in_flight(&mut self, index: usize, sectors: u64) {
        let now = sectors & self.flights[index].sectors;
        let action = &self.flights[index].operation.action;
        if now != 0 && matches!(action, Action::Write { .. } | Action::Zero { .. }) {
            self.take_effect(index, now);
        }
    }

    /// The engine's copy of the data is out of the guest's reach, whatever it does to its buffer.
    /// (Unless a mutant hands the guest's own memory to the replicas.)
    fn changed_by_guest(&mut self, value: Value, guest_write: bool) -> Value {
        let shared = mutant::is_broken(Mutant::FanOutFromGuestMemory);
        if shared && guest_write && self.plan.fickle_guest && self.random.below(4) == 0 {
            self.rotten += 1;
            return Value::rotten(self.rotten);
        }
        value
    }

    /// A replica's discard leaves zeroes. (Unless a mutant lets it do as it likes.)
    fn discarded(&mut self, zero: Value, unmap: bool) -> Value {
        if unmap && mutant::is_broken(Mutant::DiscardAsYouLike) {
            self.rotten += 1;
            return Value::rotten(self.rotten);
        }
        zero
    }

    fn write_sector(
        &mut self,
        replica: usize,
        sector: usize,
        value: Value,
        fate: Fate,
        guest: bool,
    ) {
        let mut sector = sector;
        if let Fate::Misdirected(shift) = fate {
            self.mark_lied(replica, 1 << sector);
            sector = (sector + shift) % self.stirred.len();
        }
        let bit = 1 << sector;
        self.replicas[replica].write(sector, value);
        self.stirred[sector] = self.now;
        // A write that nobody waits for any more may bring old bytes: the engine must know.
        let unexcused = !guest || self.ledger.excused[replica] & bit == 0;
        let wrong = !self.model.is_permitted(sector, value, self.now);
        if matches!(fate, Fate::Misdirected(_)) || (wrong && unexcused) {
            self.mark_lied(replica, bit);
        } else if wrong {
            // Its place is taken by bytes that the engine has to expect.
            self.ledger.mended(replica, bit);
        } else {
            self.ledger.mended(replica, bit);
        }
    }

    /// The operation is done on the replica; its reply is on its way.
    fn finish(&mut self, index: usize) {
        let flight = &self.flights[index];
        let (replica, fate) = (flight.replica(), flight.fate);
        let range = flight.range();
        let mut failed = fate == Fate::Fails;
        match &flight.operation.action {
            Action::Read { .. } => {}
            Action::Write { durable, .. } | Action::Zero { durable, .. } => {
                let durable = *durable;
                let mask = range.map_or(0, |range| self.plan.mask(range));
                if fate == Fate::Lies {
                    // What it did write was marked as mended on the way: no harm in thinking worse
                    // of it.
                    self.mark_lied(replica, mask);
                } else if durable && !failed {
                    self.write_back(replica, mask);
                }
            }
            Action::Flush => {
                let sectors = flight.sectors;
                match fate {
                    Fate::Fails => {
                        let written = sectors & self.random.bits();
                        self.write_back(replica, written);
                        let lost = sectors & self.random.bits();
                        self.replicas[replica].lose(lost, false);
                    }
                    Fate::Lies => {
                        self.ledger.lied_durable[replica] |=
                            sectors & self.replicas[replica].dirty();
                    }
                    Fate::Done | Fate::Misdirected(_) => {}
                }
                failed |= self.replicas[replica].take_error();
            }
        }
        let told = if failed && range.is_none() {
            self.replicas[replica].untold()
        } else {
            0
        };
        let result = if failed { Err(EIO) } else { Ok(()) };
        self.flights[index].done = Some((result, told));
        self.flights[index].sectors = 0;
        trace!(
            self,
            "replica {replica}: {} done, {result:?}",
            self.flights[index].name()
        );
    }

    /// The reply reaches the engine.
    fn arrive(&mut self, index: usize) -> Checked {
        let flight = self.flights.swap_remove(index);
        let replica = flight.replica();
        let Some((result, told)) = flight.done else {
            unreachable!("only what is done has a reply");
        };
        trace!(
            self,
            "reply: {} {} of replica {replica} to request {} of worker {}: {result:?}",
            flight.name(),
            flight.range().map_or(String::new(), show),
            flight.operation.request.0,
            flight.worker
        );
        self.note_reply(&flight, result.is_ok(), told);
        let error = result.err().map(|errno| ToldError {
            replica: flight.operation.replica,
            // A reply that nobody waits for any more is of no interest.
            must_be_reported: flight.departures == self.ledger.departures[replica],
            operation: flight.operation.action.describe().0,
            errno,
        });
        let (engine, effects) = self.engine(flight.worker);
        engine.reply(flight.operation.reply(result), effects);
        self.look_at_effects(error)
    }

    /// Keeps the books about a reply that the engine is about to get.
    fn note_reply(&mut self, flight: &Flight, success: bool, told: u64) {
        let replica = flight.replica();
        if let Some(number) = flight.write {
            for pending in &mut self.pending {
                if let PendingKind::Write(write) = &mut pending.kind
                    && write.number == number
                {
                    let set = if success {
                        &mut write.succeeded
                    } else {
                        &mut write.failed
                    };
                    *set |= 1 << replica;
                }
            }
        }
        match (&flight.operation.action, success) {
            (Action::Write { range, .. } | Action::Zero { range, .. }, true)
                if flight.write.is_none() =>
            {
                // Mended, unless something has come between.
                if flight.failures == self.ledger.failures[replica] {
                    self.ledger.excused[replica] &= !self.plan.mask(*range);
                }
            }
            (_, true) => {}
            (Action::Write { durable, .. } | Action::Zero { durable, .. }, false) => {
                if *durable {
                    // It may have told of what was mended before.
                    self.ledger.failures[replica] += 1;
                    let all = self.replicas[replica].all();
                    self.mark_excused(replica, all);
                }
            }
            (Action::Read { range, .. }, false) => {
                let mask = self.plan.mask(*range);
                for pending in &mut self.pending {
                    pending.seen.excused[replica] |= mask;
                }
            }
            (Action::Flush, false) => {
                self.replicas[replica].told(told);
                self.ledger.dropped[replica] &= !told;
                self.ledger.failures[replica] += 1;
                let all = self.replicas[replica].all();
                self.mark_excused(replica, all);
            }
        }
    }
}
