//! A model of the protocol between guest, daemon, replicas and records, explored whole: every order
//! of what can happen in a short history, every failure, every crash and every start after it.
//!
//! It knows nothing of the code: each of its files says of which part of `src/` it is a model.
//! docs/proofs.md says what it leaves out.

mod crash;
mod daemon;
mod disk;
mod guest;
mod keeper;
mod needed;
mod properties;
mod record;
mod requests;
mod rules;
mod service;
mod sets;
mod start;
mod steps;
mod world;
mod worlds;

use std::collections::BTreeSet;
use std::thread;
use std::time::Instant;

use stateright::{Checker, Expectation, HasDiscoveries, Model, Path};

use crate::rules::Rule;
use crate::world::{Action, State, World};

/// What the exploration of a world has found, by the names of the properties.
struct Found {
    reached: BTreeSet<&'static str>,
    violated: Option<(&'static str, Path<State, Action>)>,
}

/// Explores all of a world, or until a property is violated.
fn explore(world: World) -> Found {
    let began = Instant::now();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let name = format!("{:?}, {:?}", world.rules, world.budget);
    let checker = world.checker().threads(threads);
    let checker = checker
        .finish_when(HasDiscoveries::AnyFailures)
        .spawn_bfs()
        .join();
    let (states, depth) = (checker.unique_state_count(), checker.max_depth());
    println!(
        "{name}: {states} states, depth {depth}, {:.1?}",
        began.elapsed()
    );
    let mut found = Found {
        reached: BTreeSet::new(),
        violated: None,
    };
    for (name, path) in checker.discoveries() {
        let property = checker.model().property(name);
        if property.expectation == Expectation::Sometimes {
            found.reached.insert(name);
        } else {
            found.violated = Some((name, path));
        }
    }
    assert!(checker.is_done(), "all is explored, or something is found");
    found
}

/// Explores all of these worlds, and returns what was reached in any of them.
fn explore_all(worlds: Vec<World>) -> BTreeSet<&'static str> {
    let mut reached = BTreeSet::new();
    for world in worlds {
        let found = explore(world);
        if let Some((name, path)) = found.violated {
            let steps = path.into_actions();
            panic!("{name:?} is violated after {steps:#?}");
        }
        reached.extend(found.reached);
    }
    reached
}

/// All worlds that take some seconds. What is to be possible is possible in one of them.
#[test]
fn keeps_the_contract() {
    let reached = explore_all(worlds::small());
    let possible = [
        "a gap is left",
        "a winner is settled",
        "some images are served",
    ];
    assert_eq!(reached, possible.into());
}

/// Worlds that take minutes.
#[test]
#[ignore = "takes minutes: make protocol LARGE=1"]
fn keeps_the_contract_in_large_worlds() {
    explore_all(worlds::large());
}

/// Without any of its rules the protocol violates a property.
#[test]
fn needs_each_of_its_rules() {
    for rule in Rule::ALL {
        let found = explore(worlds::that_misses(rule));
        let (name, path) = found
            .violated
            .unwrap_or_else(|| panic!("{rule:?} is not missed"));
        println!(
            "  {name:?} is violated after {} steps",
            path.into_actions().len()
        );
    }
}
