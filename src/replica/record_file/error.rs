//! Why the record of an image cannot be opened, made or written, in one line for the operator.
//!
//! Invariant: who follows the advice loses nothing that the records know, or the text says so. So
//! it never is to delete a record: a disk without records takes all its images for fresh.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::path_in_hex;
use crate::common::message::{Quoted, Reason};
use crate::limits::{DEVICE_NAMED_LIMIT, OPEN_LIMIT, RECORD_BYTES_MAX};
use crate::replica::file::{Kind, NoAnswer};

/// Why a record cannot be used. Each displays as one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A system call has failed.
    #[error(
        "cannot {step} {}: {}{}",
        Quoted(.path),
        Reason(.source),
        access_hint(.source)
    )]
    Failed {
        /// The record, or the directory that it is in.
        path: PathBuf,
        /// What the system call was for.
        step: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// There is no record, and none can be made.
    #[error(
        "there is no room for the record {} of {}: {}; {ELSEWHERE}",
        Quoted(.path),
        Quoted(.image),
        Reason(.source)
    )]
    NoRoom {
        /// The image.
        image: PathBuf,
        /// Where its record would be.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The path of the image does not lead through a directory.
    #[error("no directory is known for the record of {}; {ELSEWHERE}", Quoted(.image))]
    NoDirectory {
        /// The image.
        image: PathBuf,
    },
    /// The names of the block device are not known.
    #[error(
        "udev has not named block device {} within {} s, and its record has such a name; start \
         again when it has",
        Quoted(.image),
        DEVICE_NAMED_LIMIT.as_secs()
    )]
    NoName {
        /// The block device.
        image: PathBuf,
    },
    /// The block device has no name that is the same after a reboot.
    #[error(
        "block device {} may have another name after a reboot, and has neither a link in \
         /dev/disk/by-id nor a serial number or UUID under which its record could be found; give \
         the path of a link that always leads to it, or use --state none (nothing is remembered)",
        Quoted(.image)
    )]
    NoLastingName {
        /// The block device.
        image: PathBuf,
    },
    /// The state directory cannot be opened or made.
    #[error(
        "cannot open state directory {}: {}; {}",
        Quoted(.path),
        Reason(.source),
        if *.is_given { GIVEN } else { ELSEWHERE }
    )]
    StateDirectory {
        /// Its path.
        path: PathBuf,
        /// It is that of `--state-dir`.
        is_given: bool,
        /// The error of the system call.
        source: io::Error,
    },
    /// In the place of the record is another kind of file.
    #[error(
        "{} is {kind}; the record of a replica must be a regular file; move it away",
        Quoted(.path)
    )]
    NotAFile {
        /// The place of the record.
        path: PathBuf,
        /// The kind of file.
        kind: &'static str,
    },
    /// In the place of the record is a file that is none.
    #[error(
        "{} has {bytes} bytes, and a record has at most {RECORD_BYTES_MAX}: it is no record, and \
         in the place of one; move it away",
        Quoted(.path)
    )]
    TooLong {
        /// The place of the record.
        path: PathBuf,
        /// The size of the file.
        bytes: u64,
    },
    /// There is a record beside the image and one in the state directory, or two there.
    #[error(
        "{} has two records, {} and {}; move away the older one, which does not know what has \
         happened since",
        Quoted(.image),
        Quoted(.first),
        Quoted(.second)
    )]
    Two {
        /// The image.
        image: PathBuf,
        /// One record.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// There was no record, and then there was one.
    #[error("another process has made the record {}; stop it, and start again", Quoted(.path))]
    Exists {
        /// The record.
        path: PathBuf,
    },
    /// An unusable record is not replaced, because it cannot be kept.
    #[error(
        "record {} cannot be used, nor kept as {}: {}; move it away",
        Quoted(.path),
        Quoted(.kept),
        Reason(.source)
    )]
    NotKept {
        /// The record.
        path: PathBuf,
        /// What it would have been kept as.
        kept: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The file system has not answered within [`OPEN_LIMIT`].
    #[error(
        "the record of {} does not answer: its file system has not completed a step within {} s",
        Quoted(.image),
        OPEN_LIMIT.as_secs()
    )]
    Silent {
        /// The image.
        image: PathBuf,
    },
    /// The process that opens the record has failed, or there was no memory for the content.
    #[error("cannot open the record of {}: {}", Quoted(.image), Reason(.source))]
    Opener {
        /// The image.
        image: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What to do if a record cannot be in its usual place.
const ELSEWHERE: &str = "name another directory with --state-dir DIR, or use --state none, with \
                         which nothing is remembered about the replicas";

/// What to do about a state directory that is not there.
const GIVEN: &str = "--state-dir must name the directory in which the records of this disk are, or \
                     an empty one for a new disk";

fn access_hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => "; make it readable and writable for this user",
        Some(libc::EROFS) => "; make its file system writable, or use --read-only",
        _ => "",
    }
}

/// What a system call is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::replica) enum Step {
    Look,
    Open,
    Read,
    Write,
    Make,
    Replace,
    Forget,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Self::Look => "look for a record in",
            Self::Open => "open record",
            Self::Read => "read record",
            Self::Write => "write record",
            Self::Make => "make record",
            Self::Replace => "replace record",
            Self::Forget => "rename record",
        }
    }
}

/// What was found wrong, in a form that a socket can carry. Numbers are errnos.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::replica) enum RecordFault {
    Failed(Step, #[serde(with = "path_in_hex")] PathBuf, i32),
    NoDirectory,
    NoName,
    NoLastingName,
    /// The directory, and whether it is that of `--state-dir`.
    StateDirectory(#[serde(with = "path_in_hex")] PathBuf, bool, i32),
    NotAFile(#[serde(with = "path_in_hex")] PathBuf, Kind),
    TooLong(#[serde(with = "path_in_hex")] PathBuf, u64),
    Two(
        #[serde(with = "path_in_hex")] PathBuf,
        #[serde(with = "path_in_hex")] PathBuf,
    ),
    Exists(#[serde(with = "path_in_hex")] PathBuf),
    NotKept(
        #[serde(with = "path_in_hex")] PathBuf,
        #[serde(with = "path_in_hex")] PathBuf,
        i32,
    ),
}

impl RecordFault {
    pub(super) fn of(step: Step, path: PathBuf, errno: Errno) -> Self {
        Self::Failed(step, path, errno.raw_os_error())
    }

    pub(super) fn of_io(step: Step, path: PathBuf, error: &io::Error) -> Self {
        let of_kind = match error.kind() {
            io::ErrorKind::InvalidInput => libc::EINVAL,
            io::ErrorKind::FileTooLarge => libc::EFBIG,
            _ => libc::EIO,
        };
        Self::Failed(step, path, error.raw_os_error().unwrap_or(of_kind))
    }

    /// The same for the operator; `image` is that of the record.
    pub(super) fn about(self, image: PathBuf) -> RecordError {
        let error = io::Error::from_raw_os_error;
        match self {
            Self::Failed(Step::Make, path, errno) => RecordError::NoRoom {
                image,
                path,
                source: error(errno),
            },
            Self::Failed(step, path, errno) => RecordError::Failed {
                path,
                step: step.name(),
                source: error(errno),
            },
            Self::NoDirectory => RecordError::NoDirectory { image },
            Self::NoName => RecordError::NoName { image },
            Self::NoLastingName => RecordError::NoLastingName { image },
            Self::StateDirectory(path, is_given, errno) => RecordError::StateDirectory {
                path,
                is_given,
                source: error(errno),
            },
            Self::NotAFile(path, kind) => RecordError::NotAFile {
                path,
                kind: kind.name(),
            },
            Self::TooLong(path, bytes) => RecordError::TooLong { path, bytes },
            Self::Two(first, second) => RecordError::Two {
                image,
                first,
                second,
            },
            Self::Exists(path) => RecordError::Exists { path },
            Self::NotKept(path, kept, errno) => RecordError::NotKept {
                path,
                kept,
                source: error(errno),
            },
        }
    }
}

impl RecordError {
    pub(super) fn of_no_answer(answer: NoAnswer, image: PathBuf) -> Self {
        match answer {
            NoAnswer::Silent => Self::Silent { image },
            NoAnswer::Ended(source) => Self::Opener { image, source },
        }
    }
}
