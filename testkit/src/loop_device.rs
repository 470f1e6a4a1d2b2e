//! A block device over a file.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device; detached when it is dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Makes `file` a block device with direct I/O to it. Takes the right to do so (root).
    pub fn attach(file: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .arg(file)
            .output()
            .expect("running losetup");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "losetup: {message}");
        let device = String::from_utf8(output.stdout).expect("a path in UTF-8");
        Self(PathBuf::from(device.trim_end()))
    }

    /// Its device node.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A process that still has it open keeps it.
        let detached = Command::new("losetup")
            .arg("--detach")
            .arg(&self.0)
            .status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("cannot detach {}", self.0.display());
        }
    }
}
