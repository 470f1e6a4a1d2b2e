//! Faults that strike by themselves: bit rot, failing writeback, replicas that hang, crashes.

use std::time::Duration;

use super::ledger::Masks;
use super::model::Value;
use super::plan::{bits, mask_below, mask_of, widen};
use super::repair_limit::Unasked;
use super::staleness::Staleness;
use super::state::{Checked, World, trace};
use crate::common::ranges::RangeSet;

impl World {
    /// What happens by itself before each step: mostly nothing.
    pub(super) fn inject_faults(&mut self) -> Checked {
        let faults = self.plan.faults;
        let replica = self.random.bit(u64::from(self.members)) as usize;
        let guest_goes_on = self.requests < self.plan.requests && !self.paused;
        if guest_goes_on && self.plan.operator_actions > 0 && self.random.chance(self.plan.operator)
        {
            self.plan.operator_actions -= 1;
            self.act_as_operator()?;
        }
        if self.random.chance(self.plan.writeback) {
            let sectors = self.random.bits() & self.random.bits();
            self.write_back(replica, sectors);
        }
        if self.replicas[replica].lost() != 0 && self.random.chance(1 << 12) {
            self.drop_page(replica);
        }
        if self.random.chance(faults.hang) && !self.hangs(replica) {
            let most = u64::try_from(self.plan.replica_timeout.as_micros()).expect("short") * 4;
            let time = Duration::from_micros(self.random.below(most));
            trace!(self, "replica {replica} hangs for {time:?}");
            self.hung_until[replica] = self.clock + time;
            if self.plan.is_faulty(replica) && self.random.below(3) == 0 {
                self.fail_in_flight(replica);
            }
        }
        if self.plan.dead >> replica & 1 == 1 && self.random.chance(1 << 9) && !self.hangs(replica)
        {
            trace!(self, "replica {replica} stops to answer");
            let long = self.clock + self.plan.replica_timeout * 20;
            self.hung_until[replica] = if self.plan.only_dead_replicas() {
                Duration::MAX
            } else {
                long
            };
        }
        if self.random.chance(faults.crash) {
            let killed = self.random.below(3) == 0;
            // Not covered: what a flush would still have reported of a page that is lost.
            let may_kill = !self.plan.records || self.plan.faulty == 0;
            return self.crash(killed && may_kill);
        }
        if self.random.chance(faults.full) {
            let time = self.plan.step * u32::try_from(1 + self.random.below(60)).expect("few");
            trace!(self, "the file system is full for {time:?}");
            self.full_until = self.clock + time;
        }
        if self.plan.is_faulty(replica) {
            if self.random.chance(faults.rot) {
                self.rot(replica);
            }
            if self.random.chance(faults.unreadable) {
                self.lose_sectors(replica);
            }
            if self.random.chance(faults.writeback_error) {
                self.fail_writeback(replica);
            }
        }
        Ok(())
    }

    /// A sector at rest changes.
    fn rot(&mut self, replica: usize) {
        let sector = self.random.index(self.changed_at.len());
        self.rotten += 1;
        // The file system may lose the extent.
        let becomes_hole = self.plan.asks_for_holes() && self.random.below(3) == 0;
        let zero = Value::written(0, sector);
        let value = match becomes_hole && self.replicas[replica].value(sector) != zero {
            true => zero,
            false => Value::rotten(self.rotten),
        };
        if self.replicas[replica].rot(sector, value) {
            trace!(self, at 1 << sector, "replica {replica}: {sector} rots to {value}");
            self.ledger.any = true;
            self.mark_corrupt(replica, 1 << sector);
        }
    }

    /// A block, or a few, cannot be read any more until they are written, or not even written.
    fn lose_sectors(&mut self, replica: usize) {
        let first = self.random.index(self.changed_at.len());
        let count = self.random.pick(&[1, 1, 1, 2, 4]);
        let sectors = widen(mask_below(count) << first, self.plan.block_sectors);
        let sectors = sectors & self.replicas[replica].all();
        let unwritable = self.random.below(4) == 0;
        trace!(
            self,
            at sectors,
            "replica {replica}: {:?} cannot be read{}",
            bits(sectors).collect::<Vec<_>>(),
            if unwritable { " or written" } else { "" }
        );
        self.ledger.any = true;
        self.mark_unreadable(replica, sectors);
        if unwritable {
            self.ledger.unwritable[replica] |= sectors;
        }
    }

    /// Writeback in the background fails.
    fn fail_writeback(&mut self, replica: usize) {
        let sectors = self.random.bits() & self.replicas[replica].dirty();
        if sectors != 0 {
            trace!(
                self,
                at sectors,
                "replica {replica} fails to write back {:?}",
                bits(sectors).collect::<Vec<_>>()
            );
            self.ledger.any = true;
            self.replicas[replica].lose(sectors, true);
        }
    }

    /// The kernel drops a page that it could not write back.
    fn drop_page(&mut self, replica: usize) {
        let sector = self.random.bit(self.replicas[replica].lost());
        let unreported = self.replicas[replica].drop_page(sector as usize);
        trace!(
            self,
            at 1 << sector,
            "replica {replica} drops the page of {sector}, which is not durable"
        );
        if self.ledger.falsely_durable[replica] >> sector & 1 == 1 {
            // A flush has reported it durable: the engine has no reason to doubt it.
            self.mark_corrupt(replica, 1 << sector);
            self.note_undone(1 << sector);
        } else if unreported {
            self.mark_dropped(replica, 1 << sector);
        }
    }

    /// The host crashes, or the daemon is `killed`: what is in flight, and after a crash also what
    /// is not durable, is there afterwards or not, sector by sector and replica by replica. Then
    /// the daemon starts again, and knows from its records which replicas are stale where.
    fn crash(&mut self, killed: bool) -> Checked {
        trace!(self, "-- {}", if killed { "kill" } else { "crash" });
        match killed {
            true => self.statistics.kills += 1,
            false => self.statistics.crashes += 1,
        }
        for index in 0..self.flights.len() {
            let sectors = self.random.bits();
            self.crash_in_flight(index, sectors);
        }
        // What the records say.
        self.tear_records();
        (self.records.failed, self.records.failures) = (0, 0);
        let start = match self.plan.records {
            true => match self.read_records()? {
                Some(start) => Some(start),
                None => {
                    self.is_lost = true;
                    return Ok(());
                }
            },
            false => None,
        };
        let mut changed = RangeSet::default();
        let remembered = match &start {
            Some(start) => {
                changed = self.unsettled(start);
                self.known_at_start(start)
            }
            None => {
                // Anything may have been changed last.
                changed.insert(self.plan.disk());
                self.shared.remembered()
            }
        };
        (self.to_be_released, self.unsynced) = (0, 0);
        self.jobs.clear();
        self.asked_resyncs.clear();
        for replica in self.members().filter(|_| !killed) {
            let sectors = self.random.bits();
            self.write_back(replica, sectors);
            self.replicas[replica].crash(0);
        }
        let before = std::mem::take(&mut self.ledger);
        self.staleness = Staleness::default();
        self.flights.clear();
        self.chunks = (0, Duration::ZERO);
        self.evicted_at = Default::default();
        self.forget_times();
        self.wakes.clear();
        self.pending.clear();
        self.preferences.clear();
        self.now += 1;
        self.forget_recovered();
        match killed {
            true => self.model.killed(self.now),
            false => self.model.crashed(self.now),
        }
        self.crashed = true;
        self.tick_wanted = 0;
        self.undecided = 0;
        self.unasked = Unasked::default();
        self.ledger.any = before.any;
        self.ledger.unreadable = before.unreadable;
        self.ledger.unwritable = before.unwritable;
        if killed {
            self.ledger.corrupt = before.corrupt;
            self.ledger.dropped = before.dropped;
            self.ledger.falsely_durable = before.falsely_durable;
        }
        (self.ledger.at_risk, self.ledger.lost_by_crash) = (before.at_risk, before.lost_by_crash);
        let mut missed = Masks::default();
        for replica in self.members() {
            let copies = &remembered.copies[replica];
            let [stale, doubtful] =
                [&copies.stale, &copies.doubtful].map(|set| mask_of(set.iter()));
            missed[replica] = stale;
            let stale = stale | doubtful;
            self.ledger.excused[replica] = stale;
            self.ledger.unsound[replica] = stale;
            self.ledger.written[replica] = self.plan.mask(self.plan.disk());
            self.staleness
                .restored(replica, stale, self.plan.mask(self.plan.disk()));
        }
        let marked = mask_of(changed.iter());
        for sector in 0..self.changed_at.len() {
            self.check_after_crash(sector, &before, (&missed, killed), marked)?;
        }

        self.members_ever = self.count();
        // The operator has changed the command line too.
        self.plan.threshold = self.threshold;
        if let Some(start) = &start {
            self.plan.threshold = usize::from(start.record.threshold.votes);
            self.plan.follows = start.record.threshold.follows_majority;
        }
        self.start_engines();
        self.restore(&remembered, &changed, killed)?;
        if let Some(start) = &start {
            self.keep_records(start)?;
        }
        self.compare_first()
    }
}
