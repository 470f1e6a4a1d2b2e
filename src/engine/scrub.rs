//! A read that no guest asked for: every replica is asked, whatever the read pattern, and nobody
//! waits.
//!
//! As in a guest's read, a difference is only a suspicion until the read was repeated under the
//! lock of its range. If all agree, no lock is taken at all.

use super::mutant::{Mutant, is_broken};
use super::read::{Purpose, Read};
use super::{Core, Counters, Effects, Progress};
use crate::common::ReplicaSet;
use crate::common::operation::RequestId;
use crate::jobs::ChunkEnd;

impl Read {
    pub(super) fn begin_scrub(
        &mut self,
        id: RequestId,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let in_service = core.shared.in_service();
        let stale = in_service.and(core.shared.stale_in(self.range));
        let partly = stale.iter().any(|replica| {
            let parts = core
                .shared
                .health(|health| health.stale_parts(replica, self.range));
            parts != [self.range]
        });
        if partly {
            // Only under the lock it is known who may vote where.
            return self.confirm(id, ReplicaSet::EMPTY, core);
        }
        let mut asked = in_service.without(stale);
        if is_broken(Mutant::ScrubAsksTooFew) {
            asked = core.preferred(asked, core.policy.threshold);
        }
        if asked.is_empty() {
            return self.confirm(id, ReplicaSet::EMPTY, core);
        }
        self.begin_asking(id, asked, asked, core, effects);
        Progress::Waiting
    }

    /// All replies to the first asking are in. `agree`: they are equal, and of replicas that are
    /// not behind.
    pub(super) fn scrubbed(
        &mut self,
        id: RequestId,
        agree: bool,
        core: &mut Core,
        effects: &mut impl Effects,
    ) -> Progress {
        let Purpose::Scrub { chunk, repair, .. } = self.purpose else {
            unreachable!("only of a scrub");
        };
        let failed = self.tally.failed();
        if !agree {
            Counters::add(&core.shared.counters.suspicions, 1);
            if is_broken(Mutant::ScrubUnconfirmed) {
                return self.confirm_unlocked(id, core, effects);
            }
            return self.confirm(id, if repair { failed } else { ReplicaSet::EMPTY }, core);
        }
        if self.tally.succeeded().len() < core.policy.threshold || (repair && !failed.is_empty()) {
            return self.confirm(id, if repair { failed } else { ReplicaSet::EMPTY }, core);
        }
        let end = ChunkEnd {
            unread: self.unread(core),
            ..ChunkEnd::default()
        };
        core.chunk_ended(chunk, end);
        self.retire(core)
    }

    /// The members that should have been read and were not.
    pub(super) fn unread(&self, core: &Core) -> ReplicaSet {
        let stale = core.shared.stale_in(self.range);
        let members = core.shared.members();
        members.without(self.tally.succeeded()).without(stale)
    }
}
