//! Faults that strike by themselves: bit rot, failing writeback, replicas that hang, crashes.

use std::time::Duration;

use super::model::Value;
use super::plan::{bits, mask_below, widen};
use super::state::{Checked, World, trace};

/// How likely it is in each step that an image cannot be used any more.
const LOSS: u32 = 1 << 4;

/// How likely it is in each step that the image of a missing member can be opened again.
const RETURN: u32 = 1 << 9;

/// How likely it is in each step that a daemon ends that has nothing to do.
const CLEAN_END: u32 = 1 << 13;

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
        if self.missing != 0 && self.random.chance(RETURN) {
            self.find_missing()?;
        }
        if self.random.chance(LOSS) {
            self.lose_image(replica);
        }
        // Not covered: what a flush would still have reported of a page that is lost.
        let loses_pages = faults.flush_error | faults.writeback_error | faults.full != 0;
        let may_kill = !self.plan.records || self.plan.faulty == 0 || !loses_pages;
        if faults.crash != 0 && may_kill && self.may_end() && self.random.chance(CLEAN_END) {
            return self.end();
        }
        if self.random.chance(faults.crash) {
            let killed = self.random.below(3) == 0;
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

    /// The daemon is killed: the errors of flushes that it has not seen are not reported again.
    /// What they say is lost is as if these flushes had lied.
    pub(super) fn lose_errors(&mut self) {
        let flushes = self.flights.iter().filter(|flight| flight.is_flush());
        let unseen = flushes.filter_map(|flight| match flight.done {
            Some((Err(_), lost)) => Some((flight.replica(), lost)),
            _ => None,
        });
        let unseen: Vec<(usize, u64)> = unseen.collect();
        for (replica, lost) in unseen {
            let cached = self.replicas[replica].lost();
            self.ledger.never_reported(replica, lost, cached);
            self.replicas[replica].reported(lost);
        }
    }

    /// The kernel drops a page that it could not write back.
    fn drop_page(&mut self, replica: usize) {
        let sector = self.random.bit(self.replicas[replica].lost());
        self.drop_page_of(replica, sector as usize);
    }

    fn drop_page_of(&mut self, replica: usize, sector: usize) {
        let unreported = self.replicas[replica].drop_page(sector);
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

    /// The daemon was killed. The next one opens the image without the pages that could not be
    /// written back. It knows of them from the records alone, unless an error is still to come.
    pub(super) fn drop_lost_pages(&mut self, replica: usize) {
        let lost = self.replicas[replica].lost();
        for sector in bits(lost) {
            self.drop_page_of(replica, sector);
        }
        if !self.replicas[replica].has_error() {
            self.mark_corrupt(replica, lost);
        }
    }
}
