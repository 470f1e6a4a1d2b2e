//! Why the sandbox cannot be applied.

use std::io;
use std::path::PathBuf;

use super::Part;
use crate::common::message::{Quoted, Reason};

/// Why the sandbox cannot be applied. Each is one line for the operator.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// `--sandbox on`, and the kernel lacks a part.
    #[error(
        "--sandbox on: the part {} cannot be had: {why}; use --sandbox auto to go on without it",
        .part.name()
    )]
    Lacking {
        /// The part.
        part: Part,
        /// Why the kernel does not have it.
        why: String,
    },
    /// The kernel refuses a part that it has.
    #[error(
        "the part {} of the sandbox cannot be applied: {}; use --sandbox off to go on without",
        .part.name(),
        Reason(.source)
    )]
    Refused {
        /// The part.
        part: Part,
        /// The error of the system.
        source: io::Error,
    },
    /// A directory that must stay in reach cannot be opened.
    #[error("cannot open the directory {}: {}", Quoted(.path), Reason(.source))]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The user cannot be changed.
    #[error(
        "--user {}: cannot change to this user: {}; start the daemon as root, or leave out --user",
        Quoted(.user),
        Reason(.source)
    )]
    User {
        /// The user as it was given.
        user: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The process has other threads, which would stay outside.
    #[error("internal error: the sandbox is applied in a process of {0} threads")]
    NotAlone(usize),
    /// The threads of the process cannot be counted.
    #[error("cannot read /proc/self/task, which the sandbox needs: {}", Reason(.0))]
    Threads(io::Error),
}
