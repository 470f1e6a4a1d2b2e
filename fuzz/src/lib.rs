//! What the fuzz targets do with their input, and what must hold whatever it is.
//!
//! Each module has a function `run` that takes the bytes of one input and panics where something
//! does not hold. libFuzzer calls it from `targets/`, the ordinary test `tests/fuzz.rs` with each
//! file of `corpus/`.

pub mod device;
pub mod guest_memory;
pub mod message;
pub mod monitor;
pub mod naive;
#[path = "../../tests/operator/recorder.rs"]
pub mod operator;
pub mod request;
pub mod script;
pub mod seeds;
pub mod signals;
