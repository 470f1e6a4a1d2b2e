//! What other threads can have all workers do: use a replica's file or let it go, look at what has
//! changed, flush.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use super::mailbox::{Mailbox, Message};
use crate::common::ReplicaIndex;

/// A handle to the workers of a disk.
#[derive(Clone, Debug)]
pub struct WorkerControl {
    pub(super) mailboxes: Vec<Arc<Mailbox>>,
    pub(super) drain_limit: Duration,
}

impl WorkerControl {
    /// Has every worker use `file` for `replica`, or none. Returns when all do.
    ///
    /// # Errors
    /// If one cannot; then some may and others not.
    pub fn set_file(&self, replica: ReplicaIndex, file: Option<RawFd>) -> io::Result<()> {
        let (done, is_done) = sync_channel(self.mailboxes.len());
        for mailbox in &self.mailboxes {
            let done = done.clone();
            mailbox.send(Message::SetFile {
                replica,
                file,
                done,
            });
        }
        drop(done);
        for _ in &self.mailboxes {
            // A worker that has ended has dropped the message.
            let ended = |_| io::Error::other("the disk is being closed");
            is_done.recv().map_err(ended)??;
        }
        Ok(())
    }

    /// Has every worker look at the health of the replicas.
    pub fn tick_all(&self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Tick);
        }
    }

    /// Has the worker that does the jobs look at them.
    pub fn tick_first(&self) {
        self.mailboxes[0].send(Message::Tick);
    }

    /// Flushes the replicas. Whether that went well; it may also take too long.
    pub fn flush(&self) -> bool {
        let (done, is_done) = sync_channel(1);
        self.mailboxes[0].send(Message::Flush { done });
        // Nobody must wait for ever for a replica that hangs.
        is_done.recv_timeout(self.drain_limit).unwrap_or(false)
    }

    /// How long a replica that hangs is waited for.
    pub fn drain_limit(&self) -> Duration {
        self.drain_limit
    }
}
