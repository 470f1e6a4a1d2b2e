//! When a read may be answered although replies are out (contract R7).

use std::collections::BTreeSet;

use quorum_blk::quorum::vote::decisive_votes;

use super::cases::{Version, count, for_each, most_votes};

/// What becomes of a replica's reply.
#[derive(Clone, Copy, Debug)]
enum Reply {
    /// It has come.
    Here(Version),
    /// It comes later.
    Late(Version),
    /// It was waited for, and the replica fails.
    FailsLater,
    /// The replica has failed already, or has no vote.
    NoVote,
}

impl Reply {
    fn here(self) -> Option<Version> {
        match self {
            Self::Here(version) => Some(version),
            _ => None,
        }
    }

    fn at_last(self) -> Option<Version> {
        match self {
            Self::Here(version) | Self::Late(version) => Some(version),
            _ => None,
        }
    }
}

/// Whatever the replies that are out turn out to be, the version that was answered wins. With one
/// vote less it would not always.
#[test]
fn are_what_the_vote_of_all_would_be() {
    let mut answered = 0_u64;
    for replicas in 1..=8 {
        for threshold in 1..=replicas {
            let mut refuted_with_less = BTreeSet::new();
            let others = [Reply::FailsLater, Reply::NoVote];
            for_each(
                replicas,
                &others,
                &[Reply::Here, Reply::Late],
                &mut |replies| {
                    let voters = replies
                        .iter()
                        .filter(|r| !matches!(r, Reply::NoVote))
                        .count();
                    let here: Vec<_> = replies.iter().map(|reply| reply.here()).collect();
                    let at_last: Vec<_> = replies.iter().map(|reply| reply.at_last()).collect();
                    let votes = |of: &[Option<Version>], v| count(of.iter().copied(), v);
                    let Some(most) = most_votes(&here, |_| true) else {
                        return;
                    };
                    let winner = most_votes(&at_last, |v| votes(&at_last, v) >= threshold);
                    let enough = decisive_votes(threshold, voters);
                    if votes(&here, most) >= enough {
                        answered += 1;
                        assert_eq!(winner, Some(most), "{replies:?}, threshold {threshold}");
                    } else if votes(&here, most) + 1 == enough && winner != Some(most) {
                        refuted_with_less.insert(voters);
                    }
                },
            );
            for voters in threshold..=replicas {
                let needs_one = decisive_votes(threshold, voters) == 1;
                assert!(
                    refuted_with_less.contains(&voters) || needs_one,
                    "{threshold} of {voters}"
                );
            }
        }
    }
    println!("answers: {answered} cases in which one is possible");
}
