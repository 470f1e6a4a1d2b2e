//! Why a change of a served disk failed.

use std::io;
use std::path::PathBuf;

use uuid::Uuid;

use super::resize::NotGrown;
use crate::common::message::{Quoted, Reason, counted};
use crate::jobs::{NotStarted, UnknownJob};
use crate::limits::REPLICAS_MAX;
use crate::quorum::health::{NotRemoved, NotThreshold};
use crate::record::format::Unusable;
use crate::replica::file::OpenError;
use crate::replica::record_file::RecordError;

/// Why a change failed. Each displays as one line.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The image cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The disk was started with `--read-only`.
    #[error("the disk is read-only")]
    ReadOnly,
    /// `--blkverify` compares exactly two replicas.
    #[error(
        "cannot change the replicas or the vote threshold: a disk with --blkverify has exactly \
         two replicas, which must agree"
    )]
    Blkverify,
    /// The disk has the maximum of replicas, with those that are being removed.
    #[error(
        "the disk has the maximum of {REPLICAS_MAX} replicas, counting those that are being \
         removed; remove one, and try again some seconds later"
    )]
    Full,
    /// The workers cannot add the file to their io_uring.
    #[error("{} cannot be added to io_uring: {}", Quoted(.node_name), Reason(.source))]
    Register {
        /// The replica.
        node_name: String,
        /// The error of the system.
        source: io::Error,
    },
    /// No replica has this name.
    #[error("the disk has no replica {}", Quoted(.0))]
    UnknownReplica(String),
    /// Another replica has this name.
    #[error("the disk has a replica {} already", Quoted(.0))]
    NameTaken(String),
    /// The vote threshold cannot be this one.
    #[error("the vote threshold {0}")]
    NotThreshold(#[from] NotThreshold),
    /// The disk needs it.
    #[error("{} cannot be removed: {reason}", Quoted(.node_name))]
    Needed {
        /// The replica.
        node_name: String,
        /// The reason.
        reason: NotRemoved,
    },
    /// A job with this replica cannot start.
    #[error("{}: {reason}", Quoted(.node_name))]
    NotStarted {
        /// The replica.
        node_name: String,
        /// The reason.
        reason: NotStarted,
    },
    /// The operator has not said that the data of the other replicas may be lost.
    #[error(
        "in {} of {} without a winner, {} would decide, and what the other replicas hold there \
         would be lost; nothing has changed; to do it, add --force",
        .sectors, counted(*.undecided, "sector"), Quoted(.node_name)
    )]
    NotForced {
        /// The replica.
        node_name: String,
        /// The sectors that it would decide.
        sectors: u64,
        /// The sectors that had no winner when they were last read.
        undecided: u64,
    },
    /// A scrub cannot start.
    #[error(transparent)]
    NotScrubbed(NotStarted),
    /// No job has this id.
    #[error(transparent)]
    UnknownJob(#[from] UnknownJob),
    /// A disk only grows.
    #[error("the disk has {0} bytes and cannot shrink: the data at its end would be lost")]
    Smaller(u64),
    /// The disk cannot have this size.
    #[error("the size must be a multiple of {0} bytes, and less than 8 EiB")]
    Size(u32),
    /// An image still has to get its old size back.
    #[error(
        "a replica has not got its old size back after the last resize, because it does not \
         answer; try again later, or remove the replica"
    )]
    Unsettled,
    /// A replica is missing, so it cannot grow.
    #[error(
        "{} is missing: its image cannot be opened, and all replicas grow, or none; make it \
         available, or remove the replica",
        Quoted(.0)
    )]
    Missing(String),
    /// The record of an image cannot be read or made.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// An earlier change is not in the records.
    #[error(
        "the last change of the disk is not in its records yet, because a replica does not answer; \
         try again later"
    )]
    Unrecorded,
    /// The image is a replica of another disk.
    #[error(
        "{} is a replica of disk {disk}, as its record {} says; use another image, or, if that \
         disk does not need it any more, move its record away",
        Quoted(.path),
        Quoted(.record)
    )]
    OfAnotherDisk {
        /// The image.
        path: PathBuf,
        /// The other disk.
        disk: Uuid,
        /// Its record.
        record: PathBuf,
    },
    /// The image is a replica of this disk.
    #[error(
        "{} is replica {} of this disk; start with it again, and it gets what it has missed, or \
         remove that replica first (quorum-blkctl remove {})",
        Quoted(.path),
        Quoted(.node_name),
        Quoted(.node_name)
    )]
    IsMember {
        /// The image.
        path: PathBuf,
        /// The replica.
        node_name: String,
    },
    /// A later version has written the record of the image.
    #[error("cannot use {}: {unusable}; use the version that wrote it", Quoted(.path))]
    LaterVersion {
        /// The image.
        path: PathBuf,
        /// What its record needs.
        unusable: Unusable,
    },
    /// A replica cannot grow.
    #[error(transparent)]
    NotGrown(NotGrown),
}
