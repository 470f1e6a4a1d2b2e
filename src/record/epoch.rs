//! Epochs number the tables of a disk, and branches its histories.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Names a table: its number, and the run of the daemon that proposed it. Two runs that begin with
/// the same table may propose tables of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// One more than that of the table before, or more.
    pub number: u64,
    /// Drawn at each start.
    pub run: Uuid,
}

impl Epoch {
    /// Before the first table: nothing was served.
    pub const NONE: Self = Self {
        number: 0,
        run: Uuid::nil(),
    };

    /// The next one in the same run.
    #[must_use]
    pub fn next(self) -> Self {
        Self {
            number: self.number + 1,
            ..self
        }
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.number.fmt(f)
    }
}

/// A history of the disk, one of a lineage: it begins when the disk is created, or when a start is
/// forced although replicas that could have a later history are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Drawn when it begins.
    pub id: Uuid,
    /// The number of its first epoch.
    pub since: u64,
}
