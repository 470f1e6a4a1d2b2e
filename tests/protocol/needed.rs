//! Which replicas the disk cannot lose from service (`src/quorum/health/needed.rs`, `binding.rs`).

use crate::daemon::Daemon;
use crate::requests::Stage;
use crate::rules::{Rule, Rules};
use crate::sets::{self, Set, has, len};

impl Daemon {
    /// Whether a member is needed (W6).
    pub(crate) fn is_needed(&self, rules: &Rules, replica: usize) -> bool {
        let (others, needed) = (self.active & !sets::one(replica), rules.threshold);
        let is_last = |may_succeed: Set| has(may_succeed, replica) && len(may_succeed) == needed;
        let writes = self.write.is_some_and(|write| match write.stage {
            Stage::Writing(copying) => is_last((copying.waiting | copying.done) & self.active),
            _ => false,
        });
        let flushes = self.flush.filter(|flush| flush.ended.is_none());
        let flushes = flushes.is_some_and(|flush| {
            let needs_its_copies = |sector: usize| {
                let holders = rules.members() & !(self.stale[sector] | flush.uncovered[sector]);
                has(flush.covered[sector] & holders, replica) && len(holders) == needed
            };
            is_last((flush.waiting | flush.done) & self.active)
                || (0..rules.sectors).any(needs_its_copies)
        });
        let copies = |sector: usize| {
            len(self.active & !self.stale[sector]) >= needed
                && len(others & !self.stale[sector]) < needed
        };
        let has_copies = (0..rules.sectors).any(copies);
        let mut tables = self.keeper.record.binding();
        let records = tables.any(|table| {
            let binds = |holders| table.is_bound_by(holders, rules.members(), needed);
            binds(self.active) && !binds(others)
        });
        len(others) < needed
            || rules.keeps(Rule::NoNeededEviction) && (writes || flushes || has_copies)
            || rules.keeps(Rule::RecordsNeedIt) && rules.keeps(Rule::AgreeWhenBound) && records
    }
}
