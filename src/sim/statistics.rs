//! What runs were made of, in numbers.

/// What a run was made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Steps.
    pub steps: u64,
    /// Guest requests.
    pub requests: u64,
    /// Guest requests that failed.
    pub failed: u64,
    /// Guest requests that were held; one that is held again counts again.
    pub held: u64,
    /// Crashes.
    pub crashes: u64,
    /// Kills of the daemon.
    pub kills: u64,
    /// Clean ends of the daemon.
    pub clean_ends: u64,
    /// Images that another program has modified after a clean end.
    pub edited: u64,
    /// Images that were lost while the disk was served.
    pub lost: u64,
    /// Reports that a replica holds a corrupt version.
    pub accusations: u64,
    /// Evictions.
    pub evictions: u64,
    /// Members that were missing at the first start.
    pub missing: u64,
    /// Starts without some members.
    pub subsets: u64,
    /// Starts that were refused.
    pub refused: u64,
    /// Members that were missing at a start with records, and whose image was there later.
    pub found: u64,
    /// Old copies of images, or of their records, that were put back.
    pub put_back: u64,
    /// Forced starts.
    pub forced: u64,
    /// Images that were taken as the truth.
    pub adopted: u64,
    /// Replicas that turned up after a forced start had left them behind, and were refused.
    pub split: u64,
    /// Replicas added.
    pub added: u64,
    /// Replicas removed.
    pub removed: u64,
    /// Replicas removed although the disk needed them.
    pub given_up: u64,
    /// Writes of what a preferred replica holds.
    pub preferred: u64,
    /// Those of them that t replicas hold.
    pub decided: u64,
    /// Times that the disk has grown.
    pub grown: u64,
    /// Times that the vote threshold was raised.
    pub raised: u64,
    /// Completed resyncs.
    pub resynced: u64,
    /// Scrubs that the operator began.
    pub scrubs: u64,
}

impl Statistics {
    /// Adds those of another run.
    pub fn add(&mut self, other: Self) {
        self.steps += other.steps;
        self.requests += other.requests;
        self.failed += other.failed;
        self.held += other.held;
        self.crashes += other.crashes;
        self.kills += other.kills;
        self.clean_ends += other.clean_ends;
        self.edited += other.edited;
        self.lost += other.lost;
        self.accusations += other.accusations;
        self.evictions += other.evictions;
        self.missing += other.missing;
        self.subsets += other.subsets;
        self.refused += other.refused;
        self.found += other.found;
        self.put_back += other.put_back;
        self.forced += other.forced;
        self.adopted += other.adopted;
        self.split += other.split;
        self.added += other.added;
        self.removed += other.removed;
        self.given_up += other.given_up;
        self.preferred += other.preferred;
        self.decided += other.decided;
        self.grown += other.grown;
        self.raised += other.raised;
        self.resynced += other.resynced;
        self.scrubs += other.scrubs;
    }
}
