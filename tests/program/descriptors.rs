//! Descriptors: the daemon raises its limit, and frontends leave some to the operator.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use quorum_blk::limits::{CONNECTIONS_MAX, DESCRIPTORS_NEEDED, QUEUES_MAX};
use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::daemon::replica_arguments;
use testkit::images::create_images;
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};
use testkit::programs;
use vhost::VhostBackend;
use vhost::vhost_user::Frontend;
use vmm_sys_util::eventfd::EventFd;

/// Starts a daemon with these soft and hard limits of open files. Its sockets are in `directory`.
fn start(directory: &Path, limits: &str) -> Process {
    let [socket, qmp] = ["disk.sock", "qmp.sock"].map(|name| directory.join(name));
    let mut command = Command::new("prlimit");
    command
        .arg(format!("--nofile={limits}"))
        .arg(programs::program(programs::DAEMON))
        .args(["--state", "none", "--shared", "--socket-path"])
        .arg(&socket)
        .arg("--qmp")
        .arg(&qmp)
        .args(replica_arguments(&create_images(directory, 3, 1 << 20)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(directory.join("log")).unwrap());
    let process = Process::spawn(&mut command).unwrap();
    assert!(wait_until(HANG_LIMIT, || socket.exists() && qmp.exists()));
    process
}

fn log(directory: &Path) -> String {
    fs::read_to_string(directory.join("log")).unwrap()
}

#[test]
fn the_limit_is_raised_to_what_all_frontends_can_need() {
    let directory = tempfile::tempdir().unwrap();
    let process = start(directory.path(), "256:16384");
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.id())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let soft = line.unwrap().split_whitespace().nth(3).unwrap();
    assert_eq!(soft.parse(), Ok(DESCRIPTORS_NEEDED));
    assert!(!log(directory.path()).contains("limit of open files"));
}

#[test]
fn frontends_that_pass_all_the_descriptors_they_can_leave_some_to_the_operator() {
    let directory = tempfile::tempdir().unwrap();
    let mut process = start(directory.path(), "256:256");
    assert!(log(directory.path()).contains("the limit of open files is low"));
    let event = EventFd::new(0).unwrap();
    let socket = directory.path().join("disk.sock");
    let frontends: Vec<_> = (0..CONNECTIONS_MAX)
        .filter_map(|_| {
            let frontend = Frontend::connect(&socket, u64::from(QUEUES_MAX)).ok()?;
            frontend.set_owner().ok()?;
            // The daemon may end the connection at any of them.
            let _ = (0..usize::from(QUEUES_MAX)).try_for_each(|queue| {
                frontend.set_vring_call(queue, &event)?;
                frontend.set_vring_err(queue, &event)
            });
            // Only an open connection has an answer; the messages before are handled then.
            let _ = frontend.get_features();
            Some(frontend)
        })
        .collect();
    let is_refused = || {
        let log = log(directory.path());
        log.contains("it passes more descriptors than are left")
            || log.contains("too few descriptors are left")
    };
    assert!(
        wait_until(HANG_LIMIT, is_refused),
        "{}",
        log(directory.path())
    );
    let qmp = directory.path().join("qmp.sock");
    let mut monitors: Vec<_> = (0..8).map(|_| Monitor::connect(&qmp)).collect();
    for monitor in &mut monitors {
        monitor.execute("query-quorum", json!({}));
    }
    drop(frontends);
    process.signal(libc::SIGTERM);
    assert_eq!(process.wait_within(HANG_LIMIT).unwrap().code(), Some(0));
}
