//! A disk, and what may happen to it: the state, and the steps that are possible in it.

use crate::daemon::Daemon;
use crate::disk::{REPLICAS_MAX, Replica, Version, Versions};
use crate::guest::Guest;
use crate::requests::{Copying, Stage};
use crate::rules::{Rule, Rules};
use crate::sets::{self, Set, elements, has, len, subsets};
use crate::start::{self, Refusal, Start};

/// How often something may happen in a history.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    pub(crate) writes: u8,
    pub(crate) flushes: u8,
    /// Operations that fail, performed or not.
    pub(crate) failures: u8,
    pub(crate) evictions: u8,
    pub(crate) returns: u8,
    /// The daemon is killed.
    pub(crate) kills: u8,
    /// The power fails.
    pub(crate) power_cuts: u8,
    /// Marks that are taken away.
    pub(crate) sweeps: u8,
}

/// A disk of some replicas, and what may happen to it.
#[derive(Clone, Debug)]
pub(crate) struct World {
    pub(crate) rules: Rules,
    pub(crate) budget: Budget,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) replicas: [Replica; REPLICAS_MAX],
    /// `None`: it has ended.
    pub(crate) daemon: Option<Daemon>,
    pub(crate) guest: Guest,
    pub(crate) left: Budget,
    /// The run of the daemon.
    pub(crate) run: u8,
    /// Sectors of which no good copy need be left by the last crash, since a replica had failed or
    /// was evicted before: a read fails until the operator prefers a copy. These gaps of the
    /// protocol are allowed.
    /// - *unflushed*: what all others hold was not flushed since they were stale, and is older
    ///   after a power cut than what was durable; or it was flushed, and the records do not say so
    ///   yet.
    /// - *returning*: the only good copy is that of a replica that has returned, and that is not
    ///   agreed upon yet.
    /// - *torn*: the records said that one replica is stale, which was copied to since, and were
    ///   to say that another one is. Some say the one and some the other, and neither is believed.
    pub(crate) gaps: Set,
    /// What has gone against a rule in a step, and is not to be seen in a state.
    pub(crate) faults: Faults,
}

/// What a step must not do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Faults {
    /// The guest had an answer to a write or a read, and fewer than t members have done the write,
    /// or are not known to lack what it says.
    pub(crate) answered_by_few: bool,
    /// A flush has succeeded, and fewer than t replicas hold durably what it covers.
    pub(crate) flushed_by_few: bool,
    /// A start has left no good copy of a sector, and one with all images would have.
    pub(crate) lost_by_start: bool,
}

/// Whose operation it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The write of the guest.
    Guest,
    /// The winner of a vote is written.
    Settling,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    GuestWrites(usize),
    GuestFlushes,
    /// The write goes to the replicas.
    SubmitWrite,
    /// A replica does a write.
    Perform(Origin, usize),
    /// And replies.
    Reply {
        origin: Origin,
        replica: usize,
        success: bool,
    },
    /// A replica does the flush that runs.
    Flush {
        replica: usize,
        success: bool,
    },
    /// Records are to be written; marks of these sectors are taken away.
    BeginRecords(Set),
    /// A round of writes to records has ended.
    EndRound,
    /// Also whether a write to its record that is in flight is performed.
    Evict {
        replica: usize,
        recorded: bool,
    },
    /// An evicted replica does what was in flight, or never will.
    EndOrphan {
        replica: usize,
        performed: bool,
    },
    Return(usize),
    /// A resync of a sector of a replica.
    Resync(usize, usize),
    /// A read of a sector that a failed write has left.
    Vote(usize),
    /// A read of a sector that a crash has left.
    Settle(usize),
    /// The winner is flushed.
    FlushWinner,
    /// The kernel drops a page that it could not write back.
    DropPage(usize, usize, Version),
    /// The copies come out so, and these have the record that was being written.
    Kill(Versions, Set),
    CutPower(Versions, Set),
    /// These images are there.
    Start(Set),
}

impl World {
    pub(crate) fn replicas(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        0..self.rules.replicas
    }

    pub(crate) fn sectors(&self) -> impl Iterator<Item = usize> + Clone + use<> {
        0..self.rules.sectors
    }

    /// What a start with these images would be.
    pub(crate) fn start(&self, state: &State, there: Set) -> Result<Start, Refusal> {
        let mut records = [None; REPLICAS_MAX];
        for replica in elements(there) {
            records[replica] = Some(state.replicas[replica].record);
        }
        start::decide(&self.rules, &records, state.run + 1)
    }

    /// What most fresh copies of a sector are, and which.
    pub(crate) fn tally(state: &State, daemon: &Daemon, sector: usize) -> Option<(Version, Set)> {
        let fresh = elements(daemon.fresh(sector));
        let copies = fresh.map(|replica| (replica, state.replicas[replica].copies[sector].now));
        Daemon::winner(copies)
    }

    /// All steps that are possible.
    pub(crate) fn steps(&self, state: &State, actions: &mut Vec<Action>) {
        let Some(daemon) = &state.daemon else {
            let all = subsets(self.rules.members());
            let served = all.filter(|there| self.start(state, *there).is_ok());
            return actions.extend(served.map(Action::Start));
        };
        self.records(state, daemon, actions);
        self.crashes(state, daemon, actions);
        if daemon.serves {
            self.requests(state, daemon, actions);
            for replica in self.replicas() {
                self.of_replica(state, daemon, replica, actions);
            }
        }
        for replica in self.replicas() {
            for sector in self.sectors() {
                let copy = &state.replicas[replica].copies[sector];
                let others = copy.storage & !sets::one(copy.now.into());
                let others = elements(if copy.lost { others } else { 0 });
                actions.extend(others.map(|v| Action::DropPage(replica, sector, sets::small(v))));
            }
        }
    }

    fn requests(&self, state: &State, daemon: &Daemon, actions: &mut Vec<Action>) {
        let left = &state.left;
        for sector in self.sectors().filter(|sector| is_free(daemon, *sector)) {
            if left.writes > 0 && daemon.write.is_none() {
                actions.push(Action::GuestWrites(sector));
            }
            if daemon.settling.is_none() && daemon.read.is_none() {
                match has(daemon.unrecovered, sector) {
                    true => actions.push(Action::Settle(sector)),
                    false if has(daemon.undecided, sector) => actions.push(Action::Vote(sector)),
                    false => {}
                }
            }
        }
        if left.flushes > 0 && daemon.flush.is_none() {
            actions.push(Action::GuestFlushes);
        }
        if let Some(write) = &daemon.write
            && write.stage == Stage::Marking
            && (has(daemon.marked, write.sector.into()) || !self.rules.keeps(Rule::MarkBeforeWrite))
        {
            actions.push(Action::SubmitWrite);
        }
        let settling = daemon.settling.as_ref();
        if settling.is_some_and(|settling| settling.writes.waiting == 0) && daemon.flush.is_none() {
            actions.push(Action::FlushWinner);
        }
    }

    fn records(&self, state: &State, daemon: &Daemon, actions: &mut Vec<Action>) {
        if daemon.keeper.writing.is_some() {
            return actions.push(Action::EndRound);
        }
        if !daemon.serves {
            return;
        }
        let is_marking = daemon.wanted_marks & !daemon.marked != 0;
        if (daemon.memory > 0 || is_marking) && !daemon.is_blocked {
            actions.push(Action::BeginRecords(0));
        }
        let idle = self
            .sectors()
            .filter(|sector| self.is_idle(daemon, *sector));
        let idle = idle.fold(0, |set, sector| set | sets::one(sector));
        if state.left.sweeps > 0 {
            let sets = subsets(idle).filter(|set| *set != 0);
            actions.extend(sets.map(Action::BeginRecords));
        }
    }

    /// Whether its mark is needed no more (S4).
    fn is_idle(&self, daemon: &Daemon, sector: usize) -> bool {
        let unflushed = match self.rules.keeps(Rule::ClearAfterFlush) {
            true => daemon.unflushed[sector],
            false => 0,
        };
        let writes = daemon
            .write
            .is_some_and(|write| usize::from(write.sector) == sector);
        let lacking = daemon.stale[sector] | daemon.refreshed[sector] | daemon.restored[sector];
        has(daemon.marked & !daemon.undecided, sector)
            && !writes
            && (unflushed | lacking) & daemon.active == 0
    }

    fn of_replica(
        &self,
        state: &State,
        daemon: &Daemon,
        replica: usize,
        actions: &mut Vec<Action>,
    ) {
        let left = &state.left;
        let write = daemon.write.and_then(|write| match write.stage {
            Stage::Writing(copying) => Some((Origin::Guest, copying)),
            _ => None,
        });
        let settling = daemon.settling.map(|s| (Origin::Settling, s.writes));
        for (origin, copying) in [write, settling].into_iter().flatten() {
            self.of_copying(left, (origin, &copying), replica, actions);
        }
        let flushes = daemon.flush.map_or(0, |flush| flush.waiting);
        if has(flushes, replica) {
            let flush = |success| Action::Flush { replica, success };
            actions.push(flush(true));
            actions.extend((left.failures > 0).then(|| flush(false)));
        }
        if left.evictions > 0
            && has(daemon.active, replica)
            && !daemon.is_needed(&self.rules, replica)
        {
            let evict = |recorded| Action::Evict { replica, recorded };
            actions.push(evict(false));
            let writing = daemon.keeper.writing;
            let is_recorded = writing.is_some_and(|writing| has(writing.replicas, replica));
            actions.extend(is_recorded.then(|| evict(true)));
        }
        let is_drained = state.replicas[replica].orphan.is_none();
        if !is_drained {
            let end = |performed| Action::EndOrphan { replica, performed };
            actions.extend([end(true), end(false)]);
        }
        let may_return = is_drained || !self.rules.keeps(Rule::ReturnIsDrained);
        if left.returns > 0 && !has(daemon.active, replica) && may_return {
            actions.push(Action::Return(replica));
        }
        for sector in self.sectors() {
            if self.copied(state, daemon, replica, sector).is_some() {
                actions.push(Action::Resync(replica, sector));
            }
        }
    }

    fn of_copying(
        &self,
        left: &Budget,
        (origin, copying): (Origin, &Copying),
        replica: usize,
        actions: &mut Vec<Action>,
    ) {
        if !has(copying.waiting, replica) {
            return;
        }
        let reply = |success| Action::Reply {
            origin,
            replica,
            success,
        };
        actions.push(match has(copying.performed, replica) {
            true => reply(true),
            false => Action::Perform(origin, replica),
        });
        actions.extend((left.failures > 0).then(|| reply(false)));
    }

    /// What a resync copies to the replica: one step, under the lock of the sector.
    pub(crate) fn copied(
        &self,
        state: &State,
        daemon: &Daemon,
        replica: usize,
        sector: usize,
    ) -> Option<Version> {
        let is_stale = has(daemon.stale[sector] & daemon.active, replica);
        if !is_stale || has(daemon.undecided, sector) || !is_free(daemon, sector) {
            return None;
        }
        let (winner, holders) = Self::tally(state, daemon, sector)?;
        (len(holders) >= self.rules.threshold).then_some(winner)
    }

    fn crashes(&self, state: &State, daemon: &Daemon, actions: &mut Vec<Action>) {
        let replicas = daemon.keeper.writing.map_or(0, |writing| writing.replicas);
        let mut add = |power_cut, action: fn(Versions, Set) -> Action| {
            for versions in self.outcomes(state, power_cut) {
                actions.extend(subsets(replicas).map(|set| action(versions, set)));
            }
        };
        if state.left.kills > 0 {
            add(false, Action::Kill);
        }
        if state.left.power_cuts > 0 {
            add(true, Action::CutPower);
        }
    }

    /// The ways in which the copies can come out of a crash.
    fn outcomes(&self, state: &State, power_cut: bool) -> Vec<Versions> {
        let mut all = vec![Versions::default()];
        for replica in self.replicas() {
            for sector in self.sectors() {
                let copy = state.replicas[replica].copies[sector];
                let possible = match power_cut || copy.lost {
                    true => copy.storage,
                    false => sets::one(copy.now.into()),
                };
                let with = |versions: &Versions| {
                    let versions = *versions;
                    elements(possible).map(move |version| {
                        let mut versions = versions;
                        versions[replica][sector] = sets::small(version);
                        versions
                    })
                };
                all = all.iter().flat_map(with).collect();
            }
        }
        all
    }
}

/// Whether no request has the lock of the sector.
fn is_free(daemon: &Daemon, sector: usize) -> bool {
    let writes = daemon.write.is_some_and(|write| {
        usize::from(write.sector) == sector && !matches!(write.stage, Stage::Written(..))
    });
    let settles = daemon.settling;
    let settles = settles.is_some_and(|settling| usize::from(settling.sector) == sector);
    let reads = daemon.read;
    let reads = reads.is_some_and(|(read, ..)| usize::from(read) == sector);
    !writes && !settles && !reads
}
