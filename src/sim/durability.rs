//! W5: what is durable when a flush or a durable write is answered, and when it may fail.

use super::Violation;
use super::effects::number_of;
use super::model::Value;
use super::pending::{Pending, PendingWrite};
use super::plan::bits;
use super::state::{Checked, World};

impl World {
    /// W5: the guest has no write cache, so a write that succeeds is durable on t replicas.
    pub(super) fn check_durable_write(&self, pending: &Pending, write: &PendingWrite) -> Checked {
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
    pub(super) fn check_failed_durable_write(
        &self,
        pending: &Pending,
        write: &PendingWrite,
    ) -> Checked {
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
    pub(super) fn check_flush(&mut self, flush: &Pending) -> Checked {
        let lost = match self.ledger.lost_written_at < flush.began {
            true => self.ledger.at_risk,
            false => self.ledger.lost_by_crash,
        };
        let overruled = self.ledger.overruled | lost;
        for sector in (0..self.changed_at.len()).filter(|s| overruled >> s & 1 == 0) {
            let safe = |r: &usize| {
                let lied = self.ledger.corrupt[*r] | self.ledger.falsely_durable[*r];
                let lied = lied | self.changed_while_missing(*r);
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
        Ok(())
    }

    /// What the engines cannot know of a replica that is missing: its image was modified, or an old
    /// copy put back. It counts for what it has not missed.
    fn changed_while_missing(&self, replica: usize) -> u64 {
        match (self.missing & self.records.put_back) >> replica & 1 {
            1 => !self.ledger.unsound[replica],
            _ => 0,
        }
    }

    /// The guest knows that a flush has succeeded.
    pub(super) fn note_flush(&mut self, flush: &Pending) {
        if self.ledger.lost_written_at < flush.began {
            self.ledger.lost_by_crash &= self.ledger.at_risk;
        }
        let oldest = self.oldest();
        self.model.flushed(flush.began, oldest);
    }

    /// W5: a flush fails only if some sector may not be durable on t replicas, or if the guest must
    /// know of an earlier failure. Not because of what was given up (W11).
    pub(super) fn check_failed_flush(&mut self, flush: &Pending) -> Checked {
        let given_up = self.ledger.given_up;
        let needed = |sectors| (0..sectors).filter(move |s| given_up >> s & 1 == 0);
        let enough = |sector: usize| {
            let good = |replica: &usize| flush.seen.excused[*replica] >> sector & 1 == 0;
            self.members().filter(good).count() >= flush.thresholds.most
        };
        let owed = self.ledger.lacking_at;
        let waited = self.ledger.told_at.is_some_and(|told| flush.began < told);
        // What the disk has grown by since then may fail a flush that begins later. It is not what
        // the guest has asked for.
        let any_needed = needed(flush.disk_sectors).next().is_some();
        let mut all_needed = needed(self.changed_at.len());
        if any_needed
            && !flush.withheld
            && owed.is_none()
            && !waited
            && self.owed == [false; 2]
            && all_needed.all(enough)
        {
            let text = format!("flush {} failed without need", number_of(flush.tag));
            return Err(Violation::new("W5", text));
        }
        if self.must_flush
            && !flush.withheld
            && self.must_be_readable(self.plan.mask(self.plan.disk()))
        {
            let text = format!(
                "flush {} failed, and all copies are equal",
                number_of(flush.tag)
            );
            return Err(Violation::new("W7", text));
        }
        self.note_failed_flush(flush);
        Ok(())
    }

    /// The guest knows that a flush has failed.
    pub(super) fn note_failed_flush(&mut self, flush: &Pending) {
        if !flush.withheld {
            self.ledger.told_at = Some(self.now);
        }
        let owed = self.ledger.lacking_at;
        if owed.is_some_and(|owed| owed <= flush.began) {
            self.ledger.lacking_at = None;
        }
        self.model.flush_failed(flush.began);
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
