//! What an operator changes while the disk is served.

use super::Shared;
use crate::common::{NOT_POISONED, ReplicaIndex};
use crate::engine::repair_gate::UnaskedRepairs;
use crate::jobs::{JobEvent, NotStarted};
use crate::quorum::health::{Health, Loss, NotRemoved, NotThreshold, Preferable, Wanted};

impl Shared {
    /// Makes `replica`, whose place is free, a member: writes go to it from now on, and it votes on
    /// what they have written. A tick of every engine must follow.
    pub fn add(&self, replica: ReplicaIndex) {
        self.change_health(|health| {
            health.add(replica);
        });
    }

    /// Removes `replica` from the disk. A tick of every engine must follow; its place is free when
    /// one of them reports so ([`Effects::released`](crate::engine::Effects::released)).
    ///
    /// # Errors
    /// If it is needed; then nothing has changed.
    pub fn remove(
        &self,
        replica: ReplicaIndex,
        tell: impl FnMut(JobEvent),
    ) -> Result<(), NotRemoved> {
        loop {
            let snapshot = self.health(Health::snapshot);
            snapshot.check_removal(replica)?;
            if self.change_health(|health| health.remove_as_on(&snapshot, replica))? {
                break;
            }
        }
        self.jobs(tell, |jobs, health| jobs.removed(replica, health));
        Ok(())
    }

    /// What would be lost with `replica` (W11).
    ///
    /// # Errors
    /// If it cannot be removed whatever is lost.
    pub fn loss_of(&self, replica: ReplicaIndex) -> Result<Loss, NotRemoved> {
        self.health(Health::snapshot).loss_of(replica)
    }

    /// Removes `replica` from the disk like [`Self::remove`], whatever is lost with it. Returns
    /// what is.
    ///
    /// # Errors
    /// If too few replicas would be left; then nothing has changed.
    pub fn fail(
        &self,
        replica: ReplicaIndex,
        tell: impl FnMut(JobEvent),
    ) -> Result<Loss, NotRemoved> {
        let loss = loop {
            let snapshot = self.health(Health::snapshot);
            let loss = snapshot.loss_of(replica)?;
            let failed = |health: &mut Health| health.fail_as_on(&snapshot, loss, replica);
            if let Some(loss) = self.change_health(failed)? {
                break loss;
            }
        };
        self.jobs(tell, |jobs, health| jobs.removed(replica, health));
        Ok(loss)
    }

    /// What `replica` could decide if the operator preferred it (W12).
    ///
    /// # Errors
    /// If that is nothing.
    pub fn preferable(&self, replica: ReplicaIndex) -> Result<Preferable, NotStarted> {
        let (snapshot, undecided) = self.health(|h| (h.snapshot(), h.unresolved().clone()));
        if !snapshot.in_service().contains(replica) {
            return Err(NotStarted::NotInService);
        }
        if undecided.is_empty() {
            return Err(NotStarted::NothingUndecided);
        }
        let preferable = snapshot.preferable(replica, undecided);
        match preferable.sectors {
            0 => Err(NotStarted::NotUpToDate),
            _ => Ok(preferable),
        }
    }

    /// The vote threshold is to be `wanted` from now on (W10). A tick of the first engine must
    /// follow.
    ///
    /// # Errors
    /// If the disk has not so many replicas.
    pub fn want_threshold(&self, wanted: Wanted) -> Result<(), NotThreshold> {
        self.change_health(|health| {
            health.want_threshold(wanted)?;
            health.raise_threshold();
            Ok(())
        })
    }

    /// The vote threshold, the one that is wanted, and whether it follows the number of replicas.
    pub fn thresholds(&self) -> (usize, usize, bool) {
        self.health(|health| {
            let (now, wanted) = (health.threshold(), health.wanted_threshold());
            (now, wanted, health.threshold_follows())
        })
    }

    /// The disk grows to `capacity_sectors`, and every replica holds zeroes in the new sectors. To
    /// be called before any request may reach them.
    pub fn grow(&self, capacity_sectors: u64) {
        let mut jobs = self.jobs.lock().expect(NOT_POISONED);
        jobs.grow(capacity_sectors);
        if let Some(marks) = &mut self.state().marks {
            marks.grow(capacity_sectors);
        }
        self.change_health(|health| health.grow(capacity_sectors));
    }

    /// Which repairs are done unasked, if any are (O5, O6).
    pub fn unasked_repairs(&self) -> UnaskedRepairs {
        self.state().repairs.state()
    }

    /// Begins to compare the replicas, before which nothing is repaired unasked (O6).
    pub fn compare_first(&self, tell: impl FnMut(JobEvent)) {
        self.state().repairs.compare_first();
        // There is no other job.
        let _ = self.jobs(tell, |jobs, health| jobs.scrub(false, 0, health));
    }
}

#[cfg(all(test, not(feature = "loom")))]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_is_added_after_growth_is_stale_to_the_new_end() {
        let shared = Shared::new(3, 2, 1, 64);
        shared.grow(256);
        let added = ReplicaIndex(3);
        shared.add(added);
        assert_eq!(shared.stale_sectors(added), 256);
    }
}
