//! The monitor as its clients see it: those of the QEMU project, several at once, and some that
//! misbehave.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use testkit::HANG_LIMIT;

use crate::recorder::Recorder;
use quorum_blk::common::operation::OperationType;
use quorum_blk::common::report::{Cause, Report};
use quorum_blk::common::{Errno, ReplicaIndex, SectorRange};
use quorum_blk::control::events::Names;
use quorum_blk::control::publisher::{self, Publisher};
use quorum_blk::control::queue::EventQueue;
use quorum_blk::control::socket::{Listener, SocketAccess, bind_unix_listener};
use quorum_blk::limits::{QMP_CLIENTS_MAX, QMP_MESSAGE_BYTES_MAX, REPLICAS_MAX};
use serde_json::{Value, json};
use testkit::client::Client;
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::images::{corrupt_sectors, create_images};
use testkit::monitor::Monitor;
use testkit::process::{Process, wait_until};
use testkit::programs::client_program;

/// A daemon with a monitor, on three images.
struct Served {
    daemon: Daemon,
    socket: PathBuf,
    images: Vec<PathBuf>,
    _directory: tempfile::TempDir,
}

fn serve() -> Served {
    let directory = tempfile::tempdir().unwrap();
    let images = create_images(directory.path(), 3, 1 << 20);
    let socket = directory.path().join("qmp.sock");
    let mut arguments = replica_arguments(&images);
    arguments.extend(["--qmp".into(), socket.clone().into()]);
    Served {
        daemon: Daemon::start(directory.path(), arguments),
        socket,
        images,
        _directory: directory,
    }
}

impl Served {
    /// A guest's read that finds the first sector of the second image corrupt.
    fn find_a_corrupt_sector(&self) {
        corrupt_sectors(&self.images[1], 0..1, 0xff);
        let mut client = Client::connect(self.daemon.socket(), 1);
        client.read(0, 0, 4096).unwrap();
    }
}

fn report_of(replica: &str) -> impl Fn(&Value) -> bool + use<'_> {
    move |message| {
        message["event"] == "QUORUM_REPORT_BAD" && message["data"]["node-name"] == replica
    }
}

/// A program whose output is read as lines of JSON.
fn run_for_json(command: &mut Command) -> (Process, EventReader) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let process = Process::spawn(command.stdout(Stdio::from(OwnedFd::from(theirs)))).unwrap();
    (process, EventReader::over(ours))
}

#[test]
fn the_library_of_the_qemu_project() {
    let served = serve();
    let commands = [
        json!({ "execute": "query-version" }),
        json!({ "execute": "query-status", "arguments": {} }),
        json!({ "execute": "system_reset" }),
        json!({ "execute": "query-status", "arguments": { "a": 1 } }),
    ];
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/monitor.py");
    let mut command = Command::new(client_program("venv/bin/python"));
    command.arg(script).arg(&served.socket);
    command
        .args(commands.map(|command| command.to_string()))
        .stdin(Stdio::piped());
    let (mut process, messages) = run_for_json(&mut command);
    let is_last = |message: &Value| message["error"]["class"] == "GenericError";
    messages
        .wait_for(is_last, HANG_LIMIT)
        .expect("an answer to the last command");
    served.find_a_corrupt_sector();
    let event = messages
        .wait_for(report_of("1.raw"), HANG_LIMIT)
        .expect("an event");
    assert_eq!(
        event["data"]["bad-sectors"],
        json!([{ "sector-num": 0, "sector-count": 1 }])
    );

    let said = messages.all();
    assert!(
        said[0]["greeting"]["package"]
            .as_str()
            .unwrap()
            .starts_with("quorum-blk ")
    );
    assert_eq!(said[1]["return"], said[0]["greeting"]);
    assert_eq!(
        said[2]["return"],
        json!({ "running": true, "status": "running" })
    );
    assert_eq!(
        said[3]["error"],
        json!({ "class": "CommandNotFound", "desc": "The command system_reset has not been found" })
    );
    process.close_stdin();
    assert!(
        process
            .wait_within(HANG_LIMIT)
            .expect("the client ends")
            .success()
    );
}

#[test]
fn qmp_shell() {
    let mut served = serve();
    let directory = tempfile::tempdir().unwrap();
    let input = directory.path().join("input");
    fs::write(&input, "query-status\nsystem_reset\nquit\n").unwrap();
    let output = directory.path().join("output");
    let mut command = Command::new(client_program("venv/bin/qmp-shell"));
    command.arg(&served.socket).env("HOME", directory.path());
    command.stdin(fs::File::open(&input).unwrap());
    let file = fs::File::create(&output).unwrap();
    command.stderr(file.try_clone().unwrap()).stdout(file);
    let mut shell = Process::spawn(&mut command).unwrap();
    shell.wait_within(HANG_LIMIT).expect("the shell ends");
    let output = fs::read_to_string(output).unwrap();
    println!("{output}");
    for wanted in [
        "Connected to QEMU ",
        r#"{"return": {"running": true, "status": "running"}}"#,
        r#""class": "CommandNotFound""#,
        r#"{"return": {}}"#,
    ] {
        assert!(output.contains(wanted), "no {wanted} in: {output}");
    }
    // The shell has no commands of its own: `quit` is that of the monitor.
    assert!(served.daemon.wait().success());
    assert!(!served.socket.exists());
}

#[test]
fn quit_is_answered_and_the_daemon_ends_in_order() {
    let mut served = serve();
    let mode = fs::metadata(&served.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
    let mut lines = Lines::connect(&served.socket);
    lines.send(b"{'execute':'qmp_capabilities'}{'execute':'quit','id':1}");
    assert_eq!(lines.next().unwrap(), json!({ "return": {} }));
    assert_eq!(lines.next().unwrap(), json!({ "return": {}, "id": 1 }));
    assert_eq!(lines.next(), None);
    assert!(served.daemon.wait().success());
    assert!(!served.socket.exists());
}

#[test]
fn several_clients_at_once_and_one_too_many() {
    let served = serve();
    let mut clients: Vec<Monitor> = (0..QMP_CLIENTS_MAX)
        .map(|_| Monitor::connect(&served.socket))
        .collect();
    let mut refused = BufReader::new(UnixStream::connect(&served.socket).unwrap());
    assert_eq!(refused.read_line(&mut String::new()).unwrap(), 0);
    for client in &mut clients {
        client.execute("query-commands", json!({}));
    }
    served.find_a_corrupt_sector();
    for client in &mut clients {
        client
            .wait_for_event(report_of("1.raw"), HANG_LIMIT)
            .expect("each gets the event");
    }
    clients.pop();
    // There is room when the daemon has seen the end of a connection.
    let has_room = wait_until(HANG_LIMIT, || {
        let mut line = String::new();
        BufReader::new(UnixStream::connect(&served.socket).unwrap())
            .read_line(&mut line)
            .unwrap()
            > 0
    });
    assert!(has_room);
}

/// A client that sends any bytes, and accepts only whole lines.
struct Lines(BufReader<UnixStream>);

impl Lines {
    /// Connected and greeted.
    fn connect(socket: &Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(HANG_LIMIT)).unwrap();
        stream.set_write_timeout(Some(HANG_LIMIT)).unwrap();
        let mut lines = Self(BufReader::new(stream));
        assert!(lines.next().unwrap()["QMP"].is_object());
        lines
    }

    fn negotiated(socket: &Path) -> Self {
        let mut lines = Self::connect(socket);
        lines.send(b"{'execute':'qmp_capabilities'}");
        assert_eq!(lines.next().unwrap(), json!({ "return": {} }));
        lines
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        if self.0.read_line(&mut line).unwrap() == 0 {
            return None;
        }
        assert!(line.ends_with("\r\n") && line.is_ascii(), "torn: {line:?}");
        Some(serde_json::from_str(&line).unwrap())
    }

    /// Half-closes, and reads to the end.
    fn rest(mut self) -> Vec<Value> {
        self.0.get_mut().shutdown(Shutdown::Write).unwrap();
        std::iter::from_fn(|| self.next()).collect()
    }
}

#[test]
fn a_client_that_closed_its_writing_side_gets_its_replies() {
    let served = serve();
    let mut lines = Lines::connect(&served.socket);
    lines.send(b"{'execute':'qmp_capabilities'}\n");
    for id in 0..100 {
        lines.send(format!("{{'execute':'query-commands','id':{id}}}\n").as_bytes());
    }
    lines.send(b"{'execute':");
    let replies = lines.rest();
    let ids: Vec<u64> = replies[1..]
        .iter()
        .map(|reply| reply["id"].as_u64().unwrap())
        .collect();
    assert_eq!(ids, (0..100).collect::<Vec<u64>>());
}

#[test]
fn a_misbehaving_client_disturbs_no_other() {
    let mut served = serve();
    let mut witness = Monitor::connect(&served.socket);

    let mut garbage = Lines::connect(&served.socket);
    garbage.send(b"GET / HTTP/1.1\r\n\0\x80\xff\n{\"execute\":\"qmp_capabilities\"}");
    assert_eq!(garbage.next().unwrap()["error"]["class"], "GenericError");
    assert_eq!(garbage.next().unwrap()["error"]["class"], "GenericError");
    assert_eq!(garbage.next().unwrap(), json!({ "return": {} }));

    let mut endless = Lines::connect(&served.socket);
    endless.send(b"{\"");
    // It is dropped while it writes or afterwards.
    let _ = endless
        .0
        .get_mut()
        .write_all(&vec![b'x'; 2 * QMP_MESSAGE_BYTES_MAX]);
    assert_eq!(endless.next().unwrap()["error"]["class"], "GenericError");
    assert!(matches!(endless.0.read(&mut [0]), Ok(0) | Err(_)));

    // It sends commands and does not read: the server stops reading when the socket is full of
    // replies.
    let mut deaf = UnixStream::connect(&served.socket).unwrap();
    deaf.set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    deaf.write_all(b"{'execute':'qmp_capabilities'}").unwrap();
    let command = b"{'execute':'query-commands'}".repeat(100);
    let blocked = (0..10_000).any(|_| deaf.write_all(&command).is_err());
    assert!(blocked, "its commands are queued without bound");

    for _ in 0..50 {
        // Disconnects at once, in the middle of a word, or of a command.
        drop(UnixStream::connect(&served.socket).unwrap());
        let mut hasty = UnixStream::connect(&served.socket).unwrap();
        hasty
            .write_all(b"{'execute':'qmp_capabilities'}{'execute':'query-commands'}{")
            .unwrap();
    }
    witness.execute("query-status", json!({}));
    assert!(served.daemon.is_alive());
    // The daemon ends in order with a client that does not read.
    assert!(served.daemon.terminate().success());
}

/// The monitor alone, in this process.
struct Alone {
    queue: Arc<EventQueue>,
    publisher: Publisher,
    socket: PathBuf,
    _directory: tempfile::TempDir,
}

fn alone() -> (Alone, Receiver<()>, Sender<()>) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("qmp.sock");
    let ((asked, is_asked), (go_on, may_go_on)) = (channel(), channel());
    let may_go_on = Mutex::new(may_go_on);
    // It is slow to quit.
    let operator = Recorder::with_quit(move || {
        asked.send(()).unwrap();
        let _ = may_go_on.lock().unwrap().recv_timeout(HANG_LIMIT);
    });
    let queue = EventQueue::new().unwrap();
    let monitor = publisher::Monitor {
        listener: Listener::Bound(bind_unix_listener(&socket, SocketAccess::OWNER).unwrap()),
        operator: Arc::new(operator),
    };
    let names = Names {
        reference: "quorum0".into(),
        nodes: (0..REPLICAS_MAX).map(|index| format!("ä{index}")).collect(),
    };
    let publisher = Publisher::spawn(None, Some(monitor), queue.clone(), names).unwrap();
    let alone = Alone {
        queue,
        publisher,
        socket,
        _directory: directory,
    };
    (alone, is_asked, go_on)
}

fn error(replica: u8, errno: i32, sector: u64) -> Report {
    Report::Bad {
        replica: ReplicaIndex(replica),
        operation: OperationType::Write,
        range: SectorRange::new(sector, 8),
        cause: Cause::Error(Errno(errno)),
    }
}

#[test]
fn a_slow_command_delays_no_event_and_no_negotiation() {
    let (alone, is_asked, go_on) = alone();
    let mut asking = Lines::negotiated(&alone.socket);
    asking.send(b"{'execute':'quit','id':'slow'}{'execute':'query-status'}");
    is_asked.recv_timeout(HANG_LIMIT).unwrap();
    let mut other = Lines::negotiated(&alone.socket);
    alone.queue.push(error(1, 5, 7));
    for client in [&mut asking, &mut other] {
        let event = client.next().unwrap();
        assert_eq!(
            (&event["event"], &event["data"]["node-name"]),
            (&json!("QUORUM_REPORT_BAD"), &json!("ä1"))
        );
    }
    go_on.send(()).unwrap();
    assert_eq!(
        asking.next().unwrap(),
        json!({ "return": {}, "id": "slow" })
    );
    assert_eq!(asking.next().unwrap()["return"]["status"], "running");
    alone.publisher.stop();
}

#[test]
fn no_event_before_the_negotiation() {
    let (alone, ..) = alone();
    let mut waiting = Lines::connect(&alone.socket);
    alone.queue.push(error(1, 5, 7));
    // The same thread has sent the event when it answers.
    let mut other = Lines::negotiated(&alone.socket);
    alone.queue.push(error(1, 28, 8));
    assert_eq!(other.next().unwrap()["data"]["ret"], -28);
    waiting.send(b"{'execute':'qmp_capabilities'}");
    assert_eq!(waiting.next().unwrap(), json!({ "return": {} }));
    alone.queue.push(error(1, 22, 9));
    assert_eq!(waiting.next().unwrap()["data"]["ret"], -22);
}

#[test]
fn a_client_that_stalls_gets_the_number_of_missed_events() {
    let (alone, ..) = alone();
    let mut stalled = Lines::negotiated(&alone.socket);
    let mut live = Lines::negotiated(&alone.socket);
    // More than the backlog and the socket hold, of so many kinds that nothing is folded.
    const FLOOD: u64 = 10_000;
    let kinds = (1..=100).flat_map(|errno| (0..32).map(move |replica| (replica, errno)));
    for (sector, (replica, errno)) in (0..FLOOD).zip(kinds.cycle()) {
        alone.queue.push(error(replica, errno, sector));
        // A client that reads gets all of them, so none is left in the queue.
        assert_eq!(live.next().unwrap()["data"]["sector-num"], sector);
    }
    // Its commands are answered meanwhile.
    stalled.send(b"{'execute':'query-status','id':0}");
    let reading = std::thread::spawn(move || {
        let (mut told, mut missed, mut answered) = (0, 0, false);
        while let Some(message) = stalled.next() {
            let data = &message["data"];
            if message["event"] == "QUORUM_EVENTS_MISSED" {
                missed += data["missed"].as_u64().unwrap();
            } else if message["event"].is_string() {
                told += 1 + data
                    .get("suppressed")
                    .map_or(0, |count| count.as_u64().unwrap());
            } else {
                answered = true;
            }
            if answered && told + missed == FLOOD {
                return (missed, stalled);
            }
        }
        panic!("{told} told, {missed} missed, answered: {answered}");
    });
    let (missed, _stalled) = reading.join().unwrap();
    assert!(missed > 0, "the flood was too small");
    alone.publisher.stop();
}
