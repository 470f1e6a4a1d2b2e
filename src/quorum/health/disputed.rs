//! Where replicas may differ although no replica is at fault, and how that ends (contract W7).
//!
//! A write that fails leaves old or new data on each replica, and both are legal: its range is
//! *undecided* until a vote, or a write that succeeds, decides it. A vote that decides it makes
//! every member stale that is not known to hold the winner, so that no other version can win later.

use super::Health;
use crate::common::{ReplicaIndex, SectorRange};

/// The parts of a range in which a difference is no fault.
#[derive(Clone, Debug, Default)]
pub struct Disputed {
    /// A write has failed there, and no vote has decided yet which version the disk holds.
    pub undecided: Vec<SectorRange>,
}

impl Disputed {
    /// Whether any difference is a fault.
    pub fn is_empty(&self) -> bool {
        self.undecided.is_empty()
    }
}

impl Health {
    /// Whether anything is undecided.
    pub fn anything_undecided(&self) -> bool {
        !self.undecided.is_empty()
    }

    /// Whether a sector of `range` is undecided.
    pub fn is_undecided(&self, range: SectorRange) -> bool {
        self.undecided.overlaps(range)
    }

    /// The parts of `range` in which a difference is no fault.
    pub fn disputed(&self, range: SectorRange) -> Disputed {
        Disputed {
            undecided: self.undecided.within(range),
        }
    }

    /// A vote has decided `decided`. The replicas in `others` are not known to hold the winner in
    /// these parts of it. `true` if a replica is stale now that was stale nowhere before.
    pub fn decide(
        &mut self,
        decided: &[SectorRange],
        others: &[(ReplicaIndex, Vec<SectorRange>)],
    ) -> bool {
        for range in decided {
            self.undecided.remove(*range);
        }
        let mut became_stale = false;
        let members = self.members;
        for (replica, ranges) in others.iter().filter(|(r, _)| members.contains(*r)) {
            if ranges.is_empty() {
                continue;
            }
            self.failure_epoch.0 += 1;
            let state = &mut self.replicas[replica.as_usize()];
            became_stale |= state.stale.is_empty();
            // A read in flight may have seen what it holds, even if the winner is there by the time
            // the reply comes.
            state.last_doubt = self.failure_epoch;
            for range in ranges {
                state.stale.insert(*range);
            }
        }
        became_stale
    }
}
