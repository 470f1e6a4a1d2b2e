//! A set of ranges that becomes coarser at its bound never loses a sector: what is stale stays
//! stale.
//!
//! The unit tests of `RangeSet` check this too. This one is cheap to build, so `make mutants` uses
//! it.

use quorum_blk::common::SectorRange;
use quorum_blk::common::ranges::RangeSet;
use quorum_blk::sim::random::Random;

const SECTORS: usize = 512;

#[test]
fn bounded_they_lose_no_sector() {
    for seed in 0..60 {
        let mut random = Random::new(seed);
        let mut set = RangeSet::bounded(1 + random.index(64));
        let mut naive = [false; SECTORS];
        for _ in 0..150 {
            let count = 1 + random.index(3);
            let start = random.index(SECTORS - count);
            let range = SectorRange::new(start as u64, count as u64);
            let inserts = random.below(8) > 0;
            if inserts {
                set.insert(range);
            } else {
                set.remove(range);
            }
            naive[start..start + count].fill(inserts);
            for (sector, expected) in naive.into_iter().enumerate() {
                let found = set.overlaps(SectorRange::new(sector as u64, 1));
                assert!(found || !expected, "seed {seed}: sector {sector} is lost");
            }
        }
    }
}
