//! The ceiling: how many requests one thread with an io_uring does on the files, without vote or
//! guest. A request is complete when its operations on all replicas are.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};

use quorum_blk::common::buffer::{Buffer, BufferPool};

use super::drive::Queue;
use super::interrupt::Interrupted;
use super::plan::{Row, Storage};
use super::requests::{Kind, Request, WriteData};

/// Room for all operations at the greatest depth.
const RING_ENTRIES: u32 = 1024;

/// Reads from the page cache are divided into parts that fit the L2 cache, which is fastest. Other
/// reads are not divided: each part would cost a turn of a kernel thread or a command to a device.
const PART_BYTES: usize = 64 << 10;

/// One thread with an io_uring over the replicas.
pub struct Ceiling {
    uring: IoUring,
    _files: Vec<File>,
    /// Replicas that are written, and those that are read.
    replicas: usize,
    replicas_read: usize,
    len: usize,
    part_len: usize,
    /// What each slot writes.
    memory: Vec<Buffer>,
    data: WriteData,
    /// Where data read from a replica goes; it is not looked at.
    sinks: Vec<Buffer>,
    /// For each slot, the number of operations in flight and the result that each must have.
    waits_for: Vec<(usize, usize)>,
    /// The number of all operations in flight.
    in_flight: usize,
}

impl Ceiling {
    /// A ceiling over `images`, for the requests of `row`.
    pub fn new(row: &Row, images: &[PathBuf]) -> Self {
        let direct = row.storage == Storage::Disk;
        let files: Vec<File> = images.iter().map(|image| open(image, direct)).collect();
        let fds: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let uring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .build(RING_ENTRIES)
            // Linux before 6.1 lacks these.
            .or_else(|_| IoUring::new(RING_ENTRIES))
            .expect("making an io_uring");
        let registered = uring.submitter().register_files(&fds);
        registered.expect("registering the images");
        let len = row.pattern.len;
        let part_len = if direct || row.writes() {
            len
        } else {
            len.min(PART_BYTES)
        };
        let pool = BufferPool::default();
        let mut data = WriteData::new();
        let mut memory: Vec<_> = (0..row.pattern.depth).map(|_| pool.take(len)).collect();
        memory.iter_mut().for_each(|memory| data.fill(memory));
        Self {
            uring,
            replicas: files.len(),
            _files: files,
            replicas_read: row.replicas_read(),
            len,
            part_len,
            data,
            memory,
            sinks: images.iter().map(|_| pool.take(part_len)).collect(),
            waits_for: vec![(0, 0); row.pattern.depth],
            in_flight: 0,
        }
    }

    fn push_operation(&mut self, slot: usize, operation: squeue::Entry) {
        let operation = operation.user_data(slot as u64);
        self.waits_for[slot].0 += 1;
        self.in_flight += 1;
        // SAFETY: until the operation has ended, the memory that it points to is touched by other
        // operations only, and is not freed: `drop` waits for all operations.
        let pushed = unsafe { self.uring.submission().push(&operation) };
        pushed.expect("room for all operations");
    }

    /// Waits for operations to end and adds the slots that have none left to `completed`.
    fn reap(&mut self, completed: &mut Vec<usize>) {
        // Wait for a quarter of them: waking for each costs more time than it gains.
        let want = (self.in_flight / 4).max(1);
        while let Err(error) = self.uring.submit_and_wait(want) {
            let errno = error.raw_os_error();
            assert!(
                errno == Some(libc::EINTR),
                "waiting for completions: {error}"
            );
        }
        for entry in self.uring.completion() {
            let slot = usize::try_from(entry.user_data()).expect("a slot");
            let (count, expected) = &mut self.waits_for[slot];
            let result = entry.result();
            assert_eq!(
                usize::try_from(result),
                Ok(*expected),
                "an operation returned {result}"
            );
            *count -= 1;
            self.in_flight -= 1;
            if *count == 0 {
                completed.push(slot);
            }
        }
    }
}

impl Queue for Ceiling {
    fn push(&mut self, slot: usize, request: Request) {
        let memory = &mut self.memory[slot];
        let is_flush = request.kind == Kind::Flush;
        self.waits_for[slot].1 = if is_flush { 0 } else { self.part_len };
        if request.kind == Kind::Write {
            self.data.renew(memory);
        }
        let source = memory.as_ptr();
        let part_len = u32::try_from(self.part_len).expect("a short part");
        for at in (0..self.len).step_by(self.part_len) {
            let offset = request.offset + at as u64;
            match request.kind {
                Kind::Read => {
                    for replica in 0..self.replicas_read {
                        let sink = self.sinks[replica].as_mut_ptr();
                        let read = opcode::Read::new(file(replica), sink, part_len).offset(offset);
                        self.push_operation(slot, read.build());
                    }
                }
                Kind::Write => {
                    for replica in 0..self.replicas {
                        let from = source.wrapping_add(at);
                        let write =
                            opcode::Write::new(file(replica), from, part_len).offset(offset);
                        self.push_operation(slot, write.build());
                    }
                }
                Kind::Flush => {
                    for replica in 0..self.replicas {
                        let flush = opcode::Fsync::new(file(replica)).flags(FsyncFlags::DATASYNC);
                        self.push_operation(slot, flush.build());
                    }
                    return;
                }
            }
        }
    }

    fn run(&mut self, completed: &mut Vec<usize>) -> Result<(), Interrupted> {
        while completed.is_empty() {
            self.reap(completed);
        }
        Ok(())
    }
}

impl Drop for Ceiling {
    fn drop(&mut self) {
        // After a panic, operations may still be in flight.
        while self.in_flight > 0 {
            self.reap(&mut Vec::new());
        }
    }
}

/// Opens an image the way the compared systems do.
pub fn open(image: &Path, direct: bool) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(if direct { libc::O_DIRECT } else { 0 })
        .open(image)
        .expect("opening an image")
}

fn file(replica: usize) -> Fixed {
    Fixed(u32::try_from(replica).expect("few replicas"))
}
