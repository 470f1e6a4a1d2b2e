//! What the tests and the benchmarks share: programs as processes, a client and a frontend for the
//! disk, image files that fail and hang, the system to compare with, and Linux guests.

use std::time::Duration;

pub mod client;
pub mod daemon;
pub mod disk;
pub mod firmware;
pub mod frontend;
pub mod fuse;
pub mod guest;
pub mod guest_load;
pub mod images;
pub mod load;
pub mod loop_device;
pub mod machine;
pub mod monitor;
pub mod mounts;
pub mod oracle;
pub mod peer;
pub mod plan;
pub mod process;
pub mod programs;
pub mod rows;
pub mod sectors;
pub mod small_disk;
pub mod stop;
pub mod terminal;

/// How long a test waits for something that must happen before it counts as hung.
///
/// It detects hangs and says nothing about speed: on a loaded machine everything may take many
/// times as long as on an idle one.
pub const HANG_LIMIT: Duration = Duration::from_secs(300);

/// A number that counts something in memory.
///
/// # Panics
/// If it does not fit.
pub fn size(number: u64) -> usize {
    usize::try_from(number).expect("fits memory")
}
