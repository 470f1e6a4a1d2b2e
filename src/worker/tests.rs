//! Workers on fake kernels, step by step in one thread: the operations that each kernel gets for a
//! guest's requests, and how workers wake each other.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::mpsc::{channel, sync_channel};
use std::time::Duration;

use io_uring::opcode;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::event_loop::Worker;
use super::mailbox::{Mailbox, Message};
use super::*;
use crate::common::operation::RequestId;
use crate::common::{ReplicaSet, SECTOR_BYTES};
use crate::device::connection::CacheMode;
use crate::device::hold::{ErrorPolicy, Hold, OnError};
use crate::device::{Capacity, GuestMemory};
use crate::engine::{Effects as _, ReadPattern, WorkerIndex, buffer_bytes_min};
use crate::jobs::Sizes;
use crate::limits::{BUFFER_BYTES_MAX, REPLICAS_MAX};
use crate::replica::ring::fake_kernel::{FakeKernel, Submission};
use crate::replica::ring::{Ring, RingFile, WatchToken};

const REPLICAS: usize = 3;
const SECTORS: u64 = 4096;
const QUEUE_SIZE: u16 = 64;

/// The memory of each virtqueue: its parts, and those of its requests.
const QUEUE_BYTES: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x6000;
const HEADERS: u64 = 0x8000;
const STATUSES: u64 = 0xa000;
const DATA: u64 = 0xc000;
const NO_STATUS: u8 = 0xff;

/// A guest with one virtqueue for each worker, and the workers on their kernels.
struct Machine {
    memory: GuestMemory,
    workers: Vec<Rc<RefCell<Worker<FakeKernel>>>>,
    kernels: Vec<FakeKernel>,
    mailboxes: Vec<Arc<Mailbox>>,
    /// Requests made on each virtqueue.
    made: Vec<u16>,
}

fn disk(memory: &GuestMemory, workers: u16) -> Disk {
    let slot = ConnectionSlot::new(workers, QUEUE_SIZE, CacheMode::default()).unwrap();
    slot.memory.lock().unwrap().replace(memory.clone());
    for (base, vring) in (0..).step_by(0x1_0000).zip(&slot.vrings) {
        vring
            .set_queue_info(base, base + AVAILABLE, base + USED)
            .unwrap();
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        vring.set_kick(Some(File::open("/dev/null").unwrap()));
    }
    Disk {
        info: DiskInfo {
            capacity: Capacity::new(SECTORS),
            block_bytes: 512,
            physical_block_bytes: 512,
            read_only: false,
            serial: String::new(),
            num_queues: workers,
            segments_max: 126,
        },
        policy: Policy {
            threshold: 2,
            read_pattern: ReadPattern::Quorum,
            rewrite_corrupted: false,
            repair_limit_sectors: u64::MAX,
            blkverify: false,
            job_sizes: Sizes::default(),
            block_sectors: 1,
            // However slow the machine is, no replica is evicted.
            replica_timeout: Duration::from_secs(3600),
        },
        aio: Aio::IoUring,
        shared: Arc::new(Shared::new(REPLICAS, 2, workers, SECTORS)),
        released: channel().0,
        slots: vec![slot],
        statistics: Statistics::new(workers, REPLICAS_MAX),
        events: EventQueue::new().unwrap(),
        hold: Arc::default(),
        stop: channel().0,
    }
}

impl Machine {
    fn new(count: u16) -> Self {
        Self::with_hold(count, Arc::default())
    }

    /// Workers that hold what fails.
    fn with_hold(count: u16, hold: Arc<Hold>) -> Self {
        Self::with_memory(count, hold, BUFFER_BYTES_MAX)
    }

    /// Workers with so many bytes of buffers.
    fn with_memory(count: u16, hold: Arc<Hold>, buffer_bytes_max: u64) -> Self {
        let bytes = usize::from(count) * 0x1_0000;
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        let mut shared = Shared::new(REPLICAS, 2, count, SECTORS);
        shared.limit_buffers(buffer_bytes_max);
        let disk = Disk {
            hold,
            shared: Arc::new(shared),
            ..disk(&memory, count)
        };
        let files = vec![RingFile::of(&File::open("/dev/null").unwrap()); REPLICAS];
        let mailboxes: Vec<_> = (0..count).map(|_| Mailbox::new().unwrap()).collect();
        let mut machine = Self {
            memory,
            workers: Vec::new(),
            kernels: Vec::new(),
            mailboxes,
            made: vec![0; usize::from(count)],
        };
        for index in 0..count {
            let kernel = FakeKernel::new();
            let ring = Ring::with_kernel(kernel.clone(), &files).unwrap();
            let worker = Worker::new(
                ring,
                WorkerIndex(index),
                disk.share_of(index, count),
                machine.mailboxes.clone(),
            );
            machine.workers.push(Rc::new(RefCell::new(worker.unwrap())));
            machine.kernels.push(kernel);
            let index = usize::from(index);
            machine.watch_mailbox(index, || {});
            machine.mailboxes[index].send(Message::Refresh {
                slot: 0,
                queue: 0,
                region: None,
                done: sync_channel(0).0,
            });
            machine.settle(index);
        }
        machine
    }

    /// Makes the kernel of a worker report each write to the worker's mailbox, as a multishot poll
    /// does, and lets `event` happen once while the worker is about to sleep.
    fn watch_mailbox(&self, worker: usize, event: impl FnOnce() + 'static) {
        let mailbox = Arc::clone(&self.mailboxes[worker]);
        let mut event = Some(event);
        self.kernels[worker].meanwhile(move |kernel| {
            if let Some(event) = event.take() {
                event();
            }
            let is_watch = |submission: &Submission| {
                submission.opcode == opcode::PollAdd::CODE
                    && submission.fd == mailbox.event.as_raw_fd()
            };
            let poll = kernel.in_flight().into_iter().find(is_watch);
            let poll = poll.expect("a worker that sleeps watches its mailbox");
            if mailbox.event.read().is_ok() {
                kernel.report(&poll, libc::POLLIN.into());
            }
        });
    }

    /// Runs a worker until it sleeps and is not woken.
    fn settle(&self, worker: usize) {
        self.kernels[worker].was_asleep();
        while !self.kernels[worker].was_asleep() {
            assert!(self.workers[worker].borrow_mut().step().unwrap());
        }
    }

    /// Makes a request with `data` of one sector or segment available. Returns its number.
    fn request(&mut self, worker: usize, request_type: u32, sector: u64, data: &[u8]) -> u16 {
        let number = self.made[worker];
        self.made[worker] += 1;
        let base = worker as u64 * QUEUE_BYTES;
        let place = base + 16 * u64::from(number);
        let data_place = base + DATA + 512 * u64::from(number);
        let mut header = [0; 16];
        header[..4].copy_from_slice(&request_type.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(place + HEADERS, &header);
        self.put(place + STATUSES, &[NO_STATUS]);
        self.put(data_place, data);
        let (next, write) = (1_u16, 2_u16);
        let to_guest = if request_type == VIRTIO_BLK_T_IN {
            write
        } else {
            0
        };
        let parts = [
            (place + HEADERS, 16, next),
            (data_place, data.len(), next | to_guest),
            (place + STATUSES, 1, write),
        ];
        for (index, (address, len, flags)) in (number * 3..).zip(parts) {
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&(index + 1).to_le_bytes());
            self.put(base + 16 * u64::from(index), &descriptor);
        }
        let available = base + AVAILABLE;
        let entry = available + 4 + 2 * u64::from(number);
        self.put(entry, &(number * 3).to_le_bytes());
        self.put(available + 2, &(number + 1).to_le_bytes());
        number
    }

    fn write(&mut self, worker: usize, sector: u64) -> u16 {
        self.request(worker, VIRTIO_BLK_T_OUT, sector, &[7; 512])
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        let address = GuestAddress(address);
        self.memory.write_slice(bytes, address).unwrap();
    }

    /// The status of a request, if it is done.
    fn status(&self, worker: usize, number: u16) -> Option<u8> {
        let place = worker as u64 * QUEUE_BYTES + STATUSES + 16 * u64::from(number);
        let status: u8 = self.memory.read_obj(GuestAddress(place)).unwrap();
        (status != NO_STATUS).then_some(status)
    }

    /// The operations that the kernel of a worker has, one for each replica.
    fn of_all_replicas(&self, worker: usize) -> Vec<Submission> {
        let operations = self.kernels[worker].operations();
        let files: Vec<_> = operations.iter().map(|operation| operation.fd).collect();
        assert_eq!(files, [0, 1, 2], "{operations:?}");
        operations
    }

    /// Completes a write that was submitted to all replicas, and the flush that follows since the
    /// guest cannot flush. Checks the answer.
    fn finish_write(&self, worker: usize, number: u16) {
        assert_eq!(self.of_all_replicas(worker).len(), REPLICAS);
        complete_all(&self.kernels[worker]);
        self.settle(worker);
        self.finish_flush(worker, number);
    }

    /// Completes the flush of all replicas that a request waits for, and checks the answer.
    fn finish_flush(&self, worker: usize, number: u16) {
        for operation in self.of_all_replicas(worker) {
            assert_eq!(operation.opcode, opcode::Fsync::CODE);
            assert_eq!(self.status(worker, number), None);
            self.complete(worker, &operation);
            self.settle(worker);
        }
        assert_eq!(self.status(worker, number), Some(0));
    }

    /// Completes an operation as done.
    fn complete(&self, worker: usize, operation: &Submission) {
        let counts_bytes = [opcode::Write::CODE, opcode::WriteFixed::CODE];
        let result = if counts_bytes.contains(&operation.opcode) {
            operation.len.cast_signed()
        } else {
            0
        };
        self.kernels[worker].complete(operation, result);
    }
}

fn complete_all(kernel: &FakeKernel) {
    for operation in kernel.operations() {
        kernel.complete(&operation, operation.len.cast_signed());
    }
}

#[test]
fn a_lock_that_is_released_wakes_the_worker_that_waits_for_it() {
    let mut machine = Machine::new(2);
    let first = machine.write(0, 8);
    machine.settle(0);
    assert_eq!(machine.of_all_replicas(0).len(), REPLICAS);
    let second = machine.write(1, 8);
    machine.settle(1);
    assert!(machine.kernels[1].operations().is_empty(), "it waits");

    complete_all(&machine.kernels[0]);
    machine.settle(0);
    machine.finish_flush(0, first);
    machine.settle(1);
    machine.finish_write(1, second);
}

#[test]
fn a_wake_that_comes_between_the_last_check_and_the_sleep_is_not_lost() {
    let mut machine = Machine::new(2);
    let first = machine.write(0, 8);
    machine.settle(0);
    let second = machine.write(1, 8);
    let (releasing, kernel) = (Rc::clone(&machine.workers[0]), machine.kernels[0].clone());
    machine.watch_mailbox(1, move || {
        complete_all(&kernel);
        kernel.was_asleep();
        while !kernel.was_asleep() {
            assert!(releasing.borrow_mut().step().unwrap());
        }
    });
    machine.settle(1);
    // One flush runs at a time.
    machine.finish_flush(0, first);
    machine.finish_write(1, second);
}

#[test]
fn a_wake_and_a_change_of_health_reach_the_workers_they_are_for() {
    let machine = Machine::new(3);
    let mut worker = machine.workers[0].borrow_mut();
    worker.io.wake(WorkerIndex(2), RequestId(5));
    for (mailbox, wakes) in machine.mailboxes.iter().zip([0, 0, 1]) {
        assert_eq!(mailbox.event.read().unwrap_or(0), wakes);
        let messages: Vec<_> = mailbox.take().into();
        let is_grant = |message: &Message| matches!(message, Message::Granted(RequestId(5)));
        assert_eq!(messages.len() as u64, wakes);
        assert!(messages.iter().all(is_grant), "{messages:?}");
    }
    worker.io.health_changed();
    for mailbox in &machine.mailboxes {
        assert_eq!(mailbox.event.read().unwrap(), 1);
        let messages: Vec<_> = mailbox.take().into();
        assert!(
            matches!(messages.as_slice(), [Message::Tick]),
            "{messages:?}"
        );
    }
}

#[test]
fn a_write_of_a_guest_that_cannot_flush_is_durable_on_every_replica() {
    let mut machine = Machine::new(1);
    let number = machine.write(0, 8);
    machine.settle(0);
    for (place, operation) in machine.of_all_replicas(0).iter().enumerate() {
        // The copy of the guest's data is in the registered arena.
        assert_eq!(operation.opcode, opcode::WriteFixed::CODE);
        assert_eq!(operation.operation_flags, 0, "a flush follows");
        assert!(machine.kernels[0].is_registered(operation));
        assert_eq!((operation.offset, operation.len), (8 * SECTOR_BYTES, 512));
        assert_eq!(machine.status(0, number), None, "{place} have answered");
        machine.complete(0, operation);
        machine.settle(0);
    }
    machine.finish_flush(0, number);
}

#[test]
fn zeroes_of_a_guest_that_cannot_flush_are_synced_before_the_answer() {
    // VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP is bit 0.
    for (request_type, flags) in [
        (VIRTIO_BLK_T_DISCARD, 0_u32),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 1),
    ] {
        let mut machine = Machine::new(1);
        let mut segment = 16_u64.to_le_bytes().to_vec();
        segment.extend(8_u32.to_le_bytes());
        segment.extend(flags.to_le_bytes());
        let number = machine.request(0, request_type, 0, &segment);
        machine.settle(0);
        for operation in machine.of_all_replicas(0) {
            assert_eq!(operation.opcode, opcode::Fallocate::CODE);
            assert_eq!(
                (operation.offset, operation.address),
                (16 * SECTOR_BYTES, 8 * SECTOR_BYTES)
            );
            machine.complete(0, &operation);
        }
        machine.settle(0);
        machine.finish_flush(0, number);
    }
}

#[test]
fn a_flush_that_another_thread_asks_for_is_done_by_all_replicas() {
    for fails in [false, true] {
        let machine = Machine::new(1);
        let (done, is_done) = sync_channel(1);
        machine.mailboxes[0].send(Message::Flush { done });
        machine.settle(0);
        for operation in machine.of_all_replicas(0) {
            assert_eq!(operation.opcode, opcode::Fsync::CODE);
            assert!(is_done.try_recv().is_err());
            let result = if fails { -libc::EIO } else { 0 };
            machine.kernels[0].complete(&operation, result);
            machine.settle(0);
        }
        assert_eq!(is_done.try_recv(), Ok(!fails));
    }
}

#[test]
fn nothing_is_taken_from_a_guest_while_one_of_its_requests_is_held() {
    let hold = Arc::new(Hold::new(ErrorPolicy {
        read: OnError::Stop,
        write: OnError::Stop,
    }));
    let mut machine = Machine::with_hold(2, Arc::clone(&hold));
    let held = machine.write(0, 8);
    machine.settle(0);
    for operation in machine.of_all_replicas(0) {
        machine.kernels[0].complete(&operation, -libc::ENOSPC);
    }
    machine.settle(0);
    assert!(hold.is_holding());
    let later = machine.write(1, 16);
    machine.settle(1);
    let taken = machine.kernels[1].operations();
    assert!(taken.is_empty(), "{taken:?}");

    assert_eq!(hold.continue_all(), 1);
    machine.mailboxes[0].send(Message::Continue);
    machine.settle(0);
    assert_eq!(machine.status(0, held), None);
    machine.finish_write(0, held);
    assert!(!hold.is_holding());
    machine.settle(1);
    machine.finish_write(1, later);
}

#[test]
fn a_worker_that_must_exit_reports_which_replicas_are_busy() {
    let mut machine = Machine::new(1);
    machine.write(0, 8);
    machine.settle(0);
    let slow = machine.of_all_replicas(0)[1].clone();
    for operation in machine.of_all_replicas(0) {
        if operation != slow {
            machine.complete(0, &operation);
        }
    }
    machine.settle(0);
    let mut worker = machine.workers[0].borrow_mut();
    worker.exit_at(Duration::ZERO);
    assert!(!worker.step().unwrap());
    let busy: ReplicaSet = [ReplicaIndex(1)].into_iter().collect();
    assert_eq!(worker.io.ring.busy_replicas(), busy);
}

#[test]
fn a_worker_that_must_exit_waits_longer_for_a_flush() {
    let machine = Machine::new(1);
    let (done, is_done) = sync_channel(1);
    machine.mailboxes[0].send(Message::Flush { done });
    machine.settle(0);
    machine.workers[0].borrow_mut().exit_at(Duration::ZERO);
    // It goes on.
    machine.settle(0);
    assert!(is_done.try_recv().is_err());
    complete_all(&machine.kernels[0]);
    while machine.workers[0].borrow_mut().step().unwrap() {}
    assert_eq!(is_done.try_recv(), Ok(true));
}

/// Older kernels reject submissions while the completion queue has overflowed. The ring then takes
/// completions to make room, and the engine sees them after the next turn.
#[test]
fn a_worker_may_exit_with_completions_that_its_engine_has_not_seen() {
    let mut machine = Machine::new(1);
    machine.write(0, 8);
    machine.settle(0);
    let kernel = machine.kernels[0].clone();
    kernel.complete(&machine.of_all_replicas(0)[2], 512);
    kernel.shorten_queue(1);
    kernel.fail_enter(libc::EBUSY);
    let mut worker = machine.workers[0].borrow_mut();
    let event = tempfile::tempfile().unwrap();
    for token in [8, 9].map(WatchToken) {
        worker.io.ring.watch(&event, token).unwrap();
    }
    let busy = ReplicaSet::first(2);
    assert_eq!(worker.io.ring.busy_replicas(), busy);
    worker.exit_at(Duration::ZERO);
    assert!(!worker.step().unwrap());
}

#[test]
fn a_worker_without_requests_exits_at_once() {
    let machine = Machine::new(1);
    machine.mailboxes[0].send(Message::Exit);
    machine.kernels[0].was_asleep();
    let mut worker = machine.workers[0].borrow_mut();
    while worker.step().unwrap() {
        let is_asleep = machine.kernels[0].was_asleep();
        assert!(!is_asleep, "the message does not wake it");
    }
    assert_eq!(worker.io.ring.operations(), 0);
}

/// The memory that a worker has used once is there for another one that waits for it, although the
/// first one sleeps; and the one that waits sleeps until then.
#[test]
fn a_worker_that_waits_for_the_memory_of_another_goes_on_when_it_is_given_back() {
    for late in [false, true] {
        // Beyond what each has in any case, there is memory for one request.
        let least = buffer_bytes_min(2, REPLICAS);
        let memory = least + least / 3;
        let mut machine = Machine::with_memory(2, Arc::default(), memory);
        let first = machine.write(1, 8);
        machine.settle(1);
        machine.finish_write(1, first);

        let (one, other) = (machine.write(0, 16), machine.write(0, 24));
        if late {
            // The answer comes just before the worker sleeps.
            let giver = Rc::clone(&machine.workers[1]);
            machine.watch_mailbox(0, move || {
                for _ in 0..4 {
                    assert!(giver.borrow_mut().step().unwrap());
                }
            });
        } else {
            machine.settle(0);
            let begun = machine.kernels[0].operations();
            assert_eq!(begun.len(), REPLICAS, "there is memory for one: {begun:?}");
            machine.settle(1);
            let mail = machine.mailboxes[0].take();
            let is_wake = |message: &Message| matches!(message, Message::Continue);
            assert!(mail.iter().any(is_wake), "it is woken: {mail:?}");
        }
        machine.settle(0);
        let begun = machine.kernels[0].operations();
        assert_eq!(begun.len(), 2 * REPLICAS, "late {late}: {begun:?}");
        complete_all(&machine.kernels[0]);
        machine.settle(0);
        while machine.status(0, other).is_none() {
            complete_all(&machine.kernels[0]);
            machine.settle(0);
        }
        assert_eq!(
            [one, other].map(|write| machine.status(0, write)),
            [Some(0); 2]
        );
    }
}

#[test]
fn a_request_for_which_the_system_has_no_memory_fails_and_the_next_one_is_served() {
    let mut machine = Machine::new(1);
    let pool = machine.workers[0].borrow().pool.clone();
    pool.refuse(true);
    let all: Vec<_> = std::iter::from_fn(|| pool.try_take(512)).collect();
    assert!(!all.is_empty());
    let write = machine.write(0, 8);
    let read = machine.request(0, VIRTIO_BLK_T_IN, 8, &[0; 512]);
    machine.settle(0);
    let io_error = u8::try_from(VIRTIO_BLK_S_IOERR).unwrap();
    for failed in [write, read] {
        assert_eq!(machine.status(0, failed), Some(io_error));
    }
    assert!(machine.kernels[0].operations().is_empty());

    drop(all);
    let next = machine.write(0, 8);
    machine.settle(0);
    machine.finish_write(0, next);
}

/// With `--werror stop` (W9).
#[test]
fn a_write_for_which_the_system_has_no_memory_is_held_and_an_error_is_counted() {
    for policy in [OnError::Stop, OnError::Report] {
        let hold = Arc::new(Hold::new(ErrorPolicy {
            read: policy,
            write: policy,
        }));
        let mut machine = Machine::with_hold(1, Arc::clone(&hold));
        let pool = machine.workers[0].borrow().pool.clone();
        pool.refuse(true);
        let all: Vec<_> = std::iter::from_fn(|| pool.try_take(512)).collect();
        let write = machine.write(0, 8);
        machine.settle(0);
        if policy == OnError::Report {
            let io_error = u8::try_from(VIRTIO_BLK_S_IOERR).unwrap();
            assert_eq!(machine.status(0, write), Some(io_error));
            let errors = machine.workers[0].borrow().io.events.guest_errors();
            assert_eq!(errors.counts.write, 1);
            continue;
        }
        // It fails again, and is held again.
        for _ in 0..2 {
            assert_eq!((machine.status(0, write), hold.count()), (None, 1));
            assert_eq!(hold.continue_all(), 1);
            machine.mailboxes[0].send(Message::Continue);
            machine.settle(0);
        }
        drop(all);
        assert_eq!(hold.continue_all(), 1);
        machine.mailboxes[0].send(Message::Continue);
        machine.settle(0);
        machine.finish_write(0, write);
    }
}
