//! The rules of the contract, checked against the model and the ledger of faults.
//!
//! A check demands only what the contract promises under the faults of the run: while fewer than t
//! replicas may be wrong about a sector its data must be right, while t are right a read must
//! succeed, and every report must have a cause.

use super::Violation;
use super::effects::number_of;
use super::ledger::Seen;
use super::model::Value;
use super::pending::{Pending, PendingKind, PendingWrite};
use super::plan::{bits, mask_below, widen};
use super::state::{Checked, ExpectedReport, World, trace};
use super::threshold::Thresholds;
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Report};
use crate::common::{Errno, ReplicaIndex, SectorRange};
use crate::engine::{ReadPattern, Tag};

/// The error in the report of an eviction.
const TIMED_OUT: Errno = Errno(110);

impl World {
    /// An engine answers a request.
    pub(super) fn completed(&mut self, tag: Tag, result: Result<&[Option<Value>], ()>) -> Checked {
        self.now += 1;
        let Some(index) = self.pending.iter().position(|p| p.tag == tag) else {
            let text = format!("request {} is answered, but not in flight", number_of(tag));
            return Err(Violation::new("I6", text));
        };
        let pending = self.pending.swap_remove(index);
        let number = number_of(tag);
        trace!(self, at self.plan.mask(pending.range), "guest: {number} {}", show(result));
        match (&pending.kind, result) {
            (PendingKind::Read, Ok(values)) => self.check_read(&pending, values)?,
            (PendingKind::Read, Err(())) => self.check_failed_read(&pending)?,
            (PendingKind::Write(write), _) => self.check_write(&pending, write, result.is_ok())?,
            (PendingKind::Flush, Ok(_)) => self.check_flush(&pending)?,
            (PendingKind::Flush, Err(())) => self.check_failed_flush(&pending)?,
        }
        let oldest = self.oldest();
        self.model.forget(oldest);
        Ok(())
    }

    /// I1: the data that a read returns.
    fn check_read(&mut self, read: &Pending, values: &[Option<Value>]) -> Checked {
        let sectors = self.plan.mask(read.range);
        if values.len() as u64 != read.range.count {
            let text = format!("{} sectors of {}", values.len(), read.range.count);
            return Err(Violation::new("I1", text).at(sectors));
        }
        for (sector, value) in bits(sectors).zip(values) {
            let Some(value) = *value else {
                let text = format!("{sector} is put together of two versions");
                return Err(Violation::new("I1", text).at(1 << sector));
            };
            self.check_value(read, sector, value)?;
        }
        Ok(())
    }

    /// I1: one sector that a read returns.
    fn check_value(&mut self, read: &Pending, sector: usize, value: Value) -> Checked {
        // All replicas that may have been asked since the start of the daemon.
        let (n, t) = (self.members_ever, read.thresholds.least);
        let wrong = self.with_lost_pages(read.seen).wrong_at(sector);
        let fifo = self.plan.read_pattern == ReadPattern::Fifo;
        if !self.model.is_permitted(sector, value, read.began) {
            // R7: most of those that may vote agree on a winner, and most of all are right. A
            // replica that is stale in some of the range does not vote in all of it.
            let sectors = self.plan.mask(read.range);
            let right = bits(u64::from(read.seen.right_at(sectors, self.members)));
            let right = right
                .filter(|r| read.seen.failed[*r] & sectors == 0)
                .count();
            let majority = right > n - right && read.seen.mixed >> sector & 1 == 0;
            // Each rotten value is unique, so that no two replicas have it, unless it has won a
            // vote with t = 1 and was copied.
            let outvoted = if fifo {
                wrong == 0
            } else {
                wrong < t || (value.is_rotten() && !self.one_has_decided) || majority
            };
            if outvoted {
                let permitted: Vec<_> = self
                    .model
                    .permitted(sector)
                    .map(|v| v.to_string())
                    .collect();
                let text = format!("{sector} was read as {value}; permitted are {permitted:?}");
                return Err(Violation::new("I1", text).at(1 << sector));
            }
            return Ok(());
        }
        // Two quorums have a right replica in common, and it does not go back to older data; or no
        // fault has happened.
        let t = self.least_threshold;
        let ordered = if fifo || 2 * t <= n {
            !self.ledger.any && self.ledger.mixed == 0 && !self.crashed
        } else {
            2 * t - n > wrong
        };
        if !ordered {
            return Ok(());
        }
        let observed = self.model.observe(sector, value, read.began, self.now);
        observed.map_err(|other| {
            let text = format!("{sector} was read as {value}, but {other} has come between");
            Violation::new("I1", text).at(1 << sector)
        })
    }

    /// I8: a read does not fail while t replicas (`fifo`: one) have a good copy of each sector.
    pub(super) fn check_failed_read(&mut self, read: &Pending) -> Checked {
        let fifo = self.plan.read_pattern == ReadPattern::Fifo;
        let needed = if fifo { 1 } else { read.thresholds.most };
        let enough = |sector: usize| {
            let right = read.seen.right_at(1 << sector, self.members);
            if usize::try_from(right.count_ones()).expect("few") < needed {
                return false;
            }
            if fifo || read.seen.mixed >> sector & 1 == 0 {
                return true;
            }
            // A failed write or a crash has left versions: t replicas must hold the same one, and
            // it has not changed while the read was in flight.
            let votes = |r: usize| {
                let value = self.replicas[r].value(sector);
                let same =
                    |o: &usize| right >> o & 1 == 1 && self.replicas[*o].value(sector) == value;
                self.members().filter(same).count()
            };
            self.changed_at[sector] < read.began
                && self.no_write_in_flight(sector)
                && bits(u64::from(right)).any(|r| votes(r) >= needed)
        };
        if self.faults_ended && self.must_be_readable(self.plan.mask(read.range)) {
            let text = format!(
                "read {} failed, and all copies are equal",
                number_of(read.tag)
            );
            return Err(Violation::new("W7", text).at(self.plan.mask(read.range)));
        }
        if bits(self.plan.mask(read.range)).all(enough) {
            let text = format!(
                "read {} failed, but enough replicas have good copies",
                number_of(read.tag)
            );
            return Err(Violation::new("I8", text).at(self.plan.mask(read.range)));
        }
        Ok(())
    }

    /// Whether no guest write of the sector is in flight.
    fn no_write_in_flight(&self, sector: usize) -> bool {
        !self.pending.iter().any(|p| {
            matches!(p.kind, PendingKind::Write(_)) && self.plan.mask(p.range) >> sector & 1 == 1
        })
    }

    /// W3, W5: the answer to a write. Notes what it leaves behind.
    fn check_write(&mut self, pending: &Pending, write: &PendingWrite, success: bool) -> Checked {
        let sectors = self.plan.mask(pending.range);
        for sector in bits(sectors) {
            let value = Value::written(write.number, sector);
            self.model
                .write_ended(sector, value, self.now, success, write.durable);
        }
        self.check_attempt(pending, write, success)?;
        match (write.ended, success) {
            (true, true) => self.check_durable_write(pending, write),
            (true, false) => self.check_failed_durable_write(pending, write),
            (false, _) => Ok(()),
        }
    }

    /// W3: what an engine has done for a write, whether the guest is answered or not.
    pub(super) fn check_attempt(
        &mut self,
        pending: &Pending,
        write: &PendingWrite,
        success: bool,
    ) -> Checked {
        let sectors = self.plan.mask(pending.range);
        if !write.ended {
            if success && write.durable {
                let text = format!("w{} was answered before any flush", write.number);
                return Err(Violation::new("W5", text).at(sectors));
            }
            self.check_quorum(pending, write, success)?;
            self.note_written(pending.range, write, success);
        }
        for sector in bits(sectors) {
            self.changed_at[sector] = self.now;
        }
        if success {
            // A flush may have failed on every replica since it was submitted.
            self.note_undone(sectors);
        }
        Ok(())
    }

    /// The durable writes that the replicas have written, and that wait for a flush now.
    pub(super) fn check_ended_writes(&mut self) -> Checked {
        let engine = &self.engines[self.input_from];
        let ends = |pending: &Pending| match &pending.kind {
            PendingKind::Write(write) => {
                write.durable && !write.ended && engine.waits_for_flush(pending.tag)
            }
            PendingKind::Read | PendingKind::Flush => false,
        };
        let Some(index) = self.pending.iter().position(ends) else {
            return Ok(());
        };
        let mut pending = self.pending.swap_remove(index);
        if let PendingKind::Write(write) = &mut pending.kind {
            write.ended = true;
        }
        if let PendingKind::Write(write) = &pending.kind {
            self.check_quorum(&pending, write, true)?;
            self.note_written(pending.range, write, true);
        }
        self.pending.push(pending);
        self.check_ended_writes()
    }

    /// The members that have not failed since the write was submitted.
    pub(super) fn unfailed(&self, write: &PendingWrite) -> u32 {
        let now = self.ledger.failures;
        let unfailed = self.members().filter(|r| now[*r] == write.failures[*r]);
        unfailed.fold(0, |mask, r| mask | 1 << r)
    }

    /// W3: a write succeeds if t replicas have written it.
    fn check_quorum(&self, pending: &Pending, write: &PendingWrite, success: bool) -> Checked {
        let count = |mask: u32| usize::try_from(mask.count_ones()).expect("few");
        let Thresholds { least, most } = self.thresholds;
        // Whether a replica counts that was evicted in between depends on whether its reply came
        // before.
        if (success && count(write.succeeded & self.members) < least)
            || (!success && count(write.succeeded & self.unfailed(write)) >= most)
        {
            let text = format!(
                "w{} on {:b} was answered {success}",
                write.number, write.succeeded
            );
            return Err(Violation::new("W3", text).at(self.plan.mask(pending.range)));
        }
        Ok(())
    }

    /// What a write leaves behind that the replicas have written, or some of them.
    pub(super) fn note_written(&mut self, range: SectorRange, write: &PendingWrite, success: bool) {
        let (sectors, unfailed) = (self.plan.mask(range), self.unfailed(write));
        if success {
            self.ledger.only_copies &= !sectors;
        }
        for replica in self.members() {
            let bit = 1 << replica;
            if success {
                self.ledger.copies[replica] &= !sectors;
            }
            if write.succeeded & bit == 0 {
                self.ledger.unsound[replica] |= sectors;
            }
            if write.succeeded & unfailed & bit != 0 {
                self.ledger.excused[replica] &= !sectors;
                self.staleness.has_written(replica, sectors);
            } else if success || write.failed & unfailed & bit == 0 {
                self.mark_excused(replica, sectors);
                self.staleness.possible[replica] |= sectors;
            }
            self.ledger.written[replica] |= sectors;
        }
        if success {
            for pending in &mut self.pending {
                if let PendingKind::Write(other) = &mut pending.kind {
                    other.preferred &= !sectors;
                }
            }
            self.ledger.mixed &= !sectors;
            self.ledger.accusable &= !sectors;
            self.ledger.overruled &= !sectors;
            self.ledger.given_up &= !sectors;
            self.ledger.at_risk &= !sectors;
            if self.ledger.lost_by_crash & sectors != 0 {
                self.ledger.lost_written_at = self.now;
            }
        } else {
            self.mark_mixed(sectors);
            // Another worker may have held a vote during the same input.
            for replica in self.members() {
                self.staleness.possible[replica] |= sectors & !self.undecided;
            }
        }
    }

    /// W5: the guest has no write cache, so a write that succeeds is durable on t replicas.
    fn check_durable_write(&self, pending: &Pending, write: &PendingWrite) -> Checked {
        if write.preferred != 0 && !self.overlapped {
            let text = format!(
                "w{} was answered, and another version preferred",
                write.number
            );
            return Err(Violation::new("W12", text).at(write.preferred));
        }
        for sector in bits(self.plan.mask(pending.range) & !self.ledger.mixed) {
            let value = Value::written(write.number, sector);
            let is_durable = |replica: usize| {
                let durable = self.replicas[replica].durable(sector);
                // Another write of the guest that ran at the same time may have come later.
                let is_later = write.overlapped >> sector & 1 == 1
                    && self.model.may_follow(sector, durable, value);
                durable == value || is_later
            };
            let safe = |r: &usize| {
                let lied = self.ledger.corrupt[*r] | self.ledger.falsely_durable[*r];
                lied >> sector & 1 == 1 || is_durable(*r)
            };
            let safe = self.members().filter(safe).count();
            if safe < self.thresholds.least {
                let text = format!(
                    "w{} was answered, but {sector} is durable on {safe} only",
                    write.number
                );
                return Err(Violation::new("W5", text).at(1 << sector));
            }
        }
        Ok(())
    }

    /// W5: a write whose flush fails does not fail itself if t replicas have written and flushed
    /// it.
    fn check_failed_durable_write(&self, pending: &Pending, write: &PendingWrite) -> Checked {
        let flushed = write.succeeded & self.unfailed(write);
        let enough = usize::try_from(flushed.count_ones()).expect("few") >= pending.thresholds.most;
        // A replica may have failed another write since.
        let may_be_undone = self.plan.mask(pending.range) & self.ledger.only_copies != 0;
        let is_replaced = write.overlapped | write.preferred != 0;
        if enough && !is_replaced && !may_be_undone {
            let text = format!("w{} is durable on {flushed:b}, and fails", write.number);
            return Err(Violation::new("W5", text).at(self.plan.mask(pending.range)));
        }
        Ok(())
    }

    /// W5: a flush succeeds: what was acknowledged before it began is durable on t replicas. Not
    /// checked where with t ≤ N/2 as many wrong replicas have won a vote.
    fn check_flush(&mut self, flush: &Pending) -> Checked {
        let lost = match self.ledger.lost_written_at < flush.began {
            true => self.ledger.at_risk,
            false => self.ledger.lost_by_crash,
        };
        let overruled = self.ledger.overruled | lost;
        for sector in (0..self.changed_at.len()).filter(|s| overruled >> s & 1 == 0) {
            let safe = |r: &usize| {
                let lied = self.ledger.corrupt[*r] | self.ledger.falsely_durable[*r];
                let durable = self.replicas[*r].durable(sector);
                lied >> sector & 1 == 1 || self.model.may_be_flushed(sector, durable, flush.began)
            };
            let safe = self.members().filter(safe).count();
            if safe < self.thresholds.least {
                let text = format!(
                    "flush {} succeeded, but {sector} is durable on {safe} only",
                    number_of(flush.tag)
                );
                return Err(Violation::new("W5", text).at(1 << sector));
            }
        }
        if self.ledger.lost_written_at < flush.began {
            self.ledger.lost_by_crash &= self.ledger.at_risk;
        }
        let oldest = self.oldest();
        self.model.flushed(flush.began, oldest);
        Ok(())
    }

    /// W5: a flush fails only if some sector may not be durable on t replicas, or if the guest must
    /// know of an earlier failure. Not because of what was given up (W11).
    fn check_failed_flush(&mut self, flush: &Pending) -> Checked {
        let given_up = self.ledger.given_up;
        let mut needed = (0..self.changed_at.len()).filter(|s| given_up >> s & 1 == 0);
        let enough = |sector: usize| {
            let good = |replica: &usize| flush.seen.excused[*replica] >> sector & 1 == 0;
            self.members().filter(good).count() >= flush.thresholds.most
        };
        let owed = self.ledger.lacking_at;
        let any_needed = needed.clone().next().is_some();
        if any_needed && owed.is_none() && self.owed == [false; 2] && needed.all(enough) {
            let text = format!("flush {} failed without need", number_of(flush.tag));
            return Err(Violation::new("W5", text));
        }
        if self.must_flush && self.must_be_readable(self.plan.mask(self.plan.disk())) {
            let text = format!(
                "flush {} failed, and all copies are equal",
                number_of(flush.tag)
            );
            return Err(Violation::new("W7", text));
        }
        if owed.is_some_and(|owed| owed <= flush.began) {
            self.ledger.lacking_at = None;
        }
        self.model.flush_failed(flush.began);
        Ok(())
    }

    /// I3, R3, R4: a report has a cause. `failures` counts the QUORUM_FAILUREs.
    pub(super) fn check_report(
        &mut self,
        report: &Report,
        expected: &mut Option<ExpectedReport>,
        failures: &mut i64,
    ) -> Checked {
        trace!(self, "report: {}", show_report(report));
        let (replica, operation, range, cause) = match report {
            Report::Failure { .. } => {
                *failures += 1;
                return Ok(());
            }
            Report::Evicted(replica) => {
                if self.timed_out >> replica.0 & 1 == 0 {
                    let text = format!("replica {} is evicted without an error", replica.0);
                    return Err(Violation::new("I3", text));
                }
                self.timed_out &= !(1 << replica.0);
                return self.check_eviction(replica.as_usize());
            }
            Report::KeptOut { .. } => return Ok(()),
            Report::RepairLimit { .. } => return self.limit_reported(),
            Report::Rejoined(replica) => return self.check_rejoin(replica.as_usize()),
            Report::Bad {
                replica,
                operation,
                range,
                cause,
            } => (*replica, *operation, range, cause),
        };
        match cause {
            Cause::Error(errno) => {
                if *errno == TIMED_OUT {
                    self.timed_out |= 1 << replica.0;
                    return self.check_eviction(replica.as_usize());
                }
                let is_this = |t: &ExpectedReport| {
                    (t.replica, t.operation, t.errno) == (replica, operation, *errno)
                };
                let is_read = operation == OperationType::Read;
                if expected.as_ref().is_some_and(is_this) {
                    *expected = None;
                } else if !is_read || !self.note_unreadable(replica, *range) {
                    let text = format!("replica {} has not had this error: {errno}", replica.0);
                    return Err(Violation::new("I3", text));
                }
            }
            Cause::Corrupt(evidence) => {
                self.statistics.accusations += 1;
                if self.plan.read_pattern == ReadPattern::Fifo && self.jobs.is_empty() {
                    return Err(Violation::new("R8", "read-pattern=fifo takes no vote"));
                }
                if evidence.bad_sectors_cut {
                    self.accused |= self.plan.mask(*range);
                }
                for run in &evidence.bad_sectors {
                    self.accused |= mask_below(run.count) << run.start;
                    let sectors = mask_below(run.count) << run.start;
                    for sector in bits(sectors) {
                        self.check_accusation(replica.as_usize(), sector)?;
                    }
                    self.ledger.unsound[replica.as_usize()] |=
                        widen(sectors, self.plan.block_sectors);
                }
            }
        }
        Ok(())
    }

    /// Whether the report is of blocks that could not be read by themselves.
    fn note_unreadable(&mut self, replica: ReplicaIndex, range: SectorRange) -> bool {
        let (replica, sectors) = (replica.as_usize(), self.plan.mask(range));
        let is_reported = sectors & !self.ledger.parts_failed[replica] == 0;
        if is_reported {
            self.ledger.parts_failed[replica] &= !sectors;
            self.ledger.parts_unreported[replica] &= !sectors;
        }
        is_reported
    }

    /// A vote may have come before the error that reports a lost page to another worker.
    fn with_lost_pages(&self, mut seen: Seen) -> Seen {
        if self.overlapped {
            for (now, before) in seen.dropped.iter_mut().zip(self.before_input.dropped) {
                *now |= before;
            }
        }
        seen
    }

    /// I3, W7: a replica is reported for a sector only if a fault may have corrupted it; a failed
    /// write has not.
    fn check_accusation(&mut self, replica: usize, sector: usize) -> Checked {
        let now = self.with_lost_pages(self.ledger.seen());
        if (now.wrong(replica) | self.ledger.accusable) >> sector & 1 == 1 {
            return Ok(());
        }
        let wrong = now.wrong_at(sector);
        // More of the fresh ones are wrong than not, and copies in doubt have voted with them.
        let in_doubt = |r: &usize| (now.excused[*r] & !now.wrong(*r)) >> sector & 1 == 1;
        let is_right = |r: &usize| (now.excused[*r] | now.wrong(*r)) >> sector & 1 == 0;
        let right = self.members().filter(is_right).count();
        let supporters = match wrong > right {
            true => self.members().filter(in_doubt).count(),
            false => 0,
        };
        if wrong + supporters >= self.least_threshold {
            // The corrupt replicas have won; a repair may replace right bytes now.
            self.mark_accusable(1 << sector);
            return Ok(());
        }
        let text = format!("replica {replica} is accused, and no fault has made {sector} wrong");
        Err(Violation::new("I3", text).at(1 << sector))
    }

    /// I4: nothing is in flight, and replicas are equal where no fault explains a difference.
    pub(super) fn check_quiet(&self) -> Checked {
        for replica in self.members() {
            let unreported = self.ledger.parts_unreported[replica];
            if unreported != 0 {
                let text = format!("replica {replica}: unreadable blocks were not reported");
                return Err(Violation::new("R4", text).at(unreported));
            }
        }
        for sector in 0..self.changed_at.len() {
            let mut first: Option<(usize, Value)> = None;
            for replica in self.members() {
                let excused =
                    self.ledger.excused[replica] | self.ledger.wrong(replica) | self.ledger.mixed;
                if excused >> sector & 1 == 1 {
                    continue;
                }
                let value = self.replicas[replica].value(sector);
                let (other, expected) = *first.get_or_insert((replica, value));
                if value != expected {
                    let text =
                        format!("{sector} is {expected} on replica {other}, {value} on {replica}");
                    return Err(Violation::new("I4", text).at(1 << sector));
                }
            }
        }
        Ok(())
    }

    /// R6: everything was read without faults, so each replica holds the winner of the vote.
    pub(super) fn check_rewritten(&self) -> Checked {
        let quorum = self.plan.read_pattern == ReadPattern::Quorum;
        if !self.plan.rewrite_corrupted || !quorum || self.leaves_losers() {
            return Ok(());
        }
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        for part in self.parts() {
            let sectors = self.plan.mask(part);
            // A replica that is stale in some of it was perhaps not asked.
            let mut voters: Vec<usize> = self.members().collect();
            voters.retain(|r| self.ledger.excused[*r] & sectors == 0);
            let value = |r: &usize, s: usize| self.replicas[*r].value(s);
            let readable = |r: &usize, s: usize| self.ledger.unreadable[*r] >> s & 1 == 0;
            let votes = |r: &usize, s: usize| {
                let same = |o: &&usize| readable(o, s) && value(o, s) == value(r, s);
                voters.iter().filter(same).count()
            };
            for sector in bits(sectors) {
                let start = sector - sector % block;
                let has_winner = |s| voters.iter().any(|r| votes(r, s) >= self.threshold);
                // A block with an undecided sector cannot be written.
                let decided = (start..start + block).all(has_winner);
                if decided && voters.iter().any(|r| votes(r, sector) != voters.len()) {
                    let text = format!("{sector} was voted on, and a loser not repaired");
                    return Err(Violation::new("R6", text).at(1 << sector));
                }
            }
        }
        Ok(())
    }

    /// W6: after a rest without faults all replicas are in service, and none is stale where t are
    /// right.
    pub(super) fn check_resynced(&self) -> Checked {
        let out = self.ledger.evicted & self.members;
        if out != 0 || self.to_be_released != 0 {
            let text = format!(
                "{out:b} did not rejoin, {:b} were not released",
                self.to_be_released
            );
            return Err(Violation::new("W6", text));
        }
        let t = self.threshold;
        let seen = self.ledger.seen();
        let clean = |sector: usize| {
            seen.mixed >> sector & 1 == 0
                && seen.wrong_at(sector) == 0
                && usize::try_from(seen.right_at(1 << sector, self.members).count_ones())
                    .expect("few")
                    >= t
        };
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        self.check_repaired()?;
        for sector in 0..self.changed_at.len() {
            let start = sector - sector % block;
            if !(start..start + block).all(clean) {
                continue;
            }
            let values = || {
                self.members()
                    .map(|replica| self.replicas[replica].value(sector))
            };
            let first = values().next();
            if let Some(other) = values().find(|value| Some(*value) != first) {
                let text = format!("{sector} is {first:?} on one replica, {other} on another");
                return Err(Violation::new("W6", text).at(1 << sector));
            }
        }
        Ok(())
    }

    /// R6: a replica was evicted while it was being repaired, and has rejoined. If the others are
    /// right it holds what they hold.
    fn check_repaired(&self) -> Checked {
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        for replica in self.members() {
            let right = |sector: usize| {
                let good = |r: &usize| {
                    let unusable = self.ledger.excused[*r] | self.ledger.unreadable[*r];
                    let doubt = self.ledger.wrong(*r) | unusable;
                    *r != replica && (doubt | self.ledger.mixed) >> sector & 1 == 0
                };
                let good = self.members().filter(good).count();
                good >= self.threshold && good + 1 == self.count()
            };
            for sector in bits(self.ledger.unrepaired[replica]) {
                let start = sector - sector % block;
                let value = self.replicas[replica].value(sector);
                let is_right = self.model.is_permitted(sector, value, self.now);
                if (start..start + block).all(right) && !is_right {
                    let text = format!("{sector} was not repaired on replica {replica}");
                    return Err(Violation::new("R6", text).at(1 << sector));
                }
            }
        }
        Ok(())
    }

    /// W5: everything was written and flushed without faults, so all replicas hold it durably.
    pub(super) fn check_durable_everywhere(&self) -> Checked {
        for sector in 0..self.changed_at.len() {
            for replica in self.members() {
                let value = self.replicas[replica].durable(sector);
                if !self.model.is_permitted(sector, value, self.now) {
                    let text = format!("{sector} was flushed, and is {value} on {replica}");
                    return Err(Violation::new("W5", text).at(1 << sector));
                }
            }
        }
        Ok(())
    }
}

fn show(result: Result<&[Option<Value>], ()>) -> String {
    match result {
        Err(()) => "fails".to_string(),
        Ok([]) => "is done".to_string(),
        Ok(values) => {
            let values = values
                .iter()
                .map(|v| v.map_or("mixed".to_string(), |v| v.to_string()));
            format!("returns {}", values.collect::<Vec<_>>().join(" "))
        }
    }
}

fn show_report(report: &Report) -> String {
    match report {
        Report::Failure { operation, .. } => format!("QUORUM_FAILURE {operation:?}"),
        Report::Evicted(replica) => format!("replica {} evicted", replica.0),
        Report::KeptOut { replica, time } => format!("replica {} kept out for {time:?}", replica.0),
        Report::RepairLimit { limit_sectors } => format!("limit of {limit_sectors} reached"),
        Report::Rejoined(replica) => format!("replica {} rejoined", replica.0),
        Report::Bad {
            replica,
            operation,
            cause,
            ..
        } => match cause {
            Cause::Error(errno) => format!(
                "QUORUM_REPORT_BAD {operation:?}: replica {}: {errno}",
                replica.0
            ),
            Cause::Corrupt(evidence) => {
                format!(
                    "QUORUM_REPORT_BAD: replica {} at {:?}",
                    replica.0, evidence.bad_sectors
                )
            }
        },
    }
}
