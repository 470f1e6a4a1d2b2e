//! What a step makes of the state.

use crate::daemon::Daemon;
use crate::requests::{Copying, Flush, Settling, Stage, Write};
use crate::rules::Rule;
use crate::sets::{self, len};
use crate::world::{Action, Origin, State, World};

pub(crate) const SERVED: &str = "a daemon serves the disk";

impl World {
    /// Takes a step, and answers the guest.
    pub(crate) fn step(&self, state: &mut State, action: Action) {
        match action {
            Action::Start(there) => self.begin(state, there),
            Action::Kill(versions, recorded) => {
                state.left.kills -= 1;
                self.end(state, (&versions, recorded), false);
            }
            Action::CutPower(versions, recorded) => {
                state.left.power_cuts -= 1;
                self.end(state, (&versions, recorded), true);
            }
            Action::DropPage(replica, sector, version) => {
                state.replicas[replica].copies[sector].becomes(version);
            }
            Action::EndOrphan { replica, performed } => {
                let orphan = state.replicas[replica].orphan.take();
                if let Some((sector, version)) = orphan.filter(|_| performed) {
                    state.replicas[replica].copies[usize::from(sector)].write(version);
                }
            }
            Action::GuestWrites(sector) => self.guest_writes(state, sector),
            Action::GuestFlushes => {
                state.left.flushes -= 1;
                let daemon = state.daemon.as_mut().expect(SERVED);
                daemon.begin_flush(&self.rules, false);
                let flush = daemon.flush.as_mut().expect("it begins");
                flush.acceptable = state.guest.legal;
            }
            Action::SubmitWrite => {
                let daemon = state.daemon.as_mut().expect(SERVED);
                let write = daemon.write.as_mut().expect("a write waits");
                write.stage = Stage::Writing(Copying {
                    waiting: daemon.active,
                    ..Copying::default()
                });
            }
            Action::Perform(origin, replica) => Self::perform(state, origin, replica),
            Action::Reply {
                origin,
                replica,
                success,
            } => {
                state.left.failures -= u8::from(!success);
                match origin {
                    Origin::Guest => self.reply(state, replica, success),
                    Origin::Settling => self.reply_to_settling(state, replica, success),
                }
            }
            Action::Flush { replica, success } => self.flush(state, replica, success),
            Action::BeginRecords(sweeps) => {
                state.left.sweeps -= u8::from(sweeps != 0);
                self.begin_records(state.daemon.as_mut().expect(SERVED), sweeps);
            }
            Action::EndRound => self.end_round(state),
            Action::Evict { replica, recorded } => self.evict(state, replica, recorded),
            Action::Return(replica) => self.return_of(state, replica),
            Action::Resync(replica, sector) => self.resync(state, replica, sector),
            Action::Vote(sector) => self.vote(state, sector),
            Action::Settle(sector) => self.settle(state, sector),
            Action::FlushWinner => {
                let daemon = state.daemon.as_mut().expect(SERVED);
                daemon.begin_flush(&self.rules, true);
            }
        }
        self.answer(state);
    }

    fn guest_writes(&self, state: &mut State, sector: usize) {
        state.left.writes -= 1;
        let daemon = state.daemon.as_mut().expect(SERVED);
        let version = state.guest.begins(sector);
        if let Some(flush) = &mut daemon.flush {
            flush.acceptable[sector] |= sets::one(version.into());
        }
        daemon.wanted_marks |= sets::one(sector) & !daemon.marked;
        daemon.write = Some(Write {
            sector: sets::small(sector),
            version,
            stage: Stage::Marking,
        });
    }

    fn perform(state: &mut State, origin: Origin, replica: usize) {
        let daemon = state.daemon.as_mut().expect(SERVED);
        let (sector, version, copying) = match origin {
            Origin::Guest => {
                let write = daemon.write.as_mut().expect("a write is in flight");
                let Stage::Writing(copying) = &mut write.stage else {
                    unreachable!("it is being written");
                };
                (write.sector, write.version, copying)
            }
            Origin::Settling => {
                let settling = daemon.settling.as_mut().expect("a winner is written");
                (settling.sector, settling.winner, &mut settling.writes)
            }
        };
        copying.performed |= sets::one(replica);
        state.replicas[replica].copies[usize::from(sector)].write(version);
    }

    fn reply(&self, state: &mut State, replica: usize, success: bool) {
        let daemon = state.daemon.as_mut().expect(SERVED);
        let bit = sets::one(replica);
        let write = daemon.write.as_mut().expect("a write is in flight");
        let Stage::Writing(copying) = &mut write.stage else {
            unreachable!("it is being written");
        };
        copying.waiting &= !bit;
        match success {
            true => copying.done |= bit,
            false => copying.failed |= bit,
        }
        if copying.waiting == 0 {
            daemon.write_ends(&self.rules);
        }
    }

    fn reply_to_settling(&self, state: &mut State, replica: usize, success: bool) {
        let daemon = state.daemon.as_mut().expect(SERVED);
        let bit = sets::one(replica);
        let settling = daemon.settling.as_mut().expect("a winner is written");
        settling.writes.waiting &= !bit;
        let sector = usize::from(settling.sector);
        let is_tainted = settling.writes.tainted & bit != 0;
        if success {
            settling.others &= !bit;
        }
        if !is_tainted && success {
            daemon.becomes_fresh(sector, bit);
        }
        if is_tainted && (success || self.rules.keeps(Rule::FailedRepairIsStale)) {
            daemon.becomes_doubtful(sector, bit);
            daemon.remembers();
        }
        daemon.restored[sector] |= bit & !daemon.stale[sector];
        daemon.is_written(sector, bit);
        self.settle_on(daemon);
    }

    /// All that is settled is written.
    pub(crate) fn settle_on(&self, daemon: &mut Daemon) {
        let Some(settling) = daemon
            .settling
            .filter(|settling| settling.writes.waiting == 0)
        else {
            return;
        };
        // A flush that runs for it ends first.
        if daemon.flush.is_some_and(|flush| flush.settles) {
            return;
        }
        if settling.is_outdated || !self.rules.keeps(Rule::SettleByFlushing) {
            self.settled(daemon);
        }
    }

    /// What was settled is decided, unless a replica has failed meanwhile.
    fn settled(&self, daemon: &mut Daemon) {
        let settling = daemon.settling.take().expect("a winner is written");
        let sector = usize::from(settling.sector);
        let holders = daemon.fresh(sector) & !settling.others;
        if !settling.is_outdated && len(holders) >= self.rules.threshold {
            let decision = (settling.winner, self.rules.members() & !holders);
            daemon.decide(&self.rules, sector, decision);
        }
    }

    fn flush(&self, state: &mut State, replica: usize, success: bool) {
        let daemon = state.daemon.as_mut().expect(SERVED);
        for copy in &mut state.replicas[replica].copies {
            copy.flush(success);
        }
        state.left.failures -= u8::from(!success);
        daemon.flush.as_mut().expect("it runs").waiting &= !sets::one(replica);
        if success {
            daemon.has_flushed(replica);
        } else if self.rules.keeps(Rule::FailedFlushIsStale) {
            daemon.loses(&self.rules, replica);
            daemon.untold = true;
        }
        self.flush_on(daemon);
    }

    pub(crate) fn flush_on(&self, daemon: &mut Daemon) {
        let Some(flush) = daemon.flush.filter(|flush| flush.waiting == 0) else {
            return;
        };
        if flush.ended.is_some() {
            return;
        }
        let success = daemon.flush_succeeds(&self.rules);
        daemon.flush = None;
        if flush.settles {
            self.settled(daemon);
        } else if success {
            let ended = Some(daemon.memory);
            daemon.flush = Some(Flush { ended, ..flush });
        }
    }

    fn resync(&self, state: &mut State, replica: usize, sector: usize) {
        let daemon = state.daemon.as_ref().expect(SERVED);
        let version = self.copied(state, daemon, replica, sector);
        let version = version.expect("there is a winner");
        let daemon = state.daemon.as_mut().expect(SERVED);
        state.replicas[replica].copies[sector].write(version);
        daemon.becomes_fresh(sector, sets::one(replica));
        daemon.restored[sector] |= sets::one(replica);
        daemon.is_written(sector, sets::one(replica));
    }

    fn vote(&self, state: &mut State, sector: usize) {
        let daemon = state.daemon.as_ref().expect(SERVED);
        if let Some((winner, holders)) = Self::tally(state, daemon, sector)
            && len(holders) >= self.rules.threshold
        {
            let decision = (winner, self.rules.members() & !holders);
            let daemon = state.daemon.as_mut().expect(SERVED);
            daemon.decide(&self.rules, sector, decision);
        }
    }

    fn settle(&self, state: &mut State, sector: usize) {
        let daemon = state.daemon.as_ref().expect(SERVED);
        let Some((winner, holders)) = Self::tally(state, daemon, sector) else {
            return;
        };
        let daemon = state.daemon.as_mut().expect(SERVED);
        let others = self.rules.members() & !holders;
        let is_enough = len(holders & !daemon.restored[sector]) >= self.rules.threshold;
        if is_enough || !self.rules.keeps(Rule::SettleByWriting) {
            return daemon.decide(&self.rules, sector, (winner, others));
        }
        daemon.settling = Some(Settling {
            sector: sets::small(sector),
            winner,
            others,
            writes: Copying {
                waiting: daemon.active & !holders,
                ..Copying::default()
            },
            is_outdated: false,
        });
        self.settle_on(daemon);
    }

    /// The guest gets its answers as soon as the records say what they depend on.
    fn answer(&self, state: &mut State) {
        let Some(daemon) = &mut state.daemon else {
            return;
        };
        let early = !self.rules.keeps(Rule::AnswerAfterRecords);
        if let Some(write) = daemon.write
            && let Stage::Written(done, memory) = write.stage
            && (early || memory == 0)
        {
            let sector = usize::from(write.sector);
            let no_vote = daemon.missed[sector] | daemon.behind[sector];
            let holders = self.rules.members() & (!no_vote | done);
            state.faults.answered_by_few |= len(holders) < self.rules.threshold;
            state.guest.sees(sector, write.version);
            daemon.write = None;
        }
        if let Some((sector, winner, memory)) = daemon.read
            && (early || memory == 0)
        {
            let sector = usize::from(sector);
            let holders = self.rules.members() & !daemon.missed[sector];
            state.faults.answered_by_few |= len(holders) < self.rules.threshold;
            state.guest.sees(sector, winner);
            daemon.read = None;
        }
        if let Some(flush) = &daemon.flush
            && flush.ended.is_some_and(|memory| early || memory == 0)
        {
            state.guest.after_power_cut = flush.acceptable;
            let is_few = |sector: usize| {
                let copies = self.replicas().map(|r| state.replicas[r].copies[sector]);
                let held = copies.filter(|copy| copy.storage & !flush.acceptable[sector] == 0);
                held.count() < self.rules.threshold
            };
            state.faults.flushed_by_few |= self.sectors().any(is_few);
            daemon.flush = None;
        }
    }
}
