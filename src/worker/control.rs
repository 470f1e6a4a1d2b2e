//! Commands to all workers of a disk: change the file of a replica, follow a change of health or
//! jobs, flush.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use super::mailbox::{Mailbox, Message};
use crate::common::{ReplicaIndex, pulse};
use crate::replica::ring::RingFile;

/// A handle to the workers of a disk.
#[derive(Clone, Debug)]
pub struct WorkerControl {
    pub(super) mailboxes: Vec<Arc<Mailbox>>,
    pub(super) drain_limit: Duration,
    pub(super) drain_overtime: Duration,
}

impl WorkerControl {
    /// Makes every worker use `file` for `replica`, or none. Returns when all of them do.
    ///
    /// # Errors
    /// If one worker cannot; the others may use the file by then.
    pub fn set_file(&self, replica: ReplicaIndex, file: Option<RingFile>) -> io::Result<()> {
        let (done, is_done) = sync_channel(self.mailboxes.len());
        for mailbox in &self.mailboxes {
            let done = done.clone();
            mailbox.send(Message::SetFile {
                replica,
                file: file.clone(),
                done,
            });
        }
        drop(done);
        for _ in &self.mailboxes {
            // A worker that has ended drops the message and with it the sender.
            let ended = |_| io::Error::other("the disk is being closed");
            pulse::waiting(|| is_done.recv()).map_err(ended)??;
        }
        Ok(())
    }

    /// Makes every worker follow a change of the replicas' health.
    pub fn tick_all(&self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Tick);
        }
    }

    /// Makes worker 0, which runs the jobs, follow a change of them.
    pub fn tick_first(&self) {
        self.mailboxes[0].send(Message::Tick);
    }

    /// Makes the workers submit again what is held.
    pub fn continue_all(&self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Continue);
        }
    }

    /// Flushes the replicas. Returns whether that succeeded in the time that a flush may take.
    pub fn flush(&self) -> bool {
        let (done, is_done) = sync_channel(1);
        self.mailboxes[0].send(Message::Flush { done });
        // A replica may hang for ever.
        let limit = self.drain_limit + self.drain_overtime;
        pulse::waiting(|| is_done.recv_timeout(limit)).unwrap_or(false)
    }

    /// How long to wait for a replica that hangs.
    pub fn drain_limit(&self) -> Duration {
        self.drain_limit
    }
}
