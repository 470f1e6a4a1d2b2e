//! What a crash leaves, and how the next daemon begins.

use crate::daemon::Daemon;
use crate::disk::Versions;
use crate::record::Record;
use crate::sets::{self, Set, elements};
use crate::steps::SERVED;
use crate::world::{State, World};

impl World {
    pub(crate) fn begin(&self, state: &mut State, there: Set) {
        let start = self.start(state, there).expect("it is not refused");
        let all = self.start(state, self.rules.members());
        state.run += 1;
        let mut daemon = Daemon::start(&self.rules, &start.record);
        if let Ok(all) = all {
            let all = Daemon::start(&self.rules, &all.record);
            let members = self.rules.members();
            let legal = |daemon: &Daemon, sector: usize| {
                members & !(daemon.missed[sector] | daemon.behind[sector])
            };
            let lost = |sector| legal(&all, sector) != 0 && legal(&daemon, sector) == 0;
            state.faults.lost_by_start |= self.sectors().any(lost);
        }
        self.begin_records(&mut daemon, 0);
        state.daemon = Some(daemon);
    }

    /// The daemon has ended.
    pub(crate) fn end(
        &self,
        state: &mut State,
        (versions, recorded): (&Versions, Set),
        power_cut: bool,
    ) {
        let daemon = state.daemon.take().expect(SERVED);
        if let Some(writing) = daemon.keeper.writing {
            for replica in elements(recorded) {
                let record = &mut state.replicas[replica].record;
                writing.part.put(&daemon.keeper.record, record);
            }
        }
        for replica in self.replicas() {
            state.replicas[replica].orphan = None;
            for sector in self.sectors() {
                let copy = &mut state.replicas[replica].copies[sector];
                if power_cut || copy.lost {
                    copy.becomes(versions[replica][sector]);
                }
            }
        }
        // Not covered: a failed flush that the records do not know of.
        if power_cut || daemon.untold {
            state.guest.legal = state.guest.after_power_cut;
        }
        state.gaps = self.gaps(state, &daemon);
    }

    /// The sectors of which no good copy need be left by a crash: no member that is active by the
    /// table in force is called good by all that the records say, or were to say.
    fn gaps(&self, state: &State, daemon: &Daemon) -> Set {
        let (left, before) = (&state.left, &self.budget);
        if left.failures == before.failures && left.evictions == before.evictions {
            return 0;
        }
        let records = self
            .replicas()
            .map(|replica| state.replicas[replica].record);
        let tables = records.clone().map(|record| record.in_force());
        let newest = tables.max_by_key(|table| table.epoch.number);
        let in_force = newest.expect("each replica has a record");
        let is_current =
            |record: &Record| record.binding().any(|table| table.epoch == in_force.epoch);
        let records: Vec<Record> = records.filter(is_current).collect();
        let is_gap = |sector: &usize| {
            let good = |record: &Record| record.table.active & !record.stale[*sector];
            let last = in_force.active & good(&daemon.keeper.record);
            records.iter().fold(last, |all, record| all & good(record)) == 0
        };
        let gaps = self.sectors().filter(is_gap);
        gaps.fold(0, |set, sector| set | sets::one(sector))
    }
}
