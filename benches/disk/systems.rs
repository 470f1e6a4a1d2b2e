//! The systems that are compared, and how the served ones are started and stopped.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use super::guest::QUEUE_SIZE;
use super::plan::{ReadPattern, Row, Storage, is_varied};
use testkit::daemon::{Daemon, EventReader, replica_arguments};
use testkit::disk::Plan;
use testkit::peer::Peer;

/// A system that is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// quorum-blkd.
    Ours,
    /// quorum-blkd with `--aio threads`, for hosts that forbid io_uring.
    Threads,
    /// qemu-storage-daemon's quorum.
    Peer,
    /// One thread on the files, without vote or guest.
    Ceiling,
}

impl System {
    /// The systems that are measured on `row`, in the order of their turns.
    pub fn of(row: &Row) -> Vec<Self> {
        match row.read_pattern {
            ReadPattern::Quorum if row.is_main() && is_varied(&row.pattern) => {
                vec![Self::Ours, Self::Threads, Self::Peer, Self::Ceiling]
            }
            ReadPattern::Quorum => vec![Self::Ours, Self::Peer, Self::Ceiling],
            ReadPattern::Threshold => vec![Self::Ours, Self::Ceiling],
        }
    }

    /// The name in the output and the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ours => "quorum-blkd",
            Self::Threads => "--aio threads",
            Self::Peer => "qemu-storage-daemon",
            Self::Ceiling => "ceiling",
        }
    }
}

/// A program that serves the disk of a row. Dropping this ends it.
pub struct Server {
    program: Program,
    events: EventReader,
    // Dropped last: it holds the sockets.
    _directory: TempDir,
}

enum Program {
    Ours(Daemon),
    Peer(Peer),
}

impl Server {
    /// Starts quorum-blkd over `images`, with this value of `--aio`.
    pub fn start_ours(row: &Row, images: &[PathBuf], aio: &str) -> Self {
        let mut arguments = replica_arguments(images);
        let [queues, queue_size] = [row.queues.to_string(), QUEUE_SIZE.to_string()];
        // A disk that is busy writing back must not count as one that hangs.
        for argument in [
            "--num-queues",
            &queues,
            "--queue-size",
            &queue_size,
            "--replica-timeout",
            "20000",
            "--aio",
            aio,
        ] {
            arguments.push(argument.into());
        }
        if row.storage != Storage::Disk {
            arguments.extend(["--cache".into(), "writeback".into()]);
        }
        if row.read_pattern == ReadPattern::Threshold {
            arguments.extend(["--read-pattern".into(), "threshold".into()]);
        }
        let directory = tempfile::tempdir().expect("creating a directory");
        let daemon = Daemon::start(directory.path(), arguments);
        Self {
            events: EventReader::connect(daemon.events_socket()),
            program: Program::Ours(daemon),
            _directory: directory,
        }
    }

    /// Starts qemu-storage-daemon over `images`.
    pub fn start_peer(row: &Row, images: &[PathBuf]) -> Self {
        let plan = Plan {
            replicas: row.replicas,
            threshold: row.threshold(),
            queues: row.queues,
            direct: row.storage == Storage::Disk,
            iothread: true,
            ..Plan::default()
        };
        let directory = tempfile::tempdir().expect("creating a directory");
        let (peer, events) = Peer::start(directory.path(), images, &plan);
        Self {
            events,
            program: Program::Peer(peer),
            _directory: directory,
        }
    }

    /// The socket to which the client connects.
    pub fn socket(&self) -> &Path {
        match &self.program {
            Program::Ours(daemon) => daemon.socket(),
            Program::Peer(peer) => peer.socket(),
        }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        match &self.program {
            Program::Ours(daemon) => daemon.id(),
            Program::Peer(peer) => peer.id(),
        }
    }

    /// Ends the program. Panics if a replica lost a vote or failed, because the measurement would
    /// be worthless.
    pub fn end(mut self) {
        match &mut self.program {
            Program::Ours(daemon) => assert!(daemon.terminate().success(), "quorum-blkd failed"),
            // It is killed when dropped: once it had not ended 10 s after SIGTERM.
            Program::Peer(peer) => peer.sync(&self.events),
        }
        let mut events = self.events.all();
        let is_of_vote = |event: &Value| {
            let name = event["event"].as_str();
            name.is_some_and(|name| name.starts_with("QUORUM_"))
        };
        events.retain(is_of_vote);
        assert!(
            events.is_empty(),
            "not all was well with the replicas: {events:?}"
        );
    }
}
