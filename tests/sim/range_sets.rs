//! A set of ranges is exact, however many it has: a sector that is lost is one that counts as fresh
//! on a replica that missed it, and a sector too many is a good copy that does not vote.
//!
//! The unit tests of `RangeSet` check this too. This one is cheap to build, so `make mutants` uses
//! it.

use quorum_blk::common::SectorRange;
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::sim::random::Random;

const SECTORS: usize = 1 << 16;

#[test]
fn they_are_exact() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mut set = RangeSet::default();
        let mut naive = vec![false; SECTORS];
        let mut before = (set.clone(), naive.clone());
        // Sectors, blocks of 4 KiB, or chunks; a few of other lengths are between them.
        let unit = [1, 8, 64][random.index(3)];
        for step in 0..2000 {
            let unit = if random.below(256) == 0 { 1 } else { unit };
            let count = unit * (1 + random.index(3));
            let start = random.index((SECTORS - count) / unit) * unit;
            let range = SectorRange::new(start as u64, count as u64);
            let inserts = random.below(8) > 0;
            if inserts {
                set.insert(range);
            } else {
                set.remove(range);
            }
            naive[start..start + count].fill(inserts);
            if step % 200 == 0 {
                check(&set, &naive, seed);
                check(&before.0, &before.1, seed);
                let mut joined = before.0.clone();
                joined.insert_all(&set);
                let either = before.1.iter().zip(&naive).map(|(a, b)| *a || *b);
                check(&joined, &either.collect::<Vec<_>>(), seed);
                before = (set.clone(), naive.clone());
            }
        }
    }
}

fn check(set: &RangeSet, naive: &[bool], seed: u64) {
    let mut ranges = set.iter();
    let mut start = 0;
    for same in naive.chunk_by(|a, b| a == b) {
        if same[0] {
            let expected = SectorRange::new(start, same.len() as u64);
            assert_eq!(ranges.next(), Some(expected), "seed {seed}");
        }
        start += same.len() as u64;
    }
    assert_eq!(ranges.next(), None, "seed {seed}");
}
