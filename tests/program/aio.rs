//! `--aio`: a disk is served where io_uring is forbidden, and a replica that hangs in all of its
//! threads delays nothing else.
//!
//! Needs FUSE.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use serde_json::json;
use testkit::HANG_LIMIT;
use testkit::client::{Client, Request};
use testkit::daemon::replica_arguments;
use testkit::fuse::{Fault, FuseImage, Operation};
use testkit::images::are_identical;
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};

use crate::place::{Place, assert_says};

/// A daemon with `--aio threads` that cannot use io_uring.
fn start(place: &Place, options: &[&str]) -> Process {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkd"));
    command
        .args(place.sockets_arguments())
        .arg("--qmp")
        .arg(place.path("qmp.sock"))
        .args(replica_arguments(&place.images))
        .args(["--aio", "threads", "--state", "none"])
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(place.path("log")).unwrap());
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(move || forbid_io_uring(libc::EPERM)) };
    let mut daemon = Process::spawn(&mut command).unwrap();
    let socket = place.path("disk.sock");
    wait_until(HANG_LIMIT, || socket.exists() || !daemon.is_alive());
    assert!(socket.exists(), "{}", log(place));
    daemon
}

fn log(place: &Place) -> String {
    fs::read_to_string(place.path("log")).unwrap()
}

#[test]
fn threads_serve_a_disk_where_io_uring_is_forbidden() {
    let place = Place::new(3);
    let mut daemon = start(&place, &[]);
    let mut client = Client::connect(&place.path("disk.sock"), 1);
    client.write(0, 8192, &[0xa5; 4096]).unwrap();
    client.flush(0).unwrap();
    assert_eq!(client.read(0, 8192, 4096).unwrap(), [0xa5; 4096]);
    let state = Monitor::connect(&place.path("qmp.sock")).execute("query-quorum", json!({}));
    assert_eq!(state["aio"], "threads");
    assert_says(&log(&place), &["serving the disk", "aio=threads"]);
    drop(client);
    daemon.signal(libc::SIGTERM);
    let status = daemon.wait_within(HANG_LIMIT).expect("it ends");
    assert_eq!(status.code(), Some(0), "{}", log(&place));
    assert!(are_identical(&place.images));
}

/// More requests hang than the replica has threads.
#[test]
fn a_replica_that_hangs_in_all_its_threads_holds_up_nothing_else() {
    const REQUESTS: usize = 64;
    let mut place = Place::new(3);
    let fuse = FuseImage::serve(&place.images[0]);
    let _guard = fuse.fault_guard();
    place.images[0] = fuse.path();
    let mut daemon = start(&place, &["--replica-timeout", "500"]);
    let mut client = Client::connect(&place.path("disk.sock"), 1);
    let mut monitor = Monitor::connect(&place.path("qmp.sock"));
    for operation in [Operation::Read, Operation::Write] {
        fuse.inject(operation, Fault::Hang);
    }
    let writes = Request::writes(REQUESTS, 4096);
    assert!(client.run(0, &writes).iter().all(Result::is_ok));
    client.flush(0).unwrap();
    assert!(fuse.asked(Operation::Write) > fuse.done(Operation::Write));
    let state = monitor.execute("query-quorum", json!({}));
    let name = state["replicas"][0]["node-name"].clone();
    let change = json!({ "parent": "quorum0", "child": name });
    monitor.execute("x-blockdev-change", change);
    client.write(0, 0, &[0x5a; 4096]).unwrap();
    client.flush(0).unwrap();
    drop((client, monitor));
    daemon.signal(libc::SIGTERM);
    // The replica still hangs.
    let status = daemon.wait_within(HANG_LIMIT).expect("it ends");
    assert_eq!(status.code(), Some(0), "{}", log(&place));
    assert!(are_identical(&place.images[1..]));
}

/// In a container, or where the administrator has switched it off.
#[test]
fn a_system_without_io_uring_is_refused_with_the_causes() {
    let place = Place::new(2);
    for (errno, text) in [
        (libc::EPERM, "kernel.io_uring_disabled"),
        (libc::ENOSYS, "seccomp"),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkd"));
        command
            .args(place.sockets_arguments())
            .args(replica_arguments(&place.images));
        // SAFETY: the closure makes system calls only.
        unsafe { command.pre_exec(move || forbid_io_uring(errno)) };
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert_says(
            &stderr,
            &["io_uring", "seccomp filter", text, "--aio threads"],
        );
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert_eq!(place.sockets(), Vec::<String>::new());
    }
}

/// Has io_uring_setup fail in this process from now on.
fn forbid_io_uring(errno: i32) -> io::Result<()> {
    let instruction = |code: u32, jump_if_true, jump_if_false, operand| libc::sock_filter {
        code: code.try_into().expect("a short code"),
        jt: jump_if_true,
        jf: jump_if_false,
        k: operand,
    };
    let number = libc::SYS_io_uring_setup.try_into().expect("a small number");
    let errno: u32 = errno.try_into().expect("a positive number");
    let mut filter = [
        // The number of the system call is the first member of `struct seccomp_data`.
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        instruction(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
        instruction(libc::BPF_RET, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog {
        len: filter.len().try_into().expect("a short program"),
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the program is valid for reads during the call.
    let set = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
