//! What the fuzz targets do with an input, and what must hold for every input.
//!
//! Each target is a module with a function `run` that takes the bytes of one input and panics where
//! a rule is broken. libFuzzer calls it from `targets/`, and the test `tests/fuzz.rs` calls it with
//! each file of `corpus/`.

pub mod device;
pub mod guest_memory;
pub mod message;
pub mod monitor;
pub mod naive;
#[path = "../../tests/operator/recorder.rs"]
pub mod operator;
pub mod record;
pub mod request;
pub mod script;
pub mod seeds;
pub mod signals;
