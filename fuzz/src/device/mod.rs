//! The whole device, driven by a script: a driver that writes any bytes into virtqueues and
//! descriptors, a frontend that starts, stops, moves and resets virtqueues, plugs memory and passes
//! regions, an engine that answers in any order, and processes that are killed.
//!
//! What must hold: each accepted chain is completed once, unless its virtqueue is no longer in
//! memory; only used rings and the writable parts of chains in flight are written; stops end;
//! nothing panics.

mod driver;
mod machine;
pub mod memory;
mod model;
mod places;
mod step;
mod world;

pub use self::step::Step;

use self::machine::Machine;
use self::step::STEPS;
use self::world::{World, with_world};
use super::script::Script;

/// The most steps of a script, so that no input takes long.
const STEPS_MAX: usize = 150;

/// Does the steps of the script, and takes everything down.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
    let mut machine = Machine::new();
    machine.set_up();
    for _ in 0..STEPS_MAX {
        if script.is_empty() {
            break;
        }
        let step = STEPS[usize::from(script.u8()) % STEPS.len()];
        machine.step(step, &mut script);
    }
    machine.disconnect();
    with_world(World::finish);
    World::end();
}
