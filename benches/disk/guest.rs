//! The client of a served disk: one queue of blkio's vhost-user driver.

use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use blkio::{Blkioq, Completion, ReqFlags};

use super::drive::Queue;
use super::interrupt::{self, Interrupted};
use super::requests::{Kind, Request, WriteData};

/// Entries of a virtqueue: three for each request at the greatest depth.
pub const QUEUE_SIZE: i32 = 512;

/// Time in which a disk must complete some request.
const LIMIT: Duration = Duration::from_secs(30);

/// How often to check for an interruption while no request completes.
const LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// A virtqueue and the memory for its requests.
pub struct GuestQueue<'a> {
    queue: &'a mut Blkioq,
    memory: &'a mut [u8],
    len: usize,
    data: WriteData,
    completions: [MaybeUninit<Completion>; 256],
}

impl<'a> GuestQueue<'a> {
    /// Requests of `len` bytes on `queue`.
    pub fn new(queue: &'a mut Blkioq, memory: &'a mut [u8], len: usize) -> Self {
        let mut data = WriteData::new();
        data.fill(memory);
        Self {
            queue,
            memory,
            len,
            data,
            completions: [const { MaybeUninit::uninit() }; 256],
        }
    }
}

impl Queue for GuestQueue<'_> {
    fn push(&mut self, slot: usize, request: Request) {
        let memory = &mut self.memory[slot * self.len..][..self.len];
        let (flags, offset) = (ReqFlags::empty(), request.offset);
        match request.kind {
            Kind::Read => self
                .queue
                .read(offset, memory.as_mut_ptr(), self.len, slot, flags),
            Kind::Write => {
                self.data.renew(memory);
                self.queue
                    .write(offset, memory.as_ptr(), self.len, slot, flags);
            }
            Kind::Flush => self.queue.flush(slot, flags),
        }
    }

    fn run(&mut self, completed: &mut Vec<usize>) -> Result<(), Interrupted> {
        let deadline = Instant::now() + LIMIT;
        let count = loop {
            let mut interval = LOOK_INTERVAL;
            let result = self
                .queue
                .do_io(&mut self.completions, 1, Some(&mut interval), None);
            match result {
                Ok(count) => break count,
                Err(error)
                    if [libc::ETIME, libc::EINTR].contains(&error.errno().raw_os_error()) =>
                {
                    interrupt::check()?;
                    assert!(Instant::now() < deadline, "no completion within {LIMIT:?}");
                }
                Err(error) => panic!("waiting for completions: {error}"),
            }
        };
        for completion in &self.completions[..count] {
            // SAFETY: `do_io` has initialised as many completions as it returned.
            let completion = unsafe { completion.assume_init_ref() };
            assert_eq!(completion.ret, 0, "a request failed");
            completed.push(completion.user_data);
        }
        Ok(())
    }
}
