//! The Unix sockets the daemon listens on: those it makes, and those it was passed.
//!
//! Invariants:
//! - Only the owner can connect (mode 0600), from the first moment on: the socket gets its mode
//!   before it listens and its name after.
//! - The name never points to nothing: the new socket is renamed over what a dead process left. A
//!   socket at which somebody listens, and anything that is no socket, is left alone.
//! - A [`BoundListener`] takes its name away with it, unless the name has become another's.

use std::ffi::{OsStr, c_char};
use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::common::message::{Quoted, Reason};
use crate::limits::SOCKET_PATH_BYTES_MAX;

/// Connections that wait to be accepted.
const BACKLOG: libc::c_int = 128;

/// Why there is no socket. Each is one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody listens there.
    #[error("{}: another process listens on this socket", Quoted(.0))]
    InUse(PathBuf),
    /// Something else has this name.
    #[error("{}: exists and is not a socket", Quoted(.0))]
    NotASocket(PathBuf),
    /// The kernel could not take the name.
    #[error("{}: too long for the path of a socket (at most {SOCKET_PATH_BYTES_MAX} bytes)", Quoted(.0))]
    TooLong(PathBuf),
    /// The system refused.
    #[error("{}: cannot {action}: {}", Quoted(.path), Reason(.source))]
    Io {
        /// The socket.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A listening socket with a name in the file system, which goes when this is dropped.
#[derive(Debug)]
pub struct BoundListener {
    socket: UnixListener,
    /// Absolute, as the process may change its directory.
    path: PathBuf,
    /// Device and inode of the name: how it is known to be still ours.
    identity: (u64, u64),
}

impl BoundListener {
    /// The socket; blocking, as long as its user does not decide otherwise.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// Where it listens.
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

/// A socket on which somebody is awaited.
#[derive(Debug)]
pub enum Listener {
    /// Made here.
    Bound(BoundListener),
    /// Made by who started the process. It may have other users, now or later, and its name is
    /// theirs.
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

/// The listening UNIX stream socket that was passed as descriptor `fd`, if it is one.
///
/// # Safety
/// Nothing else in this process may own the descriptor.
pub unsafe fn adopt_unix_listener(fd: RawFd) -> Option<UnixListener> {
    if fd <= libc::STDERR_FILENO {
        return None;
    }
    let option = |name| {
        let mut value: libc::c_int = 0;
        let mut len = libc::socklen_t::try_from(size_of_val(&value)).expect("4 bytes");
        // SAFETY: `value` and `len` are valid for the write of an int option.
        let result = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_SOCKET,
                name,
                (&raw mut value).cast(),
                &raw mut len,
            )
        };
        (result == 0).then_some(value)
    };
    let is_as_needed = option(libc::SO_DOMAIN) == Some(libc::AF_UNIX)
        && option(libc::SO_TYPE) == Some(libc::SOCK_STREAM)
        && option(libc::SO_ACCEPTCONN) == Some(1);
    // SAFETY: the descriptor is open (the calls above succeeded), and the caller says that nothing
    // else owns it.
    is_as_needed.then(|| unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Listens at `path`, in place of a socket that a dead process left there, if there is one.
pub fn bind_unix_listener(path: &Path) -> Result<BoundListener, BindError> {
    let failed = |action| {
        move |source| BindError::Io {
            path: path.into(),
            action,
            source,
        }
    };
    if path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
        return Err(BindError::TooLong(path.into()));
    }
    refuse_what_is_not_stale(path)?;

    let absolute = std::path::absolute(path).map_err(failed("find the current directory"))?;
    let temporary = temporary_name(path).ok_or_else(|| BindError::TooLong(path.into()))?;
    if fs::symlink_metadata(&temporary).is_ok_and(|found| found.file_type().is_socket()) {
        // Left by a process with our id that died in the middle of this.
        let _ = fs::remove_file(&temporary);
    }
    let socket = new_socket().map_err(failed("create a socket"))?;
    bind(&socket, &temporary).map_err(failed("create the socket file"))?;
    let bound = || {
        fs::set_permissions(&temporary, Permissions::from_mode(0o600))?;
        listen(&socket)?;
        let found = fs::symlink_metadata(&temporary)?;
        fs::rename(&temporary, path)?;
        Ok((found.dev(), found.ino()))
    };
    let identity = bound().map_err(|error| {
        let _ = fs::remove_file(&temporary);
        failed("listen")(error)
    })?;
    Ok(BoundListener {
        socket: socket.into(),
        path: absolute,
        identity,
    })
}

fn refuse_what_is_not_stale(path: &Path) -> Result<(), BindError> {
    let failed = |action, source| BindError::Io {
        path: path.into(),
        action,
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at the path", error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(BindError::NotASocket(path.into()));
        }
        Ok(_) => {}
    }
    let probe = new_socket().map_err(|error| failed("create a socket", error))?;
    match connect(&probe, path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        // Gone in the meantime.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Err(failed("tell whether another process listens", error))
        }
        // Connected, or would be if its queue were not full or it were a stream socket.
        Ok(()) | Err(_) => Err(BindError::InUse(path.into())),
    }
}

/// A name beside `path` that no other process takes, and that tells `ss -x` whose it is: the kernel
/// goes on showing a socket under the name it was bound to.
fn temporary_name(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.as_bytes();
    let suffix = format!(".{}", std::process::id());
    let directory_bytes = path.as_os_str().len() - name.len();
    let kept = (SOCKET_PATH_BYTES_MAX - directory_bytes).checked_sub(suffix.len())?;
    let name = [&name[..name.len().min(kept)], suffix.as_bytes()].concat();
    Some(path.with_file_name(OsStr::from_bytes(&name)))
}

/// A stream socket that does not block: to connect to one whose queue is full would.
fn new_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed.
    let fd = unsafe {
        libc::socket(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            0,
        )
    };
    check(fd)?;
    // SAFETY: the call made it just now, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(socket: &OwnedFd, path: &Path) -> io::Result<()> {
    let (address, length) = address(path)?;
    // SAFETY: `address` is a sockaddr_un of that length and outlives the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })
}

fn connect(socket: &OwnedFd, path: &Path) -> io::Result<()> {
    let (address, length) = address(path)?;
    // SAFETY: `address` is a sockaddr_un of that length and outlives the call.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) })
}

fn listen(socket: &OwnedFd) -> io::Result<()> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
    UnixListener::from(socket.try_clone()?).set_nonblocking(false)
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > SOCKET_PATH_BYTES_MAX || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut address = libc::sockaddr_un {
        sun_family: libc::sa_family_t::try_from(libc::AF_UNIX).expect("a small constant"),
        sun_path: [0; SOCKET_PATH_BYTES_MAX + 1],
    };
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = c_char::from_ne_bytes([*from]);
    }
    let length = libc::socklen_t::try_from(size_of_val(&address)).expect("a small constant");
    Ok((address, length))
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        ..0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
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
    fn only_the_owner_may_connect_and_the_name_goes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = bind_unix_listener(&path).unwrap();
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
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "as a killed process leaves it");
        let first = bind_unix_listener(&path).unwrap();

        let error = bind_unix_listener(&path).unwrap_err();
        assert!(matches!(error, BindError::InUse(_)), "{error}");
        assert!(
            error
                .to_string()
                .ends_with("another process listens on this socket")
        );
        UnixStream::connect(first.path()).unwrap();
    }

    #[test]
    fn a_listener_whose_queue_is_full_is_alive_and_nobody_waits_for_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _live = bind_unix_listener(&path).unwrap();
        let mut waiting = Vec::new();
        loop {
            let socket = new_socket().unwrap();
            match connect(&socket, &path) {
                Ok(()) => waiting.push(socket),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        assert!(matches!(
            bind_unix_listener(&path),
            Err(BindError::InUse(_))
        ));
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            bind_unix_listener(&path),
            Err(BindError::NotASocket(_))
        ));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(matches!(
            bind_unix_listener(&link),
            Err(BindError::NotASocket(_))
        ));
        assert!(matches!(
            bind_unix_listener(directory.path()),
            Err(BindError::NotASocket(_))
        ));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_name_that_became_anothers_is_left_to_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = bind_unix_listener(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn paths_that_cannot_be() {
        let directory = tempfile::tempdir().unwrap();
        let room = SOCKET_PATH_BYTES_MAX - directory.path().as_os_str().len() - 1;
        let fits = directory.path().join("x".repeat(room));
        UnixStream::connect(bind_unix_listener(&fits).unwrap().path()).unwrap();
        let too_long = directory.path().join("x".repeat(room + 1));
        assert!(matches!(
            bind_unix_listener(&too_long),
            Err(BindError::TooLong(_))
        ));
        let nowhere = directory.path().join("none/s");
        let error = bind_unix_listener(&nowhere).unwrap_err().to_string();
        assert!(error.ends_with("No such file or directory"), "{error}");
        assert!(bind_unix_listener(Path::new("")).is_err());
    }
}
