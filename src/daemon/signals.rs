//! SIGTERM and SIGINT end the daemon in an orderly way; SIGXFSZ and SIGCHLD are ignored.

use std::io;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use log::error;

use crate::sandbox::{self, ThreadKind};
use crate::worker::Stop;

/// A signal that comes again within this time was sent once.
const SAME_SIGNAL_LIMIT: Duration = Duration::from_secs(1);

/// Ignores SIGXFSZ: a write beyond RLIMIT_FSIZE is an error of one replica and must not end the
/// process. Ignores SIGCHLD: nothing waits for the end of a process that opens an image.
pub(super) fn ignore() {
    for signal in [libc::SIGXFSZ, libc::SIGCHLD] {
        // SAFETY: no handler of ours runs.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// SIGTERM and SIGINT, blocked in all threads; one thread waits for them.
pub(super) struct Signals(libc::sigset_t);

impl Signals {
    /// Blocks them in this thread and those it starts later.
    pub(super) fn block() -> io::Result<Self> {
        // SAFETY: `sigset_t` is plain data that `sigemptyset` initialises; the pointers refer to
        // local variables.
        let (set, result) = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            let result =
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            (set, result)
        };
        if result == 0 {
            Ok(Self(set))
        } else {
            Err(io::Error::from_raw_os_error(result))
        }
    }

    /// Starts the thread that turns a signal into [`Stop::Requested`]. A second signal ends the
    /// process at once, unless it is the same one again within a second: timeout(1) sends its
    /// signal to the daemon, and then to its process group.
    pub(super) fn forward_to(self, stop: Sender<Stop>) -> io::Result<()> {
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                sandbox::enter(ThreadKind::Main);
                let first = self.wait();
                let since = Instant::now();
                let _ = stop.send(Stop::Requested);
                loop {
                    let signal = self.wait();
                    if signal != first || since.elapsed() >= SAME_SIGNAL_LIMIT {
                        error!(signal; "second signal: exiting without draining requests");
                        super::logging::flush();
                        std::process::exit(128 + signal);
                    }
                }
            })?;
        Ok(())
    }

    /// The next of the signals.
    fn wait(&self) -> libc::c_int {
        let mut signal = 0;
        // SAFETY: the set is initialised and `signal` is valid for the write.
        while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
        signal
    }
}
