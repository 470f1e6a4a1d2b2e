//! The thread on which commands run, one after another, so that a command which takes its time
//! delays no event and no other conversation but those that want a command run too.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};

use log::debug;
use vmm_sys_util::eventfd::EventFd;

use super::session::Call;
use crate::common::NOT_POISONED;
use crate::control::Operator;

/// Dropping it ends the thread after the calls that were sent; nobody waits for that.
pub(in crate::control) struct Executor {
    /// With the name of whom to answer. Bounded: each client has one call at a time.
    calls: Sender<(u64, Call)>,
    done: Arc<Done>,
}

struct Done {
    replies: Mutex<Vec<(u64, Vec<u8>)>>,
    /// Readable when there are replies.
    wake: EventFd,
}

impl Done {
    fn replies(&self) -> MutexGuard<'_, Vec<(u64, Vec<u8>)>> {
        self.replies.lock().expect(NOT_POISONED)
    }
}

impl Executor {
    pub(in crate::control) fn spawn(operator: Arc<dyn Operator>) -> io::Result<Self> {
        let (calls, waiting) = channel::<(u64, Call)>();
        let done = Arc::new(Done {
            replies: Mutex::default(),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        });
        let thread_done = Arc::clone(&done);
        std::thread::Builder::new()
            .name("monitor".into())
            .spawn(move || {
                for (client, call) in waiting {
                    debug!(command = call.name(); "monitor command");
                    let reply = call.run(&*operator);
                    thread_done.replies().push((client, reply));
                    // The counter cannot overflow: each write adds one.
                    let _ = thread_done.wake.write(1);
                }
            })?;
        Ok(Self { calls, done })
    }

    /// Has a call run; its reply comes out of [`Self::take`]. `false` if nothing runs any more.
    pub(in crate::control) fn send(&self, client: u64, call: Call) -> bool {
        self.calls.send((client, call)).is_ok()
    }

    /// The replies since the last time, and whom each is for.
    pub(in crate::control) fn take(&self) -> Vec<(u64, Vec<u8>)> {
        // Before looking: what comes after the look makes it readable again.
        let _ = self.done.wake.read();
        std::mem::take(&mut *self.done.replies())
    }
}

impl AsRawFd for Executor {
    /// Readable when there is something to take.
    fn as_raw_fd(&self) -> RawFd {
        self.done.wake.as_raw_fd()
    }
}
