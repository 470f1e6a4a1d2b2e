//! Where a history goes next: all possibilities one after the other, or random ones.

/// Makes choices, and remembers them.
pub(super) struct Choices {
    /// Each choice of this history: which one, of how many.
    made: Vec<(usize, usize)>,
    next: usize,
    random: Option<u64>,
}

impl Choices {
    /// All histories, in order.
    pub(super) fn all() -> Self {
        Self {
            made: Vec::new(),
            next: 0,
            random: None,
        }
    }

    /// One random history.
    pub(super) fn random(seed: u64) -> Self {
        Self {
            random: Some(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            ..Self::all()
        }
    }

    /// One of `count` possibilities.
    pub(super) fn of(&mut self, count: usize) -> usize {
        if self.next == self.made.len() {
            let first = self.random.as_mut().map_or(0, |state| {
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                usize::try_from(*state >> 33).unwrap() % count
            });
            self.made.push((first, count));
        }
        self.next += 1;
        self.made[self.next - 1].0
    }

    /// One of `count` possibilities, in a random history most often the first.
    pub(super) fn of_rare(&mut self, count: usize) -> usize {
        const RARE: usize = 12;
        if self.random.is_some() && self.of(RARE) > 0 {
            return 0;
        }
        self.of(count)
    }

    /// Whether one of `count` equal chances comes true.
    pub(super) fn chance(&mut self, count: usize) -> bool {
        self.of(count) == count - 1
    }

    /// The next history, of all. `false` after the last one.
    pub(super) fn advance(&mut self) -> bool {
        self.next = 0;
        while let Some((choice, count)) = self.made.pop() {
            if choice + 1 < count {
                self.made.push((choice + 1, count));
                return true;
            }
        }
        false
    }
}
