//! The thread that runs commands, one after another. A command that may wait for a file system runs
//! on a thread of its own, so that it delays no other one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use log::debug;

use super::session::Call;
use crate::common::NOT_POISONED;
use crate::common::message::Reason;
use crate::control::Operator;
use crate::control::wake::Wake;
use crate::limits::QMP_CLIENTS_MAX;

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
    /// Calls that have a thread of their own.
    waiting: AtomicUsize,
}

/// Calls that may have a thread of their own at a time.
const WAITING_MAX: usize = 2 * QMP_CLIENTS_MAX;

impl Executor {
    pub(in crate::control) fn spawn(operator: Arc<dyn Operator>) -> io::Result<Self> {
        let (calls, waiting) = channel::<(u64, Call)>();
        let done = Arc::new(Done {
            replies: Mutex::default(),
            wake: Wake::new()?,
            waiting: AtomicUsize::new(0),
        });
        let thread_done = Arc::clone(&done);
        std::thread::Builder::new()
            .name("monitor".into())
            .spawn(move || {
                for (client, call) in waiting {
                    debug!(command = call.name(); "monitor command");
                    if call.may_wait() {
                        run_apart(client, call, &operator, &thread_done);
                    } else {
                        thread_done.push(client, call.run(&*operator));
                    }
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

impl Done {
    fn push(&self, client: u64, reply: Vec<u8>) {
        let mut replies = self.replies.lock().expect(NOT_POISONED);
        replies.push((client, reply));
        self.wake.signal();
    }
}

/// Runs a call on a thread of its own.
fn run_apart(client: u64, call: Call, operator: &Arc<dyn Operator>, done: &Arc<Done>) {
    if done.waiting.load(Ordering::Relaxed) >= WAITING_MAX {
        // Of clients that have left: those that are connected have one call each.
        let reason = "too many commands still wait for images that do not answer";
        return done.push(client, call.fail(reason.to_owned()));
    }
    done.waiting.fetch_add(1, Ordering::Relaxed);
    let (operator, thread_done) = (Arc::clone(operator), Arc::clone(done));
    // In a place where it is found if there is no thread.
    let call = Arc::new(Mutex::new(Some(call)));
    let thread_call = Arc::clone(&call);
    let take = |call: &Mutex<Option<Call>>| call.lock().expect(NOT_POISONED).take();
    let thread = std::thread::Builder::new().name("monitor-change".into());
    let started = thread.spawn(move || {
        if let Some(call) = take(&thread_call) {
            thread_done.push(client, call.run(&*operator));
        }
        thread_done.waiting.fetch_sub(1, Ordering::Relaxed);
    });
    if let Err(error) = started {
        done.waiting.fetch_sub(1, Ordering::Relaxed);
        let reason = format!("cannot start a thread: {}", Reason(&error));
        if let Some(call) = take(&call) {
            done.push(client, call.fail(reason));
        }
    }
}

impl AsRawFd for Executor {
    /// Readable when there are replies to take.
    fn as_raw_fd(&self) -> RawFd {
        self.done.wake.as_raw_fd()
    }
}
