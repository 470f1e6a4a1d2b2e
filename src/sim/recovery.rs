//! S2, S5: the daemon starts again after an unclean end. It knows from its records which replicas
//! are stale where, and recovers what may differ.

use super::Violation;
use super::effects::{Collected, Effect, written};
use super::ledger::{Ledger, Masks};
use super::model::Value;
use super::pending::Pending;
use super::plan::{bits, mask_of};
use super::state::{Checked, World, trace};
use super::view::View;
use crate::common::operation::{Action, Operation};
use crate::common::ranges::RangeSet;
use crate::engine::ReadPattern;
use crate::quorum::health::Remembered;

impl World {
    /// The engines know what the records say: also what may have been changed last.
    pub(super) fn restore(
        &mut self,
        remembered: &Remembered,
        changed: &RangeSet,
        killed: bool,
    ) -> Checked {
        let mut events = Vec::new();
        self.shared
            .restore(remembered, changed, |event| events.push(event));
        self.undecided = mask_of(changed.iter());
        self.recovering = self.undecided;
        // After a kill it need not be on stable storage.
        self.untouched = if killed { 0 } else { self.undecided };
        self.chosen.clear();
        self.tick_wanted |= 1;
        self.jobs_reported(events)
    }

    /// S2: what a sector holds after a crash on a replica that is not remembered to be stale
    /// (`stale`): also where its copy is doubtful. `returns_with`: where a missing replica may
    /// vote when its image is there.
    pub(super) fn check_after_crash(
        &mut self,
        sector: usize,
        before: &Ledger,
        (stale, returns_with, killed): (&Masks, &Masks, bool),
        marked: u64,
    ) -> Checked {
        let bit = 1 << sector;
        let mut versions = Vec::new();
        for replica in self.members() {
            let value = self.replicas[replica].value(sector);
            let permitted = self.model.is_permitted(sector, value, self.now);
            let is_fresh = self.ledger.excused[replica] & bit == 0;
            let votes = is_fresh || returns_with[replica] & bit != 0;
            if permitted && votes && !versions.contains(&value) {
                versions.push(value);
            }
            // An error is still to come: only after a kill.
            let dropped = self.ledger.dropped[replica] & bit != 0;
            if permitted || dropped || stale[replica] & bit != 0 {
                continue;
            }
            // What was given up may be anything (W11).
            let lied =
                before.corrupt[replica] | before.falsely_durable[replica] | before.lost_by_crash;
            // After a kill the page cache may have lost what a doubtful copy had. Like one that
            // has lied, it may win where none is better (S5).
            if lied & bit == 0 && (is_fresh || !killed) {
                let text = format!("replica {replica} holds {value} of {sector}, and may vote");
                return Err(Violation::new("S2", text).at(bit));
            }
            self.ledger.corrupt[replica] |= bit;
        }
        if versions.len() > 1 {
            let lies = |replica: usize| {
                (before.corrupt[replica] | before.falsely_durable[replica]) & bit != 0
            };
            let liars: Vec<usize> = self.members().filter(|r| lies(*r)).collect();
            let may_differ = marked & bit != 0 || (before.lost_by_crash | before.mixed) & bit != 0;
            if self.plan.records && !may_differ && liars.is_empty() {
                let text = format!("{sector} is {versions:?} after a crash, and is not marked");
                return Err(Violation::new("S4", text).at(bit));
            }
            self.mark_mixed(bit);
            // Where nothing is marked the records say that all copies are equal. So one that has
            // lied is wrong there, although what it holds would be legal where something is marked.
            if self.plan.records && marked & bit == 0 {
                let votes = |r: &usize| (!self.ledger.excused[*r] | returns_with[*r]) & bit != 0;
                let honest = |r: &usize| !liars.contains(r) && votes(r);
                let honest = self.members().find(honest);
                let right = honest.map(|replica| self.replicas[replica].value(sector));
                for liar in liars {
                    if Some(self.replicas[liar].value(sector)) != right {
                        self.ledger.corrupt[liar] |= bit;
                    }
                }
            }
        }
        Ok(())
    }

    /// S5: a vote has decided which copy of these sectors the disk holds after the end. From then
    /// on it is what the guest has written there last, and durable.
    pub(super) fn note_recovered(&mut self, earlier: &View) -> Checked {
        let decided = earlier.unrecovered & !self.view.unrecovered;
        if decided == 0 && self.recovering == 0 {
            return Ok(());
        }
        for replica in self.members() {
            let lost = decided & self.view.stale[replica];
            self.mark_excused(replica, lost);
            self.ledger.unsound[replica] |= lost;
        }
        self.check_enough_hold(decided, earlier)?;
        let mut recovered = self.recovering & !self.view.unrecovered & !self.just_written();
        if self.overlapped {
            // What the other worker writes shows what it has decided, unless it is written already.
            recovered &= self.mask_of_chosen();
        }
        for sector in bits(recovered) {
            let bit = 1 << sector;
            let holds = |replica: &usize| self.view.stale[*replica] & bit == 0;
            let holders: Vec<usize> = self.members().filter(holds).collect();
            let value_of = |holder: &usize| self.replicas[*holder].value(sector);
            let chosen = self.chosen.get(&sector);
            let is_chosen = |replica: &&usize| chosen == Some(&value_of(replica));
            let is_right = |replica: &&usize| self.ledger.wrong(**replica) & bit == 0;
            // One that is wrong may have become so since it was read.
            let holder = holders.iter().find(is_chosen);
            let holder = holder.or_else(|| holders.iter().find(is_right).or(holders.first()));
            let Some(value) = holder.map(value_of) else {
                // It is known when it is written.
                continue;
            };
            let is_new = chosen.is_none();
            self.recovering &= !bit;
            if is_new {
                self.check_most_hold(sector, value, earlier)?;
            }
            self.is_recovered(sector, value)?;
        }
        Ok(())
    }

    fn mask_of_chosen(&self) -> u64 {
        self.chosen
            .keys()
            .fold(0, |mask, sector| mask | 1 << sector)
    }

    /// From now on the sector holds the value.
    fn is_recovered(&mut self, sector: usize, value: Value) -> Checked {
        let bit = 1 << sector;
        trace!(self, at bit, "{sector} is recovered: {value}");
        let was_wrong = !self.model.is_permitted(sector, value, self.now);
        let lies = |replica: usize| {
            let lied = self.ledger.wrong(replica) | self.ledger.falsely_durable[replica];
            lied & bit != 0
        };
        if was_wrong && !self.members().any(lies) {
            let text = format!("{sector} is recovered as {value}, which is not permitted");
            return Err(Violation::new("I1", text).at(bit));
        }
        self.note_before_recovery(sector, value, was_wrong);
        self.one_has_decided |= value.is_rotten();
        self.now += 1;
        if self.model.recovery_began(sector, value, self.now) {
            self.now += 1;
            // A crash has left it on stable storage, unless it has come there by mistake since.
            let holds = |replica: usize| self.replicas[replica].durable(sector) == value;
            let durable = self.untouched & bit != 0 && self.members().any(holds);
            self.model
                .write_ended(sector, value, self.now, true, durable);
        }
        for replica in self.members() {
            if was_wrong && self.replicas[replica].value(sector) == value {
                // On its disk there may be something else that is corrupt.
                self.ledger.falsely_durable[replica] |= self.ledger.corrupt[replica] & bit;
                self.ledger.corrupt[replica] &= !bit;
            }
        }
        Ok(())
    }

    /// Replicas are about to be repaired: what is written is what a vote has decided for.
    pub(super) fn note_recovering_writes(&mut self, worker: usize, asked: &Collected) -> Checked {
        if self.recovering == 0 {
            return Ok(());
        }
        self.view.refresh(&self.shared, self.plan.disk());
        for effect in &asked.effects {
            if let Effect::Submit(operation) = effect
                && matches!(operation.action, Action::Write { .. } | Action::Zero { .. })
                && self.engines[worker]
                    .guest_write(operation.request)
                    .is_none()
            {
                self.note_recovering_write(operation)?;
            }
        }
        Ok(())
    }

    fn note_recovering_write(&mut self, operation: &Operation) -> Checked {
        let (_, range) = operation.action.describe();
        // What too few replicas hold is decided when it is written; until then any copy is legal.
        let chosen = self.recovering & self.view.unrecovered;
        for sector in bits(self.plan.mask(range) & chosen) {
            let Some(value) = written(&operation.action, sector) else {
                continue;
            };
            self.one_has_decided |= value.is_rotten();
            if self.chosen.insert(sector, value).is_none() {
                self.check_most_hold(sector, value, &self.view)?;
            }
        }
        let recovered = self.recovering & !self.view.unrecovered;
        for sector in bits(self.plan.mask(range) & recovered) {
            let Some(value) = written(&operation.action, sector) else {
                let text = format!("{sector} is recovered as two versions");
                return Err(Violation::new("S5", text).at(1 << sector));
            };
            self.recovering &= !(1 << sector);
            self.is_recovered(sector, value)?;
        }
        Ok(())
    }

    /// S5: the winner of a vote was not written there, so that it may have too few holders. Some of
    /// it may be in the cache, until a flush loses it. `has_failed`: one has, since it was given
    /// the winner. What is decided already in the same write may be lost with it.
    pub(super) fn note_not_recovered(&mut self, replica: usize, sectors: u64, has_failed: bool) {
        let recovering = sectors & self.recovering;
        if recovering == 0 {
            return;
        }
        if has_failed {
            self.mark_excused(replica, sectors);
        }
        self.ledger.written[replica] |= sectors;
        for pending in &mut self.pending {
            pending.seen.excused[replica] |= recovering;
        }
    }

    /// S5: everything was read without faults. What had a copy that may vote is recovered.
    pub(super) fn check_recovered(&self) -> Checked {
        let has_winner = |sector: usize| {
            let any_wins = self.view.unrecovered >> sector & 1 == 1;
            let may_vote = |replica: &usize| {
                let cannot = self.view.stale[*replica] | self.ledger.unreadable[*replica];
                let loses = if any_wins {
                    0
                } else {
                    self.ledger.wrong(*replica)
                };
                (cannot | loses) >> sector & 1 == 0 && !self.is_evicted(*replica)
            };
            let needed = if any_wins { 1 } else { self.thresholds.most };
            self.members().filter(may_vote).count() >= needed
        };
        // A block with a sector that has none cannot be written.
        let is_whole = |sector: &usize| self.block_of(*sector).all(has_winner);
        match bits(self.view.unrecovered).find(is_whole) {
            None => Ok(()),
            Some(sector) => {
                let text = format!("{sector} was read, and is not recovered");
                Err(Violation::new("S5", text).at(1 << sector))
            }
        }
    }

    /// The sectors of durable writes that have ended and wait for their flush.
    fn just_written(&self) -> u64 {
        let waits = |pending: &&Pending| {
            let mut engines = self.engines.iter();
            engines.any(|engine| engine.waits_for_flush(pending.tag))
        };
        let written = self.pending.iter().filter(waits);
        written.fold(0, |mask, pending| mask | self.plan.mask(pending.range))
    }

    /// S5: a vote does not leave fewer than t fresh copies where there were t: no flush would
    /// succeed before others are written.
    fn check_enough_hold(&self, decided: u64, earlier: &View) -> Checked {
        let faults = self.plan.faults;
        // Where writes fail, nothing else can be done.
        let fails = (faults.write_error | faults.full | faults.unreadable | faults.hang) != 0;
        // A write of another worker may have decided while a replica failed.
        if fails || self.overlapped || self.before_input.failures != self.ledger.failures {
            return Ok(());
        }
        let disk = self.plan.mask(self.plan.disk());
        for sector in bits(decided) {
            let is_fresh = |r: usize, view: &View| view.stale[r] >> sector & 1 == 0;
            // One that was added meanwhile is stale everywhere, and was not known before.
            let is_new = |r: usize| self.view.stale[r] & disk == disk;
            let before = |r: &usize| is_fresh(*r, earlier) && !self.is_evicted(*r) && !is_new(*r);
            let before = self.members().filter(before).count();
            let now = self.members().filter(|r| is_fresh(*r, &self.view)).count();
            if before >= self.thresholds.most && now < self.thresholds.least {
                let text = format!("{sector} is recovered, and {now} hold it: {before} before");
                return Err(Violation::new("S5", text).at(1 << sector));
            }
        }
        Ok(())
    }

    /// S5: no other copy that may vote is held by more replicas. Before what does not hold it is
    /// known to be stale.
    fn check_most_hold(&self, sector: usize, value: Value, earlier: &View) -> Checked {
        let faults = self.plan.faults;
        // Not where some could not be read, or were changed meanwhile.
        let touched = self.untouched >> sector & 1 == 0;
        let any_failed = self.before_input.failures != self.ledger.failures;
        // One that has rejoined was perhaps not asked.
        let any_evicted = self.evicted_at.iter().any(|at| !at.is_empty());
        if touched || any_failed || any_evicted {
            return Ok(());
        }
        let changes = faults.rot | faults.misdirected;
        if (faults.read_error | faults.unreadable | faults.hang | changes) != 0 {
            return Ok(());
        }
        if self.plan.read_pattern == ReadPattern::Fifo {
            return Ok(());
        }
        let may_vote = |replica: &usize| {
            earlier.stale[*replica] >> sector & 1 == 0 && !self.is_evicted(*replica)
        };
        let held = |replica: usize| self.replicas[replica].value(sector);
        let votes = |value: Value| {
            let voters = self.members().filter(may_vote);
            voters.filter(|replica| held(*replica) == value).count()
        };
        let others = self.members().filter(may_vote);
        let most = others.map(|replica| votes(held(replica))).max();
        if most.is_some_and(|most| most > votes(value)) {
            let text = format!("{sector} is recovered as {value}, and more replicas hold another");
            return Err(Violation::new("S5", text).at(1 << sector));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::plan::Plan;

    /// Three replicas after a crash: the last one has lost what the others have written last, which
    /// no flush of the guest covers. `honest`: it has told so. Returns where they may be wrong.
    fn wrong_after_crash(marked: u64, honest: bool) -> Vec<bool> {
        let mut world = World::planned(1, |plan| Plan {
            replicas: 3,
            threshold: 2,
            sectors: 1,
            block_sectors: 1,
            records: true,
            ..plan
        });
        let value = Value::written(1, 0);
        world.model.write_began(0, value, 3);
        world.model.write_ended(0, value, 4, true, false);
        world.replicas[0].write(0, value);
        world.replicas[1].write(0, value);
        world.model.crashed(5);
        world.now = 6;
        let mut before = Ledger::default();
        before.corrupt[2] = u64::from(!honest);
        let checked = world.check_after_crash(
            0,
            &before,
            (&Masks::default(), &Masks::default(), false),
            marked,
        );
        assert_eq!(checked.is_err(), marked == 0 && honest);
        let wrong = world
            .members()
            .map(|replica| world.ledger.wrong(replica) != 0);
        wrong.collect()
    }

    /// A flush has failed on the only replica, which has lost what was written before it: the
    /// daemon was killed after it had heard of that, or the host has crashed.
    #[test]
    fn a_doubtful_copy_may_be_wrong_after_a_kill() {
        for killed in [false, true] {
            let mut world = World::planned(1, |plan| Plan {
                replicas: 1,
                sectors: 1,
                block_sectors: 1,
                ..plan
            });
            let written = Value::written(1, 0);
            world.model.write_began(0, written, 3);
            world.model.write_ended(0, written, 4, true, true);
            world.model.killed(5);
            world.now = 6;
            world.ledger.excused[0] = 1;
            let before = Ledger::default();
            let checked = world.check_after_crash(
                0,
                &before,
                (&Masks::default(), &Masks::default(), killed),
                1,
            );
            assert_eq!(checked.is_ok(), killed);
            assert_eq!(world.ledger.corrupt[0], u64::from(killed));
        }
    }

    #[test]
    fn a_copy_that_has_lied_is_wrong_where_nothing_is_marked() {
        assert_eq!(wrong_after_crash(0, false), [false, false, true]);
        assert_eq!(wrong_after_crash(1, false), [false; 3], "any copy is legal");
        assert_eq!(wrong_after_crash(0, true), [false; 3], "it must be marked");
    }
}
