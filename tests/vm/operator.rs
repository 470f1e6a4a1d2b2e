//! An operator with `quorum-blkctl` only.

use std::path::PathBuf;
use std::process::Command;

/// Reaches a daemon by its monitor.
pub(crate) struct Operator {
    /// The socket of the monitor.
    pub(crate) monitor: PathBuf,
}

impl Operator {
    /// Runs it to its end, prints its output, and returns its exit status.
    pub(crate) fn run(&self, arguments: &[&str]) -> i32 {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkctl"));
        command.arg("--qmp").arg(&self.monitor).args(arguments);
        let output = command.output().expect("running quorum-blkctl");
        let status = output.status.code().expect("not killed");
        println!(
            "$ quorum-blkctl {}\n{}{}(exit status {status})",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        status
    }
}
