//! What a failure of one replica says about what was copied from it, or with it: the copies may be
//! of what was there before a write that all have lost (W7).
//!
//! Like a loss ([`prepared`](super::prepared)) this is put together on a copy, and again under the
//! mutex where the sets have changed since.

use super::Health;
use super::replica::ReplicaHealth;
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet};

/// The sets that decide, of one member: stale, and copied since the last flush and before it.
type Sets = [RangeSet; 3];

/// What a loss makes doubtful.
#[derive(Clone, Debug)]
pub(super) struct Doubt {
    members: ReplicaSet,
    /// By member, in order, as they were before the loss.
    earlier: Vec<Sets>,
    earlier_undone: RangeSet,
    /// Writes that are undone by the loss.
    lost: RangeSet,
    /// All that is undone then.
    undone: RangeSet,
}

impl Health {
    /// What is doubtful when `replica` has lost something, so that `after` is left of it. `None`:
    /// nothing is.
    pub(super) fn doubt(&self, replica: ReplicaIndex, after: &ReplicaHealth) -> Option<Doubt> {
        self.any_copied.then(|| {
            let members = self.members.iter();
            let sets = members.map(|member| match member == replica {
                true => sets(after),
                false => sets(&self.replicas[member.as_usize()]),
            });
            let lost = lost(&after.stale, sets.collect());
            let mut undone = self.undone.ranges.clone();
            undone.insert_all(&lost);
            Doubt {
                members: self.members,
                earlier: self
                    .sets_of_members()
                    .map(|sets| sets.map(RangeSet::clone))
                    .collect(),
                earlier_undone: self.undone.ranges.clone(),
                lost,
                undone,
            }
        })
    }

    fn sets_of_members(&self) -> impl Iterator<Item = [&RangeSet; 3]> {
        let members = self.members.iter();
        members.map(|member| sets(&self.replicas[member.as_usize()]))
    }

    /// Inserts into `changed` where something has changed since that decides. `false` if too much
    /// has.
    pub(super) fn changed_since_doubt(
        &self,
        doubt: Option<&Doubt>,
        steps: &mut usize,
        changed: &mut RangeSet,
    ) -> bool {
        let Some(doubt) = doubt else {
            return !self.any_copied;
        };
        // The loss makes this stale too.
        for (_, writing) in &self.writing {
            changed.insert(writing.range);
        }
        let mut differs = |now: &RangeSet, earlier| now.changes_since(earlier, steps, changed);
        let now = self.sets_of_members().flatten();
        let sets = now.zip(doubt.earlier.iter().flatten());
        let mut sets = sets.chain([(&self.undone.ranges, &doubt.earlier_undone)]);
        self.members == doubt.members && sets.all(|(now, earlier)| differs(now, earlier))
    }

    /// What `replica` may have lost was perhaps lost on all members before it was copied to some.
    /// If no member is left that holds what was written, the write is undone, and no error will
    /// say so. `doubt` was prepared, and still holds but for what has `changed`.
    pub(super) fn doubt_copies(
        &mut self,
        replica: ReplicaIndex,
        doubt: Option<(&mut Doubt, RangeSet)>,
    ) {
        if !self.any_copied {
            return;
        }
        let stale = &self.replicas[replica.as_usize()].stale;
        let Some((doubt, changed)) = doubt else {
            let lost = lost(stale, self.sets_of_members().collect());
            let parts: Vec<_> = lost.iter().collect();
            return self.may_be_undone(&parts);
        };
        let part = |set: &RangeSet| set.part_in(&changed);
        let parts: Vec<Sets> = self.sets_of_members().map(|sets| sets.map(part)).collect();
        let lost = lost(&part(stale), parts.iter().map(Sets::each_ref).collect());
        doubt.lost.remove_all(&changed);
        doubt.undone.remove_all(&changed);
        doubt.undone.insert_all(&part(&self.undone.ranges));
        doubt.undone.insert_all(&lost);
        if !(doubt.lost.is_empty() && lost.is_empty()) {
            // What was present is freed with what was prepared, without the mutex.
            std::mem::swap(&mut self.undone.ranges, &mut doubt.undone);
            self.undone.is_more(doubt.undone.sectors());
        }
    }
}

fn sets(state: &ReplicaHealth) -> [&RangeSet; 3] {
    [&state.stale, &state.copied, &state.copied_before_flush]
}

/// What is a copy where the replica that has failed is `stale`, and is not held by any member but
/// as a copy, if at all. `sets`: of all members.
fn lost(stale: &RangeSet, sets: Vec<[&RangeSet; 3]>) -> RangeSet {
    let mut lost = RangeSet::default();
    for [_, copied, copied_before_flush] in &sets {
        for copied in [copied, copied_before_flush] {
            lost.insert_all(&stale.part_in(copied));
        }
    }
    for sets in sets {
        let mut not_here = RangeSet::default();
        for set in sets {
            not_here.insert_all(&set.part_in(&lost));
        }
        lost = not_here;
    }
    lost
}
