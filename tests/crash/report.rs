//! The figures of a run.

use std::ops::AddAssign;

/// What was tried, and how often it failed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    /// Crash states.
    pub(crate) states: usize,
    /// Starts with them: with all replicas, and with some.
    pub(crate) starts: usize,
    /// Starts that had to be refused.
    pub(crate) refusals: usize,
    /// States of a second crash.
    pub(crate) second_crashes: usize,
    /// Starts after which some sectors could not be read, where that is no promise.
    pub(crate) unreadable: usize,
    /// Starts that broke a promise.
    pub(crate) failures: usize,
}

impl AddAssign for Figures {
    fn add_assign(&mut self, other: Self) {
        self.states += other.states;
        self.starts += other.starts;
        self.refusals += other.refusals;
        self.second_crashes += other.second_crashes;
        self.unreadable += other.unreadable;
        self.failures += other.failures;
    }
}

impl Figures {
    /// One line for a class.
    pub(crate) fn line(&self, class: &str) -> String {
        format!(
            "crash: {class}: {} states, {} starts, {} refused, {} second crashes, {} unreadable, \
             {} failed",
            self.states,
            self.starts,
            self.refusals,
            self.second_crashes,
            self.unreadable,
            self.failures
        )
    }
}
