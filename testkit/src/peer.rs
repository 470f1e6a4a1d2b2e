//! qemu-storage-daemon with a quorum node: the system this one is compared with.

use crate::HANG_LIMIT;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use serde_json::{Value, json};

use crate::daemon::EventReader;
use crate::plan::{Plan, node_name};
use crate::process::{Process, wait_until};

const PROGRAM: &str = "qemu-storage-daemon";

/// A running qemu-storage-daemon; killed when dropped. What it wrote to stderr is shown when the
/// test fails.
pub struct Peer {
    process: Process,
    socket: PathBuf,
    log: PathBuf,
    monitor: UnixStream,
    barriers: u64,
}

impl Peer {
    /// Serves `images` as one quorum node and returns it with a reader of its QMP events.
    pub fn start(directory: &Path, images: &[PathBuf], plan: &Plan) -> (Self, EventReader) {
        let names = ["peer.sock", "peer.pid", "peer.log"];
        let [socket, ready, log] = names.map(|name| directory.join(name));
        // As standard input and output, because connections to a socket of its own are lost at
        // times.
        let (monitor, its_end) = UnixStream::pair().expect("a pair of sockets");
        let its_output = its_end.try_clone().expect("duplicating a socket");
        // One that has ended leaves them behind.
        for left in [&socket, &ready] {
            let _ = fs::remove_file(left);
        }
        let mut command = Command::new(PROGRAM);
        let direct = if plan.direct { "on" } else { "off" };
        for (index, image) in images.iter().enumerate() {
            let (name, image) = (node_name(index), image.display());
            let node = format!(
                "driver=file,node-name={name},filename={image},aio=io_uring,cache.direct={direct}"
            );
            command.args(["--blockdev", &node]);
        }
        let children: Vec<String> = (0..images.len()).map(node_name).collect();
        let quorum = serde_json::json!({
            "driver": "quorum", "node-name": "quorum0", "children": children,
            "vote-threshold": plan.threshold, "rewrite-corrupted": plan.rewrite_corrupted,
            "read-pattern": if plan.fifo { "fifo" } else { "quorum" },
            "cache": {"direct": plan.direct},
        });
        let mut export = format!(
            "type=vhost-user-blk,id=e,node-name=quorum0,addr.type=unix,addr.path={},\
             writable=on,num-queues={}",
            socket.display(),
            plan.queues
        );
        if plan.iothread {
            command.args(["--object", "iothread,id=t0"]);
            export.push_str(",iothread=t0");
        }
        command
            .args(["--blockdev", &quorum.to_string(), "--export", &export])
            .args(["--chardev", "stdio,id=c", "--monitor", "chardev=c"])
            .arg("--pidfile")
            .arg(&ready)
            .stdin(OwnedFd::from(its_end))
            .stdout(OwnedFd::from(its_output))
            .stderr(File::create(&log).expect("creating the peer's log"));
        let process = Process::spawn(&mut command).unwrap_or_else(|error| {
            panic!(
                "cannot start {PROGRAM} ({error}): install Debian's qemu-utils, or run `make guest`"
            )
        });
        let mut peer = Self {
            process,
            socket,
            log,
            monitor: monitor.try_clone().expect("duplicating a socket"),
            barriers: 0,
        };
        // The last thing that it does before it serves.
        wait_until(HANG_LIMIT, || ready.exists() || !peer.process.is_alive());
        assert!(ready.exists(), "{PROGRAM} does not serve: {}", peer.log());
        negotiate(&monitor).unwrap_or_else(|error| panic!("the monitor of {PROGRAM}: {error}"));
        (peer, EventReader::over(monitor))
    }

    /// Waits for the events of all that has happened so far.
    pub fn sync(&mut self, events: &EventReader) {
        self.execute("query-version", json!({}), events);
    }

    /// Runs a command that has to succeed, and returns what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value, events: &EventReader) -> Value {
        self.barriers += 1;
        let id = self.barriers;
        let message = json!({ "execute": command, "arguments": arguments, "id": id });
        let sent = self.monitor.write_all(format!("{message}\n").as_bytes());
        sent.expect("writing to the monitor");
        let answer = events.wait_for(|line| line["id"] == id, HANG_LIMIT);
        let mut answer = answer.expect("an answer of the monitor");
        assert!(answer["error"].is_null(), "{command}: {answer}");
        answer["return"].take()
    }

    /// The socket for the frontend.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Asks it to end and waits for that.
    pub fn terminate(&mut self) {
        self.process.signal(libc::SIGTERM);
        let status = self.process.wait_within(HANG_LIMIT);
        assert!(
            status.is_some(),
            "{PROGRAM} is still there after {HANG_LIMIT:?}"
        );
    }

    fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).expect("reading the peer's log")).into_owned()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if thread::panicking() {
            println!("--- the stderr of {PROGRAM}\n{}---", self.log());
        }
    }
}

/// Asks the monitor for events.
fn negotiate(mut stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(HANG_LIMIT))?;
    assert!(line(stream)?.contains("QMP"), "no greeting");
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n")?;
    assert!(line(stream)?.contains("return"), "capabilities refused");
    stream.set_read_timeout(None)
}

/// One line, and not a byte more.
fn line(mut stream: &UnixStream) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while !bytes.ends_with(b"\n") {
        stream.read_exact(&mut byte)?;
        bytes.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
