//! The memory and the start-up time of the daemon are as docs/performance.md says, and no more on a
//! larger disk.
//!
//! The replicas hang until as much is in flight as the guest or the daemon allows. The memory of
//! that moment can be computed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;
use testkit::machine::measure;

use quorum_blk::common::buffer::footprint_bytes;
use quorum_blk::limits::{BUFFER_BYTES_KEPT, BUFFER_BYTES_MAX, FRAGMENT_BYTES_MAX, REQUESTS_MAX};
use tempfile::TempDir;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, replica_arguments};
use testkit::fuse::{Fault, FaultGuard, FuseImage, Operation};
use testkit::process::wait_until;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// A request of one buffer takes three descriptors.
const REQUESTS_PER_QUEUE: u64 = 256 / 3;

/// The formula of docs/performance.md.
mod formula {
    use quorum_blk::limits::{ARENA_SHARE_BYTES, MAP_BUCKETS};

    use super::{KIB, MIB};

    /// The program, its libraries, threads and tables. It is larger without optimisation.
    pub(super) const PROGRAM_BYTES: u64 = if cfg!(debug_assertions) {
        16 * MIB
    } else {
        5 * MIB
    };
    /// For each worker: its registered buffers, of which there are as many of each length up to 64
    /// KiB, and twice as many of 4 KiB.
    pub(super) const ARENA_BYTES: u64 = 6 * ARENA_SHARE_BYTES as u64;
    /// For each operation in flight, beside its buffer.
    const OPERATION_BYTES: u64 = 512;
    /// A range in a set of many that are all over the disk.
    pub(super) const RANGE_BYTES: u64 = 64;

    /// The map of the faults of a replica, or of the disk: three counts in each bucket.
    pub(super) const MAP_ROW_BYTES: u64 = 24 * MAP_BUCKETS as u64;

    /// The memory of `operations` in flight of `len` bytes, of one worker, beyond its arena.
    pub(super) fn in_flight_bytes(operations: u64, len: u64) -> u64 {
        let capacity = len.next_power_of_two().max(4 * KIB);
        let share = match capacity / KIB {
            4 => 2 * ARENA_SHARE_BYTES as u64,
            8..=64 => ARENA_SHARE_BYTES as u64,
            _ => 0,
        };
        // A page more for each, to align it.
        let outside = operations.saturating_sub(share / capacity);
        outside * (capacity + 4 * KIB) + operations * OPERATION_BYTES
    }
}

/// A daemon over sparse images that hang when a test injects that.
struct Setup {
    // A process cannot end while its files hang, so their faults are cleared first.
    _fault_guards: Vec<FaultGuard>,
    client: Client,
    daemon: Daemon,
    images: Vec<FuseImage>,
    _directory: TempDir,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    replicas: u64,
    queues: u64,
    disk_bytes: u64,
    request_bytes: u64,
    /// `--memory-max`.
    memory_max: u64,
}

impl Shape {
    fn workers(&self) -> u64 {
        let processors = thread::available_parallelism().expect("the number of processors");
        self.queues.min(processors.get() as u64)
    }

    /// Requests that the guest has for each worker.
    fn offered(&self) -> impl Iterator<Item = u64> {
        let queues_of = |worker: u64| (self.queues - worker).div_ceil(self.workers());
        (0..self.workers())
            .map(move |worker| queues_of(worker) * REQUESTS_PER_QUEUE)
            .map(|offered| offered.min(REQUESTS_MAX as u64))
    }

    /// The bytes of `--memory-max` that a read of so many bytes takes.
    fn charge(&self, len: u64) -> u64 {
        (self.replicas + 1) * footprint_bytes(len)
    }

    /// Requests in flight at least when all queues are full, or the bound is reached: each worker
    /// has its part of the memory, and one leaves room for a job.
    fn in_flight_min(&self) -> u64 {
        let part = self.memory_max / self.workers();
        let longest = self.charge(FRAGMENT_BYTES_MAX);
        let fit = |worker: u64| {
            let room = part.saturating_sub(longest * (1 + u64::from(worker == 0)));
            room / self.charge(self.request_bytes) + 1
        };
        (0..)
            .zip(self.offered())
            .map(|(worker, offered)| offered.min(fit(worker)))
            .sum()
    }

    /// Requests that each worker has in flight at most, so that all of them fit the bound.
    fn in_flight_max(&self) -> Vec<u64> {
        let mut left = self.memory_max / self.charge(self.request_bytes);
        let take = |offered: u64| {
            let taken = offered.min(left);
            left -= taken;
            taken
        };
        self.offered().map(take).collect()
    }

    /// The memory when all of that is in flight, without that of the guest.
    fn full_bytes(&self) -> u64 {
        let workers = self.in_flight_max().into_iter();
        let in_flight = workers
            .map(|reads| formula::in_flight_bytes(reads * self.replicas, self.request_bytes));
        self.idle_bytes() + in_flight.sum::<u64>()
    }

    /// The memory while requests end and begin. At the bound, free buffers are kept up to it too.
    fn peak_bytes(&self) -> u64 {
        let in_flight = self.in_flight_max();
        if self.offered().eq(in_flight) {
            self.full_bytes()
        } else {
            self.idle_bytes() + self.memory_max
        }
    }

    fn idle_bytes(&self) -> u64 {
        formula::PROGRAM_BYTES + self.workers() * formula::ARENA_BYTES
    }
}

/// Sparse images of `disk_bytes`, or of as much as the file system allows if that is nearly as
/// much: ext4 stops one block below 16 TiB.
fn create_sparse(directory: &Path, count: u64, disk_bytes: u64) -> Vec<PathBuf> {
    let create = |index| {
        let path = directory.join(format!("{index}.raw"));
        let image = File::create_new(&path).expect("creating an image");
        let sized = image
            .set_len(disk_bytes)
            .or_else(|_| image.set_len(disk_bytes - 4 * KIB));
        sized.expect("sizing a sparse image");
        path
    };
    (0..count).map(create).collect()
}

/// A field of `/proc/<id>/status` that is a number of KiB.
fn status_bytes(id: u32, field: &str) -> u64 {
    let status =
        fs::read_to_string(format!("/proc/{id}/status")).expect("reading the daemon's status");
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let number = line.and_then(|line| {
        line.trim_matches([':', '\t', ' ', 'k', 'B'])
            .parse::<u64>()
            .ok()
    });
    number.unwrap_or_else(|| panic!("no {field} in {status}")) * KIB
}

impl Setup {
    fn new(shape: Shape) -> Self {
        let directory = tempfile::tempdir().expect("creating a directory");
        let backing = create_sparse(directory.path(), shape.replicas, shape.disk_bytes);
        let images: Vec<_> = backing
            .iter()
            .map(|image| FuseImage::serve(image))
            .collect();
        let paths: Vec<_> = images.iter().map(FuseImage::path).collect();
        let mut arguments = replica_arguments(&paths);
        for (index, image) in arguments.iter_mut().skip(1).step_by(2).enumerate() {
            image.push(format!(",node-name=r{index}"));
        }
        // No replica is evicted meanwhile.
        let (queues, memory) = (shape.queues.to_string(), shape.memory_max.to_string());
        arguments.extend(["--memory-max", &memory].map(OsString::from));
        arguments
            .extend(["--replica-timeout", "60000", "--num-queues", &queues].map(OsString::from));
        let daemon = Daemon::start(directory.path(), &arguments);
        let queues = usize::try_from(shape.queues).expect("few");
        Self {
            _fault_guards: images.iter().map(FuseImage::fault_guard).collect(),
            client: Client::connect(daemon.socket(), queues),
            daemon,
            images,
            _directory: directory,
        }
    }

    fn reads_asked(&self) -> u64 {
        self.images
            .iter()
            .map(|image| image.asked(Operation::Read))
            .sum()
    }

    /// Fills all virtqueues with reads all over the disk, and waits until the replicas have
    /// received as many as the daemon accepts. They share the memory of their virtqueue.
    fn fill(&mut self, shape: Shape) {
        let len = usize::try_from(shape.request_bytes).expect("small");
        let read = |index| Request::Read {
            offset: index * (shape.disk_bytes / REQUESTS_PER_QUEUE / MIB) * MIB,
            memory: 0,
            len,
        };
        let before = self.reads_asked();
        self.client.run(0, &[read(0)])[0].expect("reading");
        let asked_for_one = self.reads_asked() - before;
        for image in &self.images {
            image.inject(Operation::Read, Fault::Hang);
        }
        let before = self.reads_asked();
        let reads: Vec<_> = (0..REQUESTS_PER_QUEUE).map(read).collect();
        for queue in 0..usize::try_from(shape.queues).expect("few") {
            self.client.send(queue, &reads);
        }
        let expected = before + shape.in_flight_min() * asked_for_one;
        let filled = wait_until(HANG_LIMIT, || self.reads_asked() >= expected);
        assert!(
            filled,
            "{shape:?}: {} of {expected} asked for",
            self.reads_asked()
        );
    }

    /// Clears the faults, and waits for all requests.
    fn drain(&mut self, shape: Shape) {
        for image in &self.images {
            image.clear_faults();
        }
        for queue in 0..usize::try_from(shape.queues).expect("few") {
            let mut left = REQUESTS_PER_QUEUE;
            while left > 0 {
                let answers = self.client.poll(queue, 1);
                assert!(answers.iter().all(|(_, result)| result.is_ok()));
                left -= answers.len() as u64;
            }
        }
    }
}

fn check(shape: Shape) {
    let mut setup = Setup::new(shape);
    let id = setup.daemon.id();
    // Linux also counts the guest memory that the daemon has touched.
    let own = |field| status_bytes(id, field) - status_bytes(id, "RssShmem");
    let idle = own("VmHWM");
    setup.fill(shape);
    let full = own("VmHWM");
    setup.drain(shape);
    let (peak, guest) = (status_bytes(id, "VmHWM"), status_bytes(id, "RssShmem"));
    // Free buffers are kept up to a bound; those of 4 KiB take two pages each.
    let (idle_expected, full_expected) = (shape.idle_bytes(), shape.full_bytes());
    let after_max = shape
        .peak_bytes()
        .min(idle_expected + shape.workers() * 2 * BUFFER_BYTES_KEPT as u64);
    // The last replies to decided requests may still be in flight.
    wait_until(HANG_LIMIT, || own("VmRSS") <= after_max);
    let after = own("VmRSS");
    assert!(setup.daemon.terminate().success());

    println!(
        "{:2} replicas, {:2} queues, {:5} GiB, {:4} KiB requests: {:6.1} MiB idle (formula \
         {:6.1}), {:6.1} full (formula {:6.1}), {:6.1} after",
        shape.replicas,
        shape.queues,
        shape.disk_bytes / GIB,
        shape.request_bytes / KIB,
        mib(idle),
        mib(idle_expected),
        mib(full),
        mib(full_expected),
        mib(after),
    );
    let fits = |bytes: u64, expected: u64| (expected / 2..=expected).contains(&bytes);
    assert!(
        fits(idle, idle_expected),
        "{shape:?}: {idle} bytes when idle"
    );
    // A read before has left free buffers.
    let full_fits = (full_expected / 2..=shape.peak_bytes()).contains(&full);
    assert!(full_fits, "{shape:?}: {full} bytes in all");
    let peak_max = shape.peak_bytes() + guest;
    assert!(peak <= peak_max, "{shape:?}: {peak} bytes at some time");
    assert!(after <= after_max, "{shape:?}: {after} bytes afterwards");
}

fn mib(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes / KIB).expect("less than 4 TiB")) / 1024.0
}

fn check_all(replicas: u64, queues: u64) {
    for disk_bytes in [GIB, 16 * TIB] {
        for request_bytes in [4 * KIB, MIB] {
            check(Shape {
                replicas,
                queues,
                disk_bytes,
                request_bytes,
                memory_max: BUFFER_BYTES_MAX,
            });
        }
    }
}

#[test]
fn peak_memory_of_one_replica_and_one_queue() {
    check_all(1, 1);
}

#[test]
fn peak_memory_of_one_replica_and_sixteen_queues() {
    check_all(1, 16);
}

#[test]
fn peak_memory_of_sixteen_replicas_and_one_queue() {
    check_all(16, 1);
}

#[test]
fn peak_memory_of_sixteen_replicas_and_sixteen_queues() {
    check_all(16, 16);
}

/// Whatever the number of queues, all workers together stay within it and serve each request.
#[test]
fn peak_memory_of_all_queues_is_bounded() {
    for memory_max in [32 * MIB, 128 * MIB] {
        for request_bytes in [64 * KIB, MIB] {
            check(Shape {
                replicas: 3,
                queues: 16,
                disk_bytes: GIB,
                request_bytes,
                memory_max,
            });
        }
    }
}

/// A replica misses many writes all over the disk.
#[test]
fn peak_memory_of_stale_and_unflushed_ranges() {
    const WRITES: u64 = 20_480;
    let shape = Shape {
        replicas: 3,
        queues: 1,
        disk_bytes: 16 * TIB,
        request_bytes: 4 * KIB,
        memory_max: BUFFER_BYTES_MAX,
    };
    let mut setup = Setup::new(shape);
    setup.images[2].inject(Operation::Write, Fault::Fail(libc::EIO));
    let write = |index| Request::Write {
        offset: index * (shape.disk_bytes / WRITES / MIB) * MIB,
        memory: 0,
        len: 4096,
    };
    let writes: Vec<_> = (0..WRITES).map(write).collect();
    for batch in writes.chunks(64) {
        assert!(setup.client.run(0, batch).iter().all(Result::is_ok));
    }
    setup.client.flush(0).expect("flushing");
    let id = setup.daemon.id();
    let own = status_bytes(id, "VmHWM") - status_bytes(id, "RssShmem");
    // What is stale, and what was written and not flushed.
    let sets = 2;
    // A resync runs meanwhile, a chunk at a time.
    let chunk = formula::in_flight_bytes(shape.replicas, FRAGMENT_BYTES_MAX);
    let expected = shape.full_bytes()
        + sets * WRITES * formula::RANGE_BYTES
        + chunk
        + (shape.replicas + 1) * formula::MAP_ROW_BYTES;
    println!(
        "{WRITES} ranges: {:.1} MiB, formula {:.1}",
        mib(own),
        mib(expected)
    );
    assert!((expected / 2..=expected).contains(&own), "{own} bytes");
}

/// The daemon reads and allocates nothing in proportion to the disk.
#[test]
fn start_up_takes_no_longer_on_a_large_disk() {
    let start = |disk_bytes| {
        let directory = tempfile::tempdir().expect("creating a directory");
        let images = create_sparse(directory.path(), 3, disk_bytes);
        let began = Instant::now();
        let mut daemon = Daemon::start(directory.path(), replica_arguments(&images));
        let took = began.elapsed();
        let memory = status_bytes(daemon.id(), "VmHWM");
        assert!(daemon.terminate().success());
        (took, memory)
    };
    // The least of a few in turn: other programs make single ones longer.
    let least = |a: (Duration, u64), b: (Duration, u64)| (a.0.min(b.0), a.1.min(b.1));
    let (mut small, mut large) = (start(GIB), start(16 * TIB));
    measure(|| {
        for _ in 0..4 {
            small = least(small, start(GIB));
            large = least(large, start(16 * TIB));
        }
        let figures = format!("start-up: 1 GiB {small:?}, 16 TiB {large:?}");
        println!("{figures}");
        let is_as_short = large.0 <= small.0 + Duration::from_millis(100);
        let is_as_small = large.1 <= small.1 + MIB;
        if is_as_short && is_as_small {
            Ok(())
        } else {
            Err(figures)
        }
    });
}

/// The queues of one worker are busy, then those of the other one, and so on.
#[test]
fn memory_that_one_worker_gives_back_is_used_by_others() {
    let shape = Shape {
        replicas: 3,
        queues: 16,
        disk_bytes: GIB,
        request_bytes: 64 * KIB,
        memory_max: 128 * MIB,
    };
    let mut setup = Setup::new(shape);
    let id = setup.daemon.id();
    let own = |field| status_bytes(id, field) - status_bytes(id, "RssShmem");
    let idle = own("VmRSS");
    let len = usize::try_from(shape.request_bytes).unwrap();
    let reads: Vec<_> = (0..REQUESTS_PER_QUEUE)
        .map(|index| Request::Read {
            offset: index * MIB,
            memory: 0,
            len,
        })
        .collect();
    for turn in 0..4 {
        let queues: Vec<usize> = (0..16).filter(|queue| queue % 2 == turn % 2).collect();
        for image in &setup.images {
            image.inject(Operation::Read, Fault::Hang);
        }
        for queue in &queues {
            setup.client.send(*queue, &reads);
        }
        // As many as the memory allows.
        let asked = || setup.images[0].asked(Operation::Read);
        let mut before = u64::MAX;
        wait_until(HANG_LIMIT, || {
            thread::sleep(Duration::from_millis(300));
            let is_full = asked() == before;
            before = asked();
            is_full
        });
        for image in &setup.images {
            image.clear_faults();
        }
        for queue in &queues {
            let mut left = reads.len();
            while left > 0 {
                left -= setup.client.poll(*queue, 1).len();
            }
        }
    }
    let peak = own("VmHWM");
    println!("{:.1} MiB idle, {:.1} at most", mib(idle), mib(peak));
    // Tables that grow with the requests, and what lies between the buffers.
    assert!(peak - idle < shape.memory_max + 8 * MIB);
    setup.daemon.terminate();
}
