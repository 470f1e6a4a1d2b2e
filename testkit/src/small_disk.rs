//! Small file systems for images: one with little space, and one that checks what it reads.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::loop_device::LoopDevice;

/// A tmpfs of a fixed size. It is detached from the directory tree as soon as it is mounted, and
/// ends with its last user: a test that is killed leaves no mount behind.
pub struct SmallDisk {
    root: File,
}

impl SmallDisk {
    /// Mounts one with room for this many bytes of data. Takes the right to mount (root).
    pub fn mount(bytes: u64) -> Self {
        let options = format!("size={bytes},mode=0700");
        Self {
            root: mount_detached(Path::new("quorum-blk-test"), c"tmpfs", &options),
        }
    }

    /// Mounts one that is read-only once `fill` has put files into it.
    pub fn mount_read_only(bytes: u64, fill: impl FnOnce(&Path)) -> Self {
        let options = format!("size={bytes},mode=0700");
        Self {
            root: mount_detached_with(Path::new("quorum-blk-test"), c"tmpfs", &options, |path| {
                fill(path);
                make_read_only(path);
            }),
        }
    }

    /// A path to its root, for all processes while this one lives.
    pub fn path(&self) -> PathBuf {
        path_of(&self.root)
    }
}

/// A btrfs on a file: a file system that checks what it reads, so that a block that was corrupted
/// under it is a block that cannot be read until it is written.
pub struct CheckedDisk {
    root: File,
    device: LoopDevice,
}

impl CheckedDisk {
    /// Makes one in the file `backing`, which becomes this long, and mounts it. Takes the right to
    /// do so (root), and `mkfs.btrfs`, which `make clients` installs.
    pub fn make(backing: &Path, bytes: u64) -> Self {
        let file = File::create_new(backing).expect("creating a file");
        file.set_len(bytes).expect("sizing a file");
        let made = Command::new("mkfs.btrfs")
            .arg("--quiet")
            .arg(backing)
            .output();
        let made = made.expect("running mkfs.btrfs; `make clients` installs it");
        let message = String::from_utf8_lossy(&made.stderr);
        assert!(made.status.success(), "mkfs.btrfs: {message}");
        let device = LoopDevice::attach(backing);
        Self {
            root: mount_detached(device.path(), c"btrfs", ""),
            device,
        }
    }

    /// A path to its root, for all processes while this one lives.
    pub fn path(&self) -> PathBuf {
        path_of(&self.root)
    }

    /// Corrupts the block of the file system that holds just this. There must be one, and the
    /// content must be on the disk: synced.
    pub fn corrupt(&self, content: &[u8]) {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.device.path())
            .expect("opening a loop device");
        let mut offset = 0;
        let mut found = 0;
        let mut block = vec![0; content.len()];
        while device.read_exact_at(&mut block, offset).is_ok() {
            if block == content {
                block[0] ^= 0xff;
                device.write_all_at(&block, offset).expect("corrupting it");
                found += 1;
            }
            offset += content.len() as u64;
        }
        device.sync_all().expect("syncing a loop device");
        assert_eq!(found, 1, "how often the content is there");
    }
}

fn path_of(root: &File) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        root.as_raw_fd()
    ))
}

/// Mounts a file system and takes it out of the directory tree again: it ends with its last user.
fn mount_detached(source: &Path, kind: &CStr, options: &str) -> File {
    mount_detached_with(source, kind, options, |_| {})
}

/// The same; calls `prepare` with the mount point while it is mounted there.
fn mount_detached_with(
    source: &Path,
    kind: &CStr,
    options: &str,
    prepare: impl FnOnce(&Path),
) -> File {
    let directory = tempfile::tempdir().expect("creating a directory");
    let path = c_string(directory.path().as_os_str().as_bytes());
    let source = c_string(source.as_os_str().as_bytes());
    let options = c_string(options.as_bytes());
    // SAFETY: all arguments are C strings that outlive the call.
    let result = unsafe {
        libc::mount(
            source.as_ptr(),
            path.as_ptr(),
            kind.as_ptr(),
            0,
            options.as_ptr().cast(),
        )
    };
    assert_eq!(result, 0, "mount: {}", io::Error::last_os_error());
    prepare(directory.path());
    let root = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(directory.path());
    // SAFETY: the path is a C string that outlives the call.
    let result = unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    assert_eq!(result, 0, "umount2: {}", io::Error::last_os_error());
    root.expect("opening the root of a file system")
}

fn make_read_only(mount_point: &Path) {
    let path = c_string(mount_point.as_os_str().as_bytes());
    let flags = libc::MS_REMOUNT | libc::MS_RDONLY;
    let none = std::ptr::null();
    // SAFETY: the path is a C string that outlives the call, and the others may be null.
    let result = unsafe { libc::mount(none, path.as_ptr(), none, flags, none.cast()) };
    assert_eq!(result, 0, "mount: {}", io::Error::last_os_error());
}

fn c_string(bytes: &[u8]) -> CString {
    CString::new(bytes).expect("no NUL")
}
