//! The votes of the replicas of a start on what a crash has left.

use std::collections::BTreeMap;

use super::super::Violation;
use super::super::effects::{SECTOR_LEN, fill};
use super::super::model::Value;
use super::super::plan::bits;
use crate::common::{ReplicaIndex, SectorRange};
use crate::quorum::vote::{Ballot, Rule, vote};

/// How a copy of a sector is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stand {
    Fresh,
    Doubtful,
    Stale,
}

/// I5: whichever replicas are started again, if they may start, there is a winner, and it is
/// permitted. `start`: the replicas that are there, a mask, and how each of them is remembered.
pub(super) fn check_crash_state(
    permitted: &[Value],
    values: &[Value],
    (present, stands): (u32, &[Stand]),
    (threshold, votes): (usize, &mut Votes),
) -> Result<(), Violation> {
    let of = |wanted: Stand| {
        let present = bits(u64::from(present)).zip(stands);
        let such = present.filter(|(_, stand)| **stand == wanted);
        such.map(|(replica, _)| values[replica]).collect()
    };
    let fresh: Vec<Value> = of(Stand::Fresh);
    let doubtful = match fresh.len() < threshold {
        true => of(Stand::Doubtful),
        false => Vec::new(),
    };
    let text = || format!("crash state {values:?}, {stands:?}, permitted {permitted:?}:");
    match votes.winner(fresh, doubtful) {
        Some(winner) if permitted.contains(&winner) => Ok(()),
        Some(_) => {
            let text = text() + &format!(" {present:b} believe a stale copy,");
            Err(Violation::new("S2", text))
        }
        None => {
            let text = text() + &format!(" no version wins on {present:b},");
            Err(Violation::new("I5", text))
        }
    }
}

/// The outcomes of votes of copies that are all legal, each counted by the real vote once: of those
/// that are fresh, and of doubtful ones.
#[derive(Debug, Default)]
pub(super) struct Votes(BTreeMap<(Vec<Value>, Vec<Value>), Option<Value>>);

impl Votes {
    fn winner(&mut self, fresh: Vec<Value>, doubtful: Vec<Value>) -> Option<Value> {
        let values: Vec<Value> = fresh.iter().chain(&doubtful).copied().collect();
        let (fresh_count, all) = (fresh.len(), values.len());
        *self.0.entry((fresh, doubtful)).or_insert_with(|| {
            let sectors: Vec<[u8; SECTOR_LEN]> =
                values.iter().map(|value| sector_of(*value)).collect();
            let sector = SectorRange::new(0, 1);
            let ballot = |replica: usize| {
                let index = ReplicaIndex(u8::try_from(replica).expect("few"));
                let mut ballot = Ballot::new(index, &sectors[replica], Vec::new());
                if fresh_count > 0 && replica >= fresh_count {
                    ballot.supporting.push(sector);
                }
                ballot
            };
            let ballots: Vec<Ballot<'_>> = (0..all).map(ballot).collect();
            let rule = Rule::Threshold(all.max(1));
            let verdict = vote(sector, &ballots, rule, &[sector]);
            verdict
                .winners
                .first()
                .map(|run| values[run.held_by.as_usize()])
        })
    }
}

fn sector_of(value: Value) -> [u8; SECTOR_LEN] {
    let mut sector = [0; SECTOR_LEN];
    fill(&mut sector, value);
    sector
}
