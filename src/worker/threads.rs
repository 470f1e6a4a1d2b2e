//! The worker threads of a disk: how they start, how frontends reach them, and how they exit.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use log::error;

use super::control::WorkerControl;
use super::event_loop::Worker;
use super::mailbox::{Mailbox, Message};
use super::{Disk, Stop};
use crate::common::{NOT_POISONED, ReplicaSet, pulse};
use crate::device::frontend::VirtqueueServer;
use crate::device::inflight::QueueRegion;
use crate::engine::WorkerIndex;
use crate::limits::{drain_limit, drain_overtime};
use crate::replica::ring::kernel::Kernel;
use crate::replica::ring::{Aio, Ring, RingFile};
use crate::sandbox::{self, ThreadKind};

/// The running worker threads of a disk. Worker `i mod count` serves virtqueue `i`.
#[derive(Debug)]
pub struct Workers {
    mailboxes: Vec<Arc<Mailbox>>,
    threads: Vec<Thread>,
    drain_limit: Duration,
    drain_overtime: Duration,
}

#[derive(Debug)]
struct Thread {
    handle: JoinHandle<()>,
    /// Receives, when the worker has ended, the replicas with operations of it in flight.
    busy: Receiver<ReplicaSet>,
}

impl Workers {
    /// Starts `count` workers on the open replicas `files`, in order. Each stays open until it is
    /// released, or as long as any worker runs.
    ///
    /// # Errors
    /// If a thread or its ring cannot be created; no thread is left running then.
    pub fn start(disk: &Disk, files: Vec<RingFile>, count: u16) -> io::Result<Self> {
        let count = count.max(1);
        let mailboxes = (0..count)
            .map(|_| Mailbox::new())
            .collect::<io::Result<Vec<_>>>()?;
        let mut workers = Self {
            mailboxes,
            threads: Vec::new(),
            drain_limit: drain_limit(disk.policy.replica_timeout),
            drain_overtime: drain_overtime(disk.policy.replica_timeout),
        };
        for index in 0..count {
            let share = disk.share_of(index, count);
            let outcome = workers.start_one(WorkerIndex(index), share, files.clone());
            if let Err(error) = outcome {
                // No worker has received a request yet.
                let _ = workers.exit();
                return Err(error);
            }
        }
        Ok(workers)
    }

    fn start_one(
        &mut self,
        index: WorkerIndex,
        disk: Disk,
        files: Vec<RingFile>,
    ) -> io::Result<()> {
        let mailboxes = self.mailboxes.clone();
        let (ready, is_ready) = sync_channel(1);
        let (ended, busy) = sync_channel(1);
        let handle = std::thread::Builder::new()
            .name(format!("worker-{}", index.0))
            .spawn(move || {
                let (ready, ended) = (&ready, &ended);
                match disk.aio {
                    Aio::IoUring => {
                        // The kernel limits the memory of an io_uring by the rights of the thread
                        // that creates it.
                        let create = |files: &[RingFile]| {
                            let ring = Ring::new(files);
                            sandbox::enter(ThreadKind::Worker);
                            ring
                        };
                        run_worker(create, index, disk, files, mailboxes, ready, ended);
                    }
                    Aio::Threads => {
                        sandbox::enter(ThreadKind::Worker);
                        run_worker(
                            Ring::with_threads,
                            index,
                            disk,
                            files,
                            mailboxes,
                            ready,
                            ended,
                        );
                    }
                }
            })?;
        self.threads.push(Thread { handle, busy });
        is_ready.recv().expect(NOT_POISONED)
    }

    /// A handle to change replicas and jobs.
    pub fn control(&self) -> WorkerControl {
        WorkerControl {
            mailboxes: self.mailboxes.clone(),
            drain_limit: self.drain_limit,
            drain_overtime: self.drain_overtime,
        }
    }

    /// A handle for the frontend of a connection slot, to start and stop its virtqueues.
    pub fn virtqueue_server(&self, slot: usize) -> Box<dyn VirtqueueServer> {
        Box::new(Handle {
            workers: self.control(),
            slot,
        })
    }

    /// Lets the workers finish the requests in flight, for at most [`drain_limit`] (and
    /// [`drain_overtime`]), and stops them.
    /// Returns the replicas that may still have operations in flight: the kernel carries them out
    /// when the replica answers again, so their images must stay locked until it has.
    #[must_use]
    pub fn exit(self) -> ReplicaSet {
        for mailbox in &self.mailboxes {
            mailbox.send(Message::Exit);
        }
        let mut all_busy = ReplicaSet::EMPTY;
        for thread in self.threads {
            let busy = thread.busy.recv().expect(NOT_POISONED);
            // A thread does not exit while the kernel waits for a replica on its behalf.
            if busy.is_empty() {
                thread.handle.join().expect(NOT_POISONED);
            }
            all_busy = all_busy.or(busy);
        }
        all_busy
    }
}

/// The body of a worker thread. Sends to `ready` whether the worker could be created, and to
/// `ended` the replicas with operations in flight at the end.
fn run_worker<K: Kernel>(
    create: impl FnOnce(&[RingFile]) -> io::Result<Ring<K>>,
    index: WorkerIndex,
    disk: Disk,
    files: Vec<RingFile>,
    mailboxes: Vec<Arc<Mailbox>>,
    ready: &SyncSender<io::Result<()>>,
    ended: &SyncSender<ReplicaSet>,
) {
    let stop = disk.stop.clone();
    let aio = disk.aio;
    // Created in the thread that uses it, so that the kernel needs no locks for an io_uring.
    let ring = create(&files);
    // The ring has them, until it is given others.
    drop(files);
    let mut worker = match ring.and_then(|ring| Worker::new(ring, index, disk, mailboxes)) {
        Ok(worker) => worker,
        Err(error) => {
            let _ = ready.send(Err(error));
            let _ = ended.send(ReplicaSet::EMPTY);
            return;
        }
    };
    let _ = ready.send(Ok(()));
    let watched = pulse::watch();
    let result = worker.run();
    drop(watched);
    if let Err(error) = result {
        let what = match aio {
            Aio::IoUring => "io_uring",
            Aio::Threads => "epoll",
        };
        error!(worker = index.0, error:%; "worker stops: its {what} failed");
        let _ = stop.send(Stop::Broken(format!("{what}: {error}")));
    }
    // Sent before the worker is dropped, which may never end with operations in flight.
    let _ = ended.send(worker.io.ring.busy_replicas());
}

struct Handle {
    workers: WorkerControl,
    slot: usize,
}

impl VirtqueueServer for Handle {
    fn refresh(&self, queues: Vec<(u16, Option<QueueRegion>)>) {
        let (done, is_done) = sync_channel(0);
        let mailboxes = &self.workers.mailboxes;
        let count = mailboxes.len();
        for (queue, region) in queues {
            let queue = usize::from(queue);
            mailboxes[queue % count].send(Message::Refresh {
                slot: self.slot,
                queue: queue / count,
                region,
                done: done.clone(),
            });
        }
        drop(done);
        // Ends when all workers have dropped their senders; they never send.
        let _ = pulse::waiting(|| is_done.recv());
    }

    fn flush(&self) -> bool {
        self.workers.flush()
    }
}
