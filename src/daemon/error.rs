//! Why the daemon cannot start, or why it ended.

#![forbid(unsafe_code)]

use std::io;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::PathBuf;

use crate::common::message::{Quoted, Reason};
use crate::config::PassedSocket;
use crate::control::socket::BindError;
use crate::record::start::Refusal;
use crate::replica::file::OpenError;
use crate::replica::record_file::RecordError;
use crate::sandbox::SandboxError;

/// Why the daemon cannot start, or why it ended. Each is one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A replica cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The records do not allow the start.
    #[error("{refusal}{}", reasons(.left_out))]
    Refused {
        /// Why.
        refusal: Box<Refusal>,
        /// Why some images cannot be used, one line for each.
        left_out: Vec<String>,
    },
    /// An image has a record, and the disk would be changed without it.
    #[error(
        "{} has the record {}, which would not know what changes without records: leave out {}, or \
         take the image out of its disk with quorum-blkctl forget {0}",
        Quoted(.image),
        Quoted(.record),
        .option
    )]
    Recorded {
        /// The image.
        image: PathBuf,
        /// Its record.
        record: PathBuf,
        /// The option with which no records are kept.
        option: &'static str,
    },
    /// A read-only disk has changes that are on too few replicas.
    #[error(
        "the last changes of the disk are not on enough replicas yet: start it without --read-only \
         until they are copied"
    )]
    Uncopied,
    /// A record cannot be made or written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// `--memory-max` is too low for the workers.
    #[error(
        "--memory-max is too low: {workers} workers and {replicas} replicas need {}M at least; \
         give as much, or use less than {workers} queues (--num-queues)",
        .least.div_ceil(1 << 20)
    )]
    MemoryMax {
        /// The number of workers.
        workers: u16,
        /// The number of replicas.
        replicas: usize,
        /// The least value, in bytes.
        least: u64,
    },
    /// The sandbox cannot be applied.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// A socket cannot be created.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Metrics cannot be served at the address.
    #[error("--metrics {address}: cannot listen: {}", Reason(.source))]
    Metrics {
        /// The address.
        address: SocketAddr,
        /// The error of the system.
        source: io::Error,
    },
    /// The descriptor of `--fd` is not a listening socket.
    #[error("--fd {0}: not a listening UNIX stream socket")]
    NotAListener(RawFd),
    /// A descriptor of the service manager is not a listening socket.
    #[error("descriptor {} of the service manager ({}) is not a listening UNIX stream socket",
        .0.fd, Quoted(&.0.name))]
    PassedNoListener(PassedSocket),
    /// The kernel gives no io_uring.
    #[error(
        "cannot start a worker with io_uring: {}{}",
        Reason(.0),
        io_uring_hint(.0)
    )]
    IoUring(#[source] io::Error),
    /// The system returned an error for something that the daemon needs.
    #[error("{what}: {}", Reason(.source))]
    System {
        /// What was being done.
        what: &'static str,
        /// The error of the system.
        source: io::Error,
    },
    /// `--blkverify` found a difference.
    #[error("the replicas differ at sector {0}")]
    ContentsDiffer(u64),
    /// A worker stopped.
    #[error("{0}")]
    Broken(String),
    /// The last flush failed.
    #[error(
        "{}: the last flush failed, and its last writes may be lost: {}",
        Quoted(.path),
        Reason(.source)
    )]
    LastFlush {
        /// The replica.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

fn reasons(lines: &[String]) -> String {
    lines.iter().map(|line| format!("; {line}")).collect()
}

/// The usual causes.
fn io_uring_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            "; it is forbidden, by the sysctl kernel.io_uring_disabled or by a seccomp filter, \
             such as that of a container; allow it, or use --aio threads, which is slower"
        }
        Some(libc::ENOSYS) => {
            "; the kernel has none, or a seccomp filter hides it, such as that of a container; \
             allow it, or use --aio threads, which is slower"
        }
        Some(libc::ENOMEM) => "; raise the limit of locked memory (ulimit -l)",
        _ => "",
    }
}

/// The error of [`Error::System`], for `map_err`.
pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { what, source }
}
