//! The UNIX sockets that the daemon listens on: those it creates, and those it inherits.
//!
//! Invariants:
//! - Only those can connect that [`SocketAccess`] allows, from the first moment on: the socket gets
//!   its mode with its name, its group before it listens, and the name that clients know after
//!   that. In a directory where others can write, no other file is changed.
//! - The name always refers to a socket: the new one is renamed over one that a dead process left.
//!   A socket that another process listens on, and a file that is not a socket, are left alone.
//! - A [`BoundListener`] removes its name, unless another process has taken the name.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, chownat, fchmod, fstat};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::{Gid, geteuid, umask};

use crate::common::NOT_POISONED;
use crate::common::message::{Quoted, Reason};
use crate::limits::SOCKET_PATH_BYTES_MAX;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why a socket cannot be created. Each is one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process listens on it.
    #[error(
        "{}: another process listens on this socket, and may serve a disk; choose another path",
        Quoted(.0)
    )]
    InUse(PathBuf),
    /// The name is that of another kind of file.
    #[error("{}: exists and is not a socket; choose another path", Quoted(.0))]
    NotASocket(PathBuf),
    /// The kernel does not accept the name.
    #[error(
        "{}: too long for the path of a socket (at most {SOCKET_PATH_BYTES_MAX} bytes)",
        Quoted(.0)
    )]
    TooLong(PathBuf),
    /// The system returned an error.
    #[error("{}: cannot {action}: {}", Quoted(.path), Reason(.source))]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The error.
        source: io::Error,
    },
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketAccess {
    /// The permission bits of the file, chmod(2).
    pub mode: u32,
    /// The group of the file; `None`: that of the daemon.
    pub group: Option<u32>,
}

impl SocketAccess {
    /// The owner only.
    pub const OWNER: Self = Self {
        mode: 0o600,
        group: None,
    };
}

/// A listening socket with a name in the file system. Dropping it removes the name.
#[derive(Debug)]
pub struct BoundListener {
    socket: UnixListener,
    /// Absolute, because the process may change its directory.
    path: PathBuf,
    /// Device and inode of the name, to check that it still belongs to this socket.
    identity: (u64, u64),
}

impl BoundListener {
    /// The socket, in blocking mode.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsFd for BoundListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for BoundListener {
    fn drop(&mut self) {
        let ours = |found: fs::Metadata| (found.dev(), found.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A socket that clients connect to.
#[derive(Debug)]
pub enum Listener {
    /// Created by this process.
    Bound(BoundListener),
    /// Inherited. Other processes may use it, now or later, and its name is theirs.
    Passed(UnixListener),
}

impl Listener {
    /// The socket.
    pub fn socket(&self) -> &UnixListener {
        match self {
            Self::Bound(bound) => bound.socket(),
            Self::Passed(socket) => socket,
        }
    }
}

/// Listens at `path`. Replaces a socket that a dead process left there.
pub fn bind_unix_listener(path: &Path, access: SocketAccess) -> Result<BoundListener, BindError> {
    let absolute = std::path::absolute(path).map_err(failed(path, "find the current directory"))?;
    let Unnamed { socket, temporary } = Unnamed::bind(path, access)?;
    let named = || {
        listen(&socket, BACKLOG)?;
        rustix::io::ioctl_fionbio(&socket, false)?;
        let found = fs::symlink_metadata(&temporary.0)?;
        fs::rename(&temporary.0, path)?;
        Ok((found.dev(), found.ino()))
    };
    let identity = named().map_err(failed(path, "listen"))?;
    Ok(BoundListener {
        socket: socket.into(),
        path: absolute,
        identity,
    })
}

/// Checks that a process could listen at `path` now. No socket is there afterwards that was not
/// before.
pub fn check_unix_listener(path: &Path, access: SocketAccess) -> Result<(), BindError> {
    Unnamed::bind(path, access).map(drop)
}

/// A socket beside its path, under a name that clients do not know.
struct Unnamed {
    socket: OwnedFd,
    temporary: Temporary,
}

/// The name of a socket that is removed when this is dropped, unless it has got another one.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

impl Unnamed {
    fn bind(path: &Path, access: SocketAccess) -> Result<Self, BindError> {
        if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            return Err(BindError::TooLong(path.into()));
        }
        check_free_or_stale(path)?;

        let temporary = temporary_name(path).ok_or_else(|| BindError::TooLong(path.into()))?;
        if fs::symlink_metadata(&temporary).is_ok_and(|found| found.file_type().is_socket()) {
            // Left by a process with the same id that died before it could rename it.
            let _ = fs::remove_file(&temporary);
        }
        let socket = new_socket().map_err(failed(path, "create a socket"))?;
        let bound = bind_with_mode(&socket, &temporary, access.mode);
        bound.map_err(failed(path, "create the socket file"))?;
        let temporary = Temporary(temporary);
        if let Some(group) = access.group {
            let chowned = give_to_group(&temporary.0, group);
            chowned.map_err(failed(
                path,
                "give the socket to the group of --socket-group",
            ))?;
        }
        Ok(Self { socket, temporary })
    }
}

/// Held while the umask of the process is not its own.
static UMASK: Mutex<()> = Mutex::new(());

/// Binds a socket to a name that gets this mode with it. In a directory where others can write,
/// they may have put another file there before the mode of the name could be changed.
fn bind_with_mode(socket: &OwnedFd, name: &Path, mode: u32) -> io::Result<()> {
    let address = SocketAddrUnix::new(name)?;
    // The kernel takes the mode of the name from the socket, without the bits of the umask. What
    // the daemon creates has modes of its own, so other threads do not need the umask meanwhile.
    fchmod(socket, Mode::from_raw_mode(mode))?;
    let _changed = UMASK.lock().expect(NOT_POISONED);
    let before = umask(Mode::empty());
    let bound = bind(socket, &address);
    umask(before);
    Ok(bound?)
}

/// Changes the group of a socket of this user, and of nothing else that may be there instead.
fn give_to_group(name: &Path, group: u32) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = rustix::fs::open(name, flags, Mode::empty())?;
    let status = fstat(&found)?;
    let is_socket = FileType::from_raw_mode(status.st_mode) == FileType::Socket;
    if !is_socket || status.st_uid != geteuid().as_raw() || status.st_nlink != 1 {
        return Err(io::Error::other("another process has replaced it"));
    }
    let group = Some(Gid::from_raw(group));
    Ok(chownat(&found, "", None, group, AtFlags::EMPTY_PATH)?)
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> BindError {
    move |source| BindError::Io {
        path: path.into(),
        action,
        source,
    }
}

/// Checks that the path is free, or that of a socket that no process listens on.
fn check_free_or_stale(path: &Path) -> Result<(), BindError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(path, "look at the path")(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.into()));
        }
        Ok(_) => {}
    }
    let probe = new_socket().map_err(failed(path, "create a socket"))?;
    let connected = SocketAddrUnix::new(path).and_then(|address| connect(&probe, &address));
    match connected.map_err(io::Error::from) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        // It was removed in between.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(failed(
            path,
            "find out whether another process listens",
        )(error)),
        // Connected; or the queue of the listener is full, or the socket is of another type.
        Ok(()) | Err(_) => Err(BindError::InUse(path.into())),
    }
}

/// A name beside `path` that no other process uses. It contains that of `path` for `ss -x`, which
/// shows a socket under the name that it was bound to.
fn temporary_name(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.as_bytes();
    let suffix = format!(".{}", std::process::id());
    let directory_bytes = path.as_os_str().len() - name.len();
    let kept = (SOCKET_PATH_BYTES_MAX - directory_bytes).checked_sub(suffix.len())?;
    let name = [&name[..name.len().min(kept)], suffix.as_bytes()].concat();
    Some(path.with_file_name(OsStr::from_bytes(&name)))
}

/// A stream socket that does not block: connecting to a socket with a full queue would.
fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn names_in(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    #[test]
    fn only_the_owner_may_connect_and_the_name_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = bind_unix_listener(&path, SocketAccess::OWNER).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(
            names_in(directory.path()),
            ["s"],
            "nothing temporary is left"
        );
        let client = UnixStream::connect(&path).unwrap();
        listener.socket().accept().unwrap();
        drop((client, listener));
        assert!(names_in(directory.path()).is_empty());
    }

    #[test]
    fn a_socket_has_its_mode_from_the_first_moment_on() {
        let directory = tempfile::tempdir().unwrap();
        for mode in [0o600, 0o660, 0o666, 0o000] {
            let name = directory.path().join(mode.to_string());
            let socket = new_socket().unwrap();
            bind_with_mode(&socket, &name, mode).unwrap();
            assert_eq!(fs::metadata(&name).unwrap().mode() & 0o7777, mode);
        }
        let _changed = UMASK.lock().unwrap();
        let before = umask(Mode::empty());
        umask(before);
        assert!(!before.is_empty(), "it is as it was");
    }

    /// Another process may put something else in its place, in a directory where it can write.
    #[test]
    fn nothing_is_changed_that_takes_the_place_of_a_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (victim, link) = (directory.path().join("victim"), directory.path().join("l"));
        fs::write(&victim, "").unwrap();
        let temporary = temporary_name(&path).unwrap();
        let is_over = std::sync::atomic::AtomicBool::new(false);
        let group = geteuid().as_raw();
        let before = fs::metadata(&victim).unwrap();
        std::thread::scope(|scope| {
            let swapping = scope.spawn(|| {
                let mut swapped = 0;
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = std::os::unix::fs::symlink(&victim, &link);
                    let is_socket = |found: fs::Metadata| found.file_type().is_socket();
                    if fs::symlink_metadata(&temporary).is_ok_and(is_socket)
                        && fs::rename(&link, &temporary).is_ok()
                    {
                        swapped += 1;
                    }
                }
                swapped
            });
            let access = SocketAccess {
                mode: 0o666,
                group: Some(group + 1),
            };
            for _ in 0..2000 {
                let _ = check_unix_listener(&path, access);
                let _ = fs::remove_file(&temporary);
            }
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(swapping.join().unwrap() > 0, "the race was never won");
        });
        let after = fs::metadata(&victim).unwrap();
        assert_eq!((after.mode(), after.gid()), (before.mode(), before.gid()));
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "as a killed process leaves it");
        let first = bind_unix_listener(&path, SocketAccess::OWNER).unwrap();

        let error = bind_unix_listener(&path, SocketAccess::OWNER).unwrap_err();
        assert!(matches!(error, BindError::InUse(_)), "{error}");
        let text =
            "another process listens on this socket, and may serve a disk; choose another path";
        assert!(error.to_string().ends_with(text), "{error}");
        UnixStream::connect(first.path()).unwrap();
    }

    #[test]
    fn a_check_leaves_what_it_finds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let names = || fs::read_dir(directory.path()).unwrap().count();
        let check = || check_unix_listener(&path, SocketAccess::OWNER);
        check().unwrap();
        assert_eq!(names(), 0);
        drop(UnixListener::bind(&path).unwrap());
        check().unwrap();
        assert!(path.exists(), "a stale one is removed by the next listener");
        fs::remove_file(&path).unwrap();
        let _live = bind_unix_listener(&path, SocketAccess::OWNER).unwrap();
        assert!(matches!(check(), Err(BindError::InUse(_))));
        assert_eq!(names(), 1);
    }

    #[test]
    fn a_listener_with_a_full_queue_is_in_use_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _live = bind_unix_listener(&path, SocketAccess::OWNER).unwrap();
        let mut waiting = Vec::new();
        loop {
            let socket = new_socket().unwrap();
            match connect(&socket, &SocketAddrUnix::new(&path).unwrap()) {
                Ok(()) => waiting.push(socket),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        assert!(matches!(
            bind_unix_listener(&path, SocketAccess::OWNER),
            Err(BindError::InUse(_))
        ));
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            bind_unix_listener(&path, SocketAccess::OWNER),
            Err(BindError::NotASocket(_))
        ));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(
            bind_unix_listener(&link, SocketAccess::OWNER),
            Err(BindError::NotASocket(_))
        ));
        assert!(matches!(
            bind_unix_listener(directory.path(), SocketAccess::OWNER),
            Err(BindError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_name_that_another_file_took_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = bind_unix_listener(&path, SocketAccess::OWNER).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn impossible_paths_are_rejected() {
        let directory = tempfile::tempdir().unwrap();
        let room = SOCKET_PATH_BYTES_MAX - directory.path().as_os_str().len() - 1;
        let fits = directory.path().join("x".repeat(room));
        UnixStream::connect(
            bind_unix_listener(&fits, SocketAccess::OWNER)
                .unwrap()
                .path(),
        )
        .unwrap();
        let too_long = directory.path().join("x".repeat(room + 1));
        assert!(matches!(
            bind_unix_listener(&too_long, SocketAccess::OWNER),
            Err(BindError::TooLong(_))
        ));
        let nowhere = directory.path().join("none/s");
        let error = bind_unix_listener(&nowhere, SocketAccess::OWNER)
            .unwrap_err()
            .to_string();
        assert!(error.ends_with("No such file or directory"), "{error}");
        assert!(bind_unix_listener(Path::new(""), SocketAccess::OWNER).is_err());
    }
}
