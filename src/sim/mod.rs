//! A simulator: the engine of production under a seeded scheduler, with simulated replicas, guest
//! and crashes.
//!
//! One `u64` decides a whole run: the disk and the guest ([`plan`]), which faults strike (`faults`,
//! `operations`), and in which order everything happens (`schedule`). What the engine does is
//! checked after every step (`checks`) against a naive model of the disk ([`model`]) and the books
//! kept of the faults ([`ledger`]). [`runner`] does this for many seeds; a seed that fails is
//! replayed with a trace.
//!
//! The engine is not changed for this, except that a test can break one of its rules
//! ([`mutant`](crate::engine::mutant)) to show that the checks notice.
//!
//! Not simulated: guest memory and rings (the device is tested by itself), and what two workers do
//! at the same instant: here one input is dealt with after the other.

mod checks;
pub mod crash_states;
pub mod effects;
mod faults;
pub mod ledger;
pub mod model;
mod operations;
mod operator;
pub mod plan;
pub mod random;
pub mod replica;
pub mod runner;
mod schedule;
pub mod world;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use self::plan::Plan;
use self::random::Random;
use self::world::{Statistics, World};
use crate::common::buffer::BufferPool;

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The promise, by its name in the contract.
    pub promise: &'static str,
    /// What happened.
    pub text: String,
}

impl Violation {
    pub(crate) fn new(promise: &'static str, text: impl Into<String>) -> Self {
        Self {
            promise,
            text: text.into(),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.promise, self.text)
    }
}

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// The first violation, if any.
    pub result: Result<(), Violation>,
    /// What the run was made of.
    pub statistics: Statistics,
    /// What happened, if it was asked for.
    pub trace: Vec<String>,
}

/// Runs the seed. `pools` are used for the buffers of the workers; a pool may serve many runs.
pub fn run(seed: u64, pools: &[BufferPool], traced: bool) -> Outcome {
    let mut random = Random::new(seed);
    let plan = Plan::new(&mut random);
    let mut world = World::new(plan, random, pools, traced);
    // A panic of the engine is a violation like any other; the world is not used after it but for
    // its trace.
    let result = catch_unwind(AssertUnwindSafe(|| world.run()));
    let result = result.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_string()));
        Err(Violation::new("panic", text.unwrap_or_default()))
    });
    Outcome {
        result,
        statistics: world.statistics(),
        trace: world.take_trace(),
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
