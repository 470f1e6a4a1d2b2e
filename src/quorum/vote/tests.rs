//! Votes on a few sectors, as letters.

use super::*;
use crate::limits::BAD_SECTOR_RUNS_MAX;

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
        &[],
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
    vote(sector, &ballots, rule, &[])
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
        let verdict = vote(sector[0], &ballots, Rule::Threshold(threshold), &[]);
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
    let mut verdict = vote(range, &ballots, two, &[]);
    assert_eq!(verdict.undecided, [SectorRange::new(2, 3)]);
    let ballots = [
        ballot(0, "aabcc", &first),
        ballot(1, "bbbb-", &late),
        ballot(2, "aacbc", &second),
    ];
    verdict.vote_again(range, &ballots, two, &[]);
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
    assert_eq!(evidence.unlisted.len(), 1);
    assert_eq!(
        evidence.digest,
        Digest::from(Sha256::digest([b'b'; SECTOR_LEN]))
    );
    assert_eq!(
        evidence.winner_digest,
        Digest::from(Sha256::digest([b'a'; SECTOR_LEN]))
    );
}

#[test]
fn one_vote_is_enough_where_any_copy_is_legal() {
    let patterns = ["ac", "bc", "cd"];
    let buffers: Vec<_> = patterns.iter().map(|p| bytes_of(p)).collect();
    let both = SectorRange::new(0, 2);
    let excused = |index: usize| Ballot {
        excused: vec![both],
        ..ballot(
            u8::try_from(index).unwrap(),
            patterns[index],
            &buffers[index],
        )
    };
    let ballots: Vec<_> = (0..3).map(excused).collect();
    let two = Rule::Threshold(2);
    assert_eq!(
        vote(both, &ballots, two, &[]).undecided,
        [SectorRange::new(0, 1)]
    );
    let verdict = vote(both, &ballots, two, &[SectorRange::new(0, 1)]);
    assert!(verdict.undecided.is_empty() && verdict.dissents.is_empty());
    let winner = verdict.winners[0];
    assert_eq!(
        (winner.range, winner.held_by),
        (both, ReplicaIndex(0)),
        "the first listed"
    );
    let mut again = vote(both, &ballots[1..], two, &[]);
    again.vote_again(both, &ballots[1..], two, &[both]);
    assert_eq!(again.winners[0].held_by, ReplicaIndex(1));
}

#[test]
fn supporting_votes_do_not_count_where_any_copy_is_legal() {
    let buffers: Vec<_> = ["a", "a", "b", "c"].iter().map(|p| bytes_of(p)).collect();
    let sector = SectorRange::new(0, 1);
    let ballots = |supporting: std::ops::Range<usize>| -> Vec<Ballot<'_>> {
        let ballot = |index: usize| Ballot {
            supporting: supporting
                .contains(&index)
                .then_some(sector)
                .into_iter()
                .collect(),
            excused: vec![sector],
            ..ballot(u8::try_from(index).unwrap(), "a", &buffers[index])
        };
        (0..4).map(ballot).collect()
    };
    let winner = |supporting| {
        let verdict = vote(sector, &ballots(supporting), Rule::Threshold(3), &[sector]);
        verdict.winners[0].held_by
    };
    assert_eq!(winner(0..0), ReplicaIndex(0));
    assert_eq!(
        winner(0..2),
        ReplicaIndex(2),
        "two legal ones differ: the first listed"
    );
    assert_eq!(winner(0..4), ReplicaIndex(0), "all are in doubt");
    let mut unread = ballots(0..4);
    unread[3].stale.push(sector);
    unread[3].unread.push(sector);
    let verdict = vote(sector, &unread, Rule::Threshold(3), &[sector]);
    assert_eq!(
        verdict.undecided,
        [sector],
        "a better one could not be read"
    );
}
