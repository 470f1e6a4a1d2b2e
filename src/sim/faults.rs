//! What happens to the replicas by itself: writeback, rot, failing writeback, eviction, and the
//! crash.

use super::Violation;
use super::ledger::{Ledger, count};
use super::plan::bits;
use super::world::{Checked, World, trace};

impl World {
    /// The replica may give wrong bytes there from now on.
    pub(super) fn mark_lied(&mut self, replica: usize, sectors: u64) {
        self.ledger.lied[replica] |= sectors;
        self.mark_seen_wrong(replica, sectors);
    }

    fn mark_seen_wrong(&mut self, replica: usize, sectors: u64) {
        for pending in &mut self.pending {
            pending.seen.wrong[replica] |= sectors;
        }
    }

    /// The engine need not count on the replica there from now on.
    pub(super) fn mark_excused(&mut self, replica: usize, sectors: u64) {
        self.ledger.excused[replica] |= sectors;
        for pending in &mut self.pending {
            pending.seen.excused[replica] |= sectors;
        }
    }

    /// The replicas may hold different versions there from now on.
    pub(super) fn mark_mixed(&mut self, sectors: u64) {
        self.ledger.mixed |= sectors;
        for pending in &mut self.pending {
            pending.seen.mixed |= sectors;
        }
    }

    pub(super) fn write_back(&mut self, replica: usize, sectors: u64) {
        let written = sectors & self.replicas[replica].dirty();
        self.replicas[replica].write_back(sectors);
        self.ledger.lied_durable[replica] &= !written;
    }

    pub(super) fn evict(&mut self, replica: usize) {
        let sector = self.random.bit(self.replicas[replica].lost());
        let untold = self.replicas[replica].evict(sector as usize);
        trace!(
            self,
            "replica {replica} evicts {sector}, which is not durable"
        );
        if self.ledger.lied_durable[replica] >> sector & 1 == 1 {
            // It was said to be durable: whatever is told now, the engine has no reason to doubt
            // it.
            self.mark_lied(replica, 1 << sector);
        } else if untold {
            self.ledger.dropped[replica] |= 1 << sector;
            self.mark_seen_wrong(replica, 1 << sector);
        }
    }

    pub(super) fn rot(&mut self, replica: usize) {
        let sector = self.random.index(self.stirred.len());
        self.rotten += 1;
        let value = super::model::Value::rotten(self.rotten);
        if self.replicas[replica].rot(sector, value) {
            trace!(self, "replica {replica}: {sector} becomes {value}");
            self.ledger.any = true;
            self.mark_lied(replica, 1 << sector);
        }
    }

    pub(super) fn fail_writeback(&mut self, replica: usize) {
        let sectors = self.random.bits() & self.replicas[replica].dirty();
        if sectors != 0 {
            trace!(
                self,
                "replica {replica} fails to write back {:?}",
                bits(sectors).collect::<Vec<_>>()
            );
            self.ledger.any = true;
            self.replicas[replica].lose(sectors, true);
        }
    }

    /// The host crashes: whatever is in flight or not durable is there afterwards or not, sector by
    /// sector and replica by replica. Then the daemon starts again, knowing nothing.
    pub(super) fn crash(&mut self) -> Checked {
        trace!(self, "-- crash");
        self.statistics.crashes += 1;
        for index in 0..self.flights.len() {
            let sectors = self.random.bits();
            self.crash_in_flight(index, sectors);
        }
        let behind = |replica: &usize| {
            let index = crate::common::ReplicaIndex(u8::try_from(*replica).expect("few"));
            self.shared
                .jobs(|_| (), |_, health| health.stale_sectors(index))
                > 0
        };
        let new = bits(u64::from(self.unsynced)).filter(behind);
        let mut unsynced = new.fold(0, |mask, replica| mask | 1 << replica);
        (self.leaving, self.unsynced) = (0, 0);
        self.jobs.clear();
        for replica in self.members() {
            let sectors = self.random.bits();
            self.write_back(replica, sectors);
            self.replicas[replica].crash(0);
        }
        let before = std::mem::take(&mut self.ledger);
        self.flights.clear();
        self.wakes.clear();
        self.pending.clear();
        self.now += 1;
        self.model.crashed(self.now);
        self.crashed = true;
        self.tick_wanted = 0;
        self.ledger.any = before.any;
        for sector in 0..self.stirred.len() {
            let good = self.take_stock(sector, &before)?;
            let left = usize::try_from((good & !unsynced).count_ones()).expect("few");
            if left < self.plan.threshold {
                unsynced = 0;
            }
        }
        // Who was added and is not up to date is not given to the next daemon, which would take it
        // for a good one; unless nothing works without it.
        self.members &= !unsynced;
        self.ever = self.count();
        self.start_engines();
        Ok(())
    }

    /// What a sector holds after a crash (I2, I5).
    fn take_stock(&mut self, sector: usize, before: &Ledger) -> Result<u32, Violation> {
        let bit = 1 << sector;
        let (mut good, mut versions) = (0_u32, Vec::new());
        for replica in self.members() {
            let value = self.replicas[replica].value(sector);
            let permitted = self.model.is_permitted(sector, value, self.now);
            let lied = (before.lied[replica] | before.lied_durable[replica]) & bit != 0;
            good |= u32::from(permitted || lied) << replica;
            if !permitted {
                self.ledger.lied[replica] |= bit;
            } else if !versions.contains(&value) {
                versions.push(value);
            }
        }
        if versions.len() > 1 {
            self.ledger.mixed |= bit;
        }
        if usize::try_from(good.count_ones()).expect("few") < self.plan.threshold {
            let text = format!("only {good:b} hold what was flushed, or later, of {sector}");
            return Err(Violation::new("I2", text));
        }
        let explained = count(&before.lied, sector)
            + count(&before.excused, sector)
            + count(&self.ledger.lied, sector);
        if versions.len() > 2 && explained == 0 {
            self.statistics.three_versions += 1;
            trace!(
                self,
                "after the crash {sector} has the versions {versions:?}"
            );
        }
        Ok(good)
    }
}
