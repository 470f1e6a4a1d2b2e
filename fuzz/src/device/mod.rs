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
mod world;

use std::cell::RefCell;

use quorum_blk::device::frontend::VirtqueueServer;
use quorum_blk::device::inflight::QueueRegion;

use self::machine::Machine;
use self::world::World;
use super::script::Script;

/// What a script does at most: no input takes long.
const STEPS_MAX: usize = 150;

thread_local! {
    /// Here, since who serves the rings of a frontend must be one that can go to another thread.
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
}

fn with_world<R>(action: impl FnOnce(&mut World) -> R) -> R {
    WORLD.with_borrow_mut(|world| action(world.as_mut().expect("there is one while a script runs")))
}

/// Serves the rings of the world of this thread.
struct Server;

impl VirtqueueServer for Server {
    fn refresh(&self, rings: Vec<(u16, Option<QueueRegion>)>) {
        with_world(|world| world.refresh(rings));
    }

    fn flush(&self) -> bool {
        with_world(|world| world.flushes)
    }
}

/// What a step of a script does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs, reason = "each is a line of `Machine::step`")]
pub enum Step {
    Request,
    Serve,
    Answer,
    Sleep,
    Offer,
    Descriptor,
    Header,
    Segment,
    Put,
    Index,
    Stop,
    Start,
    Enable,
    Size,
    Addresses,
    Base,
    Features,
    MemoryTable,
    AddMemory,
    RemoveMemory,
    Reset,
    Region,
    RegionBytes,
    OtherRegion,
    CacheMode,
    Log,
    Patience,
    Disconnect,
    Kill,
    SetUp,
}

const STEPS: [Step; 30] = [
    Step::Request,
    Step::Serve,
    Step::Answer,
    Step::Sleep,
    Step::Offer,
    Step::Descriptor,
    Step::Header,
    Step::Segment,
    Step::Put,
    Step::Index,
    Step::Stop,
    Step::Start,
    Step::Enable,
    Step::Size,
    Step::Addresses,
    Step::Base,
    Step::Features,
    Step::MemoryTable,
    Step::AddMemory,
    Step::RemoveMemory,
    Step::Reset,
    Step::Region,
    Step::RegionBytes,
    Step::OtherRegion,
    Step::CacheMode,
    Step::Log,
    Step::Patience,
    Step::Disconnect,
    Step::Kill,
    Step::SetUp,
];

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
    WORLD.set(None);
}
