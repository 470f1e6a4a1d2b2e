//! Which replicas are members and in service: added and removed, evicted and rejoined.

use super::replica::ReplicaHealth;
use super::{Health, Prepared};
use crate::common::ranges::{RangeSet, every_sector};
use crate::common::runs;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};

/// Why a replica cannot be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotRemoved {
    /// It is not a replica of the disk.
    #[error("it is no replica of this disk")]
    NoMember,
    /// Fewer than t replicas would remain.
    #[error("fewer replicas than the vote threshold would be left")]
    TooFew,
    /// Other replicas are evicted, so that fewer than t would remain in service.
    #[error("fewer replicas than the vote threshold would be left in service")]
    TooFewInService,
    /// The records could not say any more who is in service (S3).
    #[error(
        "replicas were evicted or have rejoined, and the records of the others cannot say so \
         without this one"
    )]
    NotRecorded,
    /// Too few other replicas hold some sector up to date.
    #[error("there are sectors that too few other replicas hold up to date")]
    LastCopies,
    /// Too few other replicas have some sector on stable storage: a crash would lose it.
    #[error("there are sectors that too few other replicas have on stable storage")]
    LastDurableCopies,
    /// A write has failed, and a vote on what it has left may need the copies of this replica.
    #[error("a write has failed, and no read has decided yet what the disk holds there: scrub it")]
    Undecided,
}

impl Health {
    /// Makes `replica` a member, in service and stale everywhere. Its place must be free.
    pub fn add(&mut self, replica: ReplicaIndex) {
        assert!(
            !self.members.or(self.releasing).contains(replica),
            "its place is taken"
        );
        while self.replicas.len() <= replica.as_usize() {
            self.replicas.push(ReplicaHealth::default());
        }
        let mut state = ReplicaHealth::default();
        state.mark_missed(SectorRange::new(0, self.capacity_sectors));
        state.behind.clone_from(&state.stale);
        // A flush in flight does not cover it.
        state.uncovered.clone_from(&state.stale);
        state.blank.clone_from(&state.stale);
        self.replicas[replica.as_usize()] = state;
        self.members.insert(replica);
        self.in_service.insert(replica);
        self.arrivals += 1;
        self.memory += 1;
        self.check_sets();
    }

    /// Removes `replica`, a member that is not needed, from the disk. Its place is free when every
    /// worker has released it.
    pub fn remove(&mut self, replica: ReplicaIndex) {
        assert!(self.members.contains(replica), "not a member");
        self.threshold = self.threshold_without_one();
        self.members.remove(replica);
        self.in_service.remove(replica);
        self.missing.remove(replica);
        self.coarse.remove(replica);
        self.releasing.insert(replica);
        self.failure_epoch.0 += 1;
        self.memory += 1;
        let mut state = ReplicaHealth::default();
        // Its earlier replies do not count any more.
        state.mark_missed(SectorRange::new(0, self.capacity_sectors));
        state.behind.clone_from(&state.stale);
        state.last_failure = self.failure_epoch;
        let removed = std::mem::replace(&mut self.replicas[replica.as_usize()], state);
        self.garbage.extend(removed.sets().cloned());
        self.check_sets();
    }

    /// Checks that `replica` can be removed.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check_removal(&self, replica: ReplicaIndex) -> Result<(), NotRemoved> {
        let threshold = self.check_number_without(replica)?;
        let others = self.left_without(replica);
        // The replica may hold the newest data where it is stale: a failed flush may have lost
        // nothing. Where too few other replicas are fresh it must stay, unless it is blank there.
        let lost = |without: ReplicaSet| {
            !without.contains(replica) && others.without(without).len() < threshold
        };
        let blank = || std::iter::once((replica, &self.replicas[replica.as_usize()].blank));
        let stale = others
            .iter()
            .map(|other| (other, &self.replicas[other.as_usize()].stale));
        let loses_none = |sets: &mut dyn Iterator<Item = _>| {
            let enough = |without| others.without(without).len() >= threshold;
            every_sector(sets, self.capacity_sectors, enough, |without| {
                !lost(without)
            })
        };
        if !loses_none(&mut blank().chain(stale)) {
            return Err(NotRemoved::LastCopies);
        }
        let not_durable = others.iter().flat_map(|other| {
            let sets = self.replicas[other.as_usize()].not_durable_here();
            sets.map(move |set| (other, set))
        });
        if !loses_none(&mut blank().chain(not_durable)) {
            return Err(NotRemoved::LastDurableCopies);
        }
        // The versions that the replicas hold are not known before they are read.
        let state = &self.replicas[replica.as_usize()];
        let may_vote = |range: SectorRange| {
            let barred = runs::union(&state.missed.within(range), &state.behind.within(range));
            !runs::without(&[range], &barred).is_empty()
        };
        if self.undecided.iter().any(may_vote) {
            return Err(NotRemoved::Undecided);
        }
        Ok(())
    }

    /// The members whose copies are left without `replica`. The image of a missing one may be
    /// gone.
    pub(super) fn left_without(&self, replica: ReplicaIndex) -> ReplicaSet {
        let mut others = self.members.without(self.missing);
        others.remove(replica);
        others
    }

    /// Checks that enough replicas would be left without `replica`, whatever they hold. Returns the
    /// threshold without it.
    pub(super) fn check_number_without(&self, replica: ReplicaIndex) -> Result<usize, NotRemoved> {
        if !self.members.contains(replica) {
            return Err(NotRemoved::NoMember);
        }
        let threshold = self.threshold_without_one();
        let mut others = self.members;
        others.remove(replica);
        if others.len() < threshold {
            return Err(NotRemoved::TooFew);
        }
        if self.in_service.contains(replica) && others.and(self.in_service).len() < threshold {
            return Err(NotRemoved::TooFewInService);
        }
        if self.is_needed_by_records(replica) {
            return Err(NotRemoved::NotRecorded);
        }
        Ok(threshold)
    }

    /// A worker has no request that refers to the removed `replica`; `drained`: and no operation on
    /// it. `true` if with this its place is free.
    pub fn release(&mut self, replica: ReplicaIndex, worker: u16, drained: bool) -> bool {
        if !self.releasing.contains(replica) {
            return false;
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.forgotten_by |= 1 << worker;
        if drained {
            state.drained_by |= 1 << worker;
        }
        let forgotten = state.forgotten_by == self.workers;
        if forgotten {
            // No request can count it as a voter any more.
            let sets = [&mut state.stale, &mut state.missed, &mut state.behind];
            self.garbage.extend(sets.map(std::mem::take));
        }
        let free = forgotten && state.drained_by == self.workers;
        if free {
            self.releasing.remove(replica);
            self.check_sets();
        }
        free
    }

    /// Evicts a replica that does not answer. `false` if it is evicted already, or if fewer than t
    /// replicas would remain, in all or in some sector: then the disk has to wait for it.
    pub fn evict(&mut self, replica: ReplicaIndex) -> bool {
        let can_evict = self.can_evict(replica);
        if can_evict {
            self.evict_not_needed(replica, None);
        }
        can_evict
    }

    /// Whether `replica` is in service and not needed.
    pub fn can_evict(&self, replica: ReplicaIndex) -> bool {
        self.in_service.contains(replica) && !self.is_needed(replica)
    }

    pub(super) fn evict_not_needed(
        &mut self,
        replica: ReplicaIndex,
        loss: Option<(&mut Prepared, RangeSet)>,
    ) {
        self.in_service.remove(replica);
        self.replicas[replica.as_usize()].drained_by = 0;
        for (_, writing) in &mut self.writing {
            writing.may_succeed.remove(replica);
        }
        if let Some(may_succeed) = &mut self.flushing {
            may_succeed.remove(replica);
        }
        self.not_durable(replica, loss);
        self.check_sets();
    }

    /// A worker has no operation in flight on an evicted replica. `true` if it was the last such
    /// worker and the replica is in service again; what it missed is stale. A missing one does not
    /// rejoin.
    pub fn rejoin(&mut self, replica: ReplicaIndex, worker: u16) -> bool {
        let out = self.members.without(self.in_service);
        if !out.contains(replica) {
            return false;
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.drained_by |= 1 << worker;
        let all = state.drained_by == self.workers && !self.missing.contains(replica);
        if all {
            self.in_service.insert(replica);
            self.arrivals += 1;
            self.memory += 1;
            self.check_sets();
        }
        all
    }
}
