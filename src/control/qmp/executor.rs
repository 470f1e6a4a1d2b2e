//! The thread that runs commands, one after another. A command that may wait for a file system runs
//! on a thread of its own, so that it delays no other one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};

use log::debug;

use super::session::Call;
use crate::common::message::Reason;
use crate::common::{NOT_POISONED, pulse};
use crate::control::Operator;
use crate::control::wake::Wake;
use crate::limits::QMP_CLIENTS_MAX;
use crate::sandbox::{self, ThreadKind};

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
                sandbox::enter(ThreadKind::Images);
                let _watched = pulse::watch();
                for (client, call) in waiting {
                    debug!(command = call.name(); "monitor command");
                    if call.may_wait() {
                        run_apart(client, call, &operator, &thread_done);
                    } else {
                        let reply = pulse::turn(|| call.run(&*operator));
                        thread_done.push(client, reply);
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

#[cfg(test)]
mod tests {
    use std::sync::Condvar;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::control::Change;
    use crate::control::job_history::EndedJob;
    use crate::control::job_state::JobState;
    use crate::control::loss_state::LossState;
    use crate::control::map_state::MapState;
    use crate::control::qmp::session::{Session, Step};
    use crate::control::state::DiskState;

    /// No change ends before this says so.
    #[derive(Default)]
    struct Stuck {
        may_end: Mutex<bool>,
        changed: Condvar,
    }

    impl Operator for Stuck {
        fn state(&self) -> DiskState {
            unreachable!("no command asks for it")
        }

        fn map(&self, _: usize) -> MapState {
            unreachable!("no command asks for it")
        }

        fn jobs(&self) -> Vec<JobState> {
            Vec::new()
        }

        fn ended_jobs(&self) -> Vec<EndedJob> {
            Vec::new()
        }

        fn change(&self, _: Change) -> Result<Option<String>, String> {
            let may_end = self.may_end.lock().unwrap();
            drop(self.changed.wait_while(may_end, |may_end| !*may_end));
            Err("the operator refuses".into())
        }

        fn fail(&self, _: &str, _: bool) -> Result<LossState, String> {
            unreachable!("no command asks for it")
        }

        fn quit(&self) {}
    }

    fn calls(text: &str) -> Vec<Call> {
        let mut session = Session::default();
        session.receive(text.as_bytes());
        let steps = std::iter::from_fn(|| session.step());
        let calls = steps.filter_map(|step| match step {
            Step::Execute(call) => Some(call),
            Step::Reply(_) | Step::Close(_) => None,
        });
        calls.collect()
    }

    /// After this the change ends, whatever waits for it.
    const WATCHED: Duration = Duration::from_secs(20);

    #[test]
    fn a_command_that_waits_for_a_file_system_delays_no_other_one() {
        let operator = Arc::new(Stuck::default());
        let executor = Executor::spawn(Arc::clone(&operator) as Arc<dyn Operator>).unwrap();
        let rename = r#"{"execute":"quorum-rename",
            "arguments":{"node-name":"a","new-name":"b"}}"#;
        let text = format!(r#"{{"execute":"qmp_capabilities"}}{rename}{{"execute":"query-jobs"}}"#);
        for (client, call) in (0..).zip(calls(&text)) {
            executor.send(client, call);
        }
        let mut replied = Vec::new();
        let began = Instant::now();
        let mut wait_for = |count: usize| {
            while replied.len() < count {
                assert!(began.elapsed() < 3 * WATCHED, "after {replied:?}");
                replied.extend(executor.take().into_iter().map(|(client, _)| client));
                std::thread::yield_now();
            }
            replied.clone()
        };
        // If the second one waits for the first, this ends the test all the same.
        let watch = std::thread::spawn({
            let operator = Arc::clone(&operator);
            move || {
                std::thread::park_timeout(WATCHED);
                *operator.may_end.lock().unwrap() = true;
                operator.changed.notify_all();
            }
        });
        assert_eq!(wait_for(1), [1]);
        watch.thread().unpark();
        assert_eq!(wait_for(2), [1, 0]);
        watch.join().unwrap();
    }
}
