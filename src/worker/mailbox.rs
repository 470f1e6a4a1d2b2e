//! How others tell a worker something.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::common::ReplicaIndex;
use crate::common::operation::RequestId;
use crate::device::inflight::QueueRegion;

/// Something to tell a worker.
pub(super) enum Message {
    /// Look at the state of this ring, which is tracked there from its next start on; drop the
    /// sender when it is served accordingly.
    Refresh {
        slot: usize,
        ring: usize,
        region: Option<QueueRegion>,
        done: SyncSender<()>,
    },
    /// A range lock was granted.
    Granted(RequestId),
    /// Flush the replicas, and tell whether that went well.
    Flush { done: SyncSender<bool> },
    /// Look at the replicas' health, and at the jobs.
    Tick,
    /// This is the file of a replica now.
    SetFile {
        replica: ReplicaIndex,
        file: Option<RawFd>,
        done: SyncSender<io::Result<()>>,
    },
    /// End when everything in flight is done, or it is time.
    Exit,
}

/// Where others leave messages for a worker.
#[derive(Debug)]
pub(super) struct Mailbox {
    /// `None` when the worker has ended: nobody must wait for it then.
    messages: Mutex<Option<VecDeque<Message>>>,
    /// Written to with each message.
    pub(super) event: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            messages: Mutex::new(Some(VecDeque::new())),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Message>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn send(&self, message: Message) {
        if let Some(messages) = &mut *self.lock() {
            messages.push_back(message);
        }
        // The counter cannot overflow: each write adds one.
        let _ = self.event.write(1);
    }

    pub(super) fn take(&self) -> VecDeque<Message> {
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub(super) fn close(&self) {
        self.lock().take();
    }
}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Refresh { .. } => "Refresh",
            Self::Granted(_) => "Granted",
            Self::Flush { .. } => "Flush",
            Self::Tick => "Tick",
            Self::SetFile { .. } => "SetFile",
            Self::Exit => "Exit",
        })
    }
}
