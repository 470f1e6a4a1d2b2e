//! Carries out the effects of a worker's engine: on the io_uring, in guest memory, in the mailboxes
//! of other workers and in the event queue.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender};

use super::Stop;
use super::guests::Guests;
use super::mailbox::{Mailbox, Message};
use crate::common::operation::{Operation, RequestId};
use crate::common::report::{Fact, Report, Requester};
use crate::common::{ReplicaIndex, SectorRange};
use crate::control::queue::EventQueue;
use crate::device::hold::{ErrorPolicy, Hold};
use crate::engine::{Effects, Failed, Tag, WorkerIndex};
use crate::jobs::JobEvent;
use crate::replica::ring::Ring;
use crate::replica::ring::kernel::{Kernel, Uring};
use crate::statistics::Recorder;

/// Everything that the engine of a worker has an effect on.
pub(super) struct Io<K: Kernel = Uring> {
    pub(super) ring: Ring<K>,
    pub(super) recorder: Recorder,
    pub(super) released: Sender<ReplicaIndex>,
    pub(super) guests: Guests,
    /// Of all workers.
    pub(super) mailboxes: Vec<Arc<Mailbox>>,
    pub(super) events: Arc<EventQueue>,
    /// The threads that wait for a flush of this worker; flushes end in the order of submission.
    pub(super) flushing: VecDeque<SyncSender<bool>>,
    pub(super) hold: Arc<Hold>,
    pub(super) stop: Sender<Stop>,
    /// The first failure of the io_uring. The loop ends with it.
    pub(super) failure: Option<io::Error>,
}

impl<K: Kernel> Effects for Io<K> {
    fn submit(&mut self, operation: Operation) {
        self.recorder.operation_begun(&operation);
        if let Err(error) = self.ring.push(operation, self.recorder.now()) {
            self.failure.get_or_insert(error);
        }
    }

    fn complete(&mut self, tag: Tag, result: Result<&[u8], Failed>) {
        match tag {
            Tag::Guest {
                connection,
                fragment,
            } => self.guests.answered(connection, fragment, result),
            Tag::OwnFlush => {
                if let Some(done) = self.flushing.pop_front() {
                    // The thread that asked may have stopped waiting.
                    let _ = done.send(result.is_ok());
                }
            }
        }
    }

    fn report(&mut self, report: Report) {
        self.recorder.reported(&report);
        self.events.push(held(report, self.hold.policy()));
    }

    fn count(&mut self, fact: Fact) {
        self.recorder.count(fact);
    }

    fn repaired(&mut self, replica: ReplicaIndex, range: SectorRange) {
        self.recorder.repaired(replica, range);
        self.events.repaired(replica, range);
    }

    fn wake(&mut self, worker: WorkerIndex, request: RequestId) {
        self.mailboxes[usize::from(worker.0)].send(Message::Granted(request));
    }

    fn health_changed(&mut self) {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Tick);
        }
    }

    fn job_changed(&mut self, event: JobEvent) {
        self.events.push(event);
    }

    fn released(&mut self, replica: ReplicaIndex) {
        // The receiver is gone only while the daemon stops.
        let _ = self.released.send(replica);
    }

    fn contents_differ(&mut self, range: SectorRange) {
        // The receiver is gone only while the daemon stops.
        let _ = self.stop.send(Stop::ContentsDiffer(range));
    }
}

/// The report of a request that failed, with what happens to the request by `policy`.
fn held(mut report: Report, policy: ErrorPolicy) -> Report {
    if let Report::Failure {
        operation,
        requester: requester @ Requester::Guest,
        no_space,
        ..
    } = &mut report
        && policy.holds(*operation, *no_space)
    {
        *requester = Requester::Held;
    }
    report
}
