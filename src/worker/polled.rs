//! How often a worker looks at virtqueues whose drivers do not kick (vhost-user,
//! VHOST_USER_SET_VRING_KICK without a descriptor): often while there are requests, and more rarely
//! the longer there are none.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::limits::{POLL_MICROSECONDS_MAX, POLL_MICROSECONDS_MIN};

const SHORTEST: Duration = Duration::from_micros(POLL_MICROSECONDS_MIN);
const LONGEST: Duration = Duration::from_micros(POLL_MICROSECONDS_MAX);

/// The virtqueues that are polled.
#[derive(Debug)]
pub(super) struct Polled {
    /// By slot and virtqueue.
    queues: BTreeSet<(usize, usize)>,
    pause: Duration,
}

impl Polled {
    pub(super) fn new() -> Self {
        Self {
            queues: BTreeSet::new(),
            pause: SHORTEST,
        }
    }

    /// Whether a virtqueue is polled from now on.
    pub(super) fn set(&mut self, slot: usize, queue: usize, is_polled: bool) {
        if is_polled {
            self.queues.insert((slot, queue));
            self.pause = SHORTEST;
        } else {
            self.queues.remove(&(slot, queue));
        }
    }

    /// There were requests.
    pub(super) fn found(&mut self) {
        self.pause = SHORTEST;
    }

    /// How long the worker may sleep now, if it polls.
    pub(super) fn pause(&mut self) -> Option<Duration> {
        if self.queues.is_empty() {
            return None;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_virtqueues_are_polled_less_and_less_often() {
        let mut polled = Polled::new();
        assert_eq!(polled.pause(), None);
        polled.set(0, 1, true);
        assert_eq!(polled.pause(), Some(SHORTEST));
        assert_eq!(polled.pause(), Some(2 * SHORTEST));
        for _ in 0..20 {
            assert!(polled.pause().unwrap() <= LONGEST);
        }
        assert_eq!(polled.pause(), Some(LONGEST));
        polled.found();
        assert_eq!(polled.pause(), Some(SHORTEST));
        polled.set(0, 1, false);
        assert_eq!(polled.pause(), None);
    }
}
