//! The operator gives up a replica that the disk needs (W11): what is lost is what the engines say,
//! and they say no more than may be lost.

use super::Violation;
use super::operator::index;
use super::pending::PendingKind;
use super::plan::{PLACES, bits, mask_of};
use super::state::{Checked, World, trace};

/// What the engines say is lost with a replica, as masks of sectors.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Lost {
    /// Too few others have a copy that may vote, or are known to have one.
    pub(super) copies: u64,
    /// Too few others have it on disk.
    pub(super) durable: u64,
    /// Undecided, and the replica may have voted.
    pub(super) undecided: u64,
}

impl World {
    /// Removes a replica whose removal was refused for what it holds.
    pub(super) fn fail_replica(&mut self, place: usize) -> Checked {
        let mut events = Vec::new();
        let failed = self.shared.fail(index(place), |event| events.push(event));
        let loss = failed.map_err(|reason| {
            let text = format!("replica {place} of {:b} stays: {reason}", self.members);
            Violation::new("W11", text)
        })?;
        trace!(self, "operator: replica {place} is given up: {loss:?}");
        if loss.is_empty() {
            let text = format!("nothing is lost with replica {place}, and its removal was refused");
            return Err(Violation::new("W11", text));
        }
        self.statistics.given_up += 1;
        let [lost, doubtful, durable, undecided] = [
            &loss.lost,
            &loss.doubtful,
            &loss.not_durable,
            &loss.undecided,
        ]
        .map(|set| mask_of(set.iter()));
        let copies = lost | doubtful;
        let lost = Lost {
            copies,
            durable: copies | durable,
            undecided,
        };
        // What the running flush has asked may be too few replicas now.
        for pending in &mut self.pending {
            if matches!(pending.kind, PendingKind::Flush) {
                pending.seen.excused = [u64::MAX; PLACES];
            }
        }
        self.ledger.given_up |= mask_of(loss.lost.iter());
        self.ledger.at_risk |= lost.durable;
        self.ledger.lost_by_crash |= lost.durable;
        self.is_removed(place, lost, events)?;
        // There is no winner before the guest has written there.
        for member in 0..PLACES {
            let stale = self.ledger.excused[member];
            self.ledger.unsound[member] |= stale & self.ledger.given_up;
        }
        self.check_loss(lost)
    }

    /// What counts as lost is stale on so many that are left that too few are fresh.
    fn check_loss(&self, lost: Lost) -> Checked {
        for sector in bits(lost.copies) {
            let is_fresh = |r: &usize| self.ledger.excused[*r] >> sector & 1 == 0;
            let fresh = self.members().filter(is_fresh).count();
            if fresh >= self.threshold {
                let text = format!("{sector} counts as lost, and {fresh} hold it");
                return Err(Violation::new("W11", text).at(1 << sector));
            }
        }
        Ok(())
    }
}
