//! Which version wins a sector, and who lost (contract R2, R3, W7, S5).

use std::cmp::Reverse;
use std::ops::Range;

use quorum_blk::common::{ReplicaIndex, SectorRange};
use quorum_blk::quorum::vote::{Ballot, Rule, Verdict, vote};

use super::cases::{Reply, Version, count, for_each, most_votes};

const SECTOR_LEN: usize = 512;
/// Cases that are voted on together, as the sectors of a long request are.
const TOGETHER: usize = 97;
/// Where the range begins.
const START: u64 = 1000;

/// R2: of the versions with t votes the one with most, then the one that is listed first.
fn winner(replies: &[Reply], threshold: usize) -> Option<Version> {
    let votes: Vec<_> = replies.iter().map(|reply| reply.version()).collect();
    most_votes(&votes, |version| {
        count(votes.iter().copied(), version) >= threshold
    })
}

/// R8: what the replica listed first holds.
fn first_listed(replies: &[Reply]) -> Option<Version> {
    replies.iter().find_map(|reply| reply.version())
}

/// W7, where fewer than t replicas are fresh: doubtful ones vote too, but only for the version that
/// more of the fresh ones hold than any other, and more of the proven ones if some are. What could
/// not be read counts as another version.
fn winner_of_doubtful(replies: &[Reply], threshold: usize) -> Option<Version> {
    let unread = replies
        .iter()
        .filter(|r| matches!(r, Reply::Unread { .. }))
        .count();
    let unread_proven = replies
        .iter()
        .filter(|r| **r == Reply::Unread { proven: true })
        .count();
    let most_hold = |held: fn(Reply) -> Option<Version>, unread: usize, version: Version| {
        let holders = |of: Version| count(replies.iter().map(|reply| held(*reply)), of);
        let mut others = replies
            .iter()
            .filter_map(|reply| held(*reply))
            .filter(|o| *o != version);
        holders(version) > unread && others.all(|other| holders(version) > holders(other) + unread)
    };
    let some_proven = unread_proven > 0 || replies.iter().any(|r| r.proven_version().is_some());
    let mut versions = replies.iter().filter_map(|reply| reply.version());
    let backed = versions.find(|version| {
        most_hold(Reply::fresh_version, unread, *version)
            && (!some_proven || most_hold(Reply::proven_version, unread_proven, *version))
    });
    let votes = |version| count(replies.iter().map(|reply| reply.version()), version);
    backed.filter(|version| votes(*version) >= threshold)
}

/// S5, where any copy is legal: what most of the fresh replicas hold, then what the replica listed
/// first holds, also one that is not fresh. One vote is enough.
fn winner_of_any(replies: &[Reply]) -> Option<Version> {
    let holders = |held: fn(Reply) -> Option<Version>| replies.iter().map(move |r| held(*r));
    let place = |version| holders(Reply::version).position(|held| held == Some(version));
    let versions = holders(Reply::fresh_version).flatten();
    versions.max_by_key(|version| {
        let votes = count(holders(Reply::fresh_version), *version);
        (votes, Reverse(place(*version)))
    })
}

/// The outcome for one sector.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    held_by: Option<usize>,
    lost: Vec<usize>,
    excused: Vec<usize>,
}

impl Outcome {
    /// The outcome where this version wins: the replica listed first holds it for all, and every
    /// other version has lost, with a fault of its replica or without.
    fn expected(replies: &[Reply], winner: Option<Version>, rule: Rule, excused: &[bool]) -> Self {
        let Some(winner) = winner else {
            return Self::default();
        };
        let place_of = |(place, reply): (usize, &Reply)| {
            let differs = reply.version().is_some_and(|version| version != winner);
            differs.then_some(place)
        };
        let differ = replies.iter().enumerate().filter_map(place_of);
        let (without_fault, at_fault) = differ.partition(|place| excused[*place]);
        Self {
            held_by: replies
                .iter()
                .position(|reply| reply.version() == Some(winner)),
            lost: match rule {
                Rule::Threshold(_) => at_fault,
                Rule::FirstListed => Vec::new(),
            },
            excused: without_fault,
        }
    }

    fn all_of(verdict: &Verdict, sectors: usize) -> Vec<Self> {
        let mut all: Vec<Self> = (0..sectors).map(|_| Self::default()).collect();
        let places = |run: &SectorRange| {
            let place = |sector| usize::try_from(sector - START).unwrap();
            place(run.start)..place(run.end())
        };
        let mut named = vec![0; sectors];
        for run in &verdict.undecided {
            places(run).for_each(|place| named[place] += 1);
        }
        for run in &verdict.winners {
            for place in places(&run.range) {
                named[place] += 1;
                all[place].held_by = Some(run.held_by.as_usize());
            }
        }
        assert!(
            named.iter().all(|times| *times == 1),
            "each sector once: {verdict:?}"
        );
        for dissent in &verdict.dissents {
            for place in dissent.bad_sectors.iter().flat_map(places) {
                all[place].lost.push(dissent.replica.as_usize());
            }
        }
        for (replica, runs) in &verdict.excused {
            for place in runs.iter().flat_map(places) {
                all[place].excused.push(replica.as_usize());
            }
        }
        all
    }
}

/// How versions are turned into bytes. The outcome must not depend on it.
#[derive(Clone, Copy, Debug)]
enum Bytes {
    /// The versions have no byte in common.
    AllDiffer,
    /// Only the last byte of a sector differs.
    LastDiffers,
}

impl Bytes {
    fn of(self, version: Version) -> [u8; SECTOR_LEN] {
        match self {
            Self::AllDiffer => [version + 1; SECTOR_LEN],
            Self::LastDiffers => {
                let mut bytes = [0; SECTOR_LEN];
                bytes[SECTOR_LEN - 1] = version;
                bytes
            }
        }
    }
}

/// Cases that wait to be voted on together.
struct Votes {
    replicas: usize,
    rule: Rule,
    any_copy: bool,
    cases: Vec<(Vec<Reply>, Outcome)>,
    tried: u64,
    undecided: u64,
}

impl Votes {
    fn new(replicas: usize, rule: Rule, any_copy: bool) -> Self {
        Self {
            replicas,
            rule,
            any_copy,
            cases: Vec::new(),
            tried: 0,
            undecided: 0,
        }
    }

    fn add(&mut self, replies: &[Reply], winner: Option<Version>) {
        let excused = self.excused(self.cases.len());
        let outcome = Outcome::expected(replies, winner, self.rule, &excused);
        self.tried += 1;
        self.undecided += u64::from(winner.is_none());
        self.cases.push((replies.to_vec(), outcome));
        if self.cases.len() == TOGETHER {
            self.check();
        }
    }

    /// Which replicas are excused for what they hold in this sector of a vote.
    fn excused(&self, sector: usize) -> Vec<bool> {
        let of = |replica| sector >> (replica % 4) & 1 == 1;
        (0..self.replicas).map(of).collect()
    }

    fn check(&mut self) {
        for bytes in [Bytes::AllDiffer, Bytes::LastDiffers] {
            self.check_run(0..self.cases.len(), bytes);
        }
        for sector in 0..self.cases.len() {
            self.check_run(sector..sector + 1, Bytes::AllDiffer);
        }
        self.cases.clear();
    }

    /// Votes on these sectors in one go. A replica that votes on none of them has no ballot.
    fn check_run(&self, sectors: Range<usize>, bytes: Bytes) {
        let cases = &self.cases[sectors.clone()];
        let range = SectorRange::new(START, cases.len() as u64);
        let replies_of = |replica: usize| cases.iter().map(move |(replies, _)| replies[replica]);
        let has_ballot = |replica: &usize| replies_of(*replica).any(|r| r != Reply::NoVote);
        let places: Vec<usize> = (0..self.replicas).filter(has_ballot).collect();
        // Where a replica has no vote its bytes are those of the first version.
        let buffer_of = |replica: &usize| -> Vec<u8> {
            let versions = replies_of(*replica).map(|reply| reply.version().unwrap_or(0));
            versions.flat_map(|version| bytes.of(version)).collect()
        };
        let buffers: Vec<_> = places.iter().map(buffer_of).collect();
        let ballots: Vec<_> = places
            .iter()
            .zip(&buffers)
            .map(|(&replica, bytes)| {
                let where_it = |is: fn(Reply) -> bool| runs(replies_of(replica).map(is));
                let excused = sectors.clone().map(|sector| self.excused(sector)[replica]);
                Ballot {
                    replica: ReplicaIndex(u8::try_from(replica).unwrap()),
                    bytes,
                    stale: where_it(|reply| reply.version().is_none()),
                    supporting: where_it(|reply| matches!(reply, Reply::Doubtful(_))),
                    proven: where_it(|reply| {
                        matches!(reply, Reply::Proven(_) | Reply::Unread { proven: true })
                    }),
                    unread: where_it(|reply| matches!(reply, Reply::Unread { .. })),
                    excused: runs(excused),
                }
            })
            .collect();
        let any_copy = if self.any_copy {
            vec![range]
        } else {
            Vec::new()
        };
        let verdict = vote(range, &ballots, self.rule, &any_copy);
        let found = Outcome::all_of(&verdict, cases.len());
        for ((replies, expected), found) in cases.iter().zip(found) {
            let terms = (self.rule, self.any_copy, bytes);
            assert_eq!(&found, expected, "{replies:?}, {terms:?}");
        }
    }

    fn end(mut self) -> [u64; 2] {
        self.check();
        [self.tried, self.undecided]
    }
}

/// The sectors of a vote for which this is true.
fn runs(sectors: impl Iterator<Item = bool>) -> Vec<SectorRange> {
    let is_in = |(sector, is_in): (u64, bool)| is_in.then_some(SectorRange::new(sector, 1));
    (START..).zip(sectors).filter_map(is_in).collect()
}

fn report(what: &str, counts: [u64; 2]) {
    let [cases, undecided] = counts;
    println!("{what}: {cases} cases, {undecided} without a winner");
    assert!(0 < undecided && undecided < cases, "both happen");
}

/// Up to eight replicas: every partition, with every set of replicas that have no vote.
#[test]
fn of_up_to_eight_replicas() {
    let mut counts = [0; 2];
    for replicas in 1..=8 {
        let rules = (1..=replicas).map(|threshold| (Rule::Threshold(threshold), false));
        let others = [
            (Rule::FirstListed, false),
            (Rule::Threshold(replicas), true),
        ];
        for (rule, any_copy) in rules.chain(others) {
            let mut votes = Votes::new(replicas, rule, any_copy);
            for_each(
                replicas,
                &[Reply::NoVote],
                &[Reply::Fresh],
                &mut |replies| {
                    let winner = match rule {
                        Rule::FirstListed => first_listed(replies),
                        Rule::Threshold(_) if any_copy => winner_of_any(replies),
                        Rule::Threshold(threshold) => winner(replies, threshold),
                    };
                    votes.add(replies, winner);
                },
            );
            let more = votes.end();
            counts = [counts[0] + more[0], counts[1] + more[1]];
        }
    }
    report("votes", counts);
}

/// Up to five replicas, of which fewer than t are fresh, and some are doubtful, proven or unread.
#[test]
fn of_doubtful_copies() {
    let others = [
        Reply::NoVote,
        Reply::Unread { proven: false },
        Reply::Unread { proven: true },
    ];
    let holds = [Reply::Fresh, Reply::Proven, Reply::Doubtful];
    for any_copy in [false, true] {
        let mut counts = [0; 2];
        for replicas in 1..=5 {
            for threshold in 1..=replicas {
                let mut votes = Votes::new(replicas, Rule::Threshold(threshold), any_copy);
                for_each(replicas, &others, &holds, &mut |replies| {
                    if !is_vote_of_doubtful(replies, threshold) {
                        return;
                    }
                    let winner = match any_copy {
                        true => winner_of_any(replies),
                        false => winner_of_doubtful(replies, threshold),
                    };
                    votes.add(replies, winner);
                });
                let more = votes.end();
                counts = [counts[0] + more[0], counts[1] + more[1]];
            }
        }
        report(
            if any_copy {
                "any copy"
            } else {
                "doubtful copies"
            },
            counts,
        );
    }
}

/// Doubtful votes are restricted where fewer than t replicas are fresh, and some replica is.
fn is_vote_of_doubtful(replies: &[Reply], threshold: usize) -> bool {
    let is_fresh = |reply: &&Reply| !matches!(reply, Reply::NoVote | Reply::Doubtful(_));
    let is_doubtful = |reply: &Reply| matches!(reply, Reply::Doubtful(_));
    let fresh = replies.iter().filter(is_fresh).count();
    replies.iter().any(is_doubtful) && (1..threshold).contains(&fresh)
}
