//! Counting the replies to one operation that went to several replicas.

use super::{ReplicaIndex, ReplicaSet};

/// Who was asked, who has answered, and how. The three sets are disjoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    waiting: ReplicaSet,
    succeeded: ReplicaSet,
    failed: ReplicaSet,
}

impl Tally {
    /// A tally that waits for a reply of each replica in `asked`.
    pub fn new(asked: ReplicaSet) -> Self {
        Self {
            waiting: asked,
            ..Self::default()
        }
    }

    /// A tally that waits for each replica in `asked` and remembers who failed before.
    pub fn with_failed(asked: ReplicaSet, failed: ReplicaSet) -> Self {
        Self {
            waiting: asked,
            failed,
            ..Self::default()
        }
    }

    /// Takes a reply in. Each replica that was asked replies once.
    pub fn record(&mut self, replica: ReplicaIndex, success: bool) {
        debug_assert!(self.waiting.contains(replica));
        self.waiting.remove(replica);
        if success {
            self.succeeded.insert(replica);
        } else {
            self.failed.insert(replica);
        }
    }

    /// Whether every reply is in.
    pub fn is_complete(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The replicas whose reply is still out.
    pub fn waiting(&self) -> ReplicaSet {
        self.waiting
    }

    /// The replicas that succeeded.
    pub fn succeeded(&self) -> ReplicaSet {
        self.succeeded
    }

    /// The replicas that failed.
    pub fn failed(&self) -> ReplicaSet {
        self.failed
    }
}
