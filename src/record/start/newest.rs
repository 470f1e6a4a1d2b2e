//! Which table counts, of all that the records have.

use std::collections::HashSet;

use uuid::Uuid;

use super::{Candidate, Kept, Refusal, Side};
use crate::record::format::Read;
use crate::record::{Branch, Epoch, Extents, Layout, Member, Record, Stale, Table};

/// The records of disks that were served. A disk whose first table was not agreed upon is none yet.
pub(super) struct Created<'a> {
    candidates: &'a [Candidate],
    /// The record of each candidate.
    reads: Vec<Option<&'a Read>>,
}

/// Where the copies of a member are no good. Where both sets have a sector, it is stale.
#[derive(Clone, Debug)]
pub(super) struct Copies {
    pub(super) stale: Stale,
    pub(super) doubtful: Stale,
}

/// The newest table, and the records that are current.
pub(super) struct Newest<'a> {
    /// A record that has the table: the newest one that was agreed upon if any record has it,
    /// otherwise one that was proposed after that.
    pub(super) record: &'a Record,
    /// The branches that lead to it.
    pub(super) lineage: Vec<Branch>,
    /// The newest table that was agreed upon, then those proposed since: they may have been agreed
    /// upon as well, if their replicas are missing.
    pub(super) tables: Vec<Table>,
    /// The candidates whose records are current.
    pub(super) current: Vec<usize>,
    /// Those of them that do not know of the clean end of the others: their images were restored
    /// from copies that were made before it, and they say nothing of the others.
    pub(super) restored: Vec<usize>,
    /// The candidates whose records are of an older branch.
    pub(super) older_branch: Vec<usize>,
}

impl<'a> Created<'a> {
    pub(super) fn of(candidates: &'a [Candidate]) -> Self {
        let read = |candidate: &'a Candidate| match &candidate.image {
            Ok(found) => match &found.kept {
                Kept::Read(read) => Some(&**read),
                _ => None,
            },
            Err(_) => None,
        };
        let reads: Vec<Option<&Read>> = candidates.iter().map(read).collect();
        let records = reads.iter().flatten().map(|read| &read.record);
        let agreed: HashSet<Epoch> = records.map(Record::agreed).collect();
        let is_created = |read: &&Read| {
            let record = &read.record;
            record.agreed() != Epoch::NONE || agreed.contains(&record.epoch)
        };
        Self {
            candidates,
            reads: reads
                .into_iter()
                .map(|read| read.filter(is_created))
                .collect(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reads.iter().all(Option::is_none)
    }

    /// The record file of a candidate, if it is of a disk.
    pub(super) fn read(&self, place: usize) -> Option<&'a Read> {
        self.reads[place]
    }

    /// The candidates with a record.
    pub(super) fn records(&self) -> impl Iterator<Item = (usize, &'a Record)> + '_ {
        let reads = self.reads.iter().enumerate();
        reads.filter_map(|(place, read)| Some((place, &(*read)?.record)))
    }

    /// Refuses images of two disks, and copies of one image with its record.
    pub(super) fn check_identities(&self) -> Result<(), Refusal> {
        let mut seen: Vec<(usize, &Record)> = Vec::new();
        for (place, record) in self.records() {
            for (other_place, other) in &seen {
                let names = [*other_place, place].map(|place| self.name(place));
                if other.disk != record.disk {
                    return Err(Refusal::TwoDisks {
                        names,
                        disks: [other.disk, record.disk],
                    });
                }
                if other.replica == record.replica {
                    return Err(Refusal::Copied { names });
                }
            }
            seen.push((place, record));
        }
        Ok(())
    }

    pub(super) fn name(&self, place: usize) -> String {
        self.candidates[place].node_name.clone()
    }

    /// The table of one record, whatever the others say.
    pub(super) fn alone(&self, place: usize) -> Option<Newest<'a>> {
        let record = &self.read(place)?.record;
        Some(Newest {
            record,
            lineage: self.lineage(record).to_vec(),
            tables: vec![record.in_force()],
            current: vec![place],
            restored: Vec::new(),
            older_branch: Vec::new(),
        })
    }

    /// The newest table of all.
    pub(super) fn newest(&self) -> Result<Newest<'a>, Refusal> {
        let (mut same, mut older) = (Vec::new(), Vec::new());
        let lineage = self.newest_lineage()?;
        let tip = lineage.last().map(|branch| branch.id);
        for (place, record) in self.records() {
            let own = self.lineage(record).last().map(|branch| branch.id);
            if own == tip {
                same.push((place, record));
            } else {
                older.push((place, record));
            }
        }
        let agreed = same.iter().map(|(_, record)| record.agreed());
        let agreed = agreed.max_by_key(|epoch| epoch.number);
        let agreed = agreed.expect("the newest branch is that of a record");
        let is_current = |record: &Record| {
            let mut before = record.tables_before().iter();
            record.epoch == agreed || before.any(|table| table.epoch == agreed)
        };
        // Two tables of one number that were both agreed upon.
        let other = same
            .iter()
            .find(|(_, record)| record.agreed().number == agreed.number && !is_current(record));
        let mut current = same.clone();
        current.retain(|(_, record)| is_current(record));
        if let Some((_, record)) = other {
            return Err(self.split(current[0].1, record));
        }
        let restored = self.unaware_of_the_end(&current, agreed);
        let mut having = current.iter();
        let having =
            having.find(|(place, record)| record.epoch == agreed && !restored.contains(place));
        let (record, first) = match having {
            Some((_, record)) => (*record, record.table()),
            None => {
                // The first of those with the highest number.
                let proposals = current.iter().rev().map(|(_, record)| *record);
                let record = proposals.max_by_key(|record| record.epoch.number);
                let record = record.expect("a record has the newest epoch");
                (record, record.in_force())
            }
        };
        let places = |records: Vec<(usize, &Record)>| {
            let places = records.into_iter().map(|(place, _)| place);
            places.collect()
        };
        let mut tables = vec![first];
        for (_, record) in &current {
            let own = [record.table()];
            for table in record.tables_before().iter().chain(&own) {
                let is_known = tables.iter().any(|known| known.epoch == table.epoch);
                if table.epoch.number > agreed.number && !is_known {
                    tables.push(table.clone());
                }
            }
        }
        tables.sort_by_key(|table| table.epoch.number);
        Ok(Newest {
            record,
            lineage,
            tables,
            current: places(current),
            restored,
            older_branch: places(older),
        })
    }

    /// The active members of the table in force that do not know that its last end was clean,
    /// although others had recorded that: either as many complete ones as decide, so that no
    /// other is needed; or they have marks that were cleared after all had recorded it, as no close
    /// that was cut short leaves them.
    fn unaware_of_the_end(&self, current: &[(usize, &Record)], agreed: Epoch) -> Vec<usize> {
        let is_active =
            |record: &Record| record.member(record.replica).is_some_and(Member::is_active);
        let active = current.iter().copied();
        let active = active.filter(|(_, record)| record.epoch == agreed && is_active(record));
        let (clean, mut unaware): (Vec<_>, Vec<_>) = active.partition(|(_, record)| record.clean);
        let is_complete = |of: &Record| {
            let members = clean.iter();
            let mut members = members.filter_map(|(_, record)| record.member(of.replica));
            members.all(|member| member.stale.is_none() && member.doubtful.is_none())
        };
        let complete = clean.iter().filter(|(_, record)| is_complete(record));
        let complete = complete.count();
        let Some((_, record)) = clean.first() else {
            return Vec::new();
        };
        if complete < usize::from(record.threshold.votes) {
            let layout = record.layout();
            let marks = |place| {
                let read: &Read = self.read(place).expect("it has a record");
                read.intent.fitted(layout)
            };
            let has_cleared_mark = |place| {
                let mut clean = clean.iter().map(|(place, _)| marks(*place));
                clean.any(|clean| {
                    let mut cleared = marks(place);
                    cleared.remove_all(&clean);
                    !cleared.is_empty()
                })
            };
            // A page that does not verify counts as marked.
            let is_verified = |place: usize| {
                let read = self.read(place);
                read.is_some_and(|read| read.unverified_pages.is_empty())
            };
            unaware.retain(|(place, _)| is_verified(*place) && has_cleared_mark(*place));
        }
        unaware.into_iter().map(|(place, _)| place).collect()
    }

    /// The branches of a record, without one that was proposed and not agreed upon.
    fn lineage(&self, record: &'a Record) -> &'a [Branch] {
        let reach = self.reach(record);
        let count = record
            .lineage
            .partition_point(|branch| branch.since <= reach);
        &record.lineage[..count.max(1)]
    }

    /// The number of the last table of this record that is known to have been agreed upon.
    fn reach(&self, record: &Record) -> u64 {
        let mut others = self.records();
        if others.any(|(_, other)| other.agreed() == record.epoch) {
            record.epoch.number
        } else {
            record.agreed().number
        }
    }

    /// The lineage that contains all others. None of these may have gone on after its last branch
    /// was left.
    fn newest_lineage(&self) -> Result<Vec<Branch>, Refusal> {
        let tip = |record| self.lineage(record).last().map(|branch: &Branch| branch.id);
        let place_in = |lineage: &[Branch], id| {
            let mut branches = lineage.iter();
            branches.position(|branch| Some(branch.id) == id)
        };
        let longest = self.records().map(|(_, record)| record);
        let longest = longest.max_by_key(|record| {
            let contained = self
                .records()
                .filter(|(_, other)| place_in(self.lineage(record), tip(other)).is_some());
            contained.count()
        });
        let newest = longest.expect("a disk has a record");
        let lineage = self.lineage(newest);
        for (_, other) in self.records() {
            let left = place_in(lineage, tip(other));
            let next = left.map(|place| lineage.get(place + 1));
            let is_older = match next {
                None => false,
                Some(None) => true,
                Some(Some(next)) => self.reach(other) < next.since,
            };
            if !is_older {
                return Err(self.split(newest, other));
            }
        }
        Ok(lineage.to_vec())
    }

    fn split(&self, one: &'a Record, other: &'a Record) -> Refusal {
        let side = |record: &'a Record| {
            let branch = self.lineage(record).last().map(|branch| branch.id);
            let alike = self.records().filter(|(_, other)| {
                let same = self.lineage(other).last().map(|branch| branch.id) == branch;
                same && (other.agreed() == record.agreed() || other.epoch == record.agreed())
            });
            let names = |is_active: bool| {
                let members = record.members.iter();
                let members = members.filter(|member| member.is_active() == is_active);
                members.map(|member| member.node_name.clone()).collect()
            };
            Side {
                images: alike.map(|(place, _)| self.name(place)).collect(),
                branch: branch.unwrap_or_default(),
                epoch: record.agreed().number,
                active: names(true),
                inactive: names(false),
            }
        };
        Refusal::Split(Box::new([side(one), side(other)]))
    }

    /// That two candidates with records have gone on without each other.
    pub(super) fn split_of(&self, one: usize, other: usize) -> Refusal {
        let records: Vec<_> = self.records().collect();
        self.split(records[one].1, records[other].1)
    }

    /// The highest number that an epoch has anywhere.
    pub(super) fn highest_number(&self) -> u64 {
        let numbers = self.records().map(|(_, record)| record.epoch.number);
        numbers.max().unwrap_or_default()
    }
}

impl Copies {
    /// All of them are good.
    pub(super) const GOOD: Self = Self {
        stale: Stale::None,
        doubtful: Stale::None,
    };

    /// None of them is.
    pub(super) const STALE: Self = Self {
        stale: Stale::All,
        doubtful: Stale::None,
    };

    /// Adds what a record says of the member.
    pub(super) fn add(&mut self, member: &Member, layout: Layout) {
        self.stale = self.stale.union(&member.stale, layout);
        self.doubtful = self.doubtful.union(&member.doubtful, layout);
    }

    /// What is stale is not doubtful.
    #[must_use]
    pub(super) fn apart(self, layout: Layout) -> Self {
        Self {
            doubtful: self.doubtful.without(&self.stale, layout),
            ..self
        }
    }
}

impl Newest<'_> {
    /// Where the copies of a member are no good, as all records that have the table in force
    /// together say. Nothing has depended on a table that was only proposed; what it says counts
    /// only if no active member has the one before.
    pub(super) fn copies(&self, created: &Created<'_>, id: Uuid, intent: &Extents) -> Copies {
        let layout = self.record.layout();
        let records = self.believed(created);
        let records: Vec<&Record> = records.map(|read| &read.record).collect();
        let has_table = |record: &&&Record| record.epoch == self.in_force().epoch;
        let is_member_of = |record: &Record, id| record.member(id).is_some_and(Member::is_active);
        let is_active = |record: &Record| self.in_force().active.contains(&record.replica);
        let is_known = records
            .iter()
            .filter(has_table)
            .any(|record| is_active(record));
        let mut copies = Copies::GOOD;
        for record in records
            .iter()
            .filter(|record| !is_known || has_table(record))
        {
            let Some(member) = record.member(id) else {
                continue;
            };
            copies.add(member, layout);
            // The holder would know if its proposal had come into force. So a member that it was to
            // put out of service has missed nothing.
            let is_void = !has_table(&record) && is_member_of(record, record.replica);
            let was_active = self.in_force().active.contains(&id);
            let has_missed_nothing = is_void && was_active && !member.is_active();
            if member.stale_where_changed && !has_missed_nothing {
                let changed = Stale::of_extents(intent, layout);
                copies.stale = copies.stale.union(&changed, layout);
            }
        }
        copies
    }

    /// The current records, without those of restored images.
    pub(super) fn believed<'a>(
        &'a self,
        created: &'a Created<'_>,
    ) -> impl Iterator<Item = &'a Read> {
        let places = self.current.iter();
        let places = places.filter(|place| !self.restored.contains(place));
        places.filter_map(|place| created.read(*place))
    }

    /// Everything that a current record has marked.
    pub(super) fn intent(&self, created: &Created<'_>) -> Extents {
        let mut intent = Extents::new(self.record.layout());
        for read in self.believed(created) {
            intent.insert_all(&read.intent);
        }
        intent
    }

    /// The newest table that was agreed upon.
    pub(super) fn in_force(&self) -> &Table {
        &self.tables[0]
    }

    /// Whether the record of a member that is not active reaches as far as it once did.
    pub(super) fn reaches(&self, member: &Member, record: &Record) -> bool {
        let crate::record::MemberState::Inactive { holds } = member.state else {
            return false;
        };
        holds.is_none_or(|holds| {
            let agreed = record.agreed();
            agreed.number > holds.number || agreed == holds || record.epoch == holds
        })
    }
}
