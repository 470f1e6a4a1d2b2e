//! What the integration tests share: the daemon as a process, its events, image files to serve and
//! to corrupt, files that hang and fail, the system to compare with, a Linux guest under QEMU and
//! its monitor.

// Each test is a crate of its own and uses its part of this.
#![allow(dead_code, unreachable_pub)]

pub mod client;
pub mod clients;
pub mod daemon;
pub mod disk;
pub mod frontend;
pub mod fuse;
pub mod guest;
pub mod guest_load;
pub mod images;
pub mod load;
pub mod loop_device;
pub mod monitor;
pub mod operator;
pub mod oracle;
pub mod peer;
pub mod process;
pub mod rows;
