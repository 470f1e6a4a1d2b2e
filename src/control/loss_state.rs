//! What is lost with a replica (W11), as the monitor shows it.

use serde::Serialize;

/// The sectors that are lost with a replica, or would be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LossState {
    /// The replica is removed: this is lost. Otherwise nothing has changed.
    pub removed: bool,
    /// No vote can have a winner: too few other replicas are up to date.
    pub lost_sectors: u64,
    /// Too few others are known to be up to date, and the vote decides whether they are.
    pub doubtful_sectors: u64,
    /// Too few others have it on stable storage.
    pub not_durable_sectors: u64,
    /// A write has failed there, and no vote has decided what it has left.
    pub undecided_sectors: u64,
}
