//! What the engines know of the health of the replicas, as masks: read again only when it has
//! changed.

use super::ledger::Masks;
use super::plan::{bits, mask_of};
use crate::common::{ReplicaIndex, SectorRange};
use crate::engine::Shared;
use crate::quorum::health::Health;

/// See the [module](self).
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct View {
    /// [`Shared::health_changes`] when this was read; `None`: never.
    changes: Option<u64>,
    /// Where each replica counts as stale.
    pub(super) stale: Masks,
    /// Where a write has failed, and no vote has decided what the disk holds.
    pub(super) undecided: u64,
    /// Those of them in which any copy is legal (S5).
    pub(super) unrecovered: u64,
    /// Whether the next flush of the guest fails, because writes may be undone.
    pub(super) owes_failure: bool,
}

impl View {
    /// Reads what has changed on the whole disk.
    pub(super) fn refresh(&mut self, shared: &Shared, disk: SectorRange) {
        let changes = Some(shared.health_changes());
        if self.changes != changes {
            *self = shared.jobs(|_| (), |_, health| Self::of(health, disk));
            self.changes = changes;
        }
    }

    fn of(health: &Health, disk: SectorRange) -> Self {
        let mut stale = Masks::default();
        for replica in bits(u64::from(health.stale().bits())) {
            let index = ReplicaIndex(u8::try_from(replica).expect("few"));
            stale[replica] = mask_of(health.stale_parts(index, disk));
        }
        let undecided = match health.anything_undecided() {
            true => mask_of(health.undecided_parts(disk)),
            false => 0,
        };
        Self {
            changes: None,
            stale,
            undecided,
            unrecovered: mask_of(health.unrecovered().iter()),
            owes_failure: health.owes_failure(),
        }
    }
}
