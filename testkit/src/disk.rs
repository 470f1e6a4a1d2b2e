//! A voted disk under test, ours or the peer's: the same images, the same client, the same faults.

use crate::HANG_LIMIT;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::Client;
use crate::daemon::{Daemon, EventReader};
use crate::fuse::{Fault, FaultGuard, FuseImage, Operation};
use crate::images::create_images;
use crate::monitor::Monitor;
use crate::peer::Peer;
use crate::process::wait_until;
use crate::programs;

pub use crate::plan::{Plan, node_name};

/// The monitor of ours, in the directory of the disk.
const MONITOR_SOCKET: &str = "qmp.sock";

/// Which program serves the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// quorum-blkd.
    Ours,
    /// qemu-storage-daemon.
    Peer,
}

/// A disk that is served.
pub struct Disk {
    // The order of these is the order in which they are dropped: a process can not end while its
    // file hangs.
    _fault_guards: Vec<FaultGuard>,
    program: RefCell<Program>,
    socket: PathBuf,
    events: EventReader,
    faulty: Vec<(usize, FuseImage)>,
    /// The real files, also of replicas served over FUSE.
    pub images: Vec<PathBuf>,
    /// The files that the program was given.
    served: Vec<PathBuf>,
    plan: Plan,
    directory: TempDir,
}

enum Program {
    Ours(Daemon),
    Peer(Peer),
}

impl Program {
    fn start(
        system: System,
        directory: &Path,
        served: &[PathBuf],
        plan: &Plan,
    ) -> (Self, PathBuf, EventReader) {
        match system {
            System::Ours => {
                let mut arguments = plan.arguments(served);
                // Tests connect further clients beside the one that works.
                arguments.push("--shared".into());
                arguments.extend(["--qmp".into(), directory.join(MONITOR_SOCKET).into()]);
                let daemon = Daemon::start(directory, arguments);
                if plan.rewrites() && plan.replicas > 1 {
                    daemon.wait_until_compared();
                }
                let socket = daemon.socket().to_owned();
                let events = EventReader::connect(daemon.events_socket());
                (Self::Ours(daemon), socket, events)
            }
            System::Peer => {
                let (peer, events) = Peer::start(directory, served, plan);
                let socket = peer.socket().to_owned();
                (Self::Peer(peer), socket, events)
            }
        }
    }
}

impl Disk {
    /// Serves new images.
    pub fn start(system: System, plan: &Plan) -> Self {
        let directory = tempfile::tempdir().expect("creating a directory");
        let images = create_images(directory.path(), plan.replicas, plan.size_bytes);
        Self::serve(system, plan, images, directory)
    }

    /// Serves three new images with ours. The second one hangs with a write of eight sectors, and
    /// is evicted when this returns; it answers when its faults are cleared.
    pub fn with_evicted_replica(replica_timeout: Duration) -> (Self, Client) {
        let plan = Plan {
            faulty: vec![1],
            replica_timeout,
            ..Plan::default()
        };
        let disk = Self::start(System::Ours, &plan);
        disk.faulty(1).inject(Operation::Write, Fault::Hang);
        let mut client = disk.connect();
        let written = client.write(0, 0, &[1; 4096]);
        written.expect("the others hold the write");
        (disk, client)
    }

    /// Serves these images with ours.
    pub fn over(plan: &Plan, images: Vec<PathBuf>) -> Self {
        let directory = tempfile::tempdir().expect("creating a directory");
        Self::serve(System::Ours, plan, images, directory)
    }

    fn serve(system: System, plan: &Plan, images: Vec<PathBuf>, directory: TempDir) -> Self {
        let faulty: Vec<_> = plan
            .faulty
            .iter()
            .map(|&index| match plan.plain_fuse {
                true => (index, FuseImage::serve_plainly(&images[index])),
                false => (index, FuseImage::serve(&images[index])),
            })
            .collect();
        let mut served = images.clone();
        for (index, image) in &faulty {
            served[*index] = image.path();
        }
        let (program, socket, events) = Program::start(system, directory.path(), &served, plan);
        Self {
            _fault_guards: faulty
                .iter()
                .map(|(_, image)| image.fault_guard())
                .collect(),
            program: RefCell::new(program),
            socket,
            events,
            faulty,
            images,
            served,
            plan: plan.clone(),
            directory,
        }
    }

    /// Kills the peer and starts it again over the same images: its events count from here.
    pub fn restart_peer(&mut self) {
        let directory = self.directory.path();
        let program = self.program.get_mut();
        if let Program::Peer(peer) = program {
            peer.terminate();
            (*program, self.socket, self.events) =
                Program::start(System::Peer, directory, &self.served, &self.plan);
        }
    }

    /// Waits until the peer has sent the events of all that has happened so far.
    pub fn sync_peer(&self) {
        if let Program::Peer(peer) = &mut *self.program.borrow_mut() {
            peer.sync(&self.events);
        }
    }

    /// A client with all queues of the disk.
    pub fn connect(&self) -> Client {
        Client::connect(&self.socket, self.plan.queues)
    }

    /// What the daemon wrote to its log so far.
    pub fn log(&self) -> String {
        match &*self.program.borrow() {
            Program::Ours(daemon) => daemon.log(),
            Program::Peer(_) => panic!("the peer has no log of the daemon"),
        }
    }

    /// The process that serves it.
    pub fn process_id(&self) -> u32 {
        match &*self.program.borrow() {
            Program::Ours(daemon) => daemon.id(),
            Program::Peer(peer) => peer.id(),
        }
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The monitor of ours.
    pub fn monitor(&self) -> Monitor {
        Monitor::connect(&self.monitor_socket())
    }

    /// The socket of the monitor of ours.
    pub fn monitor_socket(&self) -> PathBuf {
        self.directory.path().join(MONITOR_SOCKET)
    }

    /// The state of ours (`query-quorum`).
    pub fn state(&self) -> Value {
        self.monitor().execute("query-quorum", json!({}))
    }

    /// The state as soon as it `is_wanted`.
    pub fn state_when(&self, mut is_wanted: impl FnMut(&Value) -> bool) -> Value {
        let mut monitor = self.monitor();
        let mut state = Value::Null;
        let came = wait_until(HANG_LIMIT, || {
            state = monitor.execute("query-quorum", json!({}));
            is_wanted(&state)
        });
        assert!(came, "{state:#}");
        state
    }

    /// Runs a command of `quorum-blkctl` on ours: its exit code, and all that it printed.
    pub fn blkctl(&self, arguments: &[&str]) -> (i32, String) {
        let output = programs::command(programs::BLKCTL)
            .env("QUORUM_BLK_QMP", self.directory.path().join(MONITOR_SOCKET))
            .args(arguments)
            .output()
            .expect("running quorum-blkctl");
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.code().expect("it ended by itself"), text)
    }

    /// Has the peer execute a query.
    pub fn ask_peer(&self, command: &str, arguments: Value) -> Value {
        match &mut *self.program.borrow_mut() {
            Program::Peer(peer) => peer.execute(command, arguments, &self.events),
            Program::Ours(_) => panic!("not the peer"),
        }
    }

    /// The replica `index` of those that are served over FUSE.
    pub fn faulty(&self, index: usize) -> &FuseImage {
        let found = self.faulty.iter().find(|(replica, _)| *replica == index);
        &found.expect("served over FUSE").1
    }

    /// All events of the vote so far.
    pub fn events(&self) -> Vec<Value> {
        of_the_vote(self.events.all())
    }

    /// The first event of this name and, for QUORUM_REPORT_BAD, replica.
    pub fn wait_for(&self, name: &str, replica: Option<usize>) -> Value {
        let node = replica.map(node_name);
        let wanted = |event: &Value| {
            let named = node
                .as_ref()
                .is_none_or(|node| event["data"]["node-name"] == *node);
            event["event"] == name && named
        };
        let event = self.events.wait_for(wanted, HANG_LIMIT);
        event.unwrap_or_else(|| panic!("no {name} of {node:?}, but {:?}", self.events()))
    }

    /// Ends the program as an operator does, and returns all events of the vote that there were.
    pub fn end(&self) -> Vec<Value> {
        match &mut *self.program.borrow_mut() {
            Program::Ours(daemon) => assert!(daemon.terminate().success()),
            Program::Peer(peer) => peer.terminate(),
        }
        of_the_vote(self.events.all_until_closed())
    }

    /// Ends ours, whose last flush may fail. Returns whether it has not.
    pub fn end_even_unflushed(&self) -> bool {
        let Program::Ours(daemon) = &mut *self.program.borrow_mut() else {
            panic!("not ours");
        };
        let success = daemon.terminate().success();
        let log = daemon.log();
        assert!(success || log.contains("the last flush failed"), "{log}");
        success
    }
}

fn of_the_vote(mut events: Vec<Value>) -> Vec<Value> {
    events.retain(is_of_the_vote);
    events
}

/// Whether the event says that a replica or a request failed. That a replica was evicted or
/// rejoined also depends on the machine.
pub fn is_of_the_vote(event: &Value) -> bool {
    let name = event["event"].as_str().unwrap_or_default();
    name.starts_with("QUORUM_") && !name.starts_with("QUORUM_REPLICA_")
}
