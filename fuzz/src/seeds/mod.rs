//! Seeds: well-formed inputs that the fuzzer starts from. The inputs that it derived are in
//! `corpus/`.

pub mod device;
pub mod message;
pub mod monitor;
pub mod record;
pub mod request;

/// A name and the bytes of an input.
pub type Seed = (&'static str, Vec<u8>);
