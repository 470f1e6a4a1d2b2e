//! The vote per sector (contract R2, R3).
//!
//! Called only where replies differ or where some replicas may not vote: equal buffers never come
//! here. Each sector is decided alone, so that two replicas that are corrupt in different places do
//! not make a request fail whose sectors all have a winner.

use sha2::{Digest as _, Sha256};

use crate::common::report::{Digest, Evidence};
use crate::common::runs::{self, Cursor};
use crate::common::{ReplicaIndex, SECTOR_BYTES, SectorRange};
use crate::limits::BAD_SECTOR_RUNS_MAX;

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

/// A run of sectors whose winning version one replica holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WinningRun {
    /// The sectors.
    pub range: SectorRange,
    /// The replica listed first among those that hold the winner.
    pub held_by: ReplicaIndex,
}

/// A replica that lost the vote somewhere.
#[derive(Debug, PartialEq, Eq)]
pub struct Dissent {
    /// The replica.
    pub replica: ReplicaIndex,
    /// All runs of sectors in which its version is not the winner's.
    pub bad_sectors: Vec<SectorRange>,
    digest: Digest,
    winner_digest: Digest,
}

impl Dissent {
    /// The proof for the event: bounded, however much is corrupt.
    pub fn evidence(&self) -> Evidence {
        let listed = self.bad_sectors.len().min(BAD_SECTOR_RUNS_MAX);
        Evidence {
            bad_sectors: self.bad_sectors[..listed].to_vec(),
            bad_sectors_cut: listed < self.bad_sectors.len(),
            sectors: self.bad_sectors.iter().map(|run| run.count).sum(),
            digest: self.digest,
            winner_digest: self.winner_digest,
        }
    }
}

/// The outcome of a vote.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// A replica that holds the winner, run by run; together with `undecided` these cover the
    /// range.
    pub winners: Vec<WinningRun>,
    /// The runs of sectors without a winner.
    pub undecided: Vec<SectorRange>,
    /// The replicas that lost, first listed first.
    pub dissents: Vec<Dissent>,
    /// Where a version is not the winner's and no replica is at fault, first listed first.
    pub excused: Vec<(ReplicaIndex, Vec<SectorRange>)>,
}

impl Verdict {
    /// Votes again on the sectors without a winner: there are more ballots, or they have a vote on
    /// more. A sector that has a winner keeps it.
    pub fn vote_again(&mut self, range: SectorRange, ballots: &[Ballot<'_>], rule: Rule) {
        let undecided = std::mem::take(&mut self.undecided);
        let mut more = Self::default();
        let mut voters: Vec<Voter<'_>> = ballots.iter().map(Voter::new).collect();
        for sector in undecided.iter().flat_map(|run| run.start..run.end()) {
            vote_on_sector(range.start, sector, &mut voters, rule, &mut more);
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

    fn add_dissent(&mut self, more: Dissent) {
        let at = self.dissents.partition_point(|d| d.replica < more.replica);
        match self.dissents.get_mut(at) {
            Some(dissent) if dissent.replica == more.replica => {
                if more.bad_sectors[0].start < dissent.bad_sectors[0].start {
                    dissent.digest = more.digest;
                    dissent.winner_digest = more.winner_digest;
                }
                dissent.bad_sectors = runs::union(&dissent.bad_sectors, &more.bad_sectors);
            }
            _ => self.dissents.insert(at, more),
        }
    }

    fn add_excused(&mut self, replica: ReplicaIndex, more: Vec<SectorRange>) {
        let at = self.excused.partition_point(|(r, _)| *r < replica);
        match self.excused.get_mut(at) {
            Some((present, excused)) if *present == replica => {
                *excused = runs::union(excused, &more);
            }
            _ => self.excused.insert(at, (replica, more)),
        }
    }
}

/// Votes on every sector of `range`. The ballots come in the order in which the replicas were
/// listed.
pub fn vote(range: SectorRange, ballots: &[Ballot<'_>], rule: Rule) -> Verdict {
    let mut verdict = Verdict::default();
    let mut voters: Vec<Voter<'_>> = ballots.iter().map(Voter::new).collect();
    for sector in range.start..range.end() {
        vote_on_sector(range.start, sector, &mut voters, rule, &mut verdict);
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

fn vote_on_sector(
    range_start: u64,
    sector: u64,
    voters: &mut [Voter<'_>],
    rule: Rule,
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
        Rule::Threshold(threshold) => threshold,
        Rule::FirstListed => 1,
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
        Rule::Threshold(_) => vote_by_digest(sector, &versions, unread, threshold, verdict),
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

/// The slow path: the versions of this sector differ, or some votes only support others.
fn vote_by_digest(
    sector: u64,
    versions: &[Version<'_>],
    unread: Backing,
    threshold: usize,
    verdict: &mut Verdict,
) {
    let digests: Vec<Digest> = versions
        .iter()
        .map(|version| Sha256::digest(version.bytes).into())
        .collect();
    let some_support = versions.iter().any(|version| version.only_supports);
    let mut winner: Option<(usize, usize)> = None;
    for (index, digest) in digests.iter().enumerate() {
        if digests[..index].contains(digest) {
            continue;
        }
        let holders = || {
            let held = digests[index..].iter().zip(&versions[index..]);
            held.filter(|(held, _)| *held == digest)
        };
        let votes = holders().count();
        let supported = !some_support || is_backed(digest, &digests, versions, unread);
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

fn won(verdict: &mut Verdict, sector: u64, held_by: ReplicaIndex) {
    match verdict.winners.last_mut() {
        Some(run) if run.held_by == held_by && run.range.end() == sector => run.range.count += 1,
        _ => verdict.winners.push(WinningRun {
            range: SectorRange::new(sector, 1),
            held_by,
        }),
    }
}

fn lost(
    verdict: &mut Verdict,
    sector: u64,
    replica: ReplicaIndex,
    digest: Digest,
    winner_digest: Digest,
) {
    match verdict.dissents.iter_mut().find(|d| d.replica == replica) {
        Some(dissent) => extend(&mut dissent.bad_sectors, sector),
        None => {
            let at = verdict.dissents.partition_point(|d| d.replica < replica);
            verdict.dissents.insert(
                at,
                Dissent {
                    replica,
                    bad_sectors: vec![SectorRange::new(sector, 1)],
                    digest,
                    winner_digest,
                },
            );
        }
    }
}

fn excused(verdict: &mut Verdict, sector: u64, replica: ReplicaIndex) {
    match verdict.excused.iter_mut().find(|(r, _)| *r == replica) {
        Some((_, runs)) => extend(runs, sector),
        None => {
            let at = verdict.excused.partition_point(|(r, _)| *r < replica);
            let runs = vec![SectorRange::new(sector, 1)];
            verdict.excused.insert(at, (replica, runs));
        }
    }
}

fn extend(runs: &mut Vec<SectorRange>, sector: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == sector => run.count += 1,
        _ => runs.push(SectorRange::new(sector, 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// One letter a sector: the version a replica holds; `-` where it may not vote.
    fn bytes_of(pattern: &str) -> Vec<u8> {
        pattern.bytes().flat_map(|b| [b; SECTOR_LEN]).collect()
    }

    fn stale_of(pattern: &str) -> Vec<SectorRange> {
        let mut runs = Vec::new();
        for (sector, letter) in pattern.bytes().enumerate() {
            if letter == b'-' {
                extend(&mut runs, sector as u64);
            }
        }
        runs
    }

    fn run(patterns: &[&str], rule: Rule) -> Verdict {
        let buffers: Vec<_> = patterns.iter().map(|p| bytes_of(p)).collect();
        let ballots: Vec<_> = patterns
            .iter()
            .zip(&buffers)
            .enumerate()
            .map(|(index, (pattern, bytes))| ballot(u8::try_from(index).unwrap(), pattern, bytes))
            .collect();
        vote(
            SectorRange::new(0, patterns[0].len() as u64),
            &ballots,
            rule,
        )
    }

    /// The verdict in the same letters: the winner of each sector, `?` if it is undecided, and the
    /// replicas that lost with their corrupt sectors.
    fn letters(patterns: &[&str], rule: Rule) -> (String, Vec<(u8, String)>) {
        let verdict = run(patterns, rule);
        let mut winners = vec![b'.'; patterns[0].len()];
        for won in &verdict.winners {
            for sector in won.range.start..won.range.end() {
                let sector = usize::try_from(sector).unwrap();
                winners[sector] = patterns[won.held_by.as_usize()].as_bytes()[sector];
            }
        }
        for range in &verdict.undecided {
            for sector in range.start..range.end() {
                winners[usize::try_from(sector).unwrap()] = b'?';
            }
        }
        let lost = verdict
            .dissents
            .iter()
            .map(|dissent| {
                let mut bad = vec![b'.'; patterns[0].len()];
                for range in &dissent.bad_sectors {
                    for sector in range.start..range.end() {
                        bad[usize::try_from(sector).unwrap()] = b'!';
                    }
                }
                (dissent.replica.0, String::from_utf8(bad).unwrap())
            })
            .collect();
        (String::from_utf8(winners).unwrap(), lost)
    }

    #[test]
    fn table_of_cases() {
        let two = Rule::Threshold(2);
        #[rustfmt::skip]
        type Case<'a> = (&'a [&'a str], Rule, &'a str, &'a [(u8, &'a str)]);
        let cases: &[Case<'_>] = &[
            // Two replicas bad in different sectors: QEMU fails this read.
            (
                &["aab", "aba", "aaa"],
                two,
                "aaa",
                &[(0, "..!"), (1, ".!.")],
            ),
            (&["aaa", "aaa", "bbb"], two, "aaa", &[(2, "!!!")]),
            (
                &["aaa", "abb", "bbb"],
                two,
                "abb",
                &[(0, ".!!"), (2, "!..")],
            ),
            // Three versions of one sector.
            (&["aa", "ab", "ac"], two, "a?", &[]),
            // A stale replica neither wins nor loses.
            (&["a-", "aa", "aa"], two, "aa", &[]),
            (&["--", "bb", "aa"], two, "??", &[]),
            (&["--", "bb", "bb"], two, "bb", &[]),
            (&["---", "---", "aaa"], two, "???", &[]),
            // t <= N/2: more votes win, then the replica listed first.
            (&["a", "b", "b"], Rule::Threshold(1), "b", &[(0, "!")]),
            (
                &["a", "b", "c"],
                Rule::Threshold(1),
                "a",
                &[(1, "!"), (2, "!")],
            ),
            (&["a", "b", "b", "a"], two, "a", &[(1, "!"), (2, "!")]),
            (
                &["c", "b", "b", "a", "a"],
                two,
                "b",
                &[(0, "!"), (3, "!"), (4, "!")],
            ),
            // All must agree.
            (&["ab", "aa", "aa"], Rule::Threshold(3), "a?", &[]),
            (&["a", "b"], two, "?", &[]),
            (&["-a", "bb"], Rule::FirstListed, "ba", &[]),
            (&["--", "b-"], Rule::FirstListed, "b?", &[]),
        ];
        for (patterns, rule, winners, lost) in cases {
            let lost: Vec<_> = lost.iter().map(|(r, s)| (*r, (*s).to_string())).collect();
            assert_eq!(
                letters(patterns, *rule),
                ((*winners).to_string(), lost),
                "{patterns:?} {rule:?}"
            );
        }
    }

    /// Three ballots of one sector; those with an index in `supporting` only support others, and
    /// those in `excused` may differ.
    fn one_sector(letters: &str, supporting: &[usize], excused: &[usize], rule: Rule) -> Verdict {
        let sector = SectorRange::new(0, 1);
        let all = letters.bytes().map(|letter| [letter; SECTOR_LEN]);
        let buffers: Vec<_> = all.collect();
        let ballots: Vec<_> = buffers
            .iter()
            .enumerate()
            .map(|(index, bytes)| {
                let listed = |list: &[usize]| match list.contains(&index) {
                    true => vec![sector],
                    false => Vec::new(),
                };
                Ballot {
                    supporting: listed(supporting),
                    excused: listed(excused),
                    ..ballot(u8::try_from(index).unwrap(), "a", bytes)
                }
            })
            .collect();
        vote(sector, &ballots, rule)
    }

    #[test]
    fn an_excused_replica_loses_without_an_accusation() {
        for rule in [Rule::Threshold(2), Rule::FirstListed] {
            let verdict = one_sector("aba", &[], &[0, 1, 2], rule);
            assert_eq!(verdict.winners.len(), 1);
            assert!(verdict.dissents.is_empty());
            assert_eq!(
                verdict.excused,
                [(ReplicaIndex(1), vec![SectorRange::new(0, 1)])]
            );
        }
        let verdict = one_sector("aba", &[], &[0], Rule::Threshold(2));
        assert_eq!(verdict.dissents.len(), 1);
    }

    #[test]
    fn a_vote_that_only_supports_others_does_not_win_alone() {
        let wins = |letters, supporting: &[usize]| {
            let verdict = one_sector(letters, supporting, supporting, Rule::Threshold(2));
            verdict.undecided.is_empty()
        };
        assert!(wins("aaa", &[1, 2]), "replica 0 holds it too");
        assert!(!wins("baa", &[1, 2]), "replica 0 holds another version");
        assert!(!wins("baa", &[1]), "replicas 0 and 2 are equally good");
        assert!(wins("aaab", &[2]));
        assert!(!wins("aaa", &[0, 1, 2]));
    }

    /// A ballot on which `-` has no vote.
    fn ballot<'a>(replica: u8, pattern: &str, bytes: &'a [u8]) -> Ballot<'a> {
        Ballot::new(ReplicaIndex(replica), bytes, stale_of(pattern))
    }

    #[test]
    fn support_needs_most_of_the_fresh_and_of_the_proven_whatever_was_not_read() {
        // Of each replica the version (`-`: not read), and whether it supports, is fresh or proven.
        let wins = |replicas: &[&str], threshold: usize| {
            let sector = vec![SectorRange::new(0, 1)];
            let buffers: Vec<_> = replicas.iter().map(|r| bytes_of(&r[..1])).collect();
            let all = replicas.iter().zip(&buffers).zip(0..);
            let ballots: Vec<_> = all
                .map(|((replica, bytes), index)| {
                    let mut ballot = ballot(index, &replica[..1], bytes);
                    match &replica[1..] {
                        "supports" => ballot.supporting.clone_from(&sector),
                        "proven" => ballot.proven.clone_from(&sector),
                        other => assert_eq!(other, "fresh"),
                    }
                    if !ballot.stale.is_empty() {
                        ballot.unread.clone_from(&sector);
                    }
                    ballot
                })
                .collect();
            let verdict = vote(sector[0], &ballots, Rule::Threshold(threshold));
            verdict.undecided.is_empty()
        };
        assert!(wins(&["afresh", "asupports", "asupports"], 3));
        assert!(!wins(&["afresh", "-fresh", "asupports", "asupports"], 3));
        assert!(wins(&["afresh", "afresh", "-fresh", "asupports"], 3));
        assert!(wins(&["afresh", "afresh", "-fresh"], 2), "nothing supports");
        let outvoted = ["afresh", "afresh", "bfresh", "asupports", "asupports"];
        assert!(wins(&outvoted, 4));
        let proven = ["afresh", "afresh", "bproven", "asupports", "asupports"];
        assert!(
            !wins(&proven, 4),
            "two may have lost what the third has flushed"
        );
        assert!(!wins(&["afresh", "afresh", "-proven", "asupports"], 3));
        assert!(wins(&["afresh", "aproven", "bfresh", "asupports"], 3));
    }

    #[test]
    fn a_ballot_that_comes_later_decides_only_what_is_undecided() {
        let range = SectorRange::new(0, 5);
        let (first, second, late) = (bytes_of("aabcc"), bytes_of("aacbc"), bytes_of("bbbbx"));
        let two = Rule::Threshold(2);
        let ballots = [ballot(0, "aa---", &first), ballot(2, "aac--", &second)];
        let mut verdict = vote(range, &ballots, two);
        assert_eq!(verdict.undecided, [SectorRange::new(2, 3)]);
        let ballots = [
            ballot(0, "aabcc", &first),
            ballot(1, "bbbb-", &late),
            ballot(2, "aacbc", &second),
        ];
        verdict.vote_again(range, &ballots, two);
        assert_eq!(verdict.undecided, []);
        let winner = bytes_of("aabbc");
        let lost = |verdict: &Verdict| -> Vec<_> {
            let lost = verdict.dissents.iter();
            lost.map(|dissent| (dissent.replica.0, dissent.bad_sectors.clone()))
                .collect()
        };
        let run = SectorRange::new;
        let before = [(0, vec![run(3, 1)]), (2, vec![run(2, 1)])];
        assert_eq!(lost(&verdict), before);
        // Where it came too late to vote it can still be found corrupt.
        verdict.compare(range, &ballot(1, "bbbbx", &late), two, &winner);
        let [first, last] = before;
        let between = (1, vec![run(0, 2), run(4, 1)]);
        assert_eq!(lost(&verdict), [first, between, last]);
    }

    #[test]
    fn evidence_is_of_the_first_corrupt_sector_and_bounded() {
        let bad: String = "ba".repeat(BAD_SECTOR_RUNS_MAX + 1);
        let good = "a".repeat(bad.len());
        let verdict = run(&[&good, &bad, &good], Rule::Threshold(2));
        let evidence = verdict.dissents[0].evidence();
        assert_eq!(evidence.bad_sectors.len(), BAD_SECTOR_RUNS_MAX);
        assert!(evidence.bad_sectors_cut);
        assert_eq!(
            evidence.digest,
            Digest::from(Sha256::digest([b'b'; SECTOR_LEN]))
        );
        assert_eq!(
            evidence.winner_digest,
            Digest::from(Sha256::digest([b'a'; SECTOR_LEN]))
        );
    }

    fn letter() -> impl Strategy<Value = char> {
        proptest::sample::select(vec!['a', 'b', 'c', '-'])
    }

    proptest! {
        /// Against counting by hand.
        #[test]
        fn agrees_with_a_vote_counted_by_hand(
            patterns in (1..6usize, 1..8usize).prop_flat_map(|(n, sectors)| {
                proptest::collection::vec(
                    proptest::collection::vec(letter(), sectors)
                        .prop_map(|letters| letters.into_iter().collect::<String>()),
                    n,
                )
            }),
            threshold in 1..6usize,
        ) {
            let patterns: Vec<&str> = patterns.iter().map(String::as_str).collect();
            let (winners, lost) = letters(&patterns, Rule::Threshold(threshold));
            for sector in 0..patterns[0].len() {
                let column: Vec<u8> = patterns.iter().map(|p| p.as_bytes()[sector]).collect();
                let count = |letter: u8| column.iter().filter(|l| **l == letter).count();
                let place = |letter: u8| column.iter().position(|l| *l == letter);
                let expected = [b'a', b'b', b'c']
                    .into_iter()
                    .filter(|letter| count(*letter) >= threshold)
                    .max_by_key(|letter| (count(*letter), std::cmp::Reverse(place(*letter))))
                    .unwrap_or(b'?');
                prop_assert_eq!(winners.as_bytes()[sector], expected);
                for (replica, letter) in column.iter().enumerate() {
                    let accused = lost.iter().any(|(r, bad)| {
                        usize::from(*r) == replica && bad.as_bytes()[sector] == b'!'
                    });
                    let lost = expected != b'?' && *letter != b'-' && *letter != expected;
                    prop_assert_eq!(accused, lost);
                }
            }
        }
    }
}
