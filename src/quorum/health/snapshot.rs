//! Decisions that take a look at every sector of the disk. They are made on a copy, whose sets are
//! shared, so that the mutex of all workers is not held meanwhile. Then, under the mutex, the same
//! question is asked of the sectors that have changed since.
//!
//! Sets that are not needed any more are kept until the mutex is released: to free one takes time
//! in proportion to its ranges.

use super::replica::ReplicaHealth;
use super::{Health, NotRemoved, Prepared};
use crate::common::ranges::{RangeSet, every_sector};
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::limits::CHANGES_SINCE_SNAPSHOT_MAX;

/// Which sectors are durable on which member, once all replies to a flush are in.
#[derive(Debug)]
pub struct Durability {
    members: ReplicaSet,
    threshold: usize,
    capacity_sectors: u64,
    not_durable: Vec<(ReplicaIndex, RangeSet)>,
    given_up: RangeSet,
}

impl Durability {
    /// Whether every acknowledged sector is durable on at least t members, except for what the
    /// operator has given up (W11).
    pub fn is_enough(&self) -> bool {
        let needed = |set: &RangeSet| {
            let mut set = set.clone();
            set.remove_all(&self.given_up);
            set
        };
        let without_lost: Vec<_> = match self.given_up.is_empty() {
            true => Vec::new(),
            false => {
                let sets = self.not_durable.iter();
                sets.map(|(member, set)| (*member, needed(set))).collect()
            }
        };
        let sets = match self.given_up.is_empty() {
            true => &self.not_durable,
            false => &without_lost,
        };
        let sets = sets.iter().map(|(member, set)| (*member, set));
        let enough = |without| self.members.without(without).len() >= self.threshold;
        every_sector(sets, self.capacity_sectors, enough, enough)
    }

    /// The replicas of the disk.
    pub fn members(&self) -> ReplicaSet {
        self.members
    }

    /// The vote threshold.
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// The flush has come back with success from `succeeded`. Whether `range`, which was written
    /// before it began, is durable on at least t members, however it stands with the rest of the
    /// disk.
    pub fn is_durable(&self, range: SectorRange, succeeded: ReplicaSet) -> bool {
        let flushed = succeeded.and(self.members);
        let sets = self.not_durable.iter();
        let sets = sets.filter(|(member, _)| flushed.contains(*member));
        let parts = |set: &RangeSet| {
            let mut parts = RangeSet::default();
            for part in set.within(range) {
                parts.insert(part);
            }
            parts
        };
        let sets: Vec<_> = sets.map(|(member, set)| (*member, parts(set))).collect();
        let sets = sets.iter().map(|(member, set)| (*member, set));
        let enough = |without| flushed.without(without).len() >= self.threshold;
        every_sector(sets, range.end(), enough, enough)
    }
}

impl Health {
    /// Once all replies to a flush are in, the fresh sectors are the durable ones, as far as they
    /// were fresh when it began. One flush runs at a time.
    pub fn durability(&self) -> Durability {
        let sets = self.members.iter().flat_map(|member| {
            let state = &self.replicas[member.as_usize()];
            [(member, &state.stale), (member, &state.uncovered)]
        });
        Durability {
            members: self.members,
            threshold: self.threshold,
            capacity_sectors: self.capacity_sectors,
            not_durable: sets
                .filter(|(_, set)| !set.is_empty())
                .map(|(member, set)| (member, set.clone()))
                .collect(),
            given_up: self.given_up_before_flush.clone(),
        }
    }

    /// A copy to make a decision on.
    pub fn snapshot(&self) -> Self {
        Self {
            replicas: self.replicas.clone(),
            written: self.written.clone(),
            writing: self.writing.clone(),
            undecided: self.undecided.clone(),
            unrecovered: self.unrecovered.clone(),
            unresolved: RangeSet::default(),
            given_up: RangeSet::default(),
            given_up_before_flush: RangeSet::default(),
            once_given_up: RangeSet::default(),
            undone: self.undone.clone(),
            bindings: self.bindings.clone(),
            garbage: Vec::new(),
            ..*self
        }
    }

    /// Evicts a replica like [`Self::evict`]. On `snapshot`, which was this a moment ago,
    /// [`Self::can_evict`] was true, and the `loss` was prepared. `None` if too much has changed
    /// since.
    pub fn evict_as_on(&mut self, snapshot: &Self, loss: &mut Prepared) -> Option<bool> {
        let replica = loss.replica();
        let changed_since_loss = self.changed_since_loss(loss)?;
        let changed = self.changed_since(snapshot)?;
        let can_evict = changed.can_evict(replica);
        if can_evict {
            self.evict_not_needed(replica, Some((loss, changed_since_loss)));
        }
        Some(can_evict)
    }

    /// Removes `replica` like [`Self::remove`]. On `snapshot`, which was this a moment ago,
    /// [`Self::check_removal`] succeeded. `false` if too much has changed since.
    ///
    /// # Errors
    /// As of [`Self::check_removal`].
    pub fn remove_as_on(
        &mut self,
        snapshot: &Self,
        replica: ReplicaIndex,
    ) -> Result<bool, NotRemoved> {
        let Some(changed) = self.changed_since(snapshot) else {
            return Ok(false);
        };
        changed.check_removal(replica)?;
        self.remove(replica);
        Ok(true)
    }

    /// The sets that are not needed any more, to be freed without the mutex.
    pub fn take_garbage(&mut self) -> Vec<RangeSet> {
        std::mem::take(&mut self.garbage)
    }

    /// A copy in which only the sectors are not fresh of which that has changed since `snapshot`.
    /// `None` if there are too many of them, or the set of replicas has changed.
    fn changed_since(&self, snapshot: &Self) -> Option<Self> {
        self.changes_since(snapshot).map(|(_, copy)| copy)
    }

    /// The same, with the sectors that have changed.
    pub(super) fn changes_since(&self, snapshot: &Self) -> Option<(RangeSet, Self)> {
        let same = self.members == snapshot.members
            && self.in_service == snapshot.in_service
            && self.flushing == snapshot.flushing
            && self.threshold == snapshot.threshold
            && self.wanted == snapshot.wanted
            && self.capacity_sectors == snapshot.capacity_sectors;
        if !same {
            return None;
        }
        let (mut changed, mut steps) = (RangeSet::default(), CHANGES_SINCE_SNAPSHOT_MAX);
        for member in self.members.iter() {
            let index = member.as_usize();
            let (now, earlier) = (&self.replicas[index], &snapshot.replicas[index]);
            let sets = now.sets().zip(earlier.sets());
            for (now, earlier) in sets {
                now.changes_since(earlier, &mut steps, &mut changed)
                    .then_some(())?;
            }
            let epochs = |state: &ReplicaHealth| -> Vec<_> {
                state.unconfirmed.iter().map(|(epoch, _)| *epoch).collect()
            };
            if epochs(now) != epochs(earlier) {
                return None;
            }
        }
        let (now, earlier) = (&self.undecided, &snapshot.undecided);
        now.changes_since(earlier, &mut steps, &mut changed)
            .then_some(())?;
        let mut copy = self.snapshot();
        copy.undecided = copy.undecided.part_in(&changed);
        for state in &mut copy.replicas {
            *state = state.part_in(&changed);
        }
        Some((changed, copy))
    }
}
