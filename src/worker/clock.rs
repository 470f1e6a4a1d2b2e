//! The time by which a worker finds replicas late.
//!
//! Time in which the thread could not run does not count: it had no CPU, or the host was
//! suspended. Otherwise every replica would look late after such a pause.

use std::time::{Duration, Instant};

use crate::common::clock::TurnClock;
use crate::replica::ring::Wait;

/// The longest that one turn of the loop counts for, sleep excluded.
const TURN_LIMIT: Duration = Duration::from_millis(50);

/// The clock of one worker.
pub(super) struct Clock {
    /// When the clock was last advanced.
    advanced_at: Instant,
    turn: TurnClock,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self {
            advanced_at: Instant::now(),
            turn: TurnClock::default(),
        }
    }

    /// The time at the last advance.
    pub(super) fn now(&self) -> Duration {
        self.turn.now()
    }

    /// The clock as the other parts of the worker see it.
    pub(super) fn turn(&self) -> TurnClock {
        self.turn.clone()
    }

    /// When the clock was last advanced, with pauses of the thread included.
    pub(super) fn advanced_at(&self) -> Instant {
        self.advanced_at
    }

    /// Advances the clock after a turn that waited as `waited` says. Returns the new time.
    pub(super) fn advance(&mut self, waited: Wait) -> Duration {
        let advanced_at = Instant::now();
        let limit = match waited {
            Wait::No => TURN_LIMIT,
            Wait::AtMost(limit) => limit.saturating_add(TURN_LIMIT),
            Wait::Forever => Duration::MAX,
        };
        let passed = (advanced_at - self.advanced_at).min(limit);
        self.turn.set(self.turn.now() + passed);
        self.advanced_at = advanced_at;
        self.turn.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_the_thread_could_not_run_does_not_count() {
        let mut clock = Clock::new();
        let ago = |seconds| Instant::now() - Duration::from_secs(seconds);
        clock.advanced_at = ago(3600);
        let wait = Duration::from_millis(2);
        assert_eq!(clock.advance(Wait::AtMost(wait)), wait + TURN_LIMIT);
        clock.advanced_at = ago(5);
        assert_eq!(clock.advance(Wait::No), wait + 2 * TURN_LIMIT);
        clock.advanced_at = ago(5);
        let now = clock.advance(Wait::AtMost(Duration::from_secs(60)));
        assert!(
            now >= Duration::from_secs(5),
            "an intended sleep counts in full: {now:?}"
        );
    }
}
