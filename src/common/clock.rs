//! The time of a worker's turn.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// The time since the start of a worker, which sets it once per turn of its loop. Clones show the
/// same time, so that no part of a worker has a clock of its own.
#[derive(Clone, Debug, Default)]
pub struct TurnClock(Rc<Cell<Duration>>);

impl TurnClock {
    /// The time of this turn.
    pub fn now(&self) -> Duration {
        self.0.get()
    }

    /// Sets the time, which never goes back.
    pub fn set(&self, now: Duration) {
        assert!(now >= self.now(), "time goes back");
        self.0.set(now);
    }
}
