//! Why a command line is refused: one line for each reason.

use std::ffi::OsString;
use std::path::PathBuf;

use super::{PassedSocket, QUEUE_SIZE_MIN};
use crate::common::message::Quoted;
use crate::limits::{QUEUE_SIZE_MAX, REPLICAS_MAX, SOCKET_PATH_BYTES_MAX};

/// Why a command line is refused. Each displays as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a command line of this program: an unknown option, a value that is none.
    #[error("{0}")]
    Usage(String),
    /// Neither `--socket-path` nor `--fd`, and none was passed.
    #[error("no socket to serve the disk on; give --socket-path PATH or --fd N")]
    NoSocket,
    /// The service manager passed something under a name that says nothing.
    #[error(
        "the service manager passed a socket named {} (descriptor {}); the names known are vhost-user, events and qmp",
        Quoted(&.0.name),
        .0.fd
    )]
    PassedUnknown(PassedSocket),
    /// Two under one name.
    #[error(
        "the service manager passed more than one socket named {}; the second is descriptor {}",
        Quoted(&.0.name),
        .0.fd
    )]
    PassedTwice(PassedSocket),
    /// A socket was passed that there is an option for too.
    #[error(
        "the service manager passed a socket named {}; {option} cannot be used with it",
        Quoted(&.socket.name)
    )]
    PassedAndGiven {
        /// What was passed.
        socket: PassedSocket,
        /// The option for the same purpose.
        option: &'static str,
    },
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
