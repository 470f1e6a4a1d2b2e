//! How often what the worker threads share has changed, so that tests do not look again at what has
//! not. Production does not count.

#[derive(Debug, Default)]
pub(super) struct Changes {
    #[cfg(any(test, feature = "sim"))]
    counted: Counted,
}

#[cfg(any(test, feature = "sim"))]
#[derive(Debug, Default)]
struct Counted {
    health: u64,
    health_checked: Option<u64>,
    locks: u64,
    locks_checked: Option<u64>,
}

#[cfg(any(test, feature = "sim"))]
impl Changes {
    /// The health of the replicas is about to change.
    pub(super) fn of_health(&mut self) {
        self.counted.health += 1;
    }

    /// The locks are about to change.
    pub(super) fn of_locks(&mut self) {
        self.counted.locks += 1;
    }

    /// Changes of the health so far.
    pub(super) fn health(&self) -> u64 {
        self.counted.health
    }

    /// Whether the health has changed since the last call.
    pub(super) fn health_to_check(&mut self) -> bool {
        let now = Some(self.counted.health);
        std::mem::replace(&mut self.counted.health_checked, now) != now
    }

    /// Whether the locks have changed since the last call.
    pub(super) fn locks_to_check(&mut self) -> bool {
        let now = Some(self.counted.locks);
        std::mem::replace(&mut self.counted.locks_checked, now) != now
    }
}

#[cfg(not(any(test, feature = "sim")))]
impl Changes {
    pub(super) fn of_health(&mut self) {}

    pub(super) fn of_locks(&mut self) {}

    pub(super) fn health_to_check(&mut self) -> bool {
        true
    }

    pub(super) fn locks_to_check(&mut self) -> bool {
        true
    }
}
