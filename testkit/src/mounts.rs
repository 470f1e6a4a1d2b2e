//! Mounts that end with a test.

use std::io;
use std::path::Path;
use std::process::Command;
use std::thread;

use tempfile::TempDir;

use crate::HANG_LIMIT;
use crate::process::wait_until;

/// From now on the calling thread, and the threads and processes that it starts, have mounts of
/// their own. They end with the last of these: a test that is killed leaves none behind.
///
/// # Panics
/// Without the right to mount (root).
pub fn separate() {
    // SAFETY: the call takes no memory. The thread no longer shares its working directory.
    let result = unsafe { libc::unshare(libc::CLONE_NEWNS) };
    assert_eq!(result, 0, "unshare: {}", io::Error::last_os_error());
    let none = std::ptr::null();
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    // SAFETY: the path is a C string that outlives the call, and the others may be null.
    let result = unsafe { libc::mount(none, c"/".as_ptr(), none, flags, none.cast()) };
    assert_eq!(result, 0, "mount: {}", io::Error::last_os_error());
}

/// A file system in a file, mounted; unmounted when it is dropped.
pub struct Mounted {
    mount_point: TempDir,
}

impl Mounted {
    /// Mounts a file system of this kind. The loop device for it ends with the mount.
    ///
    /// # Errors
    /// What `mount` says, if it cannot be mounted.
    pub fn mount(file: &Path, kind: &str) -> Result<Self, String> {
        Self::mount_with(file, kind, "noatime")
    }

    /// The same with these mount options.
    ///
    /// # Errors
    /// What `mount` says, if it cannot be mounted.
    pub fn mount_with(file: &Path, kind: &str, options: &str) -> Result<Self, String> {
        let mount_point = tempfile::tempdir().expect("creating a directory");
        let output = Command::new("mount")
            .args(["-o", &format!("loop,{options}"), "-t", kind])
            .args([file, mount_point.path()])
            .output()
            .expect("running mount");
        match output.status.success() {
            true => Ok(Self { mount_point }),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// Its root.
    pub fn path(&self) -> &Path {
        self.mount_point.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmount = || {
            let output = Command::new("umount").arg(self.path()).output();
            output.is_ok_and(|output| output.status.success())
        };
        // A process that another thread is starting has the files of this one open for a moment,
        // and the kernel closes those of an io_uring a moment after its process has ended.
        let unmounted = wait_until(HANG_LIMIT, unmount);
        assert!(unmounted || thread::panicking(), "umount fails");
    }
}
