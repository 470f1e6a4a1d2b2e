//! The disk does not depend on the reader of its log, and no frontend can fill it.

use std::fs::{self, File};
use std::io::{PipeReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::thread;

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::client::Client;
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::create_images;
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};
use testkit::programs;

/// A daemon whose stderr is a pipe that is full from the start.
struct Stalled {
    directory: tempfile::TempDir,
    process: Process,
    log: PipeReader,
    monitor: Monitor,
}

impl Stalled {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name| directory.path().join(name);
        let (log, mut writer) = std::io::pipe().unwrap();
        rustix::io::ioctl_fionbio(writer.as_fd(), true).unwrap();
        while writer.write(&[b'\n'; 4096]).is_ok() {}
        rustix::io::ioctl_fionbio(writer.as_fd(), false).unwrap();
        let images = create_images(directory.path(), 3, 1 << 20);
        let mut command = programs::command(programs::DAEMON);
        command
            .args(["-vv", "--state", "none", "--socket-path"])
            .arg(path("disk.sock"))
            .arg("--qmp")
            .arg(path("qmp.sock"))
            .args(replica_arguments(&images))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(writer);
        let process = Process::spawn(&mut command).unwrap();
        // The process has the only other end of the pipe.
        drop(command);
        let is_there = || path("disk.sock").exists() && path("qmp.sock").exists();
        assert!(wait_until(HANG_LIMIT, is_there));
        Self {
            monitor: Monitor::connect(&path("qmp.sock")),
            directory,
            process,
            log,
        }
    }

    fn dropped(&mut self) -> u64 {
        let state = self.monitor.execute("query-quorum", json!({}));
        state["log-lines-dropped"].as_u64().unwrap()
    }

    /// Uses the disk and the monitor until the queue is full.
    fn fill(&mut self) {
        let socket = self.directory.path().join("disk.sock");
        let mut round = 0;
        while self.dropped() == 0 {
            round += 1;
            assert!(round < 100_000, "no line is dropped");
            if round % 1000 == 1 {
                let mut client = Client::connect(&socket, 1);
                client.write(0, 0, &[7; 4096]).unwrap();
                assert_eq!(client.read(0, 0, 4096).unwrap(), [7; 4096]);
            }
        }
    }
}

#[test]
fn a_disk_serves_and_ends_while_its_log_is_not_read() {
    let mut stalled = Stalled::start();
    stalled.fill();
    stalled.process.signal(libc::SIGTERM);
    let status = stalled.process.wait_within(HANG_LIMIT);
    let status = status.expect("the daemon waits for the reader of its log");
    assert_eq!(status.code(), Some(0));
}

#[test]
fn a_second_signal_ends_a_daemon_whose_log_is_not_read() {
    let mut stalled = Stalled::start();
    stalled.fill();
    stalled.process.signal(libc::SIGSTOP);
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGCONT] {
        stalled.process.signal(signal);
    }
    assert!(stalled.process.wait_within(HANG_LIMIT).is_some());
}

#[test]
fn what_was_dropped_is_counted_in_the_log_once_it_is_read_again() {
    let mut stalled = Stalled::start();
    stalled.fill();
    let dropped = stalled.dropped();
    let mut log = stalled.log.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        text
    });
    stalled.process.signal(libc::SIGTERM);
    assert!(stalled.process.wait_within(HANG_LIMIT).is_some());
    let text = reader.join().unwrap();
    let serving = text.find("serving the disk").expect("what came first");
    let line = "WARN disk=quorum0 log lines were dropped: stderr was not read count=";
    let count_at = text.find(line).expect("the count");
    let last = text
        .find("stopping reason=requested")
        .expect("what came last");
    assert!(serving < count_at && serving < last);
    let count = text[count_at + line.len()..].lines().next().unwrap();
    assert!(count.parse::<u64>().unwrap() >= dropped, "{count}");
}

#[test]
fn a_frontend_that_connects_again_and_again_does_not_fill_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, 1 << 20);
    let mut daemon = Daemon::start(directory.path(), replica_arguments(&images));
    for _ in 0..500 {
        let mut connection = UnixStream::connect(daemon.socket()).unwrap();
        connection.write_all(&[0xff; 64]).unwrap();
        // Until the daemon has closed it.
        let _ = connection.read(&mut [0; 64]);
    }
    // What is about the images is not cut by what frontends do.
    fs::remove_file(&images[1]).unwrap();
    File::create(&images[1]).unwrap();
    let is_reported = || daemon.log().contains("replica=1.raw");
    assert!(wait_until(HANG_LIMIT, is_reported), "{}", daemon.log());
    daemon.terminate();
    let log = daemon.log();
    let rejected = log.matches("its message is rejected connection=").count();
    assert!((1..100).contains(&rejected), "{rejected} lines\n{log}");
    let left_out = "log lines were left out: too many of one kind count=";
    let mut counted = 0;
    for line in log
        .lines()
        .filter(|line| line.contains("its message is rejected\""))
    {
        let (_, count) = line.split_once(left_out).expect(line);
        counted += count.split(' ').next().unwrap().parse::<usize>().unwrap();
    }
    assert_eq!(rejected + counted, 500, "{log}");
}
