//! Counting the replies to one operation that went to several replicas.

use crate::common::{ReplicaIndex, ReplicaSet};

/// The replicas that were asked, by what they have replied. The three sets are disjoint.
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

    /// Waits for each replica in `asked` as well. None of them was asked before.
    pub fn ask(&mut self, asked: ReplicaSet) {
        assert!(
            self.asked().and(asked).is_empty(),
            "a replica is asked once"
        );
        self.waiting = self.waiting.or(asked);
    }

    /// All replicas that were asked.
    pub fn asked(&self) -> ReplicaSet {
        self.waiting.or(self.succeeded).or(self.failed)
    }

    /// Takes a reply in. Each replica that was asked replies once.
    pub fn record(&mut self, replica: ReplicaIndex, success: bool) {
        assert!(self.waiting.contains(replica), "a replica replies once");
        self.waiting.remove(replica);
        if success {
            self.succeeded.insert(replica);
        } else {
            self.failed.insert(replica);
        }
    }

    /// Waits no longer for the replicas in `gone`.
    pub fn forget(&mut self, gone: ReplicaSet) {
        self.waiting = self.waiting.without(gone);
    }

    /// Asserts that the three sets are disjoint.
    pub fn self_check(&self) {
        let of_sets = self.waiting.len() + self.succeeded.len() + self.failed.len();
        assert_eq!(of_sets, self.asked().len(), "a reply counts once");
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
