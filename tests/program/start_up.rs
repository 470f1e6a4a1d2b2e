//! How the daemon starts and ends, as a process: what it refuses to serve, what it prints, and
//! which files it leaves.
//!
//! Needs `qemu-storage-daemon` (Debian: qemu-system-common) and, for a replica that is slow, FUSE.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use testkit::HANG_LIMIT;

use quorum_blk::replica::image_lock::{self, Access, Locking};
use tempfile::TempDir;
use testkit::client::{Client, Request};
use testkit::daemon::{Daemon, replica_arguments};
use testkit::images::{are_identical, create_images};
use testkit::process::{Process, wait_until};

const DISK_BYTES: u64 = 1 << 20;

/// A directory with images, for a daemon that will not start.
struct Place {
    directory: TempDir,
    images: Vec<PathBuf>,
}

impl Place {
    fn new(replicas: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), replicas, DISK_BYTES);
        Self { directory, images }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Names of the sockets in the directory.
    fn sockets(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory.path())
            .unwrap()
            .map(Result::unwrap);
        entries
            .filter(|entry| entry.file_type().unwrap().is_socket())
            .map(|entry| entry.file_name().into_string().unwrap())
            .collect()
    }

    /// Starts a daemon over `images` with `options` and both sockets; returns its one line of
    /// refusal. No socket is left behind.
    fn refusal_of(&self, images: &[PathBuf], options: &[&str]) -> String {
        let mut arguments = self.sockets_arguments();
        arguments.extend(replica_arguments(images));
        arguments.extend(options.iter().map(OsString::from));
        let line = refusal(arguments);
        assert_eq!(self.sockets(), Vec::<String>::new(), "after {line}");
        line
    }

    fn refusal(&self, options: &[&str]) -> String {
        self.refusal_of(&self.images, options)
    }

    fn sockets_arguments(&self) -> Vec<OsString> {
        vec![
            "--socket-path".into(),
            self.path("disk.sock").into(),
            "--events".into(),
            self.path("events.sock").into(),
        ]
    }
}

/// Runs the daemon, which must refuse to start; returns the line that says why, without its
/// beginning.
fn refusal(arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> String {
    let output = Daemon::run_to_end(arguments);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(output.stdout, b"", "{stderr}");
    let line = stderr.strip_suffix('\n').expect("a whole line");
    assert!(!line.contains('\n'), "more than a line: {stderr}");
    line.strip_prefix("quorum-blkd: ")
        .expect("its name")
        .to_owned()
}

fn assert_says(line: &str, parts: &[&str]) {
    for part in parts {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
}

// ---- Refusals

#[test]
fn images_of_different_sizes_are_refused() {
    let place = Place::new(3);
    let second = OpenOptions::new()
        .write(true)
        .open(&place.images[1])
        .unwrap();
    second.set_len(2 * DISK_BYTES).unwrap();
    let line = place.refusal(&[]);
    assert_says(
        &line,
        &["differ in size", "0.raw", "1.raw", "1048576", "2097152"],
    );
}

#[test]
fn images_of_invalid_size_are_refused() {
    for (bytes, text) in [(0, "is empty"), (1000, "not a multiple of")] {
        let place = Place::new(1);
        let image = OpenOptions::new()
            .write(true)
            .open(&place.images[0])
            .unwrap();
        image.set_len(bytes).unwrap();
        assert_says(&place.refusal(&[]), &["0.raw", text]);
    }
}

#[test]
fn the_same_image_twice_is_refused() {
    let place = Place::new(2);
    let first = place.images[0].clone();
    let line = place.refusal_of(&[first.clone(), first.clone()], &[]);
    assert_says(&line, &["0.raw", "given twice"]);

    let linked = place.path("symbolic.raw");
    symlink(&first, &linked).unwrap();
    let line = place.refusal_of(&[first.clone(), place.images[1].clone(), linked], &[]);
    assert_says(&line, &["0.raw", "symbolic.raw", "are the same image"]);

    let linked = place.path("hard.raw");
    fs::hard_link(&first, &linked).unwrap();
    let line = place.refusal_of(&[linked, first.clone()], &[]);
    assert_says(&line, &["0.raw", "hard.raw", "are the same image"]);

    // By another path.
    let detour = place.path("detour");
    symlink(place.directory.path(), &detour).unwrap();
    let renamed = format!("{},node-name=other", detour.join("0.raw").display());
    let line = place.refusal_of(&[first, renamed.into()], &[]);
    assert_says(&line, &["are the same image"]);
}

#[test]
fn the_same_node_name_twice_is_refused() {
    let place = Place::new(2);
    let named = |image: &Path, name| PathBuf::from(format!("{},node-name={name}", image.display()));
    let images = [
        named(&place.images[0], "left"),
        named(&place.images[1], "left"),
    ];
    assert_says(&place.refusal_of(&images, &[]), &["node-name", "'left'"]);
    let images = [named(&place.images[0], "quorum0")];
    assert_says(
        &place.refusal_of(&images, &[]),
        &["'quorum0'", "voted disk"],
    );
}

#[test]
fn a_threshold_out_of_range_is_refused() {
    let place = Place::new(3);
    for threshold in ["0", "4", "1000"] {
        let line = place.refusal(&["--vote-threshold", threshold]);
        assert_says(&line, &["--vote-threshold", threshold, "1 to 3"]);
    }
    for threshold in ["-1", "two", "", "1.5"] {
        let line = place.refusal(&["--vote-threshold", threshold]);
        assert_says(&line, &["--vote-threshold", "invalid value"]);
    }
}

#[test]
fn blkverify_is_refused_without_two_replicas_and_threshold_two() {
    for (replicas, options) in [
        (1, &["--blkverify"][..]),
        (3, &["--blkverify"]),
        (3, &["--blkverify", "--vote-threshold", "2"]),
        (2, &["--blkverify", "--vote-threshold", "1"]),
        (2, &["--blkverify", "--rewrite-corrupted"]),
        (2, &["--blkverify", "--read-pattern", "fifo"]),
    ] {
        assert_says(&Place::new(replicas).refusal(options), &["--blkverify"]);
    }
}

#[test]
fn files_that_are_no_images_are_refused() {
    let place = Place::new(1);
    let first = place.images[0].clone();
    let fifo = place.path("fifo");
    let name = std::ffi::CString::new(fifo.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path is a C string that outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let refusal = |path: &Path| place.refusal_of(&[first.clone(), path.to_owned()], &[]);

    let line = refusal(&place.path("missing.raw"));
    assert_says(
        &line,
        &["cannot open", "missing.raw", "No such file or directory"],
    );
    assert_says(
        &refusal(place.directory.path()),
        &["is a directory", "regular file"],
    );
    assert_says(&refusal(&fifo), &["fifo", "is a FIFO"]);
    assert_says(&refusal(Path::new("/dev/null")), &["is a character device"]);
    // The refusal is one line, also if the path contains a line end.
    assert_says(
        &refusal(&place.path("a\nb,node-name=two")),
        &["cannot open", "a\\nb"],
    );
}

#[test]
fn an_image_that_another_daemon_serves_is_refused() {
    let served = Place::new(3);
    let _daemon = Daemon::start(served.directory.path(), replica_arguments(&served.images));
    let place = Place::new(2);
    for options in [&[][..], &["--read-only"]] {
        let images = [&place.images[..], &served.images[2..]].concat();
        let images = images.iter().enumerate();
        let images: Vec<PathBuf> = images
            .map(|(index, image)| format!("{},node-name={index}", image.display()).into())
            .collect();
        assert_says(
            &place.refusal_of(&images, options),
            &["2.raw", "in use by another process"],
        );
    }
}

#[test]
fn an_image_that_qemu_has_open_is_refused() {
    let place = Place::new(2);
    let image = place.images[1].display().to_string();
    let qemu = StorageDaemon::start(
        place.directory.path(),
        &[
            "--blockdev",
            &format!("driver=file,filename={image},node-name=file"),
            "--nbd-server",
            &format!("addr.type=unix,addr.path={}", place.path("nbd").display()),
            "--export",
            "type=nbd,id=export,node-name=file,writable=on",
        ],
    );
    let mut arguments = place.sockets_arguments();
    arguments.extend(replica_arguments(&place.images));
    assert_says(&refusal(arguments), &["1.raw", "in use by another process"]);
    assert_eq!(place.sockets(), ["nbd"], "qemu's own");
    drop(qemu);
    let mut daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    assert!(daemon.terminate().success());
}

#[test]
fn unknown_options_are_refused() {
    let place = Place::new(3);
    for options in [&["--no-such-option", "1"][..], &["surplus"]] {
        assert_says(
            &place.refusal(options),
            &["unexpected argument", options[0]],
        );
    }
    for options in [
        ["--read-pattern", "majority"],
        ["--replica-timeout", "soon"],
        ["--cache", "unsafe"],
        ["--num-queues", "0"],
        ["--num-queues", "65"],
    ] {
        let line = place.refusal(&options);
        assert_says(&line, &options);
    }
    for options in [
        ["--queue-size", "3"],
        ["--queue-size", "2048"],
        ["--serial", "a serial number too long"],
    ] {
        assert_says(&place.refusal(&options), &options[..1]);
    }
}

#[test]
fn missing_and_conflicting_options_are_refused() {
    let place = Place::new(1);
    assert_says(&place.refusal_of(&[], &[]), &["--blk-file"]);
    assert_says(
        &refusal(replica_arguments(&place.images)),
        &["--socket-path", "--fd"],
    );
    assert_says(&place.refusal(&["--fd", "3"]), &["--socket-path", "--fd"]);
    let line = place.refusal(&["--read-only", "--rewrite-corrupted"]);
    assert_says(&line, &["--read-only", "--rewrite-corrupted"]);
    assert_says(&refusal(&[] as &[&str]), &["--socket-path"]);
}

/// A path in use for each of the sockets; the other socket is removed.
#[test]
fn a_socket_path_in_use_is_refused() {
    let options = ["--socket-path", "--events", "--qmp"];
    for (taken, other) in [(0, 1), (1, 0), (2, 0)] {
        let place = Place::new(2);
        let refusal = |path: &Path| {
            let mut arguments = replica_arguments(&place.images);
            arguments.extend([options[taken].into(), path.into()]);
            arguments.extend([options[other].into(), place.path("other.sock").into()]);
            let line = refusal(arguments);
            assert!(!place.path("other.sock").exists(), "after {line}");
            line
        };
        let live = UnixListener::bind(place.path("live.sock")).unwrap();
        assert_says(
            &refusal(&place.path("live.sock")),
            &["live.sock", "another process listens"],
        );
        // It is still there, and takes connections.
        let _client = UnixStream::connect(place.path("live.sock")).unwrap();
        live.accept().unwrap();

        fs::write(place.path("file"), "precious").unwrap();
        assert_says(&refusal(&place.path("file")), &["file", "not a socket"]);
        assert_eq!(fs::read(place.path("file")).unwrap(), b"precious");
        assert_says(&refusal(place.directory.path()), &["not a socket"]);
        assert_says(
            &refusal(&place.path("nowhere/disk.sock")),
            &["No such file or directory"],
        );
        assert_says(&refusal(&place.path(&"x".repeat(108))), &["1 to 107 bytes"]);
        assert_says(&refusal(&place.path("other.sock")), &["its own path"]);
        assert_eq!(place.sockets(), ["live.sock"]);
    }
}

#[test]
fn sockets_of_a_dead_daemon_are_replaced() {
    let place = Place::new(1);
    for name in ["disk.sock", "events.sock"] {
        drop(UnixListener::bind(place.path(name)).unwrap());
    }
    let mut daemon = Daemon::start(place.directory.path(), replica_arguments(&place.images));
    for socket in [daemon.socket(), daemon.events_socket()] {
        assert!(wait_until(HANG_LIMIT, || UnixStream::connect(socket).is_ok()));
    }
    assert!(daemon.terminate().success());
    assert_eq!(place.sockets(), Vec::<String>::new());
}

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

/// A qemu-storage-daemon. Asked to end when dropped, so that it takes its FUSE mounts with it.
struct StorageDaemon(Process);

impl StorageDaemon {
    /// Starts it and waits until its exports are there.
    fn start(directory: &Path, arguments: &[&str]) -> Self {
        let (pid_file, log) = (directory.join("qemu.pid"), directory.join("qemu.log"));
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args(arguments)
            .arg("--pidfile")
            .arg(&pid_file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        let process = Process::spawn(&mut command).unwrap_or_else(|error| {
            panic!(
                "qemu-storage-daemon is needed for this test and can not be run ({error}); on \
                 Debian: apt-get install qemu-system-common"
            )
        });
        let mut daemon = Self(process);
        // It writes the file when all exports are up.
        let is_ready = wait_until(HANG_LIMIT, || pid_file.exists() || !daemon.0.is_alive());
        assert!(
            is_ready && daemon.0.is_alive(),
            "qemu-storage-daemon did not come up: {}",
            fs::read_to_string(log).unwrap()
        );
        daemon
    }
}

impl Drop for StorageDaemon {
    fn drop(&mut self) {
        self.0.signal(libc::SIGTERM);
        self.0.wait_within(HANG_LIMIT);
    }
}
