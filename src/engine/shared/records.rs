//! What the records say of the replicas, at the start and while the disk is served (S2, S5).

use super::Shared;
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::engine::marks::Marks;
use crate::engine::memory::{self, Goal, Step};
use crate::engine::record_counts::RecordFigures;
use crate::jobs::JobEvent;
use crate::quorum::health::{Health, Remembered};
use crate::record::{Extents, Holder, Keeper, PastJob, Wanted};

impl Shared {
    /// At the start, before there is an engine: the image of the member `replica` is not open, and
    /// it is stale in `stale` ([W13](Health::leave_out)).
    ///
    /// # Panics
    /// If fewer than t members are left in service.
    pub fn leave_out(&self, replica: ReplicaIndex, stale: &RangeSet) {
        self.change_health(|health| health.leave_out(replica, stale));
    }

    /// The image of a member cannot be used any more: it is evicted, if it is in service, and
    /// missing from now on ([W13](Health::lose)). A tick of every engine must follow. `false` if it
    /// is needed, missing already, or no member.
    pub fn lose(&self, replica: ReplicaIndex) -> bool {
        let is_in_service = self.in_service().contains(replica);
        (!is_in_service || self.evict(replica)) && self.change_health(|health| health.lose(replica))
    }

    /// Whether no engine has an operation in flight on a missing replica, as of its last tick.
    pub fn is_drained(&self, replica: ReplicaIndex) -> bool {
        self.health(|health| health.is_drained(replica))
    }

    /// Another program has modified the image of a missing member, which is stale everywhere. A
    /// tick of every engine must follow.
    pub fn distrust(&self, replica: ReplicaIndex) {
        self.change_health(|health| health.distrust(replica));
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

    /// From now on answers wait until the records say what is known (S2), and writes until their
    /// extents are marked. To be called at the start, when `keeper` has nothing to write and the
    /// engines have begun nothing.
    pub fn remember(&self, keeper: Keeper) {
        let known = self.remembered();
        let mut marks = Marks::new(keeper.intent().clone());
        let (recorded, capacity) = (keeper.record().capacity, known.capacity_sectors);
        if recorded != capacity {
            marks.grow(capacity);
            // The disk grew shortly before the last end: nothing is known of what is there.
            marks.want(SectorRange::new(
                recorded,
                capacity.saturating_sub(recorded),
            ));
        }
        self.state().marks = Some(marks);
        self.memory.begin(keeper, &known);
        self.bind(self.memory.keeper().as_ref().expect("it was kept just now"));
    }

    /// Has the table that is proposed and those before it decide who is needed. The keeper is
    /// locked, so that none is forgotten; and a table is bound before it can come into force.
    fn bind(&self, keeper: &Keeper) {
        let bindings = memory::bindings(keeper);
        self.state().health.bind(bindings);
    }

    /// The disk is not served any more, and all replicas in service have been flushed since the
    /// last operation on them: what its records say, and what they are to say. `None` without
    /// records.
    pub fn forget(&self) -> Option<(Keeper, Wanted)> {
        let keeper = self.memory.end()?;
        // No guest has asked for this flush, so it decides nothing (W7). But what a replica was
        // given by it is not lost any more.
        self.change_health(|health| {
            let epoch = health.flush_begins();
            for replica in health.in_service().iter() {
                health.flush_ended(epoch, replica, true);
            }
        });
        self.state().marks = None;
        Some((keeper, memory::wanted(&self.remembered())))
    }

    /// Whether the disk has records.
    pub fn has_records(&self) -> bool {
        self.state().marks.is_some()
    }

    /// Reads what the records say. `None` without records.
    pub fn records<R>(&self, read: impl FnOnce(&Keeper) -> R) -> Option<R> {
        self.memory.keeper().as_ref().map(read)
    }

    /// The records are to have these jobs. They are written when marks are looked through, and no
    /// request waits for them. A tick of the first engine must follow.
    pub fn keep_jobs(&self, jobs: Vec<PastJob>) {
        let mut keeper = self.memory.keeper();
        let Some(keeper) = &mut *keeper else {
            return;
        };
        keeper.keep_jobs(jobs);
        let mut state = self.state();
        let state = &mut *state;
        if let Some(marks) = &mut state.marks {
            marks.want_sweep();
            self.memory.publish(&state.health, marks);
        }
    }

    /// As [`Self::add`], with an empty record.
    pub fn add_with_record(&self, replica: ReplicaIndex, holder: Holder, node_name: &str) {
        self.record_counts.forget(replica);
        // Held meanwhile: no goal is set that knows of the one change and not of the other.
        let mut keeper = self.memory.keeper();
        if let Some(keeper) = &mut *keeper {
            keeper.add(replica, holder, node_name);
            self.bind(keeper);
        }
        self.add(replica);
    }

    /// A replica has another node-name: the records are to say it.
    pub fn rename_in_records(&self, replica: ReplicaIndex, node_name: &str) {
        let mut keeper = self.memory.keeper();
        if let Some(keeper) = &mut *keeper {
            keeper.rename(replica, node_name);
            self.change_health(Health::is_to_be_written);
        }
    }

    /// A missing replica is about to rejoin ([`Self::found`]); `sequence` is that of the last slot
    /// in the file of its record.
    pub fn record_found(&self, replica: ReplicaIndex, sequence: u64) {
        if let Some(keeper) = &mut *self.memory.keeper() {
            keeper.found(replica, sequence);
        }
    }

    /// Whether the records say all that is known, durably: also after a change of the operator.
    pub fn are_records_durable(&self) -> bool {
        self.is_remembered() && self.records(Keeper::is_durable).unwrap_or(true)
    }

    /// Whether the records say all that is known.
    #[inline]
    pub(in crate::engine) fn is_remembered(&self) -> bool {
        self.memory.is_durable()
    }

    /// What is known, and up to what the records say it.
    pub(in crate::engine) fn memory(&self) -> (u64, u64) {
        (self.memory.known(), self.memory.durable())
    }

    /// Begins to write what is known to the records. `sweeps`: and takes marks away that are needed
    /// no more.
    pub(in crate::engine) fn begin_remembering(&self, sweeps: bool) -> Goal {
        // Locked first, as in `add_with_record`.
        let mut keeper = self.memory.keeper();
        let keeper = keeper.as_mut().expect("only with records");
        let idle = sweeps.then(|| self.sweep()).flatten();
        if sweeps {
            keeper.write_jobs();
        }
        let is_settled = keeper.is_durable();
        let (snapshot, wanted) = {
            let mut state = self.state();
            let state = &mut *state;
            state.health.decide_coarse(sweeps, is_settled);
            let marks = state.marks.as_ref().expect("only with records");
            self.memory.publish(&state.health, marks);
            (state.health.snapshot(), marks.wanted().clone())
        };
        let goal = memory::aim(keeper, &snapshot.remembered(), wanted, (sweeps, idle));
        self.bind(keeper);
        goal
    }

    /// Takes marks away that are needed no more. Which ones takes a look at every sector, so it is
    /// decided on a copy.
    fn sweep(&self) -> Option<Extents> {
        let (snapshot, marks) = {
            let state = self.state();
            let marks = state.marks.as_ref().expect("only with records");
            (state.health.snapshot(), marks.clone())
        };
        let idle = marks.idle(&snapshot);
        let mut state = self.state();
        let state = &mut *state;
        let is_same = state.health.memory() == snapshot.memory();
        let marks = state.marks.as_mut().expect("only with records");
        let idle = marks.sweep(idle, is_same);
        self.memory.publish(&state.health, marks);
        idle
    }

    /// What is to be written next for `goal`.
    pub(in crate::engine) fn next_record_step(&self, goal: &Goal) -> Step {
        let step = self.memory.next();
        if let Some(keeper) = &*self.memory.keeper() {
            self.bind(keeper);
        }
        if matches!(step, Step::Reached) {
            let mut state = self.state();
            if let Some(marks) = &mut state.marks {
                marks.are_marked(goal.marks());
            }
            self.memory.reached(goal);
        }
        step
    }

    /// The last step has ended with success on these replicas, and with an error on those.
    pub(in crate::engine) fn record_step_ended(&self, succeeded: ReplicaSet, failed: ReplicaSet) {
        self.memory.ended(succeeded);
        self.record_counts.round_ended(failed);
    }

    /// The last step was not made.
    pub(in crate::engine) fn record_step_left_out(&self) {
        self.memory.ended(ReplicaSet::EMPTY);
    }

    /// What an operator sees of the records.
    pub fn record_figures(&self) -> RecordFigures {
        let marked = self.records(|keeper| keeper.intent().iter().map(|range| range.count).sum());
        RecordFigures {
            marked_sectors: marked.unwrap_or_default(),
            rounds: self.record_counts.rounds(),
        }
    }

    /// Writes to the record of a replica that have failed since the start.
    pub fn record_write_errors(&self, replica: ReplicaIndex) -> u64 {
        self.record_counts.errors(replica)
    }

    /// Sectors in which replicas may differ since the unclean end before the start (S5).
    pub fn unrecovered_sectors(&self) -> u64 {
        self.health(|health| health.unrecovered().sectors())
    }

    /// Whether the guest may change all of `range`: it is marked, or there are no records.
    #[cfg(any(test, feature = "sim"))]
    pub fn is_marked(&self, range: SectorRange) -> bool {
        let state = self.state();
        let marks = state.marks.as_ref();
        marks.is_none_or(|marks| marks.are_durable(range))
    }

    /// Whether marks may be taken away, now or later.
    #[inline]
    pub(in crate::engine) fn is_sweepable(&self) -> bool {
        self.memory.is_sweepable()
    }
}
