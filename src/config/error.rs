//! Why a command line is rejected: one line for each reason.

use std::ffi::OsString;
use std::path::PathBuf;

use super::{PassedSocket, QUEUE_SIZE_MIN};
use crate::common::message::{Quoted, Reason};
use crate::limits::{QUEUE_SIZE_MAX, REPLICAS_MAX, SOCKET_PATH_BYTES_MAX};

/// Why a command line is rejected. Each displays as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The parser rejected it: an unknown option, an invalid value.
    #[error("{0}")]
    Usage(String),
    /// A relative path cannot be completed.
    #[error("{}: cannot find the current directory: {}", Quoted(.path), Reason(.source))]
    NotAbsolute {
        /// The path.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// Neither `--socket-path` nor `--fd` nor a passed socket.
    #[error("no socket to serve the disk on; give --socket-path PATH or --fd N")]
    NoSocket,
    /// The service manager passed a socket with an unknown name.
    #[error(
        "the service manager passed a socket named {} (descriptor {}); name it vhost-user, events \
         or qmp",
        Quoted(&.0.name),
        .0.fd
    )]
    PassedUnknown(PassedSocket),
    /// The service manager passed two sockets with one name.
    #[error(
        "the service manager passed more than one socket named {}; the second is descriptor {}",
        Quoted(&.0.name),
        .0.fd
    )]
    PassedTwice(PassedSocket),
    /// The service manager passed a socket, and an option asks for another one.
    #[error(
        "the service manager passed a socket named {}; {option} cannot be used with it, remove \
         one of the two",
        Quoted(&.socket.name)
    )]
    PassedAndGiven {
        /// The passed socket.
        socket: PassedSocket,
        /// The option for the same purpose.
        option: &'static str,
    },
    /// The path of a socket is empty or longer than the kernel accepts.
    #[error(
        "{option} {}: a socket path must have 1 to {SOCKET_PATH_BYTES_MAX} bytes",
        Quoted(.path)
    )]
    SocketPathLength {
        /// The option.
        option: &'static str,
        /// Its value.
        path: PathBuf,
    },
    /// Two sockets have the same path.
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
    /// A `--blk-file` that cannot be parsed.
    #[error("--blk-file {}: {reason}", Quoted(.value))]
    BlkFile {
        /// The value of the option.
        value: OsString,
        /// Why it is invalid.
        reason: String,
    },
    /// Two replicas have the same path.
    #[error("--blk-file {} is given twice; each replica needs its own image", Quoted(.0))]
    SamePath(PathBuf),
    /// Two replicas have the same name.
    #[error(
        "replicas {} and {} would both have the node-name {}; give one of them another with \
         node-name=NAME",
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
    /// A replica has the name of the disk.
    #[error(
        "replica {} has the node-name of the voted disk, {}; choose another with node-name=NAME \
         or --node-name",
        Quoted(.path),
        Quoted(.node_name)
    )]
    NodeNameOfDisk {
        /// The replica.
        path: PathBuf,
        /// The name of both.
        node_name: String,
    },
    /// An invalid `--node-name`.
    #[error("--node-name {}: {reason}", Quoted(.value))]
    NodeName {
        /// The value of the option.
        value: String,
        /// Why it is invalid.
        reason: &'static str,
    },
    /// `--vote-threshold` is out of range.
    #[error(
        "--vote-threshold {threshold} is out of range; with {replicas} {} it can be 1 to \
         {replicas}",
        if *.replicas == 1 { "replica" } else { "replicas" }
    )]
    Threshold {
        /// Its value.
        threshold: usize,
        /// Number of replicas.
        replicas: usize,
    },
    /// `--rerror` or `--werror` without a monitor.
    #[error(
        "{0} other than report needs --qmp: a request that is held waits for a command of the \
         monitor"
    )]
    HeldForEver(&'static str),
    /// `--blkverify` with N or t other than 2.
    #[error(
        "--blkverify compares exactly two replicas with a vote threshold of 2, not {replicas} \
         with a threshold of {threshold}"
    )]
    Blkverify {
        /// Number of replicas.
        replicas: usize,
        /// The threshold, given or default.
        threshold: usize,
    },
    /// Two options exclude each other.
    #[error("{first} cannot be used with {second}: {reason}")]
    Excluded {
        /// One of the options.
        first: &'static str,
        /// The other.
        second: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// `--adopt` names no replica.
    #[error("--adopt {}: no --blk-file has this node-name", Quoted(.0))]
    AdoptUnknown(String),
    /// A serial number that virtio cannot carry.
    #[error("--serial {}: {reason}", Quoted(.value))]
    Serial {
        /// The value of the option.
        value: String,
        /// Why it is invalid.
        reason: String,
    },
    /// A queue size that is out of range or not a power of two.
    #[error("--queue-size {0} is not a power of two from {QUEUE_SIZE_MIN} to {QUEUE_SIZE_MAX}")]
    QueueSize(u16),
}
