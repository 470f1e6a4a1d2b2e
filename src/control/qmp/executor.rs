//! The thread that runs commands, one after another. A command that takes long delays no event, and
//! no client but those that wait for a command too.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use log::debug;

use super::session::Call;
use crate::common::NOT_POISONED;
use crate::control::Operator;
use crate::control::wake::Wake;

/// Dropping it ends the thread after the calls that were sent, without waiting for that.
pub(in crate::control) struct Executor {
    /// Each with the token of its client. Bounded, because a client has one call at a time.
    calls: Sender<(u64, Call)>,
    done: Arc<Done>,
}

struct Done {
    replies: Mutex<Vec<(u64, Vec<u8>)>>,
    /// Readable when there are replies.
    wake: Wake,
}

impl Executor {
    pub(in crate::control) fn spawn(operator: Arc<dyn Operator>) -> io::Result<Self> {
        let (calls, waiting) = channel::<(u64, Call)>();
        let done = Arc::new(Done {
            replies: Mutex::default(),
            wake: Wake::new()?,
        });
        let thread_done = Arc::clone(&done);
        std::thread::Builder::new()
            .name("monitor".into())
            .spawn(move || {
                for (client, call) in waiting {
                    debug!(command = call.name(); "monitor command");
                    let reply = (client, call.run(&*operator));
                    thread_done.replies.lock().expect(NOT_POISONED).push(reply);
                    thread_done.wake.signal();
                }
            })?;
        Ok(Self { calls, done })
    }

    /// Queues a call; [`Self::take`] returns its reply.
    pub(in crate::control) fn send(&self, client: u64, call: Call) {
        let sent = self.calls.send((client, call));
        sent.expect("the thread runs until the sender is dropped");
    }

    /// The replies since the last time, each with the token of its client.
    pub(in crate::control) fn take(&self) -> Vec<(u64, Vec<u8>)> {
        // First, so that a later reply makes the eventfd readable again.
        self.done.wake.clear();
        std::mem::take(&mut *self.done.replies.lock().expect(NOT_POISONED))
    }
}

impl AsRawFd for Executor {
    /// Readable when there are replies to take.
    fn as_raw_fd(&self) -> RawFd {
        self.done.wake.as_raw_fd()
    }
}
