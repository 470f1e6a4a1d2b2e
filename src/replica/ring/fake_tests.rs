//! The ring with a recording kernel: the flags, offsets and buffers of each submission, and what
//! the ring makes of each completion.

use std::rc::Rc;

use super::fake_kernel::{ASYNC, FIXED_FILE, FakeKernel, POLL_ADD_MULTI, Submission};
use super::operation::RETRIES_MAX;
use super::*;
use crate::common::buffer::Buffer;
use crate::common::operation::RequestId;
use crate::common::{SECTOR_BYTES, SectorRange};
use crate::limits::ZERO_STEP_BYTES;
use crate::replica::zero::{ZEROES, ZEROES_BYTES};
use crate::statistics::Recorder;

const REPLICA: ReplicaIndex = ReplicaIndex(2);
const SECTOR: i32 = 512;

/// A ring over four replicas, the kernel behind it and a pool with a registered arena.
pub(super) struct Setup {
    pub(super) ring: Ring<FakeKernel>,
    pub(super) kernel: FakeKernel,
    pool: BufferPool,
}

impl Setup {
    pub(super) fn new() -> Self {
        let setup = Self::without_arena();
        let (kernel, pool) = (setup.kernel.clone(), setup.pool.clone());
        let mut ring = setup.ring;
        ring.register_arena(&pool);
        Self { ring, kernel, pool }
    }

    /// The kernel has no room to register the arena.
    fn without_arena() -> Self {
        let kernel = FakeKernel::new();
        let files = [10, 11, 12, 13].map(|fd| RingFile {
            fd,
            waits: false,
            record: Some(fd + 100),
            cached: true,
            holes: None,
        });
        let pool = BufferPool::default();
        pool.add_arena();
        Self {
            ring: Ring::with_kernel(kernel.clone(), &files).unwrap(),
            kernel,
            pool,
        }
    }

    /// A buffer in the arena, or one that is not.
    pub(super) fn buffer(&self, in_arena: bool, len: usize) -> Buffer {
        let pool = if in_arena {
            self.pool.clone()
        } else {
            BufferPool::default()
        };
        let buffer = pool.take(len);
        assert_eq!(buffer.is_in_arena(), in_arena);
        buffer
    }

    pub(super) fn push(&mut self, action: Action) {
        let operation = Operation {
            request: RequestId(7),
            replica: REPLICA,
            action,
        };
        let since = Recorder::detached().now();
        self.ring.push(operation, since).unwrap();
    }

    /// Pushes an operation and returns its submission.
    fn submit(&mut self, action: Action) -> Submission {
        self.push(action);
        assert!(self.enter().is_empty());
        self.kernel.only()
    }

    pub(super) fn enter(&mut self) -> Vec<Completion> {
        self.ring.enter(Wait::No).unwrap().drain(..).collect()
    }

    /// Completes a submission and returns the next one of the same operation.
    fn continue_after(&mut self, submission: &Submission, result: i32) -> Submission {
        self.kernel.complete(submission, result);
        let ends = |completion: &Completion| matches!(completion, Completion::Reply(..));
        assert!(!self.enter().iter().any(ends), "the operation continues");
        // What the completion led to is submitted by the next call.
        self.enter();
        self.kernel.only()
    }

    /// Fails a submission with EAGAIN, lets the pause that follows pass, and returns the next
    /// submission of the same operation.
    fn continue_after_pause(&mut self, submission: &Submission) -> Submission {
        self.kernel.complete(submission, -libc::EAGAIN);
        assert!(self.enter().is_empty());
        self.enter();
        assert!(self.kernel.operations().is_empty(), "not at once");
        let in_flight = self.kernel.in_flight();
        let mut timers = in_flight
            .iter()
            .filter(|submission| submission.opcode == opcode::Timeout::CODE);
        let timer = timers.next().expect("a pause").clone();
        assert!(timers.next().is_none());
        self.continue_after(&timer, -libc::ETIME)
    }

    /// Completes the last submission of an operation and returns the result of the operation.
    fn end(&mut self, submission: &Submission, result: i32) -> Result<(), Errno> {
        self.kernel.complete(submission, result);
        let mut completions = self.enter();
        let Some(Completion::Reply(reply, _)) = completions.pop() else {
            panic!("no reply");
        };
        assert!(completions.is_empty());
        assert_eq!((reply.request, reply.replica), (RequestId(7), REPLICA));
        assert!(self.kernel.operations().is_empty());
        assert_eq!(self.ring.operations(), 0);
        reply.result
    }
}

pub(super) fn write(data: Buffer, offset_bytes: usize, range: SectorRange) -> Action {
    Action::Write {
        range,
        data: Rc::new(data),
        offset_bytes,
    }
}

fn is_sync(submission: &Submission) -> bool {
    /// `IORING_FSYNC_DATASYNC`.
    const DATASYNC: u32 = 1;
    submission.opcode == opcode::Fsync::CODE
        && submission.operation_flags == DATASYNC
        && submission.fd == i32::from(REPLICA.0)
        && submission.flags == FIXED_FILE
        // Of the whole file.
        && (submission.offset, submission.len) == (0, 0)
}

#[test]
fn a_read_fills_its_whole_buffer_from_its_range() {
    for in_arena in [true, false] {
        let mut setup = Setup::new();
        let into = setup.buffer(in_arena, 1024);
        let address = into.as_ptr() as u64;
        let range = SectorRange::new(9, 2);
        let submission = setup.submit(Action::Read { range, into });
        let opcode = if in_arena {
            opcode::ReadFixed::CODE
        } else {
            opcode::Read::CODE
        };
        let expected = Submission {
            opcode,
            flags: FIXED_FILE,
            fd: 2,
            offset: 9 * SECTOR_BYTES,
            address,
            len: 1024,
            operation_flags: 0,
            buffer: 0,
            user_data: submission.user_data,
        };
        assert_eq!(submission, expected);
        assert_eq!(setup.kernel.is_registered(&submission), in_arena);
        assert_eq!(setup.end(&submission, 1024), Ok(()));
    }
}

#[test]
fn a_write_asks_for_no_durability_whatever_its_buffer() {
    for in_arena in [true, false] {
        let mut setup = Setup::new();
        let data = setup.buffer(in_arena, 4096);
        let address = data.as_ptr() as u64 + 512;
        let submission = setup.submit(write(data, 512, SectorRange::new(100, 3)));
        let opcode = if in_arena {
            opcode::WriteFixed::CODE
        } else {
            opcode::Write::CODE
        };
        let expected = Submission {
            opcode,
            flags: FIXED_FILE,
            fd: 2,
            offset: 100 * SECTOR_BYTES,
            address,
            len: 3 * 512,
            // Above all not RWF_DSYNC, which may report the loss of another write.
            operation_flags: 0,
            buffer: 0,
            user_data: submission.user_data,
        };
        assert_eq!(submission, expected, "arena {in_arena}");
        assert_eq!(setup.kernel.is_registered(&submission), in_arena);
        assert_eq!(setup.end(&submission, 3 * SECTOR), Ok(()));
    }
}

#[test]
fn a_rest_of_a_write_is_written_like_its_beginning() {
    let mut setup = Setup::new();
    let data = setup.buffer(true, 4096);
    let first = setup.submit(write(data, 0, SectorRange::new(0, 8)));
    let rest = setup.continue_after(&first, 512);
    assert_eq!(rest.operation_flags, 0);
    assert_eq!(rest.opcode, opcode::WriteFixed::CODE);
    assert_eq!(setup.end(&rest, 7 * SECTOR), Ok(()));
}

#[test]
fn memory_that_is_not_registered_is_not_used_as_a_fixed_buffer() {
    let mut setup = Setup::without_arena();
    setup.kernel.refuse_memory();
    let pool = setup.pool.clone();
    setup.ring.register_arena(&pool);
    let data = setup.buffer(true, 512);
    let submission = setup.submit(write(data, 0, SectorRange::new(0, 1)));
    assert_eq!(submission.opcode, opcode::Write::CODE);
    assert_eq!(setup.end(&submission, SECTOR), Ok(()));
    let into = setup.buffer(true, 512);
    let range = SectorRange::new(0, 1);
    let submission = setup.submit(Action::Read { range, into });
    assert_eq!(submission.opcode, opcode::Read::CODE);
    assert_eq!(setup.end(&submission, SECTOR), Ok(()));
}

#[test]
fn a_short_read_or_write_continues_behind_what_is_done() {
    for (is_read, in_arena) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut setup = Setup::new();
        let buffer = setup.buffer(in_arena, 8 * 512);
        let range = SectorRange::new(40, 4);
        // A write takes its bytes from the middle of its buffer.
        let (action, start) = if is_read {
            let into = setup.buffer(in_arena, 4 * 512);
            let start = into.as_ptr() as u64;
            (Action::Read { range, into }, start)
        } else {
            let start = buffer.as_ptr() as u64 + 1024;
            (write(buffer, 1024, range), start)
        };
        let mut submission = setup.submit(action);
        let mut done = 0_u64;
        // Also in the middle of a sector, and with interruptions in between.
        for (result, more) in [
            (512, 512),
            (-libc::EINTR, 0),
            (100, 100),
            (-libc::EAGAIN, 0),
            (924, 924),
        ] {
            let next = match result {
                result if result == -libc::EAGAIN => setup.continue_after_pause(&submission),
                _ => setup.continue_after(&submission, result),
            };
            done += more;
            let expected = Submission {
                offset: 40 * SECTOR_BYTES + done,
                address: start + done,
                len: u32::try_from(4 * SECTOR_BYTES - done).unwrap(),
                user_data: next.user_data,
                ..submission
            };
            assert_eq!(next, expected, "read {is_read} after {result}");
            submission = next;
        }
        assert_eq!(setup.end(&submission, SECTOR), Ok(()));
    }
}

#[test]
fn operations_that_complete_out_of_order_get_their_own_results() {
    let mut setup = Setup::new();
    for start in 0..5 {
        let into = setup.buffer(true, 512);
        let range = SectorRange::new(start, 1);
        setup.push(Action::Read { range, into });
    }
    assert!(setup.enter().is_empty());
    let mut submissions = setup.kernel.operations();
    assert_eq!(submissions.len(), 5);
    submissions.swap(0, 3);
    submissions.reverse();
    for (number, submission) in submissions.iter().enumerate() {
        let errno = Errno(i32::try_from(number).unwrap() + 100);
        setup.kernel.complete(submission, -errno.0);
        let mut completions = setup.enter();
        let Some(Completion::Reply(reply, _)) = completions.pop() else {
            panic!("no reply");
        };
        let (_, range) = reply.action.describe();
        assert_eq!(range.start * SECTOR_BYTES, submission.offset);
        assert_eq!(reply.result, Err(errno));
    }
    assert_eq!(setup.ring.operations(), 0);
}

#[test]
fn an_operation_that_the_kernel_always_interrupts_fails() {
    for errno in [libc::EINTR, libc::EAGAIN] {
        let mut setup = Setup::new();
        let into = setup.buffer(true, 1024);
        let range = SectorRange::new(0, 2);
        let mut submission = setup.submit(Action::Read { range, into });
        for _ in 0..RETRIES_MAX {
            submission = match errno {
                libc::EAGAIN => setup.continue_after_pause(&submission),
                _ => setup.continue_after(&submission, -errno),
            };
        }
        assert_eq!(setup.end(&submission, -errno), Err(Errno(errno)));
    }
}

#[test]
fn a_sync_that_fails_is_not_repeated() {
    for errno in [libc::EIO, libc::EINTR, libc::EAGAIN] {
        let mut setup = Setup::new();
        let submission = setup.submit(Action::Flush);
        assert_eq!(setup.end(&submission, -errno), Err(Errno(errno)));
    }
}

#[test]
fn progress_allows_more_interruptions() {
    let mut setup = Setup::new();
    let into = setup.buffer(true, 1024);
    let range = SectorRange::new(0, 2);
    let mut submission = setup.submit(Action::Read { range, into });
    for _ in 0..RETRIES_MAX {
        submission = setup.continue_after(&submission, -libc::EINTR);
    }
    submission = setup.continue_after(&submission, 512);
    for _ in 0..RETRIES_MAX {
        submission = setup.continue_after(&submission, -libc::EINTR);
    }
    assert_eq!(setup.end(&submission, SECTOR), Ok(()));
}

#[test]
fn a_read_or_write_that_makes_no_progress_is_an_error() {
    let mut setup = Setup::new();
    let into = setup.buffer(true, 1024);
    let range = SectorRange::new(0, 2);
    let first = setup.submit(Action::Read { range, into });
    let rest = setup.continue_after(&first, 512);
    assert_eq!(setup.end(&rest, 0), Err(Errno(libc::EIO)));
}

#[test]
fn a_flush_is_a_sync_of_the_data_of_the_file() {
    let mut setup = Setup::new();
    let submission = setup.submit(Action::Flush);
    assert!(is_sync(&submission), "{submission:?}");
    assert_eq!(setup.end(&submission, -libc::EIO), Err(Errno(libc::EIO)));
}

/// The submissions that zero a range, in the way that the kernel supports: the others fail with
/// EOPNOTSUPP. Returns the last submission, not completed.
fn zero(setup: &mut Setup, unmap: bool, lacks: usize) -> Submission {
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let keep = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    let modes = if unmap { vec![punch, keep] } else { vec![keep] };
    let range = SectorRange::new(5, 2 * ZEROES_BYTES as u64 / SECTOR_BYTES + 3);
    let mut submission = setup.submit(Action::Zero { range, unmap });
    for (number, mode) in modes.iter().enumerate() {
        assert_eq!(submission.opcode, opcode::Fallocate::CODE);
        assert_eq!(
            (submission.offset, submission.address, submission.len),
            (5 * SECTOR_BYTES, range.bytes(), mode.cast_unsigned())
        );
        if number == lacks {
            return submission;
        }
        submission = setup.continue_after(&submission, -libc::EOPNOTSUPP);
    }
    // No file lacks writes. They are at most as long as the zeroes.
    let mut done = 0;
    loop {
        let len = (range.bytes() - done).min(ZEROES_BYTES as u64);
        assert_eq!(submission.opcode, opcode::Write::CODE);
        assert_eq!(submission.offset, 5 * SECTOR_BYTES + done);
        assert_eq!(submission.address, ZEROES.0.as_ptr() as u64);
        assert_eq!(u64::from(submission.len), len);
        done += len;
        if done == range.bytes() {
            return submission;
        }
        submission = setup.continue_after(&submission, i32::try_from(len).unwrap());
    }
}

#[test]
fn zeroing_goes_on_by_bounded_steps() {
    const STEP: u64 = ZERO_STEP_BYTES as u64;
    let mut setup = Setup::new();
    let range = SectorRange::new(5, (2 * STEP + 4096) / SECTOR_BYTES);
    let first = setup.submit(Action::Zero { range, unmap: true });
    let start = 5 * SECTOR_BYTES;
    assert_eq!((first.offset, first.address), (start, STEP));
    let second = setup.continue_after(&first, 0);
    assert_eq!((second.offset, second.address), (start + STEP, STEP));
    // Another way goes on where this one has failed.
    let other = setup.continue_after(&second, -libc::EOPNOTSUPP);
    assert_eq!(other.opcode, opcode::Fallocate::CODE);
    assert_ne!(other.len, second.len, "the mode");
    assert_eq!((other.offset, other.address), (start + STEP, STEP));
    let last = setup.continue_after(&other, 0);
    assert_eq!((last.offset, last.address), (start + 2 * STEP, 4096));
    assert_eq!(setup.end(&last, 0), Ok(()));
}

#[test]
fn zeroes_end_without_a_sync_in_every_way() {
    for unmap in [true, false] {
        for lacks in 0..=2 {
            let mut setup = Setup::new();
            let zeroing = zero(&mut setup, unmap, lacks);
            let result = match zeroing.opcode {
                opcode::Fallocate::CODE => 0,
                _ => zeroing.len.cast_signed(),
            };
            assert_eq!(zeroing.operation_flags, 0);
            assert_eq!(setup.end(&zeroing, result), Ok(()));
        }
    }
}

#[test]
fn a_failed_write_of_zeroes_is_their_result() {
    let mut setup = Setup::new();
    let zeroing = zero(&mut setup, true, 2);
    assert_eq!(setup.end(&zeroing, -libc::ENOSPC), Err(Errno(libc::ENOSPC)));
}

#[test]
fn only_long_writes_through_the_page_cache_are_for_threads() {
    let mut setup = Setup::new();
    let range = SectorRange::new(0, LONG_WRITE_BYTES / SECTOR_BYTES);
    let data = setup.buffer(false, 64 << 10);
    let long = setup.submit(write(data, 0, range));
    assert_eq!(long.flags, FIXED_FILE | ASYNC);
    let rest = setup.continue_after(&long, 512);
    assert_eq!(rest.flags, FIXED_FILE | ASYNC);
    assert_eq!(setup.end(&rest, (64 << 10) - SECTOR), Ok(()));

    let direct = RingFile {
        fd: 20,
        record: None,
        cached: false,
        waits: false,
        holes: None,
    };
    setup.ring.set_file(REPLICA, Some(direct)).unwrap();
    assert_eq!(setup.kernel.file(2), 20);
    let data = setup.buffer(false, 64 << 10);
    let long = setup.submit(write(data, 0, range));
    assert_eq!(long.flags, FIXED_FILE);
}

#[test]
fn the_thread_of_the_ring_waits_for_no_file_system() {
    let mut setup = Setup::new();
    let fuse = RingFile {
        fd: 20,
        record: None,
        cached: false,
        waits: true,
        holes: None,
    };
    setup.ring.set_file(REPLICA, Some(fuse)).unwrap();
    let range = SectorRange::new(0, 1);
    let data = setup.buffer(false, 512);
    let into = setup.buffer(true, 512);
    let actions = [
        (Action::Read { range, into }, 512),
        (write(data, 0, range), 512),
        (Action::Flush, 0),
    ];
    for (action, result) in actions {
        let submission = setup.submit(action);
        assert_eq!(submission.flags, FIXED_FILE | ASYNC);
        assert_eq!(setup.end(&submission, result), Ok(()));
    }
}

#[test]
fn a_write_to_the_record_is_for_a_thread_and_reaches_no_image() {
    let mut setup = Setup::new();
    let bytes: Arc<[u8]> = Arc::from([7; 8192]);
    let record = |bytes: &Arc<[u8]>| Action::Record {
        offset_bytes: 1 << 20,
        bytes: Arc::clone(bytes),
    };
    let first = setup.submit(record(&bytes));
    let place = usize::try_from(first.fd).unwrap();
    assert_eq!(setup.kernel.file(place), 112, "the record of the replica");
    assert_eq!(first.opcode, opcode::Write::CODE);
    assert_eq!(first.flags, FIXED_FILE | ASYNC);
    assert_eq!((first.offset, first.len), (1 << 20, 8192));
    assert_eq!(first.address, bytes.as_ptr() as u64);
    assert!(!setup.ring.is_writing_long());
    assert!(setup.ring.busy_replicas().contains(REPLICA));
    let again = setup.continue_after(&first, -libc::EINTR);
    assert_eq!((again.offset, again.len), (first.offset, first.len));
    let again = setup.continue_after_pause(&again);
    let rest = setup.continue_after(&again, 512);
    assert_eq!((rest.fd, rest.flags), (first.fd, first.flags));
    assert_eq!((rest.offset, rest.len), ((1 << 20) + 512, 8192 - 512));
    assert_eq!(rest.address, first.address + 512);
    assert_eq!(setup.end(&rest, 8192 - SECTOR), Ok(()));

    let failing = setup.submit(record(&bytes));
    let result = setup.end(&failing, -libc::ENOSPC);
    assert_eq!(result, Err(Errno(libc::ENOSPC)));
    setup
        .ring
        .set_file(REPLICA, Some(RingFile::none()))
        .unwrap();
    assert_eq!(setup.kernel.file(place), -1);
}

#[test]
fn a_full_submission_queue_delays_nothing_and_loses_nothing() {
    let mut setup = Setup::new();
    setup.kernel.shorten_queue(2);
    for errno in [libc::EINTR, libc::EAGAIN, libc::EBUSY] {
        setup.kernel.fail_enter(errno);
    }
    for start in 0..9 {
        let into = setup.buffer(true, 512);
        let range = SectorRange::new(start, 1);
        setup.push(Action::Read { range, into });
    }
    setup.enter();
    let starts: Vec<_> = setup
        .kernel
        .operations()
        .iter()
        .map(|submission| submission.offset / SECTOR_BYTES)
        .collect();
    assert_eq!(starts, (0..9).collect::<Vec<_>>());
}

#[test]
fn a_watch_that_the_kernel_ends_is_armed_anew() {
    let mut setup = Setup::new();
    let event = tempfile::tempfile().unwrap();
    let watch = setup.ring.watch(&event, WatchToken(3)).unwrap();
    setup.enter();
    let [poll] = setup.kernel.in_flight().try_into().unwrap();
    let expected = Submission {
        opcode: opcode::PollAdd::CODE,
        flags: 0,
        fd: event.as_raw_fd(),
        offset: 0,
        address: 0,
        len: POLL_ADD_MULTI,
        operation_flags: libc::POLLIN.cast_unsigned().into(),
        buffer: 0,
        user_data: poll.user_data,
    };
    assert_eq!(poll, expected);
    let is_readable = |completions: Vec<Completion>| {
        matches!(
            completions.as_slice(),
            [Completion::Readable(WatchToken(3))]
        )
    };
    setup.kernel.report(&poll, i32::from(libc::POLLIN));
    assert!(is_readable(setup.enter()));
    assert_eq!(
        setup.kernel.in_flight(),
        std::slice::from_ref(&poll),
        "still armed"
    );

    // A write may come between the end of this poll and the next one, which then reports it.
    setup.kernel.complete(&poll, i32::from(libc::POLLIN));
    assert!(is_readable(setup.enter()), "the last event counts");
    setup.enter();
    let [again] = setup.kernel.in_flight().try_into().unwrap();
    assert_eq!(
        again,
        Submission {
            user_data: again.user_data,
            ..expected
        }
    );

    setup.ring.unwatch(watch).unwrap();
    setup.enter();
    let [_, cancel] = setup.kernel.in_flight().try_into().unwrap();
    assert_eq!(
        (cancel.opcode, cancel.address),
        (opcode::AsyncCancel::CODE, again.user_data),
        "the poll that the kernel has now"
    );
    setup.kernel.report(&again, i32::from(libc::POLLIN));
    assert!(setup.enter().is_empty(), "the watch has ended");
    setup.kernel.complete(&again, -libc::ECANCELED);
    setup.kernel.complete(&cancel, 0);
    assert!(setup.enter().is_empty());
    assert!(setup.ring.table.is_empty());
}

#[test]
#[should_panic = "belongs to no submission in flight"]
fn a_completion_of_no_submission_ends_the_process() {
    let mut setup = Setup::new();
    let submission = setup.submit(Action::Flush);
    setup
        .kernel
        .complete_unasked(submission.user_data + 1, 0, false);
    setup.enter();
}

#[test]
#[should_panic = "belongs to no submission in flight"]
fn a_second_completion_of_a_submission_ends_the_process() {
    let mut setup = Setup::new();
    let first = setup.submit(Action::Flush);
    assert_eq!(setup.end(&first, 0), Ok(()));
    // The slot is taken again.
    setup.submit(Action::Flush);
    setup.kernel.complete_unasked(first.user_data, 0, false);
    setup.enter();
}

#[test]
#[should_panic = "completed 1024 bytes of an operation with 512 bytes left"]
fn a_completion_of_more_bytes_than_were_left_ends_the_process() {
    let mut setup = Setup::new();
    let into = setup.buffer(true, 1024);
    let range = SectorRange::new(0, 2);
    let first = setup.submit(Action::Read { range, into });
    let rest = setup.continue_after(&first, 512);
    setup.kernel.complete(&rest, 1024);
    setup.enter();
}

#[test]
#[should_panic = "is replaced while operations are in flight"]
fn a_file_is_not_replaced_under_an_operation() {
    let mut setup = Setup::new();
    setup.submit(Action::Flush);
    let _ = setup.ring.set_file(REPLICA, None);
}

#[test]
fn a_ring_that_is_dropped_with_operations_in_flight_keeps_their_buffers() {
    let mut setup = Setup::new();
    let data = Rc::new(setup.buffer(false, 512));
    let alive = Rc::downgrade(&data);
    setup.submit(Action::Write {
        range: SectorRange::new(0, 1),
        data,
        offset_bytes: 0,
    });
    drop(setup);
    assert!(alive.upgrade().is_some(), "the kernel may still read it");
}
