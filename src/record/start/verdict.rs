//! What a start makes of an image.

use std::fmt;

use serde::Serialize;
use uuid::Uuid;

use crate::record::Stale;

/// What a start makes of an image of the command line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// Which member it is.
    pub member: Uuid,
    /// Why it is stale, or that it is not.
    pub why: Why,
    /// Where it is stale.
    pub stale: Stale,
    /// Where it is doubtful, and not stale.
    pub doubtful: Stale,
}

/// Why a replica is stale, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// It is stale nowhere.
    Fresh,
    /// It has missed changes in known places.
    MissedChanges,
    /// A flush that failed may have lost changes in known places, or not.
    Doubtful,
    /// It has to be copied as a whole: it was not complete, or has missed changes everywhere.
    Incomplete,
    /// It cannot be opened.
    Missing,
    /// Another program has modified it after a clean end.
    Modified,
    /// Its record is older than one that it once had: the image was restored from a copy.
    Restored,
    /// A start without it was forced.
    OlderBranch,
    /// Its record cannot be used.
    NoRecord,
    /// Another image was taken as the truth.
    NotAdopted,
}

impl Verdict {
    /// Whether it may vote somewhere. A doubtful copy does where fewer than the vote threshold are
    /// fresh (W7).
    pub fn votes(&self) -> bool {
        self.why.votes()
    }
}

impl Why {
    /// As [`Verdict::votes`].
    pub(super) fn votes(self) -> bool {
        matches!(self, Self::Fresh | Self::MissedChanges | Self::Doubtful)
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fresh => "up to date",
            Self::MissedChanges => "has missed changes",
            Self::Doubtful => "may have lost changes in a failed flush",
            Self::Incomplete => "has to be copied as a whole",
            Self::Missing => "missing",
            Self::Modified => "modified by another program since its clean end",
            Self::Restored => "restored from an older copy",
            Self::OlderBranch => "left behind by a forced start",
            Self::NoRecord => "its record cannot be used",
            Self::NotAdopted => "another replica was taken as the truth",
        })
    }
}
