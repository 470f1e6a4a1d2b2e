//! Messages from other threads to a worker.
//!
//! Invariant: a message is in the queue before the event is signalled. The worker takes the whole
//! queue after each signal, so no message waits for a later one.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard};

use vmm_sys_util::eventfd::EventFd;

use crate::common::operation::RequestId;
use crate::common::{NOT_POISONED, ReplicaIndex};
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
    /// What is held is to be submitted again, or nothing is held any more; or there is memory for
    /// buffers again, or another worker waits for some.
    Continue,
    /// Exit when no request is in flight, or when the drain limit has passed.
    Exit,
}

/// Wakes the worker that a mailbox belongs to.
pub(super) trait Signal {
    /// Wakes the worker, now or when it next sleeps.
    fn signal(&self);
}

impl Signal for EventFd {
    fn signal(&self) {
        // The counter cannot overflow: each write adds one.
        let _ = self.write(1);
    }
}

/// The queue of messages to one worker.
#[derive(Debug)]
pub(super) struct Mailbox<S = EventFd> {
    /// `None` when the worker has ended. Messages are then dropped, and with them the senders that
    /// other threads wait for.
    messages: Mutex<Option<VecDeque<Message>>>,
    /// Signalled after each message.
    pub(super) event: S,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Self::with_signal(event)))
    }
}

impl<S: Signal> Mailbox<S> {
    fn with_signal(event: S) -> Self {
        Self {
            messages: Mutex::new(Some(VecDeque::new())),
            event,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<VecDeque<Message>>> {
        self.messages.lock().expect(NOT_POISONED)
    }

    /// Sends a message. It is dropped if the worker has ended.
    pub(super) fn send(&self, message: Message) {
        if let Some(messages) = &mut *self.lock() {
            messages.push_back(message);
        }
        // Last, and without the lock: the worker may take its messages at once.
        self.event.signal();
    }

    /// Takes all messages, oldest first.
    pub(super) fn take(&self) -> VecDeque<Message> {
        self.lock().as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The worker has ended.
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
            Self::Continue => "Continue",
            Self::Exit => "Exit",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, OnceCell, RefCell};
    use std::rc::{Rc, Weak};

    use super::*;

    /// A worker that handles its messages the moment it is woken.
    #[derive(Default)]
    struct QuickWorker {
        mailbox: OnceCell<Weak<Mailbox<QuickWorker>>>,
        taken: RefCell<Vec<Message>>,
        woken: Cell<usize>,
    }

    impl Signal for QuickWorker {
        fn signal(&self) {
            self.woken.set(self.woken.get() + 1);
            let mailbox = self.mailbox.get().unwrap().upgrade().unwrap();
            self.taken.borrow_mut().extend(mailbox.take());
        }
    }

    #[test]
    fn a_worker_that_is_woken_finds_the_message_even_at_once() {
        let mailbox = Rc::new(Mailbox::with_signal(QuickWorker::default()));
        let worker = &mailbox.event;
        worker.mailbox.set(Rc::downgrade(&mailbox)).unwrap();
        for number in 1..=3 {
            mailbox.send(Message::Granted(RequestId(number)));
            let taken = worker.taken.take();
            assert!(
                matches!(taken.as_slice(), [Message::Granted(RequestId(id))] if *id == number),
                "{taken:?}"
            );
        }
        assert_eq!(worker.woken.get(), 3, "each message wakes the worker");
    }

    #[test]
    fn messages_arrive_in_order_and_each_one_signals() {
        let mailbox = Mailbox::new().unwrap();
        mailbox.send(Message::Tick);
        mailbox.send(Message::Exit);
        assert_eq!(mailbox.event.read().unwrap(), 2);
        let taken: Vec<_> = mailbox.take().into();
        assert!(
            matches!(taken.as_slice(), [Message::Tick, Message::Exit]),
            "{taken:?}"
        );
        assert!(mailbox.take().is_empty());
    }

    #[test]
    fn no_thread_waits_for_a_worker_that_has_ended() {
        let mailbox = Mailbox::new().unwrap();
        let (done, is_done) = std::sync::mpsc::sync_channel(1);
        mailbox.send(Message::Flush { done: done.clone() });
        mailbox.close();
        mailbox.send(Message::Flush { done });
        assert!(is_done.recv().is_err(), "both senders are dropped");
        assert!(mailbox.take().is_empty());
    }
}
