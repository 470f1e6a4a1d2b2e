//! The command line, read and checked: what comes out is a [`Config`] the daemon can run with.
//!
//! Whether options fit together is decided here, before any file or socket is touched; whether the images
//! fit together is [`replica::file`](crate::replica::file)'s to say.
//!
//! Invariants:
//! - A [`Config`] holds 1 to [`REPLICAS_MAX`] replicas of different node-names, and 1 ≤ t ≤ N.
//! - A refusal displays as one line, whatever the arguments are made of.
//! - `--print-capabilities` and `--help` need no other option.

use std::ffi::{OsStr, OsString};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{CommandFactory as _, FromArgMatches as _, Parser, ValueEnum};

use crate::limits::{
    NEIGHBOURHOOD_BYTES, QUEUE_SIZE_MAX, QUEUES_MAX, REPLICAS_MAX, SEGMENTS_MAX, SOCKET_PATH_BYTES_MAX,
};
use crate::message::Quoted;
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
    /// Socket on which events are told.
    pub events: Option<PathBuf>,
    /// Socket of the monitor.
    pub qmp: Option<PathBuf>,
    /// Where metrics are served.
    pub metrics: Option<SocketAddr>,
    /// How many times `-v` was given.
    pub verbosity: u8,
    /// A replica that leaves an operation unanswered for so long is done without until it answers again.
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

    /// Data segments a guest request may have, `seg_max` of the config space: with header and status it
    /// must fit into a queue.
    pub fn segments_max(&self) -> u32 {
        SEGMENTS_MAX.min(u32::from(self.queue_size).saturating_sub(2))
    }
}

/// Where the frontend connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A UNIX socket to be made at this path.
    Path(PathBuf),
    /// A UNIX socket that listens already, inherited under this number.
    Fd(RawFd),
}

/// How reads are served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReadPattern {
    /// Read all replicas and vote on each sector
    Quorum,
    /// Read as many replicas as make a quorum when they agree, the others only when they do not or are slow
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

/// Why a command line is refused. Each displays as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a command line of this program: an unknown option, a value that is none.
    #[error("{0}")]
    Usage(String),
    /// Neither `--socket-path` nor `--fd`.
    #[error("no socket to serve the disk on; give --socket-path PATH or --fd N")]
    NoSocket,
    /// The path of a socket is empty or longer than the kernel takes.
    #[error(
        "{option} {}: the path of a socket has 1 to {SOCKET_PATH_BYTES_MAX} bytes",
        Quoted(.path)
    )]
    SocketPathLength {
        /// The option.
        option: &'static str,
        /// Its value.
        path: PathBuf,
    },
    /// Two sockets at one path.
    #[error("{first} and {second} are both {}; each socket needs its own path", Quoted(.path))]
    OneSocketPath {
        /// One of the options.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// The value of both.
        path: PathBuf,
    },
    /// No `--blk-file`.
    #[error("no image to serve; give --blk-file PATH once for each replica")]
    NoReplicas,
    /// More replicas than a disk can have.
    #[error("{0} replicas; a disk can have at most {REPLICAS_MAX}")]
    TooManyReplicas(usize),
    /// A `--blk-file` that can not be read.
    #[error("--blk-file {}: {reason}", Quoted(.value))]
    BlkFile {
        /// The value of the option.
        value: OsString,
        /// What is wrong with it.
        reason: String,
    },
    /// One path twice.
    #[error("--blk-file {} is given twice; each replica needs its own image", Quoted(.0))]
    SamePath(PathBuf),
    /// Two replicas of one name.
    #[error(
        "replicas {} and {} would both have the node-name {}; tell them apart with node-name=NAME",
        Quoted(.first),
        Quoted(.second),
        Quoted(.node_name)
    )]
    NodeNameTwice {
        /// The replica listed first.
        first: PathBuf,
        /// The other.
        second: PathBuf,
        /// The name of both.
        node_name: String,
    },
    /// A replica named like the disk.
    #[error(
        "replica {} has the node-name of the voted disk, {}; choose another with node-name=NAME or --node-name",
        Quoted(.path),
        Quoted(.node_name)
    )]
    NodeNameOfDisk {
        /// The replica.
        path: PathBuf,
        /// The name of both.
        node_name: String,
    },
    /// A `--node-name` that is no name.
    #[error("--node-name {}: {reason}", Quoted(.value))]
    NodeName {
        /// The value of the option.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// t out of range.
    #[error("--vote-threshold {threshold} is out of range; with {replicas} {} it can be 1 to {replicas}",
        if *.replicas == 1 { "replica" } else { "replicas" })]
    Threshold {
        /// The threshold asked for.
        threshold: usize,
        /// Number of replicas.
        replicas: usize,
    },
    /// `--blkverify` without N = t = 2.
    #[error(
        "--blkverify compares exactly two replicas with a vote threshold of 2, not {replicas} with a threshold of {threshold}"
    )]
    Blkverify {
        /// Number of replicas.
        replicas: usize,
        /// The threshold, given or default.
        threshold: usize,
    },
    /// Two options that exclude each other.
    #[error("{first} cannot be used with {second}: {reason}")]
    Excluded {
        /// One of the options.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// A serial number that virtio can not carry.
    #[error("--serial {}: {reason}", Quoted(.value))]
    Serial {
        /// The value of the option.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A queue size that is no power of two in range.
    #[error("--queue-size {0} is not a power of two from {QUEUE_SIZE_MIN} to {QUEUE_SIZE_MAX}")]
    QueueSize(u16),
}

/// The options as they are written. What they mean together is up to [`check`].
#[derive(Debug, Parser)]
#[command(
    name = "quorum-blkd",
    version,
    about = "Serve several disk images as one voted disk to a virtual machine over vhost-user-blk",
    override_usage = "quorum-blkd --socket-path PATH --blk-file PATH[,node-name=NAME]... [OPTIONS]\n       \
                      quorum-blkd --print-capabilities",
    after_help = "Environment:\n  QUORUM_BLKD_LOG  log level: error, warn, info, debug or trace\n\n\
                  Everything that keeps the disk from being served is told in one line on standard error, \
                  with exit status 1."
)]
struct Options {
    /// Listen for the frontend (QEMU, cloud-hypervisor, ...) on a UNIX socket made at PATH
    #[arg(long, value_name = "PATH", conflicts_with = "fd", help_heading = "Connection")]
    socket_path: Option<PathBuf>,

    /// Listen on the inherited file descriptor N, a UNIX socket that listens already
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(RawFd).range(0..), help_heading = "Connection")]
    fd: Option<RawFd>,

    /// Replica: a raw image file or a block device. Give one for each replica, in order; all must have the
    /// same size. NAME is the replica's name in events [default: the file name]. Write a comma in PATH or
    /// NAME as two
    #[arg(long, value_name = "PATH[,node-name=NAME]", help_heading = "Replicas")]
    blk_file: Vec<OsString>,

    /// Replicas that must hold the same data of a sector for a read, or take a write, to succeed, 1 to the
    /// number N of replicas [default: N/2 rounded down, plus 1]
    #[arg(long, value_name = "T", allow_negative_numbers = true, help_heading = "Vote")]
    vote_threshold: Option<usize>,

    /// How reads are served
    #[arg(long, value_name = "PATTERN", value_enum, default_value_t = ReadPattern::Quorum, help_heading = "Vote")]
    read_pattern: ReadPattern,

    /// Write the data that won the vote over the sectors of replicas that lost it
    #[arg(long, help_heading = "Vote")]
    rewrite_corrupted: bool,

    /// Compare two replicas and stop with exit status 1 at the first difference
    #[arg(long, help_heading = "Vote")]
    blkverify: bool,

    /// Time in milliseconds after which a replica that does not answer is done without, 10 to 3600000. It comes
    /// back by itself, and what it missed is copied to it
    #[arg(long, value_name = "MS", allow_negative_numbers = true, default_value_t = 1000,
        value_parser = clap::value_parser!(u64).range(10..=3_600_000), help_heading = "Replicas")]
    replica_timeout: u64,

    /// How far around damage, on either side, the disk is scrubbed at once, in MiB; 0: not at all
    #[arg(long, value_name = "MIB", allow_negative_numbers = true, default_value_t = NEIGHBOURHOOD_BYTES >> 20,
        value_parser = clap::value_parser!(u64).range(0..=1 << 20), help_heading = "Replicas")]
    scrub_around: u64,

    /// Direct I/O (none) or the host's page cache (writeback) for the images
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Cache::None, help_heading = "Replicas")]
    cache: Cache,

    /// Name of the voted disk in events
    #[arg(long, value_name = "NAME", default_value = "quorum0", help_heading = "Disk")]
    node_name: String,

    /// Serve a disk the guest cannot write to
    #[arg(long, help_heading = "Disk")]
    read_only: bool,

    /// Serial number the guest sees, at most 20 ASCII characters [default: none]
    #[arg(long, value_name = "S", help_heading = "Disk")]
    serial: Option<String>,

    /// Request queues, 1 to 64
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)), help_heading = "Disk")]
    num_queues: u16,

    /// Descriptors in each queue, a power of two from 4 to 1024. A request of the guest has at most 126 data
    /// segments, and at most two less than the queue has descriptors
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 256,
        help_heading = "Disk"
    )]
    queue_size: u16,

    /// Tell events, one JSON object a line, to everyone who connects to a UNIX socket made at PATH
    #[arg(long, value_name = "PATH", help_heading = "Operator")]
    events: Option<PathBuf>,

    /// Serve a monitor on a UNIX socket made at PATH: commands and events in the QEMU Machine Protocol
    #[arg(long, value_name = "PATH", help_heading = "Operator")]
    qmp: Option<PathBuf>,

    /// Serve metrics for Prometheus over HTTP at ADDR: a port, on 127.0.0.1 then, or address:port
    #[arg(long, value_name = "ADDR", value_parser = parse_metrics_address, help_heading = "Operator")]
    metrics: Option<SocketAddr>,

    /// Print what this backend can do as JSON, for management software, and exit
    #[arg(long)]
    print_capabilities: bool,

    /// Log more; twice for still more
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Operator")]
    verbose: u8,
}

impl Config {
    /// Reads a command line, the program's name included.
    pub fn from_args(arguments: impl IntoIterator<Item = OsString>) -> Result<Parsed, ConfigError> {
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        // The convention asks to ignore all else, even what would be refused.
        if arguments
            .iter()
            .skip(1)
            .any(|argument| argument == CAPABILITIES_OPTION)
        {
            return Ok(Parsed::Print(format!("{CAPABILITIES}\n")));
        }
        let options = Options::command()
            .try_get_matches_from(arguments)
            .and_then(|mut matches| Options::from_arg_matches_mut(&mut matches));
        match options {
            Ok(options) => Ok(Parsed::Run(Box::new(check(options)?))),
            Err(error) if !error.use_stderr() => Ok(Parsed::Print(error.to_string())),
            Err(error) => Err(ConfigError::Usage(usage_line(&error))),
        }
    }
}

/// What the argument parser tells in a paragraph, with advice and usage in further ones, as one line.
fn usage_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let mut paragraphs = text.split("\n\n");
    let joined = |paragraph: &str| {
        let words: Vec<&str> = paragraph.split(char::is_control).map(str::trim).collect();
        words.join(" ").trim().to_owned()
    };
    let reason = joined(paragraphs.next().unwrap_or_default());
    let reason = reason.strip_prefix("error: ").unwrap_or(&reason);
    let advice = paragraphs
        .map(joined)
        .find_map(|paragraph| paragraph.strip_prefix("tip: ").map(str::to_owned))
        .unwrap_or_else(|| "see quorum-blkd --help".to_owned());
    format!("{reason}; {advice}")
}

/// Without an address other hosts can not connect.
fn parse_metrics_address(value: &str) -> Result<SocketAddr, &'static str> {
    match value.parse::<u16>() {
        Ok(port) => Ok((Ipv4Addr::LOCALHOST, port).into()),
        Err(_) => value
            .parse()
            .map_err(|_| "neither a port nor an address with one, such as 127.0.0.1:9000 or [::1]:9000"),
    }
}

/// Whether the options make sense together.
fn check(options: Options) -> Result<Config, ConfigError> {
    let listen = check_sockets(
        options.socket_path,
        options.fd,
        [("--events", &options.events), ("--qmp", &options.qmp)],
    )?;
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
        listen,
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
        events: options.events,
        qmp: options.qmp,
        metrics: options.metrics,
        verbosity: options.verbose,
        replica_timeout: Duration::from_millis(options.replica_timeout),
        scrub_around_bytes: options.scrub_around << 20,
    })
}

fn check_sockets(
    socket_path: Option<PathBuf>,
    fd: Option<RawFd>,
    others: [(&'static str, &Option<PathBuf>); 2],
) -> Result<Listen, ConfigError> {
    let all = std::iter::once(("--socket-path", &socket_path)).chain(others);
    let mut seen: Vec<(&'static str, &Path)> = Vec::new();
    for (option, path) in all {
        let Some(path) = path.as_deref() else {
            continue;
        };
        if !(1..=SOCKET_PATH_BYTES_MAX).contains(&path.as_os_str().len()) {
            return Err(ConfigError::SocketPathLength {
                option,
                path: path.to_owned(),
            });
        }
        if let Some((first, _)) = seen.iter().find(|(_, other)| *other == path) {
            return Err(ConfigError::OneSocketPath {
                first,
                second: option,
                path: path.to_owned(),
            });
        }
        seen.push((option, path));
    }
    match (socket_path, fd) {
        (Some(path), None) => Ok(Listen::Path(path)),
        (None, Some(fd)) => Ok(Listen::Fd(fd)),
        // Both at once is refused by the parser.
        (None, None) | (Some(_), Some(_)) => Err(ConfigError::NoSocket),
    }
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
        Some(name) => String::from_utf8(name).map_err(|_| "the node-name is not valid UTF-8".to_owned())?,
        None => default_node_name(&path)?,
    };
    check_node_name(&node_name).map_err(|reason| format!("node-name {}: {reason}", Quoted(&node_name)))?;
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
    let name = name
        .to_str()
        .ok_or("the file name is not valid UTF-8 and can not name the replica; give node-name=NAME")?;
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
        return Err(ConfigError::Blkverify { replicas, threshold });
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
