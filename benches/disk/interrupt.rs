//! Ctrl-C and the like end the benchmark with everything removed that it had made.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

static CAME: AtomicBool = AtomicBool::new(false);

/// The user wants it to end.
#[derive(Debug)]
pub struct Interrupted;

extern "C" fn handle(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    CAME.store(true, Ordering::Relaxed);
}

/// From now on signals that would end the process are only noted.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        register_signal_handler(signal, handle).expect("handling a signal");
    }
}

/// Has one come?
pub fn check() -> Result<(), Interrupted> {
    if CAME.load(Ordering::Relaxed) {
        Err(Interrupted)
    } else {
        Ok(())
    }
}

/// Waits until `moment`, unless one comes.
pub fn wait_until(moment: Instant) -> Result<(), Interrupted> {
    loop {
        check()?;
        let left = moment.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(Duration::from_millis(200)));
    }
}
