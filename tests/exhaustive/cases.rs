//! The cases: what each replica of a disk replies for one sector.

use std::cmp::Reverse;

/// A version of a sector, numbered in the order in which the replicas hold them.
pub(super) type Version = u8;

/// What a replica has to say of a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// It is stale here and may not vote, or could not be read and is no witness.
    NoVote,
    /// It is fresh here and could not be read.
    Unread {
        /// It has flushed what it holds.
        proven: bool,
    },
    /// It votes for the version it holds.
    Fresh(Version),
    /// The same, and it has flushed it.
    Proven(Version),
    /// It holds a doubtful copy: its vote counts only as W7 says.
    Doubtful(Version),
}

impl Reply {
    /// The version that it votes for.
    pub(super) fn version(self) -> Option<Version> {
        match self {
            Self::Fresh(version) | Self::Proven(version) | Self::Doubtful(version) => Some(version),
            Self::NoVote | Self::Unread { .. } => None,
        }
    }

    /// The version of a replica that is fresh.
    pub(super) fn fresh_version(self) -> Option<Version> {
        self.version()
            .filter(|_| !matches!(self, Self::Doubtful(_)))
    }

    /// The version of a replica that is proven.
    pub(super) fn proven_version(self) -> Option<Version> {
        self.version().filter(|_| matches!(self, Self::Proven(_)))
    }
}

/// Calls `visit` with all cases of `replicas` replicas: each has one of `others`, or holds a
/// version in one of the ways `holds`.
pub(super) fn for_each<T: Copy>(
    replicas: usize,
    others: &[T],
    holds: &[fn(Version) -> T],
    visit: &mut dyn FnMut(&[T]),
) {
    add(replicas, 0, others, holds, &mut Vec::new(), visit);
}

fn add<T: Copy>(
    left: usize,
    versions: Version,
    others: &[T],
    holds: &[fn(Version) -> T],
    case: &mut Vec<T>,
    visit: &mut dyn FnMut(&[T]),
) {
    let Some(left) = left.checked_sub(1) else {
        return visit(case);
    };
    let unversioned = others.iter().map(|other| (*other, versions));
    // A version that is held already, or one more.
    let versioned = (0..=versions).flat_map(|version| {
        let seen = versions.max(version + 1);
        holds.iter().map(move |hold| (hold(version), seen))
    });
    for (reply, versions) in unversioned.chain(versioned) {
        case.push(reply);
        add(left, versions, others, holds, case, visit);
        case.pop();
    }
}

/// How many of `votes` are for this version.
pub(super) fn count(votes: impl Iterator<Item = Option<Version>>, version: Version) -> usize {
    votes.filter(|vote| *vote == Some(version)).count()
}

/// Of the versions that `may_win`, the one with most votes, and between equals the one that the
/// replica listed first holds. The votes are in the order of the replicas.
pub(super) fn most_votes(
    votes: &[Option<Version>],
    may_win: impl Fn(Version) -> bool,
) -> Option<Version> {
    let place = |version| votes.iter().position(|vote| *vote == Some(version));
    let versions = votes.iter().flatten().copied();
    versions
        .filter(|version| may_win(*version))
        .max_by_key(|version| {
            let votes = count(votes.iter().copied(), *version);
            (votes, Reverse(place(*version)))
        })
}
