//! Which writes repair a replica: the winner over what lost the vote or is unreadable, over legal
//! versions that did not win, and over replicas that are repaired throughout.
//!
//! Pure. The writes cover whole blocks and never a block with an undecided sector.

use crate::common::runs;
use crate::common::{ReplicaIndex, SECTOR_BYTES, SectorRange};
use crate::quorum::vote::Verdict;

/// The verdict on a range, and the replicas to repair.
#[derive(Debug)]
pub(super) struct Repairs<'a> {
    pub(super) range: SectorRange,
    pub(super) verdict: &'a Verdict,
    /// No block is written that has one of these sectors.
    pub(super) left_out: &'a [SectorRange],
    /// The winning bytes of the range.
    pub(super) winner: &'a [u8],
    /// Whether replicas are repaired where they lost the vote or are unreadable.
    pub(super) losers: bool,
    /// Where replicas are unreadable: whole blocks.
    pub(super) unreadable: &'a [(ReplicaIndex, Vec<SectorRange>)],
    /// Where replicas are repaired in any case: they differ without being at fault (W7).
    pub(super) settled: &'a [(ReplicaIndex, Vec<SectorRange>)],
    /// Replicas that are repaired wherever there is a winner, and where: whole blocks.
    pub(super) throughout: &'a [(ReplicaIndex, Vec<SectorRange>)],
    pub(super) block_sectors: u64,
}

/// One write of the winner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RepairWrite {
    pub(super) replica: ReplicaIndex,
    pub(super) range: SectorRange,
    /// The bytes are zero and may become a hole.
    pub(super) zero: bool,
    pub(super) kind: RepairKind,
    /// It repairs what lost the vote or is unreadable, because of
    /// [`losers`](Repairs::losers).
    pub(super) is_of_loser: bool,
}

/// What a write of the winner replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RepairKind {
    /// What lost the vote.
    Corrupt,
    /// What could not be read.
    Unreadable,
    /// A version that was as legal as the winner before the vote (W7).
    Settled,
    /// What a replica that is repaired throughout holds.
    Throughout,
    /// A version that had no more right to win than what the operator prefers (W12).
    Preferred,
}

impl Repairs<'_> {
    pub(super) fn writes(&self) -> Vec<RepairWrite> {
        let mut writes = Vec::new();
        let mut losers = Vec::new();
        if self.losers {
            for dissent in &self.verdict.dissents {
                let runs = self.decided(&dissent.bad_sectors);
                losers.push((dissent.replica, runs, RepairKind::Corrupt));
            }
            for (replica, runs) in self.unreadable {
                losers.push((*replica, self.decided(runs), RepairKind::Unreadable));
            }
        }
        for (replica, runs) in self.settled {
            let mut runs = self.decided(runs);
            for (_, repaired, _) in losers.iter().filter(|(loser, ..)| loser == replica) {
                runs = runs::without(&runs, repaired);
            }
            losers.push((*replica, runs, RepairKind::Settled));
        }
        for (replica, mut runs, kind) in losers {
            for (_, throughout) in self.throughout.iter().filter(|(r, _)| *r == replica) {
                runs = runs::without(&runs, &self.decided(throughout));
            }
            writes.extend(runs.into_iter().map(|range| RepairWrite {
                replica,
                range,
                zero: false,
                kind,
                is_of_loser: kind != RepairKind::Settled,
            }));
        }
        for (replica, runs) in self.throughout {
            let runs = self.decided(runs).into_iter();
            // Holes stay holes.
            let cut = |run| sparse(run, self.winner, self.range, self.block_sectors);
            let dissents = self.verdict.dissents.iter();
            let own = dissents.filter(|dissent| dissent.replica == *replica);
            let lost: Vec<_> = own.flat_map(|dissent| &dissent.bad_sectors).collect();
            let kind = |range: SectorRange| match lost.iter().any(|lost| lost.overlaps(range)) {
                true => RepairKind::Corrupt,
                false => RepairKind::Throughout,
            };
            writes.extend(runs.flat_map(cut).map(|range| RepairWrite {
                replica: *replica,
                range,
                zero: is_zero(&self.winner[bytes_of(range, self.range)]),
                kind: kind(range),
                is_of_loser: false,
            }));
        }
        writes
    }

    /// The runs, widened to whole blocks, without the blocks that are left out.
    fn decided(&self, runs: &[SectorRange]) -> Vec<SectorRange> {
        let runs = runs::widened(runs, self.block_sectors);
        decided(&runs, self.left_out, self.block_sectors)
    }
}

/// The bytes of `part` in a buffer that holds `whole`.
pub(super) fn bytes_of(part: SectorRange, whole: SectorRange) -> std::ops::Range<usize> {
    let byte = |sector: u64| {
        usize::try_from((sector - whole.start) * SECTOR_BYTES).expect("a fragment fits memory")
    };
    byte(part.start)..byte(part.end())
}

/// The shortest run of zeroes in a longer run that is made a hole.
const HOLE_SECTORS_MIN: u64 = (32 << 10) / SECTOR_BYTES;

/// A page of a file, which is where its holes can begin and end.
const PAGE_SECTORS: u64 = 4096 / SECTOR_BYTES;

/// Cuts `run`, whose bytes are part of those of `whole`, into runs that are zero and runs that are
/// not. Short runs of zeroes are left with their neighbours.
fn sparse(
    run: SectorRange,
    bytes: &[u8],
    whole: SectorRange,
    block_sectors: u64,
) -> Vec<SectorRange> {
    let granule = PAGE_SECTORS.next_multiple_of(block_sectors);
    let mut runs: Vec<(SectorRange, bool)> = Vec::new();
    let mut start = run.start;
    while start < run.end() {
        let end = (start - start % granule + granule).min(run.end());
        let part = SectorRange::new(start, end - start);
        let zero = is_zero(&bytes[bytes_of(part, whole)]);
        match runs.last_mut() {
            Some((last, last_zero)) if *last_zero == zero => last.count += part.count,
            _ => runs.push((part, zero)),
        }
        start = end;
    }
    let mut cut: Vec<(SectorRange, bool)> = Vec::with_capacity(runs.len());
    for (part, zero) in runs {
        let zero = zero && (part.count >= HOLE_SECTORS_MIN || part.count == run.count);
        match cut.last_mut() {
            Some((last, false)) if !zero => last.count += part.count,
            _ => cut.push((part, zero)),
        }
    }
    cut.into_iter().map(|(part, _)| part).collect()
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

/// `runs`, which are whole blocks, without the blocks that have an undecided sector.
pub(super) fn decided(
    runs: &[SectorRange],
    undecided: &[SectorRange],
    block_sectors: u64,
) -> Vec<SectorRange> {
    runs::without(runs, &runs::widened(undecided, block_sectors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs<const N: usize>(runs: [(u64, u64); N]) -> Vec<SectorRange> {
        runs.map(|(start, count)| SectorRange::new(start, count))
            .to_vec()
    }

    #[test]
    fn long_runs_of_zeroes_become_holes() {
        let whole = SectorRange::new(16, 400);
        let mut bytes = vec![0; 400 * 512];
        let all = |bytes: &[u8]| sparse(whole, bytes, whole, 1);
        assert_eq!(all(&bytes), [whole], "all of it is zero");
        bytes[100 * 512] = 1;
        // The page of sector 116 is 112 to 119.
        assert_eq!(all(&bytes), runs([(16, 96), (112, 8), (120, 296)]));
        bytes[130 * 512] = 1;
        assert_eq!(all(&bytes), runs([(16, 96), (112, 40), (152, 264)]));
        let part = SectorRange::new(120, 8);
        assert_eq!(sparse(part, &bytes, whole, 1), [part]);
    }

    #[test]
    fn blocks_with_an_undecided_sector_are_left_out() {
        let blocks = runs([(0, 16), (24, 16)]);
        assert_eq!(decided(&blocks, &[], 8), blocks);
        assert_eq!(
            decided(&blocks, &runs([(9, 1), (25, 1), (31, 2)]), 8),
            runs([(0, 8)])
        );
        assert_eq!(
            decided(&runs([(0, 8)]), &runs([(3, 2)]), 1),
            runs([(0, 3), (5, 3)])
        );
    }
}
