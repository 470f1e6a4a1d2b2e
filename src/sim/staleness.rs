//! W3, W5, W6: a copy that is fresh does not count as stale.
//!
//! For each replica the sectors are known in which something has happened after which it may be
//! stale: it failed or missed a write, it was evicted or a flush failed while a write there was not
//! durable on it, a vote has decided against it, it was added. Everywhere else it must be fresh.

use super::Violation;
use super::flight::Flight;
use super::ledger::Masks;
use super::pending::{Pending, PendingKind};
use super::state::{Checked, World};

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub(super) struct Staleness {
    /// Where it may be stale.
    pub(super) possible: Masks,
    /// What it was asked to write since its last flush began.
    unflushed: Masks,
    /// The same of the last flush and the one before; that it succeeded may not be known yet.
    flushing: Masks,
    flushing_before: Masks,
    /// The replicas that fail during this input, a mask.
    failing: u32,
    /// Where a write was submitted during an input in which the replica failed: another worker may
    /// have begun it before.
    contested: Masks,
    /// Where a vote during this input has made it stale.
    pub(super) decided_against: Masks,
}

impl Staleness {
    /// It is asked to write these sectors. `overlapped`: another worker was given an input at the
    /// same time, and may have evicted it or seen its flush fail right after it was asked.
    pub(super) fn writes(&mut self, replica: usize, sectors: u64, overlapped: bool) {
        self.unflushed[replica] |= sectors;
        if overlapped && self.failing >> replica & 1 == 1 {
            self.contested[replica] |= sectors;
            self.possible[replica] |= sectors;
        }
    }

    /// It has written these sectors, and has not failed since it was asked.
    pub(super) fn has_written(&mut self, replica: usize, sectors: u64) {
        self.possible[replica] &= !sectors | self.contested[replica];
        self.contested[replica] &= !sectors;
    }

    /// It is asked to flush, and has these writes in flight.
    pub(super) fn flush_begins(&mut self, replica: usize, in_flight: u64) {
        self.flushing_before[replica] |= self.flushing[replica];
        self.flushing[replica] = self.unflushed[replica];
        self.unflushed[replica] = in_flight;
    }

    /// It has flushed.
    pub(super) fn flushed(&mut self, replica: usize) {
        self.flushing_before[replica] = 0;
    }

    /// What was not durable there may be lost. It was writing these sectors.
    pub(super) fn failed(&mut self, replica: usize, in_flight: u64) {
        self.failing |= 1 << replica;
        self.possible[replica] |= in_flight
            | self.unflushed[replica]
            | self.flushing[replica]
            | self.flushing_before[replica];
    }

    /// The daemon starts: the replica is remembered to be stale in `stale`, and `changed` may not
    /// be durable on it.
    pub(super) fn restored(&mut self, replica: usize, stale: u64, changed: u64) {
        self.possible[replica] = stale;
        self.unflushed[replica] = changed;
    }

    /// Another replica has the place, and is stale everywhere.
    pub(super) fn added(&mut self, replica: usize) {
        self.possible[replica] = u64::MAX;
        self.unflushed[replica] = 0;
        self.flushing[replica] = 0;
        self.flushing_before[replica] = 0;
        self.contested[replica] = 0;
    }
}

impl World {
    /// The sectors of writes that have not ended: of the guest, or operations on this replica. A
    /// write that one replica has written and others have not counts as not durable.
    pub(super) fn being_written(&self, replica: usize) -> u64 {
        let is_write = |pending: &&Pending| matches!(pending.kind, PendingKind::Write(_));
        let guests = self
            .pending
            .iter()
            .filter(is_write)
            .map(|write| write.range);
        let writes = |flight: &&Flight| {
            flight.replica() == replica && (flight.write.is_some() || flight.is_repair())
        };
        let own = self.flights.iter().filter(writes).filter_map(Flight::range);
        let all = guests.chain(own);
        all.fold(self.being_preferred(), |mask, range| {
            mask | self.plan.mask(range)
        })
    }

    /// The replica was evicted, or a flush failed on it.
    pub(super) fn note_not_durable(&mut self, replica: usize) {
        let in_flight = self.being_written(replica);
        self.staleness.failed(replica, in_flight);
    }

    /// No replica counts as stale where it must be fresh.
    pub(super) fn check_staleness(&mut self) -> Checked {
        // The next input begins.
        self.staleness.failing = 0;
        self.staleness.decided_against = Masks::default();
        self.view.refresh(&self.shared, self.plan.disk());
        for replica in self.members() {
            let stale = self.view.stale[replica];
            if stale == 0 {
                self.records.uncopied &= !(1 << replica);
            }
            let excess = stale & !self.staleness.possible[replica];
            if excess != 0 {
                let text = format!("replica {replica} is fresh on {excess:b}, and counts as stale");
                return Err(Violation::new("I1", text).at(excess));
            }
        }
        Ok(())
    }
}
