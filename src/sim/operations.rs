//! What an operation does to a simulated replica.
//!
//! The fault that is injected into it, if any, is drawn when the engine submits it. It takes effect
//! sector by sector or all at once, then it ends, then its reply is delivered. Anything else may
//! happen between two of these steps.

use std::time::Duration;

use super::Violation;
use super::effects::{SECTOR_LEN, fill, parse};
use super::flight::{Fault, Flight};
use super::model::Value;
use super::pending::PendingKind;
use super::plan::{bits, widen};
use super::state::{Checked, World, show, trace};
use crate::common::operation::{Action, Operation};
use crate::common::{Errno, SectorRange};
use crate::engine::{ReadPattern, Tag};

/// Every injected error of a replica that has space.
const EIO: Errno = Errno(5);
pub(super) const ENOSPC: Errno = Errno(28);

impl World {
    /// An engine submits an operation.
    pub(super) fn start_operation(&mut self, operation: Operation) -> Checked {
        let replica = operation.replica.as_usize();
        // The replica may have been evicted during this input, by another worker.
        let was_evicted = self.before_input.evicted >> replica & 1 == 1;
        if (self.is_evicted(replica) && was_evicted) || self.members >> replica & 1 == 0 {
            let text = format!("replica {replica} is evicted, and an operation is submitted to it");
            return Err(Violation::new("W6", text));
        }
        let preferred = self.writes_preferred(&operation)?;
        let disk = self.plan.disk();
        let (sectors, write) = match &operation.action {
            Action::Flush => {
                let written = std::mem::take(&mut self.ledger.written[replica]);
                self.ledger.in_flush[replica] |= written;
                (self.replicas[replica].dirty(), None)
            }
            Action::Record { .. } => (0, None),
            Action::Read { range, .. }
            | Action::Write { range, .. }
            | Action::Zero { range, .. }
            | Action::FindData { range, .. } => {
                if range.count == 0 || range.start < disk.start || range.end() > disk.end() {
                    let text = format!("{operation:?} is not on the disk");
                    return Err(Violation::new("range", text));
                }
                let tag = self.engines[self.input_from].guest_write(operation.request);
                let write = match (&operation.action, tag) {
                    (Action::Write { .. } | Action::Zero { .. }, Some(tag)) => {
                        // Another worker may have taken the mark away since it was submitted.
                        if !self.overlapped && !self.shared.is_marked(*range) {
                            let text = format!("{} is written and not marked", show(*range));
                            return Err(Violation::new("S4", text).at(self.plan.mask(*range)));
                        }
                        Some(self.guest_write(tag, &operation)?)
                    }
                    _ => None,
                };
                (self.plan.mask(*range), write)
            }
        };
        if write.is_some() {
            // It has the lock: no vote goes on there.
            self.chosen.retain(|sector, _| sectors >> sector & 1 == 0);
        } else if matches!(operation.action, Action::Write { .. } | Action::Zero { .. }) {
            self.rewritten[replica] |= sectors;
            self.check_resync(&operation, sectors)?;
            self.check_unasked(&operation)?;
            if !preferred {
                self.doubt_repair(sectors);
            }
        }
        match &operation.action {
            Action::Flush => {
                let in_flight = self.being_written(replica);
                self.staleness.flush_begins(replica, in_flight);
            }
            Action::Write { .. } | Action::Zero { .. } => {
                // Also a replica whose record was not written, by this worker.
                let may_be_late = self.overlapped || self.plan.records;
                self.staleness.writes(replica, sectors, may_be_late);
            }
            Action::Read { .. } | Action::FindData { .. } | Action::Record { .. } => {}
        }
        let part = self.engines[self.input_from].reads_part(&operation);
        let background = self.engines[self.input_from].is_of_a_job(operation.request);
        let (worker, request) = (self.input_from, operation.request);
        let same = |f: &Flight| f.worker == worker && f.operation.request == request;
        let of_flush = |f: &Flight| same(f) && f.is_flush() && !self.is_evicted(f.replica());
        if matches!(operation.action, Action::Flush) && !self.flights.iter().any(of_flush) {
            self.flush_lacks = self.ledger.excused;
        }
        // The steps of a series of writes to records are one request, and one begins when all of
        // the step before has ended or was evicted.
        let is_record = matches!(operation.action, Action::Record { .. });
        if is_record || !self.flights.iter().any(same) {
            self.took
                .retain(|took| (took.worker, took.request) != (worker, request));
        }
        let mut flight = Flight {
            worker,
            operation,
            fault: Fault::None,
            sectors,
            data: 0,
            write,
            part,
            preferred,
            submitted_at: self.clock,
            round: self.rounds,
            failures: self.before_input.failures[replica],
            evictions: self.before_input.evictions[replica],
            background,
            no_space: false,
            outdated: false,
            not_before: self.clock,
            late: false,
            done: None,
        };
        flight.not_before += self.draw_delay(&flight);
        self.draw_fault(&mut flight);
        self.note_step(&flight);
        self.flights.push(flight);
        Ok(())
    }

    /// W6: a resync writes to no block of its replica that is fresh.
    fn check_resync(&self, operation: &Operation, sectors: u64) -> Checked {
        let replica = operation.replica;
        let resynced = self.engines[self.input_from].resyncs(operation.request);
        // With `rewrite-corrupted` it also repairs what is corrupt or unreadable.
        if resynced != Some(replica) || self.plan.rewrite_corrupted {
            return Ok(());
        }
        let mut now = self.view;
        now.refresh(&self.shared, self.plan.disk());
        // What is unrecovered is decided when its winner is written (S5).
        let stale = now.stale[replica.as_usize()] | now.unrecovered;
        let fresh = sectors & !widen(stale, self.plan.block_sectors);
        if fresh != 0 {
            let text = format!("replica {} is resynced on {fresh:b}, and fresh", replica.0);
            return Err(Violation::new("W6", text).at(fresh));
        }
        Ok(())
    }

    /// The number of the guest's write that an operation belongs to.
    fn guest_write(&mut self, tag: Tag, operation: &Operation) -> Result<u64, Violation> {
        let failures = self.before_input.failures;
        let pending = self.pending.iter_mut().find(|pending| pending.tag == tag);
        let Some((range, PendingKind::Write(write))) =
            pending.map(|pending| (pending.range, &mut pending.kind))
        else {
            let text = format!("{operation:?} is of no write of the guest");
            return Err(Violation::new("W3", text));
        };
        let is_right = match &operation.action {
            Action::Write {
                range: of,
                data,
                offset_bytes,
                ..
            } => {
                let first = parse(&data[*offset_bytes..*offset_bytes + SECTOR_LEN]);
                *of == range && !write.zeroes && first.and_then(Value::write) == Some(write.number)
            }
            Action::Zero { range: of, .. } => *of == range && write.zeroes,
            _ => false,
        };
        if !is_right || write.ended {
            let text = format!("{operation:?} is not what w{} writes", write.number);
            return Err(Violation::new("W3", text));
        }
        write.note_submission(operation.replica.as_usize(), failures)
    }

    /// A replica is about to be repaired: if enough replicas are corrupt to win a vote, the repair
    /// may replace right bytes.
    fn doubt_repair(&mut self, sectors: u64) {
        let fifo = self.plan.read_pattern == ReadPattern::Fifo;
        let least = self.thresholds.least;
        let enough = if fifo { 1 } else { least };
        let seen = self.ledger.seen();
        let both_may_win = 2 * least <= self.count();
        for sector in bits(sectors).filter(|sector| seen.wrong_at(*sector) >= enough) {
            self.mark_accusable(1 << sector);
            if both_may_win && seen.wrong_at(sector) >= least {
                self.ledger.overruled |= 1 << sector;
            }
        }
    }

    /// How long the operation takes at least.
    fn draw_delay(&mut self, flight: &Flight) -> Duration {
        let slowness = self.plan.slowness;
        let percent = if flight.is_flush() {
            slowness.flush
        } else {
            slowness.other
        };
        let timeout = self.plan.replica_timeout;
        let others_turn = || {
            let turn = self.clock.as_nanos() / (timeout * 8).as_nanos() % self.count() as u128;
            turn != flight.replica() as u128
        };
        if percent == 0 || self.faults_ended || (slowness.in_turn && others_turn()) {
            return Duration::ZERO;
        }
        let part = 50 + u32::try_from(self.random.below(50)).expect("small");
        timeout * percent / 100 * part / 100
    }

    /// Injects a fault into the operation, or none.
    fn draw_fault(&mut self, flight: &mut Flight) {
        let asks = matches!(flight.operation.action, Action::FindData { .. });
        if asks || self.faults_ended || !self.plan.is_faulty(flight.replica()) {
            return;
        }
        if self.full_until > self.clock && !matches!(flight.operation.action, Action::Read { .. }) {
            flight.fault = Fault::Error;
            flight.no_space = true;
            if flight.range().is_some() {
                flight.sectors &= self.random.bits();
            }
            self.ledger.any = true;
            return;
        }
        let (faults, random) = (self.plan.faults, &mut self.random);
        match &flight.operation.action {
            Action::Read { .. } if random.chance(faults.read_error) => {
                flight.fault = Fault::Error;
                flight.sectors = 0;
            }
            Action::Write { .. } | Action::Zero { .. } if random.chance(faults.write_error) => {
                flight.fault = Fault::Error;
                flight.sectors &= random.bits();
            }
            Action::Record { .. } if random.chance(faults.write_error) => {
                flight.fault = Fault::Error;
            }
            Action::Write { .. } | Action::Zero { .. } if random.chance(faults.lost) => {
                flight.fault = Fault::Lost;
                flight.sectors &= random.bits() & random.bits();
            }
            Action::Write { .. } | Action::Zero { .. }
                if self.plan.sectors > 1 && random.chance(faults.misdirected) =>
            {
                let shift = 1 + random.below(self.plan.sectors - 1);
                flight.fault = Fault::Misdirected(usize::try_from(shift).expect("few"));
            }
            Action::Flush if random.chance(faults.flush_error) => flight.fault = Fault::Error,
            Action::Flush if random.chance(faults.lying_flush) => flight.fault = Fault::Lost,
            _ => return,
        }
        self.ledger.any = true;
        trace!(
            self,
            at flight.range().map_or(0, |range| self.plan.mask(range)),
            "replica {}: fault in the next {}: {:?}",
            flight.replica(),
            flight.name(),
            flight.fault
        );
    }

    /// The replica fails what is in flight, like a device that is reset.
    pub(super) fn fail_in_flight(&mut self, replica: usize) {
        for flight in &mut self.flights {
            if flight.replica() != replica || flight.done.is_some() || flight.fault != Fault::None {
                continue;
            }
            let by_action = match flight.operation.action {
                Action::FindData { .. } => continue,
                Action::Read { .. } | Action::Record { .. } => 0,
                Action::Write { .. } | Action::Zero { .. } | Action::Flush => self.random.bits(),
            };
            flight.fault = Fault::Error;
            flight.sectors &= by_action;
        }
        self.ledger.any = true;
    }

    /// The operation, which has not ended, makes its next step.
    pub(super) fn advance(&mut self, index: usize) {
        let flight = &self.flights[index];
        let flushes_nothing = flight.fault != Fault::None && flight.range().is_none();
        if flight.sectors == 0 || flushes_nothing {
            self.end_operation(index);
            return;
        }
        let mut now = flight.sectors;
        if self.random.chance(self.plan.tear) {
            now = 1 << self.random.bit(now);
        }
        self.take_effect(index, now);
        if self.flights[index].sectors == 0 && self.random.below(2) == 0 {
            self.end_operation(index);
        }
    }

    /// The operation takes effect on these sectors.
    fn take_effect(&mut self, index: usize, now: u64) {
        // It leaves its place for a moment, so that the rest of the state can be changed.
        let mut flight = self.flights.swap_remove(index);
        let replica = flight.replica();
        let defect = match flight.operation.action {
            Action::Read { .. } => self.ledger.unreadable[replica],
            Action::Write { .. } | Action::Zero { .. } => self.ledger.unwritable[replica],
            Action::FindData { .. } | Action::Flush | Action::Record { .. } => 0,
        };
        if defect & now != 0 {
            flight.fault = Fault::Error;
        }
        flight.sectors &= !now;
        let now = now & !defect;
        let bytes_of = |sector: usize, range: &SectorRange| {
            (sector - usize::try_from(range.start).expect("few")) * SECTOR_LEN
        };
        match &mut flight.operation.action {
            Action::Record { .. } => unreachable!("it has no sectors"),
            Action::Flush => self.write_back(replica, now),
            Action::FindData { .. } => {
                let unreadable = self.ledger.unreadable[replica];
                let is_data = |sector: &usize| {
                    unreadable >> sector & 1 == 1 || !self.replicas[replica].is_hole(*sector)
                };
                flight.data |= bits(now).filter(is_data).fold(0, |mask, s| mask | 1 << s);
            }
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
                    let guest = flight.write.is_some();
                    self.write_sector(replica, sector, value, flight.fault, guest);
                }
            }
            Action::Zero { .. } => {
                // Zeroes of a job have the number of what the disk held in the beginning.
                let (guest, number) = (flight.write.is_some(), flight.write.unwrap_or(0));
                for sector in bits(now) {
                    let value = Value::written(number, sector);
                    self.write_sector(replica, sector, value, flight.fault, guest);
                }
            }
        }
        trace!(
            self,
            at now,
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

    /// The sector is written. `guest`: by a write of the guest.
    fn write_sector(
        &mut self,
        replica: usize,
        sector: usize,
        value: Value,
        fault: Fault,
        guest: bool,
    ) {
        let mut sector = sector;
        if let Fault::Misdirected(shift) = fault {
            self.mark_corrupt(replica, 1 << sector);
            sector = (sector + shift) % self.changed_at.len();
        }
        let bit = 1 << sector;
        self.replicas[replica].write(sector, value);
        self.is_modified(replica);
        self.ledger.unreadable[replica] &= !widen(bit, self.plan.block_sectors);
        self.changed_at[sector] = self.now;
        // An orphaned write may bring old bytes. The engine must expect them: the sector is stale.
        let unexpected = !guest || self.ledger.excused[replica] & bit == 0;
        let undoes =
            || self.undoes_write(sector, value) || self.model.is_past(sector, value, self.now);
        let wrong = !self.model.is_permitted(sector, value, self.now) || (!guest && undoes());
        if matches!(fault, Fault::Misdirected(_)) || (wrong && unexpected) {
            self.mark_corrupt(replica, bit);
        } else {
            self.ledger.repaired(replica, bit);
        }
    }

    /// The image of a replica is modified now.
    pub(super) fn is_modified(&mut self, replica: usize) {
        self.modifications += 1;
        self.replicas[replica].is_modified(self.modifications);
    }

    /// W8: a resync takes the copy of a replica for fresh without having written to it. It holds
    /// what every copy holds that is fresh and right.
    pub(super) fn found_equal(&mut self, replica: usize, range: SectorRange) -> Checked {
        let sectors = self.plan.mask(range);
        trace!(self, at sectors, "replica {replica}: {} is equal", show(range));
        self.doubt_repair(sectors);
        for sector in bits(sectors) {
            let (value, bit) = (self.replicas[replica].value(sector), 1 << sector);
            let differs = |r: &usize| self.replicas[*r].value(sector) != value;
            // What is corrupt may have become so since the answer.
            let wrong = |r: &usize| self.ledger.wrong(*r) & bit != 0;
            let excused = |r: &usize| (self.ledger.excused[*r] | self.ledger.mixed) & bit != 0;
            if wrong(&replica) && value != Value::written(0, sector) {
                continue;
            }
            // A file system that has lost a page in spite of a flush finds a hole there.
            let lies = |r: &usize| wrong(r) || self.ledger.falsely_durable[*r] & bit != 0;
            let others = || self.members().filter(|r| *r != replica);
            let against = others().any(|r| differs(&r) && !excused(&r) && !lies(&r));
            let votes = others().filter(|r| !differs(r) || lies(r)).count();
            if against || votes < self.thresholds.least {
                let text = format!("{sector} is {value} on replica {replica}, and not on others");
                return Err(Violation::new("W8", text).at(bit));
            }
            let misled = others().any(|r| differs(&r) && !wrong(&r) && lies(&r));
            if self.model.is_permitted(sector, value, self.now) && !misled {
                self.ledger.repaired(replica, bit);
            } else {
                self.mark_corrupt(replica, bit);
            }
        }
        self.ledger.excused[replica] &= !sectors;
        // It is durable after the next flush, like a copy.
        self.staleness.writes(replica, sectors, self.overlapped);
        self.staleness.has_written(replica, sectors);
        for written in &mut self.ledger.written {
            *written |= sectors;
        }
        Ok(())
    }

    /// Whether the value is older than that of a durable write which the replicas have written, and
    /// which is about to be answered.
    fn undoes_write(&self, sector: usize, value: Value) -> bool {
        self.pending.iter().any(|pending| match &pending.kind {
            PendingKind::Write(write) if write.ended => {
                let written = Value::written(write.number, sector);
                self.plan.mask(pending.range) >> sector & 1 == 1
                    && !self.model.may_follow(sector, value, written)
            }
            PendingKind::Write(_) | PendingKind::Read | PendingKind::Flush => false,
        })
    }

    /// Dirty sectors among these become durable.
    pub(super) fn write_back(&mut self, replica: usize, sectors: u64) {
        let written = sectors & self.replicas[replica].dirty();
        self.replicas[replica].write_back(sectors);
        self.ledger.falsely_durable[replica] &= !written;
    }

    /// The operation ends on the replica; its reply can be delivered.
    fn end_operation(&mut self, index: usize) {
        let flight = &mut self.flights[index];
        let (replica, fault) = (flight.replica(), flight.fault);
        let range = flight.range();
        match &mut flight.operation.action {
            Action::Record { .. } => self.end_record_write(index, fault == Fault::None),
            Action::Read { .. } => {}
            Action::FindData { range, found } => {
                for sector in range.start..range.end() {
                    let runs = found.runs();
                    let goes_on = runs.last().is_some_and(|run| run.end() == sector);
                    let is_full = runs.len() >= self.plan.runs_per_answer;
                    match flight.data >> sector & 1 == 1 {
                        false => found.hole_until(sector + 1),
                        true if is_full && !goes_on => break,
                        true => found.data_until(sector + 1),
                    }
                }
            }
            Action::Write { .. } | Action::Zero { .. } => {
                // Also what it did write: the checks may expect less than is there.
                if fault == Fault::Lost {
                    let mask = range.map_or(0, |range| self.plan.mask(range));
                    self.mark_corrupt(replica, mask);
                }
            }
            Action::Flush => {
                let sectors = flight.sectors;
                match fault {
                    Fault::Error => {
                        let written = sectors & self.random.bits();
                        self.write_back(replica, written);
                        // All is still in the page cache, in a third of the cases.
                        let lost = match self.random.below(3) {
                            0 => 0,
                            _ => sectors & self.random.bits(),
                        };
                        self.replicas[replica].lose(lost, false);
                    }
                    Fault::Lost => {
                        self.ledger.falsely_durable[replica] |=
                            sectors & self.replicas[replica].dirty();
                    }
                    Fault::None | Fault::Misdirected(_) => {}
                }
            }
        }
        // Linux reports a failed writeback once for each open file, to the flush that ends next.
        let is_flush = self.flights[index].is_flush();
        let has_error = is_flush && self.replicas[replica].take_error();
        let failed = fault == Fault::Error || has_error;
        let lost = if failed && is_flush {
            self.replicas[replica].unreported()
        } else {
            0
        };
        let errno = match self.flights[index].no_space {
            true => ENOSPC,
            false => EIO,
        };
        let result = if failed { Err(errno) } else { Ok(()) };
        self.flights[index].done = Some((result, lost));
        self.flights[index].late = self.random.chance(self.plan.late);
        self.flights[index].sectors = 0;
        trace!(
            self,
            at range.map_or(0, |range| self.plan.mask(range)),
            "replica {replica}: {} ends, {result:?}",
            self.flights[index].name()
        );
    }
}
