//! Landlock: the process reaches the files that a list names, and makes no TCP connection.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, Scope,
};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;

use super::{Part, SandboxError};

/// The version of Landlock whose rights to files are all denied but for those that [`Access`]
/// gives. It is the first one that knows calls to devices.
const RIGHTS: ABI = ABI::V5;

/// A file, or a directory with all that is in it, now or later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beneath {
    /// Its path. What does not exist stays out of reach.
    pub path: PathBuf,
    /// What may be done to it.
    pub access: Access,
}

/// What may be done to a file, or to all in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read, write, make, rename and remove files; make calls to devices.
    Write,
    /// Read files and list directories.
    Read,
    /// Start the program, or use it as a library.
    Execute,
    /// Read and write what is there, also with calls to devices, but make and remove nothing.
    Use,
    /// Remove files, for the names of sockets.
    Remove,
}

impl Access {
    /// As `--print-sandbox` shows it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Read => "read",
            Self::Execute => "execute",
            Self::Use => "use",
            Self::Remove => "remove",
        }
    }

    fn rights(self) -> BitFlags<AccessFs> {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        match self {
            Self::Write => {
                read | AccessFs::WriteFile
                    | AccessFs::Truncate
                    | AccessFs::IoctlDev
                    | AccessFs::MakeReg
                    | AccessFs::RemoveFile
            }
            Self::Read => read,
            Self::Execute => read | AccessFs::Execute,
            Self::Use => read | AccessFs::WriteFile | AccessFs::IoctlDev,
            Self::Remove => AccessFs::RemoveFile.into(),
        }
    }
}

/// The version of Landlock that this kernel has, 0 if it has none.
fn version() -> i64 {
    const VERSION_FLAG: u32 = 1;
    // SAFETY: with this flag, the call takes no memory and returns a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            VERSION_FLAG,
        )
    };
    version.max(0)
}

/// Why this kernel does not have `part`, if it does not.
pub(super) fn lack(part: Part) -> Option<String> {
    let (needed, since) = match part {
        Part::Network => (4, "6.7"),
        Part::Sockets => (6, "6.12"),
        // Truncation and calls to devices are files' rights as well.
        _ => (5, "6.10"),
    };
    match version() {
        0 => Some("the kernel has no Landlock, or it is not enabled (lsm=)".to_owned()),
        version if version < needed => Some(format!(
            "it needs Landlock {needed} (Linux {since}), the kernel has {version}"
        )),
        _ => None,
    }
}

/// What [`restrict`] applies; `None` where the kernel has no Landlock. Paths that do not exist are
/// left out.
pub(super) fn ruleset(files: &[Beneath]) -> Result<Option<RulesetCreated>, SandboxError> {
    if version() == 0 {
        return Ok(None);
    }
    let created = || {
        let handled = Ruleset::default().handle_access(AccessFs::from_all(RIGHTS))?;
        let handled = handled.handle_access(AccessNet::from_all(ABI::V4))?;
        handled.scope(Scope::AbstractUnixSocket)?.create()
    };
    let mut ruleset = created().map_err(refused)?;
    for file in files {
        let Some((opened, is_directory)) = open(file)? else {
            continue;
        };
        let mut rights = file.access.rights();
        if !is_directory {
            rights &= AccessFs::from_file(RIGHTS);
        }
        let rule = PathBeneath::new(opened, rights);
        match (&mut ruleset).add_rule(rule) {
            Ok(_) => {}
            // Of a file that is in no directory, such as a memfd, which Landlock never denies.
            Err(error) if is_of_no_directory(&error) => {}
            Err(error) => return Err(refused(error)),
        }
    }
    Ok(Some(ruleset))
}

fn is_of_no_directory(error: &RulesetError) -> bool {
    let error: &(dyn std::error::Error + 'static) = error;
    let causes = std::iter::successors(Some(error), |error| error.source());
    let mut errors = causes.filter_map(|cause| cause.downcast_ref::<io::Error>());
    errors.any(|error| error.raw_os_error() == Some(libc::EBADFD))
}

/// Opens a file as a place, and returns whether it is a directory. `None`: it does not exist.
fn open(file: &Beneath) -> Result<Option<(OwnedFd, bool)>, SandboxError> {
    for is_directory in [true, false] {
        let mut flags = OFlags::PATH | OFlags::CLOEXEC;
        flags.set(OFlags::DIRECTORY, is_directory);
        match openat(CWD, &file.path, flags, Mode::empty()) {
            Ok(opened) => return Ok(Some((opened, is_directory))),
            Err(Errno::NOTDIR) if is_directory => {}
            // Nor what this user cannot reach in any case.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => return Ok(None),
            Err(errno) => {
                let (path, source) = (file.path.clone(), errno.into());
                return Err(SandboxError::Directory { path, source });
            }
        }
    }
    Ok(None)
}

/// Restricts the calling thread, and those that it starts later.
pub(super) fn restrict(ruleset: RulesetCreated) -> Result<(), SandboxError> {
    ruleset.restrict_self().map(drop).map_err(refused)
}

fn refused(error: RulesetError) -> SandboxError {
    other(&error)
}

fn other(error: &dyn std::error::Error) -> SandboxError {
    SandboxError::Refused {
        part: Part::Files,
        source: io::Error::other(error.to_string()),
    }
}
