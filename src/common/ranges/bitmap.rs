//! A bit for each granule of a region.

use std::ops::Range;

/// Bits of a bitmap.
pub(super) const BITS: usize = 4096;

const WORD_BITS: usize = u64::BITS as usize;

/// See the [module](self).
#[derive(Clone, Debug)]
pub(super) struct Bitmap {
    ones: u64,
    words: [u64; BITS / WORD_BITS],
}

impl Default for Bitmap {
    fn default() -> Self {
        Self {
            ones: 0,
            words: [0; BITS / WORD_BITS],
        }
    }
}

impl Bitmap {
    pub(super) fn ones(&self) -> u64 {
        self.ones
    }

    pub(super) fn is_full(&self) -> bool {
        self.ones == BITS as u64
    }

    /// Sets `bits`. Returns how many of them were not set.
    pub(super) fn set(&mut self, bits: Range<usize>) -> u64 {
        let mut new = 0;
        for (word, mask) in masks(bits) {
            new += u64::from((mask & !self.words[word]).count_ones());
            self.words[word] |= mask;
        }
        self.ones += new;
        new
    }

    /// Clears `bits`. Returns how many of them were set.
    pub(super) fn clear(&mut self, bits: Range<usize>) -> u64 {
        let mut removed = 0;
        for (word, mask) in masks(bits) {
            removed += u64::from((mask & self.words[word]).count_ones());
            self.words[word] &= !mask;
        }
        self.ones -= removed;
        removed
    }

    /// Sets all that are set in `other`.
    pub(super) fn set_all(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
        self.ones = self.count();
    }

    /// The bits outside of which `other` is the same.
    pub(super) fn unlike(&self, other: &Self) -> Range<usize> {
        let differs = |word: &usize| self.words[*word] != other.words[*word];
        let mut words = 0..self.words.len();
        let first = words.find(differs).unwrap_or(self.words.len());
        let last = words.rev().find(differs).unwrap_or(first);
        first * WORD_BITS..((last + 1) * WORD_BITS).min(BITS)
    }

    /// The first bit from `from` on that is set, or with `set` false is not.
    pub(super) fn next(&self, from: usize, set: bool) -> Option<usize> {
        let mut mask = u64::MAX << (from % WORD_BITS);
        for word in from / WORD_BITS..self.words.len() {
            let bits = if set {
                self.words[word]
            } else {
                !self.words[word]
            };
            if bits & mask != 0 {
                return Some(word * WORD_BITS + (bits & mask).trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }

    /// Asserts that the count is right.
    pub(super) fn self_check(&self) {
        assert_eq!(self.ones, self.count());
    }

    fn count(&self) -> u64 {
        let ones = self.words.iter().map(|word| u64::from(word.count_ones()));
        ones.sum()
    }
}

/// The words that `bits` are in, each with a mask of them.
fn masks(bits: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (bits.start / WORD_BITS..bits.end.div_ceil(WORD_BITS)).map(move |word| {
        let from = bits.start.saturating_sub(word * WORD_BITS);
        let to = (bits.end - word * WORD_BITS).min(WORD_BITS);
        (word, (u64::MAX >> (WORD_BITS - (to - from))) << from)
    })
}
