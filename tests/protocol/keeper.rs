//! What is to be written to the records next (`src/record/keeper/`): pages of marks before a slot,
//! a table first as a proposal and then as agreed upon, marks that go last.

use crate::disk::{REPLICAS_MAX, SECTORS_MAX};
use crate::record::{Copies, Record};
use crate::rules::{Rule, Rules};
use crate::sets::{self, Set, elements, has};

/// The records of a disk while it is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Keeper {
    /// What the records are to say.
    pub(crate) record: Record,
    /// Those whose slot, and whose pages, say it.
    slots: Set,
    pages: Set,
    /// Marks to be taken away when the slots are durable.
    clearing: Set,
    /// Members that were to become active, and what was wrong with their copies before.
    returning: Set,
    before_return: [Copies; REPLICAS_MAX],
    /// A round of writes.
    pub(crate) writing: Option<Writing>,
}

/// What the records are to say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    pub(crate) active: Set,
    /// By sector, members.
    pub(crate) stale: [Set; SECTORS_MAX],
    pub(crate) doubtful: [Set; SECTORS_MAX],
}

/// Writes that are in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Writing {
    pub(crate) part: Part,
    /// The replicas whose records are being written.
    pub(crate) replicas: Set,
    /// One was evicted since they were asked.
    pub(crate) any_left: bool,
}

/// Slots and pages are written in rounds of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Part {
    Slot,
    Pages,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Write,
    Reached,
    /// The proposed table cannot come into force.
    Blocked,
}

impl Part {
    /// Replaces this part of a record.
    pub(crate) fn put(self, from: &Record, to: &mut Record) {
        let marked = match self {
            Self::Slot => to.marked,
            Self::Pages => from.marked,
        };
        let slot = match self {
            Self::Slot => *from,
            Self::Pages => *to,
        };
        *to = Record { marked, ..slot };
    }
}

impl Keeper {
    /// All records say this already.
    pub(crate) fn agreed(record: Record) -> Self {
        Self {
            record,
            slots: record.table.active,
            pages: record.table.active,
            ..Self::default()
        }
    }

    /// The keeper of a disk at its start, with what is to be written to all that are active.
    pub(crate) fn new(record: Record) -> Self {
        Self {
            record,
            ..Self::default()
        }
    }

    /// Has the records say this.
    pub(crate) fn want(&mut self, rules: &Rules, wanted: &Wanted, exactly: bool) {
        let exactly = exactly || self.clearing != 0;
        let changes = self.want_table(rules, wanted.active);
        let record = &self.record;
        let says = |sector: usize| {
            let marked = match has(record.marked, sector) {
                true => record.stale_where_changed,
                false => 0,
            };
            let stale = record.stale[sector] | marked;
            let doubtful = record.doubtful[sector] | stale;
            wanted.stale[sector] & !stale == 0 && wanted.doubtful[sector] & !doubtful == 0
        };
        if !changes && !exactly && (0..rules.sectors).all(says) {
            return;
        }
        let before = self.record;
        (self.record.stale, self.record.doubtful) = (wanted.stale, wanted.doubtful);
        for member in elements(rules.members() & !self.record.table.active & self.returning) {
            let copies = self
                .record
                .copies_of(member)
                .and(self.before_return[member]);
            self.record.set_copies(member, copies);
        }
        if self.record != before {
            self.slots = 0;
        }
    }

    fn want_table(&mut self, rules: &Rules, active: Set) -> bool {
        let known = self.record.table.active;
        if known == active {
            return false;
        }
        self.record.propose();
        self.record.table.active = active;
        for member in elements(known & !active) {
            self.record.stale_where_changed |= sets::one(member);
            if has(self.returning, member) {
                self.before_return[member].stale |= self.record.marked;
                let copies = self
                    .record
                    .copies_of(member)
                    .and(self.before_return[member]);
                self.record.set_copies(member, copies);
            }
        }
        for member in elements(active & !known) {
            self.returning |= sets::one(member);
            self.before_return[member] = self.record.copies_of(member);
            self.record.stale_where_changed &= !sets::one(member);
            self.pages &= !sets::one(member);
        }
        self.slots = 0;
        if !rules.keeps(Rule::AgreeInTwoRounds) {
            self.agree();
        }
        true
    }

    fn agree(&mut self) {
        self.record.before = Default::default();
        self.returning &= !self.record.table.active;
        for member in elements(!self.returning).filter(|member| *member < REPLICAS_MAX) {
            self.before_return[member] = Copies::default();
        }
    }

    /// Marks sectors.
    pub(crate) fn mark(&mut self, sectors: Set) {
        self.clearing &= !sectors;
        if sectors & !self.record.marked != 0 {
            self.record.marked |= sectors;
            self.pages = 0;
        }
    }

    /// Takes marks away, once the records say exactly where each member is stale.
    pub(crate) fn clear(&mut self, rules: &Rules, sectors: Set, wanted: &Wanted) {
        self.want(rules, wanted, rules.keeps(Rule::ClearAfterExactStaleness));
        self.clearing = sectors;
    }

    /// Whether those that will hold the table keep the others from going on with one before.
    fn is_bound(&self, rules: &Rules) -> bool {
        let holders = self.record.table.active;
        let mut before = self.record.before.iter();
        before.all(|table| table.is_bound_by(holders, rules.members(), rules.threshold))
    }

    /// Begins the next round of writes.
    pub(crate) fn next_round(&mut self, rules: &Rules) -> Step {
        let active = self.record.table.active;
        loop {
            for (part, said) in [(Part::Pages, self.pages), (Part::Slot, self.slots)] {
                let replicas = active & !said;
                if replicas != 0 {
                    self.writing = Some(Writing {
                        part,
                        replicas,
                        any_left: false,
                    });
                    return Step::Write;
                }
            }
            if !self.record.before.is_empty() {
                let is_bound = self.is_bound(rules);
                if !is_bound && rules.keeps(Rule::AgreeWhenBound) {
                    return Step::Blocked;
                }
                self.agree();
                self.slots = 0;
            } else if self.clearing != 0 {
                let clearing = std::mem::take(&mut self.clearing);
                if self.record.marked & clearing != 0 {
                    self.record.marked &= !clearing;
                    self.pages = 0;
                }
            } else {
                return Step::Reached;
            }
        }
    }

    /// The round has ended: these writes are durable.
    pub(crate) fn ended(&mut self) -> Writing {
        let writing = self.writing.take().expect("a round in flight");
        match writing.part {
            Part::Pages => self.pages |= writing.replicas,
            Part::Slot => self.slots |= writing.replicas,
        }
        writing
    }

    /// What the files of an evicted or missing member hold is not known any more.
    pub(crate) fn found(&mut self, member: usize) {
        self.slots &= !sets::one(member);
        self.pages &= !sets::one(member);
    }
}
