//! The outcome of a vote: where which replica holds the winner, and who lost.

use crate::common::report::{Digest, Evidence};
use crate::common::runs;
use crate::common::{ReplicaIndex, SectorRange};
use crate::limits::BAD_SECTOR_RUNS_MAX;

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
    /// The proof for the event; what the event lists is bounded, however much is corrupt.
    pub fn evidence(&self) -> Evidence {
        let listed = self.bad_sectors.len().min(BAD_SECTOR_RUNS_MAX);
        Evidence {
            bad_sectors: self.bad_sectors[..listed].to_vec(),
            bad_sectors_cut: listed < self.bad_sectors.len(),
            unlisted: self.bad_sectors[listed..].to_vec(),
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
    pub(super) fn add_dissent(&mut self, more: Dissent) {
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

    pub(super) fn add_excused(&mut self, replica: ReplicaIndex, more: Vec<SectorRange>) {
        let at = self.excused.partition_point(|(r, _)| *r < replica);
        match self.excused.get_mut(at) {
            Some((present, excused)) if *present == replica => {
                *excused = runs::union(excused, &more);
            }
            _ => self.excused.insert(at, (replica, more)),
        }
    }
}

pub(super) fn won(verdict: &mut Verdict, sector: u64, held_by: ReplicaIndex) {
    match verdict.winners.last_mut() {
        Some(run) if run.held_by == held_by && run.range.end() == sector => run.range.count += 1,
        _ => verdict.winners.push(WinningRun {
            range: SectorRange::new(sector, 1),
            held_by,
        }),
    }
}

pub(super) fn lost(
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

pub(super) fn excused(verdict: &mut Verdict, sector: u64, replica: ReplicaIndex) {
    match verdict.excused.iter_mut().find(|(r, _)| *r == replica) {
        Some((_, runs)) => extend(runs, sector),
        None => {
            let at = verdict.excused.partition_point(|(r, _)| *r < replica);
            let runs = vec![SectorRange::new(sector, 1)];
            verdict.excused.insert(at, (replica, runs));
        }
    }
}

pub(super) fn extend(runs: &mut Vec<SectorRange>, sector: u64) {
    match runs.last_mut() {
        Some(run) if run.end() == sector => run.count += 1,
        _ => runs.push(SectorRange::new(sector, 1)),
    }
}
