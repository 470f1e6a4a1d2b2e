//! The worker threads of a disk: how they begin, are reached by the frontends, and end.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use log::error;

use super::control::WorkerControl;
use super::mailbox::{Mailbox, Message};
use super::{Disk, Stop, Worker};
use crate::common::ReplicaSet;
use crate::device::frontend::RingServer;
use crate::device::inflight::QueueRegion;
use crate::engine::{Shared, WorkerIndex};
use crate::limits::drain_limit;

/// The running worker threads of a disk. Queue `i` is served by worker `i mod count`.
#[derive(Debug)]
pub struct Workers {
    mailboxes: Vec<Arc<Mailbox>>,
    threads: Vec<Thread>,
    shared: Arc<Shared>,
    drain_limit: Duration,
}

#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    /// Comes when the worker has ended: the replicas that still have operations of it.
    asked: Receiver<ReplicaSet>,
}

impl Workers {
    /// Starts `count` workers.
    ///
    /// # Errors
    /// If a thread or its io_uring cannot be made; then none is left running.
    pub fn start(disk: &Disk, count: u16) -> io::Result<Self> {
        let count = count.max(1);
        let mailboxes = (0..count)
            .map(|_| Mailbox::new())
            .collect::<io::Result<Vec<_>>>()?;
        let mut workers = Self {
            mailboxes,
            threads: Vec::new(),
            shared: Arc::clone(&disk.shared),
            drain_limit: drain_limit(disk.policy.replica_timeout),
        };
        for index in 0..count {
            let mut disk = disk.clone();
            let mailboxes = workers.mailboxes.clone();
            for slot in &mut disk.slots {
                let own = slot.vrings.drain(..).skip(usize::from(index));
                slot.vrings = own.step_by(usize::from(count)).collect();
            }
            // The ring is made in the thread that uses it: the kernel can then do without locks.
            let (ready, is_ready) = sync_channel(1);
            let (ended, asked) = sync_channel(1);
            let handle = std::thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || {
                    let stop = disk.stop.clone();
                    let made = Worker::new(WorkerIndex(index), disk, mailboxes);
                    let (outcome, worker) = match made {
                        Ok(worker) => (Ok(()), Some(worker)),
                        Err(error) => (Err(error), None),
                    };
                    let _ = ready.send(outcome);
                    let Some(mut worker) = worker else {
                        let _ = ended.send(ReplicaSet::EMPTY);
                        return;
                    };
                    if let Err(error) = worker.run() {
                        error!("the io_uring of worker {index} failed: {error}");
                        let _ = stop.send(Stop::Broken(format!("io_uring: {error}")));
                    }
                    let _ = ended.send(worker.io.replicas_asked());
                })?;
            workers.threads.push(Thread { handle, asked });
            let outcome = is_ready
                .recv()
                .unwrap_or_else(|_| Err(io::Error::other("the worker ended")));
            if let Err(error) = outcome {
                // They were given nothing to do yet.
                let _ = workers.exit();
                return Err(error);
            }
        }
        Ok(workers)
    }

    /// A handle for those who change the replicas, or the jobs.
    pub fn control(&self) -> WorkerControl {
        WorkerControl {
            mailboxes: self.mailboxes.clone(),
            drain_limit: self.drain_limit,
        }
    }

    /// A handle for the frontend on a connection slot to have its rings served.
    pub fn ring_server(&self, slot: usize) -> Box<dyn RingServer> {
        Box::new(Handle {
            workers: self.control(),
            slot,
        })
    }

    /// Lets the workers finish what is in flight, for so long as [`drain_limit`] says, and ends
    /// them. Returns the replicas that may still have operations: the kernel does them when the
    /// replica answers again, so nobody else may use these images before it has let go of them.
    #[must_use]
    pub fn exit(self) -> ReplicaSet {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Exit);
        }
        let mut unanswered = ReplicaSet::EMPTY;
        for thread in self.threads {
            let asked = thread.asked.recv().unwrap_or_else(|_| {
                error!("a worker panicked");
                self.shared.members()
            });
            // The kernel keeps a thread in its exit as long as it waits for a replica on behalf of
            // it.
            if asked.is_empty() {
                let _ = thread.handle.join();
            }
            unanswered = unanswered.or(asked);
        }
        unanswered
    }
}

struct Handle {
    workers: WorkerControl,
    slot: usize,
}

impl RingServer for Handle {
    fn refresh(&self, rings: Vec<(u16, Option<QueueRegion>)>) {
        let (done, is_done) = sync_channel(0);
        let mailboxes = &self.workers.mailboxes;
        let count = mailboxes.len();
        for (queue, region) in rings {
            let queue = usize::from(queue);
            mailboxes[queue % count].send(Message::Refresh {
                slot: self.slot,
                ring: queue / count,
                region,
                done: done.clone(),
            });
        }
        drop(done);
        // The workers drop their ends; nothing is ever sent.
        let _ = is_done.recv();
    }

    fn flush(&self) -> bool {
        self.workers.flush()
    }
}
