//! The command line as it is written: which options there are, what `--help` says of them, what
//! values they can have.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::{Parser, ValueHint};

use super::{Cache, ReadPattern};
use crate::limits::{NEIGHBOURHOOD_BYTES, QUEUES_MAX};

/// The options as they are written. What they mean together is not known here.
#[derive(Debug, Parser)]
#[command(
    name = "quorum-blkd",
    version,
    about = "Serve several disk images as one voted disk to a virtual machine over vhost-user-blk",
    override_usage = "quorum-blkd --socket-path PATH --blk-file PATH[,node-name=NAME]... [OPTIONS]\n       \
                      quorum-blkd --print-capabilities",
    after_help = "Environment:\n  QUORUM_BLKD_LOG  log level: error, warn, info, debug or trace\n\n\
                  Sockets passed by a service manager (systemd's socket activation) take the place of --socket-path, --events \
                  and --qmp; they are told apart by their names vhost-user, events and qmp.\n\n\
                  Everything that keeps the disk from being served is told in one line on standard error, \
                  with exit status 1."
)]
pub(super) struct Options {
    /// Listen for the frontend (QEMU, cloud-hypervisor, ...) on a UNIX socket made at PATH
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH", conflicts_with = "fd", help_heading = "Connection")]
    pub(super) socket_path: Option<PathBuf>,

    /// Listen on the inherited file descriptor N, a UNIX socket that listens already
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = clap::value_parser!(RawFd).range(0..), help_heading = "Connection")]
    pub(super) fd: Option<RawFd>,

    /// Replica: a raw image file or a block device. Give one for each replica, in order; all must
    /// have the same size. NAME is the replica's name in events [default: the file name].
    /// Write a comma in PATH or NAME as two
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH[,node-name=NAME]", help_heading = "Replicas")]
    pub(super) blk_file: Vec<OsString>,

    /// Replicas that must hold the same data of a sector for a read, or take a write, to succeed,
    /// 1 to the number N of replicas [default: N/2 rounded down, plus 1]
    #[arg(
        long,
        value_name = "T",
        allow_negative_numbers = true,
        help_heading = "Vote"
    )]
    pub(super) vote_threshold: Option<usize>,

    /// How reads are served
    #[arg(long, value_name = "PATTERN", value_enum, default_value_t = ReadPattern::Quorum, help_heading = "Vote")]
    pub(super) read_pattern: ReadPattern,

    /// Write the data that won the vote over the sectors of replicas that lost it
    #[arg(long, help_heading = "Vote")]
    pub(super) rewrite_corrupted: bool,

    /// Compare two replicas and stop with exit status 1 at the first difference
    #[arg(long, help_heading = "Vote")]
    pub(super) blkverify: bool,

    /// Time in milliseconds after which a replica that does not answer is done without, 10 to
    /// 3600000. It comes back by itself, and what it missed is copied to it
    #[arg(long, value_name = "MS", allow_negative_numbers = true, default_value_t = 1000,
        value_parser = clap::value_parser!(u64).range(10..=3_600_000), help_heading = "Replicas")]
    pub(super) replica_timeout: u64,

    /// How far around damage, on either side, the disk is scrubbed at once, in MiB; 0: not at all
    #[arg(long, value_name = "MIB", allow_negative_numbers = true, default_value_t = NEIGHBOURHOOD_BYTES >> 20,
        value_parser = clap::value_parser!(u64).range(0..=1 << 20), help_heading = "Replicas")]
    pub(super) scrub_around: u64,

    /// Direct I/O (none) or the host's page cache (writeback) for the images
    #[arg(long, value_name = "MODE", value_enum, default_value_t = Cache::None, help_heading = "Replicas")]
    pub(super) cache: Cache,

    /// Name of the voted disk in events
    #[arg(
        long,
        value_name = "NAME",
        default_value = "quorum0",
        help_heading = "Disk"
    )]
    pub(super) node_name: String,

    /// Serve a disk the guest cannot write to
    #[arg(long, help_heading = "Disk")]
    pub(super) read_only: bool,

    /// Serial number the guest sees, at most 20 ASCII characters [default: none]
    #[arg(long, value_name = "S", help_heading = "Disk")]
    pub(super) serial: Option<String>,

    /// Request queues, 1 to 64
    #[arg(long, value_name = "N", allow_negative_numbers = true, default_value_t = 1,
        value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)), help_heading = "Disk")]
    pub(super) num_queues: u16,

    /// Descriptors in each queue, a power of two from 4 to 1024. A request of the guest has at
    /// most 126 data segments, and at most two less than the queue has descriptors
    #[arg(
        long,
        value_name = "N",
        allow_negative_numbers = true,
        default_value_t = 256,
        help_heading = "Disk"
    )]
    pub(super) queue_size: u16,

    /// Tell events, one JSON object a line, to everyone who connects to a UNIX socket made at PATH
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH", help_heading = "Operator")]
    pub(super) events: Option<PathBuf>,

    /// Serve a monitor on a UNIX socket made at PATH: commands and events in the QEMU Machine
    /// Protocol
    #[arg(long, value_hint = ValueHint::FilePath, value_name = "PATH", help_heading = "Operator")]
    pub(super) qmp: Option<PathBuf>,

    /// Serve metrics for Prometheus over HTTP at ADDR: a port, on 127.0.0.1 then, or address:port
    #[arg(long, value_name = "ADDR", value_parser = parse_metrics_address, help_heading = "Operator")]
    pub(super) metrics: Option<SocketAddr>,

    /// Print what this backend can do as JSON, for management software, and exit
    #[arg(long)]
    print_capabilities: bool,

    /// Log more; twice for still more
    #[arg(short, long, action = clap::ArgAction::Count, help_heading = "Operator")]
    pub(super) verbose: u8,
}

/// What the argument parser tells in a paragraph, with advice and usage in further ones, as one
/// line.
pub(super) fn usage_line(error: &clap::Error) -> String {
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
        Err(_) => value.parse().map_err(
            |_| "neither a port nor an address with one, such as 127.0.0.1:9000 or [::1]:9000",
        ),
    }
}
