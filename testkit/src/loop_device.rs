//! A block device over a file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device; detached when it is dropped.
pub struct LoopDevice {
    node: PathBuf,
    /// The longest request, in KiB, to be restored: the kernel keeps it for the next user.
    longest_request: Option<String>,
}

impl LoopDevice {
    /// Makes `file` a block device with direct I/O to it. Takes the right to do so (root).
    pub fn attach(file: &Path) -> Self {
        Self::attach_with_blocks(file, 512)
    }

    /// As [`Self::attach`], with logical blocks of this many bytes.
    pub fn attach_with_blocks(file: &Path, block_bytes: u32) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on"])
            .args(["--sector-size", &block_bytes.to_string()])
            .arg(file)
            .output()
            .expect("running losetup");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "losetup: {message}");
        let device = String::from_utf8(output.stdout).expect("a path in UTF-8");
        Self {
            node: PathBuf::from(device.trim_end()),
            longest_request: None,
        }
    }

    /// Limits its requests to one page each. The kernel reports a request as done that could write
    /// only its first pages to the file (Linux 6.18): no page is lost in silence if each is written
    /// by itself.
    pub fn with_requests_of_one_page(mut self) -> Self {
        let limit = self.request_limit();
        let old = fs::read_to_string(&limit).expect("reading a limit of the loop device");
        fs::write(&limit, "4").expect("limiting the requests of the loop device");
        self.longest_request = Some(old);
        self
    }

    /// Where the kernel keeps the length of its longest request.
    fn request_limit(&self) -> PathBuf {
        let name = self.node.file_name().expect("a device node");
        Path::new("/sys/block")
            .join(name)
            .join("queue/max_sectors_kb")
    }

    /// Its device node.
    pub fn path(&self) -> &Path {
        &self.node
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        if let Some(old) = &self.longest_request
            && let Err(error) = fs::write(self.request_limit(), old)
        {
            eprintln!("{}: {error}", self.request_limit().display());
        }
        // A process that still has it open keeps it.
        let detached = Command::new("losetup")
            .arg("--detach")
            .arg(&self.node)
            .status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("cannot detach {}", self.node.display());
        }
    }
}
