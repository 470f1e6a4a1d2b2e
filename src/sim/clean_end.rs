//! S7: the daemon ends while nothing is in flight, flushes all replicas in service, and has the
//! records say so. Before the next start another program may modify an image: such a replica is
//! stale everywhere.

use super::Violation;
use super::model::Value;
use super::plan::bits;
use super::state::{Checked, World, trace};
use crate::common::{ReplicaIndex, ReplicaSet};
use crate::record::Fingerprint;
use crate::record::start::Start;

impl World {
    /// Whether the daemon may end now. Not covered: what a flush would still have reported of a
    /// page that is lost.
    pub(super) fn may_end(&self) -> bool {
        let idle = self.pending.is_empty() && self.flights.is_empty();
        let in_service = self.ledger.evicted & self.members == 0;
        let hangs = || self.members().any(|replica| self.hangs(replica));
        self.plan.records && idle && in_service && !hangs()
    }

    /// The daemon ends, and starts again.
    pub(super) fn end(&mut self) -> Checked {
        // What is known and not recorded yet is recorded by the end, or only by some replicas.
        let is_recorded = self.may_change_members();
        self.records.is_closed = self.close();
        self.records.is_cut_short = !is_recorded && !self.records.is_closed;
        let result = self.crash(true);
        self.records.is_closed = false;
        self.records.is_cut_short = false;
        result
    }

    /// Returns whether the records say that the end was clean.
    fn close(&mut self) -> bool {
        for replica in bits(u64::from(self.members & !self.missing)) {
            let all = self.replicas[replica].all();
            self.write_back(replica, all);
        }
        if self.shared.anything_undecided() {
            return false;
        }
        let Some((mut keeper, wanted)) = self.shared.forget() else {
            return false;
        };
        self.model.flushed(self.now, self.now);
        let in_service = self.shared.in_service();
        let images: Vec<(ReplicaIndex, Fingerprint)> = in_service
            .iter()
            .map(|replica| (replica, self.fingerprint(replica.as_usize())))
            .collect();
        keeper.close(&images, &wanted);
        // The daemon may be killed meanwhile.
        let mut writes = match self.random.below(4) {
            0 => self.random.below(8),
            _ => u64::MAX,
        };
        while let Some(round) = keeper.next_round() {
            let mut written = ReplicaSet::EMPTY;
            for (replica, write) in &round.writes {
                if writes == 0 {
                    return false;
                }
                writes -= 1;
                written.insert(*replica);
                self.write_whole(replica.as_usize(), write);
            }
            keeper.ended(written);
        }
        keeper.is_durable()
    }

    /// What a start compares.
    pub(super) fn fingerprint(&self, replica: usize) -> Fingerprint {
        Fingerprint {
            bytes: self.plan.disk().bytes(),
            modified_ns: i64::try_from(self.replicas[replica].modified()).expect("few"),
        }
    }

    /// After a clean end another program writes to an image.
    pub(super) fn edit_outside(&mut self) {
        let others_decide = self.threshold.min(self.least_threshold) > 1
            && self.count() > self.threshold
            && self.records.put_back | self.records.left_behind == 0;
        if !self.records.is_closed || !others_decide || self.random.below(3) > 0 {
            return;
        }
        let replica = self.random.bit(u64::from(self.members)) as usize;
        let sector = self.random.index(self.changed_at.len());
        self.rotten += 1;
        trace!(
            self,
            at 1 << sector,
            "another program writes to the image of replica {replica}: {sector}"
        );
        self.statistics.edited += 1;
        self.replicas[replica].rot(sector, Value::rotten(self.rotten));
        self.is_modified(replica);
        self.records.put_back |= 1 << replica;
        self.ledger.any = true;
    }

    /// S7: after a clean end there is nothing to recover.
    pub(super) fn check_clean_start(&self, start: &Start) -> Checked {
        if self.records.is_closed && !start.forced && start.unsettled.iter().next().is_some() {
            let text = "something is to be recovered after a clean end";
            return Err(Violation::new("S7", text));
        }
        Ok(())
    }
}
