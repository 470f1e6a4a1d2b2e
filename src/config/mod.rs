//! The command line, read and checked: what comes out is a [`Config`] the daemon can run with.
//!
//! Whether options fit together is decided here, before any file or socket is touched; whether the
//! images fit together is [`replica::file`](crate::replica::file)'s to say.
//!
//! Invariants:
//! - A [`Config`] holds 1 to [`REPLICAS_MAX`] replicas of different node-names, and 1 ≤ t ≤ N.
//! - A refusal displays as one line, whatever the arguments are made of.
//! - `--print-capabilities` and `--help` need no other option.

mod command_line;
mod error;
mod sockets;

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory as _, FromArgMatches as _, ValueEnum};

use self::command_line::{Options, usage_line};
pub use self::error::ConfigError;
use self::sockets::Sockets;
use crate::common::message::Quoted;
use crate::limits::{QUEUE_SIZE_MAX, REPLICAS_MAX, SEGMENTS_MAX};
use crate::replica::file::{OpenOptions, ReplicaSource};

/// What QEMU's docs/interop/vhost-user.rst asks a backend program to tell of itself.
const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;
const CAPABILITIES_OPTION: &str = "--print-capabilities";

/// Length of the string a guest gets for VIRTIO_BLK_T_GET_ID (virtio 1.3, 5.2.6).
const SERIAL_BYTES_MAX: usize = 20;
/// As long as a file name can be, which is the default node-name.
const NODE_NAME_BYTES_MAX: usize = 255;
/// The smallest power of two with room for a request in three descriptors: header, data, status.
const QUEUE_SIZE_MIN: u16 = 4;

/// What the command line asks for.
#[derive(Debug)]
pub enum Parsed {
    /// Serve a disk.
    Run(Box<Config>),
    /// Print this to standard output and end with status 0.
    Print(String),
}

/// A disk to serve, and how. Checked as a whole.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the frontend connects.
    pub listen: Listen,
    /// The replicas, in the order in which they are asked and voted.
    pub replicas: Vec<ReplicaSource>,
    /// Equal versions that make a quorum, and replicas that a write must reach.
    pub vote_threshold: usize,
    /// How reads are served.
    pub read_pattern: ReadPattern,
    /// Write the winner of a vote over what differs.
    pub rewrite_corrupted: bool,
    /// Stop at the first difference between the two replicas.
    pub blkverify: bool,
    /// Name of the voted disk in events.
    pub node_name: String,
    /// The guest may not write.
    pub read_only: bool,
    /// What the guest is told as the serial number; ASCII, at most 20 bytes.
    pub serial: String,
    /// Request queues.
    pub queue_count: u16,
    /// Entries of each queue, a power of two.
    pub queue_size: u16,
    /// Whether the host's page cache is used.
    pub cache: Cache,
    /// Where readers of events connect.
    pub events: Option<Listen>,
    /// Where clients of the monitor connect.
    pub qmp: Option<Listen>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// How many times `-v` was given.
    pub verbosity: u8,
    /// A replica that leaves an operation unanswered for so long is done without until it answers
    /// again.
    pub replica_timeout: Duration,
    /// How far around damage the disk is scrubbed at once.
    pub scrub_around_bytes: u64,
}

impl Config {
    /// How the images are to be opened.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions {
            read_only: self.read_only,
            direct: self.cache == Cache::None,
        }
    }

    /// Data segments a guest request may have, `seg_max` of the config space: with header and
    /// status it must fit into a queue.
    pub fn segments_max(&self) -> u32 {
        SEGMENTS_MAX.min(u32::from(self.queue_size).saturating_sub(2))
    }
}

/// Where somebody connects: the frontend, an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A UNIX socket to be made at this path.
    Path(PathBuf),
    /// A UNIX socket that listens already, inherited under this number.
    Fd(RawFd),
    /// A UNIX socket that listens already, passed by the service manager.
    Passed(PassedSocket),
}

/// What the service manager passes: a descriptor with a name. Whether it is a listening socket
/// shows when it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedSocket {
    /// What it is for: FileDescriptorName= of systemd's socket units.
    pub name: String,
    /// The number of the descriptor.
    pub fd: RawFd,
}

/// How reads are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReadPattern {
    /// Read all replicas and vote on each sector
    Quorum,
    /// Read as many replicas as make a quorum when they agree, the others only when they do not or
    /// are slow
    Threshold,
    /// Read the first replica in order that answers, without a vote
    Fifo,
}

/// The host's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Direct I/O (O_DIRECT), past the host's page cache
    None,
    /// Through the host's page cache; a guest flush writes it back
    Writeback,
}

/// The definition of the command line, for its man page and the completions of shells.
pub fn command_line() -> clap::Command {
    Options::command()
}

impl Config {
    /// Reads a command line, the program's name included. `passed` are the sockets that came with
    /// it.
    pub fn from_args(
        arguments: impl IntoIterator<Item = OsString>,
        passed: Vec<PassedSocket>,
    ) -> Result<Parsed, ConfigError> {
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        // The convention asks to ignore all else, even what would be refused.
        if arguments
            .iter()
            .skip(1)
            .any(|argument| argument == CAPABILITIES_OPTION)
        {
            return Ok(Parsed::Print(format!("{CAPABILITIES}\n")));
        }
        let options = command_line()
            .try_get_matches_from(arguments)
            .and_then(|mut matches| Options::from_arg_matches_mut(&mut matches));
        match options {
            Ok(options) => Ok(Parsed::Run(Box::new(check(options, passed)?))),
            Err(error) if !error.use_stderr() => Ok(Parsed::Print(error.to_string())),
            Err(error) => Err(ConfigError::Usage(usage_line(&error))),
        }
    }
}

/// Whether the options make sense together.
fn check(options: Options, passed: Vec<PassedSocket>) -> Result<Config, ConfigError> {
    let sockets = Sockets::check(&options, passed)?;
    if let Err(reason) = check_node_name(&options.node_name) {
        return Err(ConfigError::NodeName {
            value: options.node_name,
            reason,
        });
    }
    let replicas = check_replicas(&options.blk_file, &options.node_name)?;
    let vote_threshold = options.vote_threshold.unwrap_or(replicas.len() / 2 + 1);
    if !(1..=replicas.len()).contains(&vote_threshold) {
        return Err(ConfigError::Threshold {
            threshold: vote_threshold,
            replicas: replicas.len(),
        });
    }
    if options.blkverify {
        check_blkverify(
            replicas.len(),
            vote_threshold,
            options.read_pattern,
            options.rewrite_corrupted,
        )?;
    }
    if options.rewrite_corrupted && options.read_only {
        return Err(ConfigError::Excluded {
            first: "--rewrite-corrupted",
            second: "--read-only",
            reason: "read-only images are never written to",
        });
    }
    let queue_size = options.queue_size;
    if !queue_size.is_power_of_two() || !(QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&queue_size) {
        return Err(ConfigError::QueueSize(queue_size));
    }
    Ok(Config {
        listen: sockets.listen,
        replicas,
        vote_threshold,
        read_pattern: options.read_pattern,
        rewrite_corrupted: options.rewrite_corrupted,
        blkverify: options.blkverify,
        node_name: options.node_name,
        read_only: options.read_only,
        serial: check_serial(options.serial.unwrap_or_default())?,
        queue_count: options.num_queues,
        queue_size,
        cache: options.cache,
        events: sockets.events,
        qmp: sockets.qmp,
        metrics: options.metrics,
        verbosity: options.verbose,
        replica_timeout: Duration::from_millis(options.replica_timeout),
        scrub_around_bytes: options.scrub_around << 20,
    })
}

fn check_replicas(values: &[OsString], disk_name: &str) -> Result<Vec<ReplicaSource>, ConfigError> {
    if values.is_empty() {
        return Err(ConfigError::NoReplicas);
    }
    if values.len() > REPLICAS_MAX {
        return Err(ConfigError::TooManyReplicas(values.len()));
    }
    let mut replicas: Vec<ReplicaSource> = Vec::with_capacity(values.len());
    for value in values {
        let replica = parse_blk_file(value).map_err(|reason| ConfigError::BlkFile {
            value: value.clone(),
            reason,
        })?;
        for other in &replicas {
            if other.path == replica.path {
                return Err(ConfigError::SamePath(replica.path));
            }
            if other.node_name == replica.node_name {
                return Err(ConfigError::NodeNameTwice {
                    first: other.path.clone(),
                    second: replica.path,
                    node_name: replica.node_name,
                });
            }
        }
        // One namespace, as in QEMU, so that a name alone tells what is meant.
        if replica.node_name == disk_name {
            return Err(ConfigError::NodeNameOfDisk {
                path: replica.path,
                node_name: replica.node_name,
            });
        }
        replicas.push(replica);
    }
    Ok(replicas)
}

/// Takes `PATH[,node-name=NAME]` apart.
fn parse_blk_file(value: &OsStr) -> Result<ReplicaSource, String> {
    let mut fields = split_at_commas(value.as_bytes()).into_iter();
    let path = PathBuf::from(OsString::from_vec(fields.next().unwrap_or_default()));
    if path.as_os_str().is_empty() {
        return Err("the path is empty".to_owned());
    }
    let mut given_name = None;
    for field in fields {
        let Some(name) = field.strip_prefix(b"node-name=") else {
            return Err(format!(
                "the only option after the path is node-name=NAME, not {}; a comma in a path is written as two",
                Quoted(OsStr::from_bytes(&field))
            ));
        };
        if given_name.replace(name.to_vec()).is_some() {
            return Err("node-name is given twice".to_owned());
        }
    }
    let node_name = match given_name {
        Some(name) => {
            String::from_utf8(name).map_err(|_| "the node-name is not valid UTF-8".to_owned())?
        }
        None => default_node_name(&path)?,
    };
    check_node_name(&node_name)
        .map_err(|reason| format!("node-name {}: {reason}", Quoted(&node_name)))?;
    Ok(ReplicaSource { path, node_name })
}

/// Splits in the way of QEMU's options: at single commas, two commas being a literal one.
fn split_at_commas(value: &[u8]) -> Vec<Vec<u8>> {
    let mut fields = Vec::new();
    let mut field = Vec::new();
    let mut bytes = value.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            fields.push(std::mem::take(&mut field));
        } else {
            field.push(byte);
        }
    }
    fields.push(field);
    fields
}

fn default_node_name(path: &Path) -> Result<String, String> {
    let name = path
        .file_name()
        .ok_or("the path has no file name to name the replica after; give node-name=NAME")?;
    let name = name.to_str().ok_or(
        "the file name is not valid UTF-8 and can not name the replica; give node-name=NAME",
    )?;
    Ok(name.to_owned())
}

pub(crate) fn check_node_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("a name has at least one character");
    }
    if name.len() > NODE_NAME_BYTES_MAX {
        return Err("a name has at most 255 bytes");
    }
    if name.contains(char::is_control) {
        return Err("a name has no control characters");
    }
    Ok(())
}

fn check_blkverify(
    replicas: usize,
    threshold: usize,
    read_pattern: ReadPattern,
    rewrite_corrupted: bool,
) -> Result<(), ConfigError> {
    if (replicas, threshold) != (2, 2) {
        return Err(ConfigError::Blkverify {
            replicas,
            threshold,
        });
    }
    if rewrite_corrupted {
        return Err(ConfigError::Excluded {
            first: "--blkverify",
            second: "--rewrite-corrupted",
            reason: "it stops at a difference instead of mending it",
        });
    }
    if read_pattern == ReadPattern::Fifo {
        return Err(ConfigError::Excluded {
            first: "--blkverify",
            second: "--read-pattern fifo",
            reason: "a single replica is read, there is nothing to compare",
        });
    }
    Ok(())
}

fn check_serial(value: String) -> Result<String, ConfigError> {
    let reason = if value.len() > SERIAL_BYTES_MAX {
        "a serial number has at most 20 bytes"
    } else if !value
        .chars()
        .all(|character| character == ' ' || character.is_ascii_graphic())
    {
        "a serial number has printable ASCII characters only"
    } else {
        return Ok(value);
    };
    Err(ConfigError::Serial { value, reason })
}

// Texts above name these figures.
const _: () = assert!(SERIAL_BYTES_MAX == 20 && NODE_NAME_BYTES_MAX == 255);

#[cfg(test)]
mod tests;
