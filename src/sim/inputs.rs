//! What the engines are fed with, and what they ask for in return.
//!
//! Each input is one call of one engine, or of two that overlap (`overlap`). Its effects are
//! carried out and checked before the next input.

use super::Violation;
use super::effects::{Collected, Effect, SECTOR_LEN, fill, number_of, tag};
use super::flight::{Flight, Took};
use super::model::Value;
use super::operations::ENOSPC;
use super::pending::{NoSpace, Pending, PendingKind, PendingWrite};
use super::plan::{PLACES, WriteCache, bits};
use super::state::{Checked, ExpectedReport, World, show, trace};
use super::threshold::Thresholds;
use crate::common::operation::{Action, OperationType, Reply, RequestId};
use crate::common::{Errno, ReplicaIndex, SectorRange};
use crate::engine::{Engine, GuestRequest, Tag, WorkerIndex};

/// What is checked of one input when its effects are carried out.
#[derive(Debug)]
pub(super) struct InputChecks {
    pub(super) worker: usize,
    /// The input is an error of an operation, and this report of it has not come.
    pub(super) expected: Option<ExpectedReport>,
    /// QUORUM_FAILUREs more than failed requests.
    pub(super) failures: i64,
    pub(super) values_used: usize,
    /// A scrub runs.
    pub(super) scrubbing: bool,
}

/// A reply that reaches an engine.
#[derive(Debug)]
pub(super) struct Delivered {
    pub(super) worker: usize,
    replica: usize,
    /// See [`Flight::part`](super::flight::Flight::part).
    part: bool,
    is_record: bool,
    operation: OperationType,
    /// The sectors of the operation, a mask.
    sectors: u64,
    /// The number of the guest write that it belongs to.
    write: Option<u64>,
    /// What it writes there is preferred (W12).
    preferred: Option<SectorRange>,
    /// See [`Flight::outdated`](super::flight::Flight::outdated).
    outdated: bool,
    /// See [`Flight::failures`](super::flight::Flight::failures).
    failures: u32,
    /// See [`Flight::evictions`](super::flight::Flight::evictions).
    evictions: u32,
    result: Result<(), Errno>,
    /// It reports the loss of these sectors, a mask.
    lost: u64,
}

impl World {
    pub(super) fn submit_read(&mut self, worker: usize, range: SectorRange) -> Checked {
        let tag = self.pend(worker, range, PendingKind::Read);
        trace!(
            self,
            at self.plan.mask(range),
            "guest: {} reads {} on worker {worker}",
            number_of(tag),
            show(range)
        );
        self.submit(worker, tag, GuestRequest::Read(range))
    }

    pub(super) fn submit_write(&mut self, worker: usize, range: SectorRange) -> Checked {
        let (tag, number, durable) = self.pend_write(worker, range, false);
        let mut data = self.pools[worker].take(usize::try_from(range.bytes()).expect("few"));
        let sectors = bits(self.plan.mask(range));
        for (sector, bytes) in sectors.zip(data.chunks_exact_mut(SECTOR_LEN)) {
            fill(bytes, Value::written(number, sector));
        }
        self.submit(
            worker,
            tag,
            GuestRequest::Write {
                range,
                data,
                durable,
            },
        )
    }

    pub(super) fn submit_zero(
        &mut self,
        worker: usize,
        range: SectorRange,
        unmap: bool,
    ) -> Checked {
        let (tag, _, durable) = self.pend_write(worker, range, true);
        let zero = GuestRequest::Zero {
            range,
            unmap,
            durable,
        };
        self.submit(worker, tag, zero)
    }

    pub(super) fn submit_flush(&mut self, worker: usize) -> Checked {
        let tag = self.pend(worker, SectorRange::new(0, 0), PendingKind::Flush);
        trace!(self, "guest: {} flushes on worker {worker}", number_of(tag));
        self.submit(worker, tag, GuestRequest::Flush)
    }

    /// Returns the number of the write, and whether it must be durable when it is answered.
    fn pend_write(&mut self, worker: usize, range: SectorRange, zeroes: bool) -> (Tag, u64, bool) {
        if self.plan.write_cache == WriteCache::Switched && self.random.below(6) == 0 {
            self.write_through = !self.write_through;
        }
        let durable = self.write_through;
        self.writes += 1;
        let number = self.writes;
        let sectors = self.plan.mask(range);
        let mut overlapped = 0;
        for pending in &mut self.pending {
            if let PendingKind::Write(other) = &mut pending.kind {
                let both = self.plan.mask(pending.range) & sectors;
                other.overlapped |= both;
                overlapped |= both;
            }
        }
        self.untouched &= !sectors;
        let write = PendingWrite {
            number,
            zeroes,
            durable,
            ended: false,
            overlapped,
            preferred: 0,
            submitted_to: 0,
            succeeded: 0,
            failed: 0,
            failures: [0; PLACES],
            no_space: NoSpace::No,
        };
        let tag = self.pend(worker, range, PendingKind::Write(write));
        trace!(
            self,
            at self.plan.mask(range),
            "guest: {} {} {} on worker {worker}: w{number}",
            number_of(tag),
            match (zeroes, durable) {
                (false, false) => "writes",
                (false, true) => "durably writes",
                (true, false) => "zeroes",
                (true, true) => "durably zeroes",
            },
            show(range)
        );
        for sector in bits(self.plan.mask(range)) {
            let value = Value::written(number, sector);
            self.model.write_began(sector, value, self.now);
            self.changed_at[sector] = self.now;
        }
        (tag, number, durable)
    }

    fn pend(&mut self, worker: usize, range: SectorRange, kind: PendingKind) -> Tag {
        self.requests += 1;
        self.now += 1;
        let tag = tag(self.requests);
        let rounds = self.rounds_at_begin();
        self.pending.push(Pending {
            tag,
            worker,
            began: self.now,
            round: self.rounds,
            rounds,
            range,
            disk_sectors: self.changed_at.len(),
            seen: self.ledger.seen(),
            thresholds: Thresholds::only(self.threshold),
            kind,
            ticket: None,
            written: None,
            ended: 0,
            withheld: false,
        });
        tag
    }

    pub(super) fn submit(&mut self, worker: usize, tag: Tag, request: GuestRequest) -> Checked {
        let submit = |engine: &mut Engine, effects: &mut Collected| {
            engine.submit(tag, request, effects);
        };
        self.input(worker, None, submit)
    }

    /// The reply reaches the engine.
    pub(super) fn deliver_reply(&mut self, index: usize) -> Checked {
        let (reply, delivered) = self.take_reply(index);
        self.before_reply = Some(self.ledger.known_failures());
        let expected = self.note_reply(&delivered);
        self.input(delivered.worker, expected, |engine, effects| {
            engine.reply(reply, effects);
        })
    }

    /// The reply is about to reach the engine.
    pub(super) fn take_reply(&mut self, index: usize) -> (Reply, Delivered) {
        let flight = self.flights.swap_remove(index);
        let replica = flight.replica();
        let Some((result, lost)) = flight.done else {
            unreachable!("an operation that has not ended has no reply");
        };
        trace!(
            self,
            at flight.range().map_or(0, |range| self.plan.mask(range)),
            "reply: {} {} of replica {replica} to request {} of worker {}: {result:?}",
            flight.name(),
            flight.range().map_or(String::new(), show),
            flight.operation.request.0,
            flight.worker
        );
        if flight.evictions == self.ledger.evictions[replica] {
            self.took.push(Took {
                worker: flight.worker,
                request: flight.operation.request,
                replica,
                time: self.clock.saturating_sub(flight.submitted_at),
                success: result.is_ok(),
                reads: flight.reads(),
            });
        }
        self.note_end(&flight);
        let delivered = Delivered {
            worker: flight.worker,
            replica,
            part: flight.part,
            operation: flight.operation.action.describe().0,
            is_record: matches!(flight.operation.action, Action::Record { .. }),
            sectors: flight.range().map_or(0, |range| self.plan.mask(range)),
            write: flight.write,
            preferred: self.preference_of(&flight),
            outdated: flight.outdated,
            failures: flight.failures,
            evictions: flight.evictions,
            result,
            lost,
        };
        (flight.operation.reply(result), delivered)
    }

    /// Notes a reply that the engine receives. If it is an error, the engine must report it.
    pub(super) fn note_reply(&mut self, reply: &Delivered) -> Option<ExpectedReport> {
        let replica = reply.replica;
        let success = reply.result.is_ok();
        // The eviction that it causes may be noted already.
        if reply.is_record && !success && reply.evictions + 1 >= self.ledger.evictions[replica] {
            self.records.failed |= 1 << replica;
            self.records.failures += 1;
        }
        let no_space = match reply.result {
            Err(ENOSPC) if reply.evictions == self.ledger.evictions[replica] => NoSpace::Yes,
            Err(ENOSPC) => NoSpace::Perhaps,
            _ => NoSpace::No,
        };
        if let Some(number) = reply.write.filter(|_| !reply.outdated) {
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
                    write.no_space = write.no_space.max(no_space);
                }
            }
        }
        if let Some(range) = reply
            .preferred
            .filter(|_| reply.operation == OperationType::Write)
        {
            let stayed = reply.evictions == self.ledger.evictions[replica];
            self.preferred_written(replica, range, (success, stayed));
        }
        match (reply.operation, success) {
            (OperationType::Write, true) if reply.write.is_none() && reply.preferred.is_none() => {
                // Repaired, unless the replica has failed since.
                if reply.failures == self.ledger.failures[replica] {
                    self.note_settled(replica, reply.sectors);
                    self.ledger.excused[replica] &= !reply.sectors;
                    self.staleness.has_written(replica, reply.sectors);
                } else {
                    self.mark_excused(replica, reply.sectors);
                }
                self.ledger.copies[replica] |= reply.sectors;
                for written in &mut self.ledger.written {
                    *written |= reply.sectors;
                }
            }
            (OperationType::Flush, true) => {
                if reply.evictions == self.ledger.evictions[replica] {
                    self.staleness.flushed(replica);
                }
                self.ledger.in_flush[replica] = 0;
                let repaired = self.being_repaired(replica);
                self.ledger.unsound[replica] &=
                    self.ledger.excused[replica] | self.ledger.written[replica] | repaired;
                self.note_older();
            }
            (OperationType::Read, true) if reply.part => {
                self.ledger.parts_failed[replica] &= !reply.sectors;
            }
            (_, true) => {}
            (OperationType::Write, false) => {
                if reply.write.is_none() && reply.preferred.is_none() {
                    let has_failed = reply.failures != self.ledger.failures[replica];
                    self.note_not_recovered(replica, reply.sectors, has_failed);
                }
            }
            (OperationType::Read, false) => {
                let sectors = reply.sectors;
                // A longer range must be read again in smaller parts.
                let is_block = u64::from(sectors.count_ones()) <= self.plan.block_sectors;
                for pending in &mut self.pending {
                    pending.seen.failed[replica] |= sectors;
                    if is_block {
                        pending.seen.excused[replica] |= sectors;
                    }
                }
                if reply.part {
                    self.ledger.parts_failed[replica] |= sectors;
                    if is_block && reply.evictions == self.ledger.evictions[replica] {
                        self.ledger.parts_unreported[replica] |= sectors;
                    }
                }
            }
            (OperationType::Flush, false) => {
                self.loss_reported(replica, reply.lost);
                self.note_older();
            }
        }
        // What cannot be read is reported when all parts of the range have been read.
        let errno = reply.result.err().filter(|_| !reply.part);
        errno.map(|errno| ExpectedReport {
            replica: ReplicaIndex(u8::try_from(replica).expect("few")),
            required: reply.evictions == self.ledger.evictions[replica],
            operation: reply.operation,
            errno,
        })
    }

    /// The engine receives an error that reports the loss of these sectors. From now on it must not
    /// trust what the replica was asked before.
    fn loss_reported(&mut self, replica: usize, sectors: u64) {
        self.note_not_durable(replica);
        self.replicas[replica].reported(sectors);
        self.ledger.dropped[replica] &= !sectors;
        self.note_failure(replica);
        // What a read saw before the guest wrote there is trusted by one that does not know yet.
        let seen = self.pending.iter();
        let seen = seen.fold(0, |all, pending| all | pending.seen.dropped[replica]);
        if let Some(before) = &mut self.before_reply {
            before.dropped[replica] |= seen;
        }
        // What a read returns whose answer waits for the records is decided (R7), unless its vote
        // is taken again.
        for pending in self.pending.iter_mut().filter(|pending| !pending.withheld) {
            pending.seen.dropped[replica] = self.ledger.dropped[replica];
        }
        let written = self.ledger.written[replica] | self.ledger.in_flush[replica];
        self.mark_excused(replica, written | self.writing());
        // A flush fails if too few replicas have done it.
        for pending in &mut self.pending {
            if matches!(pending.kind, PendingKind::Flush) {
                pending.seen.excused[replica] |= self.replicas[replica].all();
            }
        }
    }

    /// The sectors of the repairs that the replica has in flight.
    fn being_repaired(&self, replica: usize) -> u64 {
        let repairs = self.flights.iter();
        let repairs = repairs.filter(|flight| flight.replica() == replica && flight.is_repair());
        let ranges = repairs.filter_map(Flight::range);
        ranges.fold(0, |all, range| all | self.plan.mask(range))
    }

    /// W7: with this copy t replicas are fresh. One that may have lost a write there, and is not
    /// written to now, votes no more.
    fn note_settled(&mut self, replica: usize, sectors: u64) {
        let excused = self.ledger.excused;
        let fresh = |sector: usize| {
            let fresh = self.members().filter(|r| excused[*r] >> sector & 1 == 0);
            fresh.count()
        };
        let is_last = |sector: &usize| {
            let Thresholds { least, most } = self.thresholds;
            excused[replica] >> sector & 1 == 1 && (least..=most).contains(&(fresh(*sector) + 1))
        };
        let settled = bits(sectors)
            .filter(is_last)
            .fold(0, |mask, sector| mask | 1 << sector);
        for other in self.members().filter(|other| *other != replica) {
            let left = excused[other] & !self.being_repaired(other);
            self.ledger.unsound[other] |= settled & left;
        }
    }

    /// W7: what a replica may have lost is older there than what t others have made durable. If it
    /// has not confirmed a flush that they have, that holds whatever was written since.
    fn note_older(&mut self) {
        let durable_without = |lacks: &dyn Fn(usize) -> u64| {
            let lacks: Vec<u64> = self.members().map(lacks).collect();
            let is_durable = |sector: &usize| {
                let durable = lacks.iter().filter(|lacks| *lacks >> sector & 1 == 0);
                durable.count() >= self.thresholds.least
            };
            let durable = (0..self.changed_at.len()).filter(is_durable);
            durable.fold(0, |mask, sector| mask | 1 << sector)
        };
        let ledger = &self.ledger;
        let lacks = |r: usize| ledger.excused[r] | ledger.in_flush[r];
        let flushed = durable_without(&lacks);
        let durable = durable_without(&|r| lacks(r) | ledger.written[r]);
        for replica in self.members() {
            let older = durable | flushed & self.ledger.in_flush[replica];
            self.ledger.unsound[replica] |= self.ledger.excused[replica] & older;
        }
    }

    /// The sectors of the guest's writes in flight.
    fn writing(&self) -> u64 {
        let writing = self.pending.iter().map(|pending| match pending.kind {
            PendingKind::Write(_) => self.plan.mask(pending.range),
            PendingKind::Read | PendingKind::Flush => 0,
        });
        writing.fold(self.being_preferred(), |all, sectors| all | sectors)
    }

    /// A lock that another worker has released is granted.
    pub(super) fn grant(&mut self, worker: WorkerIndex, request: RequestId) -> Checked {
        trace!(
            self,
            "worker {}: request {} has its lock", worker.0, request.0
        );
        self.input(usize::from(worker.0), None, |engine, effects| {
            engine.granted(request, effects);
        })
    }

    /// One of the workers that are due looks at the clock.
    pub(super) fn tick(&mut self, due: u32) -> Checked {
        let worker = self.random.bit(u64::from(due));
        self.tick_wanted &= !(1 << worker);
        let (excused, evicted) = (self.ledger.excused, self.ledger.evicted);
        self.note_look(worker as usize);
        let needed = self.overdue_and_needed(worker as usize);
        self.input(worker as usize, None, |engine, effects| {
            engine.tick(effects);
        })?;
        self.check_overdue(worker as usize, &excused, evicted, needed)
    }

    /// Carries out and checks the first `count` effects of those that an engine asks for.
    pub(super) fn carry_out(
        &mut self,
        collected: &mut Collected,
        count: usize,
        input: &mut InputChecks,
    ) -> Checked {
        self.input_from = input.worker;
        self.check_ended_writes()?;
        for effect in collected.effects.drain(..count) {
            match effect {
                Effect::Submit(operation) => self.start_operation(operation)?,
                Effect::Complete(tag, Ok(count)) => {
                    let of_this = &collected.values[input.values_used..input.values_used + count];
                    input.values_used += count;
                    if self.is_answered_done(tag)? {
                        self.completed(tag, Ok(of_this))?;
                    }
                }
                Effect::Complete(tag, Err(failed)) => {
                    input.failures -= 1;
                    self.statistics.failed += 1;
                    if self.is_answered_failed(tag, failed)? {
                        self.completed(tag, Err(()))?;
                    }
                }
                Effect::Written(tag) => self.note_mark(tag),
                Effect::Report(report) => {
                    self.check_report(&report, &mut input.expected, &mut input.failures)?;
                }
                Effect::Wake(worker, request) => self.wakes.push((worker, request)),
                Effect::HealthChanged => self.tick_wanted = (1 << self.plan.workers) - 1,
                Effect::JobChanged(event) => self.job_reported(event)?,
                Effect::Released(replica) => self.released(replica)?,
                Effect::PreferenceBegins(replica, blocks, run) => {
                    self.preference_begins(replica, blocks, run)?;
                }
                Effect::PreferenceEnds(blocks, holders, success) => {
                    self.preference_ends(blocks, holders, success)?;
                }
                Effect::Equal(replica, range) => self.found_equal(replica.as_usize(), range)?,
                Effect::ContentsDiffer(_) => {
                    return Err(Violation::new("blkverify", "the disk has no --blkverify"));
                }
            }
        }
        Ok(())
    }

    /// All effects of an input are carried out.
    pub(super) fn check_input(input: &InputChecks) -> Checked {
        if let Some(expected) = input.expected.filter(|expected| expected.required) {
            let text = format!("an error was not reported: {expected:?}");
            return Err(Violation::new("R4", text));
        }
        // A scrub reports undecided sectors too.
        let failures = input.failures;
        if failures < 0 || (failures > 0 && !input.scrubbing) {
            let text = format!("{failures} QUORUM_FAILUREs more than failed requests");
            return Err(Violation::new("R3", text));
        }
        Ok(())
    }

    /// Notes which replicas were evicted or have rejoined.
    pub(super) fn note_evictions(&mut self) {
        let in_service = self.shared.in_service();
        for replica in self.members() {
            let index = ReplicaIndex(u8::try_from(replica).expect("few"));
            let evicted = !in_service.contains(index);
            if evicted == self.is_evicted(replica) {
                continue;
            }
            self.ledger.evicted ^= 1 << replica;
            if evicted {
                trace!(self, "replica {replica} is evicted");
                self.statistics.evictions += 1;
                self.evicted_at[replica].push(self.clock);
                self.note_failure(replica);
                self.ledger.evictions[replica] += 1;
                self.ledger.any = true;
                self.mark_excused(replica, self.replicas[replica].all());
                self.note_not_durable(replica);
                self.ledger.unsound[replica] |= self.writing();
                self.note_unrepaired(replica);
                self.ledger.parts_unreported[replica] = 0;
            } else {
                trace!(self, "replica {replica} rejoins");
            }
        }
    }

    /// The replica is evicted: what was being repaired on it is still to be repaired.
    fn note_unrepaired(&mut self, replica: usize) {
        for flight in &self.flights {
            if flight.replica() == replica && flight.is_repair() {
                let sectors = flight.range().map_or(0, |range| self.plan.mask(range));
                self.ledger.unrepaired[replica] |= sectors;
            }
        }
    }
}
