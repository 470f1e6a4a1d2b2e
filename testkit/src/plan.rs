//! What a disk under test is made of, and what its replicas are called.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// What a disk is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many replicas, N.
    pub replicas: usize,
    /// Which of them are served over FUSE, so that faults can be injected.
    pub faulty: Vec<usize>,
    /// Those as a FUSE server does it that sets no option: see [`FuseImage::serve_plainly`].
    ///
    /// [`FuseImage::serve_plainly`]: crate::fuse::FuseImage::serve_plainly
    pub plain_fuse: bool,
    /// Bytes of the disk.
    pub size_bytes: u64,
    /// The vote threshold.
    pub threshold: usize,
    /// Write the winner to those that lost.
    pub rewrite_corrupted: bool,
    /// `read-pattern=fifo`.
    pub fifo: bool,
    /// How many queues.
    pub queues: usize,
    /// O_DIRECT.
    pub direct: bool,
    /// The peer serves the disk on a thread of its own, not on its main thread.
    pub iothread: bool,
    /// `--replica-timeout` of ours. More than the default, so that a disk that is busy with other
    /// things is not taken for one that hangs.
    pub replica_timeout: Duration,
    /// More arguments for ours.
    pub more: Vec<&'static str>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            replicas: 3,
            faulty: Vec::new(),
            plain_fuse: false,
            size_bytes: 4 << 20,
            threshold: 2,
            rewrite_corrupted: false,
            fifo: false,
            queues: 1,
            direct: true,
            iothread: false,
            replica_timeout: Duration::from_secs(60),
            more: Vec::new(),
        }
    }
}

impl Plan {
    /// Whether losers are repaired unasked.
    pub(crate) fn rewrites(&self) -> bool {
        self.rewrite_corrupted || self.more.contains(&"--rewrite-corrupted")
    }

    /// The arguments of quorum-blkd.
    pub(crate) fn arguments(&self, images: &[PathBuf]) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        for (index, image) in images.iter().enumerate() {
            let mut replica = image.clone().into_os_string();
            replica.push(format!(",node-name={}", node_name(index)));
            arguments.extend(["--blk-file".into(), replica]);
        }
        arguments.extend(["--vote-threshold".into(), self.threshold.to_string().into()]);
        arguments.extend(["--num-queues".into(), self.queues.to_string().into()]);
        arguments.extend(["--node-name".into(), "quorum0".into()]);
        let timeout = self.replica_timeout.as_millis().to_string();
        arguments.extend(["--replica-timeout".into(), timeout.into()]);
        // What a request does is compared with what it must do, and with the peer, which does
        // nothing besides.
        arguments.extend(["--scrub-around".into(), "0".into()]);
        if self.rewrite_corrupted {
            arguments.push("--rewrite-corrupted".into());
        }
        if self.fifo {
            arguments.extend(["--read-pattern".into(), "fifo".into()]);
        }
        if !self.direct {
            arguments.extend(["--cache".into(), "writeback".into()]);
        }
        arguments.extend(self.more.iter().map(Into::into));
        arguments
    }
}

/// The node-name of a replica.
pub fn node_name(index: usize) -> String {
    format!("r{index}")
}
