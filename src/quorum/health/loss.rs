//! What the disk loses with a replica that the operator gives up (contract W11).
//!
//! A sector is lost if the copies that are left and may vote on it are fewer than t. No vote can
//! have a winner there until the guest writes, and no flush can make durable what no replica holds:
//! so flushes do not ask for it any more.

use super::{Health, NotRemoved};
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, SectorRange, runs};
use crate::limits::REPLICAS_MAX;

/// What would be lost with a replica.
#[derive(Clone, Debug, Default)]
pub struct Loss {
    /// Fewer than t of the others are fresh or doubtful: no vote can have a winner.
    pub lost: RangeSet,
    /// Fewer than t of the others are fresh, but with the doubtful ones they are enough (W7).
    pub doubtful: RangeSet,
    /// T of the others are fresh, but fewer have it on stable storage: a crash would lose it.
    pub not_durable: RangeSet,
    /// A write has failed, and no vote has decided what it has left.
    pub undecided: RangeSet,
}

impl Loss {
    /// Whether nothing is lost.
    pub fn is_empty(&self) -> bool {
        let Self {
            lost,
            doubtful,
            not_durable,
            undecided,
        } = self;
        let sets = [lost, doubtful, not_durable, undecided];
        sets.into_iter().all(RangeSet::is_empty)
    }

    /// The same, where what is in `changed` is as in `now`.
    fn with(mut self, now: &Self, changed: &RangeSet) -> Self {
        let parts = [
            (&mut self.lost, &now.lost),
            (&mut self.doubtful, &now.doubtful),
            (&mut self.not_durable, &now.not_durable),
            (&mut self.undecided, &now.undecided),
        ];
        for (set, now) in parts {
            set.remove_all(changed);
            set.insert_all(now);
        }
        self
    }
}

impl Health {
    /// What would be lost with `replica`.
    ///
    /// # Errors
    /// If it cannot be removed whatever is lost.
    pub fn loss_of(&self, replica: ReplicaIndex) -> Result<Loss, NotRemoved> {
        let threshold = self.check_number_without(replica)?;
        let others = self.left_without(replica);
        let state = &self.replicas[replica.as_usize()];
        let mut loss = Loss::default();
        let of_others = others.iter().flat_map(|other| {
            let state = &self.replicas[other.as_usize()];
            let sets = [&state.stale, &state.missed, &state.behind];
            sets.into_iter().enumerate().map(move |(kind, set)| {
                let place = kind * REPLICAS_MAX + other.as_usize();
                (place, set)
            })
        });
        let kinds = |places: u128| {
            let of = |kind: usize| places >> (kind * REPLICAS_MAX) & u128::from(u32::MAX);
            (of(0), of(1) | of(2))
        };
        sweep(of_others, |range, places| {
            let (stale, barred) = kinds(places);
            let without = |kind: u128| others.len() - kind.count_ones() as usize;
            if without(stale) < threshold {
                let votes = without(stale & barred);
                let set = match votes < threshold {
                    true => &mut loss.lost,
                    false => &mut loss.doubtful,
                };
                set.insert(range);
            }
        });
        let not_durable: Vec<_> = others
            .iter()
            .map(|other| {
                let mut all = RangeSet::default();
                for set in self.replicas[other.as_usize()].not_durable_here() {
                    all.insert_all(set);
                }
                (other.as_usize(), all)
            })
            .collect();
        let not_durable = not_durable.iter().map(|(place, set)| (*place, set));
        sweep(not_durable, |range, places| {
            if others.len() - (places.count_ones() as usize) < threshold {
                loss.not_durable.insert(range);
            }
        });
        for set in [&loss.lost, &loss.doubtful] {
            loss.not_durable.remove_all(set);
        }
        // It was never written there.
        let sets = [&mut loss.lost, &mut loss.doubtful, &mut loss.not_durable];
        for set in sets {
            set.remove_all(&state.blank);
        }
        for range in self.undecided.iter() {
            let barred = runs::union(&state.missed.within(range), &state.behind.within(range));
            for part in runs::without(&[range], &barred) {
                loss.undecided.insert(part);
            }
        }
        Ok(loss)
    }

    /// Whether some of `range` was given up before the last flush has ended, and no write had
    /// succeeded there when it began.
    pub fn is_given_up(&self, range: SectorRange) -> bool {
        self.given_up_before_flush.overlaps(range)
    }

    /// Whether some of `range` was ever given up, or left on too few replicas that had flushed it:
    /// a flush that has ended may not cover it any more.
    pub fn was_given_up(&self, range: SectorRange) -> bool {
        self.once_given_up.overlaps(range)
    }

    /// The last flush has succeeded, but not for what was given up: what is left of it is no older
    /// by that flush than it was.
    pub(super) fn leave_given_up(&mut self) {
        for state in &mut self.replicas {
            state.uncovered.remove_all(&self.given_up_before_flush);
        }
    }

    /// Removes `replica` whatever is lost with it. `loss` is what would have been lost on
    /// `snapshot`, which was this a moment ago. Returns what is lost; `None` if too much has
    /// changed since.
    ///
    /// # Errors
    /// As of [`Self::loss_of`].
    pub fn fail_as_on(
        &mut self,
        snapshot: &Self,
        loss: Loss,
        replica: ReplicaIndex,
    ) -> Result<Option<Loss>, NotRemoved> {
        let Some((changed, now)) = self.changes_since(snapshot) else {
            return Ok(None);
        };
        let loss = loss.with(&now.loss_of(replica)?, &changed);
        self.remove(replica);
        for set in [&loss.lost, &loss.doubtful, &loss.not_durable] {
            self.once_given_up.insert_all(set);
        }
        self.given_up.insert_all(&loss.lost);
        self.given_up_before_flush.insert_all(&loss.lost);
        Ok(Some(loss))
    }
}

/// Calls `visit` for all runs of sectors that some set has, with a bit for the place of each set
/// that has it. Several sets must not have the same place.
fn sweep<'a>(
    sets: impl Iterator<Item = (usize, &'a RangeSet)>,
    mut visit: impl FnMut(SectorRange, u128),
) {
    let ends = sets.flat_map(|(place, set)| {
        let of_run = move |run: SectorRange| [(run.start, place), (run.end(), place)];
        set.iter().flat_map(of_run)
    });
    let mut ends: Vec<(u64, usize)> = ends.collect();
    ends.sort_unstable();
    let (mut places, mut from) = (0, 0);
    for (sector, place) in ends {
        if places != 0 && sector > from {
            visit(SectorRange::new(from, sector - from), places);
        }
        from = sector;
        places ^= 1_u128 << place;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{A, B, C, flush, range, set, write};
    use super::*;

    fn lost(health: &Health, replica: ReplicaIndex) -> [u64; 4] {
        let loss = health.loss_of(replica).unwrap();
        let Loss {
            lost,
            doubtful,
            not_durable,
            undecided,
        } = &loss;
        [lost, doubtful, not_durable, undecided].map(RangeSet::sectors)
    }

    /// A moment ago it was as it is now.
    fn fail(health: &mut Health, replica: ReplicaIndex) -> Loss {
        let snapshot = health.snapshot();
        let loss = snapshot.loss_of(replica).unwrap();
        let failed = health.fail_as_on(&snapshot, loss, replica);
        health.self_check();
        failed.unwrap().unwrap()
    }

    #[test]
    fn what_is_lost_with_a_replica_is_what_a_removal_is_refused_for() {
        let mut health = Health::new(set(&[A, B, C]), 2, 1, 100);
        assert_eq!(lost(&health, A), [0; 4]);
        write(&mut health, range(0, 10), &[A]);
        assert_eq!(lost(&health, B), [10, 0, 0, 0]);
        assert_eq!(health.check_removal(B), Err(NotRemoved::LastCopies));
        assert_eq!(lost(&health, A), [0; 4]);
        assert!(flush(&mut health, &[]));
        write(&mut health, range(20, 5), &[]);
        assert!(flush(&mut health, &[C]));
        assert_eq!(lost(&health, B), [10, 5, 0, 0], "C may have lost nothing");
        write(&mut health, range(50, 7), &[A, B]);
        assert_eq!(lost(&health, B), [10, 5, 0, 7]);
    }

    #[test]
    fn what_was_given_up_fails_no_flush_until_it_is_written() {
        let mut health = Health::new(set(&[A, B, C]), 2, 1, 100);
        write(&mut health, range(0, 10), &[A]);
        assert!(flush(&mut health, &[]));
        assert_eq!(fail(&mut health, B).lost.sectors(), 10);
        assert_eq!(health.members(), set(&[A, C]));
        assert!(flush(&mut health, &[]), "no replica can flush what is lost");
        write(&mut health, range(0, 4), &[]);
        assert_eq!(health.given_up.sectors(), 6);
        assert!(
            !flush(&mut health, &[C]),
            "what is written after that counts"
        );
    }

    #[test]
    fn a_flush_that_has_ended_does_not_cover_what_is_left_on_too_few() {
        let mut health = Health::new(set(&[A, B, C]), 2, 1, 100);
        write(&mut health, range(0, 10), &[]);
        assert!(flush(&mut health, &[C]));
        health.repaired(C, range(0, 4), health.failure_epoch(), false);
        let loss = fail(&mut health, B);
        assert_eq!(
            [&loss.lost, &loss.not_durable].map(RangeSet::sectors),
            [0, 4]
        );
        assert!(health.was_given_up(range(0, 1)) && !health.is_given_up(range(0, 1)));
    }

    #[test]
    fn what_is_lost_is_counted_as_it_is_when_the_replica_goes() {
        let mut health = Health::new(set(&[A, B, C]), 2, 1, 100);
        write(&mut health, range(0, 10), &[A]);
        let snapshot = health.snapshot();
        let loss = snapshot.loss_of(B).unwrap();
        write(&mut health, range(0, 4), &[]);
        write(&mut health, range(30, 1), &[A]);
        let loss = health.fail_as_on(&snapshot, loss, B).unwrap().unwrap();
        let runs: Vec<_> = loss.lost.iter().collect();
        assert_eq!(runs, [range(4, 6), range(30, 1)]);
    }

    #[test]
    fn a_replica_without_which_too_few_are_left_is_not_given_up() {
        let health = Health::new(set(&[A, B]), 2, 1, 100);
        let refused = health.loss_of(A).map(|_| ());
        assert_eq!(refused, Err(NotRemoved::TooFew));
    }
}
