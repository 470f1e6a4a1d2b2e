//! The invariants of the contract, checked against the model and the ledger of faults.
//!
//! A check demands only what the contract promises under the faults of the run: as long as fewer
//! than t replicas may be wrong about a sector its data must be right, as long as t are right a
//! read must succeed, and whatever is reported must have a cause.

use super::Violation;
use super::model::Value;
use super::operations::Flight;
use super::plan::{bits, mask_below};
use super::world::{Checked, Pending, PendingKind, PendingWrite, World, trace};
use crate::common::operation::OperationType;
use crate::common::report::{Cause, Report};
use crate::common::{Errno, ReplicaIndex};
use crate::engine::{ReadPattern, Tag};

/// An error that was fed to an engine, and must be reported once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ToldError {
    pub(super) replica: ReplicaIndex,
    pub(super) operation: OperationType,
    pub(super) errno: Errno,
    /// Unless the replica has left the set since it was asked.
    pub(super) must_be_reported: bool,
}

/// What a replica is reported with that leaves the set.
const TIMED_OUT: Errno = Errno(110);

impl World {
    /// A request was answered.
    pub(super) fn completed(&mut self, tag: Tag, result: Result<&[Option<Value>], ()>) -> Checked {
        self.now += 1;
        let Some(index) = self.pending.iter().position(|p| p.tag == tag) else {
            return Err(Violation::new(
                "I6",
                format!("request {} is answered, but not pending", tag.0),
            ));
        };
        let pending = self.pending.swap_remove(index);
        trace!(self, "guest: {} {}", tag.0, show(result));
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

    /// I1: the data of a read.
    fn check_read(&mut self, read: &Pending, values: &[Option<Value>]) -> Checked {
        let sectors = self.plan.mask(read.range);
        if values.len() as u64 != read.range.count {
            return Err(Violation::new(
                "I1",
                "not as many sectors as were asked for",
            ));
        }
        for (sector, value) in bits(sectors).zip(values) {
            let Some(value) = *value else {
                return Err(Violation::new(
                    "I1",
                    format!("{sector} is put together of two versions"),
                ));
            };
            self.check_value(read, sector, value)?;
        }
        Ok(())
    }

    fn check_value(&mut self, read: &Pending, sector: usize, value: Value) -> Checked {
        // All that were ever asked since the start.
        let (n, t) = (self.ever, self.plan.threshold);
        let wrong = read.seen.wrong_at(sector);
        let fifo = self.plan.read_pattern == ReadPattern::Fifo;
        if !self.model.is_permitted(sector, value, read.began) {
            // Each rotten value is unique, so that no two replicas can have it.
            let outvoted = if fifo {
                wrong == 0
            } else {
                wrong < t || (value.is_rotten() && t > 1)
            };
            if outvoted {
                let permitted: Vec<_> = self
                    .model
                    .permitted(sector)
                    .map(|v| v.to_string())
                    .collect();
                let text = format!("{sector} was read as {value}; permitted are {permitted:?}");
                return Err(Violation::new("I1", text));
            }
            return Ok(());
        }
        // Two quorums have an honest replica in common, which does not go back; or nothing ever
        // went wrong.
        let judge = if fifo || 2 * t <= n {
            !self.ledger.any && self.ledger.mixed == 0 && !self.crashed
        } else {
            2 * t - n > wrong
        };
        if !judge {
            return Ok(());
        }
        let observed = self.model.observe(sector, value, read.began, self.now);
        observed.map_err(|other| {
            let text = format!("{sector} was read as {value}, but {other} has come between");
            Violation::new("I1", text)
        })
    }

    /// I1: a read does not fail while t replicas (`fifo`: one) give right answers.
    fn check_failed_read(&mut self, read: &Pending) -> Checked {
        let fifo = self.plan.read_pattern == ReadPattern::Fifo;
        let needed = if fifo { 1 } else { self.plan.threshold };
        let enough = |sector: usize| {
            let right = read.seen.right_at(sector, self.members);
            if usize::try_from(right.count_ones()).expect("few") < needed {
                return false;
            }
            if fifo || read.seen.mixed >> sector & 1 == 0 {
                return true;
            }
            // A failed write or a crash left versions: t must hold the same one, and nothing has
            // moved.
            let votes = |r: usize| {
                let value = self.replicas[r].value(sector);
                let same =
                    |o: &usize| right >> o & 1 == 1 && self.replicas[*o].value(sector) == value;
                self.members().filter(same).count()
            };
            self.stirred[sector] < read.began
                && self.is_still(sector)
                && bits(u64::from(right)).any(|r| votes(r) >= needed)
        };
        if bits(self.plan.mask(read.range)).all(enough) {
            let text = format!(
                "read {} failed, but enough replicas give right answers",
                read.tag.0
            );
            return Err(Violation::new("I1", text));
        }
        Ok(())
    }

    /// No guest write of the sector is in flight.
    fn is_still(&self, sector: usize) -> bool {
        !self.pending.iter().any(|p| {
            matches!(p.kind, PendingKind::Write(_)) && self.plan.mask(p.range) >> sector & 1 == 1
        })
    }

    /// W3, and what the write leaves behind.
    fn check_write(&mut self, pending: &Pending, write: &PendingWrite, success: bool) -> Checked {
        let sectors = self.plan.mask(pending.range);
        let now = self.ledger.failures;
        let steady = self.members().filter(|r| now[*r] == write.failures[*r]);
        let steady = steady.fold(0, |mask, r| mask | 1 << r);
        let count = |mask: u32| usize::try_from(mask.count_ones()).expect("few");
        let needed = self.plan.threshold;
        // Of one that has left meanwhile it depends on whether its reply was there before.
        if (success && count(write.succeeded & self.members) < needed)
            || (!success && count(write.succeeded & steady) >= needed)
        {
            let text = format!(
                "w{} on {:b} was answered {success}",
                write.number, write.succeeded
            );
            return Err(Violation::new("W3", text));
        }
        for sector in bits(sectors) {
            let value = Value::written(write.number, sector);
            self.model
                .write_ended(sector, value, self.now, success, self.plan.durable);
            self.stirred[sector] = self.now;
        }
        for replica in self.members() {
            let bit = 1 << replica;
            if write.succeeded & steady & bit != 0 {
                self.ledger.excused[replica] &= !sectors;
            } else if success || write.failed & steady & bit == 0 {
                self.mark_excused(replica, sectors);
            }
        }
        if success {
            self.ledger.mixed &= !sectors;
        } else {
            self.mark_mixed(sectors);
        }
        Ok(())
    }

    /// W5: what was acknowledged before the flush began is durable on t replicas.
    fn check_flush(&mut self, flush: &Pending) -> Checked {
        for sector in 0..self.stirred.len() {
            let safe = |r: &usize| {
                let lied = self.ledger.lied[*r] | self.ledger.lied_durable[*r];
                lied >> sector & 1 == 1
                    || self.model.is_permitted(
                        sector,
                        self.replicas[*r].durable(sector),
                        flush.began,
                    )
            };
            let safe = self.members().filter(safe).count();
            if safe < self.plan.threshold {
                let text = format!(
                    "flush {} succeeded, but {sector} is durable on {safe} only",
                    flush.tag.0
                );
                return Err(Violation::new("W5", text));
            }
        }
        let oldest = self.oldest();
        self.model.flushed(flush.began, oldest);
        Ok(())
    }

    /// A flush fails only if some sector may not be durable on t replicas.
    fn check_failed_flush(&self, flush: &Pending) -> Checked {
        let enough = |sector: usize| {
            let good = |replica: &usize| flush.seen.excused[*replica] >> sector & 1 == 0;
            self.members().filter(good).count() >= self.plan.threshold
        };
        if (0..self.stirred.len()).all(enough) {
            let text = format!("flush {} failed without need", flush.tag.0);
            return Err(Violation::new("W5", text));
        }
        Ok(())
    }

    /// I3, R3, R4: a report has a cause. Counts QUORUM_FAILUREs in `failures`.
    pub(super) fn check_report(
        &mut self,
        report: &Report,
        told: &mut Option<ToldError>,
        failures: &mut i64,
    ) -> Checked {
        trace!(self, "report: {}", show_report(report));
        let (replica, operation, range, cause) = match report {
            Report::Failure { .. } => {
                *failures += 1;
                return Ok(());
            }
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
                    return self.check_departure(replica.as_usize());
                }
                let is_this = |t: &ToldError| {
                    (t.replica, t.operation, t.errno) == (replica, operation, *errno)
                };
                if !told.take().is_some_and(|told| is_this(&told)) {
                    return Err(Violation::new(
                        "I3",
                        "an error is reported that did not come in",
                    ));
                }
            }
            Cause::Corrupt(evidence) => {
                self.statistics.accusations += 1;
                if self.plan.read_pattern == ReadPattern::Fifo && !self.is_scrubbing() {
                    return Err(Violation::new("R8", "read-pattern=fifo outvotes nobody"));
                }
                if evidence.bad_sectors_cut {
                    self.accused |= self.plan.mask(*range);
                }
                for run in &evidence.bad_sectors {
                    self.accused |= mask_below(run.count) << run.start;
                    for sector in bits(mask_below(run.count) << run.start) {
                        self.check_accusation(replica.as_usize(), sector)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// W6: a replica leaves the set if it owes a reply for too long, and if t remain.
    fn check_departure(&self, replica: usize) -> Checked {
        let limit = self.clock.saturating_sub(self.plan.replica_timeout);
        let owes = |f: &Flight| f.replica() == replica && f.submitted_at() <= limit;
        if !self.is_out(replica) || !self.flights.iter().any(owes) {
            return Err(Violation::new(
                "W6",
                format!("replica {replica} is not overdue"),
            ));
        }
        let out = (self.ledger.out & self.members).count_ones();
        if self.count() - usize::try_from(out).expect("few") < self.plan.threshold {
            return Err(Violation::new("W6", "fewer than t replicas are left"));
        }
        Ok(())
    }

    fn check_accusation(&mut self, replica: usize, sector: usize) -> Checked {
        let now = self.ledger.seen();
        if (now.wrong[replica] | now.mixed) >> sector & 1 == 1 {
            return Ok(());
        }
        if now.wrong_at(sector) >= self.plan.threshold {
            // The liars have won; right bytes may be replaced now.
            self.mark_mixed(1 << sector);
            return Ok(());
        }
        let text = format!(
            "replica {replica} is accused of a wrong sector {sector}, and nothing explains it"
        );
        Err(Violation::new("I3", text))
    }

    /// I4: nothing is in flight, and the replicas are equal where no fault explains a difference.
    pub(super) fn check_quiet(&self) -> Checked {
        for sector in 0..self.stirred.len() {
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
                    let text = format!(
                        "all is quiet, and {sector} is {expected} on replica {other}, {value} on {replica}"
                    );
                    return Err(Violation::new("I4", text));
                }
            }
        }
        Ok(())
    }

    /// R6: everything was read without faults, so that whoever is in service holds what the vote
    /// found.
    pub(super) fn check_rewritten(&self) -> Checked {
        if !self.plan.rewrite_corrupted || self.plan.read_pattern != ReadPattern::Quorum {
            return Ok(());
        }
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        for part in self.parts() {
            let sectors = self.plan.mask(part);
            // Who is behind in some of it was perhaps not asked.
            let mut voters: Vec<usize> = self.members().collect();
            voters.retain(|r| self.ledger.excused[*r] & sectors == 0);
            let value = |r: &usize, s: usize| self.replicas[*r].value(s);
            let votes =
                |r: &usize, s: usize| voters.iter().filter(|o| value(o, s) == value(r, s)).count();
            for sector in bits(sectors) {
                let start = sector - sector % block;
                let has_winner = |s| voters.iter().any(|r| votes(r, s) >= self.plan.threshold);
                // A block with a sector that nobody knows cannot be written.
                let decided = (start..start + block).all(has_winner);
                if decided && voters.iter().any(|r| votes(r, sector) != voters.len()) {
                    let text = format!("{sector} was voted on, and a loser not rewritten");
                    return Err(Violation::new("R6", text));
                }
            }
        }
        Ok(())
    }

    /// W6: after a rest without faults all replicas are in service, and none is behind where t know
    /// better.
    pub(super) fn check_resynced(&self) -> Checked {
        let out = self.ledger.out & self.members;
        if out != 0 || self.leaving != 0 {
            let text = format!("{out:b} did not come back, {:b} not go", self.leaving);
            return Err(Violation::new("W6", text));
        }
        let t = self.plan.threshold;
        let seen = self.ledger.seen();
        let clean = |sector: usize| {
            seen.mixed >> sector & 1 == 0
                && seen.wrong_at(sector) == 0
                && usize::try_from(seen.right_at(sector, self.members).count_ones()).expect("few")
                    >= t
        };
        let block = usize::try_from(self.plan.block_sectors).expect("few");
        for sector in 0..self.stirred.len() {
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
                return Err(Violation::new("W6", text));
            }
        }
        Ok(())
    }

    /// Everything was written and flushed without faults: all replicas hold the same, durably.
    pub(super) fn check_healed(&self) -> Checked {
        for sector in 0..self.stirred.len() {
            for replica in self.members() {
                let value = self.replicas[replica].durable(sector);
                if !self.model.is_permitted(sector, value, self.now) {
                    return Err(Violation::new(
                        "W5",
                        format!("{sector} was flushed, and is {value}"),
                    ));
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
