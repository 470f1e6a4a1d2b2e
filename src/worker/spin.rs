//! How long a worker looks for work itself before it sleeps.
//!
//! To be woken takes longer than most requests, so a worker that expects one at once goes on
//! looking for a while; where it proves wrong it soon sleeps without looking. Sleeping makes the
//! next request come later, so that sleeps are longer than the looks were that would have found it:
//! after some short ones a look is tried anew, and the less often, the more such tries were in
//! vain. An idle worker never looks.

use std::time::{Duration, Instant};

use crate::limits::SPIN_MICROSECONDS_MAX;

const LIMIT: Duration = Duration::from_micros(SPIN_MICROSECONDS_MAX);

/// A limit below this is none.
const LEAST: Duration = Duration::from_micros(2);

/// A sleep that was perhaps as long because it was one.
const SHORT: Duration = Duration::from_micros(4 * SPIN_MICROSECONDS_MAX);

/// Short sleeps before looking is tried anew: after it was of use, and at most.
const PATIENCE: u32 = 8;
const PATIENCE_MAX: u32 = 1024;

/// Whether to look once more.
#[derive(Debug)]
pub(super) struct Spin {
    /// How long it is worth to look.
    limit: Duration,
    /// Since when there has been nothing to do.
    since: Option<Instant>,
    /// Short sleeps since it was last worth nothing to look, and how many it takes.
    short_sleeps: u32,
    patience: u32,
}

impl Spin {
    pub(super) fn new() -> Self {
        Self {
            limit: LIMIT,
            since: None,
            short_sleeps: 0,
            patience: PATIENCE,
        }
    }

    /// There was something to do.
    pub(super) fn found(&mut self) {
        if self.since.take().is_some() {
            self.limit = LIMIT;
            self.patience = PATIENCE;
        }
    }

    /// There is nothing to do `now`. `true`: look again; `false`: sleep.
    pub(super) fn look_again(&mut self, now: Instant) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let since = *self.since.get_or_insert(now);
        now.saturating_duration_since(since) < self.limit
    }

    /// The worker has slept, for so long, until there was something to do.
    pub(super) fn slept(&mut self, time: Duration) {
        if self.since.take().is_some() {
            // It had looked, in vain.
            self.limit /= 2;
            if self.limit < LEAST {
                self.limit = Duration::ZERO;
            }
        } else if time < SHORT {
            self.short_sleeps += 1;
            if self.short_sleeps >= self.patience {
                self.short_sleeps = 0;
                self.patience = (self.patience * 2).min(PATIENCE_MAX);
                self.limit = LIMIT;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_millis(1);

    /// Looks until the limit, finds nothing and sleeps. How long it looked.
    fn in_vain(spin: &mut Spin, sleep: Duration) -> Duration {
        let start = Instant::now();
        let mut looked = Duration::ZERO;
        while spin.look_again(start + looked) {
            looked += Duration::from_micros(1);
        }
        spin.slept(sleep);
        looked
    }

    #[test]
    fn looks_for_a_while_then_sleeps() {
        let (mut spin, start) = (Spin::new(), Instant::now());
        assert!(spin.look_again(start));
        assert!(spin.look_again(start + LIMIT / 2));
        assert!(!spin.look_again(start + LIMIT));
        spin.found();
        assert!(spin.look_again(start + LIMIT), "the while begins anew");
    }

    #[test]
    fn an_idle_worker_does_not_look() {
        let mut spin = Spin::new();
        let looked: Duration = (0..10).map(|_| in_vain(&mut spin, LONG)).sum();
        assert!(looked < 2 * LIMIT, "{looked:?}");
        assert!((0..10_000).all(|_| in_vain(&mut spin, LONG).is_zero()));
    }

    #[test]
    fn looks_anew_after_some_short_sleeps() {
        let mut spin = Spin::new();
        while !in_vain(&mut spin, LONG).is_zero() {}
        let sleeps = (0..)
            .take_while(|_| in_vain(&mut spin, SHORT / 2).is_zero())
            .count();
        assert_eq!(sleeps, PATIENCE as usize);
        spin.look_again(Instant::now());
        spin.found();
        assert_eq!(in_vain(&mut spin, LONG), LIMIT, "it was of use");
    }

    #[test]
    fn tries_that_are_in_vain_become_rare() {
        let mut spin = Spin::new();
        let sleeps = 100_000;
        let looked: Duration = (0..sleeps).map(|_| in_vain(&mut spin, SHORT / 2)).sum();
        assert!(
            looked * 500 < SHORT / 2 * sleeps,
            "{looked:?} in {sleeps} sleeps"
        );
    }
}
