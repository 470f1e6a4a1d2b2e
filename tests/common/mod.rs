//! What the integration tests share: the daemon as a process, its events, image files to serve and to
//! corrupt, and a Linux guest under QEMU.

// Each test is a crate of its own and uses its part of this.
#![allow(dead_code, unreachable_pub)]

pub mod client;
pub mod daemon;
pub mod guest;
pub mod images;
pub mod process;
