//! The operator prefers a replica (W12): where no vote has a winner, its copy is written to the
//! others and is what the disk holds from then on. For the model that is a write like any other,
//! of the bytes that the replica holds.

use super::Violation;
use super::effects::written;
use super::flight::Flight;
use super::model::{Moment, Value};
use super::operator::index;
use super::pending::{NoSpace, PendingKind, PendingWrite};
use super::plan::{PLACES, bits, mask_below, mask_of, widen};
use super::state::{Checked, World, show, trace};
use crate::common::operation::{Action, Operation, RequestId};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::jobs::{JobId, NotStarted};
use crate::quorum::health::Preferable;

/// A write of what the preferred replica holds, in flight.
#[derive(Debug)]
pub(super) struct Preference {
    replica: usize,
    /// The worker and the request that write it, once they do.
    request: Option<(usize, RequestId)>,
    /// The blocks that are written.
    range: SectorRange,
    /// The sectors without a winner, a mask.
    sectors: u64,
    pub(super) began: Moment,
    /// What is written there, once an operation has shown it; not what the guest has no answer to.
    values: Vec<(usize, Value)>,
    is_known: bool,
    /// The replicas that write it.
    write: PendingWrite,
    /// Those that have written it and were in service throughout. The engine need not remember of
    /// another one that it has written it.
    holders: u32,
}

impl Preference {
    fn new(
        replica: usize,
        range: SectorRange,
        sectors: u64,
        (began, failures): (Moment, [u32; PLACES]),
    ) -> Self {
        Self {
            replica,
            request: None,
            range,
            sectors,
            began,
            values: Vec::new(),
            is_known: false,
            write: PendingWrite {
                number: 0,
                zeroes: false,
                durable: false,
                ended: false,
                overlapped: 0,
                preferred: 0,
                submitted_to: 0,
                succeeded: 0,
                failed: 0,
                failures,
                no_space: NoSpace::No,
            },
            holders: 0,
        }
    }
}

impl World {
    /// The operator prefers a replica.
    pub(super) fn prefer(&mut self) -> Checked {
        let place = self.random.bit(u64::from(self.members)) as usize;
        let started = self.start_preferring(place)?;
        let undecided = mask_of(self.shared.unresolved().iter());
        let text = match started {
            Err(NotStarted::NothingUndecided) if undecided != 0 => {
                format!("nothing is said to be undecided, and {undecided:b} is")
            }
            Err(NotStarted::NotInService) if !self.is_evicted(place) => {
                format!("replica {place} is said to be evicted")
            }
            Err(NotStarted::NotUpToDate) if undecided & !self.ledger.excused[place] != 0 => {
                format!("replica {place} is up to date, and may not decide {undecided:b}")
            }
            _ => return Ok(()),
        };
        Err(Violation::new("W12", text).at(undecided))
    }

    fn start_preferring(&mut self, place: usize) -> Result<Result<JobId, NotStarted>, Violation> {
        let started = match self.shared.preferable(index(place)) {
            Ok(Preferable { undecided, .. }) => {
                self.with_jobs(|jobs, health| jobs.prefer(index(place), undecided, 0, health))?
            }
            Err(reason) => Err(reason),
        };
        trace!(self, "operator: prefers replica {place}: {started:?}");
        Ok(started)
    }

    /// No fault is left: what has no winner is decided by replicas that hold it, and can be read.
    pub(super) fn prefer_all(&mut self) -> Checked {
        if self.random.below(2) == 0 {
            return Ok(());
        }
        for place in self.members().collect::<Vec<_>>() {
            let undecided = mask_of(self.shared.unresolved().iter());
            let failures = self.ledger.failures;
            let started = self.start_preferring(place)?;
            if started.is_err() {
                continue;
            }
            self.finish_jobs()?;
            self.settle()?;
            // A flush may have failed on what it has written, of errors from before.
            if failures != self.ledger.failures {
                continue;
            }
            // The search for what can be read ends early where little can (R4).
            let cannot = match self.ledger.unreadable[place] {
                0 => self.ledger.excused[place],
                _ => u64::MAX,
            };
            let left = undecided & mask_of(self.shared.unresolved().iter());
            let left = left & !widen(cannot, self.plan.block_sectors);
            if left != 0 {
                let text = format!("replica {place} was preferred, and has not decided {left:b}");
                return Err(Violation::new("W12", text).at(left));
            }
        }
        Ok(())
    }

    /// A replica decides in `run`, which is in these blocks.
    pub(super) fn preference_begins(
        &mut self,
        replica: ReplicaIndex,
        range: SectorRange,
        run: SectorRange,
    ) -> Checked {
        let replica = replica.as_usize();
        let sectors = mask_below(run.count) << run.start;
        trace!(self, at sectors, "replica {replica} decides in {}", show(run));
        self.check_undecided_by_vote(replica, sectors)?;
        self.replaces_unanswered(sectors);
        // Another worker may have taken the mark away since.
        if !self.overlapped && !self.shared.is_marked(range) {
            let text = format!("{} is to be changed and is not marked", show(range));
            return Err(Violation::new("S4", text).at(sectors));
        }
        let known = self.preferences.iter_mut().find(|p| p.range == range);
        if let Some(known) = known {
            known.sectors |= sectors;
            return Ok(());
        }
        self.now += 1;
        self.statistics.preferred += 1;
        let failures = self.before_input.failures;
        let begun = Preference::new(replica, range, sectors, (self.now, failures));
        self.preferences.push(begun);
        Ok(())
    }

    /// W12: a write that waits for its flush is replaced there by what is preferred.
    fn replaces_unanswered(&mut self, preferred: u64) {
        for pending in &mut self.pending {
            let sectors = self.plan.mask(pending.range) & preferred;
            if let PendingKind::Write(write) = &mut pending.kind
                && write.ended
            {
                write.preferred |= sectors;
            }
        }
    }

    /// W12: the replica may decide there, and no vote could.
    fn check_undecided_by_vote(&self, replica: usize, sectors: u64) -> Checked {
        let faults = self.plan.faults;
        if self.overlapped || self.is_evicted(replica) {
            return Ok(());
        }
        for sector in bits(sectors) {
            let bit = 1 << sector;
            let fresh = self.ledger.seen().right_at(bit, self.members);
            let missed = self.ledger.excused[replica] & bit != 0 && fresh != 0;
            if missed && self.view.stale[replica] & bit != 0 {
                let text = format!("replica {replica} may be stale, and decides {sector}");
                return Err(Violation::new("W12", text).at(bit));
            }
            // A read of a good replica may have failed.
            if faults.read_error != 0 || faults.unreadable != 0 || faults.hang != 0 {
                continue;
            }
            let value = |r: usize| self.replicas[r].value(sector);
            let votes = |r: usize| {
                bits(u64::from(fresh))
                    .filter(|o| value(*o) == value(r))
                    .count()
            };
            let most = bits(u64::from(fresh)).map(votes).max().unwrap_or(0);
            if most >= self.thresholds.most {
                let text = format!("{sector} has a winner, and replica {replica} decides it");
                return Err(Violation::new("W12", text).at(bit));
            }
        }
        Ok(())
    }

    /// Whether an operation, which is just submitted, writes what is preferred.
    pub(super) fn writes_preferred(&mut self, operation: &Operation) -> Result<bool, Violation> {
        let Action::Write { range, .. } = &operation.action else {
            return Ok(false);
        };
        let Some(at) = self.preferences.iter().position(|p| p.range == *range) else {
            return Ok(false);
        };
        let Preference { sectors, began, .. } = self.preferences[at];
        let replica = self.preferences[at].replica;
        if !self.preferences[at].is_known {
            self.preferences[at].is_known = true;
            // It may have lost since what was read: a page, or what a flush has just failed on.
            let mut flights = self.flights.iter();
            let flushes = flights.any(|flight| flight.replica() == replica && flight.is_flush());
            let changed = match flushes {
                true => u64::MAX,
                false => {
                    self.ledger.wrong(replica)
                        | self.ledger.unreadable[replica]
                        | self.ledger.excused[replica]
                }
            };
            for sector in bits(sectors) {
                let Some(value) = written(&operation.action, sector) else {
                    let text = format!("{sector} is written with two versions");
                    return Err(Violation::new("W12", text).at(1 << sector));
                };
                let held = self.replicas[replica].value(sector);
                if value != held && changed >> sector & 1 == 0 {
                    let text = format!("{sector} is written with {value}, preferred is {held}");
                    return Err(Violation::new("W12", text).at(1 << sector));
                }
                self.changed_at[sector] = self.now;
                if self.model.preference_began(sector, value, began) {
                    self.preferences[at].values.push((sector, value));
                }
            }
        }
        self.preferences[at].request = Some((self.input_from, operation.request));
        let failures = self.before_input.failures;
        let write = &mut self.preferences[at].write;
        write.note_submission(operation.replica.as_usize(), failures)?;
        Ok(true)
    }

    /// The blocks of the preference that an operation writes for, if that has not ended.
    pub(super) fn preference_of(&self, flight: &Flight) -> Option<SectorRange> {
        let request = Some((flight.worker, flight.operation.request));
        let of_it = |p: &&Preference| p.request == request && flight.range() == Some(p.range);
        let known = self
            .preferences
            .iter()
            .find(of_it)
            .filter(|_| flight.preferred);
        known.map(|p| p.range)
    }

    /// A replica has replied to such a write. `stayed`: it was not evicted or removed since.
    pub(super) fn preferred_written(
        &mut self,
        replica: usize,
        range: SectorRange,
        (success, stayed): (bool, bool),
    ) {
        let known = self.preferences.iter_mut().find(|p| p.range == range);
        if let Some(Preference { write, holders, .. }) = known {
            match success {
                true => write.succeeded |= 1 << replica,
                false => write.failed |= 1 << replica,
            }
            *holders |= u32::from(success && stayed) << replica;
        }
    }

    /// The blocks are written to as many replicas as there are. `holders` have what is preferred.
    pub(super) fn preference_ends(
        &mut self,
        range: SectorRange,
        holders: ReplicaSet,
        success: bool,
    ) -> Checked {
        let position = self.preferences.iter().position(|p| p.range == range);
        let Some(position) = position else {
            return Err(Violation::new("W12", "the end of no preference"));
        };
        let mut ended = self.preferences.swap_remove(position);
        self.now += 1;
        let all = self.plan.mask(range);
        trace!(self, at all, "{} is preferred: {success}", show(range));
        if !ended.is_known {
            for sector in bits(ended.sectors) {
                let value = self.replicas[ended.replica].value(sector);
                if self.model.preference_began(sector, value, ended.began) {
                    ended.values.push((sector, value));
                }
            }
        }
        let asked = ended.write.submitted_to;
        if holders.bits() & asked & !ended.write.succeeded != 0 {
            return Err(Violation::new("W12", "it counts as written, and is not").at(all));
        }
        ended.write.succeeded |= holders.bits();
        let enough = |mask: u32| usize::try_from(mask.count_ones()).expect("few");
        let (least, most) = (self.thresholds.least, self.thresholds.most);
        let unfailed = self.unfailed(&ended.write);
        let hold = enough(ended.write.succeeded & self.members);
        let still_hold = enough(ended.write.succeeded & unfailed);
        if (success && hold < least) || (!success && still_hold >= most) {
            let text = format!("preferred is what {hold} hold: {success}");
            return Err(Violation::new("W12", text).at(all));
        }
        for (sector, value) in &ended.values {
            let (sector, value, bit) = (*sector, *value, 1 << *sector);
            self.model
                .write_ended(sector, value, self.now, success, false);
            self.changed_at[sector] = self.now;
            for holder in bits(u64::from(ended.write.succeeded)).filter(|_| success) {
                if self.replicas[holder].value(sector) == value {
                    self.ledger.repaired(holder, bit);
                }
            }
        }
        for holder in holders.iter() {
            // It counts as written there too.
            self.staleness
                .writes(holder.as_usize(), all, self.overlapped);
        }
        self.note_written(range, &ended.write, success);
        self.replaces_unanswered(ended.sectors);
        if success {
            self.statistics.decided += 1;
            self.note_undone(all);
        }
        let left = mask_of(self.shared.unresolved().iter()) & ended.sectors;
        if success && left != 0 && !self.overlapped {
            let text = "what is preferred counts as undecided";
            return Err(Violation::new("W12", text).at(left));
        }
        Ok(())
    }

    /// The sectors of these writes in flight.
    pub(super) fn being_preferred(&self) -> u64 {
        let ranges = self.preferences.iter().map(|p| self.plan.mask(p.range));
        ranges.fold(0, |all, sectors| all | sectors)
    }

    /// Whether the replica at this place counts as a holder of such a write.
    pub(super) fn is_preferred_holder(&self, place: usize) -> bool {
        let mut holders = self.preferences.iter().map(|p| p.holders);
        holders.any(|holders| holders >> place & 1 == 1)
    }

    /// Another replica has the place now: what the one before has written does not count.
    pub(super) fn forget_preferred_by(&mut self, place: usize) {
        debug_assert!(place < PLACES);
        for Preference { write, holders, .. } in &mut self.preferences {
            for mask in [&mut write.succeeded, &mut write.failed, holders] {
                *mask &= !(1 << place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_replica_writes_after_its_removal_need_not_be_remembered() {
        let mut world = World::planned(1, |plan| plan);
        let range = SectorRange::new(0, 1);
        let begun = Preference::new(0, range, 1, (0, [0; PLACES]));
        world.preferences.push(begun);
        world.preferred_written(1, range, (true, false));
        world.preferred_written(2, range, (true, true));
        assert!(!world.is_preferred_holder(1) && world.is_preferred_holder(2));
        world.forget_preferred_by(2);
        assert!(!world.is_preferred_holder(2));
    }
}
