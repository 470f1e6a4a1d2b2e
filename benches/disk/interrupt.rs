//! Ctrl-C and similar signals end the benchmark, which then removes its files and processes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

static SIGNALLED: AtomicBool = AtomicBool::new(false);

/// A signal has asked the benchmark to end.
#[derive(Debug)]
pub struct Interrupted;

extern "C" fn handle(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    SIGNALLED.store(true, Ordering::Relaxed);
}

/// From now on, signals that would end the process set a flag instead.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        register_signal_handler(signal, handle).expect("handling a signal");
    }
}

/// Whether a signal has arrived.
pub fn check() -> Result<(), Interrupted> {
    if SIGNALLED.load(Ordering::Relaxed) {
        Err(Interrupted)
    } else {
        Ok(())
    }
}

/// Waits until `moment`, or until a signal arrives.
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
