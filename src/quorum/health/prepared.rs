//! What the begin or the end of a flush, or an eviction, makes of the sets of a replica, prepared
//! without the mutex of all workers: to join large sets takes time in proportion to their ranges.
//!
//! It is done on a copy. Under the mutex the sets that have come out take the place of the present
//! ones, and the same is done again where these have changed since.

use super::Health;
use super::doubt::Doubt;
use super::replica::ReplicaHealth;
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::limits::CHANGES_SINCE_SNAPSHOT_MAX;

/// Changes the sets of a replica, each sector by itself. The set: what was written since the last
/// flush began.
type Step = fn(&mut ReplicaHealth, &RangeSet);

/// What a step makes of the sets of one replica.
#[derive(Clone, Debug)]
pub struct Prepared {
    replica: ReplicaIndex,
    step: Step,
    earlier: ReplicaHealth,
    earlier_written: RangeSet,
    after: ReplicaHealth,
    /// Of a loss.
    doubt: Option<Doubt>,
}

/// What the begin of a flush makes of the sets of a member.
#[derive(Clone, Debug)]
pub struct Beginning {
    prepared: Prepared,
    misses_writes: bool,
}

impl Prepared {
    /// The replica whose sets these are.
    pub fn replica(&self) -> ReplicaIndex {
        self.replica
    }
}

impl Health {
    /// What is left of a replica that fails a flush, or is evicted.
    pub fn loss(&self, replica: ReplicaIndex) -> Prepared {
        let mut loss = self.prepare(replica, ReplicaHealth::lose);
        loss.doubt = self.doubt(replica, &loss.after);
        loss
    }

    /// What is left of each member when a flush has succeeded.
    pub fn settlement(&self) -> Vec<Prepared> {
        let members = self.members.iter();
        members
            .map(|member| self.prepare(member, ReplicaHealth::fall_behind))
            .collect()
    }

    /// Whether [`Self::settlement`] may change anything.
    pub fn needs_settlement(&self) -> bool {
        let needs = |member: ReplicaIndex| self.replicas[member.as_usize()].may_fall_behind();
        self.members.iter().any(needs)
    }

    /// What is left of each member when a flush begins, where sets have to be joined for that.
    pub fn beginning(&self) -> Vec<Beginning> {
        let members = self.members.iter();
        let joins = members.filter(|member| self.joins_when_flush_begins(*member));
        joins
            .map(|member| Beginning {
                prepared: self.prepare(member, self.pass_on_step(member)),
                misses_writes: self.misses_writes(member),
            })
            .collect()
    }

    /// Whether [`Self::beginning`] prepares anything.
    pub fn needs_beginning(&self) -> bool {
        let mut members = self.members.iter();
        members.any(|member| self.joins_when_flush_begins(member))
    }

    fn joins_when_flush_begins(&self, member: ReplicaIndex) -> bool {
        let state = &self.replicas[member.as_usize()];
        let both = |one: &RangeSet, other: &RangeSet| !one.is_empty() && !other.is_empty();
        let (weak, weak_before) = (&state.weak, &state.weak_before_flush);
        both(&state.refreshed, &state.refreshed_before_flush)
            || both(&state.restored, &state.restored_before_flush)
            || both(&state.copied, &state.copied_before_flush)
            || both(weak, weak_before)
            || (self.misses_writes(member) && !(weak.is_empty() && weak_before.is_empty()))
    }

    /// Whether a flush that begins now covers writes that `member` has missed.
    fn misses_writes(&self, member: ReplicaIndex) -> bool {
        !self.written.is_empty() && !self.in_service.contains(member)
    }

    fn pass_on_step(&self, member: ReplicaIndex) -> Step {
        match self.misses_writes(member) {
            true => ReplicaHealth::pass_on_in_vain,
            false => ReplicaHealth::pass_on,
        }
    }

    /// What was written to `member` is covered by the flush that begins, or by an earlier one.
    pub(super) fn pass_on(&mut self, member: ReplicaIndex, beginning: &mut [Beginning]) {
        let misses_writes = self.misses_writes(member);
        let mut prepared = beginning.iter_mut();
        let prepared = prepared.find(|beginning| {
            beginning.prepared.replica == member && beginning.misses_writes == misses_writes
        });
        if prepared.is_some_and(|beginning| self.take_over(&mut beginning.prepared)) {
            return;
        }
        let step = self.pass_on_step(member);
        let state = &mut self.replicas[member.as_usize()];
        let freed = [
            &state.refreshed,
            &state.restored,
            &state.copied,
            &state.weak,
        ];
        let freed = freed.into_iter().filter(|set| !set.is_empty());
        self.garbage.extend(freed.cloned());
        step(state, &self.written);
    }

    fn prepare(&self, replica: ReplicaIndex, step: Step) -> Prepared {
        let earlier = self.replicas[replica.as_usize()].clone();
        let mut after = earlier.clone();
        step(&mut after, &self.written);
        Prepared {
            replica,
            step,
            earlier,
            earlier_written: self.written.clone(),
            after,
            doubt: None,
        }
    }

    /// Does what is `prepared`. `false` if too much has changed since; then nothing is done.
    pub(super) fn take_over(&mut self, prepared: &mut Prepared) -> bool {
        let changed = self.changed_since_prepared(prepared);
        changed.is_some_and(|changed| {
            self.put_in_place(prepared, &changed);
            true
        })
    }

    /// Does what is `prepared`, and again what has `changed` since.
    fn put_in_place(&mut self, prepared: &mut Prepared, changed: &RangeSet) {
        let state = &mut self.replicas[prepared.replica.as_usize()];
        let mut part = state.part_in(changed);
        (prepared.step)(&mut part, &self.written.part_in(changed));
        let after = prepared.after.joined().into_iter().zip(part.joined());
        for (present, (after, part)) in state.joined().into_iter().zip(after) {
            after.remove_all(changed);
            after.insert_all(part);
            // What was present is freed with what was prepared, without the mutex.
            std::mem::swap(present, after);
        }
        if prepared.after.unconfirmed.is_empty() {
            let unconfirmed = state.unconfirmed.drain(..);
            self.garbage.extend(unconfirmed.map(|(_, written)| written));
        }
    }

    /// Where the sets have changed that say what the `loss` leaves and makes doubtful. `None` if
    /// these are too many sectors to be quickly prepared again.
    pub(super) fn changed_since_loss(&self, loss: &Prepared) -> Option<RangeSet> {
        let mut changed = self.changed_since_prepared(loss)?;
        let mut steps = CHANGES_SINCE_SNAPSHOT_MAX;
        let doubt = loss.doubt.as_ref();
        self.changed_since_doubt(doubt, &mut steps, &mut changed)
            .then_some(changed)
    }

    /// Where the sets of the replica have changed.
    fn changed_since_prepared(&self, prepared: &Prepared) -> Option<RangeSet> {
        let now = &self.replicas[prepared.replica.as_usize()];
        let earlier = &prepared.earlier;
        let epochs = |state: &ReplicaHealth| -> Vec<_> {
            state.unconfirmed.iter().map(|(epoch, _)| *epoch).collect()
        };
        if epochs(now) != epochs(earlier) {
            return None;
        }
        let (mut changed, mut steps) = (RangeSet::default(), CHANGES_SINCE_SNAPSHOT_MAX);
        let sets = now.inputs().zip(earlier.inputs());
        let written = std::iter::once((&self.written, &prepared.earlier_written));
        for (now, earlier) in sets.chain(written) {
            now.changes_since(earlier, &mut steps, &mut changed)
                .then_some(())?;
        }
        Some(changed)
    }

    /// Every sector is durable on t members: doubtful copies are not needed any more.
    pub(super) fn doubt_is_over(&mut self, settlement: &mut [Prepared]) {
        let mut in_service = self.in_service.iter();
        let falls_behind = in_service.any(|m| self.replicas[m.as_usize()].may_fall_behind());
        self.memory += u64::from(falls_behind);
        for member in self.members.iter() {
            let mut prepared = settlement.iter_mut();
            let prepared = prepared.find(|prepared| prepared.replica == member);
            if prepared.is_none_or(|prepared| !self.take_over(prepared)) {
                self.replicas[member.as_usize()].fall_behind(&self.written);
            }
        }
    }

    /// What `replica` wrote since its last successful flush may be lost, and so may be what it is
    /// writing now: a guest may have read that from it already and must not read the old data.
    /// `loss` was prepared, and this has changed since.
    pub(super) fn not_durable(
        &mut self,
        replica: ReplicaIndex,
        mut loss: Option<(&mut Prepared, RangeSet)>,
    ) {
        self.failure_epoch.0 += 1;
        self.memory += 1;
        match &mut loss {
            Some((loss, changed)) => self.put_in_place(loss, changed),
            None => {
                let state = &mut self.replicas[replica.as_usize()];
                let unconfirmed = state.unconfirmed.iter();
                self.garbage
                    .extend(unconfirmed.map(|(_, written)| written.clone()));
                state.lose(&self.written);
            }
        }
        let state = &mut self.replicas[replica.as_usize()];
        state.last_failure = self.failure_epoch;
        for (_, writing) in &self.writing {
            state.stale.insert(writing.range);
        }
        self.doubt_arose();
        let doubt = loss.and_then(|(loss, changed)| Some((loss.doubt.as_mut()?, changed)));
        self.doubt_copies(replica, doubt);
    }

    /// The flush has come back from a replica with an error. `loss` was prepared on a copy of this.
    /// `false` if too much has changed since; then nothing is done, unless it `must` be.
    pub fn flush_failed(&mut self, loss: &mut Prepared, must: bool) -> bool {
        let changed = self.changed_since_loss(loss);
        if !must && changed.is_none() {
            return false;
        }
        if let Some(may_succeed) = &mut self.flushing {
            may_succeed.remove(loss.replica);
        }
        self.not_durable(loss.replica, changed.map(|changed| (loss, changed)));
        true
    }

    /// Asserts that a member that is out of service is stale where anything was written since the
    /// last flush began.
    pub(super) fn check_out_of_service(&self) {
        let out: ReplicaSet = self.members.without(self.in_service);
        for member in out.iter() {
            let stale = &self.replicas[member.as_usize()].stale;
            for range in self.written.iter() {
                assert_eq!(stale.within(range), [range], "evicted and not stale");
            }
        }
    }
}

impl ReplicaHealth {
    /// What it has not made durable may be lost.
    pub(super) fn lose(&mut self, written: &RangeSet) {
        self.stale.insert_all(written);
        self.stale.insert_all(&self.rewritten);
        for (_, written) in self.unconfirmed.drain(..) {
            self.stale.insert_all(&written);
            self.uncovered.insert_all(&written);
        }
        for weak in [&mut self.weak, &mut self.weak_before_flush] {
            self.behind.insert_all(&std::mem::take(weak));
        }
    }

    /// Whether `fall_behind` may change anything.
    fn may_fall_behind(&self) -> bool {
        let sets = [
            &self.uncovered,
            &self.refreshed,
            &self.refreshed_before_flush,
        ];
        !self.unconfirmed.is_empty() || sets.iter().any(|set| !set.is_empty())
    }

    /// A flush begins: what was written before is what it covers, or an earlier one.
    fn pass_on(&mut self, _written: &RangeSet) {
        let sets = [
            (&mut self.refreshed, &mut self.refreshed_before_flush),
            (&mut self.restored, &mut self.restored_before_flush),
            (&mut self.weak, &mut self.weak_before_flush),
            (&mut self.copied, &mut self.copied_before_flush),
        ];
        for (set, before_flush) in sets {
            before_flush.insert_all(&std::mem::take(set));
        }
    }

    /// The same of a member out of service, which has missed some of what the flush covers.
    fn pass_on_in_vain(&mut self, written: &RangeSet) {
        self.pass_on(written);
        // All that was written is stale here already.
        self.behind
            .insert_all(&std::mem::take(&mut self.weak_before_flush));
    }

    /// The sets that a `Step` changes, besides `unconfirmed`.
    fn joined(&mut self) -> [&mut RangeSet; 11] {
        [
            &mut self.refreshed,
            &mut self.refreshed_before_flush,
            &mut self.restored,
            &mut self.restored_before_flush,
            &mut self.copied,
            &mut self.copied_before_flush,
            &mut self.stale,
            &mut self.uncovered,
            &mut self.behind,
            &mut self.weak,
            &mut self.weak_before_flush,
        ]
    }

    /// The sets that a `Step` takes a look at.
    fn inputs(&self) -> impl Iterator<Item = &RangeSet> {
        let unconfirmed = self.unconfirmed.iter().map(|(_, written)| written);
        [
            &self.stale,
            &self.uncovered,
            &self.behind,
            &self.weak,
            &self.weak_before_flush,
            &self.rewritten,
            &self.refreshed,
            &self.refreshed_before_flush,
            &self.restored,
            &self.restored_before_flush,
            &self.copied,
            &self.copied_before_flush,
        ]
        .into_iter()
        .chain(unconfirmed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::SectorRange;
    use crate::quorum::health::WriteEnd;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Change {
        Write(SectorRange, u32),
        Repair(u8, SectorRange, bool),
        FlushBegins,
        FlushEnds(u8, bool),
        Evicted(u8),
        Decided(u32),
    }

    fn change() -> impl Strategy<Value = Change> {
        let range = || (0..64_u64, 1..300_u64).prop_map(|(at, n)| SectorRange::new(at * 500, n));
        prop_oneof![
            8 => (range(), 0..8_u32).prop_map(|(range, done)| Change::Write(range, done)),
            4 => (0..3_u8, range(), any::<bool>())
                .prop_map(|(replica, range, corrupt)| Change::Repair(replica, range, corrupt)),
            1 => Just(Change::FlushBegins),
            1 => (0..3_u8, any::<bool>()).prop_map(|(r, success)| Change::FlushEnds(r, success)),
            1 => (0..3_u8).prop_map(Change::Evicted),
            1 => (0..8_u32).prop_map(Change::Decided),
        ]
    }

    fn apply(health: &mut Health, change: &Change) {
        match *change {
            Change::Write(range, done) => {
                let asked = health.in_service();
                let begun = health.write_begins(range);
                let succeeded = asked.and(ReplicaSet::from_bits(done));
                let success = succeeded.len() > 1;
                health.write_ended(&WriteEnd {
                    asked,
                    succeeded,
                    begun,
                    success,
                });
            }
            Change::Repair(replica, range, was_corrupt) => {
                let began = health.failure_epoch();
                health.repaired(ReplicaIndex(replica), range, began, was_corrupt);
            }
            Change::FlushBegins => {
                health.flush_begins();
            }
            Change::FlushEnds(replica, success) => {
                health.flush_ended(health.last_flush(), ReplicaIndex(replica), success);
            }
            Change::Evicted(replica) => {
                if !health.evict(ReplicaIndex(replica)) {
                    health.rejoin(ReplicaIndex(replica), 0);
                }
            }
            Change::Decided(succeeded) => {
                let succeeded = ReplicaSet::from_bits(succeeded);
                health.flush_decided(health.last_flush(), succeeded, true, &mut []);
            }
        }
    }

    /// All that a step may have changed.
    fn sets(health: &mut Health) -> Vec<Vec<SectorRange>> {
        let mut sets = Vec::new();
        for state in &mut health.replicas {
            sets.extend(state.joined().map(|set| set.iter().collect()));
            sets.extend(
                state
                    .unconfirmed
                    .iter()
                    .map(|(_, set)| set.iter().collect()),
            );
            state.joined().iter().for_each(|set| set.self_check());
        }
        health.undone.ranges.self_check();
        sets.push(health.undone.ranges.iter().collect());
        sets
    }

    proptest! {
        /// What was prepared on a copy comes out as if it were done now.
        #[test]
        fn what_has_changed_meanwhile_is_done_again(
            before in prop::collection::vec(change(), 0..60),
            meanwhile in prop::collection::vec(change(), 0..6),
        ) {
            let mut health = Health::new(ReplicaSet::first(3), 2, 1, 1 << 22);
            for change in &before {
                apply(&mut health, change);
            }
            let copy = health.snapshot();
            let (mut loss, mut settlement) = (copy.loss(ReplicaIndex(1)), copy.settlement());
            let mut beginning = copy.beginning();
            for change in &meanwhile {
                apply(&mut health, change);
            }
            let (mut prepared, mut direct) = (health.snapshot(), health.snapshot());
            prepared.flush_failed(&mut loss, true);
            direct.flush_ended(direct.last_flush(), ReplicaIndex(1), false);
            prop_assert_eq!(sets(&mut prepared), sets(&mut direct));
            prop_assert_eq!(prepared.owes_failure(), direct.owes_failure());
            let (mut prepared, mut direct) = (health.snapshot(), health.snapshot());
            prepared.flush_begins_as_on(&mut beginning);
            direct.flush_begins();
            prop_assert_eq!(sets(&mut prepared), sets(&mut direct));
            let (mut prepared, mut direct) = (health.snapshot(), health.snapshot());
            prepared.doubt_is_over(&mut settlement);
            direct.doubt_is_over(&mut []);
            prop_assert_eq!(sets(&mut prepared), sets(&mut direct));
        }
    }
}
