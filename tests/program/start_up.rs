//! How the daemon starts and ends, as a process: what it prints, and which files it leaves.
//!
//! Needs `qemu-storage-daemon` (Debian: qemu-system-common) and, for a replica that is slow, FUSE.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use testkit::HANG_LIMIT;

use quorum_blk::replica::image_lock::{self, Access, Locking};
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::{are_identical, create_images};
use testkit::process::{Process, wait_until};

use crate::place::{Place, StorageDaemon};

// ---- Output

#[test]
fn a_closed_pipe_ends_the_help_quietly() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkd"));
    let output = command.arg("--help").stdout(writer).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*stderr), (Some(0), ""));
}

#[test]
fn capabilities_help_and_version() {
    let printed = |arguments: &[&str]| {
        let output = Daemon::run_to_end(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(output.stderr, b"");
        String::from_utf8(output.stdout).unwrap()
    };
    let capabilities = "{\"type\": \"block\", \"features\": [\"read-only\", \"blk-file\"]}\n";
    assert_eq!(printed(&["--print-capabilities"]), capabilities);
    // Also with other options.
    assert_eq!(
        printed(&["--no-such-option", "--print-capabilities", "--fd", "x"]),
        capabilities
    );
    assert_eq!(
        printed(&["--version"]),
        format!("quorum-blkd {}\n", env!("CARGO_PKG_VERSION"))
    );
    let help = printed(&["--help"]);
    for option in [
        "--socket-path",
        "--blk-file",
        "--vote-threshold",
        "QUORUM_BLKD_LOG",
    ] {
        assert!(help.contains(option), "no {option} in the help");
    }
}

// ---- The life of a daemon

/// A daemon with arguments and an environment of its own.
struct Running {
    process: Process,
    log: PathBuf,
}

impl Running {
    /// Starts it with `descriptor`, if any, passed on.
    fn start(
        place: &Place,
        arguments: &[&str],
        environment: Option<&str>,
        descriptor: Option<RawFd>,
    ) -> Self {
        let log = place.path("log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_quorum-blkd"));
        command
            .args(replica_arguments(&place.images))
            .args(arguments)
            .env_remove("QUORUM_BLKD_LOG")
            .envs(environment.map(|level| ("QUORUM_BLKD_LOG", level)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        if let Some(descriptor) = descriptor {
            // SAFETY: fcntl is async-signal-safe; the closure touches no memory of the parent.
            unsafe { command.pre_exec(move || keep_over_exec(descriptor)) };
        }
        let process = Process::spawn(&mut command).unwrap();
        Self { process, log }
    }

    /// Starts it with a socket, and waits until that is there.
    fn with_socket(place: &Place, arguments: &[&str], environment: Option<&str>) -> Self {
        let socket = place.path("disk.sock");
        let arguments = [&["--socket-path", socket.to_str().unwrap()], arguments].concat();
        let mut running = Self::start(place, &arguments, environment, None);
        wait_until(HANG_LIMIT, || {
            socket.exists() || !running.process.is_alive()
        });
        assert!(socket.exists(), "{}", running.log());
        running
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Sends a signal and returns the exit status.
    fn end(&mut self, signal: libc::c_int) -> Option<i32> {
        self.process.signal(signal);
        self.exit_code()
    }

    fn exit_code(&mut self) -> Option<i32> {
        let status = self.process.wait_within(HANG_LIMIT);
        status.expect("the daemon is still there").code()
    }
}

fn keep_over_exec(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: a system call without pointers.
    match unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn an_inherited_socket_is_served() {
    let place = Place::new(3);
    let socket = place.path("inherited.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let descriptor = listener.as_raw_fd();
    let mut running = Running::start(
        &place,
        &["--fd", &descriptor.to_string()],
        None,
        Some(descriptor),
    );
    // The daemon has a copy now. With this one closed, a connection fails if the daemon ends.
    drop(listener);
    for round in 1..3 {
        let mut client = Client::connect(&socket, 1);
        client.write(0, 512, &[round; 512]).unwrap();
        assert_eq!(client.read(0, 512, 512).unwrap(), [round; 512]);
    }
    assert_eq!(running.end(libc::SIGTERM), Some(0), "{}", running.log());
    assert!(socket.exists(), "the name is not ours to remove");
    assert!(are_identical(&place.images));
}

#[test]
fn an_inherited_descriptor_that_is_no_listening_socket_is_refused() {
    let place = Place::new(1);
    let events = place.path("events.sock");
    let file = File::open(&place.images[0]).unwrap();
    let (connected, _other_end) = UnixStream::pair().unwrap();
    let internet = TcpListener::bind("127.0.0.1:0").unwrap();
    let inherited = [
        file.as_raw_fd(),
        connected.as_raw_fd(),
        internet.as_raw_fd(),
    ];
    let inherited = inherited.map(|descriptor| (descriptor, Some(descriptor)));
    // Neither are the standard streams, nor descriptors that are not open.
    for (descriptor, passed) in inherited
        .into_iter()
        .chain([0, 1, 2, 9999].map(|fd| (fd, None)))
    {
        let number = descriptor.to_string();
        let arguments = ["--fd", &number, "--events", events.to_str().unwrap()];
        let mut running = Running::start(&place, &arguments, None, passed);
        assert_eq!(running.exit_code(), Some(1));
        assert_eq!(
            running.log(),
            format!("quorum-blkd: --fd {number}: not a listening UNIX stream socket\n")
        );
        assert!(!events.exists());
    }
}

/// The monitor's clients would be served as frontends.
#[test]
fn a_descriptor_of_a_socket_that_the_daemon_makes_itself_is_refused() {
    let place = Place::new(1);
    let [events, qmp] = ["events.sock", "qmp.sock"].map(|name| place.path(name));
    let (events, qmp) = (events.to_str().unwrap(), qmp.to_str().unwrap());
    for descriptor in 3..12 {
        let number = descriptor.to_string();
        let arguments = ["--fd", &number, "--events", events, "--qmp", qmp];
        let mut running = Running::start(&place, &arguments, None, None);
        assert_eq!(running.exit_code(), Some(1), "{}", running.log());
        assert_eq!(
            running.log(),
            format!("quorum-blkd: --fd {number}: not a listening UNIX stream socket\n")
        );
    }
}

/// It sends a signal on to the daemon, and then to its process group.
#[test]
fn timeout_ends_it_in_an_orderly_way() {
    for _ in 0..5 {
        let place = Place::new(2);
        let mut command = Command::new("timeout");
        command
            .args(["--preserve-status", "1h", env!("CARGO_BIN_EXE_quorum-blkd")])
            .args(place.sockets_arguments())
            .args(replica_arguments(&place.images))
            .stderr(File::create(place.path("log")).unwrap());
        let mut timeout = Process::spawn(&mut command).unwrap();
        let log = || fs::read_to_string(place.path("log")).unwrap();
        let serves = wait_until(HANG_LIMIT, || log().contains("serving the disk"));
        assert!(serves, "{}", log());
        timeout.signal(libc::SIGTERM);
        let status = timeout.wait_within(HANG_LIMIT).expect("it ends");
        assert_eq!(status.code(), Some(0), "{}", log());
    }
}

#[test]
fn a_signal_ends_it_and_nothing_is_left() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        // Without a frontend, with one that is silent, and with one that works.
        for frontend in 0..3 {
            let place = Place::new(2);
            let events = place.path("events.sock");
            let mut running =
                Running::with_socket(&place, &["--events", events.to_str().unwrap()], None);
            let socket = place.path("disk.sock");
            let _reader = UnixStream::connect(&events).unwrap();
            let mut silent = None;
            let mut working = None;
            match frontend {
                1 => silent = Some(UnixStream::connect(&socket).unwrap()),
                2 => {
                    let mut client = Client::connect(&socket, 1);
                    client.write(0, 0, &[7; 4096]).unwrap();
                    working = Some(client);
                }
                _ => {}
            }
            assert_eq!(running.end(signal), Some(0), "{}", running.log());
            assert_eq!(place.sockets(), Vec::<String>::new());
            let log = running.log();
            assert!(
                log.lines().all(|line| line.contains(" INFO disk=")),
                "{log}"
            );
            drop((silent, working));
        }
    }
}

/// The kernel closes the files of an io_uring some time after its process has ended. Neither QEMU
/// nor the next daemon must find them locked for that.
#[test]
fn images_are_unlocked_when_it_has_ended() {
    let place = Place::new(2);
    let socket = place.path("disk.sock");
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let mut running = Running::with_socket(&place, &[], None);
        running.end(signal);
        if signal == libc::SIGTERM {
            for image in &place.images {
                let image = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open(image)
                    .unwrap();
                assert_eq!(
                    image_lock::lock(&image, Access::ReadWrite).unwrap(),
                    Locking::Held
                );
            }
        } else {
            fs::remove_file(&socket).unwrap();
        }
        let mut next = Running::with_socket(&place, &[], None);
        assert_eq!(next.end(libc::SIGTERM), Some(0), "{}", next.log());
    }
}

#[test]
fn sockets_are_private_to_the_owner() {
    let place = Place::new(1);
    let daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    for socket in [daemon.socket(), daemon.events_socket()] {
        let metadata = fs::symlink_metadata(socket).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.mode() & 0o7777, 0o600);
    }
}

/// So that a VMM of another user can connect; the other sockets stay private.
#[test]
fn the_socket_of_the_frontend_can_be_given_to_a_group() {
    for (options, mode, group) in [
        (&["--socket-mode", "0666"][..], 0o666, 0),
        (&["--socket-group", "nogroup"], 0o660, 65_534),
        (
            &["--socket-group", "1234", "--socket-mode", "620"],
            0o620,
            1234,
        ),
    ] {
        let place = Place::new(1);
        let mut arguments = replica_arguments(&place.images);
        arguments.extend(options.iter().map(OsString::from));
        let daemon = Daemon::start(place.directory.path(), arguments);
        let metadata = fs::symlink_metadata(daemon.socket()).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.gid()), (mode, group));
        let metadata = fs::symlink_metadata(daemon.events_socket()).unwrap();
        assert_eq!((metadata.mode() & 0o7777, metadata.gid()), (0o600, 0));
    }
}

#[test]
fn options_and_environment_select_the_log_level() {
    const INFO: &str = " INFO disk=";
    const DEBUG: &str = " DEBUG disk=";
    for (arguments, environment, info, debug) in [
        (&[][..], None, true, false),
        (&["-v"], None, true, true),
        (&["-v", "-v"], None, true, true),
        (&["-vv"], None, true, true),
        (&["--verbose"], None, true, true),
        (&[], Some(""), true, false),
        (&[], Some("info"), true, false),
        (&[], Some("debug"), true, true),
        (&[], Some("error"), false, false),
        (&[], Some("off,quorum_blk::worker=debug"), false, true),
        // The variable overrides the options.
        (&["-vv"], Some("warn"), false, false),
        (&["-v"], Some("debug"), true, true),
    ] {
        let place = Place::new(2);
        let mut running = Running::with_socket(&place, arguments, environment);
        assert_eq!(running.end(libc::SIGTERM), Some(0));
        let log = running.log();
        let got = (log.contains(INFO), log.contains(DEBUG));
        assert_eq!(got, (info, debug), "{arguments:?}, {environment:?}: {log}");
    }
}

/// A slow replica makes sure that a request is in flight.
#[test]
fn requests_in_flight_are_answered_before_it_ends() {
    // As many as a worker accepts in one turn.
    const REQUESTS: usize = 16;
    const LEN: usize = 16 << 10;
    let directory = tempfile::tempdir().unwrap();
    let mut images = create_images(directory.path(), 3, 4 << 20);
    let slow = directory.path().join("slow.raw");
    File::create(&slow).unwrap();
    let _qemu = StorageDaemon::start(
        directory.path(),
        &[
            "--object",
            "throttle-group,id=group,x-bps-write=524288",
            "--blockdev",
            &format!(
                "driver=file,filename={},node-name=file",
                images[2].display()
            ),
            "--blockdev",
            "driver=throttle,throttle-group=group,file=file,node-name=slow",
            "--export",
            &format!(
                "type=fuse,id=export,node-name=slow,mountpoint={},writable=on,allow-other=off",
                slow.display()
            ),
        ],
    );
    images[2] = slow;
    let mut arguments = replica_arguments(&images);
    // As slow as it is, it stays in service.
    arguments.extend(["--replica-timeout".into(), "60000".into()]);
    let mut daemon = Daemon::start(directory.path(), arguments);
    let mut client = Client::connect(daemon.socket(), 1);
    let data: Vec<u8> = (0..REQUESTS * LEN)
        .map(|place| (place / 512).to_le_bytes()[0])
        .collect();
    client.memory(0)[..data.len()].copy_from_slice(&data);
    let writes = Request::writes(REQUESTS, LEN);
    client.send(0, &writes);
    let mut answered = Vec::new();
    // They come in one batch: when one is answered, all were accepted.
    assert!(wait_until(HANG_LIMIT, || {
        answered.extend(client.poll(0, 0));
        !answered.is_empty()
    }));
    assert!(answered.len() < REQUESTS, "the slow replica is too fast");
    assert!(daemon.terminate().success());
    answered.extend(client.poll(0, 0));
    assert!(
        answered.iter().all(|(_, result)| result.is_ok()),
        "{answered:?}"
    );
    assert_eq!(answered.len(), REQUESTS);
    // Not the third: the FUSE export of QEMU 7.2 mixes up the data of writes that it gets at the
    // same time.
    for image in &images[..2] {
        assert!(fs::read(image).unwrap()[..data.len()] == data);
    }
}
