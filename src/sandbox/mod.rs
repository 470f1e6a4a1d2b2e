//! What the daemon gives up when its images and sockets are open: code that takes it over from
//! inside a guest, a VMM or an image then reaches little else (I10).
//!
//! The parts are independent of each other, and of a service manager: core dumps off, another user,
//! no capabilities, `no_new_privs`, Landlock for files and the network, and a list of system calls
//! for each kind of thread. A kernel that lacks one
//! still has the others.
//!
//! Invariants:
//! - Everything holds for the whole process and what it starts later: it is applied while the
//!   process has one thread.
//! - Nothing can be taken back.
//! - This room knows paths and threads, and nothing of disks.

mod error;
mod files;
mod filter;
mod process;
mod system_calls;
mod violation;

use std::fs;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use landlock::RulesetCreated;
use rustix::thread::CapabilitySet;

pub use self::error::SandboxError;
pub use self::files::{Access, Beneath};
pub use self::process::User;
pub use self::violation::{set_log_pending, violation};
use crate::limits::THREADS_END_LIMIT;

/// Whether this process has given up rights.
static IS_APPLIED: AtomicBool = AtomicBool::new(false);

/// Whether it has, or will have, filters of system calls.
static IS_FILTERED: AtomicBool = AtomicBool::new(false);

/// Whether it is to give up rights (not `Mode::Off`).
static IS_RESTRICTED: AtomicBool = AtomicBool::new(false);

/// Whether this process has given up rights, so that files may be out of its reach.
pub fn is_applied() -> bool {
    IS_APPLIED.load(Ordering::Relaxed)
}

/// How much of the sandbox must be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// What the kernel has.
    Auto,
    /// All of it.
    On,
    /// Nothing.
    Off,
}

/// A kind of thread: it makes the system calls of its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Serves virtqueues, and makes the operations on images.
    Worker,
    /// Serves the connection of a frontend.
    Frontend,
    /// Serves clients of the operator.
    Operator,
    /// Runs commands, and looks at images that are open.
    Images,
    /// The process that starts those that open images.
    Spawner,
    /// The process that opens an image.
    Opener,
    /// Writes the log.
    Log,
    /// Looks whether threads hang, and notifies the service manager.
    Watchdog,
    /// Closes what frontends have passed.
    Closing,
    /// The main thread while the disk is served, and the one that waits for signals.
    Main,
}

/// The kinds of threads of the daemon itself.
const KINDS: [ThreadKind; 8] = [
    ThreadKind::Worker,
    ThreadKind::Frontend,
    ThreadKind::Operator,
    ThreadKind::Images,
    ThreadKind::Log,
    ThreadKind::Watchdog,
    ThreadKind::Closing,
    ThreadKind::Main,
];

/// From now on the calling thread, and those that it starts, make the system calls of this kind
/// only, and have no capability. A worker has its io_uring before. Does nothing in a process that
/// has given up nothing.
///
/// # Panics
/// If the kernel has no memory for it.
pub fn enter(kind: ThreadKind) {
    if is_restricted() {
        // Fails only where it could not be done for the whole process, which was said then.
        let _ = process::drop_capabilities(CapabilitySet::empty());
    }
    filter::enter(kind);
}

/// The same for a process of one thread that the daemon has started. Its core could be dumped again
/// from its start on. A call that is not allowed is its last message through `socket`, if it has
/// one for that.
///
/// # Errors
/// If the kernel has no filters.
pub fn enter_process<S: AsRawFd>(kind: ThreadKind, socket: Option<&S>) -> Result<(), SandboxError> {
    // Where the daemon could not do it either, it has said so.
    let _ = process::forbid_core_dumps();
    if let Some(socket) = socket {
        violation::report_to(socket);
    }
    filter::prepare(&[kind])?;
    filter::enter(kind);
    Ok(())
}

/// From now on the calling thread, and those that it starts, reach these files only. Does nothing
/// where that cannot be done: the daemon has said so.
pub fn keep_in_reach(files: &[Beneath]) {
    if let Ok(Some(ruleset)) = files::ruleset(files) {
        let _ = files::restrict(ruleset);
    }
}

/// Whether the threads of this process have filters, or will have them, so that those that it
/// starts are to have them too.
pub fn is_filtered() -> bool {
    IS_FILTERED.load(Ordering::Relaxed)
}

/// Whether an io_uring of this process is to make the operations of a disk only.
pub fn is_restricted() -> bool {
    IS_RESTRICTED.load(Ordering::Relaxed)
}

/// What is to be given up.
#[derive(Clone, Debug)]
pub struct Sandbox {
    /// How much of it must be there.
    pub mode: Mode,
    /// The user to become.
    pub user: Option<User>,
    /// The files that stay in reach.
    pub files: Vec<Beneath>,
}

/// A part of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// No core dumps, and no debugger of the same user: guest memory stays in the process.
    CoreDumps,
    /// No capability, in no set.
    Capabilities,
    /// `no_new_privs`: no program that it starts has more rights.
    Privileges,
    /// Landlock: no other files.
    Files,
    /// Landlock: no new TCP socket.
    Network,
    /// Landlock: no abstract UNIX socket of another program.
    Sockets,
    /// seccomp: no other system calls.
    SystemCalls,
    /// io_uring: no other operations.
    Operations,
}

impl Part {
    /// All parts, in the order in which they are shown.
    pub const ALL: [Self; 8] = [
        Self::CoreDumps,
        Self::Capabilities,
        Self::Privileges,
        Self::Files,
        Self::Network,
        Self::Sockets,
        Self::SystemCalls,
        Self::Operations,
    ];

    /// A short name, which stays the same.
    pub fn name(self) -> &'static str {
        match self {
            Self::CoreDumps => "core-dumps",
            Self::Capabilities => "capabilities",
            Self::Privileges => "no-new-privileges",
            Self::Files => "files",
            Self::Network => "network",
            Self::Sockets => "abstract-sockets",
            Self::SystemCalls => "system-calls",
            Self::Operations => "io-uring",
        }
    }

    /// What it does, in a few words.
    pub fn effect(self) -> &'static str {
        match self {
            Self::CoreDumps => "no core dumps, no debugger of the same user",
            Self::Capabilities => "all capabilities dropped, from all sets",
            Self::Privileges => "no program that it starts has more rights",
            Self::Files => "no files but those listed (Landlock)",
            Self::Network => "no TCP socket can be bound or connected (Landlock)",
            Self::Sockets => "no abstract UNIX socket of other programs (Landlock)",
            Self::SystemCalls => "each kind of thread has a list of system calls (seccomp)",
            Self::Operations => "io_uring makes the operations of a disk and no others",
        }
    }

    /// Why this kernel does not have it, if it does not.
    pub fn lack(self) -> Option<String> {
        match self {
            // Each kernel that has the io_uring that workers need can restrict it.
            Self::CoreDumps | Self::Capabilities | Self::Privileges | Self::Operations => None,
            Self::Files | Self::Network | Self::Sockets => files::lack(self),
            Self::SystemCalls => filter::lack(),
        }
    }
}

impl Sandbox {
    /// The parts that are to be applied and that this kernel lacks, each with the reason.
    pub fn lacks(&self) -> Vec<(Part, String)> {
        let parts = Part::ALL.into_iter();
        match self.mode {
            Mode::Off => Vec::new(),
            _ => parts
                .filter_map(|part| Some((part, part.lack()?)))
                .collect(),
        }
    }

    /// Checks, before anything is opened, that [`Self::begin`] will find what it needs.
    ///
    /// # Errors
    /// With [`Mode::On`], if the kernel lacks a part.
    pub fn check(&self) -> Result<(), SandboxError> {
        match (self.mode, self.lacks().into_iter().next()) {
            (Mode::On, Some((part, why))) => Err(SandboxError::Lacking { part, why }),
            _ => {
                let is_filtered = self.mode != Mode::Off && Part::SystemCalls.lack().is_none();
                IS_FILTERED.store(is_filtered, Ordering::Relaxed);
                IS_RESTRICTED.store(self.mode != Mode::Off, Ordering::Relaxed);
                Ok(())
            }
        }
    }

    /// Gives up all but files, other programs and system calls, in the calling thread, which must
    /// be the only one. A process that is started before [`Begun::finish`] gives up those itself.
    ///
    /// # Errors
    /// If the process has other threads, the user cannot be changed, or with [`Mode::On`] a part is
    /// refused. The process must end then: some parts are applied.
    pub fn begin(&self) -> Result<Begun, SandboxError> {
        check_alone()?;
        IS_APPLIED.store(
            self.mode != Mode::Off || self.user.is_some(),
            Ordering::Relaxed,
        );
        let mut begun = Begun {
            mode: self.mode,
            ruleset: None,
            lacks: self.lacks(),
        };
        let kept = begun.unless_forbidden(process::keep_locked_memory())?;
        if self.mode == Mode::Off {
            self.user.as_ref().map_or(Ok(()), process::become_user)?;
            return Ok(begun);
        }
        self.check()?;
        // The new user may not reach all of the paths.
        let ruleset = files::ruleset(&self.files);
        begun.ruleset = begun.unless_forbidden(ruleset)?.flatten();
        begun.unless_forbidden(process::forget_bounding_set())?;
        self.user.as_ref().map_or(Ok(()), process::become_user)?;
        // Gone with the user.
        let kept = kept.filter(|_| self.user.is_none());
        let kept = kept.unwrap_or(CapabilitySet::empty());
        begun.unless_forbidden(process::drop_capabilities(kept))?;
        // Not earlier: a change of the user resets it.
        begun.unless_forbidden(process::forbid_core_dumps())?;
        begun.unless_forbidden(process::forbid_new_privileges())?;
        Ok(begun)
    }
}

/// A sandbox of which the first half is applied.
#[derive(Debug)]
pub struct Begun {
    mode: Mode,
    ruleset: Option<RulesetCreated>,
    lacks: Vec<(Part, String)>,
}

impl Begun {
    /// Gives up the rest; each thread still has to [`enter`] its kind. Returns the parts that the
    /// kernel lacks, or that with [`Mode::Auto`] a container or a service manager has forbidden.
    ///
    /// # Errors
    /// If with [`Mode::On`] a part is refused. The process must end then.
    pub fn finish(mut self) -> Result<Vec<(Part, String)>, SandboxError> {
        let ruleset = self.ruleset.take();
        self.unless_forbidden(ruleset.map_or(Ok(()), files::restrict))?;
        if self.mode != Mode::Off && is_filtered() {
            self.unless_forbidden(filter::prepare(&KINDS))?;
        }
        Ok(self.lacks)
    }

    /// `None`: it is forbidden, and the process goes on without it.
    fn unless_forbidden<T>(
        &mut self,
        applied: Result<T, SandboxError>,
    ) -> Result<Option<T>, SandboxError> {
        match applied {
            Err(SandboxError::Refused { part, source }) if self.mode != Mode::On => {
                if !self.lacks.iter().any(|(lacked, _)| *lacked == part) {
                    self.lacks.push((part, source.to_string()));
                }
                Ok(None)
            }
            applied => applied.map(Some),
        }
    }
}

/// Checks that nothing of this process stays outside. A thread whose work has ended may be there
/// for a moment longer.
fn check_alone() -> Result<(), SandboxError> {
    let until = Instant::now() + THREADS_END_LIMIT;
    loop {
        let threads = fs::read_dir("/proc/self/task").map_err(SandboxError::Threads)?;
        match threads.count() {
            1 => return Ok(()),
            count if Instant::now() >= until => return Err(SandboxError::NotAlone(count)),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

#[cfg(test)]
mod tests;
