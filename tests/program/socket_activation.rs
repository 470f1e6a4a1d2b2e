//! The daemon under a service manager: it uses the sockets that it gets, and reports when it serves
//! the disk.
//!
//! Needs `systemd-socket-activate` (Debian: systemd), which `make clients` installs.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use testkit::HANG_LIMIT;

use rustix::io::fcntl_dupfd_cloexec;
use rustix::net::{AddressFamily, SocketType, bind, listen, socket};
use serde_json::json;
use tempfile::TempDir;
use testkit::client::Client;
use testkit::daemon::{EventReader, replica_arguments};
use testkit::images::{corrupt_sectors, create_images};
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};

const PROGRAM: &str = env!("CARGO_BIN_EXE_quorum-blkd");
const DISK_BYTES: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// SD_LISTEN_FDS_START: the number of the first descriptor that is passed.
const FIRST: RawFd = 3;

/// Images, and the socket that gets the daemon's state.
struct Place {
    directory: TempDir,
    images: Vec<PathBuf>,
    notices: UnixDatagram,
}

impl Place {
    fn new(replicas: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = create_images(directory.path(), replicas, DISK_BYTES);
        let notices = UnixDatagram::bind(directory.path().join("notify.sock")).unwrap();
        notices.set_read_timeout(Some(HANG_LIMIT)).unwrap();
        Self {
            directory,
            images,
            notices,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn notify_variable(&self) -> OsString {
        let mut variable = OsString::from("NOTIFY_SOCKET=");
        variable.push(self.path("notify.sock"));
        variable
    }

    /// The next notice of the daemon to its service manager.
    fn news(&self) -> String {
        let mut bytes = [0; 512];
        let len = self.notices.recv(&mut bytes).expect("a notice");
        String::from_utf8(bytes[..len].to_vec()).unwrap()
    }

    fn wait_until_it_is_ready(&self) {
        assert_eq!(
            self.news(),
            format!(
                "READY=1\nSTATUS=serving {} MiB from {} replicas, vote threshold 2\n",
                DISK_BYTES >> 20,
                self.images.len()
            )
        );
    }

    fn spawn(&self, command: &mut Command) -> Running {
        let log = self.path("log");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap());
        Running {
            process: Process::spawn(command).unwrap_or_else(|error| {
                panic!(
                    "{}: {error}; run `make clients` first",
                    command.get_program().display()
                )
            }),
            log,
        }
    }

    /// Starts the daemon as systemd does: with `sockets` as descriptors 3 and up, and with
    /// `variables`, in which `$$` is the process id of the daemon.
    fn pass(&self, sockets: &[BorrowedFd<'_>], variables: &str, arguments: &[OsString]) -> Running {
        // Above the numbers that they get.
        let duplicate = |socket: &BorrowedFd<'_>| fcntl_dupfd_cloexec(socket, 100).unwrap();
        let duplicates: Vec<OwnedFd> = sockets.iter().map(duplicate).collect();
        let numbers: Vec<RawFd> = duplicates.iter().map(AsRawFd::as_raw_fd).collect();
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{variables} exec \"$0\" \"$@\""), PROGRAM])
            .args(arguments)
            .env("NOTIFY_SOCKET", self.path("notify.sock"));
        // SAFETY: dup2 is async-signal-safe, and no thread changes the memory that the closure
        // reads.
        unsafe {
            command.pre_exec(move || {
                for (number, passed) in numbers.iter().zip(FIRST..) {
                    if libc::dup2(*number, passed) == -1 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        self.spawn(&mut command)
    }

    /// The one line with which the daemon refuses.
    fn refusal(&self, sockets: &[BorrowedFd<'_>], variables: &str, options: &[&str]) -> String {
        let mut arguments = replica_arguments(&self.images);
        arguments.extend(options.iter().map(OsString::from));
        let mut running = self.pass(sockets, variables, &arguments);
        assert_eq!(running.wait(), Some(1), "{}", running.log());
        let log = running.log();
        let line = log.strip_suffix('\n').expect("a line");
        let line = line.strip_prefix("quorum-blkd: ").expect("its name");
        assert!(!line.contains('\n'), "more than a line: {line}");
        line.to_owned()
    }
}

/// The daemon, or the program that executes it.
struct Running {
    process: Process,
    log: PathBuf,
}

impl Running {
    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn wait(&mut self) -> Option<i32> {
        let status = self.process.wait_within(HANG_LIMIT);
        status
            .unwrap_or_else(|| panic!("still there: {}", self.log()))
            .code()
    }
}

/// A program of systemd listens, and starts the daemon for the first connection.
#[test]
fn a_connection_starts_it_and_all_its_sockets_are_served() {
    let place = Place::new(3);
    let names = ["vhost-user", "events", "qmp"];
    let [disk, events, qmp] = names.map(|name| place.path(&format!("{name}.sock")));
    let mut command = Command::new("systemd-socket-activate");
    // In another order: only the names matter.
    for socket in [&qmp, &disk, &events] {
        command.arg("--listen").arg(socket);
    }
    command.args(["--fdname", "qmp:vhost-user:events", "--setenv"]);
    command.arg(place.notify_variable());
    command.arg(PROGRAM).args(replica_arguments(&place.images));
    let mut running = place.spawn(&mut command);
    let listens = wait_until(HANG_LIMIT, || {
        running.log().matches("Listening on").count() == names.len()
    });
    assert!(listens && running.process.is_alive(), "{}", running.log());

    let mut monitor = Monitor::connect(&qmp);
    place.wait_until_it_is_ready();
    let reader = EventReader::connect(&events);
    let mut client = Client::connect(&disk, 1);
    client.write(0, 0, &[7; BLOCK]).unwrap();
    client.flush(0).unwrap();
    corrupt_sectors(&place.images[1], 0..1, 0xff);
    assert_eq!(client.read(0, 0, BLOCK).unwrap(), [7; BLOCK]);
    let is_report = |event: &serde_json::Value| {
        event["event"] == "QUORUM_REPORT_BAD" && event["data"]["node-name"] == "1.raw"
    };
    assert!(
        reader.wait_for(is_report, HANG_LIMIT).is_some(),
        "{:?}",
        reader.all()
    );
    assert_eq!(monitor.execute("query-status", json!({}))["running"], true);

    running.process.signal(libc::SIGTERM);
    assert_eq!(place.news(), "STOPPING=1\nSTATUS=stopping\n");
    assert_eq!(running.wait(), Some(0), "{}", running.log());
    for socket in [disk, events, qmp] {
        assert!(
            socket.exists(),
            "{} is not ours to remove",
            socket.display()
        );
    }
}

/// The sockets stay while the daemon is killed and started again, as systemd does it, so a frontend
/// that connects in between is not refused. The name does not matter where there is only one
/// socket.
#[test]
fn connections_during_a_restart_are_served() {
    let place = Place::new(3);
    let path = place.path("disk.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let variables = "LISTEN_PID=$$ LISTEN_FDS=1";
    let arguments = replica_arguments(&place.images);
    let mut first = place.pass(&[listener.as_fd()], variables, &arguments);
    place.wait_until_it_is_ready();
    let mut client = Client::connect(&path, 1);
    client.write(0, 0, &[7; BLOCK]).unwrap();
    client.flush(0).unwrap();
    first.process.signal(libc::SIGKILL);
    assert_eq!(first.wait(), None);
    drop(client);

    let connecting = std::thread::spawn(move || Client::connect(&path, 1).read(0, 0, BLOCK));
    let mut waits = [rustix::event::PollFd::new(
        &listener,
        rustix::event::PollFlags::IN,
    )];
    assert_eq!(rustix::event::poll(&mut waits, None).unwrap(), 1);
    let variables = format!("{variables} LISTEN_FDNAMES=quorum-blkd@disk.socket");
    let mut second = place.pass(&[listener.as_fd()], &variables, &arguments);
    assert_eq!(connecting.join().unwrap().unwrap(), [7; BLOCK]);
    second.process.signal(libc::SIGTERM);
    assert_eq!(second.wait(), Some(0), "{}", second.log());
}

#[test]
fn a_descriptor_that_is_no_listening_stream_socket_is_refused() {
    let place = Place::new(1);
    let file = File::open(&place.images[0]).unwrap();
    let (connected, _other_end) = UnixStream::pair().unwrap();
    let internet = TcpListener::bind("127.0.0.1:0").unwrap();
    let packets = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    let address = rustix::net::SocketAddrUnix::new(place.path("packets.sock")).unwrap();
    bind(&packets, &address).unwrap();
    listen(&packets, 1).unwrap();
    for descriptor in [
        file.as_fd(),
        connected.as_fd(),
        internet.as_fd(),
        packets.as_fd(),
        place.notices.as_fd(),
    ] {
        assert_eq!(
            place.refusal(
                &[descriptor],
                "LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=vhost-user",
                &[]
            ),
            "descriptor 3 of the service manager ('vhost-user') is not a listening UNIX stream \
             socket"
        );
    }
}

#[test]
fn sockets_that_do_not_fit_are_refused() {
    let place = Place::new(1);
    let [first, second] = ["a", "b"].map(|name| UnixListener::bind(place.path(name)).unwrap());
    let (one, two) = ([first.as_fd()], [first.as_fd(), second.as_fd()]);
    let cases: [(&[BorrowedFd<'_>], &str, &[&str], &str); 8] = [
        (
            &two,
            "LISTEN_FDS=2 LISTEN_FDNAMES=vhost-user:other",
            &[],
            "'other' (descriptor 4)",
        ),
        (
            &two,
            "LISTEN_FDS=2 LISTEN_FDNAMES=vhost-user:vhost-user",
            &[],
            "more than one",
        ),
        (&two, "LISTEN_FDS=2", &[], "'unknown' (descriptor 3)"),
        (
            &one,
            "LISTEN_FDS=1 LISTEN_FDNAMES=qmp",
            &[],
            "no socket to serve the disk on",
        ),
        (
            &one,
            "LISTEN_FDS=1",
            &["--socket-path", "/nowhere/s"],
            "'unknown'",
        ),
        (
            &one,
            "LISTEN_FDS=1 LISTEN_FDNAMES=vhost-user:events",
            &[],
            "invalid LISTEN_FDNAMES",
        ),
        (&one, "LISTEN_FDS=500", &[], "Bad file descriptor"),
        (&one, "LISTEN_FDS=many", &[], "invalid LISTEN_FDS"),
    ];
    for (sockets, variables, options, expected) in cases {
        let line = place.refusal(sockets, &format!("LISTEN_PID=$$ {variables}"), options);
        assert!(line.contains(expected), "{variables}: {line}");
    }
}

/// The environment of a service is inherited by all that it starts, and means nothing there.
#[test]
fn descriptors_for_another_process_are_ignored() {
    let place = Place::new(1);
    let socket = UnixListener::bind(place.path("a")).unwrap();
    for variables in [
        "LISTEN_PID=1 LISTEN_FDS=1 LISTEN_FDNAMES=vhost-user",
        "LISTEN_FDS=1 LISTEN_FDNAMES=vhost-user",
    ] {
        let line = place.refusal(&[socket.as_fd()], variables, &[]);
        assert!(line.contains("give --socket-path PATH or --fd N"), "{line}");
    }
}

/// Sockets passed beside `--fd` have their names; the one it names needs none.
#[test]
fn a_number_and_names() {
    let place = Place::new(3);
    let [disk, qmp] = ["disk.sock", "qmp.sock"].map(|name| place.path(name));
    let listeners = [&disk, &qmp].map(|path| UnixListener::bind(path).unwrap());
    let mut arguments = replica_arguments(&place.images);
    arguments.extend(["--fd", "3"].map(OsString::from));
    let sockets = listeners.each_ref().map(AsFd::as_fd);
    let variables = "LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=disk.socket:qmp";
    let mut running = place.pass(&sockets, variables, &arguments);
    place.wait_until_it_is_ready();
    assert_eq!(
        Client::connect(&disk, 1).read(0, 0, BLOCK).unwrap(),
        [0; BLOCK]
    );
    Monitor::connect(&qmp).execute("quit", json!({}));
    assert_eq!(running.wait(), Some(0), "{}", running.log());
}
