//! Why a disk is not served, each in one line with the next step.

use std::fmt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::Why;
use crate::common::message::{Quoted, QuotedList};
use crate::record::format::Unusable;

/// Why a disk is not served. Each displays as one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// An image that is needed, or that is no member, cannot be opened.
    #[error("{reason}")]
    NotOpened {
        /// The line about it.
        reason: String,
    },
    /// A later version has written a record.
    #[error("cannot use {}: {unusable}; use the version that wrote it", Quoted(.node_name))]
    LaterVersion {
        /// The image.
        node_name: String,
        /// What its record needs.
        unusable: Unusable,
    },
    /// No image has a record that can be used, but one has something in its place.
    #[error(
        "cannot use {}: {unusable}; no other replica has a record, so what it has missed is not \
         known; start with those that have one, or, to take what the images hold for a new disk, \
         quorum-blkctl forget each of them",
        Quoted(.node_name)
    )]
    NoRecord {
        /// The image.
        node_name: String,
        /// What is in the place of its record.
        unusable: Unusable,
    },
    /// Images of two disks.
    #[error(
        "{} is a replica of disk {}, {} is one of disk {}; start each disk with its own replicas",
        Quoted(&.names[0]),
        .disks[0],
        Quoted(&.names[1]),
        .disks[1]
    )]
    TwoDisks {
        /// The two images.
        names: [String; 2],
        /// Their disks.
        disks: [Uuid; 2],
    },
    /// Two images with the record of the same replica.
    #[error(
        "{} and {} are the same replica: one is a copy of the other with its record; start \
         without the copy",
        Quoted(&.names[0]),
        Quoted(&.names[1])
    )]
    Copied {
        /// The two images.
        names: [String; 2],
    },
    /// An image without a record beside others that have one.
    #[error(
        "{} has no record, so it is no replica of this disk; start without it, and have it copied \
         with quorum-blkctl {}",
        Quoted(.node_name),
        ToCopy(.instead_of.as_deref(), .path)
    )]
    NotAMember {
        /// The image.
        node_name: String,
        /// Its path.
        path: PathBuf,
        /// The member that has this name, and no other image.
        instead_of: Option<String>,
    },
    /// An image that is no member any more.
    #[error(
        "{} was removed from disk {disk}, or never added completely; start without it",
        Quoted(.node_name)
    )]
    Removed {
        /// The image.
        node_name: String,
        /// The disk.
        disk: Uuid,
    },
    /// The images were changed independently of each other.
    #[error(
        "the replicas have gone on without each other: {}; {}; start those of one side only, or \
         overwrite all others with one replica by --adopt NODE",
        .0[0],
        .0[1]
    )]
    Split(Box<[Side; 2]>),
    /// So many replicas are missing that they could have gone on without those that are there.
    #[error(
        "{} could have gone on without the other replicas, since the vote threshold is {votes}; \
         start with them, or, if they are lost with what they hold, add --force-start",
        QuotedList(.missing)
    )]
    HistoryUnknown {
        /// The active members without a current record.
        missing: Vec<String>,
        /// The vote threshold of the table in force.
        votes: u8,
    },
    /// Fewer replicas than the vote threshold are to go on with a lower one. Others could have done
    /// so as well.
    #[error(
        "only {voting} of {votes} needed replicas can be used, and {} could have gone on without \
         them with a lower vote threshold as well; start with all, or, if those are lost with what \
         they hold, add --force-start",
        Others(.missing)
    )]
    ThresholdLowered {
        /// The active members without a current record.
        missing: Vec<String>,
        /// How many images may vote.
        voting: usize,
        /// The vote threshold of the table in force.
        votes: u8,
    },
    /// Some of what was being changed at the last end is only on replicas that are missing.
    #[error(
        "only {} may hold some of what was being written when the disk ended, and the others have \
         missed it; start with them, or, if they are lost with what they hold, add --force-start",
        QuotedList(.missing)
    )]
    OnlyCopies {
        /// The members that may hold it.
        missing: Vec<String>,
    },
    /// Many starts in a row were cut short before their table was agreed upon.
    #[error(
        "the last {starts} starts were cut short while other replicas were missing; start with \
         all replicas, or, if those missing are lost with what they hold, add --force-start"
    )]
    CutShort {
        /// How many.
        starts: usize,
    },
    /// Another program has modified so many images that too few may vote.
    #[error(
        "another program has modified {} since the clean end, and only {voting} of {votes} needed \
         replicas are as they were; undo that, or overwrite all others with one replica by \
         --adopt NODE{}",
        QuotedList(.names),
        OfThese(.names, .up_to_date)
    )]
    Modified {
        /// The modified images.
        names: Vec<String>,
        /// Those of them that were up to date before.
        up_to_date: Vec<String>,
        /// How many others may vote.
        voting: usize,
        /// The vote threshold.
        votes: usize,
    },
    /// Too few images may vote.
    #[error(
        "{} of {votes} needed replicas can be used{}; start with those that are missing too, or, \
         if they are lost with what they hold, with a lower --vote-threshold and --force-start",
        .voting.len(),
        Reasons(.others)
    )]
    TooFewCopies {
        /// The images that may vote.
        voting: Vec<String>,
        /// All other members, and why they may not.
        others: Vec<(String, Why)>,
        /// The vote threshold.
        votes: usize,
    },
    /// The image to be taken as the truth has no record of the disk.
    #[error("--adopt {}: no image of this name has a record", Quoted(.node_name))]
    NothingToAdopt {
        /// The name that was given.
        node_name: String,
    },
    /// The image to be taken as the truth is old, and another one is not.
    #[error(
        "--adopt {}: this replica is not up to date ({why}), and {} would be without what another \
         program has modified; adopt one of those, or, to lose what they hold, add --force-start",
        Quoted(.node_name),
        QuotedList(.up_to_date)
    )]
    AdoptsOldData {
        /// The image.
        node_name: String,
        /// What its record and those of the others say.
        why: Why,
        /// The images that are up to date, apart from what another program has modified.
        up_to_date: Vec<String>,
    },
    /// A vote threshold that cannot be reached.
    #[error("--vote-threshold {votes}: the disk has {members} replicas")]
    VotesOutOfRange {
        /// The threshold.
        votes: u8,
        /// How many members the disk has.
        members: usize,
    },
}

/// One of two sides that have gone on without each other.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Side {
    /// The images that are there.
    pub images: Vec<String>,
    /// Its branch.
    pub branch: Uuid,
    /// Its epoch.
    pub epoch: u64,
    /// The members that are active in its table.
    pub active: Vec<String>,
    /// Its other members.
    pub inactive: Vec<String>,
}

impl Refusal {
    pub(super) fn not_opened(reason: &str) -> Self {
        Self::NotOpened {
            reason: reason.to_owned(),
        }
    }

    /// Whether the operator may take one image as the truth instead.
    pub(super) fn can_be_overridden(&self) -> bool {
        matches!(
            self,
            Self::Split(_)
                | Self::HistoryUnknown { .. }
                | Self::ThresholdLowered { .. }
                | Self::OnlyCopies { .. }
                | Self::CutShort { .. }
                | Self::Modified { .. }
                | Self::TooFewCopies { .. }
        )
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { epoch, active, .. } = self;
        write!(f, "{} with epoch {epoch} of ", QuotedList(&self.images))?;
        write!(f, "{} (branch {})", QuotedList(active), self.branch)
    }
}

/// The command that copies the disk to an image. A replica that is missing keeps its name until
/// another one has taken its place.
struct ToCopy<'a>(Option<&'a str>, &'a Path);

impl fmt::Display for ToCopy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(instead_of, path) = self;
        match instead_of {
            None => write!(f, "add {}", Quoted(*path)),
            Some(name) => write!(f, "replace {} {}", Quoted(*name), Quoted(*path)),
        }
    }
}

/// The members that are left out, by name if there is one.
struct Others<'a>(&'a [String]);

impl fmt::Display for Others<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("others"),
            names => QuotedList(names).fmt(f),
        }
    }
}

/// Which of the modified images were up to date, if some were not.
struct OfThese<'a>(&'a [String], &'a [String]);

impl fmt::Display for OfThese<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1 {
            up_to_date if up_to_date.len() == self.0.len() => Ok(()),
            [] => f.write_str("; none of these was up to date"),
            up_to_date => write!(f, "; of these {} were up to date", QuotedList(up_to_date)),
        }
    }
}

struct Reasons<'a>(&'a [(String, Why)]);

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, why) in self.0 {
            write!(f, "; {}: {why}", Quoted(name))?;
        }
        Ok(())
    }
}
