//! What a start makes of the records that are there (`src/record/start/`).

use crate::disk::{REPLICAS_MAX, SECTORS_MAX};
use crate::record::{Copies, Epoch, Record, Table, Tables, set_sectors};
use crate::rules::{Rule, Rules};
use crate::sets::{self, Set, elements, has, len};

/// The records of the images that are there.
pub(crate) type Records = [Option<Record>; REPLICAS_MAX];

/// How a disk may be served: the record that is proposed to all images that are there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Start {
    pub(crate) record: Record,
}

/// Why it may not be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Two tables of one number were agreed upon.
    Split,
    /// As many are missing as could have gone on.
    OthersKnow,
    /// Those that are there could not keep the others from going on.
    NotBound,
    /// Only those that are missing have a good copy.
    OnlyCopies,
    /// Too few of them may vote.
    TooFew,
    /// There is no record.
    None,
}

/// The newest table, and the records that are current.
struct Newest<'a> {
    rules: &'a Rules,
    records: &'a Records,
    record: Record,
    tables: Vec<Table>,
    current: Set,
    intent: Set,
}

fn there(records: &Records) -> impl Iterator<Item = (usize, Record)> + Clone + '_ {
    let records = records.iter().enumerate();
    records.filter_map(|(replica, record)| Some((replica, (*record)?)))
}

/// Decides what may be served by a run of the daemon.
pub(crate) fn decide(rules: &Rules, records: &Records, run: u8) -> Result<Start, Refusal> {
    let newest = Newest::of(rules, records)?;
    let images = there(records).fold(0, |set, (replica, _)| set | sets::one(replica));
    let (mut stale, mut doubtful) = ([0; SECTORS_MAX], [0; SECTORS_MAX]);
    let mut voting = 0;
    for member in elements(rules.members()) {
        let copies = match records[member] {
            Some(_) if newest.is_old(member) => Copies::STALE,
            Some(record) => {
                voting |= sets::one(member);
                newest.copies(member).and(record.copies_of(member))
            }
            None => newest.copies_of_missing(member),
        };
        set_sectors(&mut stale, member, copies.stale);
        set_sectors(&mut doubtful, member, copies.doubtful & !copies.stale);
    }
    let before = newest.tables_before(images);
    newest.check_history(images, &before)?;
    newest.check_only_copies(images, &stale)?;
    if len(voting) < rules.threshold {
        return Err(Refusal::TooFew);
    }
    let highest = there(records).map(|(_, record)| record.table.epoch.number);
    let number = highest.max().unwrap_or_default() + 1;
    let stale_where_changed = match rules.keeps(Rule::OutMeansStale) {
        true => rules.members() & !images,
        false => 0,
    };
    let record = Record {
        table: Table {
            epoch: Epoch { number, run },
            active: images,
        },
        before: Tables::of(before.into_iter()),
        stale,
        doubtful,
        stale_where_changed,
        marked: newest.intent,
    };
    Ok(Start { record })
}

impl<'a> Newest<'a> {
    fn of(rules: &'a Rules, records: &'a Records) -> Result<Self, Refusal> {
        let agreed = there(records).map(|(_, record)| record.in_force().epoch);
        let agreed = agreed.max_by_key(|epoch| epoch.number);
        let agreed = agreed.ok_or(Refusal::None)?;
        let is_current = |record: &Record| record.binding().any(|table| table.epoch == agreed);
        let all = || there(records).map(|(_, record)| record);
        let is_other = |record: &Record| {
            record.in_force().epoch.number == agreed.number && !is_current(record)
        };
        if all().any(|record| is_other(&record)) {
            return Err(Refusal::Split);
        }
        let current = there(records).filter(|(_, record)| is_current(record));
        let having = current
            .clone()
            .find(|(_, record)| record.table.epoch == agreed);
        let proposals: Vec<Record> = current.clone().map(|(_, record)| record).collect();
        let last = proposals.iter().rev();
        let last = last.max_by_key(|record| record.table.epoch.number);
        let record = having.map_or_else(|| *last.expect("a record has it"), |(_, record)| record);
        let in_force = match having {
            Some((_, record)) => record.table,
            None => record.in_force(),
        };
        let mut tables = vec![in_force];
        for table in proposals.iter().flat_map(Record::binding) {
            let is_known = tables.iter().any(|known| known.epoch == table.epoch);
            if table.epoch.number > agreed.number && !is_known {
                tables.push(table);
            }
        }
        tables.sort_by_key(|table| table.epoch.number);
        let intent = proposals.iter().fold(0, |all, record| all | record.marked);
        let places = current.fold(0, |set, (replica, _)| set | sets::one(replica));
        Ok(Self {
            rules,
            records,
            record,
            tables,
            current: places,
            intent,
        })
    }

    fn in_force(&self) -> &Table {
        &self.tables[0]
    }

    /// An active member whose record is not current was restored from a copy.
    fn is_old(&self, member: usize) -> bool {
        !has(self.current, member) && self.record.is_active(member)
    }

    /// What the records say of the copies of the member.
    fn copies(&self, member: usize) -> Copies {
        let in_force = self.in_force();
        let believed = elements(self.current).filter_map(|replica| {
            let record = self.records[replica]?;
            Some((replica, record))
        });
        let has_table = |record: &Record| record.table.epoch == in_force.epoch;
        let is_known = believed
            .clone()
            .any(|(holder, record)| has_table(&record) && has(in_force.active, holder));
        let mut copies = Copies::default();
        for (holder, record) in believed.filter(|(_, record)| !is_known || has_table(record)) {
            copies = copies.and(record.copies_of(member));
            // The holder would know if its proposal had come into force.
            let is_void = !has_table(&record) && record.is_active(holder);
            let was_active = has(in_force.active, member);
            let has_missed_nothing = is_void && was_active && !record.is_active(member);
            if has(record.stale_where_changed, member) && !has_missed_nothing {
                copies.stale |= self.intent;
            }
        }
        copies
    }

    /// The same of a member that is not there, in the next table.
    fn copies_of_missing(&self, member: usize) -> Copies {
        let was_active = has(self.in_force().active, member);
        match was_active || !self.record.is_active(member) {
            true => self.copies(member),
            // It was to become active, and what it held before is not known any more.
            false => Copies::STALE,
        }
    }

    /// The tables before the next one. A proposed table was never agreed upon if all its members
    /// are there, and it is not the one in force.
    fn tables_before(&self, images: Set) -> Vec<Table> {
        let all = images == self.rules.members() || !self.rules.keeps(Rule::KeepProposals);
        let count = if all { 1 } else { self.tables.len() };
        self.tables[..count].to_vec()
    }

    /// Whether all that was acknowledged is known.
    fn check_history(&self, images: Set, before: &[Table]) -> Result<(), Refusal> {
        let (rules, threshold) = (self.rules, self.rules.threshold);
        for table in before {
            let is_known = table.is_known_to(self.current, threshold);
            let is_bound = table.is_bound_by(images, rules.members(), threshold);
            if !is_known && rules.keeps(Rule::RefuseWhatOthersKnow) {
                return Err(Refusal::OthersKnow);
            }
            if !is_bound {
                return Err(Refusal::NotBound);
            }
        }
        Ok(())
    }

    /// Whether what was being changed can be recovered without those that are missing.
    fn check_only_copies(&self, images: Set, stale: &[Set; SECTORS_MAX]) -> Result<(), Refusal> {
        let lost = |sector: &usize| images & !stale[*sector] == 0;
        let mut lost = elements(self.intent).filter(lost);
        let missing = self.rules.members() & !images;
        let holds =
            |sector: usize| elements(missing).any(|member| !has(self.copies(member).stale, sector));
        match lost.any(holds) && self.rules.keeps(Rule::RefuseWithoutOnlyCopy) {
            true => Err(Refusal::OnlyCopies),
            false => Ok(()),
        }
    }
}
