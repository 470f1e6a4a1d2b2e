//! How long a worker polls for work before it sleeps.
//!
//! A wake-up takes longer than most requests, so a worker that expects a request soon polls for a
//! while first. Each time it polls in vain it halves the time, down to none. Sleeping also delays
//! the guest and thus its next request, so a sleep is longer than the polling that would have
//! found the request: after several short sleeps the worker tries polling again, less often each
//! time that was in vain. An idle worker does not poll.

use std::time::{Duration, Instant};

use crate::limits::SPIN_MICROSECONDS_MAX;

const LIMIT: Duration = Duration::from_micros(SPIN_MICROSECONDS_MAX);

/// Polling for less than this pays for nothing: the limit becomes zero.
const LEAST: Duration = Duration::from_micros(2);

/// A sleep this short may owe its length to the wake-up.
const SHORT: Duration = Duration::from_micros(4 * SPIN_MICROSECONDS_MAX);

/// Short sleeps before polling is tried again: after polling paid off, and at most.
const PATIENCE: u32 = 8;
const PATIENCE_MAX: u32 = 1024;

/// Decides whether to poll once more.
#[derive(Debug)]
pub(super) struct Spin {
    /// How long polling pays off.
    limit: Duration,
    /// Since when the worker has had no work.
    since: Option<Instant>,
    /// Short sleeps since polling last stopped, and how many start it again.
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

    /// There was work.
    pub(super) fn found(&mut self) {
        if self.since.take().is_some() {
            self.limit = LIMIT;
            self.patience = PATIENCE;
        }
    }

    /// There is no work `now`. Returns whether to poll again; if not, sleep.
    pub(super) fn poll_again(&mut self, now: Instant) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        let since = *self.since.get_or_insert(now);
        now.saturating_duration_since(since) < self.limit
    }

    /// The worker slept this long until there was work.
    pub(super) fn slept(&mut self, time: Duration) {
        if self.since.take().is_some() {
            // It had polled in vain.
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

    /// Polls until the limit in vain, then sleeps. Returns how long it polled.
    fn in_vain(spin: &mut Spin, sleep: Duration) -> Duration {
        let start = Instant::now();
        let mut polled = Duration::ZERO;
        while spin.poll_again(start + polled) {
            polled += Duration::from_micros(1);
        }
        spin.slept(sleep);
        polled
    }

    #[test]
    fn polls_for_a_while_then_sleeps() {
        let (mut spin, start) = (Spin::new(), Instant::now());
        assert!(spin.poll_again(start));
        assert!(spin.poll_again(start + LIMIT / 2));
        assert!(!spin.poll_again(start + LIMIT));
        spin.found();
        assert!(spin.poll_again(start + LIMIT), "work restarts the limit");
    }

    #[test]
    fn an_idle_worker_does_not_poll() {
        let mut spin = Spin::new();
        let polled: Duration = (0..10).map(|_| in_vain(&mut spin, LONG)).sum();
        assert!(polled < 2 * LIMIT, "{polled:?}");
        assert!((0..10_000).all(|_| in_vain(&mut spin, LONG).is_zero()));
    }

    #[test]
    fn polls_again_after_some_short_sleeps() {
        let mut spin = Spin::new();
        while !in_vain(&mut spin, LONG).is_zero() {}
        let sleeps = (0..)
            .take_while(|_| in_vain(&mut spin, SHORT / 2).is_zero())
            .count();
        assert_eq!(sleeps, PATIENCE as usize);
        spin.poll_again(Instant::now());
        spin.found();
        assert_eq!(in_vain(&mut spin, LONG), LIMIT, "polling paid off");
    }

    #[test]
    fn attempts_in_vain_become_rare() {
        let mut spin = Spin::new();
        let sleeps = 100_000;
        let polled: Duration = (0..sleeps).map(|_| in_vain(&mut spin, SHORT / 2)).sum();
        assert!(
            polled * 500 < SHORT / 2 * sleeps,
            "{polled:?} in {sleeps} sleeps"
        );
    }
}
