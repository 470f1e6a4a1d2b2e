//! A file system with little space, for images that fill it.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// A tmpfs of a fixed size. It is detached from the directory tree as soon as it is mounted, and
/// ends with its last user: a test that is killed leaves no mount behind.
pub struct SmallDisk {
    root: File,
}

impl SmallDisk {
    /// Mounts one with room for this many bytes of data. Takes the right to mount (root).
    pub fn mount(bytes: u64) -> Self {
        let directory = tempfile::tempdir().expect("creating a directory");
        let path = CString::new(directory.path().as_os_str().as_bytes()).expect("no NUL in a path");
        let options = CString::new(format!("size={bytes},mode=0700")).expect("no NUL in options");
        // SAFETY: all arguments are C strings that outlive the call.
        let result = unsafe {
            libc::mount(
                c"quorum-blk-test".as_ptr(),
                path.as_ptr(),
                c"tmpfs".as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        assert_eq!(result, 0, "mount: {}", io::Error::last_os_error());
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(directory.path());
        // SAFETY: the path is a C string that outlives the call.
        let result = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        assert_eq!(result, 0, "umount2: {}", io::Error::last_os_error());
        Self {
            root: root.expect("opening the root of a tmpfs"),
        }
    }

    /// A path to its root, for all processes while this one lives.
    pub fn path(&self) -> PathBuf {
        let descriptor = self.root.as_raw_fd();
        PathBuf::from(format!("/proc/{}/fd/{descriptor}", std::process::id()))
    }
}
