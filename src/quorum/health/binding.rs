//! Which replicas the records need: without them no change of the members could come into force,
//! and whatever waits for the records would fail (contract S3, W6).

use super::Health;
use crate::common::{ReplicaIndex, ReplicaSet};

/// A table of the records that is in force, or may soon be. The next one can come into force only
/// if no start without the replicas in service could begin with this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// Its active members.
    pub active: ReplicaSet,
    /// Its other members.
    pub inactive: ReplicaSet,
    /// How many members it has besides: they are in no place any more.
    pub gone: usize,
    /// Its vote threshold.
    pub votes: usize,
}

impl Binding {
    /// Whether the replicas in `holders` keep all others from going on with this table: as many as
    /// decide are active in it, or the others are too few to decide.
    fn is_bound_by(&self, holders: ReplicaSet) -> bool {
        let others = self.active.or(self.inactive).without(holders);
        self.active.and(holders).len() >= self.votes || self.gone + others.len() < self.votes
    }
}

impl Health {
    /// These are the tables in force, or that may soon be. Without records there are none.
    pub fn bind(&mut self, bindings: Vec<Binding>) {
        self.bindings = bindings;
    }

    /// Whether the records can say who is in service, and could not without `replica`.
    pub(super) fn is_needed_by_records(&self, replica: ReplicaIndex) -> bool {
        let mut others = self.in_service;
        others.remove(replica);
        let mut bindings = self.bindings.iter();
        bindings.any(|binding| binding.is_bound_by(self.in_service) && !binding.is_bound_by(others))
    }
}

#[cfg(test)]
mod tests {
    use super::super::NotRemoved;
    use super::super::tests::{A, B, C, D, set};
    use super::*;

    fn binding(active: &[ReplicaIndex], inactive: &[ReplicaIndex], votes: usize) -> Binding {
        Binding {
            active: set(active),
            inactive: set(inactive),
            gone: 0,
            votes,
        }
    }

    #[test]
    fn a_replica_without_which_the_records_cannot_be_changed_is_needed() {
        let mut health = Health::new(ReplicaSet::first(4), 2, 1, 1 << 22);
        assert!(health.evict(D));
        health.bind(vec![binding(&[A, B, C], &[D], 2)]);
        assert!(health.evict(C));
        // The records do not say yet that it is in service again, nor that the last one is not.
        assert!(health.rejoin(D, 0));
        assert!(!health.can_evict(B), "the first and the third could go on");
        assert_eq!(health.check_removal(B), Err(NotRemoved::NotRecorded));
        assert!(health.loss_of(B).is_err());
        health.bind(vec![
            binding(&[A, B, C], &[D], 2),
            binding(&[A, B, D], &[C], 2),
        ]);
        assert!(!health.can_evict(B), "the new one may not come into force");
        health.bind(vec![binding(&[A, B, D], &[C], 2)]);
        assert!(health.can_evict(B));
        health.bind(vec![binding(&[A, B], &[C, D], 2)]);
        assert!(!health.can_evict(B));
        // Too few others are left to go on alone.
        let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
        assert!(health.evict(A));
        assert!(health.rejoin(A, 0));
        health.bind(vec![binding(&[B, C], &[A], 2)]);
        assert!(health.can_evict(B));
        health.bind(vec![Binding {
            gone: 1,
            ..binding(&[B, C], &[A], 2)
        }]);
        assert!(!health.can_evict(B));
    }

    #[test]
    fn what_is_not_bound_anyway_needs_no_replica() {
        let mut health = Health::new(ReplicaSet::first(4), 2, 1, 1 << 22);
        health.bind(vec![Binding {
            gone: 5,
            ..binding(&[A], &[], 5)
        }]);
        assert!(health.can_evict(A));
    }
}
