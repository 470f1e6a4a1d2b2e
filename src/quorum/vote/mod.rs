//! The vote per sector (contract R2, R3).
//!
//! Called only where replies differ or where some replicas may not vote: equal buffers never come
//! here. Each sector is decided alone, so that two replicas that are corrupt in different places do
//! not make a request fail whose sectors all have a winner.

mod verdict;

use sha2::{Digest as _, Sha256};

pub use self::verdict::{Dissent, Verdict, WinningRun};

use self::verdict::{excused, extend, lost, won};
use crate::common::report::Digest;
use crate::common::runs::Cursor;
use crate::common::{ReplicaIndex, SECTOR_BYTES, SectorRange};

const SECTOR_LEN: usize = 512;
const _: () = assert!(SECTOR_LEN as u64 == SECTOR_BYTES);

/// The reply of one replica for the range that is voted on.
#[derive(Debug)]
pub struct Ballot<'a> {
    /// The replica.
    pub replica: ReplicaIndex,
    /// Its bytes, as long as the range.
    pub bytes: &'a [u8],
    /// The parts of the range on which this replica may not vote, in order.
    pub stale: Vec<SectorRange>,
    /// The parts on which its vote counts only for the version that most replicas hold of those
    /// outside of such a part (W7).
    pub supporting: Vec<SectorRange>,
    /// The parts on which it has flushed what it holds: the version of most of these must win too.
    pub proven: Vec<SectorRange>,
    /// The parts on which it would have a vote and could not be read. There it counts as a holder
    /// of another version than the one that supporting votes make win.
    pub unread: Vec<SectorRange>,
    /// The parts on which its version may differ without a fault of the replica (W7).
    pub excused: Vec<SectorRange>,
}

impl<'a> Ballot<'a> {
    /// The reply of a replica whose vote counts wherever it is not stale.
    pub fn new(replica: ReplicaIndex, bytes: &'a [u8], stale: Vec<SectorRange>) -> Self {
        Self {
            replica,
            bytes,
            stale,
            supporting: Vec::new(),
            proven: Vec::new(),
            unread: Vec::new(),
            excused: Vec::new(),
        }
    }
}

/// How a sector's winner is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// The version with at least this many votes; of two such the one with more, then the one that
    /// the replica listed first holds.
    Threshold(usize),
    /// The version of the replica listed first (`read-pattern=fifo`): no replica is outvoted.
    FirstListed,
}

/// The votes with which a version wins whatever the others of `voters` replicas hold (R7).
pub fn decisive_votes(threshold: usize, voters: usize) -> usize {
    threshold.max(voters / 2 + 1)
}

impl Verdict {
    /// Votes again on the sectors without a winner: there are more ballots, or they have a vote on
    /// more. A sector that has a winner keeps it. `any_copy`: as in [`vote`].
    pub fn vote_again(
        &mut self,
        range: SectorRange,
        ballots: &[Ballot<'_>],
        rule: Rule,
        any_copy: &[SectorRange],
    ) {
        let undecided = std::mem::take(&mut self.undecided);
        let mut more = Self::default();
        let mut voters: Vec<Voter<'_>> = ballots.iter().map(Voter::new).collect();
        let mut any_copy = Cursor::new(any_copy);
        for sector in undecided.iter().flat_map(|run| run.start..run.end()) {
            let terms = (rule, any_copy.has(sector));
            vote_on_sector(range.start, sector, &mut voters, terms, &mut more);
        }
        self.undecided = more.undecided;
        self.winners.append(&mut more.winners);
        self.winners.sort_unstable_by_key(|run| run.range.start);
        for dissent in more.dissents {
            self.add_dissent(dissent);
        }
        for (replica, runs) in more.excused {
            self.add_excused(replica, runs);
        }
    }

    /// Compares a ballot with the winner wherever there is one, also where the ballot came too late
    /// to count. `winner` is as long as `range`.
    pub fn compare(&mut self, range: SectorRange, ballot: &Ballot<'_>, rule: Rule, winner: &[u8]) {
        self.dissents
            .retain(|dissent| dissent.replica != ballot.replica);
        self.excused
            .retain(|(replica, _)| *replica != ballot.replica);
        let mut compared = Self::default();
        let mut voter = Voter::new(ballot);
        let winners = self.winners.iter().map(|run| run.range);
        for sector in winners.flat_map(|run| run.start..run.end()) {
            let Some(version) = voter.version(range.start, sector) else {
                continue;
            };
            let offset = offset_of(range.start, sector);
            let winner = &winner[offset..offset + SECTOR_LEN];
            if version.bytes == winner {
                continue;
            }
            if version.excused {
                excused(&mut compared, sector, ballot.replica);
            } else if rule != Rule::FirstListed {
                let digests = [version.bytes, winner].map(|bytes| Sha256::digest(bytes).into());
                lost(
                    &mut compared,
                    sector,
                    ballot.replica,
                    digests[0],
                    digests[1],
                );
            }
        }
        for dissent in compared.dissents {
            self.add_dissent(dissent);
        }
        for (replica, runs) in compared.excused {
            self.add_excused(replica, runs);
        }
    }
}

/// Votes on every sector of `range`. The ballots come in the order in which the replicas were
/// listed. `any_copy`: the parts in which any copy is legal, so that one vote is enough (S5).
pub fn vote(
    range: SectorRange,
    ballots: &[Ballot<'_>],
    rule: Rule,
    any_copy: &[SectorRange],
) -> Verdict {
    let mut verdict = Verdict::default();
    let mut voters: Vec<Voter<'_>> = ballots.iter().map(Voter::new).collect();
    let mut any_copy = Cursor::new(any_copy);
    for sector in range.start..range.end() {
        let terms = (rule, any_copy.has(sector));
        vote_on_sector(range.start, sector, &mut voters, terms, &mut verdict);
    }
    verdict
}

/// A ballot, and how far the vote has come in its lists of runs.
struct Voter<'a> {
    replica: ReplicaIndex,
    bytes: &'a [u8],
    stale: Cursor<'a>,
    supporting: Cursor<'a>,
    proven: Cursor<'a>,
    unread: Cursor<'a>,
    excused: Cursor<'a>,
}

impl<'a> Voter<'a> {
    fn new(ballot: &'a Ballot<'a>) -> Self {
        Self {
            replica: ballot.replica,
            bytes: ballot.bytes,
            stale: Cursor::new(&ballot.stale),
            supporting: Cursor::new(&ballot.supporting),
            proven: Cursor::new(&ballot.proven),
            unread: Cursor::new(&ballot.unread),
            excused: Cursor::new(&ballot.excused),
        }
    }

    /// The bytes of `sector`, or `None` if this replica may not vote on it. Sectors are asked for
    /// in order.
    fn version(&mut self, range_start: u64, sector: u64) -> Option<Version<'a>> {
        if self.stale.has(sector) {
            return None;
        }
        let offset = offset_of(range_start, sector);
        Some(Version {
            replica: self.replica,
            bytes: &self.bytes[offset..offset + SECTOR_LEN],
            only_supports: self.supporting.has(sector),
            proven: self.proven.has(sector),
            excused: self.excused.has(sector),
        })
    }
}

/// Where the bytes of `sector` begin in those of a range from `range_start` on.
fn offset_of(range_start: u64, sector: u64) -> usize {
    usize::try_from(sector - range_start).expect("a fragment fits memory") * SECTOR_LEN
}

#[derive(Clone, Copy)]
struct Version<'a> {
    replica: ReplicaIndex,
    bytes: &'a [u8],
    only_supports: bool,
    proven: bool,
    excused: bool,
}

/// `any_copy`: any copy is legal, and one vote is enough.
fn vote_on_sector(
    range_start: u64,
    sector: u64,
    voters: &mut [Voter<'_>],
    (rule, any_copy): (Rule, bool),
    verdict: &mut Verdict,
) {
    let mut first: Option<Version<'_>> = None;
    let mut votes = 0;
    let (mut differ, mut some_support) = (false, false);
    for version in voters
        .iter_mut()
        .filter_map(|v| v.version(range_start, sector))
    {
        let first = *first.get_or_insert(version);
        votes += 1;
        differ |= first.bytes != version.bytes;
        some_support |= version.only_supports;
    }
    let Some(first) = first else {
        return extend(&mut verdict.undecided, sector);
    };
    let threshold = match rule {
        Rule::Threshold(threshold) if !any_copy => threshold,
        Rule::Threshold(_) | Rule::FirstListed => 1,
    };
    if !differ && !some_support {
        return match votes >= threshold {
            true => won(verdict, sector, first.replica),
            false => extend(&mut verdict.undecided, sector),
        };
    }
    let unread = Backing::unread(voters, sector);
    let versions: Vec<_> = voters
        .iter_mut()
        .filter_map(|v| v.version(range_start, sector))
        .collect();
    match rule {
        Rule::Threshold(_) => {
            let terms = (threshold, any_copy);
            vote_by_digest(sector, &versions, unread, terms, verdict);
        }
        Rule::FirstListed => take_first(sector, &versions, verdict),
    }
}

/// The versions of this sector differ, and the replica listed first is right.
fn take_first(sector: u64, versions: &[Version<'_>], verdict: &mut Verdict) {
    won(verdict, sector, versions[0].replica);
    let differs = |version: &&Version<'_>| version.bytes != versions[0].bytes;
    for version in versions.iter().filter(differs) {
        if version.excused {
            excused(verdict, sector, version.replica);
        }
    }
}

/// How many replicas stand behind a version that do not only support others.
#[derive(Clone, Copy, Debug, Default)]
struct Backing {
    fresh: usize,
    /// Those of them that have flushed it.
    proven: usize,
}

impl Backing {
    /// Of the replicas that could not be read.
    fn unread(voters: &mut [Voter<'_>], sector: u64) -> Self {
        let mut unread = Self::default();
        for voter in voters {
            let is_unread = voter.unread.has(sector);
            unread.fresh += usize::from(is_unread);
            unread.proven += usize::from(is_unread && voter.proven.has(sector));
        }
        unread
    }

    fn of<'a>(holders: impl Iterator<Item = &'a Version<'a>>) -> Self {
        holders.filter(|version| !version.only_supports).fold(
            Self::default(),
            |backing, version| Self {
                fresh: backing.fresh + 1,
                proven: backing.proven + usize::from(version.proven),
            },
        )
    }
}

/// Whether supporting votes count for this version: more fresh replicas hold it than any other, and
/// more of the proven ones if there are any, wherever those that could not be read stand.
fn is_backed(
    digest: &Digest,
    digests: &[Digest],
    versions: &[Version<'_>],
    unread: Backing,
) -> bool {
    let backing = |digest: &Digest| {
        let all = digests.iter().zip(versions);
        Backing::of(all.filter(|(held, _)| *held == digest).map(|(_, v)| v))
    };
    let this = backing(digest);
    let others = digests.iter().filter(|other| *other != digest);
    let most = others
        .map(backing)
        .fold(Backing::default(), |most, other| Backing {
            fresh: most.fresh.max(other.fresh),
            proven: most.proven.max(other.proven),
        });
    let some_proven = this.proven + most.proven + unread.proven > 0;
    this.fresh > most.fresh + unread.fresh
        && (!some_proven || this.proven > most.proven + unread.proven)
}

/// The slow path: the versions of this sector differ, or some votes only support others. Where any
/// copy is legal, these count only if there are no others, and none that could not be read.
fn vote_by_digest(
    sector: u64,
    versions: &[Version<'_>],
    unread: Backing,
    (threshold, any_copy): (usize, bool),
    verdict: &mut Verdict,
) {
    let digests: Vec<Digest> = versions
        .iter()
        .map(|version| Sha256::digest(version.bytes).into())
        .collect();
    let some_support = versions.iter().any(|version| version.only_supports);
    let all_support = versions.iter().all(|version| version.only_supports);
    if any_copy && all_support && unread.fresh > 0 {
        return extend(&mut verdict.undecided, sector);
    }
    let mut winner: Option<(usize, usize)> = None;
    for (index, digest) in digests.iter().enumerate() {
        if digests[..index].contains(digest) {
            continue;
        }
        let holders = || {
            let held = digests[index..].iter().zip(&versions[index..]);
            held.filter(|(held, _)| *held == digest)
        };
        let counts = |version: &Version<'_>| !any_copy || all_support || !version.only_supports;
        let votes = holders().filter(|(_, version)| counts(version)).count();
        let supported = any_copy || !some_support || is_backed(digest, &digests, versions, unread);
        // Strictly more: on a tie the version found first, held by the replica listed first, stays.
        if votes >= threshold && supported && winner.is_none_or(|(_, most)| votes > most) {
            winner = Some((index, votes));
        }
    }
    let Some((winner, _)) = winner else {
        return extend(&mut verdict.undecided, sector);
    };
    won(verdict, sector, versions[winner].replica);
    for (version, digest) in versions.iter().zip(&digests) {
        if *digest == digests[winner] {
            continue;
        }
        if version.excused {
            excused(verdict, sector, version.replica);
        } else {
            lost(verdict, sector, version.replica, *digest, digests[winner]);
        }
    }
}

#[cfg(test)]
mod tests;
