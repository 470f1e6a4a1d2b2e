//! A file system of one file: an image on which a test injects faults. It hangs, is slow, fails,
//! returns corrupt data or too little of it, or has blocks that cannot be read until they are
//! written.
//!
//! The file is served over FUSE from a real image, past every cache of the kernel, so that what a
//! daemon asks of it arrives here one to one. It is detached from the directory tree as soon as it
//! is mounted and reached through a descriptor of this process: a test that is killed leaves
//! neither a mount nor a hanging process behind, because its end closes the FUSE connection and
//! with it the file.
//!
//! Needs `/dev/fuse` and the right to mount (root), no FUSE library.

mod answers;
mod faults;
mod filesystem;
pub mod logged;
mod server;
pub mod voted;

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fuser::{BackgroundSession, Config, MountOption};

pub use faults::{Fault, Operation};
use filesystem::Disk;
use server::Server;

use crate::process::wait_until;

/// Time in which the last user of the file must have closed it.
pub const END_LIMIT: Duration = Duration::from_secs(30);

/// An image served over FUSE. Drop it after the processes that have it open: dropping it clears its
/// faults and waits until the file is closed. A process cannot be killed while the file hangs, so a
/// test that holds such a process clears the faults first, by a [`FaultGuard`].
pub struct FuseImage {
    server: Arc<Server>,
    session: Option<BackgroundSession>,
    deferred: Option<JoinHandle<()>>,
    /// The file and its directory. They keep the detached file system alive. The paths for other
    /// processes lead through them.
    files: Option<[File; 2]>,
    /// Where the file system is mounted, if it is not detached.
    mount_point: Option<PathBuf>,
}

/// The name of the file, if no other one is given.
const FILE_NAME: &str = "image";

/// Clears the faults of an image when dropped.
pub struct FaultGuard(Arc<Server>);

impl FuseImage {
    /// Serves the image at `backing` so that an operation that hangs holds up nothing but itself.
    pub fn serve(backing: &Path) -> Self {
        Self::serve_as(backing, FILE_NAME)
    }

    /// The same; the file has this name in [`Self::directory`].
    pub fn serve_as(backing: &Path, name: &str) -> Self {
        Self::serve_by(Server::over(backing, name.into(), false))
    }

    /// The same as a server does it that sets no option: who asks for an operation waits in the
    /// kernel until it is done, and one that writes waits for all others that lock the file.
    pub fn serve_plainly(backing: &Path) -> Self {
        Self::serve_by(Server::over(backing, FILE_NAME.into(), true))
    }

    /// The same, with the file in `mount_point`, so that a process without capabilities can open
    /// it. For a thread with mounts of its own ([`mounts::separate`]): a test that is killed leaves
    /// the mount behind.
    ///
    /// [`mounts::separate`]: crate::mounts::separate
    pub fn serve_in(mount_point: &Path, backing: &Path) -> Self {
        let server = Server::over(backing, FILE_NAME.into(), false);
        Self::mount(server, mount_point, true)
    }

    fn serve_by(server: Server) -> Self {
        let directory = tempfile::tempdir().expect("creating a directory");
        Self::mount(server, directory.path(), false)
    }

    fn mount(server: Server, mount_point: &Path, stays: bool) -> Self {
        let server = Arc::new(server);
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("quorum-blk-test".into())];
        let session = fuser::spawn_mount(Disk(Arc::clone(&server)), mount_point, &config).expect(
            "mounting a FUSE file system; this takes /dev/fuse and the right to mount (root)",
        );
        let look_up = |path: &Path| {
            let opened = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH)
                .open(path);
            opened.expect("looking the file up")
        };
        let file = look_up(&mount_point.join(&server.name));
        let files = [file, look_up(mount_point)];
        if !stays {
            detach(mount_point);
        }
        let deferred = thread::spawn({
            let server = Arc::clone(&server);
            move || server.run_deferred()
        });
        Self {
            server,
            session: Some(session),
            deferred: Some(deferred),
            files: Some(files),
            mount_point: stays.then(|| mount_point.to_owned()),
        }
    }

    /// A path to the file, for all processes.
    pub fn path(&self) -> PathBuf {
        self.path_of(0)
    }

    /// A path to the directory of the file, for all processes.
    pub fn directory(&self) -> PathBuf {
        self.path_of(1)
    }

    fn path_of(&self, which: usize) -> PathBuf {
        let files = self.files.as_ref().expect("there until dropped");
        PathBuf::from(format!(
            "/proc/{}/fd/{}",
            std::process::id(),
            files[which].as_raw_fd()
        ))
    }

    /// From now on `operation` has this fault, and no other.
    pub fn inject(&self, operation: Operation, fault: Fault) {
        self.inject_all(operation, &[fault]);
    }

    /// From now on `operation` has these faults, and no others. It is as late as the slowest of
    /// them demands, and fails with the first errno that applies.
    pub fn inject_all(&self, operation: Operation, faults: &[Fault]) {
        self.server.lock().faults.inject(operation, faults);
    }

    /// From now on a read that touches one of these bytes fails with EIO, until the byte is
    /// written: a block of a disk that has gone bad. [`Self::clear_faults`] does not change that.
    pub fn make_unreadable(&self, bytes: Range<u64>) {
        self.server.lock().faults.make_unreadable(bytes);
    }

    /// How many bytes are unreadable still.
    pub fn unreadable_bytes(&self) -> u64 {
        self.server.lock().faults.unreadable_bytes()
    }

    /// From now on it says where it has holes. Before it says that all is data.
    pub fn answer_where_holes_are(&self) {
        self.server.lock().answers_where_holes_are = true;
    }

    /// Clears all faults. Operations that hang or wait complete at once, in the order they came.
    pub fn clear_faults(&self) {
        self.server.clear_faults();
    }

    /// The server is gone, as when it is killed: all that is asked of the file fails (ENOTCONN).
    pub fn abort(&self) {
        let files = self.files.as_ref().expect("there until dropped");
        let device = files[1].metadata().expect("looking at the file").dev();
        let control = tempfile::tempdir().expect("creating a directory");
        mount_control(control.path());
        let connection = control.path().join(libc::minor(device).to_string());
        let aborted = std::fs::write(connection.join("abort"), "1");
        detach(control.path());
        aborted.expect("aborting a FUSE connection");
    }

    /// How many `operation`s were received since the file is served.
    pub fn asked(&self, operation: Operation) -> u64 {
        self.server.lock().asked[operation as usize]
    }

    /// How many of them have completed.
    pub fn done(&self, operation: Operation) -> u64 {
        self.server.lock().done[operation as usize]
    }

    /// How many bytes were written in all.
    pub fn written_bytes(&self) -> u64 {
        self.server.lock().written_bytes
    }

    /// How many of the writes had to be durable when they completed.
    pub fn durable_writes(&self) -> u64 {
        self.server.lock().durable_writes
    }

    /// Clears the faults when dropped.
    pub fn fault_guard(&self) -> FaultGuard {
        FaultGuard(Arc::clone(&self.server))
    }
}

impl Drop for FuseImage {
    fn drop(&mut self) {
        self.server.clear_faults();
        if let Some(mount_point) = &self.mount_point {
            detach(mount_point);
        }
        // With the last descriptor goes the mount, and with the mount the connection.
        drop(self.files.take());
        let session = self.session.take().expect("dropped once");
        let ended = wait_until(END_LIMIT, || session.guard.is_finished());
        self.server.lock().ended = true;
        self.server.changed.notify_all();
        if let Some(deferred) = self.deferred.take() {
            let _ = deferred.join();
        }
        if ended {
            let result = session.join();
            // The kernel says so if a request was still waiting when the mount went.
            let is_aborted = |error: &io::Error| error.kind() == io::ErrorKind::ConnectionAborted;
            if !thread::panicking() && !result.as_ref().is_err_and(is_aborted) {
                result.expect("serving the file");
            }
        } else {
            println!(
                "a FUSE image is still open after {END_LIMIT:?}; it stays until this process ends"
            );
        }
    }
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        self.0.clear_faults();
    }
}

/// Mounts the file system by which FUSE connections are controlled.
fn mount_control(mount_point: &Path) {
    let path = CString::new(mount_point.as_os_str().as_bytes()).expect("no NUL in a path");
    let kind = c"fusectl";
    // SAFETY: the strings outlive the call, and this file system takes no data.
    let result = unsafe {
        libc::mount(
            kind.as_ptr(),
            path.as_ptr(),
            kind.as_ptr(),
            0,
            std::ptr::null(),
        )
    };
    assert_eq!(result, 0, "mount: {}", io::Error::last_os_error());
}

/// Removes a mount from the directory tree. It lives on while its file is open.
fn detach(mount_point: &Path) {
    let path = CString::new(mount_point.as_os_str().as_bytes()).expect("no NUL in a path");
    // SAFETY: the path is a C string that outlives the call.
    let result = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    assert_eq!(result, 0, "umount2: {}", io::Error::last_os_error());
}
