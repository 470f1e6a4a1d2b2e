//! The command line as written: its options, their `--help` texts and the values they accept.

use std::error::Error as _;
use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Parser, ValueHint};
use nix::unistd::Group;

use super::sandbox::SandboxOptions;
use super::{Aio, Cache, OnReadError, OnWriteError, ReadPattern, State};
use crate::common::message::Quoted;
use crate::common::time_span::parse_ms;
use crate::limits::{NEIGHBOURHOOD_BYTES, QUEUES_MAX, REPAIR_LIMIT_MIN};

/// The options as written, each valid by itself. `super::check` decides whether they fit together.
#[derive(Debug, Parser)]
#[command(
    name = "quorum-blkd",
    version,
    about = "Serve several disk images as one voted disk to a virtual machine over vhost-user-blk",
    override_usage = "\
        quorum-blkd --socket-path PATH --blk-file PATH[,node-name=NAME]... [OPTIONS]\n       \
        quorum-blkd --print-capabilities\n       \
        quorum-blkd --print-sandbox [OPTIONS]",
    after_help = "\
        Environment:\n  QUORUM_BLKD_LOG  log level, instead of --verbose: off, error, warn, info, \
        debug or trace\n\n\
        A service manager (systemd socket activation) can pass listening sockets instead of \
        --socket-path, --events and --qmp. Name them vhost-user, events and qmp \
        (FileDescriptorName=).\n\n\
        If the disk cannot be served, quorum-blkd prints one line on stderr and exits with \
        status 1."
)]
pub(super) struct Options {
    /// Listen for the frontend (QEMU, cloud-hypervisor, ...) on a UNIX socket created at PATH
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH", conflicts_with = "fd",
        help_heading = "Connection")]
    pub(super) socket_path: Option<PathBuf>,

    /// Permissions of the socket of --socket-path, in octal [default: 600, or 660 with
    /// --socket-group]. A user that may write to the socket can use the disk
    #[arg(long, value_name = "MODE", value_parser = parse_mode, requires = "socket_path",
        conflicts_with = "fd", help_heading = "Connection")]
    pub(super) socket_mode: Option<u32>,

    /// Give the socket of --socket-path to GROUP, a name or a number, so that a VMM of another user
    /// can connect. The daemon must run as root or be a member of the group
    #[arg(long, value_name = "GROUP", value_parser = parse_group, requires = "socket_path",
        conflicts_with = "fd", help_heading = "Connection")]
    pub(super) socket_group: Option<u32>,

    /// Listen for the frontend on inherited file descriptor N, a UNIX socket that already listens
    #[arg(long, value_name = "N", allow_negative_numbers = true,
        value_parser = clap::value_parser!(RawFd).range(0..), help_heading = "Connection")]
    pub(super) fd: Option<RawFd>,

    /// Use the raw image file or block device at PATH as a replica. Repeat the option for each
    /// replica, 1 to 32. The images of a new disk are empty or copies of one image; to serve one
    /// that exists, start with it alone and quorum-blkctl add empty ones. An image may be larger
    /// than the disk, not shorter. NAME identifies the replica in events and commands [default: the
    /// file name]. Write a comma in PATH or NAME as two commas
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH[,node-name=NAME]",
        help_heading = "Replicas")]
    pub(super) blk_file: Vec<OsString>,

    /// Number of replicas that must agree for a read, or store the data for a write, to succeed:
    /// 1 to the number N of replicas [default: that of the records; for a new disk the majority,
    /// N/2 rounded down plus 1, also when replicas are added or removed later]. The records keep
    /// what this option or quorum-blkctl threshold has set, so leaving the option out does not undo
    /// it: quorum-blkctl threshold majority does. Lower it to keep the disk running with fewer good
    /// replicas; raise it to trust only data that more replicas agree on
    #[arg(
        long,
        value_name = "T",
        allow_negative_numbers = true,
        help_heading = "Vote"
    )]
    pub(super) vote_threshold: Option<usize>,

    /// How to serve reads
    #[arg(long, value_name = "PATTERN", value_enum, default_value_t = ReadPattern::Quorum,
        help_heading = "Vote")]
    pub(super) read_pattern: ReadPattern,

    /// Repair sectors that a read finds corrupt or unreadable: write the data that won the vote to
    /// the replicas that lost it. Without this option, the daemon only reports them. If the disk is
    /// new or has no records, the daemon scrubs all of it first, and repairs nothing before that
    /// has ended: the images may not be of one disk
    #[arg(long, help_heading = "Vote")]
    pub(super) rewrite_corrupted: bool,

    /// With --rewrite-corrupted, repair at most this much without being asked: bytes, or with a
    /// suffix K, M, G or T, at least 4K. What is more is reported as the condition repair-limit,
    /// and nothing is repaired until quorum-blkctl scrub --repair. So images that are not of this
    /// disk, or old ones, do not replace the good one that they outvote
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_size,
        help_heading = "Vote")]
    pub(super) repair_limit: u64,

    /// Compare exactly two replicas and exit with status 1 at the first difference (for debugging)
    #[arg(long, help_heading = "Vote")]
    pub(super) blkverify: bool,

    /// Evict a replica that has not answered for this long, from 10ms to 1h; a number without unit
    /// is in milliseconds. It rejoins by itself and is resynced. Raise it for slow disks; lower it
    /// to shorten the pauses of the guest when a replica hangs
    #[arg(long, value_name = "TIME", allow_negative_numbers = true, default_value = "1s",
        value_parser = parse_replica_timeout, help_heading = "Replicas")]
    pub(super) replica_timeout: Duration,

    /// When a read of the guest finds corrupt or unreadable sectors, scrub this much of the disk
    /// before and after them at once, in MiB, 0 to 1048576; 0 turns this off. Raise it if faults
    /// of your disks affect large areas
    #[arg(long, value_name = "MIB", allow_negative_numbers = true,
        default_value_t = NEIGHBOURHOOD_BYTES >> 20, value_parser = parse_scrub_around,
        help_heading = "Replicas")]
    pub(super) scrub_around: u64,

    /// How to access the images
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Cache::None,
        help_heading = "Replicas")]
    pub(super) cache: Cache,

    /// How to read and write the images
    #[arg(long, value_name = "HOW", value_enum, default_value_t = Aio::IoUring,
        help_heading = "Replicas")]
    pub(super) aio: Aio,

    /// Accept images that begin like a qcow2, LUKS or other image that is not raw, and serve their
    /// bytes as they are. For guests that have written such a header to their disk
    #[arg(long, help_heading = "Replicas")]
    pub(super) raw_anyway: bool,

    /// Accept images that are empty, that is hold nothing but zeroes, beside others that hold data.
    /// All of them vote: where most are empty, the data is lost. To make copies of one image,
    /// start with it alone and add each other one with quorum-blkctl add
    #[arg(long, help_heading = "Replicas")]
    pub(super) empty_anyway: bool,

    /// What to remember about the replicas when the daemon ends: `records` has a small file beside
    /// each image, with `none` nothing is remembered. Images that have records are refused with
    /// `none`, since the records would not know what changes then: see quorum-blkctl forget
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = State::Records,
        help_heading = "Records")]
    pub(super) state: State,

    /// Keep records in the directory DIR, which must exist, where they cannot be kept beside their
    /// images: those of block devices, and of images in directories that the daemon cannot write
    /// to. Always name the directory that the disk was first used with, or its records are not
    /// found [default: the one that systemd passes (StateDirectory=), else /var/lib/quorum-blk, for
    /// block devices only]
    #[arg(long, value_hint = ValueHint::DirPath, value_name = "DIR", help_heading = "Records")]
    pub(super) state_dir: Option<PathBuf>,

    /// Start although so many replicas are missing that they could have been in use without those
    /// that are there. If they were, what the guest wrote to them is lost: when they come back,
    /// they are overwritten
    #[arg(long, help_heading = "Records")]
    pub(super) force_start: bool,

    /// Take the image of replica NODE, a node-name, as the truth, although another program has
    /// modified it while the disk was not in use. The data of the other images is lost: they are
    /// overwritten with that of NODE. Has no effect if NODE may vote anyway
    #[arg(long, value_name = "NODE", help_heading = "Records")]
    pub(super) adopt: Option<String>,

    /// Name of the voted disk in events, commands and metrics
    #[arg(
        long,
        value_name = "NAME",
        default_value = "quorum0",
        help_heading = "Disk"
    )]
    pub(super) node_name: String,

    /// Make the disk read-only for the guest, and open the images read-only
    #[arg(long, help_heading = "Disk")]
    pub(super) read_only: bool,

    /// Block size that the guest sees, 512 or 4096. A disk keeps the one that it was first used
    /// with: partition tables and file systems depend on it. Choose 4096 for a new disk on images
    /// that need it for direct I/O, if the firmware of the guest boots from such disks
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = parse_block_size,
        help_heading = "Disk")]
    pub(super) block_size: u32,

    /// Let several virtual machines use the disk at a time. For guests that coordinate their
    /// writes, as cluster file systems do; any other file system is destroyed. A migration works
    /// without
    #[arg(long, help_heading = "Disk")]
    pub(super) shared: bool,

    /// What to do with a read that fails because too few replicas have the data. With stop the disk
    /// serves nothing more, keeps the request, and sends the event BLOCK_IO_ERROR; quorum-blkctl
    /// cont submits it again. Needs --qmp
    #[arg(long, value_name = "ACTION", value_enum, default_value_t = OnReadError::Report,
        help_heading = "Disk")]
    pub(super) rerror: OnReadError,

    /// What to do with a write or discard that fails on too many replicas. stop is as for --rerror;
    /// enospc stops only if an image has no space left, so that the guest does not lose its file
    /// system to a full disk of the host. A flush that fails is always reported: data may be lost.
    /// Needs --qmp
    #[arg(long, value_name = "ACTION", value_enum, default_value_t = OnWriteError::Report,
        help_heading = "Disk")]
    pub(super) werror: OnWriteError,

    /// Serial number that the guest sees, at most 20 printable ASCII characters [default: none]
    #[arg(long, value_name = "S", help_heading = "Disk")]
    pub(super) serial: Option<String>,

    /// Request queues offered, 1 to 64. The VMM uses as many of them as it wants: QEMU one for each
    /// CPU of the guest. One that is not used costs nothing
    #[arg(long, value_name = "N", allow_negative_numbers = true,
        default_value_t = QUEUES_MAX,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)),
        help_heading = "Disk")]
    pub(super) num_queues: u16,

    /// Descriptors expected in each queue, a power of two from 4 to 1024. A request of the guest
    /// has at most 126 data segments, and at most two fewer than this. Queues of any size up to
    /// 1024 are served
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 256,
        help_heading = "Disk"
    )]
    pub(super) queue_size: u16,

    /// Use at most this much memory for the data of requests, over all queues: bytes, or with a
    /// suffix K, M, G or T [default: 512M, or three times the least value if that is more]. The
    /// least is, for each replica and one more, 1028 KiB for each worker (one for each queue, up to
    /// the number of CPUs) and once more. With it each worker has one request in flight at a time
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Disk")]
    pub(super) memory_max: Option<u64>,

    /// Send events, one JSON object per line, to every client of a UNIX socket created at PATH
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH", help_heading = "Operator")]
    pub(super) events: Option<PathBuf>,

    /// Serve a monitor on a UNIX socket created at PATH: commands and events in the QEMU Machine
    /// Protocol. quorum-blkctl needs it
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH", help_heading = "Operator")]
    pub(super) qmp: Option<PathBuf>,

    /// Serve metrics for Prometheus over HTTP at ADDR: a port of 127.0.0.1, or address:port
    #[arg(long, value_name = "ADDR", value_parser = parse_metrics_address,
        help_heading = "Operator")]
    pub(super) metrics: Option<SocketAddr>,

    #[command(flatten)]
    pub(super) security: SandboxOptions,

    /// Print the capabilities of this backend as JSON, for management software, and exit
    #[arg(long)]
    print_capabilities: bool,

    /// Log more: once for level debug, twice for trace [default: info]
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Operator")]
    pub(super) verbose: u8,
}

/// The parser's error in one line: the reason, then the next step.
pub(super) fn usage_line(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let option = context(ContextKind::InvalidArg).unwrap_or("an option");
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    let reason = match error.kind() {
        ErrorKind::UnknownArgument => format!("unexpected argument {}", Quoted(option)),
        ErrorKind::InvalidValue if value.is_empty() => format!("a value is required for {option}"),
        ErrorKind::InvalidValue => format!("invalid value {} for {option}", Quoted(value)),
        ErrorKind::ValueValidation => {
            let why = error.source().map(|source| format!(": {source}"));
            let why = why.unwrap_or_default();
            format!("invalid value {} for {option}{why}", Quoted(value))
        }
        ErrorKind::ArgumentConflict => match context(ContextKind::PriorArg) {
            Some(other) if other != option => format!("{option} cannot be used with {other}"),
            _ => format!("{option} cannot be used multiple times"),
        },
        other => other.to_string(),
    };
    format!("{reason}; {}", advice(error))
}

/// The next step after an error of the parser.
fn advice(error: &clap::Error) -> String {
    match (
        error.get(ContextKind::ValidValue),
        error.get(ContextKind::SuggestedArg),
    ) {
        (Some(ContextValue::Strings(values)), _) if !values.is_empty() => {
            format!("use one of {}", values.join(", "))
        }
        (_, Some(ContextValue::String(option))) => format!("did you mean {option}?"),
        _ => "see quorum-blkd --help".to_owned(),
    }
}

/// Permission bits in octal, as chmod(1) takes them.
fn parse_mode(value: &str) -> Result<u32, &'static str> {
    u32::from_str_radix(value, 8)
        .ok()
        .filter(|mode| *mode <= 0o777)
        .ok_or("expected permissions in octal, such as 660")
}

/// A group by its name or number.
pub(super) fn parse_group(value: &str) -> Result<u32, String> {
    let found = Group::from_name(value).map_err(|error| error.desc().to_owned())?;
    match (found, value.parse()) {
        (Some(group), _) => Ok(group.gid.as_raw()),
        (None, Ok(number)) => Ok(number),
        (None, Err(_)) => Err("there is no such group".to_owned()),
    }
}

fn parse_block_size(value: &str) -> Result<u32, &'static str> {
    match value {
        "512" => Ok(512),
        "4096" | "4k" | "4K" => Ok(4096),
        _ => Err("expected 512 or 4096"),
    }
}

fn parse_replica_timeout(value: &str) -> Result<Duration, &'static str> {
    parse_ms(value, 1)
        .filter(|ms| (10..=3_600_000).contains(ms))
        .map(Duration::from_millis)
        .ok_or("expected a time from 10ms to 1h, such as 500ms, 5s, or 1000 for milliseconds")
}

fn parse_scrub_around(value: &str) -> Result<u64, &'static str> {
    let number = value.parse().ok();
    let number = number.filter(|mib| (0..=1 << 20).contains(mib));
    number.ok_or("expected a number of MiB from 0 to 1048576, such as 4")
}

/// Bytes, in units of 1024.
fn parse_size(value: &str) -> Result<u64, &'static str> {
    let (number, shift) = match value.char_indices().next_back() {
        Some((end, 'k' | 'K')) => (&value[..end], 10),
        Some((end, 'M')) => (&value[..end], 20),
        Some((end, 'G')) => (&value[..end], 30),
        Some((end, 'T')) => (&value[..end], 40),
        _ => (value, 0),
    };
    let is_number = number.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.parse::<u64>().ok().filter(|_| is_number);
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes >= REPAIR_LIMIT_MIN)
        .ok_or("expected a size of at least 4K, such as 16M or 1G")
}

/// A port alone listens on loopback only: metrics have no access control.
fn parse_metrics_address(value: &str) -> Result<SocketAddr, &'static str> {
    match value.parse::<u16>() {
        Ok(port) => Ok((Ipv4Addr::LOCALHOST, port).into()),
        Err(_) => value
            .parse()
            .map_err(|_| "expected a port, or address:port such as 127.0.0.1:9000 or [::1]:9000"),
    }
}
