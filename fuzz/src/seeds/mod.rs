//! Inputs that make sense, for the fuzzer to begin with. What it has made of them is in `corpus/`.

pub mod device;
pub mod message;
pub mod monitor;
pub mod request;

/// A name and the bytes of an input.
pub type Seed = (&'static str, Vec<u8>);
