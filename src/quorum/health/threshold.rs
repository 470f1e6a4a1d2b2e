//! The vote threshold t, and how it changes while the disk is served (contract W10).
//!
//! It becomes lower at once: what t replicas hold and have made durable is held by fewer, too. It
//! becomes higher only when as many replicas are *complete*: in service, stale nowhere, with
//! nothing that was copied to them or repaired and not flushed since. Then every acknowledged
//! sector is fresh on that many replicas, and what was flushed is durable on them.
//!
//! One that follows the replicas is more than half of the complete ones. With a majority of all,
//! a replica that was just added would make the disk depend on each of the others.

use super::Health;
use crate::common::{ReplicaIndex, ReplicaSet};

/// The threshold that is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// This one, however many replicas there are.
    Given(usize),
    /// More than half of the replicas.
    Majority,
}

/// Why the threshold cannot be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotThreshold {
    /// There are not so many replicas, or it is 0.
    #[error("{wanted} is out of range: with {replicas} replicas it can be 1 to {replicas}")]
    OutOfRange {
        /// The threshold that is wanted.
        wanted: usize,
        /// The replicas of the disk.
        replicas: usize,
    },
}

/// More than half.
pub fn majority(replicas: usize) -> usize {
    replicas / 2 + 1
}

impl Health {
    /// The vote threshold.
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// The vote threshold that the disk is to have.
    pub fn wanted_threshold(&self) -> usize {
        match self.wanted {
            Wanted::Given(threshold) => threshold,
            Wanted::Majority => majority(self.members.len()),
        }
    }

    /// Whether the threshold follows the number of replicas.
    pub fn threshold_follows(&self) -> bool {
        self.wanted == Wanted::Majority
    }

    /// The threshold is to be `wanted` from now on. One that is lower is the threshold at once; one
    /// that is higher becomes so by [`Self::raise_threshold`].
    ///
    /// # Errors
    /// If the disk has not so many replicas.
    pub fn want_threshold(&mut self, wanted: Wanted) -> Result<(), NotThreshold> {
        let replicas = self.members.len();
        if let Wanted::Given(wanted) = wanted
            && !(1..=replicas).contains(&wanted)
        {
            return Err(NotThreshold::OutOfRange { wanted, replicas });
        }
        self.wanted = wanted;
        self.memory += 1;
        self.threshold = self.threshold.min(self.wanted_threshold());
        Ok(())
    }

    /// The threshold once one replica is removed. It is lower before the replica is, so that
    /// the others decide without it.
    pub(super) fn threshold_without_one(&self) -> usize {
        match self.wanted {
            Wanted::Given(_) => self.threshold,
            Wanted::Majority => self.threshold.min(majority(self.members.len() - 1)),
        }
    }

    /// Makes the threshold as high as it can be now, up to the one that is wanted. Returns whether
    /// it is higher.
    pub fn raise_threshold(&mut self) -> bool {
        let wanted = self.wanted_threshold();
        // What a failed write has left is decided by the votes that it was made for.
        if self.threshold >= wanted || !self.undecided.is_empty() {
            return false;
        }
        let complete = self.in_service.iter();
        let complete: ReplicaSet = complete
            .filter(|replica| self.is_complete(*replica))
            .collect();
        // A write or a flush in flight does not fail because more replicas are needed now.
        let in_flight = self.may_succeed().chain(self.flushing);
        let possible = in_flight.fold(complete.len(), |least, may_succeed| {
            least.min(may_succeed.and(self.members).len())
        });
        let allowed = match self.wanted {
            Wanted::Given(threshold) => threshold,
            Wanted::Majority => majority(complete.len()).min(wanted),
        };
        let before = self.threshold;
        self.threshold = before.max(allowed.min(possible));
        self.memory += u64::from(self.threshold > before);
        self.threshold > before
    }

    /// Whether everything that was acknowledged is fresh on `replica`, and durable if it was
    /// flushed.
    fn is_complete(&self, replica: ReplicaIndex) -> bool {
        let state = &self.replicas[replica.as_usize()];
        state.not_durable_here().all(|set| set.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::super::WriteEnd;
    use super::super::tests::{A, B, C, range};
    use super::*;

    fn flush(health: &mut Health) -> bool {
        let (epoch, members) = (health.flush_begins(), health.members());
        for replica in members.iter() {
            health.flush_ended(epoch, replica, true);
        }
        let is_enough = health.durability().is_enough();
        health.flush_decided(epoch, members, is_enough, &mut [])
    }

    /// A write that B fails, or not, and that has a quorum.
    fn write(health: &mut Health, fails: bool) {
        let begun = health.write_begins(range(0, 8));
        if fails {
            health.write_failed(begun, B);
            assert!(!health.raise_threshold(), "a write in flight would fail");
        }
        health.write_ended(&WriteEnd {
            asked: health.members(),
            succeeded: ReplicaSet::first(2 - usize::from(fails)),
            begun,
            success: true,
        });
    }

    /// A and B of a disk that had A only.
    fn grown() -> Health {
        let mut health = Health::new(ReplicaSet::first(1), 1, 1, 64);
        health.want_threshold(Wanted::Majority).unwrap();
        health.add(B);
        health
    }

    #[test]
    fn a_threshold_rises_only_to_as_many_replicas_as_are_complete() {
        let mut health = grown();
        assert_eq!((health.threshold(), health.wanted_threshold()), (1, 2));
        assert!(!health.raise_threshold(), "B is stale");
        health.repaired(B, range(0, 64), health.failure_epoch(), false);
        assert!(!health.raise_threshold(), "its copies are not flushed");
        assert!(flush(&mut health));
        write(&mut health, true);
        assert!(!health.raise_threshold(), "B has failed a write");
        write(&mut health, false);
        assert!(flush(&mut health));
        assert!(health.raise_threshold());
        assert_eq!(health.threshold(), 2);
        health.add(C);
        assert_eq!(health.wanted_threshold(), 2);
        health.want_threshold(Wanted::Given(3)).unwrap();
        assert!(!health.raise_threshold(), "C is stale");
        health.want_threshold(Wanted::Given(1)).unwrap();
        assert_eq!(health.threshold(), 1, "at once");
        let too_many = health.want_threshold(Wanted::Given(4));
        assert!(too_many.is_err() && health.wanted_threshold() == 1);
    }

    #[test]
    fn a_removal_lowers_a_threshold_that_follows() {
        let mut health = grown();
        health.repaired(B, range(0, 64), health.failure_epoch(), false);
        assert!(flush(&mut health) && health.raise_threshold());
        assert_eq!(health.check_removal(A), Ok(()));
        health.want_threshold(Wanted::Given(2)).unwrap();
        assert!(health.check_removal(A).is_err(), "it was given");
        health.want_threshold(Wanted::Majority).unwrap();
        health.remove(A);
        assert_eq!(health.threshold(), 1);
        assert!(health.check_removal(B).is_err(), "the last one");
    }
}
