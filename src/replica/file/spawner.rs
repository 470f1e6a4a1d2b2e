//! The process that starts those that open images, for a daemon that has given up the rights to
//! open files and to start programs (I10).
//!
//! The daemon starts it when it gives them up. It has the rights of the daemon's user, also to what
//! is mounted, made or replaced later, and does one thing with them: it has an image opened that is
//! in an image directory, or that was named at the start.
//!
//! Invariants: what may be opened is on its command line, and nothing that it is asked changes that
//! (I11); it makes no system call that waits for the file system of an image.

#![allow(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, Once, OnceLock};

use rustix::process::{Signal, set_parent_process_death_signal, setpgid};
use rustix::thread::set_name;
use serde::{Deserialize, Serialize};

use super::descriptors::close_inherited;
use super::messages::{is_closed, pair, receive, send, send_at_once};
use super::opener::{OWN_PROGRAM, Start, Started};
use super::{ImageDirectories, OpenError};
use crate::common::NOT_POISONED;
use crate::replica::record_file::{StateDirectory, path_in_hex};
use crate::sandbox::{self, ThreadKind};

/// The first argument of this process, and the beginnings of the others.
pub(super) const ARGUMENT: &str = "--start-openers";
const FILTERED: &str = "filtered";
const READ_ONLY: &str = "read-only";
const GIVEN_STATE: &str = "given-state=";
const USUAL_STATE: &str = "usual-state=";
const IMAGE: &str = "image=";
const DIRECTORY: &str = "directory=";

/// Why no image can be opened any more.
const ENDED: &str = "the process that starts those that open images (quorum-blkd --start-openers) \
                     has ended; restart the daemon";

/// The same, where it could not even be started.
const NOT_STARTED: &str = "the process that starts those that open images could not be started; \
                           the log says why";

/// The kernel takes no longer path (PATH_MAX).
const PATH_BYTES_MAX: usize = 4095;

/// The daemon's end of its socket; `None` if it could not be started. As long as this is not set,
/// the daemon starts the processes that open images itself.
static SPAWNER: OnceLock<Option<Mutex<OwnedFd>>> = OnceLock::new();

/// Which images may be opened, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Permitted {
    /// Where they may be.
    pub directories: ImageDirectories,
    /// Where their records may be that are not beside them.
    pub records: Option<StateDirectory>,
    /// They may only be read.
    pub read_only: bool,
}

/// What the daemon asks. The socket of the process that is to open the image comes with it.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    #[serde(with = "path_in_hex")]
    path: PathBuf,
    read_only: bool,
    direct: bool,
}

/// From now on a process of its own starts those that open images, and only those that are
/// permitted.
///
/// # Errors
/// If it cannot be started: no image can be opened any more.
pub fn start_spawner(permitted: &Permitted) -> io::Result<()> {
    let start = || {
        let (socket, its_end) = pair()?;
        Command::new(OWN_PROGRAM)
            .arg0("quorum-blkd")
            .arg(ARGUMENT)
            .args(permitted.arguments(sandbox::is_filtered()))
            .stdin(its_end)
            .stdout(Stdio::null())
            .spawn()?;
        Ok(socket)
    };
    let started: io::Result<OwnedFd> = start();
    let (socket, result) = match started {
        Ok(socket) => (Some(Mutex::new(socket)), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let set = SPAWNER.set(socket);
    assert!(set.is_ok(), "a daemon has one spawner");
    result
}

/// Reports once that the process has ended.
pub(super) fn report_end() {
    static IS_REPORTED: Once = Once::new();
    let Some(Some(socket)) = SPAWNER.get() else {
        return;
    };
    if is_closed(&socket.lock().expect(NOT_POISONED)) {
        IS_REPORTED.call_once(|| {
            log::warn!(
                "the process that starts those that open images has ended: no image can be added, \
                 and none that is missing is taken in, until the daemon is restarted"
            );
        });
    }
}

/// Whether the daemon cannot open images by itself.
pub(super) fn is_needed() -> bool {
    SPAWNER.get().is_some()
}

/// Has the process started that opens an image. What comes first from the other end of `its_end` is
/// [`Started`].
///
/// # Errors
/// If the daemon starts it and that fails, or if what is to start it has ended or does not go on.
pub(super) fn start_opener(start: &Start, its_end: OwnedFd) -> io::Result<()> {
    let socket = match SPAWNER.get() {
        None => return spawn(start, its_end),
        Some(None) => return Err(io::Error::other(NOT_STARTED)),
        Some(Some(socket)) => socket,
    };
    let request = Request {
        path: start.path.clone(),
        read_only: start.read_only,
        direct: start.direct,
    };
    if request.path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    let socket = socket.lock().expect(NOT_POISONED);
    let asked = send_at_once(&*socket, &request, Some(&File::from(its_end)));
    asked.map_err(|error| match error.raw_os_error() {
        Some(libc::EPIPE | libc::ECONNRESET) => io::Error::other(ENDED),
        _ => error,
    })
}

fn spawn(start: &Start, its_end: OwnedFd) -> io::Result<()> {
    Command::new(OWN_PROGRAM)
        .arg0("quorum-blkd")
        .args(start.arguments())
        .stdin(its_end)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    Ok(())
}

/// Serves as this process, with the arguments after the first one, until the daemon ends.
pub(super) fn serve(arguments: &[OsString]) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // A listening socket of --fd, for example.
    // SAFETY: this process has opened nothing.
    unsafe { close_inherited() };
    // A signal of the terminal is for the daemon.
    let _ = setpgid(None, None);
    let _ = set_name(c"blkd-spawner");
    let (permitted, is_filtered) = Permitted::from_arguments(arguments);
    if is_filtered {
        sandbox::enter_process(ThreadKind::Spawner, None::<&File>).map_err(io::Error::other)?;
    }
    let socket = io::stdin();
    loop {
        let (request, its_end) = match receive::<Request>(&socket) {
            Ok(Some((request, Some(its_end)))) => (request, its_end),
            Ok(None) => return Ok(()),
            // What is no request has an end that closes, so that the daemon does not wait.
            Ok(Some((_, None))) => continue,
            Err(error) if error.raw_os_error().is_none() => continue,
            Err(error) => return Err(error),
        };
        let started = permitted.start(request, is_filtered);
        let started = started.and_then(|start| spawn(&start, its_end.try_clone()?.into()));
        if let Err(error) = started {
            // What is no path has none: it has a NUL.
            let failed = Started::Err(error.raw_os_error().unwrap_or(libc::EINVAL));
            // The daemon may not wait for it any more.
            let _ = send(&its_end, &failed, None);
        }
    }
}

impl Permitted {
    /// What is started at this request.
    fn start(&self, request: Request, is_filtered: bool) -> io::Result<Start> {
        let Request {
            path,
            read_only,
            direct,
        } = request;
        let found = self.directories.of(&path);
        let refused = |_: OpenError| io::Error::from_raw_os_error(libc::EACCES);
        let directory = found.map_err(refused)?.map(Path::to_owned);
        Ok(Start {
            path,
            read_only: read_only || self.read_only,
            direct,
            is_filtered,
            is_confined: true,
            directory,
            records: self.records.clone(),
        })
    }

    fn arguments(&self, is_filtered: bool) -> Vec<OsString> {
        let word = |is_set: bool, word: &str| is_set.then(|| OsString::from(word));
        let with = |beginning: &str, path: &Path| {
            let mut argument = OsString::from(beginning);
            argument.push(path);
            argument
        };
        let ImageDirectories {
            images,
            directories,
        } = &self.directories;
        let words = [word(is_filtered, FILTERED), word(self.read_only, READ_ONLY)];
        let words = words.into_iter().flatten();
        let records = self.records.iter().map(|directory| match directory {
            StateDirectory::Given(path) => with(GIVEN_STATE, path),
            StateDirectory::Usual(path) => with(USUAL_STATE, path),
        });
        let images = images.iter().map(|path| with(IMAGE, path));
        let directories = directories.iter().map(|path| with(DIRECTORY, path));
        let paths = records.chain(images).chain(directories);
        words.chain(paths).collect()
    }

    /// The reverse of [`Self::arguments`].
    fn from_arguments(arguments: &[OsString]) -> (Self, bool) {
        let (mut permitted, mut is_filtered) = (Self::default(), false);
        for argument in arguments {
            let path_after = |beginning: &str| {
                let path = argument.as_bytes().strip_prefix(beginning.as_bytes())?;
                Some(PathBuf::from(OsStr::from_bytes(path)))
            };
            let of = &mut permitted.directories;
            if argument == FILTERED {
                is_filtered = true;
            } else if argument == READ_ONLY {
                permitted.read_only = true;
            } else if let Some(path) = path_after(GIVEN_STATE) {
                permitted.records = Some(StateDirectory::Given(path));
            } else if let Some(path) = path_after(USUAL_STATE) {
                permitted.records = Some(StateDirectory::Usual(path));
            } else if let Some(path) = path_after(IMAGE) {
                of.images.push(path);
            } else if let Some(path) = path_after(DIRECTORY) {
                of.directories.push(path);
            }
        }
        (permitted, is_filtered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permitted() -> Permitted {
        Permitted {
            directories: ImageDirectories {
                images: vec!["/elsewhere/a".into()],
                directories: vec!["/ssd1".into(), OsStr::from_bytes(b"/\xff").into()],
            },
            records: Some(StateDirectory::Usual("/var/lib/records".into())),
            read_only: false,
        }
    }

    fn request(path: &str) -> Request {
        Request {
            path: path.into(),
            read_only: false,
            direct: true,
        }
    }

    #[test]
    fn its_command_line_has_what_is_permitted() {
        for (read_only, is_filtered) in [(false, true), (true, false)] {
            let permitted = Permitted {
                read_only,
                ..permitted()
            };
            let arguments = permitted.arguments(is_filtered);
            let parsed = Permitted::from_arguments(&arguments);
            assert_eq!(parsed, (permitted, is_filtered));
        }
        assert_eq!(Permitted::from_arguments(&[]), Default::default());
    }

    #[test]
    fn what_is_not_permitted_is_not_opened() {
        let permitted = permitted();
        for path in ["/etc/passwd", "/ssd10/a", "/elsewhere/b", "", "a"] {
            let refused = permitted.start(request(path), true).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EACCES), "{path}");
        }
        let inside = permitted.start(request("/ssd1/a"), true).unwrap();
        assert_eq!(inside.directory.as_deref(), Some(Path::new("/ssd1")));
        assert!(!inside.read_only && inside.is_filtered);
        let named = permitted.start(request("/elsewhere/a"), true).unwrap();
        assert_eq!(named.directory, None);
        let for_reading = Permitted {
            read_only: true,
            ..permitted
        };
        let start = for_reading.start(request("/ssd1/a"), true).unwrap();
        assert!(start.read_only);
    }
}
