//! What commands of the monitor do.

use std::sync::mpsc::Sender;

use crate::control::Operator;
use crate::worker::Stop;

/// The disk as the operator has it before him.
pub(super) struct DiskOperator {
    stop: Sender<Stop>,
}

impl DiskOperator {
    pub(super) fn new(stop: Sender<Stop>) -> Self {
        Self { stop }
    }
}

impl Operator for DiskOperator {
    fn quit(&self) {
        // Nobody listens only when the daemon stops already.
        let _ = self.stop.send(Stop::Requested);
    }
}
