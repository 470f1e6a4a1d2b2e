//! What the tests of starts share: images in a directory, refusals, a qemu-storage-daemon.
//!
//! Needs `qemu-storage-daemon` (Debian: qemu-system-common).

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;
use testkit::HANG_LIMIT;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::create_images;
use testkit::process::{Process, wait_until};

pub(crate) const DISK_BYTES: u64 = 1 << 20;

/// A directory with images, for a daemon that will not start.
pub(crate) struct Place {
    pub(crate) directory: TempDir,
    pub(crate) images: Vec<PathBuf>,
}

impl Place {
    pub(crate) fn new(replicas: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), replicas, DISK_BYTES);
        Self { directory, images }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Names of the sockets in the directory.
    pub(crate) fn sockets(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path())
            .unwrap()
            .map(Result::unwrap);
        entries
            .filter(|entry| entry.file_type().unwrap().is_socket())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    /// Starts a daemon over `images` with `options` and both sockets; returns its one line of
    /// refusal. No socket is left behind.
    pub(crate) fn refusal_of(&self, images: &[PathBuf], options: &[&str]) -> String {
        let mut arguments = self.sockets_arguments();
        arguments.extend(replica_arguments(images));
        arguments.extend(options.iter().map(OsString::from));
        let line = refusal(arguments);
        assert_eq!(self.sockets(), Vec::<String>::new(), "after {line}");
        line
    }

    pub(crate) fn refusal(&self, options: &[&str]) -> String {
        self.refusal_of(&self.images, options)
    }

    pub(crate) fn sockets_arguments(&self) -> Vec<OsString> {
        vec![
            "--socket-path".into(),
            self.path("disk.sock").into(),
            "--events".into(),
            self.path("events.sock").into(),
        ]
    }
}

/// Runs the daemon, which must refuse to start; returns the line that says why, without its
/// beginning.
pub(crate) fn refusal(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    let output = Daemon::run_to_end(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(output.stdout, b"", "{stderr}");
    // An image in use is waited for, which is logged.
    let refused: String = stderr
        .split_inclusive('\n')
        .filter(|line| !line.contains(" waiting for another process to release an image "))
        .collect();
    let line = refused.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains('\n'), "more than a line: {stderr}");
    line.strip_prefix("quorum-blkd: ")
        .expect("its name")
        .to_owned()
}

pub(crate) fn assert_says(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
}

/// A qemu-storage-daemon. Asked to end when dropped, so that it takes its FUSE mounts with it.
pub(crate) struct StorageDaemon(Process);

impl StorageDaemon {
    /// Starts it and waits until its exports are there.
    pub(crate) fn start(directory: &Path, arguments: &[&str]) -> Self {
        let (pid_file, log) = (directory.join("qemu.pid"), directory.join("qemu.log"));
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(arguments)
            .arg("--pidfile")
            .arg(&pid_file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        let process = Process::spawn(&mut command).unwrap_or_else(|error| {
            panic!(
                "qemu-storage-daemon is needed for this test and can not be run ({error}); on \
                 Debian: apt-get install qemu-system-common"
            )
        });
        let mut daemon = Self(process);
        // It writes the file when all exports are up.
        let is_ready = wait_until(HANG_LIMIT, || pid_file.exists() || !daemon.0.is_alive());
        assert!(
            is_ready && daemon.0.is_alive(),
            "qemu-storage-daemon did not come up: {}",
            fs::read_to_string(log).unwrap()
        );
        daemon
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.0.signal(libc::SIGTERM);
        self.0.wait_within(HANG_LIMIT);
    }
}
