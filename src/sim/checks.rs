//! The rules of the contract, checked against the model and the ledger of faults.
//!
//! A check demands only what the contract promises under the faults of the run: while fewer than t
//! replicas may be wrong about a sector its data must be right, while t are right a read must
//! succeed, and every report must have a cause.

use super::Violation;
use super::effects::number_of;
use super::model::Value;
use super::pending::{Pending, PendingKind, PendingWrite};
use super::plan::bits;
use super::state::{Checked, World, trace};
use super::threshold::Thresholds;
use crate::common::SectorRange;
use crate::engine::{ReadPattern, Tag};

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
            (kind, Err(())) if self.fails_for_a_record(kind) => {
                self.check_refusal()?;
                if let PendingKind::Write(write) = kind {
                    for sector in bits(self.plan.mask(pending.range)) {
                        let value = Value::written(write.number, sector);
                        let (now, durable) = (self.now, write.durable);
                        self.model.write_ended(sector, value, now, false, durable);
                        self.changed_at[sector] = now;
                    }
                    self.note_refused_write(&pending, write);
                }
                if let PendingKind::Flush = kind {
                    self.note_failed_flush(&pending);
                }
            }
            (PendingKind::Read, Err(())) if pending.withheld => self.check_refusal()?,
            (PendingKind::Read, Err(())) => self.check_failed_read(&pending)?,
            (PendingKind::Write(write), _) => self.check_write(&pending, write, result.is_ok())?,
            (PendingKind::Flush, Ok(_)) => {
                if !pending.withheld {
                    self.check_flush(&pending)?;
                }
                self.note_flush(&pending);
            }
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
            // vote with t = 1, or a recovery (S5), and was copied.
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
        // A replica may have failed it before.
        let sectors = self.plan.mask(read.range);
        let has_failed = |r: usize| read.seen.failed[r] & sectors != 0;
        if self.faults_ended && !self.members().any(has_failed) && self.must_be_readable(sectors) {
            let text = format!(
                "read {} failed, and all copies are equal",
                number_of(read.tag)
            );
            return Err(Violation::new("W7", text).at(sectors));
        }
        // Whether a vote may have been settled in vain twice, because of the same replica.
        let failed_twice = |r: usize| self.ledger.failures[r] >= read.seen.failures[r] + 2;
        let excused = self.members().map(|r| read.seen.excused[r]);
        let settled = excused.fold(read.seen.mixed, |all, excused| all | excused) & sectors != 0;
        let in_vain = settled && self.members().any(failed_twice);
        if bits(sectors).all(enough) && !in_vain {
            let text = format!(
                "read {} failed, but enough replicas have good copies",
                number_of(read.tag)
            );
            return Err(Violation::new("I8", text).at(sectors));
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
            _ if pending.withheld && success => Ok(()),
            (true, false) if pending.withheld || self.fails_for_a_record(&pending.kind) => {
                self.check_refusal()
            }
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
        if write.submitted_to == 0 && !success {
            return self.check_refusal();
        }
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

    /// Reads that have waited for the records, and whose vote is taken again.
    pub(super) fn note_votes_again(&mut self) {
        for read in self.pending.iter_mut().filter(|read| read.withheld) {
            let is_read = matches!(read.kind, PendingKind::Read);
            let mut engines = self.engines.iter();
            read.withheld = !is_read || engines.any(|engine| engine.withholds(read.tag));
            if !read.withheld {
                read.seen.dropped = self.ledger.dropped;
            }
        }
    }

    /// The durable writes that the replicas have written, and that wait for a flush now; and the
    /// requests that have succeeded, and whose answers wait for the records.
    pub(super) fn check_ended_writes(&mut self) -> Checked {
        let engine = &self.engines[self.input_from];
        let ends = |pending: &Pending| {
            let is_written = match &pending.kind {
                PendingKind::Write(write) => {
                    write.durable && !write.ended && engine.waits_for_flush(pending.tag)
                }
                PendingKind::Read | PendingKind::Flush => false,
            };
            is_written || (!pending.withheld && engine.withholds(pending.tag))
        };
        let Some(index) = self.pending.iter().position(ends) else {
            return Ok(());
        };
        let withheld = engine.withholds(self.pending[index].tag);
        let mut pending = self.pending.swap_remove(index);
        pending.withheld |= withheld;
        let mut just_written = false;
        if let PendingKind::Write(write) = &mut pending.kind {
            just_written = !std::mem::replace(&mut write.ended, true);
        }
        match &pending.kind {
            PendingKind::Write(write) => {
                if just_written {
                    self.check_quorum(&pending, write, true)?;
                    self.note_written(pending.range, write, true);
                }
                if withheld && write.durable {
                    self.check_durable_write(&pending, write)?;
                }
            }
            PendingKind::Flush => self.check_flush(&pending)?,
            PendingKind::Read => {}
        }
        self.pending.push(pending);
        self.check_ended_writes()
    }

    /// Whether a request may have failed because a record cannot be written: it was not begun, or
    /// nothing is known of what two workers did at the same time.
    pub(super) fn fails_for_a_record(&self, kind: &PendingKind) -> bool {
        let unbegun = matches!(kind, PendingKind::Write(write) if write.submitted_to == 0);
        self.records.failures > 0 && (unbegun || self.overlapped)
    }

    /// A write fails for a record. The replicas have written it, if it was begun.
    pub(super) fn note_refused_write(&mut self, pending: &Pending, write: &PendingWrite) {
        if write.submitted_to != 0 && !write.ended {
            // One that was evicted in between need not count.
            let written = write.succeeded & self.unfailed(write);
            let written = usize::try_from(written.count_ones()).expect("few");
            let success = written >= self.thresholds.least;
            self.note_written(pending.range, write, success);
        }
    }

    /// S2, S4: a request fails, or was not begun, because a record cannot be written.
    pub(super) fn check_refusal(&self) -> Checked {
        if self.plan.records && self.records.failures > 0 {
            return Ok(());
        }
        let text = "a request fails for its record, and no record has failed";
        Err(Violation::new("S2", text))
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
            self.recovering &= !sectors;
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
