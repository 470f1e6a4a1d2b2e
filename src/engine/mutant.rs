//! Rules of the engine that a test can break, to show that the simulator notices.
//!
//! Each thread has its own switch; no rule is broken unless a test says so, and without the feature
//! `sim` none can be: the questions are constants then.

/// A rule, and how it is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// R2: the replies are compared as a whole, not sector by sector.
    VotePerRequest,
    /// W2: every lock is granted at once.
    NoRangeLock,
    /// R5, R6: replies that differ are voted on and rewritten without asking again.
    RewriteUnconfirmed,
    /// W1: replicas are written from memory that the guest can change. Broken by the simulator, as
    /// the engine never sees guest memory.
    FanOutFromGuestMemory,
    /// W4: a replica discards in its own way, and leaves what it likes. Broken by the simulator, as
    /// the engine asks for zeroes only.
    DiscardAsYouLike,
    /// R7: the guest is answered by one vote less than t'.
    EarlyDecision,
    /// W5: a flush succeeds if t replicas flushed, whatever they hold.
    FlushCountsSuccesses,
    /// W3: a replica that failed a write goes on voting.
    FailedWriteNotStale,
    /// W5: a replica that failed a flush goes on voting.
    FailedFlushNotStale,
    /// W6: a replica that missed writes while it was out of the set votes on them when it is back.
    ReturnNotStale,
    /// W6: a replica comes back while it still has operations.
    ReturnEarly,
    /// A replica that was added votes at once, wherever.
    AddedNotStale,
    /// The disk grows, and what is known of the replicas does not cover what is new.
    GrowthUntold,
    /// Replicas that the disk grows by hold there what they like. Broken by the simulator, as the
    /// engine asks for nothing.
    GrownNotZeroed,
    /// A replica is removed although it is needed.
    RemovedNeeded,
    /// A replica is removed that holds the last durable copies of a sector.
    RemovedNotDurable,
    /// The place of a removed replica is taken while it still has operations.
    ReleasedEarly,
    /// What could not be copied to a replica counts as copied.
    FailedCopyTrusted,
    /// A scrub asks only as many replicas as make a quorum.
    ScrubAsksTooFew,
    /// A scrub believes a difference without asking again.
    ScrubUnconfirmed,
    /// A scrub that is to repair does not.
    RepairForgotten,
}

/// All of them.
pub const ALL: [Mutant; 21] = [
    Mutant::VotePerRequest,
    Mutant::NoRangeLock,
    Mutant::RewriteUnconfirmed,
    Mutant::FanOutFromGuestMemory,
    Mutant::DiscardAsYouLike,
    Mutant::EarlyDecision,
    Mutant::FlushCountsSuccesses,
    Mutant::FailedWriteNotStale,
    Mutant::FailedFlushNotStale,
    Mutant::ReturnNotStale,
    Mutant::ReturnEarly,
    Mutant::AddedNotStale,
    Mutant::GrowthUntold,
    Mutant::GrownNotZeroed,
    Mutant::RemovedNeeded,
    Mutant::RemovedNotDurable,
    Mutant::ReleasedEarly,
    Mutant::FailedCopyTrusted,
    Mutant::ScrubAsksTooFew,
    Mutant::ScrubUnconfirmed,
    Mutant::RepairForgotten,
];

#[cfg(any(test, feature = "sim"))]
thread_local! {
    static BROKEN: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Breaks a rule on this thread, or none.
#[cfg(any(test, feature = "sim"))]
pub fn breaks(mutant: Option<Mutant>) {
    BROKEN.set(mutant);
}

/// Whether the rule is broken on this thread.
#[cfg(any(test, feature = "sim"))]
pub fn is_broken(mutant: Mutant) -> bool {
    BROKEN.get() == Some(mutant)
}

/// No rule is ever broken.
#[cfg(not(any(test, feature = "sim")))]
pub const fn is_broken(_mutant: Mutant) -> bool {
    false
}
