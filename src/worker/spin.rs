//! How long a worker looks for work itself before it sleeps.
//!
//! To be woken takes longer than most requests, so a worker that expects one at once goes on looking for a while;
//! where it proves wrong it soon sleeps without looking. An idle worker never looks.

use std::time::{Duration, Instant};

use crate::limits::SPIN_MICROSECONDS_MAX;

const LIMIT: Duration = Duration::from_micros(SPIN_MICROSECONDS_MAX);

/// A limit below this is none.
const LEAST: Duration = Duration::from_micros(2);

/// Whether to look once more.
#[derive(Debug)]
pub(super) struct Spin {
    /// How long it is worth to look.
    limit: Duration,
    /// Since when there has been nothing to do.
    since: Option<Instant>,
}

impl Spin {
    pub(super) fn new() -> Self {
        Self {
            limit: LIMIT,
            since: None,
        }
    }

    /// There was something to do.
    pub(super) fn found(&mut self) {
        self.since = None;
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
        self.since = None;
        if time < LIMIT {
            self.limit = LIMIT;
        } else {
            self.limit /= 2;
            if self.limit < LEAST {
                self.limit = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn does_not_look_where_it_is_in_vain_until_a_short_sleep() {
        let (mut spin, now) = (Spin::new(), Instant::now());
        for _ in 0..10 {
            spin.slept(Duration::from_millis(1));
        }
        assert!(!spin.look_again(now));
        spin.slept(LIMIT / 2);
        assert!(spin.look_again(now));
    }
}
