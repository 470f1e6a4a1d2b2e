//! Parses and checks the command line; the result is a [`Config`] that the daemon can run with.
//!
//! This room decides whether the options fit together, before any file or socket is opened.
//! [`replica::file`](crate::replica::file) decides whether the images fit together.
//!
//! Invariants:
//! - A [`Config`] holds 1 to [`REPLICAS_MAX`] replicas with different node-names, and 1 ≤ t ≤ N.
//! - An error displays as one line, whatever bytes the arguments contain.
//! - `--print-capabilities` and `--help` need no other option.

#![forbid(unsafe_code)]

mod command_line;
mod error;
mod records;
mod sandbox;
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
pub use self::records::Records;
pub use self::sandbox::SandboxMode;
use self::sockets::Sockets;
use crate::common::message::Quoted;
use crate::limits::{QUEUE_SIZE_MAX, REPLICAS_MAX, SEGMENTS_MAX};
use crate::replica::file::{ImageDirectories, OpenOptions, ReplicaSource};
use crate::sandbox::User;

/// The output of `--print-capabilities` that QEMU's docs/interop/vhost-user.rst specifies.
const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;
const CAPABILITIES_OPTION: &str = "--print-capabilities";

/// The variable in which systemd passes the directory of StateDirectory=.
const STATE_DIRECTORY: &str = "STATE_DIRECTORY";

/// Length of the reply to VIRTIO_BLK_T_GET_ID (virtio 1.3, 5.2.6).
const SERIAL_BYTES_MAX: usize = 20;
/// The longest file name: the default node-name is the file name.
const NODE_NAME_BYTES_MAX: usize = 255;
/// The smallest power of two that holds the three descriptors of a request: header, data, status.
const QUEUE_SIZE_MIN: u16 = 4;

/// The action that the command line asks for.
#[derive(Debug)]
pub enum Parsed {
    /// Serve a disk.
    Run(Box<Config>),
    /// Print this to standard output and exit with status 0.
    Print(String),
    /// Print what the daemon would give up, with the paths of this disk if one is described, and
    /// exit with status 0.
    PrintSandbox(Option<Box<Config>>),
}

/// A disk to serve and how to serve it. The options fit together.
#[derive(Clone, Debug)]
pub struct Config {
    /// The socket of the frontend.
    pub listen: Listen,
    /// Permission bits of the socket of the frontend, if it is created.
    pub socket_mode: u32,
    /// The group of that socket, if it is not that of the daemon.
    pub socket_group: Option<u32>,
    /// The replicas, in the order of the command line.
    pub replicas: Vec<ReplicaSource>,
    /// Equal versions that win a vote, and replicas that a write must reach.
    pub vote_threshold: usize,
    /// The threshold was not given: it follows the number of replicas.
    pub threshold_follows: bool,
    /// How to serve reads.
    pub read_pattern: ReadPattern,
    /// Repair the replicas that lost a vote.
    pub rewrite_corrupted: bool,
    /// Repair at most so much without being asked, in bytes.
    pub repair_limit_bytes: u64,
    /// Bytes of buffers that all requests may use at a time, if given.
    pub memory_bytes_max: Option<u64>,
    /// What to do with a read that fails.
    pub rerror: OnReadError,
    /// What to do with a write or discard that fails.
    pub werror: OnWriteError,
    /// Exit at the first difference between the two replicas.
    pub blkverify: bool,
    /// Name of the voted disk in events, commands and metrics.
    pub node_name: String,
    /// The guest cannot write.
    pub read_only: bool,
    /// Serial number that the guest sees: ASCII, at most 20 bytes.
    pub serial: String,
    /// The block size that the guest sees: 512 or 4096.
    pub block_bytes: u32,
    /// Several frontends may use the disk at a time.
    pub shared: bool,
    /// Number of request queues.
    pub queue_count: u16,
    /// Descriptors of each queue, a power of two.
    pub queue_size: u16,
    /// Whether to use the host's page cache.
    pub cache: Cache,
    /// How the images are read and written.
    pub aio: Aio,
    /// Accept images that seem to have another format than raw.
    pub raw_anyway: bool,
    /// Accept empty images beside others that hold data.
    pub empty_anyway: bool,
    /// What to do with records.
    pub records: Records,
    /// The socket of the events.
    pub events: Option<Listen>,
    /// The socket of the monitor.
    pub qmp: Option<Listen>,
    /// The address of the metrics.
    pub metrics: Option<SocketAddr>,
    /// What the daemon gives up.
    pub sandbox: SandboxMode,
    /// The user to become.
    pub user: Option<User>,
    /// The images that the monitor may use.
    pub image_directories: ImageDirectories,
    /// How many times `-v` was given.
    pub verbosity: u8,
    /// A replica that has not answered for this long is evicted.
    pub replica_timeout: Duration,
    /// Bytes to scrub before and after corrupt or unreadable sectors that a read finds.
    pub scrub_around_bytes: u64,
}

impl Config {
    /// How to open the images.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions {
            read_only: self.read_only,
            direct: self.cache == Cache::None,
            raw_anyway: self.raw_anyway,
            block_bytes: self.block_bytes,
        }
    }

    /// Data segments that a guest request may have, `seg_max` of the config space: with header and
    /// status, a request must fit into a queue.
    pub fn segments_max(&self) -> u32 {
        SEGMENTS_MAX.min(u32::from(self.queue_size).saturating_sub(2))
    }
}

/// A socket on which a frontend or an operator connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// Create a UNIX socket at this path.
    Path(PathBuf),
    /// An inherited UNIX socket that already listens, by its descriptor.
    Fd(RawFd),
    /// A UNIX socket from the service manager that already listens.
    Passed(PassedSocket),
}

/// A descriptor with a name that the service manager passed. The daemon checks on use that it is a
/// listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassedSocket {
    /// Its purpose: FileDescriptorName= of systemd's socket units.
    pub name: String,
    /// The number of the descriptor.
    pub fd: RawFd,
}

/// How to serve reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ReadPattern {
    /// Read all replicas and vote on each sector
    Quorum,
    /// Read only as many replicas as can win the vote, usually the fastest; read the others too if
    /// these disagree, fail or are slow. Costs less than quorum
    Threshold,
    /// Read the first replica in the list that answers, without a vote. Does not detect corrupt
    /// data
    Fifo,
}

/// What to do with a read that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnReadError {
    /// The guest gets an I/O error
    Report,
    /// The disk stops and holds the request until the command cont
    Stop,
}

/// What to do with a write or discard that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnWriteError {
    /// The guest gets an I/O error
    Report,
    /// The disk stops and holds the request until the command cont
    Stop,
    /// Like stop if an image has no space left, else like report
    Enospc,
}

/// What to remember about the replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum State {
    /// A record for each replica says what it has missed, which replicas belong to the disk, and
    /// where the last writes were
    Records,
    /// Nothing: each start takes all images for complete, also those that have missed writes
    None,
}

/// How to access the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// Direct I/O (O_DIRECT), without the host's page cache
    None,
    /// Through the host's page cache, for file systems without direct I/O; a flush of the guest
    /// writes it back
    Writeback,
}

/// How to read and write the images. The names are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Aio {
    /// With io_uring
    IoUring,
    /// With threads that make a system call for each operation: slower, but works where io_uring
    /// is forbidden
    Threads,
}

/// The definition of the command line, for the man page and the shell completions.
pub fn command_line() -> clap::Command {
    Options::command()
}

impl Config {
    /// Parses a command line, which starts with the program's name. `passed` are the sockets from
    /// the service manager.
    pub fn from_args(
        arguments: impl IntoIterator<Item = OsString>,
        passed: Vec<PassedSocket>,
    ) -> Result<Parsed, ConfigError> {
        let arguments: Vec<OsString> = arguments.into_iter().collect();
        // The specification says to ignore every other option, even an invalid one.
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
            Ok(options) if options.security.print_sandbox => {
                let describes_no_disk = options.blk_file.is_empty();
                match check(options, passed) {
                    Ok(config) => Ok(Parsed::PrintSandbox(Some(Box::new(config)))),
                    Err(_) if describes_no_disk => Ok(Parsed::PrintSandbox(None)),
                    Err(error) => Err(error),
                }
            }
            Ok(options) => Ok(Parsed::Run(Box::new(check(options, passed)?))),
            Err(error) if !error.use_stderr() => Ok(Parsed::Print(error.to_string())),
            Err(error) => Err(ConfigError::Usage(usage_line(&error))),
        }
    }
}

/// Checks that the options fit together.
fn check(options: Options, passed: Vec<PassedSocket>) -> Result<Config, ConfigError> {
    let sockets = Sockets::check(&options, passed)?;
    if let Err(reason) = check_node_name(&options.node_name) {
        return Err(ConfigError::NodeName {
            value: options.node_name,
            reason,
        });
    }
    if sockets.qmp.is_none() {
        let held = [
            (options.rerror != OnReadError::Report, "--rerror"),
            (options.werror != OnWriteError::Report, "--werror"),
        ];
        if let Some((_, option)) = held.iter().find(|(is_held, _)| *is_held) {
            return Err(ConfigError::HeldForEver(option));
        }
    }
    let replicas = check_replicas(&options.blk_file, &options.node_name)?;
    let vote_threshold = check_vote(&options, replicas.len())?;
    let of_service = std::env::var_os(STATE_DIRECTORY);
    let records = records::check(&options, &replicas, of_service.as_deref())?;
    let image_directories = sandbox::image_directories(&options.security, &replicas)?;
    let queue_size = options.queue_size;
    if !queue_size.is_power_of_two() || !(QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX).contains(&queue_size) {
        return Err(ConfigError::QueueSize(queue_size));
    }
    let for_owner_or_group = [0o600, 0o660][usize::from(options.socket_group.is_some())];
    Ok(Config {
        listen: sockets.listen,
        socket_mode: options.socket_mode.unwrap_or(for_owner_or_group),
        socket_group: options.socket_group,
        replicas,
        vote_threshold,
        threshold_follows: options.vote_threshold.is_none() && !options.blkverify,
        read_pattern: options.read_pattern,
        rewrite_corrupted: options.rewrite_corrupted,
        repair_limit_bytes: options.repair_limit,
        memory_bytes_max: options.memory_max,
        rerror: options.rerror,
        werror: options.werror,
        blkverify: options.blkverify,
        node_name: options.node_name,
        read_only: options.read_only,
        serial: check_serial(options.serial.unwrap_or_default())?,
        block_bytes: options.block_size,
        shared: options.shared,
        queue_count: options.num_queues,
        queue_size,
        cache: options.cache,
        aio: options.aio,
        raw_anyway: options.raw_anyway,
        empty_anyway: options.empty_anyway,
        records,
        events: sockets.events,
        qmp: sockets.qmp,
        metrics: options.metrics,
        sandbox: options.security.sandbox,
        user: options.security.user,
        image_directories,
        verbosity: options.verbose,
        replica_timeout: options.replica_timeout,
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
        // One namespace, as in QEMU: a name alone identifies a replica or the disk.
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

/// Parses `PATH[,node-name=NAME]`.
pub(crate) fn parse_blk_file(value: &OsStr) -> Result<ReplicaSource, String> {
    let mut fields = split_at_commas(value.as_bytes()).into_iter();
    let path = PathBuf::from(OsString::from_vec(fields.next().unwrap_or_default()));
    if path.as_os_str().is_empty() {
        return Err("the path is empty".to_owned());
    }
    let mut given_name = None;
    for field in fields {
        let Some(name) = field.strip_prefix(b"node-name=") else {
            return Err(format!(
                "the only option after the path is node-name=NAME, not {}; write a comma in the \
                 path as two commas",
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

/// Splits as QEMU does its options: at single commas; two commas are a literal one.
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
        "the file name is not valid UTF-8 and cannot name the replica; give node-name=NAME",
    )?;
    Ok(name.to_owned())
}

pub(crate) fn check_node_name(name: &str) -> Result<(), &'static str> {
    if name.is_empty() {
        return Err("a name must have at least one character");
    }
    if name.len() > NODE_NAME_BYTES_MAX {
        return Err("a name must have at most 255 bytes");
    }
    if name.contains(char::is_control) {
        return Err("a name must have no control characters");
    }
    Ok(())
}

/// The vote threshold, if it and the options of the vote fit the number of replicas.
fn check_vote(options: &Options, replicas: usize) -> Result<usize, ConfigError> {
    let threshold = options.vote_threshold.unwrap_or(replicas / 2 + 1);
    if !(1..=replicas).contains(&threshold) {
        return Err(ConfigError::Threshold {
            threshold,
            replicas,
        });
    }
    if options.blkverify && (replicas, threshold) != (2, 2) {
        return Err(ConfigError::Blkverify {
            replicas,
            threshold,
        });
    }
    let is_fifo = options.read_pattern == ReadPattern::Fifo;
    let excluded = |first, second, reason| {
        Err(ConfigError::Excluded {
            first,
            second,
            reason,
        })
    };
    if options.blkverify && options.rewrite_corrupted {
        let reason = "it exits at a difference instead of repairing it";
        return excluded("--blkverify", "--rewrite-corrupted", reason);
    }
    if options.blkverify && is_fifo {
        let reason = "fifo reads a single replica, so there is nothing to compare";
        return excluded("--blkverify", "--read-pattern fifo", reason);
    }
    if options.rewrite_corrupted && options.read_only {
        let reason = "read-only images are never written to";
        return excluded("--rewrite-corrupted", "--read-only", reason);
    }
    Ok(threshold)
}

fn check_serial(value: String) -> Result<String, ConfigError> {
    let is_printable = |character: char| character == ' ' || character.is_ascii_graphic();
    let reason = if !value.chars().all(is_printable) {
        "a serial number must have printable ASCII characters only".to_owned()
    } else if let Some((start, _)) = value.split_at_checked(SERIAL_BYTES_MAX)
        && value.len() > SERIAL_BYTES_MAX
    {
        let start = Quoted(start);
        format!("a serial number must have at most 20 bytes, for example {start}")
    } else {
        return Ok(value);
    };
    Err(ConfigError::Serial { value, reason })
}

// The texts above contain these figures.
const _: () = assert!(SERIAL_BYTES_MAX == 20 && NODE_NAME_BYTES_MAX == 255);

#[cfg(test)]
mod tests;
