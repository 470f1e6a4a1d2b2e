//! The whole device on a script: a driver that writes what it likes into rings and descriptors, a
//! frontend that starts, stops, moves and resets rings, plugs memory and hands over regions, an
//! engine that answers in any order, and processes that are killed.
//!
//! What must hold: whatever is taken off a ring is given back once, unless the ring itself is not
//! there any more; nothing but used rings and the writable parts of what is out is written to;
//! stops end; nothing panics.

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

/// What a script does at most: no input takes long.
const STEPS_MAX: usize = 150;

/// Does what the script says, and takes everything down.
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
