//! What the records of the replicas say, and what waits until they say more (S2, S4).
//!
//! The records are to say what [`Health`] knows, before the guest has an answer that depends
//! on it; and which extents the guest changes, before it changes them. Both are counted and kept
//! here beside the mutex of the workers; the [`Keeper`] has a mutex of its own, which only those
//! take that write records. Without records nothing waits.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use uuid::Uuid;

use super::marks::Marks;
use crate::common::{NOT_POISONED, ReplicaSet};
use crate::quorum::health::{Binding, Health, Remembered};
use crate::record::{Extents, Keeper, Round, Threshold, Wanted, WantedMember};

/// What the workers share of the records.
#[derive(Debug)]
pub(super) struct Memory {
    /// [`Health::memory`], as published.
    known: AtomicU64,
    /// Up to this the records say it durably.
    durable: AtomicU64,
    /// [`Marks::is_sweepable`], as published.
    sweepable: AtomicBool,
    keeper: Mutex<Option<Keeper>>,
}

/// What a series of rounds is for.
#[derive(Clone, Debug)]
pub(super) struct Goal {
    memory: u64,
    marks: Extents,
}

impl Goal {
    /// What is remembered when the goal is reached, as counted by [`Health::memory`].
    pub(super) fn memory(&self) -> u64 {
        self.memory
    }

    /// What is marked then, beside what was marked before.
    pub(super) fn marks(&self) -> &Extents {
        &self.marks
    }
}

/// What is to be done next for a goal.
#[derive(Debug)]
pub(super) enum Step {
    /// These writes.
    Write(Round),
    /// Nothing: it is reached.
    Reached,
    /// It cannot be reached with these replicas.
    Blocked,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            known: AtomicU64::new(0),
            durable: AtomicU64::new(u64::MAX),
            sweepable: AtomicBool::new(false),
            keeper: Mutex::new(None),
        }
    }
}

impl Memory {
    /// Whether the records say all that is known.
    #[inline]
    pub(super) fn is_durable(&self) -> bool {
        self.known.load(Ordering::Acquire) <= self.durable.load(Ordering::Acquire)
    }

    /// What is known, as [`Health::memory`] counts it.
    pub(super) fn known(&self) -> u64 {
        self.known.load(Ordering::Acquire)
    }

    /// Up to what the records say it.
    pub(super) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// Something is known from now on, of a disk with records. The mutex of the workers is held.
    #[inline]
    pub(super) fn publish(&self, health: &Health, marks: &Marks) {
        self.known.store(health.memory(), Ordering::Release);
        self.sweepable
            .store(marks.is_sweepable(), Ordering::Relaxed);
    }

    /// Whether marks may be needed no more, now or later.
    pub(super) fn is_sweepable(&self) -> bool {
        self.sweepable.load(Ordering::Relaxed)
    }

    pub(super) fn reached(&self, goal: &Goal) {
        self.durable.fetch_max(goal.memory, Ordering::AcqRel);
    }

    /// From now on the records are kept, by this keeper.
    pub(super) fn begin(&self, mut keeper: Keeper, known: &Remembered) {
        keeper.want(&wanted(known), false);
        let durable = known.memory - u64::from(!keeper.is_durable());
        self.known.store(known.memory, Ordering::Release);
        self.durable.store(durable, Ordering::Release);
        *self.keeper() = Some(keeper);
    }

    pub(super) fn end(&self) -> Option<Keeper> {
        let keeper = self.keeper().take();
        self.durable.store(u64::MAX, Ordering::Release);
        keeper
    }

    pub(super) fn keeper(&self) -> MutexGuard<'_, Option<Keeper>> {
        self.keeper.lock().expect(NOT_POISONED)
    }

    /// The next step towards the last goal.
    pub(super) fn next(&self) -> Step {
        let mut keeper = self.keeper();
        let keeper = keeper.as_mut().expect("only with records");
        match keeper.next_round() {
            Some(round) => Step::Write(round),
            None if keeper.is_durable() => Step::Reached,
            None => Step::Blocked,
        }
    }

    /// The writes of a step have ended.
    pub(super) fn ended(&self, succeeded: ReplicaSet) {
        let mut keeper = self.keeper();
        keeper.as_mut().expect("only with records").ended(succeeded);
    }
}

/// Sets a goal: `known`, and these marks. `clearing`: marks that are needed no more.
pub(super) fn aim(
    keeper: &mut Keeper,
    known: &Remembered,
    marks: Extents,
    (sweeps, clearing): (bool, Option<Extents>),
) -> Goal {
    let wanted = wanted(known);
    match clearing {
        Some(extents) => keeper.clear(extents, &wanted),
        None => keeper.want(&wanted, sweeps),
    }
    let marks = marks.fitted(keeper.layout());
    keeper.mark(&marks);
    Goal {
        memory: known.memory,
        marks,
    }
}

/// The tables of the records that the next one has to bind.
pub(super) fn bindings(keeper: &Keeper) -> Vec<Binding> {
    let tables = keeper.binding_tables().into_iter().map(|table| {
        let places = |members: &[Uuid]| -> ReplicaSet {
            let places = members.iter().filter_map(|member| keeper.place_of(*member));
            places.collect()
        };
        let (active, inactive) = (places(&table.active), places(&table.inactive));
        let members = table.active.len() + table.inactive.len();
        Binding {
            active,
            inactive,
            gone: members - active.len() - inactive.len(),
            votes: usize::from(table.votes),
        }
    });
    tables.collect()
}

/// What the records are to say, if this is known.
pub(super) fn wanted(known: &Remembered) -> Wanted {
    let members = known.members.iter().map(|replica| {
        let copies = &known.copies[replica.as_usize()];
        WantedMember {
            replica,
            is_active: known.in_service.contains(replica),
            is_coarse: known.coarse.contains(replica),
            stale: copies.stale.clone(),
            doubtful: copies.doubtful.clone(),
        }
    });
    Wanted {
        members: members.collect(),
        threshold: Threshold {
            votes: u8::try_from(known.threshold).expect("few replicas"),
            follows_majority: known.threshold_follows,
        },
        capacity: known.capacity_sectors,
    }
}
