//! Random numbers from one seed: SplitMix64, so that a seed means the same run everywhere and for
//! ever.
//!
//! Invariant: what it yields depends on the seed and on the order of the calls alone.

/// A source of random numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The source that `seed` names.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        debug_assert!(bound > 0);
        let product = u128::from(self.bits()) * u128::from(bound);
        u64::try_from(product >> 64).expect("the high half")
    }

    /// An index into something of `len` elements, which is not 0.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).expect("below a usize")
    }

    /// True in `per_65536` of 65536 cases.
    pub fn chance(&mut self, per_65536: u32) -> bool {
        per_65536 != 0 && (self.bits() >> 48) < u64::from(per_65536)
    }

    /// One of the bits set in `mask`, which is not 0, by its number.
    pub fn bit(&mut self, mask: u64) -> u32 {
        let mut rest = mask;
        for _ in 0..self.below(u64::from(mask.count_ones())) {
            rest &= rest - 1;
        }
        rest.trailing_zeros()
    }

    /// Some of the bits set in `mask`.
    pub fn part(&mut self, mask: u32) -> u32 {
        (self.bits() >> 32) as u32 & mask
    }

    /// One of the values.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_splitmix64() {
        let mut random = Random::new(1_234_567);
        assert_eq!(random.bits(), 6_457_827_717_110_365_317);
        assert_eq!(random.bits(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn bits_are_those_of_the_mask() {
        let mut random = Random::new(7);
        let mut seen = 0;
        for _ in 0..200 {
            seen |= 1u64 << random.bit(0x8000_0000_0100_0005);
        }
        assert_eq!(seen, 0x8000_0000_0100_0005);
    }
}
