//! The daemon is killed at random moments under load and restarted, and the guest must not notice:
//! every request in flight completes, once and with the right result, no replica is reported, and
//! in the end all replicas are equal.
//!
//! `QUORUM_BLK_SOAK_SECONDS` makes it longer (`make soak`).

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;

use serde_json::Value;
use tempfile::TempDir;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::disk::is_of_the_vote;
use testkit::frontend::{Completion, Cut, Layout, Plan, Range, Request, Style, Vmm};
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::{
    BLOCK_BYTES, BLOCK_SECTORS, Random, are_identical, corrupt_sectors, create_images,
};
use testkit::load::{Model, Read, Write};
use testkit::process::wait_until;
use testkit::size;
use virtio_bindings::virtio_blk::VIRTIO_BLK_S_OK;

/// How long each test runs, in seconds, unless the environment sets it.
const SECONDS: u64 = 10;
const QUEUES: usize = 4;
const DISK_BLOCKS: u64 = 1024;
/// Half of the requests go here, so that they overlap.
const BUSY_BLOCKS: u64 = 16;
/// Most blocks of an ordinary request, and of the few that are served as several fragments.
const BLOCKS_MAX: u64 = 8;
const MANY_BLOCKS_MAX: u64 = 400;
/// How long a slow replica takes at most for a read or a write.
const DELAY_MAX: Duration = Duration::from_millis(5);
/// How often a wait for calls checks whether the daemon was killed.
const LOOK: Duration = Duration::from_millis(2);

#[test]
fn qemu_does_not_notice_that_the_daemon_is_killed() {
    torment(Style::Qemu, &[], &[]);
}

/// Writes to the page cache wait for a thread of the kernel, and are dropped there when the daemon
/// is killed.
#[test]
fn writes_that_the_kernel_drops_are_submitted_again() {
    torment(Style::Qemu, &["--cache", "writeback"], &[]);
}

#[test]
fn cloud_hypervisor_does_not_notice_that_the_daemon_is_killed() {
    torment(Style::CloudHypervisor, &[], &[]);
}

/// Replicas are slow, so that writes have reached some of them and not others when the daemon is
/// killed; and losers are repaired.
#[test]
fn repairs_by_slow_replicas_survive_the_daemon() {
    let options = ["--rewrite-corrupted", "--read-pattern", "threshold"];
    torment(Style::CloudHypervisor, &options, &[1, 2]);
}

/// A write has reached two of three replicas when the daemon is killed. A read that is submitted
/// again before the write finds that they differ, and must not report the third.
#[test]
fn a_half_done_write_does_not_accuse_a_replica() {
    half_done(0);
}

/// The same with the write on a virtqueue that starts later.
#[test]
fn a_half_done_write_on_another_virtqueue_does_not_accuse_a_replica() {
    half_done(1);
}

fn half_done(queue_of_write: usize) {
    for style in [Style::Qemu, Style::CloudHypervisor] {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, DISK_BLOCKS * BLOCK_BYTES);
        // The disk is not new: otherwise the first write would be all that one image holds.
        for image in &images {
            corrupt_sectors(image, 64..65, 1);
        }
        let hanging = [1, 2].map(|index: usize| FuseImage::serve(&images[index]));
        let served = [images[0].clone(), hanging[0].path(), hanging[1].path()];
        let mut arguments = replica_arguments(&served);
        arguments.extend(["--num-queues".into(), "2".into()]);
        arguments.extend(["--replica-timeout".into(), "60000".into()]);
        let mut daemon = Daemon::start_with_records(directory.path(), arguments);
        let _fault_guards = hanging.each_ref().map(FuseImage::fault_guard);
        let plan = Plan {
            style,
            queues: 2,
            ..Plan::default()
        };
        let mut vmm = Vmm::start(daemon.socket(), &plan);
        for image in &hanging {
            image.inject(Operation::Read, Fault::Hang);
        }
        let reads = hanging[1].asked(Operation::Read);
        vmm.queues[0].submit(&Request::read(0, 4096), Layout::DIRECT);
        assert!(wait_until(HANG_LIMIT, || hanging[1].asked(Operation::Read) > reads));
        hanging[1].inject(Operation::Write, Fault::Hang);
        vmm.queues[queue_of_write].submit(&Request::write(0, vec![1; 4096]), Layout::DIRECT);
        let is_written = |image: &PathBuf| fs::read(image).unwrap()[..4096] == [1; 4096];
        assert!(wait_until(HANG_LIMIT, || {
            is_written(&images[0])
                && is_written(&images[1])
                && hanging[1].asked(Operation::Write) > 0
        }));
        daemon.signal(libc::SIGKILL);
        hanging.iter().for_each(FuseImage::clear_faults);
        assert_eq!(daemon.wait().signal(), Some(libc::SIGKILL));
        // The kernel may have dropped the third write.
        let third = fs::OpenOptions::new().write(true).open(&images[2]).unwrap();
        third.write_all_at(&[0; 4096], 0).unwrap();

        daemon.start_again();
        let mut events = None;
        assert!(wait_until(HANG_LIMIT, || {
            events = UnixStream::connect(daemon.events_socket())
                .ok()
                .map(EventReader::over);
            events.is_some()
        }));
        assert!(vmm.reconnect(daemon.socket(), || false));
        for queue in [0, queue_of_write] {
            assert_eq!(u32::from(vmm.queues[queue].wait().status), VIRTIO_BLK_S_OK);
        }
        assert_eq!(vmm.queues[0].read_disk(0, 4096), [1; 4096]);
        drop(vmm);
        assert!(daemon.terminate().success());
        let events = events.expect("connected").all_but_jobs();
        assert_eq!(events, [Value::Null; 0], "{style:?}");
        assert!(are_identical(&images));
    }
}

/// A file system delays reads and writes of the replicas `slow`.
fn torment(style: Style, options: &[&str], slow: &[usize]) {
    let seconds = match env::var("QUORUM_BLK_SOAK_SECONDS") {
        Ok(text) if !text.is_empty() => text.parse().expect("QUORUM_BLK_SOAK_SECONDS is a number"),
        _ => SECONDS,
    };
    let mut soak = Soak::new(style, options, slow);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        soak.round();
    }
    soak.end();
}

/// A guest under load, and its daemon.
struct Soak {
    load: Load,
    daemon: Daemon,
    images: Vec<PathBuf>,
    events: Vec<Value>,
    options: String,
    kills: u64,
    ends: u64,
    /// How the last daemon ended.
    last: (Moment, libc::c_int),
    began: Instant,
    _slow: Vec<(usize, FuseImage)>,
    _directory: TempDir,
}

/// When a daemon is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// This long after its start: before it serves, while a VMM connects, or while it resubmits.
    Started(Duration),
    /// This long after a VMM has connected.
    Connected(Duration),
    /// This long after the requests of the last daemon have completed.
    CaughtUp(Duration),
}

impl Soak {
    fn new(style: Style, options: &[&str], slow: &[usize]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), 3, DISK_BLOCKS * BLOCK_BYTES);
        let slow = slow
            .iter()
            .map(|&index| (index, FuseImage::serve(&images[index])));
        let slow: Vec<_> = slow.collect();
        let mut served = images.clone();
        for (index, image) in &slow {
            for operation in [Operation::Read, Operation::Write] {
                image.inject(operation, Fault::Delay(Duration::ZERO, DELAY_MAX));
            }
            served[*index] = image.path();
        }
        let mut arguments = replica_arguments(&served);
        arguments.extend(options.iter().map(Into::into));
        arguments.extend(["--num-queues".into(), QUEUES.to_string().into()]);
        // On a busy machine a replica may be slow, and must not be evicted for it.
        arguments.extend(["--replica-timeout".into(), "60000".into()]);
        let mut daemon = Daemon::start_with_records(directory.path(), arguments);
        // Each round starts one.
        assert!(daemon.terminate().success());
        Self {
            load: Load::new(style),
            daemon,
            images,
            events: Vec::new(),
            options: options.join(" "),
            kills: 0,
            ends: 0,
            last: (Moment::Started(Duration::ZERO), libc::SIGTERM),
            began: Instant::now(),
            _slow: slow,
            _directory: directory,
        }
    }

    /// Starts the daemon, lets it work, and kills or stops it.
    fn round(&mut self) {
        let random = &mut self.load.random;
        let mut time = |max: u64| Duration::from_micros(random.within(0..max * 1000));
        let (moment, signal) = match time(10).as_millis() {
            0..3 => (Moment::Started(time(60)), libc::SIGKILL),
            3..6 => (Moment::Connected(time(100)), libc::SIGKILL),
            6..8 => (Moment::CaughtUp(time(200)), libc::SIGKILL),
            8 => (Moment::Connected(time(100)), libc::SIGTERM),
            _ => (Moment::CaughtUp(time(200)), libc::SIGTERM),
        };
        self.daemon.start_again();
        let id = libc::pid_t::try_from(self.daemon.id()).expect("process ids are positive");
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            let is_over = &is_over;
            let end_in = |delay| {
                scope.spawn(move || {
                    thread::sleep(delay);
                    is_over.store(true, Ordering::Release);
                    // SAFETY: kill takes no pointer; the child is reaped below, so the id is still
                    // its own.
                    assert_eq!(unsafe { libc::kill(id, signal) }, 0);
                });
            };
            if let Moment::Started(delay) = moment {
                end_in(delay);
            }
            let is_over = || is_over.load(Ordering::Acquire);
            let events = self.connect(is_over);
            match moment {
                Moment::Started(_) => {}
                Moment::Connected(delay) => end_in(delay),
                Moment::CaughtUp(delay) => {
                    self.load.catch_up();
                    end_in(delay);
                }
            }
            if events.is_some() {
                self.load.pump(|_| is_over());
            }
            self.events.extend(events.iter().flat_map(EventReader::all));
        });
        let status = self.daemon.wait();
        self.last = (moment, signal);
        if signal == libc::SIGTERM {
            assert_eq!(status.code(), Some(0), "after SIGTERM");
            self.ends += 1;
        } else {
            assert_eq!(status.signal(), Some(libc::SIGKILL), "{moment:?}");
            self.kills += 1;
        }
        self.load.vmm.disconnect();
        // The guest does not wait for its disk after its first requests.
        if self.load.vmm.was_active() && self.load.random.within(0..2) == 0 {
            self.load.fill_all();
        }
    }

    /// Connects a reader of events and the VMM. `None` if the daemon was killed before.
    fn connect(&mut self, is_over: impl Fn() -> bool) -> Option<EventReader> {
        let deadline = Instant::now() + HANG_LIMIT;
        let before = format!("the last one ended by {:?}", self.last);
        let is_hopeless = || {
            assert!(
                Instant::now() < deadline,
                "no daemon serves within {HANG_LIMIT:?}, {before}"
            );
            is_over()
        };
        let stream = loop {
            match UnixStream::connect(self.daemon.events_socket()) {
                Ok(stream) => break stream,
                Err(_) if is_hopeless() => return None,
                Err(_) => thread::sleep(LOOK),
            }
        };
        let events = EventReader::over(stream);
        let connected = self.load.vmm.reconnect(self.daemon.socket(), is_hopeless);
        connected.then_some(events)
    }

    /// Starts the daemon for the last time, and checks the disk.
    fn end(mut self) {
        self.daemon.start_again();
        let events = self.connect(|| false).expect("connected");
        self.load.catch_up();
        for queue in &self.load.vmm.queues {
            assert_eq!(queue.outstanding(), 0);
        }
        self.load
            .vmm
            .stop_virtqueues()
            .expect("stopping the virtqueues");
        assert_eq!(self.load.vmm.inflight_chains(), Some(0));
        self.load.vmm.disconnect();
        assert!(self.daemon.terminate().success());
        self.events.extend(events.all());
        println!(
            "{:?}, {}: {} kills, {} ends by SIGTERM, {} restarts, {} requests in {:.0?}; at most \
             {} were with a daemon that was killed",
            self.load.style,
            self.options,
            self.kills,
            self.ends,
            self.kills + self.ends,
            self.load.requests,
            self.began.elapsed(),
            self.load.left_max,
        );
        assert!(
            self.kills > 0 && self.load.left_max > 0,
            "nothing was tried"
        );
        assert!(are_identical(&self.images), "replicas differ");
        let content = fs::read(&self.images[0]).unwrap();
        assert_eq!(
            self.load.model.wrong_at_rest(&content),
            [0; 0],
            "sectors that are not the newest"
        );
        self.events.retain(is_of_the_vote);
        if self.options.contains("--rewrite-corrupted") {
            // The scrub that compares the replicas first finds what half-done writes have left,
            // before they are submitted again.
            self.events
                .retain(|event| event["event"] != "QUORUM_REPORT_BAD");
        }
        assert_eq!(self.events, [Value::Null; 0], "no replica has a fault");
    }
}

/// The guest and its requests.
struct Load {
    style: Style,
    vmm: Vmm,
    model: Model,
    random: Random,
    pending: Vec<BTreeMap<u16, Pending>>,
    /// All returned chains were popped, and the driver has asked for a call.
    is_waiting: bool,
    requests: u64,
    left_max: usize,
}

/// A request in flight.
enum Pending {
    Read(Read),
    Write(Vec<Write>),
    Flush,
}

impl Load {
    fn new(style: Style) -> Self {
        let plan = Plan {
            style,
            queues: QUEUES,
            queue_size: 128,
            slots: 24,
            data_bytes: size(MANY_BLOCKS_MAX * BLOCK_BYTES),
            ..Plan::default()
        };
        Self {
            style,
            vmm: Vmm::new(&plan),
            model: Model::new(size(DISK_BLOCKS * BLOCK_SECTORS)),
            random: Random::from_environment(),
            pending: (0..QUEUES).map(|_| BTreeMap::new()).collect(),
            is_waiting: false,
            requests: 0,
            left_max: 0,
        }
    }

    /// The requests of an earlier daemon complete, and those that are added meanwhile, too.
    fn catch_up(&mut self) {
        self.left_max = self.left_max.max(self.outstanding());
        self.pump_without_adding(|load| load.outstanding() == 0);
    }

    fn outstanding(&self) -> usize {
        self.pending.iter().map(BTreeMap::len).sum()
    }

    fn pump(&mut self, is_over: impl Fn(&Self) -> bool) {
        self.serve(true, is_over);
    }

    fn pump_without_adding(&mut self, is_over: impl Fn(&Self) -> bool) {
        self.serve(false, is_over);
    }

    /// Acts like a driver: pops returned chains, submits others, and
    /// waits for a call before it pops again.
    fn serve(&mut self, adds: bool, is_over: impl Fn(&Self) -> bool) {
        let mut since = Instant::now();
        while !is_over(self) {
            if self.is_waiting {
                if self.vmm.wait_for_any(LOOK) {
                    self.is_waiting = false;
                    since = Instant::now();
                }
                if since.elapsed() > HANG_LIMIT {
                    self.report_silence();
                }
                continue;
            }
            for index in 0..QUEUES {
                while let Some(completion) = self.vmm.queues[index].pop() {
                    self.check(index, &completion);
                }
                if adds {
                    self.fill(index);
                }
            }
            // All of them must ask for a call.
            let came = self.vmm.queues.iter().filter(|queue| queue.ask_for_calls());
            self.is_waiting = came.count() == 0;
        }
    }

    fn report_silence(&self) {
        for (index, queue) in self.vmm.queues.iter().enumerate() {
            println!(
                "queue {index}: {} requests outstanding, something came back: {}",
                queue.outstanding(),
                queue.has_used()
            );
        }
        panic!("no interrupt for {HANG_LIMIT:?}");
    }

    fn check(&mut self, queue: usize, completion: &Completion) {
        let request = self.pending[queue].remove(&completion.head);
        let request = request.expect("it was outstanding");
        assert_eq!(
            u32::from(completion.status),
            VIRTIO_BLK_S_OK,
            "a request failed"
        );
        match request {
            Pending::Read(read) => {
                let wrong = self.model.wrong(&read, &completion.data);
                assert_eq!(wrong, [0; 0], "mismatches of a read");
                assert_eq!(completion.written as usize, completion.data.len() + 1);
            }
            Pending::Write(writes) => {
                for write in writes {
                    self.model.end_write(write);
                }
            }
            Pending::Flush => {}
        }
        self.requests += 1;
    }

    fn fill_all(&mut self) {
        for index in 0..QUEUES {
            self.fill(index);
        }
    }

    /// Adds a random number of requests to a virtqueue.
    fn fill(&mut self, index: usize) {
        let wanted = size(self.random.within(1..24));
        while self.vmm.queues[index].outstanding() < wanted {
            let cut = match self.random.within(0..4) {
                0 => Cut::Joined,
                1 => Cut::Parts(5),
                _ => Cut::Fields,
            };
            let indirect = self.random.within(0..2) == 0;
            let layout = Layout { cut, indirect };
            if !self.vmm.queues[index].has_room(layout) {
                break;
            }
            let (request, pending) = self.random_request();
            let queue = &mut self.vmm.queues[index];
            let head = queue.add(&request, layout);
            // They are published one by one or together.
            if self.random.within(0..2) == 0 && queue.publish() {
                queue.kick();
            }
            assert!(self.pending[index].insert(head, pending).is_none());
        }
        let queue = &mut self.vmm.queues[index];
        if queue.publish() {
            queue.kick();
        }
    }

    fn random_request(&mut self) -> (Request, Pending) {
        let kind = self.random.within(0..100);
        let blocks = if self.random.within(0..50) == 0 {
            self.random.within(1..MANY_BLOCKS_MAX + 1)
        } else {
            self.random.within(1..BLOCKS_MAX + 1)
        };
        let (block, blocks) = self.random_place(blocks);
        let bytes = size(blocks * BLOCK_BYTES);
        let sectors = size(block * BLOCK_SECTORS)..size((block + blocks) * BLOCK_SECTORS);
        match kind {
            0..45 => {
                let read = self.model.begin_read(sectors);
                (
                    Request::read(block * BLOCK_SECTORS, bytes),
                    Pending::Read(read),
                )
            }
            45..50 => {
                let flush = Request::flush();
                (flush, Pending::Flush)
            }
            50..55 => {
                let (ranges, writes) = self.random_zeroes(0);
                (Request::discard(&ranges), Pending::Write(writes))
            }
            55..60 => {
                let flags = u32::from(self.random.within(0..2) == 0);
                let (ranges, writes) = self.random_zeroes(flags);
                (Request::write_zeroes(&ranges), Pending::Write(writes))
            }
            _ => {
                let mut data = vec![0; bytes];
                let write = self.model.begin_write(sectors, &mut data);
                let request = Request::write(block * BLOCK_SECTORS, data);
                (request, Pending::Write(vec![write]))
            }
        }
    }

    fn random_zeroes(&mut self, flags: u32) -> (Vec<Range>, Vec<Write>) {
        let most = if flags == 0 { 40 } else { 52 };
        let most = u64::from(self.vmm.config_u32(most)).min(3);
        let count = self.random.within(1..most + 1);
        let place = |_| {
            let blocks = self.random.within(1..BLOCKS_MAX + 1);
            let (block, blocks) = self.random_place(blocks);
            let sectors = size(block * BLOCK_SECTORS)..size((block + blocks) * BLOCK_SECTORS);
            let range = Range {
                sector: block * BLOCK_SECTORS,
                sectors: u32::try_from(blocks * BLOCK_SECTORS).expect("small"),
                flags,
            };
            (range, self.model.begin_zeroes(sectors))
        };
        (0..count).map(place).unzip()
    }

    fn random_place(&mut self, blocks: u64) -> (u64, u64) {
        let end = if self.random.within(0..2) == 0 {
            BUSY_BLOCKS.max(blocks)
        } else {
            DISK_BLOCKS
        };
        (self.random.within(0..end - blocks + 1), blocks)
    }
}
