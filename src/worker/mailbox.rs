//! Messages from other threads to a worker.
//!
//! Invariant: a message is in the queue before the event is signalled. The worker takes the whole
//! queue after each signal, so no message waits for a later one.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::common::ReplicaIndex;
use crate::common::operation::RequestId;
use crate::device::inflight::QueueRegion;
use crate::replica::ring::RingFile;

/// A message to a worker.
pub(super) enum Message {
    /// The state of a virtqueue has changed. Follow it, track its chains in `region` from its next
    /// start on, and drop `done` when the virtqueue is active, or drained.
    Refresh {
        slot: usize,
        queue: usize,
        region: Option<QueueRegion>,
        done: SyncSender<()>,
    },
    /// The range lock that this request waited for is granted.
    Granted(RequestId),
    /// Flush the replicas and report whether that succeeded.
    Flush { done: SyncSender<bool> },
    /// The health of a replica or a job has changed.
    Tick,
    /// Use this file for a replica, or none.
    SetFile {
        replica: ReplicaIndex,
        file: Option<RingFile>,
        done: SyncSender<io::Result<()>>,
    },
    /// Exit when no request is in flight, or when the drain limit has passed.
    Exit,
}

/// The queue of messages to one worker.
#[derive(Debug)]
pub(super) struct Mailbox {
    /// `None` when the worker has ended. Messages are then dropped, and with them the senders that
    /// other threads wait for.
    messages: Mutex<Option<VecDeque<Message>>>,
    /// Signalled after each message.
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
