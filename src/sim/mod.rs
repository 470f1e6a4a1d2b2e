//! A simulator: the engine of production under a seeded scheduler, with simulated replicas, guest
//! and crashes.
//!
//! One `u64` decides a whole run. [`plan`] draws the disk, the guest and the rates of the faults
//! from it; `schedule` draws what happens next, step by step. Several engines share the disk, as
//! worker threads do: each input goes to one of them, and grants of locks and ticks reach the
//! others late. `checks` compares what an engine does after each input with a naive [`model`] of
//! the disk and with the [`ledger`] of injected faults. [`runner`] runs many seeds and replays one.
//!
//! A file here imports only from files above it:
//!
//! ```text
//! random, model, contract, statistics
//! plan, replica, ledger, effects, view
//! state                       the data of a run
//! operations, checks, jobs    an operation on a replica; what must hold
//! staleness                   where a replica may be stale
//! decisions                   what a vote makes of a failed write
//! lateness                    who may be evicted, and who must be
//! patience                    how long the guest may wait
//! inputs, overlap, held       what engines are fed with, and what they ask for; what is held
//! missing                     a member that is missing at a start
//! records                     what the daemon knows after its end
//! old_copies, forced          an old image is put back; a start is forced
//! clean_end                   all is flushed; another program modifies an image
//! restart                     how the daemon starts again
//! faults, operator            what strikes by itself; what the operator does
//! schedule                    one step
//! finale                      all steps, and the end
//! runner                      many runs
//! ```
//!
//! Not simulated: guest memory and virtqueues (the device has its own tests).
#![forbid(unsafe_code)]

mod checks;
mod clean_end;
pub mod contract;
pub mod crash_states;
mod decisions;
mod durability;
pub mod effects;
mod faults;
mod finale;
mod flight;
mod forced;
mod given_up;
mod held;
mod inputs;
mod jobs;
mod lateness;
pub mod ledger;
mod missing;
pub mod model;
mod old_copies;
mod operations;
mod operator;
mod overlap;
mod patience;
mod pending;
pub mod plan;
pub mod policy;
mod preferring;
pub mod random;
mod records;
mod recovery;
mod repair_limit;
pub mod replica;
mod reports;
mod restart;
pub mod runner;
mod schedule;
mod staleness;
pub mod state;
pub mod statistics;
mod threshold;
mod view;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use self::plan::Plan;
use self::random::Random;
use self::state::World;
use self::statistics::Statistics;
use crate::common::buffer::BufferPool;
use crate::engine::interleaving;

/// A broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The tag of the rule in docs/contract.md, or a word where the contract has none.
    pub rule: &'static str,
    /// What happened.
    pub text: String,
    /// The sectors concerned, a mask; 0: all.
    pub sectors: u64,
}

impl Violation {
    pub(crate) fn new(rule: &'static str, text: impl Into<String>) -> Self {
        Self {
            rule,
            text: text.into(),
            sectors: 0,
        }
    }

    /// It concerns these sectors, a mask.
    pub(crate) fn at(self, sectors: u64) -> Self {
        Self { sectors, ..self }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match contract::first_sentence(self.rule) {
            Some(sentence) => write!(f, "{} ({sentence}): {}", self.rule, self.text),
            None => write!(f, "{}: {}", self.rule, self.text),
        }
    }
}

/// The result of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// The first violation, if any.
    pub result: Result<(), Violation>,
    /// What the run was made of.
    pub statistics: Statistics,
    /// What happened, if the run was traced.
    pub trace: Vec<String>,
    /// Of a traced run that failed: the last events on the sectors concerned.
    pub last_events: Vec<String>,
}

/// Runs the seed. The workers take their buffers from `pools`, which may serve many runs.
pub fn run(seed: u64, pools: &[BufferPool], traced: bool) -> Outcome {
    interleaving::forget();
    let mut random = Random::new(seed);
    let plan = Plan::new(&mut random);
    let mut world = World::new(plan, random, pools, traced);
    // A panic of the engine is a violation like any other. After it only the trace is read.
    let result = catch_unwind(AssertUnwindSafe(|| world.run()));
    let result = result.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
        Err(Violation::new("panic", text.unwrap_or_default()))
    });
    let last_events = match &result {
        Ok(()) => Vec::new(),
        Err(violation) => world.last_events(violation.sectors),
    };
    Outcome {
        result,
        statistics: world.statistics(),
        trace: world.take_trace(),
        last_events,
    }
}

/// Pools for the workers of a run.
pub fn pools() -> Vec<BufferPool> {
    vec![
        BufferPool::default(),
        BufferPool::default(),
        BufferPool::default(),
    ]
}
