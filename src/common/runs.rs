//! Sets of sectors as sorted lists of runs: short lists, made for one range and thrown away.
//!
//! Invariant: the runs of a list are in order and do not overlap.

use super::SectorRange;

/// The sectors that are in both lists.
pub fn common(a: &[SectorRange], b: &[SectorRange]) -> Vec<SectorRange> {
    let mut result = Vec::new();
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        push(&mut result, x.start.max(y.start), x.end().min(y.end()));
        if x.end() < y.end() {
            a.next();
        } else {
            b.next();
        }
    }
    result
}

/// The sectors of `runs` that are not in `without`.
pub fn without(runs: &[SectorRange], without: &[SectorRange]) -> Vec<SectorRange> {
    let mut result = Vec::with_capacity(runs.len());
    let mut holes = without.iter().peekable();
    for run in runs {
        let mut start = run.start;
        while holes.next_if(|hole| hole.end() <= start).is_some() {}
        while let Some(hole) = holes.peek().filter(|hole| hole.start < run.end()) {
            push(&mut result, start, hole.start);
            start = start.max(hole.end());
            if hole.end() > run.end() {
                break;
            }
            holes.next();
        }
        push(&mut result, start, run.end());
    }
    result
}

/// The sectors that are in one of the lists.
pub fn union(a: &[SectorRange], b: &[SectorRange]) -> Vec<SectorRange> {
    let mut all: Vec<SectorRange> = a.iter().chain(b).copied().collect();
    all.sort_unstable_by_key(|run| run.start);
    let mut result: Vec<SectorRange> = Vec::with_capacity(all.len());
    for run in all {
        match result.last_mut() {
            Some(last) if run.start <= last.end() => {
                last.count = last.end().max(run.end()) - last.start;
            }
            _ => result.push(run),
        }
    }
    result
}

/// The runs, widened to whole blocks and joined where they meet.
pub fn widened(runs: &[SectorRange], block_sectors: u64) -> Vec<SectorRange> {
    let mut widened: Vec<SectorRange> = Vec::with_capacity(runs.len());
    for run in runs {
        let start = run.start - run.start % block_sectors;
        let end = run.end().next_multiple_of(block_sectors);
        match widened.last_mut() {
            Some(last) if start <= last.end() => last.count = end - last.start,
            _ => widened.push(SectorRange::new(start, end - start)),
        }
    }
    widened
}

/// A reader of a list that is asked for one sector after another, in order.
#[derive(Debug)]
pub struct Cursor<'a> {
    runs: std::iter::Peekable<std::slice::Iter<'a, SectorRange>>,
}

impl<'a> Cursor<'a> {
    /// A reader of `runs`.
    pub fn new(runs: &'a [SectorRange]) -> Self {
        Self {
            runs: runs.iter().peekable(),
        }
    }

    /// Whether the list has `sector`, which is not before the one that was last asked for.
    pub fn has(&mut self, sector: u64) -> bool {
        while self.runs.next_if(|run| run.end() <= sector).is_some() {}
        self.runs.peek().is_some_and(|run| run.start <= sector)
    }
}

fn push(runs: &mut Vec<SectorRange>, start: u64, end: u64) {
    if start < end {
        runs.push(SectorRange::new(start, end - start));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(mask: u64) -> Vec<SectorRange> {
        let mut runs: Vec<SectorRange> = Vec::new();
        for sector in (0..64).filter(|sector| mask >> sector & 1 == 1) {
            match runs.last_mut() {
                Some(last) if last.end() == sector => last.count += 1,
                _ => runs.push(SectorRange::new(sector, 1)),
            }
        }
        runs
    }

    fn mask(runs: &[SectorRange]) -> u64 {
        let mut last = 0;
        let mut mask = 0;
        for run in runs {
            assert!(run.count > 0 && run.start >= last, "in order: {runs:?}");
            last = run.end();
            for sector in run.start..run.end() {
                mask |= 1_u64 << sector;
            }
        }
        mask
    }

    proptest! {
        #[test]
        fn agrees_with_masks(a in any::<u64>(), b in any::<u64>(), c in any::<u64>()) {
            let (a, b) = (a | c, b & c);
            let (x, y) = (list(a), list(b));
            prop_assert_eq!(mask(&common(&x, &y)), a & b);
            prop_assert_eq!(mask(&without(&x, &y)), a & !b);
            prop_assert_eq!(mask(&without(&y, &list(c >> 7))), b & !(c >> 7));
            prop_assert_eq!(mask(&union(&x, &y)), a | b);
            let mut cursor = Cursor::new(&x);
            for sector in 0..64 {
                prop_assert_eq!(cursor.has(sector), a >> sector & 1 == 1);
            }
        }
    }

    #[test]
    fn runs_are_widened_to_blocks_and_joined() {
        let runs = |runs: &[(u64, u64)]| -> Vec<SectorRange> {
            runs.iter()
                .map(|(start, count)| SectorRange::new(*start, *count))
                .collect()
        };
        let scattered = runs(&[(1, 1), (3, 2), (9, 1), (30, 4)]);
        assert_eq!(widened(&scattered, 1), scattered);
        assert_eq!(widened(&scattered, 8), runs(&[(0, 16), (24, 16)]));
    }
}
