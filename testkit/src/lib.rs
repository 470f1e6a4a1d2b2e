//! What the integration tests share: the daemon as a process, its events, image files to serve and
//! to corrupt, files that hang and fail, the system to compare with, a Linux guest under QEMU and
//! its monitor.

pub mod client;
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
pub mod oracle;
pub mod peer;
pub mod process;
pub mod programs;
pub mod rows;
