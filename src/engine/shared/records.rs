//! What the records say of the replicas, at the start and while the disk is served (S2, S5).

use super::Shared;
use crate::common::ReplicaIndex;
use crate::common::ranges::RangeSet;
use crate::jobs::JobEvent;
use crate::quorum::health::{Health, Remembered};

impl Shared {
    /// At the start, before there is an engine: the image of the member `replica` is not open, and
    /// it is stale in `stale` ([W13](Health::leave_out)).
    ///
    /// # Panics
    /// If fewer than t members are left in service.
    pub fn leave_out(&self, replica: ReplicaIndex, stale: &RangeSet) {
        self.change_health(|health| health.leave_out(replica, stale));
    }

    /// The image of a missing member is open, and every worker has its file: it rejoins as an
    /// evicted replica does. It turns out to be stale in `stale` too. A tick of every engine must
    /// follow. `false` if it is not missing.
    pub fn found(&self, replica: ReplicaIndex, stale: &RangeSet) -> bool {
        self.change_health(|health| health.found(replica, stale))
    }

    /// What the records must say of the replicas now (S2).
    pub fn remembered(&self) -> Remembered {
        self.health(Health::snapshot).remembered()
    }

    /// At the start: the records say this of the replicas, and that the last daemon has ended while
    /// `changed` was being changed. Begins to recover that (S5).
    pub fn restore(&self, remembered: &Remembered, changed: &RangeSet, tell: impl FnMut(JobEvent)) {
        self.change_health(|health| health.restore(remembered, changed));
        if !changed.is_empty() {
            // There are not too many.
            let _ = self.jobs(tell, |jobs, health| jobs.recover(health));
        }
    }
}
