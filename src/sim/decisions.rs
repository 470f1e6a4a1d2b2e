//! W7: what a failed write has left is decided by a vote, once, and without an accusation.

use super::Violation;
use super::plan::{bits, mask_below};
use super::state::{Checked, World, trace};
use crate::common::{ReplicaIndex, SectorRange};

impl World {
    /// Notes whether the engines owe the guest a failed flush, before and after an input.
    pub(super) fn note_owed(&mut self) {
        let owes = self.shared.jobs(|_| (), |_, health| health.owes_failure());
        self.owed = [self.owed[1], owes];
    }

    /// Notes which sectors of failed writes a vote has decided. From then on every replica that is
    /// not stale there holds the winner.
    pub(super) fn note_decisions(&mut self) -> Checked {
        let anything = || {
            self.shared
                .jobs(|_| (), |_, health| health.anything_undecided())
        };
        if self.ledger.mixed == 0 && self.undecided == 0 && !anything() {
            return Ok(());
        }
        let disk = self.plan.disk();
        let mask = |runs: Vec<SectorRange>| {
            let run = |run: &SectorRange| mask_below(run.count) << run.start;
            runs.iter().fold(0_u64, |mask, range| mask | run(range))
        };
        let members: Vec<usize> = self.members().collect();
        let (undecided, stale): (u64, Vec<u64>) = self.shared.jobs(
            |_| (),
            |_, health| {
                let index = |r: &usize| ReplicaIndex(u8::try_from(*r).expect("few"));
                let stale = |r| mask(health.stale_parts(index(r), disk));
                let undecided = mask(health.disputed(disk, 0).undecided);
                (undecided, members.iter().map(stale).collect())
            },
        );
        let before = std::mem::replace(&mut self.undecided, undecided);
        let decided = before & !undecided;
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
                self.mark_excused(*replica, stale & (1 << sector));
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
