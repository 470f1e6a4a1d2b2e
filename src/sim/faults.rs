//! Faults that strike by themselves: bit rot, failing writeback, replicas that hang, crashes.

use std::time::Duration;

use super::Violation;
use super::ledger::{Ledger, count};
use super::model::Value;
use super::plan::{bits, mask_below, widen};
use super::repair_limit::Unasked;
use super::staleness::Staleness;
use super::state::{Checked, World, trace};
use crate::common::ReplicaIndex;

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
            return self.crash();
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

    /// The host crashes: what is in flight or not durable is there afterwards or not, sector by
    /// sector and replica by replica. Then the daemon starts again, with no record of anything.
    fn crash(&mut self) -> Checked {
        trace!(self, "-- crash");
        self.statistics.crashes += 1;
        for index in 0..self.flights.len() {
            let sectors = self.random.bits();
            self.crash_in_flight(index, sectors);
        }
        let stale = |replica: &usize| {
            let index = ReplicaIndex(u8::try_from(*replica).expect("few"));
            self.shared
                .jobs(|_| (), |_, health| health.stale_sectors(index))
                > 0
        };
        let new = bits(u64::from(self.unsynced)).filter(stale);
        let mut unsynced = new.fold(0, |mask, replica| mask | 1 << replica);
        (self.to_be_released, self.unsynced) = (0, 0);
        self.jobs.clear();
        self.asked_resyncs.clear();
        for replica in self.members() {
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
        self.model.crashed(self.now);
        self.crashed = true;
        self.tick_wanted = 0;
        self.undecided = 0;
        self.unasked = Unasked::default();
        self.ledger.any = before.any;
        self.ledger.unreadable = before.unreadable;
        self.ledger.unwritable = before.unwritable;
        (self.ledger.at_risk, self.ledger.lost_by_crash) = (before.at_risk, before.lost_by_crash);
        for sector in 0..self.changed_at.len() {
            let good = self.check_after_crash(sector, &before)?;
            let left = usize::try_from((good & !unsynced).count_ones()).expect("few");
            if left < self.threshold {
                unsynced = 0;
            }
        }
        // The operator does not give a replica that was added and is still stale to the next
        // daemon, which would take it for a good one; unless too few are left without it.
        self.members &= !unsynced;
        self.members_ever = self.count();
        // The operator has changed the command line too.
        self.plan.threshold = self.threshold;
        self.start_engines();
        self.compare_first()
    }

    /// What a sector holds after a crash (I2). Returns the replicas that hold what was flushed, or
    /// later, a mask.
    fn check_after_crash(&mut self, sector: usize, before: &Ledger) -> Result<u32, Violation> {
        let bit = 1 << sector;
        let (mut good, mut versions) = (0_u32, Vec::new());
        for replica in self.members() {
            let value = self.replicas[replica].value(sector);
            let permitted = self.model.is_permitted(sector, value, self.now);
            let excused = (before.corrupt[replica] | before.falsely_durable[replica]) & bit != 0;
            good |= u32::from(permitted || excused) << replica;
            if !permitted {
                self.ledger.corrupt[replica] |= bit;
            } else if !versions.contains(&value) {
                versions.push(value);
            }
        }
        if versions.len() > 1 {
            self.mark_accusable(bit);
        }
        let is_lost = before.lost_by_crash & bit != 0;
        if !is_lost && usize::try_from(good.count_ones()).expect("few") < self.threshold {
            let text = format!("only {good:b} hold what was flushed, or later, of {sector}");
            return Err(Violation::new("I2", text).at(bit));
        }
        let explained = count(&before.corrupt, sector)
            + count(&before.excused, sector)
            + count(&self.ledger.corrupt, sector);
        if versions.len() > 2 && explained == 0 {
            self.statistics.three_versions += 1;
            trace!(
                self,
                at bit,
                "after the crash {sector} has the versions {versions:?}"
            );
        }
        Ok(good)
    }
}
