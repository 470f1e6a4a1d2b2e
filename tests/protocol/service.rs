//! Writes to the records, and what they have to say of a replica that is evicted or returns
//! (`src/engine/remember.rs`, `src/engine/memory.rs`).

use crate::daemon::Daemon;
use crate::keeper::Step;
use crate::requests::{Goal, Stage};
use crate::rules::Rule;
use crate::sets::{self, Set, elements, has};
use crate::steps::SERVED;
use crate::world::{State, World};

impl World {
    /// A series of writes to the records begins.
    pub(crate) fn begin_records(&self, daemon: &mut Daemon, sweeps: Set) {
        let wanted = daemon.wanted(&self.rules);
        daemon.goal = Some(Goal {
            memory: daemon.memory,
            marks: daemon.wanted_marks,
        });
        daemon.marked &= !sweeps;
        match sweeps {
            0 => daemon.keeper.want(&self.rules, &wanted, false),
            _ => daemon.keeper.clear(&self.rules, sweeps, &wanted),
        }
        daemon.keeper.mark(daemon.wanted_marks);
        self.next_round(daemon);
    }

    fn next_round(&self, daemon: &mut Daemon) {
        match daemon.keeper.next_round(&self.rules) {
            Step::Write => {
                let writing = daemon.keeper.writing.as_ref().expect("it begins");
                if writing.replicas & !daemon.active != 0 {
                    // One was evicted since: the records are to say that.
                    daemon.keeper.writing = None;
                    self.begin_records(daemon, 0);
                }
            }
            Step::Reached => {
                let goal = daemon.goal.take().expect("a series runs");
                daemon.marked |= goal.marks;
                daemon.wanted_marks &= !goal.marks;
                daemon.is_remembered(goal.memory);
                daemon.serves = true;
            }
            Step::Blocked => {
                daemon.goal = None;
                daemon.is_blocked = true;
            }
        }
    }

    pub(crate) fn end_round(&self, state: &mut State) {
        let daemon = state.daemon.as_mut().expect(SERVED);
        let record = daemon.keeper.record;
        let writing = daemon.keeper.ended();
        for replica in elements(writing.replicas) {
            writing
                .part
                .put(&record, &mut state.replicas[replica].record);
        }
        match writing.any_left {
            true => self.begin_records(daemon, 0),
            false => self.next_round(daemon),
        }
    }

    pub(crate) fn evict(&self, state: &mut State, replica: usize, recorded: bool) {
        let daemon = state.daemon.as_mut().expect(SERVED);
        let bit = sets::one(replica);
        state.left.evictions -= 1;
        daemon.active &= !bit;
        let orphan = &mut state.replicas[replica].orphan;
        match self.rules.keeps(Rule::EvictedIsStale) {
            true => daemon.loses(&self.rules, replica),
            false => (0..self.rules.sectors).for_each(|s| daemon.unflushed[s] &= !bit),
        }
        if let Some(write) = &mut daemon.write
            && let Stage::Writing(copying) = &mut write.stage
        {
            if has(copying.waiting & !copying.performed, replica) {
                *orphan = Some((write.sector, write.version));
            }
            let is_last = copying.waiting == bit;
            copying.waiting &= !bit;
            if is_last {
                daemon.write_ends(&self.rules);
            }
        }
        if let Some(settling) = &mut daemon.settling
            && has(settling.writes.waiting, replica)
        {
            let sector = settling.sector;
            if !has(settling.writes.performed, replica) {
                *orphan = Some((sector, settling.winner));
            }
            settling.writes.waiting &= !bit;
            daemon.becomes_doubtful(sector.into(), bit);
        }
        self.settle_on(daemon);
        if let Some(flush) = &mut daemon.flush
            && has(flush.waiting, replica)
        {
            flush.waiting &= !bit;
            self.flush_on(daemon);
        }
        if let Some(writing) = &mut daemon.keeper.writing
            && has(writing.replicas, replica)
        {
            if recorded {
                let record = &mut state.replicas[replica].record;
                writing.part.put(&daemon.keeper.record, record);
            }
            writing.replicas &= !bit;
            writing.any_left = true;
            if writing.replicas == 0 {
                daemon.keeper.writing = None;
                self.begin_records(daemon, 0);
            }
        }
    }

    /// An evicted replica returns, or one whose image was not there at the start.
    pub(crate) fn return_of(&self, state: &mut State, replica: usize) {
        state.left.returns -= 1;
        let daemon = state.daemon.as_mut().expect(SERVED);
        let bit = sets::one(replica);
        let own = state.replicas[replica].record.copies_of(replica);
        daemon.active |= bit;
        daemon.keeper.found(replica);
        daemon.remembers();
        for sector in self.sectors() {
            if has(own.stale, sector) {
                daemon.misses(sector, bit);
                daemon.behind[sector] |= bit;
            }
            if has(own.doubtful, sector) {
                daemon.becomes_doubtful(sector, bit);
            }
            if !self.rules.keeps(Rule::ReturnIsStale) {
                daemon.stale[sector] &= !bit;
            }
        }
    }
}
