//! The records of the replicas, as bytes: written by the engines, torn by a crash, and read when
//! the daemon starts again (S2 to S4).

use std::path::PathBuf;

use uuid::Uuid;

use super::Violation;
use super::ledger::{Ledger, Masks};
use super::model::{SectorModel, Value};
use super::old_copies::OldCopy;
use super::operator::index;
use super::plan::{PLACES, bits, mask_of};
use super::random::Random;
use super::state::{Checked, World, trace};
use crate::common::operation::Action;
use crate::common::ranges::RangeSet;
use crate::common::{ReplicaSet, SectorRange};
use crate::quorum::health::{Copies, Remembered};
use crate::record::format::Read;
use crate::record::start::{Candidate, Found, Kept, Refusal, Start, Why, take_in};
use crate::record::{
    Creation, Epoch, Extents, Holder, Keeper, Layout, MemberState, PAGE_BYTES, Record, RecordWrite,
    Stale, Threshold, format,
};

/// What is written at once, or not.
const BLOCK: usize = 512;

/// The records of a disk.
#[derive(Debug, Default)]
pub(super) struct Records {
    files: [File; PLACES],
    /// The names in the table, of those who have had one.
    members: [Option<Uuid>; PLACES],
    /// The members whose record was not written, which the engine has seen: they are evicted, or
    /// the guest gets an error. A mask.
    pub(super) failed: u32,
    /// How often a write to a record has failed since the start of the daemon.
    pub(super) failures: u64,
    /// An old copy.
    pub(super) old: Option<OldCopy>,
    /// The images that were replaced by an old copy, or whose record was, and that were not served
    /// since: a mask.
    pub(super) put_back: u32,
    /// The images that a forced start has left behind, and that were not served since: a mask.
    pub(super) left_behind: u32,
    /// The images that were put back, or that were stale everywhere at a start or when they
    /// returned, and that were stale somewhere ever since: a mask. The records may say of them what
    /// they said then.
    pub(super) uncopied: u32,
    /// How many starts have begun a branch.
    pub(super) branches: u64,
    /// The last end was clean.
    pub(super) is_closed: bool,
    /// The end was to be clean and to record what the records did not say, and the daemon was
    /// killed meanwhile.
    pub(super) is_cut_short: bool,
    /// Where a replica that was missing is stale, as its own record says. The others need not say
    /// it before it rejoins.
    found: Masks,
    /// The sequence numbers of the records with which members have returned, until newer ones are
    /// written: a start knows from them that the disk has gone on.
    returned_with: [Option<u64>; PLACES],
    /// What was recovered and is not in the records.
    recovered: Vec<Recovered>,
}

/// A sector that was recovered.
#[derive(Debug)]
struct Recovered {
    sector: usize,
    /// What was known of it before.
    before: SectorModel,
    /// What it was recovered as although that was not permitted: corrupt copies have won.
    wrong: Vec<Value>,
}

/// The file of one record, as far as it was ever written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct File {
    slots: [Vec<u8>; 2],
    pages: Vec<u8>,
}

impl File {
    /// Writes each block that `reaches` the file.
    pub(super) fn write(
        &mut self,
        offset_bytes: u64,
        bytes: &[u8],
        mut reaches: impl FnMut() -> bool,
    ) {
        let places = [Layout::slot_offset(0), Layout::slot_offset(1)];
        let (part, start) = match offset_bytes.checked_sub(Layout::page_offset(0)) {
            Some(start) => (&mut self.pages, start),
            None => {
                let slot = usize::from(offset_bytes >= places[1]);
                (&mut self.slots[slot], offset_bytes - places[slot])
            }
        };
        let start = usize::try_from(start).expect("short");
        if part.len() < start + bytes.len() {
            part.resize(start + bytes.len(), 0);
        }
        for (number, block) in bytes.chunks(BLOCK).enumerate() {
            if reaches() {
                let at = start + number * BLOCK;
                part[at..at + block.len()].copy_from_slice(block);
            }
        }
    }

    /// The sequence number of the last slot.
    fn sequence(&self) -> u64 {
        match self.kept() {
            Kept::Read(read) => read.record.sequence,
            _ => 0,
        }
    }

    /// What a start finds.
    pub(super) fn kept(&self) -> Kept {
        let mut pages = self.pages.clone();
        pages.resize(pages.len().max(4 * PAGE_BYTES), 0);
        match format::read_parts([&self.slots[0], &self.slots[1]], &pages) {
            Ok(read) => Kept::Read(Box::new(read)),
            Err(unusable) => Kept::Unusable(unusable),
        }
    }
}

impl Records {
    /// The daemon ends.
    pub(super) fn forget(&mut self) {
        (self.failed, self.failures) = (0, 0);
        self.found = Masks::default();
    }

    /// The name of the member in this place, if there is one.
    pub(super) fn member(&self, place: usize) -> Option<Uuid> {
        self.members[place]
    }

    /// The record in this place.
    pub(super) fn file(&self, place: usize) -> &File {
        &self.files[place]
    }

    pub(super) fn file_mut(&mut self, place: usize) -> &mut File {
        &mut self.files[place]
    }

    /// The places whose record cannot be used: it was being made anew, or never written.
    pub(super) fn unusable(&self) -> u32 {
        self.places_where(|kept| matches!(kept, Kept::Unusable(_)))
    }

    /// The places whose record is of a disk of this size.
    pub(super) fn of_size(&self, sectors: u64) -> u32 {
        self.places_where(
            |kept| matches!(kept, Kept::Read(read) if read.record.capacity == sectors),
        )
    }

    fn places_where(&self, is_wanted: impl Fn(&Kept) -> bool) -> u32 {
        let places = (0..PLACES).filter(|place| is_wanted(&self.files[*place].kept()));
        places.fold(0, |mask, place| mask | 1 << place)
    }

    /// Those of these places, a mask, whose records have the newest table of them that was agreed
    /// upon.
    pub(super) fn knowing(&self, places: u32) -> u32 {
        let tables = bits(u64::from(places)).filter_map(|place| match self.files[place].kept() {
            Kept::Read(read) => Some((place, [read.record.epoch, read.record.agreed()])),
            _ => None,
        });
        let tables: Vec<_> = tables.collect();
        let agreed = tables.iter().map(|(_, [_, agreed])| *agreed);
        let newest = agreed.max_by_key(|epoch| epoch.number);
        let knows = |tables: &[Epoch; 2]| newest.is_some_and(|newest| tables.contains(&newest));
        let knowing = tables.iter().filter(|(_, tables)| knows(tables));
        knowing.fold(0, |mask, (place, _)| mask | 1 << place)
    }

    /// The places whose image has a record, or is to have one: a mask.
    pub(super) fn named(&self) -> u32 {
        let places = self.members.iter().enumerate();
        let named = places.filter(|(_, member)| member.is_some());
        named.fold(0, |mask, (place, _)| mask | 1 << place)
    }
}

/// A random name.
pub(super) fn uuid(random: &mut Random) -> Uuid {
    Uuid::from_u64_pair(random.bits(), random.bits())
}

pub(super) fn name(place: usize) -> String {
    format!("replica-{place}")
}

impl World {
    /// A new disk: its records are made before it is served.
    pub(super) fn make_records(&mut self) -> Checked {
        let members: Vec<usize> = self.members().collect();
        for place in &members {
            self.records.members[*place] = Some(uuid(&mut self.random));
        }
        let creation = Creation {
            disk: uuid(&mut self.random),
            branch: uuid(&mut self.random),
            run: uuid(&mut self.random),
            layout: Layout::with_extents(self.plan.sectors, self.plan.extent_sectors),
            threshold: Threshold {
                votes: u8::try_from(self.threshold).expect("few"),
                follows_majority: self.plan.follows,
            },
            members: members
                .iter()
                .map(|place| (self.member_in(*place), name(*place)))
                .collect(),
        };
        let mut record = Record::create(&creation);
        for place in members
            .iter()
            .filter(|place| self.missing >> **place & 1 == 1)
        {
            let member = record.member_mut(self.member_in(*place));
            let member = member.expect("it is one of them");
            member.state = MemberState::Inactive { holds: None };
            member.stale = Stale::All;
        }
        let unmarked = Extents::new(record.layout());
        self.write_first_records(record, unmarked, |_| 0)
    }

    /// The records are kept from now on, with `record` as the next proposal. `sequence`: of the
    /// last slot in each file.
    fn write_first_records(
        &mut self,
        record: Record,
        intent: Extents,
        sequence: impl Fn(usize) -> u64,
    ) -> Checked {
        let holders = (0..PLACES).map(|place| {
            let member = self.records.members[place]?;
            record.member(member)?;
            let sequence = sequence(place);
            Some(Holder { member, sequence })
        });
        let mut keeper = Keeper::new(record.clone(), holders.collect(), intent);
        while let Some(round) = keeper.next_round() {
            let mut asked = ReplicaSet::EMPTY;
            for (replica, write) in &round.writes {
                asked.insert(*replica);
                self.write_whole(replica.as_usize(), write);
            }
            keeper.ended(asked);
        }
        if !keeper.is_durable() {
            return Err(Violation::new(
                "S3",
                "the table of the start is not agreed upon",
            ));
        }
        self.shared.remember(keeper);
        Ok(())
    }

    pub(super) fn write_whole(&mut self, place: usize, write: &RecordWrite) {
        self.records.files[place].write(write.offset_bytes, &write.bytes, || true);
    }

    pub(super) fn member_in(&self, place: usize) -> Uuid {
        self.records.members[place].expect("a member has a name")
    }

    /// An operation on the record of a replica ends, with success or not.
    pub(super) fn end_record_write(&mut self, flight: usize, success: bool) {
        let flight = &self.flights[flight];
        let Action::Record {
            offset_bytes,
            bytes,
        } = &flight.operation.action
        else {
            return;
        };
        let place = flight.operation.replica.as_usize();
        let random = &mut self.random;
        let file = &mut self.records.files[place];
        file.write(*offset_bytes, bytes, || success || random.below(2) == 0);
        let returned_with = &mut self.records.returned_with[place];
        if returned_with.is_some_and(|sequence| file.sequence() > sequence) {
            *returned_with = None;
            self.are_served(1 << place);
        }
    }

    /// A crash: what is in flight is there or not, each block by itself.
    pub(super) fn tear_records(&mut self) {
        for index in 0..self.flights.len() {
            if self.flights[index].done.is_none() {
                let whole = self.random.below(3) == 0;
                self.end_record_write(index, whole);
            }
        }
    }

    /// A replica is added in this place.
    pub(super) fn add_record(&mut self, place: usize) {
        let member = uuid(&mut self.random);
        self.records.members[place] = Some(member);
        self.records.files[place] = File::default();
        self.records.uncopied &= !(1 << place);
        let holder = Holder {
            member,
            sequence: 0,
        };
        self.shared
            .add_with_record(index(place), holder, &name(place));
    }

    /// The image of a member that was missing is there, with its record: where it is stale.
    pub(super) fn find_record(&mut self, place: usize) -> Result<RangeSet, Violation> {
        let running = self.shared.records(|keeper| {
            let record = keeper.record();
            let active = record.members.iter().find(|member| member.is_active());
            let active = active.expect("the disk is served").id;
            let running = Read {
                record: record.for_replica(active, record.sequence),
                intent: keeper.intent().clone(),
                slots: [None, None],
                unverified_pages: Vec::new(),
            };
            (running, keeper.layout())
        });
        let (running, layout) = running.expect("it has records");
        let mut candidate = self.candidate(place);
        trace!(self, "{}", show_record(&candidate));
        let mut verdict = take_in(&running, &candidate);
        if let Err(refusal @ Refusal::Split(_)) = &verdict
            && self.records.left_behind >> place & 1 == 1
        {
            trace!(self, "refused: {refusal}");
            // Its record is destroyed, so that it is copied anew.
            self.statistics.split += 1;
            self.records.files[place] = File::default();
            candidate = self.candidate(place);
            verdict = take_in(&running, &candidate);
        }
        let verdict = match verdict {
            Ok(verdict) if verdict.member == self.member_in(place) => verdict,
            Ok(_) => {
                let text = format!("replica {place} is taken for another one");
                return Err(Violation::new("S3", text));
            }
            Err(refusal) => {
                let text = format!("replica {place} is not taken in: {refusal}");
                return Err(Violation::new("S3", text));
            }
        };
        if verdict.why == Why::NoRecord {
            self.records.files[place] = File::default();
        }
        let sequence = self.records.files[place].sequence();
        self.records.returned_with[place] = Some(sequence);
        self.shared.record_found(index(place), sequence);
        let mut stale = verdict.stale.to_ranges(layout);
        stale.insert_all(&verdict.doubtful.to_ranges(layout));
        self.records.found[place] = mask_of(stale.iter());
        Ok(stale)
    }

    /// Whether the operator may change the replicas: the last change is durable.
    pub(super) fn may_change_members(&self) -> bool {
        !self.plan.records || self.shared.are_records_durable()
    }

    /// The image in a place, with its record.
    pub(super) fn candidate(&self, place: usize) -> Candidate {
        Candidate {
            node_name: name(place),
            path: PathBuf::from(name(place)),
            image: Ok(Found {
                fingerprint: Some(self.fingerprint(place)),
                kept: self.records.files[place].kept(),
            }),
        }
    }

    /// Where replicas may differ at the start.
    pub(super) fn unsettled(&self, start: &Start) -> RangeSet {
        let mut changed = RangeSet::default();
        for range in start.unsettled.iter() {
            changed.insert(range);
        }
        let known = start.record.capacity;
        if known < self.plan.sectors {
            // The disk has grown since: nothing there was answered.
            changed.insert(SectorRange::new(known, self.plan.sectors - known));
        }
        changed
    }

    /// A vote has decided that a sector holds `value` after an unclean end, and the model does not
    /// know it yet. As long as the records do not say what has lost, the next end undoes that.
    pub(super) fn note_before_recovery(&mut self, sector: usize, value: Value, is_wrong: bool) {
        if !self.plan.records {
            return;
        }
        let recovered = &mut self.records.recovered;
        let known = recovered.iter().position(|known| known.sector == sector);
        let place = known.unwrap_or(recovered.len());
        if known.is_none() {
            recovered.push(Recovered {
                sector,
                before: self.model.sector(sector),
                wrong: Vec::new(),
            });
        }
        recovered[place].wrong.extend(is_wrong.then_some(value));
    }

    /// The daemon ends: what was recovered, and is not in the records, is forgotten. What was wrong
    /// before is corrupt again, also where it was copied to.
    pub(super) fn forget_recovered(&mut self, faults: &mut Ledger) {
        for recovered in std::mem::take(&mut self.records.recovered) {
            let Recovered {
                sector,
                before,
                wrong,
            } = recovered;
            self.model.take_back(sector, before);
            for (place, replica) in self.replicas.iter().enumerate() {
                let is_wrong = |value| u64::from(wrong.contains(&value)) << sector;
                faults.corrupt[place] |= is_wrong(replica.value(sector));
                faults.falsely_durable[place] |= is_wrong(replica.durable(sector));
            }
        }
    }

    /// What the daemon knows of the replicas at its start.
    pub(super) fn known_at_start(&self, start: &Start) -> Remembered {
        let layout = start.record.layout();
        let mut copies = vec![Copies::default(); PLACES];
        for place in self.members() {
            let id = self.member_in(place);
            let image = start.images.iter().find(|image| image.member == id);
            let member = start.record.member(id);
            let absent = member.map(|member| (&member.stale, &member.doubtful));
            let known = image
                .map(|image| (&image.stale, &image.doubtful))
                .or(absent);
            if let Some((stale, doubtful)) = known {
                copies[place] = Copies {
                    stale: stale.to_ranges(layout),
                    doubtful: doubtful.to_ranges(layout),
                };
            }
        }
        Remembered {
            members: ReplicaSet::from_bits(self.members),
            in_service: ReplicaSet::from_bits(self.members & !self.missing),
            threshold: usize::from(start.record.threshold.votes),
            threshold_follows: start.record.threshold.follows_majority,
            capacity_sectors: start.record.capacity,
            copies,
            ..Remembered::default()
        }
    }

    /// The records are written again by the daemon that has started.
    pub(super) fn keep_records(&mut self, start: &Start) -> Checked {
        let is_missing = |place: usize| self.missing >> place & 1 == 1;
        let sequence = |place: usize| match is_missing(place) {
            true => 0,
            false => self.records.files[place].sequence(),
        };
        let sequences: Vec<u64> = (0..PLACES).map(sequence).collect();
        trace!(
            self,
            "records: {} members, t = {}, unsettled {:?}",
            start.record.members.len(),
            start.record.threshold.votes,
            start.unsettled.iter().collect::<Vec<_>>()
        );
        self.write_first_records(start.record.clone(), start.unsettled.clone(), |place| {
            sequences[place]
        })
    }

    /// S2: what is known is in the records, or an answer waits for it.
    pub(super) fn check_remembered(&mut self) -> Checked {
        if !self.plan.records || !self.shared.are_records_durable() {
            return Ok(());
        }
        self.records.recovered.clear();
        let known = self.shared.remembered();
        let lacks = self.shared.records(|keeper| {
            let layout = keeper.layout();
            let mut marked = RangeSet::default();
            keeper
                .intent()
                .iter()
                .for_each(|range| marked.insert(range));
            known.members.iter().find_map(|replica| {
                let member = keeper.member(replica);
                let Some(member) = member.and_then(|id| keeper.record().member(id)) else {
                    return Some((replica, "it is not in the table".to_owned()));
                };
                let mut stale = member.stale.to_ranges(layout);
                if member.stale_where_changed {
                    stale.insert_all(&marked);
                }
                let copies = &known.copies[replica.as_usize()];
                // What was corrupt and is repaired, and not flushed, is no worse than before.
                let now = self.shared.stale_ranges(replica);
                let mut unknown = copies.stale.part_in(&now);
                unknown.remove_all(&stale);
                let mut doubtful = copies.doubtful.clone();
                doubtful.remove_all(&stale);
                doubtful.remove_all(&member.doubtful.to_ranges(layout));
                let is_active = known.in_service.contains(replica);
                if !is_active {
                    // Where nothing has changed it holds nothing older than the others.
                    unknown.remove_all(&member.doubtful.to_ranges(layout));
                    for sector in bits(self.records.found[replica.as_usize()]) {
                        unknown.remove(SectorRange::new(sector as u64, 1));
                    }
                }
                let what = if member.is_active() != is_active {
                    format!("that it is in service: {is_active}")
                } else if !unknown.is_empty() {
                    format!("that it is stale in {:x}", mask_of(unknown.iter()))
                } else if !doubtful.is_empty() {
                    format!("that it is doubtful in {:x}", mask_of(doubtful.iter()))
                } else {
                    return None;
                };
                Some((replica, what))
            })
        });
        match lacks.flatten() {
            None => Ok(()),
            Some((replica, what)) => {
                let text = format!("the records do not say of replica {}: {what}", replica.0);
                Err(Violation::new("S2", text))
            }
        }
    }
}

/// A record, for the trace.
pub(super) fn show_record(candidate: &Candidate) -> String {
    let name = &candidate.node_name;
    let Ok(Found { kept, .. }) = &candidate.image else {
        return format!("{name} is missing");
    };
    let Kept::Read(read) = kept else {
        return format!("{name} has no record that can be used: {kept:?}");
    };
    let record = &read.record;
    let members = record.members.iter().map(|member| {
        let state = if member.is_active() { "" } else { "!" };
        let sets = (&member.stale, &member.doubtful);
        let layout = record.layout();
        let [stale, doubtful] = [sets.0, sets.1].map(|set| mask_of(set.to_ranges(layout).iter()));
        format!("{state}{}:{stale:x}/{doubtful:x}", member.node_name)
    });
    let members: Vec<String> = members.collect();
    format!(
        "{name}: slot {}, epoch {} after {}, t = {}, marked {:x}, members {}",
        record.sequence,
        record.epoch,
        record.agreed(),
        record.threshold.votes,
        mask_of(read.intent.iter()),
        members.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_have_the_newest_table_know_that_a_copy_is_old() {
        let id = |place: usize| Uuid::from_u128(place as u128 + 1);
        let mut record = Record::create(&Creation {
            disk: Uuid::from_u128(8),
            branch: Uuid::from_u128(9),
            run: Uuid::from_u128(7),
            layout: Layout::with_extents(64, 1),
            threshold: Threshold::majority(3),
            members: (0..3).map(|place| (id(place), name(place))).collect(),
        });
        record.agree();
        let mut records = Records::default();
        let mut write = |record: &Record, place: usize, sequence| {
            let slot = record.for_replica(id(place), sequence).slot();
            records.files[place].write(slot.offset, &slot.bytes, || true);
        };
        (0..3).for_each(|place| write(&record, place, 1));
        record.propose();
        record.deactivate(id(2), None);
        // One of them has heard that it was agreed upon.
        write(&record, 0, 2);
        record.agree();
        write(&record, 1, 2);
        assert_eq!(records.knowing(0b111), 0b011);
        assert_eq!(
            records.knowing(0b101),
            0b101,
            "only proposed, as far as is known"
        );
        assert_eq!(records.knowing(0b100), 0b100);
        assert_eq!(records.knowing(0b1000), 0);
    }
}
