//! A stop waits for replicas that hang, but not for ever. An image that an old write may still
//! reach stays locked.

use std::ffi::OsString;
use std::time::{Duration, Instant};
use testkit::HANG_LIMIT;

use tempfile::TempDir;
use testkit::client::{Client, Failed, Request};
use testkit::daemon::{Daemon, replica_arguments};
use testkit::fuse::{Fault, FaultGuard, FuseImage, Operation};
use testkit::images::create_images;
use testkit::process::wait_until;

/// Replicas that are not needed are evicted after this long.
const REPLICA_TIMEOUT: Duration = Duration::from_millis(200);
/// `quorum_blk::limits::drain_limit` of that.
const DRAIN_LIMIT: Duration = Duration::from_millis(1400);
/// The same while a replica has a flush in flight: with `quorum_blk::limits::drain_overtime`.
const FLUSH_DRAIN_LIMIT: Duration = Duration::from_millis(3400);
const BLOCK: usize = 4096;

/// A disk of three replicas, two of which can hang. Both are needed then.
struct Hanging {
    // A process cannot end while its files hang, so their faults are cleared first.
    _fault_guards: Vec<FaultGuard>,
    daemon: Daemon,
    faulty: Vec<FuseImage>,
    arguments: Vec<OsString>,
    directory: TempDir,
}

impl Hanging {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("creating a directory");
        let mut images = create_images(directory.path(), 3, 4 << 20);
        let faulty: Vec<_> = images[..2]
            .iter()
            .map(|image| FuseImage::serve(image))
            .collect();
        for (image, fuse) in images.iter_mut().zip(&faulty) {
            *image = fuse.path();
        }
        let mut arguments = replica_arguments(&images);
        for (index, image) in arguments.iter_mut().skip(1).step_by(2).enumerate() {
            image.push(format!(",node-name=r{index}"));
        }
        let timeout_ms = REPLICA_TIMEOUT.as_millis().to_string();
        arguments.extend(["--replica-timeout".into(), timeout_ms.into()]);
        Self {
            _fault_guards: faulty.iter().map(FuseImage::fault_guard).collect(),
            daemon: Daemon::start(directory.path(), &arguments),
            faulty,
            arguments,
            directory,
        }
    }

    /// Sends a request that hangs, and returns when both replicas have it.
    fn hang(&self, operation: Operation, request: Request) -> Client {
        let mut client = Client::connect(self.daemon.socket(), 1);
        client.memory(0)[..BLOCK].fill(0xa5);
        for image in &self.faulty {
            image.inject(operation, Fault::Hang);
        }
        client.send(0, &[request]);
        let has_it = |image: &FuseImage| image.asked(operation) > 0;
        assert!(wait_until(HANG_LIMIT, || self.faulty.iter().all(has_it)));
        client
    }

    fn send_sigterm(&self) -> Instant {
        let id = libc::pid_t::try_from(self.daemon.id()).expect("process ids are positive");
        // SAFETY: kill takes no pointer; the child is not reaped before `self.daemon` is asked for
        // it.
        assert_eq!(unsafe { libc::kill(id, libc::SIGTERM) }, 0);
        Instant::now()
    }

    fn clear_faults(&self) {
        self.faulty.iter().for_each(FuseImage::clear_faults);
    }

    /// What another daemon says of the images.
    fn second_daemon(&self) -> String {
        let socket = self.directory.path().join("second.sock");
        let socket = ["--socket-path".into(), socket.into_os_string()];
        let output = Daemon::run_to_end(self.arguments.iter().chain(&socket));
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("text")
    }
}

#[test]
fn a_hung_write_delays_the_end_until_the_drain_limit() {
    let mut disk = Hanging::new();
    let write = Request::Write {
        offset: 0,
        memory: 0,
        len: BLOCK,
    };
    let mut client = disk.hang(Operation::Write, write);
    let began = disk.send_sigterm();
    assert_eq!(client.poll(0, 1), [(0, Err(Failed(libc::EIO)))]);
    assert!(
        began.elapsed() >= DRAIN_LIMIT - Duration::from_millis(10),
        "it waits"
    );
    // The replicas still hang: that the daemon ends is the promise.
    let status = disk.daemon.wait();
    assert_eq!(
        status.code(),
        Some(1),
        "a replica that is needed was not flushed"
    );
    assert!(
        disk.daemon
            .log()
            .contains("does not answer: its image stays locked")
    );
    // The process has ended, its writes have not. With `--aio threads` the kernel does not even
    // answer what the length of the file is: a write that waits has the inode's lock.
    let refused = disk.second_daemon();
    let reasons = ["in use by another process", "does not answer"];
    let is_refused = reasons.iter().any(|reason| refused.contains(reason));
    assert!(is_refused, "{refused}");
    disk.clear_faults();
    let socket = disk.directory.path().to_owned();
    let mut daemon = Daemon::start(&socket, &disk.arguments);
    let mut client = Client::connect(daemon.socket(), 1);
    client.write(0, 0, &[0x5a; BLOCK]).expect("writing");
    assert_eq!(client.read(0, 0, BLOCK).expect("reading"), [0x5a; BLOCK]);
    drop(client);
    assert!(daemon.terminate().success());
}

/// A flush that hangs keeps a thread of the kernel, and with it the rest of the process. All
/// that the daemon can do is done all the same.
#[test]
fn a_hung_flush_delays_only_the_exit_of_the_process() {
    let mut disk = Hanging::new();
    let mut client = disk.hang(Operation::Sync, Request::Flush);
    let began = disk.send_sigterm();
    assert_eq!(client.poll(0, 1), [(0, Err(Failed(libc::EIO)))]);
    assert!(
        began.elapsed() >= FLUSH_DRAIN_LIMIT - Duration::from_millis(10),
        "a flush may take so long"
    );
    let says_so = || {
        disk.daemon
            .log()
            .contains("does not answer: its image stays locked")
    };
    assert!(wait_until(HANG_LIMIT, says_so));
    let are_gone = || !disk.daemon.socket().exists() && !disk.daemon.events_socket().exists();
    assert!(wait_until(HANG_LIMIT, are_gone));
    disk.clear_faults();
    assert_eq!(disk.daemon.wait().code(), Some(1));
}

/// A frontend that goes away does not wait for ever either, and the next one is served.
#[test]
fn a_frontend_that_leaves_hung_requests_makes_room_for_the_next() {
    let mut disk = Hanging::new();
    let read = Request::Read {
        offset: 0,
        memory: 0,
        len: BLOCK,
    };
    let client = disk.hang(Operation::Read, read);
    drop(client);
    // To connect takes a reply of the daemon. It replies when the virtqueues of the connection
    // before are drained, or the limit for that is over: the replicas still hang.
    let mut next = Client::connect(disk.daemon.socket(), 1);
    disk.clear_faults();
    assert_eq!(next.read(0, 0, BLOCK).expect("reading"), [0; BLOCK]);
    drop(next);
    assert!(disk.daemon.terminate().success());
}
