//! From the replies to a read under the lock to the winner of each sector.

use std::rc::Rc;

use super::context::Core;
use super::repair::bytes_of;
use super::replies::Replies;
use super::survey::Survey;
use crate::common::buffer::Buffer;
use crate::common::runs;
use crate::common::{ReplicaIndex, ReplicaSet, SectorRange};
use crate::quorum::health::Disputed;
use crate::quorum::vote::{Ballot, Verdict};

/// The votes are counted.
#[derive(Debug)]
pub(super) struct Decision {
    pub(super) verdict: Verdict,
    /// The winning bytes, unspecified in undecided sectors. `None` if every sector is undecided.
    pub(super) winner: Option<Rc<Buffer>>,
    /// Where replicas are repaired although they are not at fault (W7).
    pub(super) settled: Vec<(ReplicaIndex, Vec<SectorRange>)>,
    /// The winner must be written to more replicas before the guest may have it: when the repairs
    /// are done, [`Confirmation::take_settled`](super::confirmation::Confirmation::take_settled)
    /// returns it.
    pub(super) waits: bool,
    /// Sectors without a winner on which good replicas differ.
    pub(super) differs: Option<SectorRange>,
}

impl Decision {
    /// The bytes of the range, if every sector has a winner.
    pub(super) fn winner(&self) -> Option<&[u8]> {
        let winner = self.winner.as_ref().filter(|_| self.is_complete());
        winner.map(|buffer| &buffer[..])
    }

    /// Whether every sector has a winner.
    pub(super) fn is_complete(&self) -> bool {
        self.verdict.undecided.is_empty()
    }

    /// From the first sector without a winner to the last.
    pub(super) fn undecided(&self) -> Option<SectorRange> {
        let undecided = &self.verdict.undecided;
        let (first, last) = (undecided.first()?, undecided.last()?);
        Some(SectorRange::new(first.start, last.end() - first.start))
    }
}

/// The ballots of the replicas that succeeded, and of those of which parts were read. Where the
/// votes of doubtful copies may count, also of the other members: what could not be read of a fresh
/// copy counts against them (W7).
pub(super) fn ballots<'a>(
    replies: &'a Replies,
    surveys: &[Survey],
    disputed: &Disputed,
    core: &Core,
) -> Vec<Ballot<'a>> {
    let range = replies.range();
    let surveyed: ReplicaSet = surveys.iter().map(|survey| survey.replica).collect();
    let voters = replies.tally().succeeded().or(surveyed);
    let listed = match disputed.witnessed.is_empty() {
        true => voters,
        false => voters.or(core.shared.members()),
    };
    let stands = core.shared.health(|health| {
        let stand = |replica| Stand {
            stale: health.stale_parts(replica, range),
            doubtful: health.doubtful_parts(replica, range),
            proven: match disputed.proven.is_empty() {
                true => Vec::new(),
                false => health.proven_parts(replica, range),
            },
        };
        listed.iter().map(stand).collect::<Vec<_>>()
    });
    let ballot = |(replica, stand): (ReplicaIndex, Stand)| {
        let survey = surveys.iter().find(|survey| survey.replica == replica);
        let not_read = match survey {
            Some(survey) => survey.not_read(range),
            None if voters.contains(replica) => Vec::new(),
            None => vec![range],
        };
        let votes = runs::common(&stand.doubtful, &disputed.lacking);
        let fresh = runs::without(&disputed.witnessed, &stand.stale);
        Ballot {
            replica,
            bytes: match voters.contains(replica) {
                true => replies.data(replica),
                false => &[],
            },
            stale: runs::union(&runs::without(&stand.stale, &votes), &not_read),
            supporting: runs::common(&votes, &disputed.witnessed),
            unread: runs::common(&fresh, &not_read),
            proven: stand.proven,
            excused: runs::union(&disputed.undecided, &votes),
        }
    };
    listed.iter().zip(stands).map(ballot).collect()
}

/// What is known of a replica's copy of a range.
struct Stand {
    stale: Vec<SectorRange>,
    doubtful: Vec<SectorRange>,
    proven: Vec<SectorRange>,
}

/// Copies the winning versions into one buffer. `None` if every sector is undecided. The bytes of
/// undecided sectors are unspecified and must not be used.
pub(super) fn assemble(replies: &Replies, verdict: &Verdict, core: &Core) -> Option<Buffer> {
    verdict.winners.first()?;
    let range = replies.range();
    let len = usize::try_from(range.bytes()).expect("a fragment fits memory");
    let mut winner = core.pool.take(len);
    for run in &verdict.winners {
        let bytes = bytes_of(run.range, range);
        winner[bytes.clone()].copy_from_slice(&replies.data(run.held_by)[bytes]);
    }
    Some(winner)
}
