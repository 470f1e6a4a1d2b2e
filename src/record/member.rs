//! A member of a disk, as the table of a record has it.

use serde::Serialize;
use uuid::Uuid;

use super::epoch::Epoch;
use super::layout::Layout;
use super::stale::Stale;
use crate::limits::RECORD_NAME_BYTES_MAX;

/// A replica of the disk, whether it is there or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Member {
    /// Drawn when it became a replica of this disk.
    pub id: Uuid,
    /// Its node-name, cut by [`short_name`]: for people, and to say which path is missing.
    pub node_name: String,
    /// Whether its record is kept up to date.
    pub state: MemberState,
    /// Where it is stale.
    pub stale: Stale,
    /// Where a failed flush may have lost its newest version, or not (W7). What it holds is no
    /// older than what as many members as the vote threshold have made durable. Where it is also
    /// stale, it is stale.
    pub doubtful: Stale,
    /// It is stale also wherever the intent map is marked.
    pub stale_where_changed: bool,
}

/// Whether the record of a member is kept up to date.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "is")]
pub enum MemberState {
    /// It is in service, and its record is as new as any.
    Active,
    /// It is evicted, missing, not yet complete, or its record could not be written.
    Inactive {
        /// The last epoch that its own record certainly reached; `None` if it never had one. Before
        /// its stale set shrinks, this must be the epoch of the table: what was copied to it is not
        /// in an older copy of it.
        holds: Option<Epoch>,
    },
}

impl Member {
    /// A member that is active and stale nowhere.
    pub fn new(id: Uuid, node_name: &str) -> Self {
        Self {
            id,
            node_name: short_name(node_name).to_owned(),
            state: MemberState::Active,
            stale: Stale::None,
            doubtful: Stale::None,
            stale_where_changed: false,
        }
    }

    /// Whether its record is kept up to date.
    pub fn is_active(&self) -> bool {
        self.state == MemberState::Active
    }

    /// It is stale and doubtful also where `earlier` is.
    pub fn include(&mut self, earlier: &Self, layout: Layout) {
        self.stale = self.stale.union(&earlier.stale, layout);
        let doubtful = self.doubtful.union(&earlier.doubtful, layout);
        self.doubtful = doubtful.without(&self.stale, layout);
    }
}

/// A node-name as records keep it.
pub fn short_name(name: &str) -> &str {
    let ends = (0..=RECORD_NAME_BYTES_MAX.min(name.len())).rev();
    let end = ends.into_iter().find(|end| name.is_char_boundary(*end));
    &name[..end.unwrap_or_default()]
}
