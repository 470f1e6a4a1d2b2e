//! What excuses a replica, sector by sector: the injected faults, and those that the engine knows.
//!
//! The checks ask three questions. May this replica give corrupt bytes here? Can it be read here?
//! May the engine leave it out? Each request in flight keeps what was true at any time since it
//! began, so that a replica counts that was wrong when it was read and has been repaired since.

use super::model::Moment;
use super::plan::PLACES;

/// One mask of sectors for each replica.
pub type Masks = [u64; PLACES];

/// Faults and what they have left.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Where it holds corrupt bytes that no error has reported: bit rot, lost and misdirected
    /// writes.
    pub corrupt: Masks,
    /// Where it has dropped a page and no error has reported it yet.
    pub dropped: Masks,
    /// What a flush has reported durable and is not, and what was corrupt and is repaired in its
    /// cache only.
    pub falsely_durable: Masks,
    /// Where it cannot be read until it is written.
    pub unreadable: Masks,
    /// The part of that where it cannot be written either.
    pub unwritable: Masks,
    /// Where the engine knows of an error by which the replica may be stale.
    pub excused: Masks,
    /// Where a part of a read that failed could not be read either, when it was last read.
    pub parts_failed: Masks,
    /// The blocks among these that the engine has not reported.
    pub parts_unreported: Masks,
    /// Where it has missed a write, was corrupt, or is excused while t others have made the newest
    /// version durable, and has not flushed what was written there since.
    pub unsound: Masks,
    /// Where it holds what a repair or a resync has written, which may be what was there before a
    /// write that others have lost. Until the guest has written there.
    pub copies: Masks,
    /// Where a replica failed when all that was left were such copies. Until the guest has written
    /// there.
    pub only_copies: u64,
    /// What was written since the last flush of the replica began.
    pub written: Masks,
    /// What was written before a flush that the replica has not confirmed.
    pub in_flush: Masks,
    /// When fewer than t members were last good in some sector: a flush that the guest asked for
    /// before then may fail, and so may the next one.
    pub lacking_at: Option<Moment>,
    /// When a flush last failed: those that waited with it may fail too.
    pub told_at: Option<Moment>,
    /// Where it was being repaired when it was evicted: a resync must write there again.
    pub unrepaired: Masks,
    /// Sectors of which a failed write or a crash may have left different versions.
    pub mixed: u64,
    /// Those of them in which a vote may accuse replicas: after a crash, or after corrupt replicas
    /// have won a vote. Not after a failed write (W7).
    pub accusable: u64,
    /// With t ≤ N/2: where t replicas were wrong, and one was repaired. They may have replaced what
    /// the others held (W5). Until the guest has written there.
    pub overruled: u64,
    /// What the operator has given up with a replica (W11): no vote can have a winner, and no flush
    /// needs it. Until the guest has written there.
    pub given_up: u64,
    /// The same, and what could be lost with the replica otherwise.
    pub at_risk: u64,
    /// The same until a flush has succeeded that began after the guest has written there: a crash
    /// may lose both versions.
    pub lost_by_crash: u64,
    /// When the guest last wrote there.
    pub lost_written_at: Moment,
    /// The number of failed flushes and evictions of each replica that the engine knows.
    pub failures: [u32; PLACES],
    /// The sectors that the resync of each replica had copied when the replica last failed.
    pub copied: [u64; PLACES],
    /// The number of evictions of each replica.
    pub evictions: [u32; PLACES],
    /// The replicas that are evicted or were removed, a mask.
    pub evicted: u32,
    /// A fault was injected, or the operator has changed the replicas.
    pub any: bool,
}

/// What the engines know of failures of the replicas.
#[derive(Clone, Copy, Debug, Default)]
pub struct Failures {
    /// See [`Ledger::failures`].
    pub failures: [u32; PLACES],
    /// See [`Ledger::evictions`].
    pub evictions: [u32; PLACES],
    /// See [`Ledger::evicted`].
    pub evicted: u32,
    /// See [`Ledger::excused`].
    pub excused: Masks,
    /// See [`Ledger::dropped`].
    pub dropped: Masks,
}

/// What was true of the replicas at any time while a request was in flight.
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Where it held corrupt bytes that no error has reported.
    pub corrupt: Masks,
    /// Where it had dropped a page, if no error has been reported since.
    pub dropped: Masks,
    /// Where it could not be read.
    pub unreadable: Masks,
    /// Where it was excused, or has failed a read of a single block.
    pub excused: Masks,
    /// Where it has failed a read of any length: it may not have voted.
    pub failed: Masks,
    /// See [`Ledger::mixed`].
    pub mixed: u64,
    /// See [`Ledger::failures`]: when the request began.
    pub failures: [u32; PLACES],
}

impl Ledger {
    /// What is true now.
    pub fn seen(&self) -> Seen {
        Seen {
            corrupt: self.corrupt,
            dropped: self.dropped,
            unreadable: self.unreadable,
            excused: self.excused,
            failed: Masks::default(),
            mixed: self.mixed,
            failures: self.failures,
        }
    }

    /// The failures that the engines know of now.
    pub fn known_failures(&self) -> Failures {
        Failures {
            failures: self.failures,
            evictions: self.evictions,
            evicted: self.evicted,
            excused: self.excused,
            dropped: self.dropped,
        }
    }

    /// Another replica has the place now.
    pub fn forget(&mut self, replica: usize) {
        let masks = [
            &mut self.corrupt,
            &mut self.dropped,
            &mut self.falsely_durable,
            &mut self.unreadable,
            &mut self.unwritable,
            &mut self.parts_failed,
            &mut self.parts_unreported,
            &mut self.excused,
            &mut self.unrepaired,
            &mut self.unsound,
            &mut self.copies,
            &mut self.written,
            &mut self.in_flush,
        ];
        for mask in masks {
            mask[replica] = 0;
        }
        self.failures[replica] = 0;
        self.copied[replica] = 0;
        self.evictions[replica] = 0;
        self.evicted &= !(1 << replica);
    }

    /// What is wrong with the image of the replica.
    pub fn of_image(&mut self, replica: usize) -> [&mut u64; 5] {
        let masks = [
            &mut self.corrupt,
            &mut self.dropped,
            &mut self.falsely_durable,
            &mut self.unreadable,
            &mut self.unwritable,
        ];
        masks.map(|mask| &mut mask[replica])
    }

    /// The sectors on which the replica may give corrupt bytes.
    pub fn wrong(&self, replica: usize) -> u64 {
        self.corrupt[replica] | self.dropped[replica]
    }

    /// No error will report that these sectors were lost. Of them, the pages in `cached` are seen
    /// as long as they are not dropped.
    pub fn never_reported(&mut self, replica: usize, lost: u64, cached: u64) {
        let dropped = self.dropped[replica] & lost;
        self.dropped[replica] &= !dropped;
        self.corrupt[replica] |= dropped;
        self.falsely_durable[replica] |= lost & cached;
    }

    /// The cache of the replica holds the right bytes there; its disk perhaps not.
    pub fn repaired(&mut self, replica: usize, sectors: u64) {
        self.falsely_durable[replica] |= self.corrupt[replica] & sectors;
        self.corrupt[replica] &= !sectors;
        self.dropped[replica] &= !sectors;
        self.unrepaired[replica] &= !sectors;
    }
}

impl Seen {
    /// The number of replicas that may have given corrupt bytes for the sector.
    pub fn wrong_at(&self, sector: usize) -> usize {
        count(&std::array::from_fn(|r| self.wrong(r)), sector)
    }

    /// The sectors for which the replica may have given corrupt bytes.
    pub fn wrong(&self, replica: usize) -> u64 {
        self.corrupt[replica] | self.dropped[replica]
    }

    /// The replicas of `members`, a mask, that gave right answers for all of the sectors.
    pub fn right_at(&self, sectors: u64, members: u32) -> u32 {
        let left_out = |r: usize| self.wrong(r) | self.excused[r] | self.unreadable[r];
        let is_right = |r: &usize| left_out(*r) & sectors == 0;
        let members = super::plan::bits(u64::from(members));
        members.filter(is_right).fold(0, |mask, r| mask | 1 << r)
    }
}

/// The number of masks that contain the sector.
pub fn count(masks: &Masks, sector: usize) -> usize {
    masks.iter().filter(|mask| *mask >> sector & 1 == 1).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_error_reports_is_as_if_a_flush_had_lied() {
        let mut ledger = Ledger::default();
        ledger.dropped[1] = 0b0011;
        ledger.never_reported(1, 0b0110, 0b1100);
        assert_eq!(ledger.dropped[1], 0b0001);
        assert_eq!(ledger.corrupt[1], 0b0010);
        assert_eq!(ledger.falsely_durable[1], 0b0100);
    }
}
