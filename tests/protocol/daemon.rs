//! What the daemon knows of the copies (`src/quorum/health/`).

use crate::disk::{REPLICAS_MAX, SECTORS_MAX, Version};
use crate::keeper::{Keeper, Wanted};
use crate::record::Record;
use crate::requests::{Flush, Goal, Memory, Settling, Stage, Write};
use crate::rules::{Rule, Rules};
use crate::sets::{self, Set, elements, len};

/// The state of a daemon that serves the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Daemon {
    /// The first table is agreed upon: the guest is served.
    pub(crate) serves: bool,
    /// The members in service.
    pub(crate) active: Set,
    /// By sector, the members whose copies do not count.
    pub(crate) stale: [Set; SECTORS_MAX],
    /// Those of them that have missed or failed the newest write. What is stale, and neither missed
    /// nor behind, is doubtful.
    pub(crate) missed: [Set; SECTORS_MAX],
    /// Those of them that may hold something older than what t members have made durable.
    pub(crate) behind: [Set; SECTORS_MAX],
    /// Those that were stale, and have not flushed what was written there since.
    pub(crate) refreshed: [Set; SECTORS_MAX],
    /// Those of them that were behind: they are behind again after a power cut.
    pub(crate) weak: [Set; SECTORS_MAX],
    /// Those that have not flushed what was written there for a vote that was not decided.
    pub(crate) restored: [Set; SECTORS_MAX],
    /// Those that have not flushed what was written there.
    pub(crate) unflushed: [Set; SECTORS_MAX],
    /// Sectors that a failed write has left, where old and new are legal.
    pub(crate) undecided: Set,
    /// Those of them that were marked at the start, where any copy is legal.
    pub(crate) unrecovered: Set,
    /// Sectors that may be written: the records of all in service say that they may differ.
    pub(crate) marked: Set,
    /// Sectors that are to be marked.
    pub(crate) wanted_marks: Set,
    pub(crate) keeper: Keeper,
    /// What the series of record writes that runs is for.
    pub(crate) goal: Option<Goal>,
    /// So often more was to be said since the records last said all of it.
    pub(crate) memory: Memory,
    /// A failed flush is not in the records.
    pub(crate) untold: bool,
    /// A table could not come into force.
    pub(crate) is_blocked: bool,
    pub(crate) write: Option<Write>,
    pub(crate) flush: Option<Flush>,
    pub(crate) settling: Option<Settling>,
    /// A vote has decided the sector, and a read returns the winner when the records say so.
    pub(crate) read: Option<(u8, Version, Memory)>,
}

impl Daemon {
    /// Begins with what the records say.
    pub(crate) fn start(rules: &Rules, record: &Record) -> Self {
        let active = record.table.active;
        let mut daemon = Self {
            active,
            stale: record.stale,
            undecided: record.marked,
            unrecovered: record.marked,
            marked: record.marked,
            keeper: Keeper::new(*record),
            ..Self::default()
        };
        for sector in elements(record.marked) {
            if rules.keeps(Rule::OutMeansStale) {
                daemon.stale[sector] |= rules.members() & !active;
            }
            // It may be in the page cache.
            daemon.unflushed[sector] = active;
        }
        (daemon.missed, daemon.behind) = (daemon.stale, daemon.stale);
        for sector in 0..rules.sectors {
            daemon.stale[sector] |= record.doubtful[sector];
        }
        daemon
    }

    /// Those whose copies of the sector count.
    pub(crate) fn fresh(&self, sector: usize) -> Set {
        self.active & !self.stale[sector]
    }

    /// Those that are stale, and may all the same hold the newest version.
    pub(crate) fn doubtful(&self, sector: usize) -> Set {
        self.stale[sector] & !self.missed[sector] & !self.behind[sector]
    }

    /// What the records have to say.
    pub(crate) fn wanted(&self, rules: &Rules) -> Wanted {
        let mut wanted = Wanted {
            active: self.active,
            stale: [0; SECTORS_MAX],
            doubtful: [0; SECTORS_MAX],
        };
        for sector in 0..rules.sectors {
            let weak = match rules.keeps(Rule::RecordWeak) {
                true => self.weak[sector],
                false => 0,
            };
            wanted.stale[sector] = self.missed[sector] | self.behind[sector] | weak;
            wanted.doubtful[sector] = self.doubtful(sector);
        }
        wanted
    }

    /// The records have to say more than before.
    pub(crate) fn remembers(&mut self) {
        let goal = self.goal.map(|goal| goal.memory);
        let write = self.write.and_then(|write| match write.stage {
            Stage::Written(_, memory) => Some(memory),
            _ => None,
        });
        let flush = self.flush.and_then(|flush| flush.ended);
        let read = self.read.map(|(.., memory)| memory);
        let last = [goal, write, flush, read].into_iter().flatten().max();
        if self.memory == last.unwrap_or_default() {
            self.memory += 1;
        }
    }

    /// The records say so much.
    pub(crate) fn is_remembered(&mut self, known: Memory) {
        let less = |memory: &mut Memory| *memory = memory.saturating_sub(known);
        less(&mut self.memory);
        if let Some(write) = &mut self.write
            && let Stage::Written(_, memory) = &mut write.stage
        {
            less(memory);
        }
        if let Some(flush) = &mut self.flush {
            flush.ended.iter_mut().for_each(less);
        }
        if let Some((.., memory)) = &mut self.read {
            less(memory);
        }
        self.untold &= self.memory != 0;
    }

    /// These may have lost the newest version.
    pub(crate) fn becomes_doubtful(&mut self, sector: usize, members: Set) {
        self.stale[sector] |= members;
        self.behind[sector] |= self.weak[sector] & members;
        self.weak[sector] &= !members;
        self.refreshed[sector] &= !members;
    }

    /// These do not hold the newest version.
    pub(crate) fn misses(&mut self, sector: usize, members: Set) {
        self.becomes_doubtful(sector, members);
        self.missed[sector] |= members;
    }

    /// These hold the newest version of the sector now.
    pub(crate) fn becomes_fresh(&mut self, sector: usize, members: Set) {
        self.refreshed[sector] |= self.stale[sector] & members;
        self.weak[sector] |= self.behind[sector] & members;
        self.stale[sector] &= !members;
        self.missed[sector] &= !members;
        self.behind[sector] &= !members;
    }

    /// Something is written to these: the running flush does not cover it.
    pub(crate) fn is_written(&mut self, sector: usize, members: Set) {
        self.unflushed[sector] |= members;
        if let Some(flush) = &mut self.flush {
            flush.later[sector] |= members;
        }
    }

    /// A member may have lost what it was given since its last flush, and what it is given now: it
    /// has failed a flush, or is evicted.
    pub(crate) fn loses(&mut self, rules: &Rules, replica: usize) {
        let bit = sets::one(replica);
        self.remembers();
        for sector in 0..rules.sectors {
            if self.unflushed[sector] & bit != 0 {
                self.becomes_doubtful(sector, bit);
                self.unflushed[sector] &= !bit;
                self.restored[sector] &= !bit;
            }
            if let Some(flush) = &mut self.flush {
                flush.uncovered[sector] |= flush.covered[sector] & bit;
                flush.covered[sector] &= !bit;
            }
        }
        if let Some(write) = &mut self.write
            && let Stage::Writing(copying) = &mut write.stage
        {
            copying.tainted |= bit;
            let sector = usize::from(write.sector);
            self.becomes_doubtful(sector, bit);
        }
        if let Some(settling) = &mut self.settling {
            settling.is_outdated = true;
            settling.writes.tainted |= bit;
        }
    }

    /// All replies to the write are in (W3, W7).
    pub(crate) fn write_ends(&mut self, rules: &Rules) {
        let write = self.write.expect("a write is in flight");
        let Stage::Writing(copying) = write.stage else {
            unreachable!("it is being written");
        };
        let sector = usize::from(write.sector);
        let needed = match rules.keeps(Rule::WriteNeedsThreshold) {
            true => rules.threshold,
            false => 1,
        };
        let no_vote = self.missed[sector] | self.behind[sector];
        let counts = match rules.keeps(Rule::WriteNeedsVotes) {
            true => copying.done & !(copying.tainted & no_vote),
            false => copying.done,
        };
        let success = len(counts) >= needed;
        let missed = match success && rules.keeps(Rule::FailedIsStale) {
            true => rules.members() & !copying.done,
            false => rules.members() & !(copying.done | copying.failed),
        };
        let tainted = match rules.keeps(Rule::FailedFlushTaints) {
            true => copying.tainted,
            false => copying.tainted & !self.active,
        };
        if (missed | tainted) & self.active != 0 {
            self.remembers();
        }
        self.write = None;
        self.becomes_fresh(sector, copying.done & !tainted);
        self.becomes_doubtful(sector, tainted);
        self.misses(sector, missed);
        self.is_written(sector, self.active);
        if success {
            self.undecided &= !sets::one(sector);
            self.unrecovered &= !sets::one(sector);
            let lost = self.stale[sector] & (self.missed[sector] | self.behind[sector]);
            self.write = Some(Write {
                stage: Stage::Written(copying.done & !lost, self.memory),
                ..write
            });
        } else if rules.keeps(Rule::FailedWriteIsUndecided) {
            self.undecided |= sets::one(sector);
        }
    }

    /// A flush begins.
    pub(crate) fn begin_flush(&mut self, rules: &Rules, settles: bool) {
        self.flush = Some(Flush {
            settles,
            waiting: self.active,
            covered: self.unflushed,
            uncovered: match rules.keeps(Rule::StaleIsNotCovered) {
                true => self.stale,
                false => [0; SECTORS_MAX],
            },
            ..Flush::default()
        });
    }

    /// A replica has flushed what the running flush covers.
    pub(crate) fn has_flushed(&mut self, replica: usize) {
        let bit = sets::one(replica);
        let flush = self.flush.as_mut().expect("a flush runs");
        flush.done |= bit;
        for sector in 0..SECTORS_MAX {
            let covered = flush.covered[sector] & bit;
            let later = flush.later[sector];
            flush.covered[sector] &= !bit;
            let sets = [
                &mut self.unflushed,
                &mut self.refreshed,
                &mut self.weak,
                &mut self.restored,
            ];
            sets.into_iter()
                .for_each(|set| set[sector] &= !covered | later);
        }
    }

    /// All replies to the flush are in. Whether it has succeeded (W5).
    pub(crate) fn flush_succeeds(&mut self, rules: &Rules) -> bool {
        let flush = self.flush.expect("a flush is in flight");
        let needed = match rules.keeps(Rule::FlushNeedsThreshold) {
            true => rules.threshold,
            false => 1,
        };
        let holders =
            |sector: usize| rules.members() & !(self.stale[sector] | flush.uncovered[sector]);
        let is_enough = (0..rules.sectors).all(|sector| len(holders(sector)) >= needed);
        let is_enough = is_enough || !rules.keeps(Rule::FlushNeedsHolders);
        let success = len(flush.done) >= needed && is_enough;
        if success {
            self.falls_behind(rules, &flush.uncovered);
        }
        success
    }

    /// All that a flush has covered is durable on t members, and not on these.
    fn falls_behind(&mut self, rules: &Rules, uncovered: &[Set; SECTORS_MAX]) {
        let mut any = false;
        for (sector, uncovered) in uncovered.iter().enumerate().take(rules.sectors) {
            let refreshed = self.refreshed[sector];
            any |= (uncovered | refreshed) & self.active != 0;
            self.behind[sector] |= uncovered & self.stale[sector];
            self.weak[sector] |= refreshed;
        }
        if any {
            self.remembers();
        }
    }

    /// The version of a sector that most of these copies are, then the one listed first; and who
    /// holds it.
    pub(crate) fn winner(
        copies: impl Iterator<Item = (usize, Version)> + Clone,
    ) -> Option<(Version, Set)> {
        let holders = |version: Version| {
            let held = copies.clone().filter(|(_, held)| *held == version);
            held.fold(0, |set, (replica, _)| set | sets::one(replica))
        };
        let all = copies.clone();
        let all = all.map(|(_, version)| (version, holders(version)));
        let first = |holders: Set| REPLICAS_MAX - holders.trailing_zeros() as usize;
        all.max_by_key(|(_, holders)| (len(*holders), first(*holders)))
    }

    /// A vote has decided the sector. Those that do not hold the winner are stale, and a read waits
    /// for the records (S5, W7).
    pub(crate) fn decide(
        &mut self,
        rules: &Rules,
        sector: usize,
        (winner, others): (Version, Set),
    ) {
        let bit = sets::one(sector);
        if self.unrecovered & bit != 0 && self.restored[sector] != 0 {
            self.weak[sector] |= self.restored[sector] & !self.stale[sector];
            self.remembers();
        }
        if rules.keeps(Rule::LoserIsStale) && others != 0 {
            self.misses(sector, others);
            if self.unrecovered & bit != 0 {
                self.behind[sector] |= others;
            }
            self.remembers();
        }
        self.undecided &= !bit;
        self.unrecovered &= !bit;
        self.read = Some((sets::small(sector), winner, self.memory));
    }
}
