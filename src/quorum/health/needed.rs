//! Which replicas the disk cannot lose from service (contract W6).

use super::Health;
use crate::common::ranges::every_sector;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::REPLICAS_MAX;

impl Health {
    /// Whether without `replica` fewer than t would be left that are in service, or that are in
    /// service and fresh in some sector where now there are enough; or a write or flush that runs
    /// could no longer succeed; or the records could not be changed.
    pub(super) fn is_needed(&self, replica: ReplicaIndex) -> bool {
        let mut others = self.in_service;
        others.remove(replica);
        others.len() < self.threshold
            || self.is_needed_to_succeed(replica)
            || self.is_needed_by_records(replica)
            || self.has_needed_copies(others)
            || (self.flushing.is_some() && self.has_copies_needed_by_flush(replica))
    }

    fn has_needed_copies(&self, others: ReplicaSet) -> bool {
        let enough_without = |stale: ReplicaSet| others.without(stale).len() >= self.threshold;
        let enough_with =
            |stale: ReplicaSet| self.in_service.without(stale).len() >= self.threshold;
        let stale = self
            .members
            .iter()
            .map(|member| (member, &self.replicas[member.as_usize()].stale));
        !every_sector(stale, self.capacity_sectors, enough_without, |stale| {
            enough_without(stale) || !enough_with(stale)
        })
    }

    /// Whether a write or a flush in flight has just enough replicas that may still succeed.
    fn is_needed_to_succeed(&self, replica: ReplicaIndex) -> bool {
        let needs = |may_succeed: ReplicaSet| {
            may_succeed.contains(replica) && may_succeed.and(self.members).len() == self.threshold
        };
        self.may_succeed().any(needs) || self.flushing.is_some_and(needs)
    }

    /// Whether the running flush would fail because `replica`, evicted now, has not confirmed what
    /// too few others hold.
    fn has_copies_needed_by_flush(&self, replica: ReplicaIndex) -> bool {
        let unconfirmed = &self.replicas[replica.as_usize()].unconfirmed;
        if unconfirmed.is_empty() {
            return false;
        }
        let lacking = self.members.iter().flat_map(|member| {
            let state = &self.replicas[member.as_usize()];
            [(member, &state.stale), (member, &state.uncovered)]
        });
        // The sectors that it has not confirmed, in the name of a place that is free.
        let mut free = ReplicaSet::first(REPLICAS_MAX).without(self.members).iter();
        let mark = free.next();
        let marked = mark.into_iter().flat_map(|mark| {
            let sets = unconfirmed.iter();
            sets.map(move |(_, written)| (mark, written))
        });
        let sets = lacking.chain(marked);
        let is_certain = |lacking: ReplicaSet| {
            let confirmed = mark.is_some_and(|mark| !lacking.contains(mark));
            confirmed || self.members.without(lacking).len() > self.threshold
        };
        !every_sector(sets, self.capacity_sectors, is_certain, |lacking| {
            let holders = self.members.without(lacking);
            is_certain(lacking) || !holders.contains(replica) || holders.len() < self.threshold
        })
    }
}
