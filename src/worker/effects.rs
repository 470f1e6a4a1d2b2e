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
use crate::device::hold::Hold;
use crate::engine::{Effects, Failed, Mark, Tag, WorkerIndex};
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
    /// The report of the request of a guest that is about to be answered with an error.
    pub(super) failing: Option<Report>,
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
        let is_held = match tag {
            Tag::Guest {
                connection,
                fragment,
            } => self.guests.answered(connection, fragment, result),
            Tag::OwnFlush => {
                if let Some(done) = self.flushing.pop_front() {
                    // The thread that asked may have stopped waiting.
                    let _ = done.send(result.is_ok());
                }
                false
            }
        };
        if let Some(mut report) = self.failing.take() {
            if let Report::Failure { requester, .. } = &mut report
                && is_held
            {
                *requester = Requester::Held;
            }
            self.events.push(report);
        }
    }

    fn written(&mut self, _tag: Tag) -> Mark {
        self.hold.mark()
    }

    fn flushed(&mut self, tag: Tag, mark: Mark) {
        if let Tag::Guest {
            connection,
            fragment,
        } = tag
        {
            self.guests.flushed(connection, fragment, mark);
        }
    }

    fn report(&mut self, report: Report) {
        self.recorder.reported(&report);
        let of_guest = Requester::Guest;
        match report {
            Report::Failure { requester, .. } if requester == of_guest => {
                let before = self.failing.replace(report);
                assert!(before.is_none(), "a failure is followed by the answer");
            }
            _ => self.events.push(report),
        }
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
