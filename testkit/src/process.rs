//! Child processes that end with their test.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// Time between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A child process; killed and reaped when dropped, and killed by the kernel when the thread that
/// started it ends without having dropped it (a test run that was killed).
pub struct Process {
    child: Child,
    exit_status: Option<ExitStatus>,
}

impl Process {
    /// Starts `command`, in a process group of its own: Ctrl-C is for the program that started it.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        // SAFETY: prctl is async-signal-safe and the closure touches no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        command.process_group(0);
        Ok(Self {
            child: command.spawn()?,
            exit_status: None,
        })
    }

    /// Starts `command`, as [`Self::spawn`] does, without copying the page tables of this process.
    /// That takes longer than anything else if it has much memory. `setpriv` has the kernel kill it
    /// with this thread. `streams` sets its standard streams; of `command` the program and the
    /// arguments count.
    ///
    /// # Errors
    /// If `setpriv` cannot be started. If `command` cannot be, it ends at once.
    pub(crate) fn spawn_light(
        command: &Command,
        streams: impl FnOnce(&mut Command),
    ) -> io::Result<Self> {
        let mut light = Command::new("setpriv");
        light.args(["--pdeathsig", "KILL", "--"]);
        light.arg(command.get_program()).args(command.get_args());
        streams(&mut light);
        // With a function that runs in the child, `Command` would fork.
        let child = light.process_group(0).spawn()?;
        Ok(Self {
            child,
            exit_status: None,
        })
    }

    /// Starts `command` as the leader of a session, with the terminal that is its standard input.
    pub(crate) fn spawn_in_session(command: &mut Command) -> io::Result<Self> {
        // SAFETY: the calls are async-signal-safe, and the closure touches no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1
                    || libc::setsid() == -1
                    || libc::ioctl(0, libc::TIOCSCTTY, 0) == -1
                {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        Ok(Self {
            child: command.spawn()?,
            exit_status: None,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        if self.exit_status.is_none() {
            self.exit_status = self.child.try_wait().expect("waiting for a child");
        }
        self.exit_status
    }

    /// Ends its standard input, if that is a pipe.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Is it still running?
    pub fn is_alive(&mut self) -> bool {
        self.exit_status().is_none()
    }

    /// Waits for its end, for `limit` at most.
    pub fn wait_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        wait_until(limit, || self.exit_status().is_some());
        self.exit_status
    }

    /// Sends a signal, unless it has ended.
    pub fn signal(&mut self, signal: libc::c_int) {
        if self.is_alive() {
            let id = libc::pid_t::try_from(self.child.id()).expect("process ids are positive");
            // SAFETY: kill takes no pointer; the child was not reaped, so the id is still its own.
            let result = unsafe { libc::kill(id, signal) };
            assert_eq!(result, 0, "kill: {}", io::Error::last_os_error());
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit_status.is_none() {
            // Both fail only for a child that is gone, which is what they are for.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs a program of the system to its end.
///
/// # Panics
/// If it cannot be started, or fails.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
}

/// A path as an argument of [`run`].
///
/// # Panics
/// If it is not UTF-8.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Waits for `condition`, for `limit` at most; returns whether it holds.
pub fn wait_until(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(POLL_INTERVAL);
    }
}
