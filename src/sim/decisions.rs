//! W7: what a failed write has left is decided by a vote, once, and without an accusation.

use super::Violation;
use super::plan::bits;
use super::state::{Checked, World, trace};

impl World {
    /// Notes whether the engines owe the guest a failed flush, before and after an input. Comes
    /// after [`Self::note_decisions`].
    pub(super) fn note_owed(&mut self) {
        self.owed = [self.owed[1], self.view.owes_failure];
    }

    /// Notes which sectors of failed writes a vote has decided. From then on every replica that is
    /// not stale there holds the winner.
    pub(super) fn note_decisions(&mut self) -> Checked {
        let earlier = self.view_before;
        self.view.refresh(&self.shared, self.plan.disk());
        self.note_recovered(&earlier)?;
        if self.ledger.mixed == 0 && self.undecided == 0 && self.view.undecided == 0 {
            return Ok(());
        }
        let undecided = self.view.undecided;
        let before = std::mem::replace(&mut self.undecided, undecided);
        let decided = before & !undecided;
        if decided == 0 {
            return Ok(());
        }
        let members: Vec<usize> = self.members().collect();
        let stale = members.iter().map(|member| self.view.stale[*member]);
        let stale: Vec<u64> = stale.collect();
        for replica in &members {
            self.staleness.possible[*replica] |= decided;
        }
        for (replica, stale) in members.iter().zip(&stale) {
            let against = decided & stale & !self.ledger.excused[*replica];
            self.staleness.decided_against[*replica] |= against;
        }
        for sector in bits(decided & self.ledger.accusable) {
            // Whatever has won: those that are stale may be so.
            for (replica, stale) in members.iter().zip(&stale) {
                let lost = stale & (1 << sector);
                self.mark_excused(*replica, lost);
                self.ledger.unsound[*replica] |= lost;
            }
        }
        for sector in bits(decided & self.ledger.mixed & !self.ledger.accusable) {
            let bit = 1 << sector;
            let mut winner = None;
            for (replica, stale) in members.iter().zip(&stale) {
                if stale & bit != 0 {
                    self.mark_excused(*replica, bit);
                    self.ledger.unsound[*replica] |= bit;
                    continue;
                }
                if self.ledger.wrong(*replica) & bit != 0 {
                    continue;
                }
                if self.hides_a_hole(*replica, sector) {
                    // It has lied about a flush, and was found to be equal to other holes.
                    self.mark_corrupt(*replica, bit);
                    continue;
                }
                let value = self.replicas[*replica].value(sector);
                if *winner.get_or_insert(value) != value {
                    let text = format!("{sector} is decided, and still differs: {value}");
                    return Err(Violation::new("W7", text).at(bit));
                }
            }
            trace!(self, at bit, "{sector} is decided: {winner:?}");
            self.ledger.mixed &= !bit;
        }
        Ok(())
    }
}
