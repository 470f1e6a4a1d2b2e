//! A vhost-user client that this project did not write: `blkio`'s `virtio-blk-vhost-user` driver.

use crate::HANG_LIMIT;
use std::mem::MaybeUninit;
use std::path::Path;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

/// Memory shared with the daemon for each queue.
pub const QUEUE_MEMORY_BYTES: usize = 8 << 20;

/// A connected client. One slot of memory for each queue holds the data of its requests.
pub struct Client {
    // Queues go before the driver they belong to.
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    blkio: Blkio,
}

/// A request failed, with this errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed(pub i32);

/// A request of a batch ([`Client::send`]). Its number in the batch is its index.
#[derive(Clone, Copy, Debug)]
pub enum Request {
    /// Read from the disk into the memory of the queue.
    Read {
        /// First byte on the disk.
        offset: u64,
        /// First byte in the memory of the queue.
        memory: usize,
        /// Length in bytes.
        len: usize,
    },
    /// Write from the memory of the queue to the disk.
    Write {
        /// First byte on the disk.
        offset: u64,
        /// First byte in the memory of the queue.
        memory: usize,
        /// Length in bytes.
        len: usize,
    },
    /// Discard a range of the disk.
    Discard {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Write zeroes to a range of the disk.
    WriteZeroes {
        /// First byte on the disk.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The device may deallocate the range.
        unmap: bool,
    },
    /// Flush.
    Flush,
}

impl Request {
    /// `count` writes of `len` bytes each, side by side on the disk and in memory from the
    /// beginning of both.
    pub fn writes(count: usize, len: usize) -> Vec<Self> {
        let offsets = (0..count).map(|index| index * len);
        let write = |memory| Self::Write {
            offset: memory as u64,
            memory,
            len,
        };
        offsets.map(write).collect()
    }
}

impl Client {
    /// Connects to a daemon and starts `queues` queues of 256 entries.
    pub fn connect(socket: &Path, queues: usize) -> Self {
        Self::connect_sized(socket, queues, 256)
    }

    /// Connects to a daemon and starts `queues` queues of `queue_size` entries.
    pub fn connect_sized(socket: &Path, queues: usize, queue_size: i32) -> Self {
        Self::try_connect(socket, queues, queue_size).expect("connecting")
    }

    /// As [`Self::connect_sized`], to a daemon that may refuse the connection.
    ///
    /// # Errors
    /// That of the driver.
    pub fn try_connect(
        socket: &Path,
        queues: usize,
        queue_size: i32,
    ) -> Result<Self, blkio::Error> {
        Self::try_start(socket, queues, queue_size, false)
    }

    /// Connects to a daemon that serves a read-only disk, and starts one queue.
    pub fn connect_read_only(socket: &Path) -> Self {
        Self::try_start(socket, 1, 256, true).expect("connecting")
    }

    fn try_start(
        socket: &Path,
        queues: usize,
        queue_size: i32,
        is_read_only: bool,
    ) -> Result<Self, blkio::Error> {
        let mut blkio = Blkio::new("virtio-blk-vhost-user")?;
        blkio.set_str("path", socket.to_str().expect("a path in UTF-8"))?;
        blkio.set_bool("read-only", is_read_only)?;
        blkio.connect()?;
        let count = i32::try_from(queues).expect("few queues");
        blkio.set_i32("num-queues", count)?;
        blkio.set_i32("queue-size", queue_size)?;
        let queues = blkio.start()?.queues;
        let region = blkio.alloc_mem_region(QUEUE_MEMORY_BYTES * queues.len())?;
        blkio.map_mem_region(&region)?;
        Ok(Self {
            queues,
            region,
            blkio,
        })
    }

    /// Size of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.blkio.get_u64("capacity").expect("the capacity")
    }

    /// How many queues the device has.
    pub fn max_queues(&self) -> i32 {
        self.blkio
            .get_i32("max-queues")
            .expect("the number of queues")
    }

    /// The memory of a queue. The daemon may write to it while a read is in flight.
    pub fn memory(&mut self, queue: usize) -> &mut [u8] {
        let address = self.region.addr + queue * QUEUE_MEMORY_BYTES;
        // SAFETY: the region is mapped, as long as `self`, and each queue has its own part of it;
        // what the daemon writes meanwhile changes plain bytes.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, QUEUE_MEMORY_BYTES) }
    }

    /// Each queue with its memory, so that each can be driven by a thread of its own.
    pub fn queues(&mut self) -> impl Iterator<Item = (&mut Blkioq, &mut [u8])> {
        let len = QUEUE_MEMORY_BYTES * self.queues.len();
        // SAFETY: the region is mapped, as long as `self`, which is borrowed, and of this length;
        // what the daemon writes meanwhile changes plain bytes.
        let memory = unsafe { std::slice::from_raw_parts_mut(self.region.addr as *mut u8, len) };
        self.queues
            .iter_mut()
            .zip(memory.chunks_exact_mut(QUEUE_MEMORY_BYTES))
    }

    /// Sends the requests in one batch. Each must be waited for.
    pub fn send(&mut self, queue: usize, requests: &[Request]) {
        let base = self.memory(queue).as_mut_ptr();
        for (index, request) in requests.iter().enumerate() {
            let q = &mut self.queues[queue];
            match *request {
                Request::Read {
                    offset,
                    memory,
                    len,
                } => {
                    assert!(memory + len <= QUEUE_MEMORY_BYTES);
                    q.read(
                        offset,
                        base.wrapping_add(memory),
                        len,
                        index,
                        ReqFlags::empty(),
                    );
                }
                Request::Write {
                    offset,
                    memory,
                    len,
                } => {
                    assert!(memory + len <= QUEUE_MEMORY_BYTES);
                    q.write(
                        offset,
                        base.wrapping_add(memory),
                        len,
                        index,
                        ReqFlags::empty(),
                    );
                }
                Request::Discard { offset, len } => {
                    q.discard(offset, len, index, ReqFlags::empty())
                }
                Request::WriteZeroes { offset, len, unmap } => {
                    let flags = if unmap {
                        ReqFlags::empty()
                    } else {
                        ReqFlags::NO_UNMAP
                    };
                    q.write_zeroes(offset, len, index, flags);
                }
                Request::Flush => q.flush(index, ReqFlags::empty()),
            }
        }
        let sent = self.queues[queue].do_io(&mut [], 0, None, None);
        sent.expect("sending requests");
    }

    /// Waits for at least `min` completions: the place of each request in its batch, and its
    /// result.
    pub fn poll(&mut self, queue: usize, min: usize) -> Vec<(usize, Result<(), Failed>)> {
        let mut completions: [MaybeUninit<Completion>; 256] =
            [const { MaybeUninit::uninit() }; 256];
        let count = self.queues[queue]
            .do_io(&mut completions, min, Some(&mut HANG_LIMIT.clone()), None)
            .unwrap_or_else(|error| panic!("no completion within {HANG_LIMIT:?}: {error}"));
        completions[..count]
            .iter()
            .map(|completion| {
                // SAFETY: `do_io` has initialised as many as it returned.
                let completion = unsafe { completion.assume_init_ref() };
                let failed = Failed(-completion.ret);
                (
                    completion.user_data,
                    if completion.ret == 0 {
                        Ok(())
                    } else {
                        Err(failed)
                    },
                )
            })
            .collect()
    }

    /// Sends the requests, waits for all of them, and returns their results in the order of the
    /// requests.
    pub fn run(&mut self, queue: usize, requests: &[Request]) -> Vec<Result<(), Failed>> {
        self.send(queue, requests);
        let mut results = vec![None; requests.len()];
        while results.contains(&None) {
            for (index, result) in self.poll(queue, 1) {
                assert_eq!(results[index].replace(result), None, "completed twice");
            }
        }
        results.into_iter().flatten().collect()
    }

    /// Reads `len` bytes at byte `offset`.
    pub fn read(&mut self, queue: usize, offset: u64, len: usize) -> Result<Vec<u8>, Failed> {
        self.run(
            queue,
            &[Request::Read {
                offset,
                memory: 0,
                len,
            }],
        )[0]?;
        Ok(self.memory(queue)[..len].to_vec())
    }

    /// Writes `data` at byte `offset`.
    pub fn write(&mut self, queue: usize, offset: u64, data: &[u8]) -> Result<(), Failed> {
        self.memory(queue)[..data.len()].copy_from_slice(data);
        self.run(
            queue,
            &[Request::Write {
                offset,
                memory: 0,
                len: data.len(),
            }],
        )[0]
    }

    /// Flushes.
    pub fn flush(&mut self, queue: usize) -> Result<(), Failed> {
        self.run(queue, &[Request::Flush])[0]
    }
}
